import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastgrpo import group_advantages

pytestmark = pytest.mark.quick


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.lists(st.floats(-100, 100, width=32), min_size=4, max_size=4), min_size=1, max_size=6),
    st.floats(-10, 10),
)
def test_properties(groups, shift):
    rewards = torch.tensor(groups, dtype=torch.float64)
    flat = rewards.reshape(-1)
    out = group_advantages(flat, 4).view_as(rewards)
    assert torch.isfinite(out).all()
    torch.testing.assert_close(out.sum(1), torch.zeros(len(groups), dtype=torch.float64), atol=1e-6, rtol=0)
    torch.testing.assert_close(group_advantages(flat + shift, 4).view_as(out), out, atol=1e-6, rtol=1e-6)
    want = (rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True) + 1e-4)
    torch.testing.assert_close(out, want, atol=1e-9, rtol=1e-9)


def test_equal_rewards_have_no_advantage():
    assert group_advantages(torch.full((8,), 0.3)).abs().max() < 1e-3
    assert group_advantages(torch.ones(8)).count_nonzero() == 0


def test_several_rewards_are_summed():
    rewards = torch.randn(8, 3)
    torch.testing.assert_close(group_advantages(rewards, 4), group_advantages(rewards.sum(1), 4))


def test_unscored_answers():
    rewards = torch.tensor([[1.0, torch.nan], [0.0, 2.0], [torch.nan, torch.nan], [4.0, 0.0]])
    out = group_advantages(rewards, 4, scale="none")
    torch.testing.assert_close(out, torch.tensor([1.0, 2.0, 0.0, 4.0]) - torch.tensor([1, 1, 0, 1]) * 7 / 3)
    assert group_advantages(torch.tensor([torch.nan, 1.0]), 2).eq(0).all()


def test_scales():
    rewards = torch.randn(16, dtype=torch.float64)
    centred = rewards.view(2, 8) - rewards.view(2, 8).mean(1, keepdim=True)
    torch.testing.assert_close(group_advantages(rewards, scale="none"), centred.view(-1))
    torch.testing.assert_close(group_advantages(rewards, scale="batch"), centred.view(-1) / (rewards.std() + 1e-4))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64])
def test_dtypes(dtype):
    assert group_advantages(torch.arange(8).to(dtype)).dtype == torch.float32

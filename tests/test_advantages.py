import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastgrpo import group_advantages
from fastgrpo.advantages import ESTIMATORS, has_spread

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


# The others against their papers' formulas in plain Python, one group after another; NaN cannot be scored.

GROUP = 5


def mean(values):
    return sum(values) / len(values)


def plain_rloo(group, _):
    return [r - mean([*group[:i], *group[i + 1 :]]) if len(group) > 1 else 0.0 for i, r in enumerate(group)]


def plain_reinforce(group, groups):
    centred = [r - mean(g) for g in groups for r in g]
    variance = sum((c - mean(centred)) ** 2 for c in centred) / (len(centred) - 1)
    return [(r - mean(group)) / (variance**0.5 + 1e-4) for r in group]


def plain_maxrl(group, _):
    return [(r - mean(group)) / mean(group) if mean(group) > 0 else 0.0 for r in group]


def plain_pass_at_k(group, _, k=3):
    """Every set of k answers, its best answer's reward, normalised over the sets; an answer gets its sets' mean."""
    sets = list(itertools.combinations(range(len(group)), k))
    best = [max(group[i] for i in chosen) for chosen in sets]
    if not sets or max(best) == min(best):
        return [0.0] * len(group)
    deviation = mean([(b - mean(best)) ** 2 for b in best]) ** 0.5
    return [mean([(b - mean(best)) / deviation for b, s in zip(best, sets) if i in s]) for i in range(len(group))]


PLAIN = {
    "rloo": plain_rloo, "reinforce_plus_plus_baseline": plain_reinforce, "maxrl": plain_maxrl,
    "pass_at_k": plain_pass_at_k,
}  # fmt: skip


def some_rewards(seed, *shape):
    g = torch.Generator().manual_seed(seed)
    rewards = torch.rand(*shape, generator=g, dtype=torch.float64)
    rewards[:GROUP] = (rewards[:GROUP] > 0.5).double()  # 0 and 1, as most are
    rewards[GROUP : 2 * GROUP] = 0.3  # without spread
    rewards[2 * GROUP + 1] = torch.nan
    rewards[3 * GROUP : 4 * GROUP - 1] = torch.nan  # one answer left
    rewards[-GROUP:] = torch.nan
    return rewards


@pytest.mark.parametrize("estimator", PLAIN)
def test_estimators(estimator):
    rewards = some_rewards(1, 7 * GROUP)
    out = group_advantages(rewards, GROUP, estimator=estimator, pass_at_k=3)
    groups = [[r for r in group if r == r] for group in rewards.view(-1, GROUP).tolist()]
    known = [group for group in groups if group]
    want = [PLAIN[estimator](group, known) for group in groups if group]
    assert out[~rewards.isnan()].tolist() == pytest.approx([a for group in want for a in group], rel=1e-9, abs=1e-12)
    assert out[rewards.isnan()].eq(0).all()
    assert out[GROUP : 2 * GROUP].eq(0).all()
    assert out.dtype == torch.float64
    assert group_advantages(rewards.float(), GROUP, estimator=estimator, pass_at_k=3).dtype == torch.float32


@pytest.mark.parametrize("right", [0, 1, 3, 8])
def test_pass_at_k_is_the_papers_closed_form(right):
    """Chen et al., eqs. 10 to 14: rewards of 0 and 1."""
    n, k = 8, 4
    out = group_advantages(torch.tensor([1.0] * right + [0.0] * (n - right)), n, estimator="pass_at_k", pass_at_k=k)
    wrong = n - right
    rate = 1 - math.comb(wrong, k) / math.comb(n, k)
    deviation = (rate * (1 - rate)) ** 0.5 or math.inf
    positive = (1 - rate) / deviation
    negative = (1 - rate - math.comb(wrong - 1, k - 1) / math.comb(n - 1, k - 1)) / deviation if wrong else 0.0
    assert out.tolist() == pytest.approx([positive] * right + [negative] * wrong, abs=1e-6)


def test_rewards_normalised_one_by_one():
    """GDPO in plain Python, with weights; as TRL has it."""
    rewards, weights = some_rewards(2, 6 * GROUP, 3), [1.0, 0.5, -2.0]
    rewards[3, 1] = torch.nan

    def normalise(values):
        known = [v for v in values if v == v]
        deviation = (sum((v - mean(known)) ** 2 for v in known) / max(len(known) - 1, 1)) ** 0.5 if known else 0.0
        return [(v - mean(known)) / (deviation + 1e-4) if v == v else math.nan for v in values]

    columns = rewards.T.tolist()
    columns = [[a for i in range(0, len(c), GROUP) for a in normalise(c[i : i + GROUP])] for c in columns]
    rows = [[w * a for w, a in zip(weights, row) if a == a] for row in zip(*columns)]
    want = [0.0 if a != a else a for a in normalise([sum(row) if row else math.nan for row in rows])]
    out = group_advantages(rewards, GROUP, aggregation="normalize_then_sum", weights=torch.tensor(weights))
    want[GROUP : 2 * GROUP] = [0.0] * GROUP  # no spread: exactly 0, also where the batch's mean is not
    assert out.tolist() == pytest.approx(want, rel=1e-9, abs=1e-9)
    assert out.count_nonzero() > 10


def test_weights_come_before_the_sum():
    rewards, weights = torch.randn(8, 3), torch.tensor([1.0, 0.5, 0.0])
    want = group_advantages((rewards * weights).sum(1), 4)
    torch.testing.assert_close(group_advantages(rewards, 4, weights=weights), want)


def test_equal_rewards_have_exactly_no_advantage():
    """Their rounded mean is another number: 0.3 in float32."""
    for estimator in ESTIMATORS:
        assert group_advantages(torch.full((21,), 0.3), 7, estimator=estimator).count_nonzero() == 0


def test_spread():
    nan = torch.nan
    rewards = torch.tensor([[1, 0], [0, 1], [1, 1], [1, 1], [nan, nan], [1, nan], [nan, nan], [nan, nan], [0, nan],
                            [1, nan]])  # fmt: skip
    assert has_spread(rewards, 2).tolist() == [False, False, False, False, True]
    assert has_spread(rewards, 2, "normalize_then_sum").tolist() == [True, False, False, False, True]
    assert has_spread(rewards, 2, weights=torch.tensor([1.0, 2.0])).tolist() == [True, False, False, False, True]
    assert has_spread(rewards, 2, "normalize_then_sum", torch.tensor([0.0, 0.0])).tolist() == [False] * 5


WRONG = [
    ({"estimator": "ppo"}, "estimator must be one of 'grpo', 'rloo'"),
    ({"estimator": "rloo", "scale": "batch"}, "scale must be left out with 'rloo'.* got 'batch'"),
    ({"aggregation": "mean"}, "aggregation must be one of 'sum_then_normalize'"),
    ({"aggregation": "normalize_then_sum", "estimator": "rloo"}, "needs estimator 'grpo' and scale 'group', got"),
    ({"estimator": "pass_at_k", "pass_at_k": 8}, "pass_at_k must be from 2 to 7, one less than a group, got 8"),
    ({"estimator": "maxrl"}, "rewards must be >= 0 with 'maxrl'.* got -1.0"),
    ({"weights": torch.ones(3)}, r"weights must have shape \(2,\), one a reward, got \(3,\)"),
]


@pytest.mark.parametrize(("arguments", "message"), WRONG, ids=[w[1][:30] for w in WRONG])
def test_mistakes(arguments, message):
    with pytest.raises(ValueError, match=message):
        group_advantages(torch.tensor([[0.0, -1.0]] * 8), **arguments)

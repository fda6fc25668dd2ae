"""The fused path never makes the host wait: no operation on its way reads a device value."""

import pytest
import torch

from fastgrpo import GRPOLossConfig, grpo_loss
from fastgrpo.config import LOSS_TYPES

import problems
from watchers import NoSync, forbid_lists

pytest.importorskip("triton")


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_forward_and_backward(loss_type, packed, device, monkeypatch):
    monkeypatch.setattr("fastgrpo.inputs.checks_values", lambda device: False)
    config = GRPOLossConfig(
        loss_type=loss_type, beta=0.1, entropy_coef=0.01, top_entropy_quantile=0.5, off_policy_mask_threshold=0.1,
        importance_sampling_level="sequence", max_completion_length=9,
    )  # fmt: skip
    arguments = problems.batch(vocab=20, depth=4)
    arguments = problems.pack(arguments) if packed else arguments
    arguments = problems.with_grad({k: problems.cast(v, torch.float32, device) for k, v in arguments.items()})
    forbid_lists(monkeypatch)
    with NoSync():
        grpo_loss(config=config, backend="triton", **arguments).loss.backward()
    assert arguments["hidden"].grad.isfinite().all()


@pytest.mark.parametrize("workspace", [2**27, 75_000])
def test_frozen_forward(workspace, device, monkeypatch):
    """One chunk and several."""
    from fastgrpo.backends import triton_backend
    from fastgrpo.backends.problem import HeadParams, HeadProblem

    hidden, weight, targets, bias = problems.head(9, 300, 16, torch.float32, device, bias=True)
    targets[::3] = -100
    params = HeadParams(
        temperature=None, softcap=20.0, logit_scale=1.0, compute_dtype=torch.float32, entropy=True, backend="triton",
        workspace=workspace,
    )  # fmt: skip
    problem = HeadProblem(hidden[None], weight, bias, targets, torch.ones(9, device=device), params)
    forbid_lists(monkeypatch)
    with NoSync():
        stats, slopes = triton_backend.frozen_forward(problem, None, torch.arange(9) % 2 == 0)
    assert stats.isfinite().all()
    assert slopes.values.isfinite().all()


@pytest.mark.quick
def test_the_check_can_fail(monkeypatch):
    with monkeypatch.context() as m:
        forbid_lists(m)
        with pytest.raises(pytest.fail.Exception, match="tolist"):
            torch.ones(1).tolist()
    with pytest.raises(AssertionError, match="repeat_interleave"), NoSync():
        torch.ones(2).repeat_interleave(torch.tensor([1, 2]))
    with pytest.raises(AssertionError, match="nonzero"), NoSync():
        torch.ones(3).nonzero()
    with pytest.raises(AssertionError, match="boolean mask"), NoSync():
        torch.ones(3)[torch.tensor([True, False, True])]
    with pytest.raises(AssertionError, match="_local_scalar_dense"), NoSync():
        torch.ones(1).item()

"""The fused path never makes the host wait: no operation on its way reads a device value."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fastgrpo import GRPOLossConfig, grpo_loss
from fastgrpo.config import LOSS_TYPES

import problems

pytest.importorskip("triton")
WAITING = {
    "_local_scalar_dense", "nonzero", "masked_select", "item", "is_nonzero", "equal", "unique", "_unique2",
    "repeat_interleave",
}  # fmt: skip


class NoSync(TorchDispatchMode):
    """Fails on operations whose result, or its shape, the host needs."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        by_mask = name in ("index", "index_put", "index_put_") and any(
            x is not None and x.dtype in (torch.bool, torch.uint8) for x in args[1]
        )
        assert name not in WAITING, name
        assert not by_mask, f"{name} with a boolean mask"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_forward_and_backward(loss_type, packed, device, monkeypatch):
    monkeypatch.setattr("fastgrpo.inputs.checks_values", lambda device: False)
    config = GRPOLossConfig(
        loss_type=loss_type, beta=0.1, entropy_coef=0.01, top_entropy_quantile=0.5, off_policy_mask_threshold=0.1,
        importance_sampling_level="sequence", max_completion_length=9,
    )  # fmt: skip
    arguments = problems.batch(vocab=20, depth=4)
    arguments = problems.packed(arguments) if packed else arguments
    arguments = problems.with_grad({k: problems.cast(v, torch.float32, device) for k, v in arguments.items()})
    forbid_lists(monkeypatch)
    with NoSync():
        grpo_loss(config=config, backend="triton", **arguments).loss.backward()
    assert arguments["hidden"].grad.isfinite().all()


def forbid_lists(monkeypatch):
    """tolist and numpy read a device's memory without an operation that a dispatch mode could see."""
    for name in ("tolist", "numpy"):
        monkeypatch.setattr(torch.Tensor, name, lambda *_, name=name: pytest.fail(f"Tensor.{name} was called"))


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

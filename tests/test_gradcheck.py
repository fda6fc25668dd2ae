"""Numerical derivatives of the reference against the loss's analytic ones, stop-gradients held where they were.

A detached factor is a constant to the analytic derivative, so the numerical one must not move it either: every
``detach()`` of the reference is recorded at the base point and replayed at the perturbed ones.
"""

import contextlib

import pytest
import torch
from torch.autograd.gradcheck import GradcheckError

from fastgrpo import GRPOLossConfig, grpo_loss, reference
from fastgrpo.config import IMPORTANCE_SAMPLING_LEVELS, KL_ESTIMATORS, LOSS_TYPES

import problems


class FrozenDetach:
    def __init__(self):
        self.values, self.cursor = None, 0

    @contextlib.contextmanager
    def active(self, monkeypatch):
        first, values, plain = self.values is None, self.values or [], torch.Tensor.detach
        cursor = iter(values)

        def detach(x):
            if first:
                values.append(plain(x).clone())
                return plain(x)
            return next(cursor)

        with monkeypatch.context() as m:
            m.setattr(torch.Tensor, "detach", detach)
            yield
        self.values = values


def check(config, arguments, monkeypatch, fast=True):
    frozen = FrozenDetach()

    class Loss(torch.autograd.Function):
        """The reference's value, the fast path's gradient."""

        @staticmethod
        def forward(ctx, hidden, weight, bias):
            ctx.save_for_backward(hidden, weight, bias)
            with torch.no_grad(), frozen.active(monkeypatch):
                tensors = {"hidden": hidden, "weight": weight, "bias": bias}
                return reference.grpo_loss(config=config, **{**arguments, **tensors}).loss.clone()

        @staticmethod
        def backward(ctx, upstream):
            leaf = [x.clone().requires_grad_() for x in ctx.saved_tensors]
            tensors = dict(zip(("hidden", "weight", "bias"), leaf))
            with torch.enable_grad():
                loss = grpo_loss(config=config, **{**arguments, **tensors}).loss
            return torch.autograd.grad(loss, leaf, upstream)

    inputs = [arguments[k].clone().requires_grad_() for k in ("hidden", "weight", "bias")]
    assert torch.autograd.gradcheck(Loss.apply, inputs, fast_mode=fast)


def small_batch(**options):
    return problems.batch(batch_size=3, length=4, vocab=11, depth=4, **options)


@pytest.mark.parametrize("kl", KL_ESTIMATORS)
@pytest.mark.parametrize("level", IMPORTANCE_SAMPLING_LEVELS)
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_every_loss_level_and_kl(loss_type, level, kl, monkeypatch):
    for corrected in (True, False):
        config = GRPOLossConfig(
            loss_type=loss_type, importance_sampling_level=level, kl_estimator=kl, beta=0.3,
            use_bias_correction_kl=corrected, max_completion_length=4, entropy_coef=0.1,
        )  # fmt: skip
        check(config, small_batch(), monkeypatch)


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_every_entry_of_the_jacobian(loss_type, monkeypatch):
    check(GRPOLossConfig(loss_type=loss_type, beta=0.3), small_batch(seed=9), monkeypatch, fast=False)


@pytest.mark.quick
@pytest.mark.parametrize("extra", [{"delta": 1.25}, {"dual_clip": 1.1}, {"divergence_mask": "tv"}], ids=str)
def test_bounds(extra, monkeypatch):
    for level in IMPORTANCE_SAMPLING_LEVELS:
        check(GRPOLossConfig(importance_sampling_level=level, **extra), small_batch(), monkeypatch)


@pytest.mark.quick
def test_a_wrong_gradient_is_found(monkeypatch):
    """The check itself can fail: an objective whose derivative is off by 1 % does not pass."""
    from fastgrpo.backends import torch_backend

    plain = torch_backend.objective

    def wrong(*arguments):
        loss, d_logp, d_log_w, *rest = plain(*arguments)
        return loss, d_logp, d_log_w * 1.01, *rest

    monkeypatch.setattr(torch_backend, "objective", wrong)
    with pytest.raises(GradcheckError):
        check(GRPOLossConfig(), small_batch(), monkeypatch)

"""grpo_loss through the fused kernels: every loss type, level and KL against the fp64 reference."""

import pytest
import torch

from fastgrpo import GRPOLossConfig, grpo_loss, objective, reference
from fastgrpo.config import CLIPPED, IMPORTANCE_SAMPLING_LEVELS, KL_ESTIMATORS, LOSS_TYPES

import problems

GRADS = ("hidden", "weight", "bias")


def assert_close_to_truth(config, arguments, device, tolerance=2e-5, **options):
    double = problems.with_grad({k: problems.cast(v, torch.float64) for k, v in arguments.items()})
    single = problems.with_grad({k: problems.cast(v, torch.float32, device) for k, v in arguments.items()})
    truth = reference.grpo_loss(config=config, **double, **options)
    got = grpo_loss(config=config, backend="triton", **single, **options)
    truth.loss.backward()
    got.loss.backward()
    assert got.loss.dtype == torch.float32
    assert abs(got.loss.item() - truth.loss.item()) < tolerance * (abs(truth.loss.item()) + 0.1)
    for name in GRADS:
        error = problems.relative_error(single[name].grad, double[name].grad)
        assert error < tolerance or double[name].grad.norm() < 1e-9, (name, error)
    return got


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
@pytest.mark.parametrize("level", IMPORTANCE_SAMPLING_LEVELS)
def test_loss_types(loss_type, level, device):
    for i, kl in enumerate(KL_ESTIMATORS):
        config = GRPOLossConfig(
            loss_type=loss_type, importance_sampling_level=level, kl_estimator=kl, beta=0.1, max_completion_length=9,
            use_bias_correction_kl=i != 1, epsilon_high=1.3 if loss_type == "cispo" else 0.3,
        )  # fmt: skip
        arguments = problems.batch(seed=i, token_advantages=i == 2)
        assert_close_to_truth(config, problems.pack(arguments) if i == 1 else arguments, device)


@pytest.mark.parametrize(
    "settings",
    [
        {"delta": 1.2}, {"dual_clip": 1.1}, {"entropy_coef": 0.05}, {"top_entropy_quantile": 0.4, "entropy_coef": 0.05},
        {"off_policy_mask_threshold": 0.05}, {"temperature": 0.7}, {"divergence_mask": "tv", "divergence_high": 0.002},
        {"divergence_mask": "kl", "divergence_low": 1e-4, "divergence_high": 2e-4}, {"log_entropy": False},
    ],
    ids=str,
)  # fmt: skip
def test_options(settings, device):
    for loss_type in ("dapo", "cispo") if "delta" not in settings and "dual_clip" not in settings else ("dapo",):
        config = GRPOLossConfig(loss_type=loss_type, epsilon_high=0.8, **settings)
        got = assert_close_to_truth(config, problems.batch(seed=3), device)
        assert (got.entropy is None) == (settings == {"log_entropy": False})


@pytest.mark.quick
def test_softcap_scale_and_token_temperature(device):
    arguments = problems.batch(seed=8)
    temperature = torch.rand(4, 7, dtype=torch.float64) + 0.5
    double = problems.with_grad(arguments)
    single = problems.with_grad({k: problems.cast(v, torch.float32, device) for k, v in arguments.items()})
    options = {"softcap": 4.0, "logit_scale": 0.5}
    reference.grpo_loss(**double, **options, temperature=temperature).loss.backward()
    grpo_loss(**single, **options, temperature=temperature.float().to(device), backend="triton").loss.backward()
    for name in GRADS:
        assert problems.relative_error(single[name].grad, double[name].grad) < 1e-5


@pytest.mark.quick
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bit(dtype, device, backend):
    """bf16 and fp16: at most twice the gradient error of same-dtype full logits."""
    arguments = {k: problems.cast(v, dtype if k in GRADS else torch.float32, device)
                 for k, v in problems.batch(batch_size=6, vocab=300, depth=32, seed=3).items()}  # fmt: skip
    config = GRPOLossConfig(beta=0.05, epsilon=0.3)
    leaf = [problems.with_grad(arguments) for _ in range(2)]
    double = problems.with_grad({k: problems.cast(v, torch.float64) for k, v in arguments.items()})
    grpo_loss(config=config, backend=backend, **leaf[0]).loss.backward()
    reference.grpo_loss(config=config, **leaf[1]).loss.backward()
    reference.grpo_loss(config=config, **double).loss.backward()
    for name in GRADS:
        mine, theirs = (problems.relative_error(x[name].grad, double[name].grad) for x in leaf)
        assert mine <= 2 * theirs + 1e-6, (name, mine, theirs)


def test_every_branch_of_the_objective_is_one_source(device):
    """The kernel's numbers are the torch functions' own, output by output, also where a log-prob is NaN."""
    from fastgrpo.backends import torch_backend, triton_backend

    n = 1500  # more than one block
    g = torch.Generator().manual_seed(3)
    logp, old, ref = (-torch.rand(n, generator=g) * 3 for _ in range(3))
    adv, gate, seq = torch.randn(n, generator=g), torch.rand(n, generator=g), torch.randn(n, generator=g)
    logp[7] = torch.nan
    adv[::5] = 0.0
    for loss_type in LOSS_TYPES:
        for mask in (None, "tv", "kl"):
            if mask and loss_type in ("sapo", "vespo"):
                continue
            extra = {"delta": 2.0, "dual_clip": 1.5} if loss_type in CLIPPED and mask is None else {}
            for kl in KL_ESTIMATORS:
                config = GRPOLossConfig(loss_type=loss_type, divergence_mask=mask, kl_estimator=kl, beta=0.1, **extra)
                inputs = (logp, old, ref, logp - old, seq if loss_type == "vespo" else None, adv, gate)
                want = torch_backend.objective(config, *inputs)
                got = triton_backend.objective(config, *(None if x is None else x.to(device) for x in inputs))
                for name, a, b in zip(("loss", "d_logp", "d_log_w", "kl", "ratio", "low", "high"), want, got):
                    b = b.cpu()
                    message = f"{name} {loss_type} {mask} {kl}"
                    torch.testing.assert_close(b, a, rtol=1e-5, atol=1e-6, equal_nan=True, msg=message)


def test_small_kl_keeps_its_accuracy():
    gap = torch.tensor([1e-4, -1e-4, 1e-3, -0.05, 0.09999, 0.10001, 1.0], dtype=torch.float32)
    want = torch.expm1(gap.double()) - gap.double()
    torch.testing.assert_close(objective.exp_residual(gap).double(), want, rtol=2e-5, atol=0)
    near_one = torch.tensor([-1e-9, -1e-6, -1e-3, -0.5, -20.0])
    want = -torch.expm1(near_one.double())
    torch.testing.assert_close(objective.one_minus_exp(near_one).double(), want, rtol=1e-6, atol=0)

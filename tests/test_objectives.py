"""Every objective and option against the autograd-only reference, in fp64, by value and by each gradient."""

import itertools
import math

import pytest
import torch

from fastgrpo import GRPOLossConfig, grpo_loss, reference
from fastgrpo.config import CLIPPED, IMPORTANCE_SAMPLING_LEVELS, KL_ESTIMATORS, LOSS_TYPES
from fastgrpo.weights import REDUCTIONS

import problems

GRADS = ("hidden", "weight", "bias")


def assert_matches_reference(config, arguments, atol=1e-11, **options):
    mine, truth = problems.with_grad(arguments, GRADS), problems.with_grad(arguments, GRADS)
    result = grpo_loss(config=config, **mine, **options)
    expected = reference.grpo_loss(config=config, **truth)
    result.loss.backward()
    expected.loss.backward()
    torch.testing.assert_close(result.loss, expected.loss, atol=atol, rtol=1e-9)
    for name in GRADS:
        torch.testing.assert_close(mine[name].grad, truth[name].grad, atol=atol, rtol=1e-8, msg=f"{name}: {config}")
    torch.testing.assert_close(result.logprobs, expected.logprobs, atol=1e-11, rtol=1e-11)
    torch.testing.assert_close(result.entropy, expected.entropy, atol=1e-11, rtol=1e-11)
    return result


@pytest.mark.parametrize("kl", KL_ESTIMATORS)
@pytest.mark.parametrize("level", IMPORTANCE_SAMPLING_LEVELS)
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_loss_types(loss_type, level, kl):
    for corrected, token_advantages, pack in itertools.product((True, False), repeat=3):
        config = GRPOLossConfig(
            loss_type=loss_type, importance_sampling_level=level, kl_estimator=kl, beta=0.1, max_completion_length=9,
            use_bias_correction_kl=corrected, epsilon_high=1.3 if loss_type == "cispo" else 0.3,
        )  # fmt: skip
        arguments = problems.batch(token_advantages=token_advantages)
        assert_matches_reference(config, problems.pack(arguments) if pack else arguments)


OPTIONS = {
    "delta": {"delta": 1.2},
    "dual_clip": {"dual_clip": 1.1},
    "entropy": {"entropy_coef": 0.05},
    "negative entropy": {"entropy_coef": -0.05},
    "quantile": {"top_entropy_quantile": 0.4},
    "quantile and entropy": {"top_entropy_quantile": 0.4, "entropy_coef": 0.05},
    "highest entropy only": {"top_entropy_quantile": 0.0},
    "off-policy mask": {"off_policy_mask_threshold": 0.05},
    "temperature": {"temperature": 0.7},
    "tv": {"divergence_mask": "tv", "divergence_low": 0.001, "divergence_high": 0.002, "divergence_ratio_cap": 1.2},
    "kl": {"divergence_mask": "kl", "divergence_low": 1e-4, "divergence_high": 2e-4},
}


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
@pytest.mark.parametrize("option", OPTIONS)
def test_options(option, loss_type):
    settings = OPTIONS[option]
    if ("delta" in settings or "dual_clip" in settings) and loss_type not in CLIPPED:
        pytest.skip("rejected by the config")
    if "divergence_mask" in settings and loss_type in ("sapo", "vespo"):
        pytest.skip("rejected by the config")
    for level, beta, pack in itertools.product(IMPORTANCE_SAMPLING_LEVELS, (0.0, 0.1), (False, True)):
        config = GRPOLossConfig(
            loss_type=loss_type, importance_sampling_level=level, beta=beta, max_completion_length=9,
            **{"epsilon_high": 0.8, **settings},
        )  # fmt: skip
        arguments = problems.batch(seed=3)
        assert_matches_reference(config, problems.pack(arguments) if pack else arguments)


@pytest.mark.quick
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
@pytest.mark.parametrize(
    "missing", ["old_logprobs", "sampling_logprobs", "importance_weights", "num_items", "mask", "bias"]
)
def test_absent_arguments(missing, loss_type):
    config = GRPOLossConfig(loss_type=loss_type, off_policy_mask_threshold=0.1, max_completion_length=9)
    arguments = problems.batch(seed=5)
    if missing == "mask":
        arguments["targets"] = torch.where(arguments["mask"] > 0, arguments["targets"], -100)
    arguments[missing] = None
    mine, truth = problems.with_grad(arguments), problems.with_grad(arguments)
    result, expected = grpo_loss(config=config, **mine), reference.grpo_loss(config=config, **truth)
    result.loss.backward()
    expected.loss.backward()
    torch.testing.assert_close(result.loss, expected.loss, atol=1e-12, rtol=1e-10)
    torch.testing.assert_close(mine["hidden"].grad, truth["hidden"].grad, atol=1e-12, rtol=1e-9)


@pytest.mark.parametrize("loss_type", ["dapo", "vespo", "grpo"])
@pytest.mark.parametrize("column", [False, True])
def test_importance_weight_per_sequence(loss_type, column):
    arguments = problems.batch(seed=7)
    weights = torch.tensor([0.5, 2.0, 1.5, 0.1], dtype=torch.float64)
    arguments["importance_weights"] = weights[:, None] if column else weights
    config = GRPOLossConfig(loss_type=loss_type)
    assert_matches_reference(config, arguments)
    assert_matches_reference(config, problems.pack(arguments))


def test_entropy_threshold_replaces_the_quantile():
    arguments = problems.batch(seed=2)
    config = GRPOLossConfig(top_entropy_quantile=0.5)
    free = grpo_loss(config=config, **arguments)
    counted = arguments["mask"] > 0
    threshold = torch.quantile(free.entropy[counted], 0.5)
    given = grpo_loss(config=config, entropy_threshold=threshold, **arguments)
    assert torch.equal(free.loss, given.loss)
    none = grpo_loss(config=config, entropy_threshold=1e9, **arguments)
    assert none.loss == 0


@pytest.mark.parametrize("num_items", [0.25, 3, 12.5, torch.tensor(12.5)])
def test_num_items(num_items):
    arguments = {**problems.batch(), "num_items": num_items}
    result = grpo_loss(**arguments)
    whole = grpo_loss(**{**arguments, "num_items": 1})
    torch.testing.assert_close(result.loss, whole.loss / max(float(num_items), 1.0))


@pytest.mark.parametrize("num_items", [0, torch.tensor(0)])
def test_num_items_of_a_batch_without_tokens(num_items):
    arguments = problems.batch()
    leaf = problems.with_grad({**arguments, "mask": torch.zeros_like(arguments["mask"]), "num_items": num_items})
    result = grpo_loss(**leaf)
    result.loss.backward()
    assert result.loss == 0
    assert all(leaf[name].grad.eq(0).all() for name in GRADS)


def test_masked_positions_hold_anything():
    arguments = problems.batch(seed=4)
    clean = problems.with_grad(arguments)
    dirty = problems.with_grad({k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in arguments.items()})
    off = arguments["mask"] == 0
    for name in ("old_logprobs", "ref_logprobs", "sampling_logprobs", "importance_weights"):
        dirty[name][off] = torch.nan
    dirty["ref_logprobs"][0, 0] = dirty["old_logprobs"][0, 0] = 5.0  # a tool token
    dirty["advantages"][1] = torch.nan  # of the empty sequence
    dirty["targets"][off] = 10**6
    with torch.no_grad():
        dirty["hidden"][off] = torch.nan
    config = GRPOLossConfig(beta=0.1, entropy_coef=0.01, top_entropy_quantile=0.5, off_policy_mask_threshold=0.1)
    results = [grpo_loss(config=config, **x) for x in (clean, dirty)]
    for r in results:
        r.loss.backward()
    assert torch.equal(results[0].loss, results[1].loss)
    for name in GRADS:
        assert torch.equal(clean[name].grad, dirty[name].grad), name


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_a_nan_never_ends_in_a_clean_gradient(loss_type, backend):
    """One row of NaN activations: loss and weight gradient are NaN, so that a gradient check can see it."""
    arguments = {k: problems.cast(v, torch.float32) for k, v in problems.batch(seed=4).items()}
    arguments["hidden"][2, 0] = torch.nan
    leaf = problems.with_grad(arguments)
    loss = grpo_loss(config=GRPOLossConfig(loss_type=loss_type, max_completion_length=9), backend=backend, **leaf).loss
    loss.backward()
    assert loss.isnan()
    assert leaf["weight"].grad.isnan().any()
    assert leaf["hidden"].grad[2, 0].isnan().all()


def test_unscored_sampling_tokens_are_no_evidence():
    arguments = problems.batch(seed=4)
    config = GRPOLossConfig(off_policy_mask_threshold=0.05)
    arguments["sampling_logprobs"][:, 1] = torch.nan
    assert_matches_reference(config, arguments)


@pytest.mark.quick
def test_metrics_are_sums_and_counts():
    arguments = problems.batch(batch_size=12, seed=6)
    config = GRPOLossConfig(beta=0.1, epsilon=0.1)
    m = grpo_loss(config=config, **arguments).metrics
    assert all(v.ndim == 0 for v in m.values())
    on = arguments["mask"] > 0
    truth = reference.grpo_loss(config=config, **arguments)
    log_ratio = truth.logprobs - arguments["old_logprobs"]
    ratio, adv = log_ratio.exp(), arguments["advantages"][:, None].expand(on.shape)
    gap = arguments["ref_logprobs"] - truth.logprobs
    low, high = (ratio < 0.9) & (adv < 0), (ratio > 1.1) & (adv > 0)
    expected = {
        "kl_sum": (ratio * (gap.exp() - gap - 1))[on].sum(),
        "entropy_sum": truth.entropy[on].sum(),
        "ratio_sum": ratio[on].sum(),
        "ratio_min": ratio[on].min(),
        "ratio_max": ratio[on].max(),
        "clip_low_sum": low[on].sum(),
        "clip_high_sum": high[on].sum(),
        "clip_region_sum": (low | high)[on].sum(),
        "tokens": on.sum(),
        "sequences": torch.tensor(12),
    }
    for name, value in expected.items():
        torch.testing.assert_close(m[name], value.double(), msg=name)
    assert expected["clip_low_sum"] > 0
    assert expected["clip_high_sum"] > 0
    assert m["active_tokens"] + m["skipped_tokens"] == m["tokens"]


def test_zero_advantage_tokens_are_skipped():
    arguments = {**problems.batch(), "advantages": torch.zeros(4, dtype=torch.float64)}
    m = grpo_loss(**arguments).metrics
    assert m["active_tokens"] == 0
    assert m["skipped_tokens"] == m["tokens"] > 0
    with_kl = grpo_loss(config=GRPOLossConfig(beta=0.1), **arguments).metrics
    assert with_kl["active_tokens"] == with_kl["tokens"]


@pytest.mark.quick
@pytest.mark.parametrize("loss", [grpo_loss, reference.grpo_loss])
def test_empty_batches(loss):
    config = GRPOLossConfig(loss_type="grpo", entropy_coef=0.1, top_entropy_quantile=0.5)
    arguments = problems.batch()
    for n in (0, 1):
        hidden = torch.randn(n, 3, 16, dtype=torch.float64, requires_grad=True)
        targets = torch.full((n, 3), -100)
        advantages = torch.randn(n, dtype=torch.float64)
        for empty in (hidden, hidden[:, :0]):
            weight = arguments["weight"].clone().requires_grad_()
            result = loss(empty, weight, targets[:, : empty.shape[1]], advantages, config)
            result.loss.backward()
            assert result.loss == 0
            assert weight.grad.count_nonzero() == 0
    packed = loss(hidden[0, :0], weight, targets[0, :0], advantages[:0], config, cu_seqlens=torch.tensor([0]))
    assert packed.loss == 0


def test_every_loss_type_has_its_reduction():
    assert set(REDUCTIONS) == set(LOSS_TYPES)


def test_a_penalty_on_the_gradient_is_an_error():
    arguments = problems.batch()
    arguments["hidden"] = arguments["hidden"].detach().requires_grad_()
    loss = grpo_loss(**arguments).loss
    (grad,) = torch.autograd.grad(loss, arguments["hidden"], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        (loss + grad.square().sum()).backward()


def test_a_token_that_was_certain_has_a_trust_region_too():
    arguments = problems.batch()
    arguments["old_logprobs"] = torch.where(arguments["advantages"][:, None] > 0, -0.5, 0.0).expand_as(
        arguments["targets"]
    )
    for settings in ({}, {"divergence_low": 1e9}):
        config = GRPOLossConfig(divergence_mask="kl", **settings)
        truth = reference.grpo_loss(**arguments, config=config).loss
        assert truth.isfinite()
        torch.testing.assert_close(grpo_loss(**arguments, config=config).loss, truth)


def gradient(logp, advantage, backend="torch", dtype=torch.float32, loss=grpo_loss, config=None, **given):
    """(2,) loss and its derivative in the logit whose token has the log-prob; the other token has the rest."""
    logit = torch.tensor([[[logp - math.log(-math.expm1(logp))]]], dtype=dtype, requires_grad=True)
    head = torch.tensor([[1.0], [0.0]], dtype=dtype)
    given = {name: torch.tensor([[value]], dtype=dtype) for name, value in given.items()}
    target, advantages = torch.zeros(1, 1, dtype=torch.long), torch.tensor([advantage], dtype=dtype)
    value = loss(logit, head, target, advantages, config, backend=backend, **given).loss
    return torch.stack((value.detach(), torch.autograd.grad(value, logit)[0].squeeze()))


@pytest.mark.parametrize("advantage", [1.0, 0.0, -1.0])
def test_sapo_of_a_ratio_that_overflows(backend, advantage):
    found = gradient(-0.5, advantage, backend, config=GRPOLossConfig(loss_type="sapo"), old_logprobs=-100.0)
    tau = 1.0 if advantage > 0 else GRPOLossConfig().sapo_temperature_neg
    torch.testing.assert_close(found, torch.tensor([-4 / tau * advantage, 0.0]))


def test_a_trust_region_around_what_could_not_be_sampled(backend):
    config = GRPOLossConfig(divergence_mask="kl")
    for old in (-200.0, -math.inf):
        assert gradient(-0.5, 1.0, backend, config=config, old_logprobs=old)[1] == 0


@pytest.mark.parametrize("level", ["token", "sequence_token"])
@pytest.mark.parametrize("gap", [1e-3, 1.0, 14.0, 25.0])
def test_k3_with_its_correction_does_not_cancel(backend, level, gap):
    config = GRPOLossConfig(beta=1.0, importance_sampling_level=level)
    given = {"config": config, "ref_logprobs": -1e-6, "old_logprobs": -1e-6 - gap}
    found = gradient(-1e-6 - gap, 0.0, backend, **given)[1].double()
    truth = gradient(-1e-6 - gap, 0.0, dtype=torch.float64, loss=reference.grpo_loss, **given)[1]
    torch.testing.assert_close(found, truth, rtol=1e-4, atol=0)


@pytest.mark.parametrize("shape", [(3,), (1, 3)])
@pytest.mark.parametrize("loss", [grpo_loss, reference.grpo_loss])
def test_a_flat_packed_tensor_is_one_value_a_token_also_where_there_are_as_many_sequences(loss, shape):
    hidden, weight = torch.randn(*shape, 8), torch.randn(16, 8)
    targets, offsets = torch.tensor([1, 2, 3]).view(shape), torch.tensor([0, 2, 2, 3])
    values, config = torch.tensor([1.0, -2.0, 3.0]), GRPOLossConfig(loss_type="dapo")
    tokens, sequences = (
        loss(hidden, weight, targets, a, config, cu_seqlens=offsets).loss for a in (values, values[:, None])
    )
    torch.testing.assert_close(tokens, torch.tensor(-(1 - 2 + 3) / 3))  # the ratio is 1
    torch.testing.assert_close(sequences, torch.tensor(-(1 + 1 + 3) / 3))

"""Bad input: a ValueError or TypeError that names the argument, what was expected and what came."""

import inspect
import pickle

import numpy as np
import pytest
import torch

from fastgrpo import GRPOLossConfig, backends, group_advantages, grpo_loss, linear_logprobs

import problems

HIDDEN, WEIGHT, TARGETS = torch.randn(6, 8), torch.randn(20, 8), torch.arange(6)

OP_ERRORS = {
    "hidden list": ({"hidden": [[1.0]]}, TypeError, "hidden must be a torch.Tensor, got list"),
    "hidden int": ({"hidden": torch.ones(6, 8, dtype=torch.int64)}, ValueError, "hidden must be float32.*int64"),
    "hidden 1d": ({"hidden": torch.randn(8)}, ValueError, r"hidden must be \(N, D\).*\(8,\)"),
    "hidden sparse": ({"hidden": HIDDEN.to_sparse()}, ValueError, "hidden must be a dense tensor, got torch.sp"),
    "weight shape": ({"weight": torch.randn(20, 9)}, ValueError, r"weight must be \(V, D\) with D = 8.*\(20, 9\)"),
    "weight module": (
        {"weight": torch.nn.Linear(8, 20)}, TypeError, "weight must be a torch.Tensor, got the module Linear: pass "
        "lm_head.weight$"),
    "beta": ({"beta": 0.1}, TypeError, "^beta is a field of GRPOLossConfig: of grpo_loss, not of linear_logprobs$"),
    "unknown": ({"vocabulary": 3}, TypeError, r"linear_logprobs\(\) got an unexpected keyword argument 'vocabulary'"),
    "weight empty": ({"weight": torch.randn(0, 8)}, ValueError, "weight must not be empty.*ZeRO-3"),
    "weight int": ({"weight": torch.ones(20, 8, dtype=torch.int8)}, ValueError, "weight must be float32"),
    "weight double": ({"weight": WEIGHT.double()}, ValueError, "weight and hidden must both be float64"),
    "weight meta": ({"weight": torch.empty(20, 8, device="meta")}, ValueError, "weight must be on the device.*meta"),
    "targets shape": ({"targets": torch.arange(5)}, ValueError, r"targets must have shape \(6,\), .*got \(5,\)"),
    "targets float": ({"targets": torch.zeros(6)}, ValueError, "targets must be an integer tensor.*float32"),
    "targets bool": ({"targets": torch.zeros(6, dtype=torch.bool)}, ValueError, "targets must be an integer"),
    "targets high": ({"targets": TARGETS + 15}, ValueError, r"targets must be in \[0, 20\).*got 20"),
    "targets negative": ({"targets": TARGETS - 1}, ValueError, r"targets must be in \[0, 20\).*got -1"),
    "bias shape": ({"bias": torch.randn(8)}, ValueError, r"bias must have shape \(20,\), got \(8,\)"),
    "bias int": ({"bias": torch.ones(20, dtype=torch.int64)}, ValueError, "bias must be a floating point"),
    "temperature zero": ({"temperature": 0}, ValueError, "temperature must be > 0, got 0"),
    "temperature nan": ({"temperature": float("nan")}, ValueError, "temperature must be a finite number"),
    "temperature infinite in fp32": ({"temperature": np.float32("inf")}, ValueError, "temperature must be a finite"),
    "temperature text": ({"temperature": "1"}, ValueError, "temperature must be a finite number.*'1'"),
    "temperature shape": ({"temperature": torch.ones(5)}, ValueError, r"temperature must be.*\(6,\).*\(5,\)"),
    "temperature values": ({"temperature": torch.zeros(6)}, ValueError, "temperature must be > 0 and finite at every"),
    "temperature infinite": (
        {"temperature": torch.full((6,), torch.inf)}, ValueError, "temperature must be > 0 and finite at .*got inf"),
    "logit_scale large": ({"logit_scale": 10**400}, ValueError, "logit_scale must be a finite number"),
    "softcap": ({"softcap": -1.0}, ValueError, "softcap must be > 0, got -1.0"),
    "logit_scale": ({"logit_scale": 0.0}, ValueError, "logit_scale must be other than 0"),
    "hint": ({"old_logprobs": torch.zeros(5)}, ValueError, "old_logprobs must have the shape of targets"),
    "backend": ({"backend": "cuda"}, ValueError, "backend must be one of 'auto', 'triton', 'torch', got 'cuda'"),
    "backward": ({"backward": "fast"}, ValueError, "backward must be one of"),
    "workspace": ({"workspace_mb": 0}, ValueError, "workspace_mb must be > 0"),
}  # fmt: skip


@pytest.mark.quick
@pytest.mark.parametrize("name", OP_ERRORS)
def test_linear_logprobs(name):
    change, kind, message = OP_ERRORS[name]
    with pytest.raises(kind, match=message):
        linear_logprobs(**{"hidden": HIDDEN, "weight": WEIGHT, "targets": TARGETS, **change})


def at(value, *position):
    """(4, 7) zeros but for one value; problems.batch() masks position (0, 0) and the whole sequence 1."""
    values = torch.zeros(4, 7, dtype=torch.float64)
    values[position] = value
    return values


LOSS_ERRORS = {
    "weight module": (
        {"weight": torch.nn.Linear(16, 53)}, TypeError, "weight must be a torch.Tensor, got the module Linear: pass "),
    "beta": (
        {"beta": 0.1}, TypeError, r"^beta is a field of GRPOLossConfig: pass config=GRPOLossConfig\(beta=0.1\)$"),
    "two settings": (
        {"loss_type": "grpo", "epsilon": 0.1}, TypeError,
        r"^loss_type, epsilon are fields .*: pass config=GRPOLossConfig\(loss_type='grpo', epsilon=0.1\)$"),
    "another's name": (
        {"kl_coef": 0.1}, TypeError, "^grpo_loss has no argument kl_coef: say beta, a field of GRPOLossConfig$"),
    "misspelt": ({"temprature": 1}, TypeError, r"^grpo_loss has no argument temprature: did you mean temperature\?$"),
    "unknown": ({"colour": 1}, TypeError, r"grpo_loss\(\) got an unexpected keyword argument 'colour'"),
    "old positive": (
        {"old_logprobs": at(0.5, 2, 0)}, ValueError,
        r"old_logprobs must be log-probs, at most 0 \(\+0.25 for rounding\), got 0.5 at 1 counted position"),
    "old infinite": ({"old_logprobs": at(torch.inf, 2, 0)}, ValueError, "old_logprobs must be log-probs.*got inf at 1"),
    "ref positive": (
        {"config": GRPOLossConfig(beta=0.1), "ref_logprobs": torch.ones(4, 7)}, ValueError,
        "ref_logprobs must be log-probs.*got 1 at .*probabilities, or log-probs times -1"),
    "sampling positive": (
        {"sampling_logprobs": torch.full((4, 7), 3.0)}, ValueError, "sampling_logprobs must be log-probs.*got 3 at"),
    "advantages nan": (
        {"advantages": torch.tensor([0.0, 1.0, torch.nan, 1.0]).double()}, ValueError,
        "advantages must be finite where tokens count, got nan at"),
    "advantages a token": (
        {"advantages": at(-torch.inf, 2, 0)}, ValueError, "advantages must be finite where .* got -inf at 1"),
    "num_items zero": ({"num_items": 0}, ValueError, "num_items must be > 0 where tokens count.*got 0 with"),
    "num_items zero tensor": ({"num_items": torch.tensor(0.0)}, ValueError, "num_items must be > 0 where tokens count"),
    "num_items negative tensor": ({"num_items": torch.tensor(-2)}, ValueError, "num_items must be .* >= 0, got -2"),
    "num_items nan tensor": ({"num_items": at(torch.nan, 0, 0)[0, :1]}, ValueError, "num_items must be .*, got nan"),
    "config dict": ({"config": {}}, TypeError, "config must be a GRPOLossConfig, got dict"),
    "advantages shape": ({"advantages": torch.zeros(5)}, ValueError, r"advantages must be \(4,\) or shaped like"),
    "advantages int": ({"advantages": torch.zeros(4, dtype=torch.int64)}, ValueError, "advantages must be a floating"),
    "mask shape": ({"mask": torch.ones(4, 6)}, ValueError, r"mask must have the shape of targets, \(4, 7\)"),
    "mask values": ({"mask": torch.full((4, 7), 2)}, ValueError, "mask must hold 0 and 1 only"),
    "old shape": ({"old_logprobs": torch.zeros(4)}, ValueError, "old_logprobs must have the shape of targets"),
    "ref missing": (
        {"config": GRPOLossConfig(beta=0.1), "ref_logprobs": None}, ValueError, "ref_logprobs must be given"),
    "ref shape": ({"ref_logprobs": torch.zeros(4, 8)}, ValueError, "ref_logprobs must have the shape"),
    "sampling": ({"sampling_logprobs": torch.zeros(3, 7)}, ValueError, "sampling_logprobs must have the shape"),
    "weights": ({"importance_weights": torch.zeros(2)}, ValueError, r"importance_weights must be \(4,\) or shaped"),
    "weights negative": (
        {"importance_weights": at(-1.0, 2, 0)}, ValueError, "importance_weights must be finite and >= 0 .* got -1.0"),
    "weights nan": ({"importance_weights": at(torch.nan, 2, 0)}, ValueError, "importance_weights must be .* got nan"),
    "weights vespo": (
        {"importance_weights": at(-1.0, 2, 0), "config": GRPOLossConfig(loss_type="vespo")}, ValueError,
        "importance_weights must be finite and >= 0 where tokens count, got a negative one or NaN"),
    "mask complex": ({"mask": torch.ones(4, 7) * 1j}, ValueError, "mask must be of a real dtype, got torch.complex64"),
    "num_items infinite": ({"num_items": float("inf")}, ValueError, "num_items must be a number >= 0, got inf"),
    "threshold vector": ({"entropy_threshold": torch.ones(2)}, ValueError, r"entropy_threshold must be .* \(2,\)"),
    "num_items": ({"num_items": -1}, ValueError, "num_items must be a number >= 0, got -1"),
    "num_items tensor": ({"num_items": torch.ones(2)}, ValueError, "num_items must be a number or a tensor of one"),
    "num_items complex": ({"num_items": torch.tensor(1j)}, ValueError, "num_items must be .* got torch.complex64"),
    "threshold": ({"entropy_threshold": "high"}, ValueError, "entropy_threshold must be a finite number"),
    "cu_seqlens": ({"cu_seqlens": torch.tensor([0, 7])}, ValueError, "targets must be flat"),
    "flat without offsets": (
        {"hidden": HIDDEN.double(), "targets": TARGETS, "mask": None}, ValueError, "cu_seqlens must be given"),
    "targets": ({"targets": torch.full((4, 7), 60)}, ValueError, r"targets must be in \[0, 53\)"),
    "hidden": ({"hidden": torch.randn(4, 8, 16)}, ValueError, "targets must have shape"),
}  # fmt: skip


@pytest.mark.quick
@pytest.mark.parametrize("name", LOSS_ERRORS)
def test_grpo_loss(name):
    change, kind, message = LOSS_ERRORS[name]
    arguments = {**problems.batch(), **change}
    if name in ("flat without offsets",):
        arguments["weight"] = WEIGHT.double()
        arguments["bias"] = None
    if name == "hidden":
        arguments["weight"] = arguments["weight"].float()
    with pytest.raises(kind, match=message):
        grpo_loss(**arguments)


ROUNDED = {  # values that arithmetic may leave, and those of positions that do not count
    "fp32 rounding": {"old_logprobs": at(1e-5, 2, 0)},
    "a bf16 step": {"old_logprobs": torch.full((4, 7), 0.125, dtype=torch.bfloat16)},
    "masked": {
        "old_logprobs": at(7.0, 0, 0),
        "sampling_logprobs": at(torch.inf, 1, 3),
        "advantages": at(torch.nan, 1, 2),
        "importance_weights": at(-3.0, 0, 0) + 1,
    },
    "masked, vespo": {
        "importance_weights": at(-3.0, 0, 0) + 1,
        "config": GRPOLossConfig(loss_type="vespo"),
    },
    "empty sequence, vespo": {
        "importance_weights": torch.tensor([1.0, torch.nan, 1.0, 1.0]).double(),
        "config": GRPOLossConfig(loss_type="vespo"),
    },
    "empty sequence": {"advantages": torch.tensor([1.0, torch.nan, 1.0, 1.0]).double()},
    "unscored": {"sampling_logprobs": torch.full((4, 7), torch.nan)},
    "unused reference": {"ref_logprobs": torch.ones(4, 7)},
    "unused normaliser": {"num_items": 0, "config": GRPOLossConfig(loss_type="bnpo")},
}


@pytest.mark.parametrize("name", ROUNDED)
def test_values_that_are_no_mistake(name):
    arguments = problems.batch()
    assert arguments["mask"][0, 0] == arguments["mask"][1].sum() == 0
    assert arguments["mask"][2, 0] == 1
    assert grpo_loss(**{**arguments, **ROUNDED[name]}).loss.isfinite()


def test_values_are_not_looked_at_where_the_host_would_wait(monkeypatch):
    arguments = {**problems.batch(), "old_logprobs": torch.ones(4, 7), "num_items": torch.tensor(0.0)}
    with pytest.raises(ValueError, match="num_items must be > 0"):
        grpo_loss(**{**arguments, "old_logprobs": None})
    monkeypatch.setattr("fastgrpo.inputs.checks_values", lambda device: False)
    assert grpo_loss(**arguments).loss.isfinite()
    assert grpo_loss(**{**arguments, "advantages": torch.full((4,), torch.nan)}).loss.isnan()


def test_the_signatures_show_the_parameters():
    from fastgrpo.vocab_parallel import vocab_parallel_logprobs

    for function in (grpo_loss, linear_logprobs, vocab_parallel_logprobs):
        parameters = inspect.signature(function).parameters
        assert list(parameters)[:3] == ["hidden", "weight", "targets"]
        assert not {p.kind for p in parameters.values()} & {inspect.Parameter.VAR_KEYWORD}
        assert pickle.loads(pickle.dumps(function)) is function
    with pytest.raises(TypeError, match="epsilon is a field of GRPOLossConfig"):
        vocab_parallel_logprobs(HIDDEN, WEIGHT, TARGETS, group=None, epsilon=0.2)


@pytest.mark.parametrize("offsets", [[0, 3], [1, 6], [0, 4, 2, 6], [[0, 6]]], ids=str)
def test_cu_seqlens(offsets):
    offsets = torch.tensor(offsets)
    with pytest.raises(ValueError, match="cu_seqlens must"):
        grpo_loss(HIDDEN, WEIGHT, TARGETS, torch.zeros(max(offsets.numel() - 1, 1)), cu_seqlens=offsets)


def test_dr_grpo_on_packed_input_needs_a_length():
    with pytest.raises(ValueError, match="max_completion_length must be set"):
        grpo_loss(HIDDEN, WEIGHT, TARGETS, torch.zeros(1), GRPOLossConfig(loss_type="dr_grpo"),
                  cu_seqlens=torch.tensor([0, 6]))  # fmt: skip


CONFIG_ERRORS = [
    ({"loss_type": "ppo"}, "loss_type must be one of 'grpo'.*got 'ppo'"),
    ({"importance_sampling_level": "word"}, "importance_sampling_level must be one of"),
    ({"kl_estimator": "k4"}, "kl_estimator must be one of"),
    ({"divergence_mask": "js"}, "divergence_mask must be one of"),
    ({"epsilon": 1.5}, r"epsilon must be in \[0, 1\), got 1.5"),
    ({"epsilon": "0.2"}, "epsilon must be a number in .*got '0.2'"),
    ({"epsilon": True}, "epsilon must be in .*got True"),
    ({"epsilon_high": -0.1}, "epsilon_high must be >= 0 or None"),
    ({"beta": -1}, "beta must be >= 0, got -1"),
    ({"beta": None}, "beta must be >= 0, got None"),
    ({"beta": "0.04"}, "beta must be a number >= 0, got '0.04'"),
    ({"beta": float("nan")}, "beta must be >= 0, got nan"),
    ({"delta": 0}, "delta must be > 0 or None"),
    ({"dual_clip": 0.9}, "dual_clip must be > 1 or None"),
    ({"temperature": 0.0}, "temperature must be > 0"),
    ({"max_completion_length": 0}, "max_completion_length must be >= 1"),
    ({"max_completion_length": 1.5}, "max_completion_length must be a whole number"),
    ({"top_entropy_quantile": 1.1}, r"top_entropy_quantile must be in \[0, 1\]"),
    ({"sapo_temperature_pos": 0}, "sapo_temperature_pos must be > 0"),
    ({"vespo_k_neg": -1}, "vespo_k_neg must be >= 0"),
    ({"use_bias_correction_kl": 1}, "use_bias_correction_kl must be True or False"),
    ({"loss_type": "cispo", "delta": 2.0}, "delta bounds the clipped surrogate"),
    ({"loss_type": "sapo", "dual_clip": 2.0}, "dual_clip bounds the clipped surrogate"),
    ({"divergence_mask": "tv", "delta": 2.0}, "delta bounds the clipped surrogate"),
    ({"loss_type": "vespo", "divergence_mask": "tv"}, "divergence_mask replaces a ratio clip"),
]


@pytest.mark.quick
@pytest.mark.parametrize(("settings", "message"), CONFIG_ERRORS, ids=str)
def test_config(settings, message):
    with pytest.raises(ValueError, match=message):
        GRPOLossConfig(**settings)


def test_config_is_frozen_and_keyword_only():
    with pytest.raises(AttributeError):
        GRPOLossConfig().beta = 1.0
    with pytest.raises(TypeError):
        GRPOLossConfig("dapo")


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        (([1.0],), TypeError, "rewards must be a torch.Tensor"),
        ((torch.zeros(2, 2, 2),), ValueError, r"rewards must be \(B,\)"),
        ((torch.zeros(9),), ValueError, "group_size must divide the number of rewards, 9, got 8"),
        ((torch.zeros(8), 0), ValueError, "group_size must be a whole number >= 1"),
        ((torch.zeros(8), 2.0), ValueError, "group_size must be a whole number"),
        ((torch.zeros(8), 4, "row"), ValueError, "scale must be one of"),
        ((torch.full((8,), torch.inf),), ValueError, "rewards must be finite"),
    ],
    ids=str,
)
def test_group_advantages(arguments, kind, message):
    with pytest.raises(kind, match=message):
        group_advantages(*arguments)


def test_triton_says_where_it_runs(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="backend='triton' needs hidden on a GPU, got cpu"):
        linear_logprobs(HIDDEN, WEIGHT, TARGETS, backend="triton")
    with pytest.raises(ValueError, match="float64"):
        linear_logprobs(HIDDEN.double(), WEIGHT.double(), TARGETS, backend="triton")
    assert backends.choose("auto", HIDDEN) == "torch"
    monkeypatch.setattr(backends, "has_triton", lambda: False)
    with pytest.raises(ValueError, match="where triton is not installed"):
        linear_logprobs(HIDDEN, WEIGHT, TARGETS, backend="triton")


def test_debug_switch_looks_at_values(monkeypatch):
    from fastgrpo import inputs

    gpu = torch.device("cuda")
    monkeypatch.delenv("FASTGRPO_DEBUG", raising=False)
    assert not inputs.checks_values(gpu)
    monkeypatch.setenv("FASTGRPO_DEBUG", "1")
    assert inputs.checks_values(gpu)


def test_a_sharded_weight_is_refused():
    class DTensor(torch.Tensor):
        pass

    with pytest.raises(ValueError, match="weight must be a whole plain tensor, got a DTensor"):
        linear_logprobs(HIDDEN, WEIGHT.as_subclass(DTensor), TARGETS)

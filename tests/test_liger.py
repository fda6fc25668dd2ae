"""Liger's slot: its own class where it is right, the fp64 reference where it is not."""

import importlib.util
import inspect
import sys
import warnings
from types import ModuleType

import pytest
import torch

from fastgrpo import GRPOLossConfig, reference
from fastgrpo.config import CLIPPED, LOSS_TYPES
from fastgrpo.integrations import liger
from fastgrpo.integrations.liger import FusedLinearGRPOLoss, apply

import problems
from problems import relative_error

pytest.importorskip("liger_kernel")
import liger_kernel.chunked_loss as chunked_loss

V, D = 53, 16
LEAVES = ("_input", "lin_weight", "bias")
THEIRS = {
    "hidden": "_input", "weight": "lin_weight", "targets": "selected_token_ids", "mask": "attention_mask",
    "advantages": "advantages", "bias": "bias", "old_logprobs": "old_per_token_logps",
    "ref_logprobs": "ref_per_token_logps", "importance_weights": "vllm_is_ratio", "num_items": "num_items_in_batch",
    "sampling_logprobs": "sampling_per_token_logps",
}  # fmt: skip
EVERY = tuple(THEIRS)
CORE = ("hidden", "weight", "targets", "mask", "advantages", "bias", "old_logprobs", "ref_logprobs")
CORE_REF = "ref_per_token_logps"


def problem(dtype=torch.float32, names=CORE, **options):
    """The tests' ragged batch (an empty sequence, a tool token, a zero advantage), by its names in Liger's call."""
    batch = problems.batch(**{"batch_size": 5, "length": 7, "vocab": V, "depth": D, "dtype": dtype, **options})
    batch["importance_weights"] = batch["importance_weights"].where(batch["mask"] != 0, 1.0)
    return {THEIRS[name]: batch[name] for name in names}


def run(kind, settings, arguments):
    """-> loss, metrics, gradients of the leaves."""
    arguments = problems.with_grad(arguments, LEAVES)
    loss, metrics = kind(**settings)(**arguments)
    (3.0 * loss).backward()
    return loss.detach(), metrics, [arguments[k].grad for k in LEAVES if arguments.get(k) is not None]


def of_liger(settings, arguments):
    return run(chunked_loss.LigerFusedLinearGRPOLoss, {"compiled": False, **settings}, arguments)


def of_reference(settings, arguments, **options):
    """The same in fp64, from the settings and arguments of Liger's call."""
    names = {"epsilon_low": "epsilon"}
    config = {names.get(k, k): v for k, v in settings.items() if k not in ("chunk_size", "compiled", "use_ref_model")}
    defaults = {"beta": 0.04, "use_bias_correction_kl": False}
    ours = {v: k for k, v in THEIRS.items()}
    arguments = {ours[k]: problems.cast(v, torch.float64) for k, v in arguments.items()}
    arguments = problems.with_grad(arguments)
    result = reference.grpo_loss(config=GRPOLossConfig(**{**defaults, **config}), **arguments, **options)
    (3.0 * result.loss).backward()
    return result._replace(loss=result.loss.detach()), [
        arguments[k].grad for k in ("hidden", "weight", "bias") if k in arguments
    ]


def errors(got, loss, gradients):
    return [relative_error(x, y) for x, y in zip([got[0], *got[2]], [loss, *gradients], strict=True)]


def assert_like_liger(settings, arguments):
    ours, theirs = run(FusedLinearGRPOLoss, settings, arguments), of_liger(settings, arguments)
    assert max(errors(ours, theirs[0], theirs[2])) <= 1e-5
    assert isinstance(ours[1], tuple)
    assert len(ours[1]) == len(theirs[1]) == 1 + (settings.get("beta", 0.04) != 0)
    for a, b in zip(ours[1], theirs[1]):
        assert (a.shape, a.dtype, a.requires_grad) == (b.shape, b.dtype, b.requires_grad)
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


KINDS = [(loss, "token") for loss in LOSS_TYPES if loss != "luspo"]
KINDS += [(loss, "sequence") for loss in CLIPPED if loss != "luspo"]
VARIANTS = {
    "plain": ({"beta": 0.0}, {}),
    "Liger's defaults": ({}, {}),
    "kl": ({"beta": 0.3}, {}),
    "kl, corrected": ({"beta": 0.3, "use_bias_correction_kl": True}, {}),
    "no old log-probs": ({"beta": 0.3}, {"old_per_token_logps": None}),
    "no bias": ({}, {"bias": None}),
    "num_items": ({}, {"num_items_in_batch": 37}),
    "num_items, tensor": ({}, {"num_items_in_batch": torch.tensor(37)}),
    "ratio per token": ({}, "BT"),
    "ratio per sequence": ({}, "B"),
    "ratio per sequence, column": ({}, "B1"),
    "asymmetric, warm": ({"epsilon_low": 0.1, "epsilon_high": 0.28, "temperature": 0.7}, {}),
    "chunks": ({"chunk_size": 2, "beta": 0.3}, "BT"),
    "all masked": ({}, {"attention_mask": torch.zeros(5, 7, dtype=torch.long)}),
}


@pytest.mark.works("Liger's slot", "FusedLinearGRPOLoss: Liger's loss, metrics and gradients where Liger is right")
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(("loss_type", "level"), KINDS)
def test_equals_liger(loss_type, level, variant):
    options, changes = VARIANTS[variant]
    arguments = problem(names=EVERY[:9] if isinstance(changes, str) else CORE)
    if changes in ("B", "B1"):
        ratio = arguments["vllm_is_ratio"][:, 0] + 0.1
        changes = {"vllm_is_ratio": ratio if changes == "B" else ratio[:, None]}
    arguments |= changes if isinstance(changes, dict) else {}
    settings = {"loss_type": loss_type, "importance_sampling_level": level, "max_completion_length": 11, **options}
    if loss_type == "cispo":
        settings["epsilon_high"] = 1.5
    assert_like_liger(settings, arguments)


@pytest.mark.quick
@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("loss_type", [loss for loss in CLIPPED if loss != "luspo"])
def test_two_sided_clipping(loss_type, level):
    settings = {"loss_type": loss_type, "importance_sampling_level": level, "max_completion_length": 11, "delta": 1.4}
    arguments = problem()
    arguments["old_per_token_logps"] -= 0.7
    assert_like_liger(settings, arguments)
    without = run(FusedLinearGRPOLoss, {**settings, "delta": None}, arguments)
    assert relative_error(run(FusedLinearGRPOLoss, settings, arguments)[0], without[0]) > 1e-3


@pytest.mark.quick
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_clipped_fraction_under_a_low_delta(level):
    """TRL's: it bounds the ratio by delta before it asks whether the ratio is clipped; Liger asks first."""
    settings = {"beta": 0.0, "delta": 1.15, "epsilon_high": 0.2, "importance_sampling_level": level}
    arguments = problem()
    arguments["old_per_token_logps"] -= 0.7
    arguments["advantages"] = torch.tensor([0.3, -0.2, 0.7, -0.5, 0.2])
    ours, theirs = run(FusedLinearGRPOLoss, settings, arguments), of_liger(settings, arguments)
    assert max(errors(ours, theirs[0], theirs[2])) <= 1e-5
    _, (low,), _ = run(FusedLinearGRPOLoss, {**settings, "delta": None, "epsilon_high": 1e9}, arguments)
    assert ours[1][0].item() == low.item()  # those clipped from below
    assert theirs[1][0] > ours[1][0] + 0.1


@pytest.mark.parametrize(
    "settings",
    [
        {"loss_type": "luspo", "importance_sampling_level": "sequence", "beta": 0.0},  # the one setting Liger has right
        {"loss_type": "sapo", "sapo_temperature_pos": 0.5, "sapo_temperature_neg": 2.0},
        {
            "loss_type": "vespo",
            "vespo_k_pos": 1.0,
            "vespo_lambda_pos": 1.5,
            "vespo_k_neg": 2.0,
            "vespo_lambda_neg": 1.0,
        },
        {"use_ref_model": False},  # beta 0.04 stays without effect
    ],
)
def test_equals_liger_with_other_settings(settings):
    names = CORE[:-1] if "use_ref_model" in settings else CORE
    assert_like_liger(settings, problem(names=names))


@pytest.mark.parametrize("bias", [False, True])
def test_reference_from_its_own_head(bias):
    """ref_input and ref_weight (of another width) give the log-probs; masked ids may be anything."""
    g = torch.Generator().manual_seed(7)
    arguments = problem(names=CORE[:-1])
    arguments |= {"ref_input": torch.randn(5, 7, 9, generator=g), "ref_weight": torch.randn(V, 9, generator=g) / 3}
    arguments |= {"ref_bias": torch.randn(V, generator=g)} if bias else {}
    assert_like_liger({"beta": 0.3, "temperature": 0.8}, arguments)
    clean = run(FusedLinearGRPOLoss, {"beta": 0.3}, arguments)
    masked = arguments["attention_mask"] == 0
    dirty = run(FusedLinearGRPOLoss, {"beta": 0.3}, {**arguments, "selected_token_ids": arguments["selected_token_ids"]
                .masked_fill(masked, V + 5)})  # fmt: skip
    assert dirty[0].equal(clean[0])
    assert clean[1][0] > 0


@pytest.mark.parametrize("beta", [0.0, 0.3])
@pytest.mark.parametrize("given", [("ref_per_token_logps",), ("ref_input", "ref_weight"), "both"])
def test_two_references_are_worth_a_warning(beta, given):
    """With use_ref_model alone, whatever beta is; of log-probs and states the log-probs count."""
    arguments = problem()
    states = {"ref_input": torch.randn(5, 7, 9), "ref_weight": torch.randn(V, 9)}
    names = arguments.keys() | states.keys() if given == "both" else (arguments.keys() - {CORE_REF}) | {*given}
    both = {k: v for k, v in (arguments | states).items() if k in names}
    for kind, options in ((FusedLinearGRPOLoss, {}), (chunked_loss.LigerFusedLinearGRPOLoss, {"compiled": False})):
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            loss, _ = kind(beta=beta, **options)(**both)
        heard = [w for w in seen if "ref_per_token_logps" in str(w.message)]
        assert [w.category for w in heard] == [UserWarning] * (given == "both")
        assert all(str(w.message).startswith("Both ref_per_token_logps and ref_input are provided") for w in heard)
        if given == "both":
            assert loss.equal(kind(beta=beta, **options)(**arguments)[0])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plain = {k: v for k, v in both.items() if k != CORE_REF}
        FusedLinearGRPOLoss(beta=beta, use_ref_model=False)(**plain)


WRONG = {
    "luspo": ({"loss_type": "luspo", "beta": 0.0}, {}),
    "luspo, kl": ({"loss_type": "luspo", "beta": 0.3, "importance_sampling_level": "sequence"}, {}),
    "luspo, ratio per token": (
        {"loss_type": "luspo", "beta": 0.0, "importance_sampling_level": "sequence"}, {"names": EVERY[:9]},
    ),
    **{
        f"{loss}, per-token advantages, chunks": (
            {"loss_type": loss, "chunk_size": 2, "max_completion_length": 11}, {"token_advantages": True},
        )
        for loss in LOSS_TYPES if loss not in ("sapo", "vespo")  # with which Liger stops
    },
}  # fmt: skip


@pytest.mark.works("Liger's slot", "FusedLinearGRPOLoss: TRL's formulas (fp64) where Liger 0.8.5 is measurably wrong")
@pytest.mark.parametrize("case", WRONG)
def test_right_where_liger_is_wrong(case):
    settings, options = WRONG[case]
    arguments = problem(**options)
    truth, gradients = of_reference(settings, arguments)
    assert max(errors(run(FusedLinearGRPOLoss, settings, arguments), truth.loss, gradients)) <= 1e-5
    assert max(errors(of_liger(settings, arguments), truth.loss, gradients)) > 0.03
    exact = run(FusedLinearGRPOLoss, settings, problem(torch.float64, **options))
    assert max(errors(exact, truth.loss, gradients)) <= 1e-6  # the reference's fp64 inputs were rounded to fp32 first


@pytest.mark.parametrize("loss_type", ["sapo", "vespo"])
@pytest.mark.parametrize("options", [{"names": EVERY[:9]}, {"token_advantages": True}])
def test_what_liger_cannot_run(loss_type, options):
    """A sequence's ratio, or advantages per token, with these two."""
    settings = {"loss_type": loss_type, "chunk_size": 2, "beta": 0.1}
    settings["importance_sampling_level"] = "token" if "token_advantages" in options else "sequence"
    arguments = problem(**options)
    truth, gradients = of_reference(settings, arguments)
    assert max(errors(run(FusedLinearGRPOLoss, settings, arguments), truth.loss, gradients)) <= 1e-5
    with pytest.raises((ValueError, RuntimeError)):
        of_liger(settings, arguments)


@pytest.mark.parametrize("poison", [torch.nan, -torch.inf])
@pytest.mark.parametrize("name", ["_input", "old_per_token_logps", "ref_per_token_logps", "vllm_is_ratio"])
def test_padding_may_hold_anything(name, poison):
    settings, arguments = {"beta": 0.3}, problem(names=EVERY[:9])
    padding = arguments["attention_mask"] == 0
    value = arguments[name]
    poison = abs(poison) if name == "vllm_is_ratio" else poison
    dirty = {**arguments, name: value.masked_fill(padding[..., None] if value.ndim == 3 else padding, poison)}
    clean, ours = (run(FusedLinearGRPOLoss, settings, a) for a in (arguments, dirty))
    assert ours[0].equal(clean[0])
    assert all(a.equal(b) for a, b in zip(ours[2], clean[2]))
    assert not torch.isfinite(of_liger(settings, dirty)[0])


def test_a_bad_id_is_an_error():
    arguments = problem()
    arguments["selected_token_ids"][2, 0] = V + 5
    assert torch.isfinite(of_liger({}, arguments)[0])
    with pytest.raises(ValueError, match=rf"selected_token_ids must be in \[0, {V}\)"):
        run(FusedLinearGRPOLoss, {}, arguments)


MORE = {
    "softcap and scale": ({"softcap": 3.0, "logit_scale": 0.6}, {}),
    "entropy": ({"entropy_coef": 0.05, "top_entropy_quantile": 0.6}, {}),
    "dual clip": ({"dual_clip": 1.3}, {}),
    "k1": ({"kl_estimator": "k1", "beta": 0.2}, {}),
    "GSPO-token": ({"importance_sampling_level": "sequence_token"}, {}),
    "cispo, sequence": ({"loss_type": "cispo", "importance_sampling_level": "sequence", "epsilon_high": 1.2}, {}),
    "sapo, sequence": ({"loss_type": "sapo", "importance_sampling_level": "sequence"}, {}),
    "DPPO": ({"divergence_mask": "tv", "divergence_high": 0.05, "divergence_low": 0.05}, {}),
    "off-policy mask": ({"off_policy_mask_threshold": 0.01}, {"names": (*CORE, "sampling_logprobs")}),
    "all at once": (
        {"softcap": 5.0, "entropy_coef": 0.05, "off_policy_mask_threshold": 0.01, "beta": 0.2},
        {"names": EVERY, "token_advantages": True},
    ),
}  # fmt: skip


@pytest.mark.quick
@pytest.mark.works("Liger's slot", "FusedLinearGRPOLoss: softcap, entropy and the objectives Liger has not, in fp64")
@pytest.mark.parametrize("case", MORE)
def test_what_liger_has_not(case):
    settings, options = MORE[case]
    arguments = problem(torch.float64, **options)
    head = {k: settings[k] for k in ("softcap", "logit_scale") if k in settings}
    truth, gradients = of_reference({k: v for k, v in settings.items() if k not in head}, arguments, **head)
    assert max(errors(run(FusedLinearGRPOLoss, settings, arguments), truth.loss, gradients)) <= 1e-9
    without = {k: v for k, v in settings.items() if k in ("loss_type", "beta")}
    assert relative_error(run(FusedLinearGRPOLoss, without, arguments)[0], truth.loss) > 1e-6


@pytest.mark.parametrize("at_once", [True, False])
def test_lora_and_sampling_support(at_once):
    """Gradients reach the adapter, whether they are taken in the call or in the backward."""
    arguments = problem(torch.float64)
    arguments["lora"] = torch.randn(3, D, dtype=torch.float64), torch.randn(V, 3, dtype=torch.float64), 0.3
    ids = arguments["selected_token_ids"]
    every = torch.arange(V).repeat(ids.numel(), 1)
    kept = (every % 2 == 0) | (every == ids.flatten()[:, None])
    offsets = torch.nn.functional.pad(kept.sum(1).cumsum(0), (1, 0))
    arguments["support"] = every[kept], offsets
    results = []
    for of in (lambda a: FusedLinearGRPOLoss(grad_in_forward=at_once)(**a)[0] * 3.0, of_reference_loss):
        a, b, scaling = arguments["lora"]
        leaf = {**problems.with_grad(arguments, LEAVES), "lora": (a.requires_grad_(), b.requires_grad_(), scaling)}
        inputs = [*(leaf[k] for k in LEAVES), a, b]
        loss = of(leaf)
        results.append([loss.detach(), *torch.autograd.grad(loss, inputs)])
    assert max(relative_error(x, y) for x, y in zip(*results, strict=True)) <= 1e-9


def of_reference_loss(arguments):
    config = GRPOLossConfig(beta=0.04, use_bias_correction_kl=False)
    ours = {v: k for k, v in THEIRS.items()}
    return 3.0 * reference.grpo_loss(config=config, **{ours.get(k, k): v for k, v in arguments.items()}).loss


def test_entropy_and_logprobs_of_the_last_call():
    loss = FusedLinearGRPOLoss(beta=0.0, log_entropy=True, softcap=3.0)
    assert loss.last is None
    arguments = problems.with_grad(problem(torch.float64, CORE[:-1]), LEAVES)
    loss(**arguments)
    truth, _ = of_reference({"beta": 0.0}, arguments, softcap=3.0)
    torch.testing.assert_close(loss.last.entropy, truth.entropy)
    torch.testing.assert_close(loss.last.logprobs, truth.logprobs)
    assert loss.last.metrics["measured_tokens"] == arguments["attention_mask"].sum()
    assert not any(x.requires_grad for x in loss.last[:3])
    lean = FusedLinearGRPOLoss(beta=0.0, softcap=3.0)  # the last sequence has no advantage
    assert lean(**arguments)[0] == loss.last.loss
    assert lean.last.entropy is None
    assert lean.last.metrics["skipped_tokens"] > 0
    assert lean.last.logprobs[-1].eq(0).all()


def test_packed():
    arguments = problem(torch.float64)
    ours = {v: k for k, v in THEIRS.items()}
    flat = problems.pack({ours[k]: v for k, v in arguments.items()})
    flat = {THEIRS.get(k, k): v for k, v in flat.items()}
    row = {k: v[None] if v.shape[:1] == flat["attention_mask"].shape else v for k, v in flat.items()}
    settings = {"loss_type": "grpo", "beta": 0.2}
    padded, packed = run(FusedLinearGRPOLoss, settings, arguments), run(FusedLinearGRPOLoss, settings, row)
    torch.testing.assert_close(packed[0], padded[0])
    torch.testing.assert_close(packed[1], padded[1])
    torch.testing.assert_close(packed[2][1:], padded[2][1:])


def test_sixteen_bits_are_closer_than_ligers():
    """Liger rounds its logits to bf16."""
    settings, arguments = {"beta": 0.1, "max_completion_length": 11}, problem(torch.bfloat16)
    arguments["_input"] = arguments["_input"] * 4
    truth, gradients = of_reference(settings, arguments)
    ours = errors(run(FusedLinearGRPOLoss, settings, arguments), truth.loss, gradients)
    theirs = errors(of_liger(settings, arguments), truth.loss, gradients)
    assert all(a <= b for a, b in zip(ours, theirs))
    assert ours[0] < 0.1 * theirs[0]


def test_the_head_may_be_gone_in_the_backward():
    """As when ZeRO-3 shards it again after the call: Liger has its gradients by then, and so have we."""
    arguments = problem()
    want = run(FusedLinearGRPOLoss, {}, arguments)[2]

    def gone(**options):
        leaves = problems.with_grad(arguments, LEAVES)
        loss, _ = FusedLinearGRPOLoss(**options)(**leaves)
        leaves["lin_weight"].data.fill_(torch.nan)
        (3.0 * loss).backward()
        return [leaves[k].grad for k in LEAVES]

    assert all(a.equal(b) for a, b in zip(gone(), want))
    assert not torch.isfinite(gone(grad_in_forward=False)[0]).all()
    torch.testing.assert_close(run(FusedLinearGRPOLoss, {"grad_in_forward": False}, arguments)[2], want)


def test_a_loss_scale_reaches_fp16_gradients_in_time():
    arguments = problem(torch.float16, names=CORE[:-1])
    arguments["advantages"] = arguments["advantages"] * 1e-5
    truth = of_reference({"beta": 0.0}, arguments)[1]

    def error(**options):
        leaves = problems.with_grad(arguments, LEAVES)
        loss, _ = FusedLinearGRPOLoss(beta=0.0, **options)(**leaves)
        (3.0 * 2**14 * loss).backward()
        return relative_error(leaves["_input"].grad.double() / 2**14, truth[0])

    assert error(grad_in_forward=False) < 2e-3 < error()


def test_frozen_head_no_grad_and_a_second_backward():
    arguments = problems.with_grad(problem(), ("_input",))  # LoRA: the head's gradient is not wanted
    loss, _ = FusedLinearGRPOLoss()(**arguments)
    loss.backward(retain_graph=True)
    assert relative_error(arguments["_input"].grad * 3, of_liger({}, problem())[2][0]) <= 1e-5
    with pytest.raises(RuntimeError, match="inplace"):
        loss.backward()
    with torch.no_grad():
        assert not FusedLinearGRPOLoss()(**problems.with_grad(problem(), LEAVES))[0].requires_grad


def test_backends(backend, device):
    arguments = {k: problems.cast(v, v.dtype, device) for k, v in problem().items()}
    theirs = of_liger({"beta": 0.3}, arguments)
    ours = run(FusedLinearGRPOLoss, {"beta": 0.3, "backend": backend, "log_entropy": True}, arguments)
    assert max(errors(ours, theirs[0], theirs[2])) <= 1e-5
    torch.testing.assert_close(ours[1], theirs[1], rtol=1e-5, atol=1e-7)


def test_the_certified_backward():
    arguments = problem(vocab=2000)
    exact = run(FusedLinearGRPOLoss, {"backward": "exact"}, arguments)
    found = []
    for tolerance in (0.2, 0.02):
        got = run(FusedLinearGRPOLoss, {"backward": "certified", "tolerance": tolerance}, arguments)
        found.append(max(errors(got, exact[0], exact[2])))
        assert 1e-7 < found[-1] <= tolerance
    assert found[1] < found[0]


def test_attributes_count_at_each_call():
    """Trainers set them between calls: schedules of beta or temperature."""
    loss = FusedLinearGRPOLoss(beta=0.3)
    loss.beta, loss.temperature = 0.1, 0.7
    assert loss(**problem())[0] == FusedLinearGRPOLoss(beta=0.1, temperature=0.7)(**problem())[0]
    loss.beta = -1.0
    with pytest.raises(ValueError, match="beta must be >= 0, got -1"):
        loss(**problem())


@pytest.mark.parametrize(
    ("settings", "changes", "message"),
    [
        ({"loss_type": "ppo"}, {}, "loss_type must be one of 'grpo'"),
        ({"epsilon_low": 1.5}, {}, r"epsilon_low must be in \[0, 1\), got 1.5"),
        ({"epsilon_high": None}, {}, "epsilon_high must be >= 0, got None"),
        ({"chunk_size": 0}, {}, "chunk_size must be >= 1, got 0"),
        ({"compiled": "no"}, {}, "compiled must be True or False, got 'no'"),
        ({"temperature": 0.0}, {}, "temperature must be > 0, got 0.0"),
        ({"delta": 2.0, "loss_type": "sapo"}, {}, "delta bounds the clipped surrogate's ratio"),
        ({"loss_type": "dr_grpo"}, {}, "max_completion_length must be given for loss_type 'dr_grpo', got None"),
        ({"softcap": -1.0}, {}, "softcap must be > 0"),
        ({"backend": "cuda"}, {}, "backend must be one of"),
        ({"backward": "fast"}, {}, "backward must be one of"),
        ({}, {"ref_per_token_logps": None}, r"ref_per_token_logps \(or ref_input and ref_weight\) must be given"),
        ({"use_ref_model": False}, {}, "ref_per_token_logps must be None for use_ref_model=False"),
        ({}, {"lin_weight": torch.randn(V, D + 1)}, rf"lin_weight must be \(V, D\) with D = {D}"),
        ({}, {"attention_mask": torch.full((5, 7), 0.5)}, "attention_mask must hold 0 and 1 only"),
        ({}, {"attention_mask": torch.ones(5, 6)}, "attention_mask must have the shape of selected_token_ids"),
        ({}, {"advantages": torch.ones(4)}, r"advantages must be \(5,\) or shaped like selected_token_ids"),
        ({}, {"old_per_token_logps": torch.ones(5, 6)}, "old_per_token_logps must have the shape"),
        ({}, {"vllm_is_ratio": torch.ones(6)}, r"vllm_is_ratio must be \(5,\)"),
        ({}, {"num_items_in_batch": -1}, "num_items_in_batch must be a number >= 0, got -1"),
        ({}, {"ref_per_token_logps": None, "ref_input": torch.randn(5, 7, D), "ref_weight": torch.randn(V, D + 1)},
         "ref_weight must be"),
    ],
)  # fmt: skip
def test_bad_input(settings, changes, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        FusedLinearGRPOLoss(**settings)(**{**problem(), **changes})


def rank(index, folder):
    """One of two processes: unequal lengths, the tokens of both counted."""
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=index, world_size=2)
    arguments = problem(seed=index)
    for loss_type in ("dapo", "cispo", "vespo", "bnpo"):
        for given in (None, 53):
            assert_like_liger({"loss_type": loss_type, "beta": 0.1}, {**arguments, "num_items_in_batch": given})
    alone = arguments["attention_mask"].sum()
    (mine, _), total = FusedLinearGRPOLoss(beta=0.0)(**arguments), alone.clone()
    dist.all_reduce(total)
    truth, _ = of_reference({"beta": 0.0}, arguments)
    assert 2 * alone != total
    assert relative_error(mine * total / 2, truth.loss * alone) < 1e-5
    dist.destroy_process_group()


@pytest.mark.works("Liger's slot", "FusedLinearGRPOLoss: Liger's normaliser over two processes")
def test_two_processes(tmp_path):
    torch.multiprocessing.spawn(rank, (str(tmp_path),), nprocs=2)


class TrainerOfTRL112:
    """What TRL 1.12's GRPOTrainer does with the class: how it is made, called, and its metrics are logged."""

    def __init__(self, module, model, settings):
        self.beta, self.logged = settings["beta"], []
        self.liger_grpo_loss = module.LigerFusedLinearGRPOLoss(
            epsilon_low=0.2, epsilon_high=0.28, temperature=0.9, use_ref_model=self.beta != 0.0,
            max_completion_length=6, **settings,
        )  # fmt: skip
        self.liger_grpo_loss.compiled = False  # minutes of compilation otherwise
        self.model = model

    def compute_liger_loss(self, unwrapped_model, inputs):
        input_ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
        keep = inputs["completion_ids"].size(1)
        last_hidden_state = unwrapped_model.model(input_ids=input_ids).last_hidden_state[:, :-1][:, -keep:]
        loss, metrics = self.liger_grpo_loss(
            _input=last_hidden_state,
            lin_weight=unwrapped_model.lm_head.weight,
            selected_token_ids=inputs["completion_ids"],
            attention_mask=inputs["completion_mask"],
            advantages=inputs["advantages"],
            bias=unwrapped_model.lm_head.bias,
            old_per_token_logps=inputs.get("old_per_token_logps"),
            ref_per_token_logps=inputs.get("ref_per_token_logps"),
            vllm_is_ratio=inputs.get("importance_sampling_ratio"),
            num_items_in_batch=inputs.get("num_items_in_batch"),
        )
        mean_kl = metrics[0] if self.beta != 0.0 else None
        clip_ratio = metrics[-1]
        self.logged.append([loss.item(), clip_ratio.item(), *([mean_kl.item()] if self.beta != 0.0 else [])])
        return loss / 2

    def train(self, batches):
        optimizer = torch.optim.SGD(self.model.parameters(), lr=0.05)
        for inputs in batches:
            self.compute_liger_loss(self.model, inputs).backward()
            optimizer.step()
            optimizer.zero_grad()
        return self.logged, torch.nn.utils.parameters_to_vector(self.model.parameters()).detach()


def trl_batches(model, beta, steps=4):
    g = torch.Generator().manual_seed(5)
    for _ in range(steps):
        ids = torch.randint(3, 97, (4, 10), generator=g)
        mask = (torch.arange(6) < torch.tensor([6, 3, 5, 1])[:, None]).long()
        with torch.no_grad():
            logp = model(input_ids=ids).logits[:, :-1][:, -6:].float().div(0.9).log_softmax(-1)
        logp = logp.gather(-1, ids[:, 4:, None])[..., 0]
        batch = {
            "prompt_ids": ids[:, :4], "completion_ids": ids[:, 4:], "completion_mask": mask,
            "advantages": torch.randn(4, generator=g), "num_items_in_batch": mask.sum() * 2,
            "old_per_token_logps": logp + 0.3 * torch.randn(4, 6, generator=g),
            "importance_sampling_ratio": (torch.rand(4, 6, generator=g) + 0.5).where(mask == 1, 1.0),
        }  # fmt: skip
        yield {**batch, "ref_per_token_logps": logp - 0.1} if beta else batch


@pytest.fixture
def trainer_module():
    """A trainer's module that did ``from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss``."""
    module = ModuleType("a_trainer")
    exec("from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss", vars(module))
    sys.modules[module.__name__] = module
    yield module
    del sys.modules[module.__name__]


@pytest.mark.works("Liger's slot", "apply(): TRL 1.12's call of the class, four optimiser steps of a model")
@pytest.mark.parametrize("settings", [{"beta": 0.0, "loss_type": "dapo"}, {"beta": 0.1, "loss_type": "dr_grpo"},
                                      {"beta": 0.1, "loss_type": "grpo", "importance_sampling_level": "sequence"},
                                      {"beta": 0.0, "loss_type": "vespo"}])  # fmt: skip
def test_trl_112(settings, trainer_module, monkeypatch):
    monkeypatch.undo()  # real memory: transformers fills what it allocates
    from test_fuse_lm_head import make

    models = [make() for _ in range(3)]
    for model in models:
        model.lm_head.weight.data.mul_(0.1)
    start = torch.nn.utils.parameters_to_vector(models[2].parameters()).detach()
    theirs = TrainerOfTRL112(trainer_module, models[0], settings)
    with apply():
        ours = TrainerOfTRL112(trainer_module, models[1], settings)
    assert isinstance(ours.liger_grpo_loss, FusedLinearGRPOLoss)
    assert not isinstance(theirs.liger_grpo_loss, FusedLinearGRPOLoss)
    batches = list(trl_batches(models[2], settings["beta"]))
    (logged, end), (want_logged, want_end) = ours.train(batches), theirs.train(batches)
    torch.testing.assert_close(torch.tensor(logged), torch.tensor(want_logged), rtol=1e-4, atol=1e-6)
    assert relative_error(end - start, want_end - start) <= 1e-5
    assert relative_error(end, start) > 1e-3
    assert any(row[1] > 0 for row in logged) == (settings["loss_type"] != "vespo")


def test_apply_and_undo(trainer_module):
    theirs = chunked_loss.LigerFusedLinearGRPOLoss
    trainer_module.Alias = theirs
    undo = apply()
    try:
        assert chunked_loss.LigerFusedLinearGRPOLoss is FusedLinearGRPOLoss
        assert trainer_module.LigerFusedLinearGRPOLoss is trainer_module.Alias is FusedLinearGRPOLoss
        later = ModuleType("a_later_trainer")
        exec("from liger_kernel.chunked_loss.grpo_loss import LigerFusedLinearGRPOLoss", vars(later))
        sys.modules[later.__name__] = later
        assert later.LigerFusedLinearGRPOLoss is FusedLinearGRPOLoss
        with apply():  # once more is nothing, and ends nothing
            pass
        assert trainer_module.Alias is FusedLinearGRPOLoss
    finally:
        undo.close()
        sys.modules.pop("a_later_trainer", None)
    places = (chunked_loss, chunked_loss.grpo_loss, trainer_module, later)
    assert all(module.LigerFusedLinearGRPOLoss is theirs for module in places)
    assert trainer_module.Alias is theirs
    assert liger.FusedLinearGRPOLoss is FusedLinearGRPOLoss


def test_signature_is_ligers():
    """Also what ms-swift looks up before it passes an argument."""
    liger.SLOT.check_signatures(chunked_loss.LigerFusedLinearGRPOLoss)
    ours = inspect.signature(FusedLinearGRPOLoss.__init__).parameters
    assert set(inspect.signature(chunked_loss.LigerFusedLinearGRPOLoss.__init__).parameters) <= set(ours)


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (("__init__", lambda self, beta=0.1: None), r"__init__ of 0.8.5.* 0.8.5 differs from beta=0.1 on"),
        (("forward", lambda self, _input, rewards: None), r"forward of 0.8.5.* differs from rewards on"),
        (("forward", lambda self, *a: None), None),
    ],
)
def test_another_liger_is_refused(method, message, monkeypatch):
    other = type("Other", (chunked_loss.LigerFusedLinearGRPOLoss,), dict([method]))
    monkeypatch.setattr(chunked_loss.grpo_loss, liger.SLOT.name, other)
    if message is None:  # fewer parameters: whatever fits there fits here
        apply().close()
        return
    with pytest.raises(ImportError, match=message):
        apply()
    assert chunked_loss.LigerFusedLinearGRPOLoss is not FusedLinearGRPOLoss


def test_without_liger(monkeypatch):
    for name in [n for n in sys.modules if n.split(".")[0] == "liger_kernel"]:
        monkeypatch.setitem(sys.modules, name, None)
    spec = importlib.util.spec_from_file_location("without_liger", liger.__file__)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert torch.isfinite(module.FusedLinearGRPOLoss()(**problem())[0])
    with pytest.raises(ImportError, match=r"liger_kernel is needed here: pip install 'fastgrpo\[liger\]'"):
        module.apply()

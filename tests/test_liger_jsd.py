"""Liger's slots for distillation: its own classes in fp32, plain autograd in fp64 where it rounds or spreads NaN."""

import importlib.util
import sys
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F

from fastgrpo import reference
from fastgrpo.integrations import liger_jsd
from fastgrpo.integrations.liger_jsd import FusedLinearJSD, FusedLinearJSDLoss, apply

import problems
from problems import relative_error

pytest.importorskip("liger_kernel")
import liger_kernel.chunked_loss as chunked_loss

N, V, D, D_T = 37, 53, 16, 12
LEAVES = ("student_input", "student_weight", "student_bias")
BETAS = (0.0, 0.3, 1.0)


def problem(dtype=torch.float32, bias=True, device="cpu", labels="true_labels"):
    """By Liger's names; every fourth position ignored."""
    g = torch.Generator().manual_seed(3)
    shapes = {"student_input": (N, D), "student_weight": (V, D), "teacher_input": (N, D_T), "teacher_weight": (V, D_T)}
    shapes |= {"student_bias": (V,), "teacher_bias": (V,)} if bias else {}
    given = {k: torch.randn(*shape, generator=g).to(device, dtype) for k, shape in shapes.items()}
    ids = torch.randint(0, V, (N,), generator=g)
    return given | {labels: ids.where(torch.arange(N) % 4 > 0, -100).to(device)}


def run(kind, settings, arguments):
    """-> what the call returned, gradients of 3 times the loss."""
    arguments = problems.with_grad(arguments, LEAVES)
    out = kind(**settings)(**arguments)
    loss = out[0] if isinstance(out, tuple) else out
    (3.0 * loss).backward()
    values = [x.detach() for x in (out if isinstance(out, tuple) else (out,))]
    return values, [arguments[k].grad for k in LEAVES if k in arguments]


class Plain(torch.nn.Module):
    """The same from full logits in fp64, whatever the inputs' dtype."""

    def __init__(self, weight_hard_loss=0.5, weight_soft_loss=0.5, beta=0.5, ignore_index=-100, temperature=1.0, **_):
        super().__init__()
        self.weights, self.options = (weight_soft_loss, weight_hard_loss), {"beta": beta, "temperature": temperature}
        self.ignore_index = ignore_index

    def forward(self, student_input, student_weight, teacher_input, teacher_weight, true_labels, student_bias=None,
                teacher_bias=None):  # fmt: skip
        counted = true_labels != self.ignore_index
        heads = [x.double() for x in (student_input, student_weight, teacher_input, teacher_weight)]
        biases = [x if x is None else x.double() for x in (student_bias, teacher_bias)]
        soft = reference.linear_divergence(*heads, bias=biases[0], teacher_bias=biases[1], **self.options).divergence
        logits = F.linear(heads[0], heads[1], biases[0])
        hard = F.cross_entropy(logits, true_labels.where(counted, 0), reduction="none")
        soft, hard = (x.masked_fill(~counted, 0.0).sum() / counted.sum().clamp(min=1) for x in (soft, hard))
        return self.weights[0] * soft + self.weights[1] * hard, soft, hard


def assert_like(theirs, ours, tolerance=1e-5):
    for mine, value in zip(ours[0] + ours[1], theirs[0] + theirs[1], strict=True):
        assert mine.shape == value.shape
        assert mine.dtype == value.dtype
        assert relative_error(mine, value) <= tolerance


SETTINGS = {
    "Liger's defaults": {},
    "warm": {"temperature": 0.7},
    "all returned": {"temperature": 2.0, "return_soft_hard_loss": True, "weight_hard_loss": 0.2},
    "soft alone": {"weight_hard_loss": 0.0, "weight_soft_loss": 1.0},
    "soft alone, hard returned": {"weight_hard_loss": 0.0, "return_soft_hard_loss": True},
    "hard alone": {"weight_hard_loss": 2.0, "weight_soft_loss": 0.0},
    "hard alone, soft returned": {"weight_soft_loss": 0.0, "return_soft_hard_loss": True},
    "another ignored index": {"ignore_index": 5},
    "chunks": {"chunk_size": 8},
}


@pytest.mark.works("Liger's slot", "FusedLinearJSDLoss: LigerFusedLinearJSDLoss' losses and gradients")
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("beta", BETAS)
def test_equals_liger(beta, name, bias):
    settings, arguments = {"beta": beta, **SETTINGS[name]}, problem(bias=bias)
    if settings.get("ignore_index"):
        arguments["true_labels"] = arguments["true_labels"].masked_fill(arguments["true_labels"] == -100, 5)
    theirs = run(chunked_loss.LigerFusedLinearJSDLoss, {"compiled": False, **settings}, arguments)
    assert_like(theirs, run(FusedLinearJSDLoss, settings, arguments))
    truth = run(Plain, settings, {k: problems.cast(v, torch.float64) for k, v in arguments.items()})
    exact = run(FusedLinearJSDLoss, {"return_soft_hard_loss": True, **settings}, 
                {k: problems.cast(v, torch.float64) for k, v in arguments.items()})  # fmt: skip
    assert_like(truth, exact, 1e-10)


@pytest.fixture
def triton_jsd():
    """Liger's Triton class, in the interpreter where there is no GPU."""
    return pytest.importorskip("liger_kernel.transformers.fused_linear_jsd").LigerFusedLinearJSD


@pytest.mark.works(
    "Liger's slot", "FusedLinearJSD: LigerFusedLinearJSD's divergence and gradients (Triton's interpreter)"
)
@pytest.mark.parametrize("labels", [True, False])
@pytest.mark.parametrize("beta", BETAS)
def test_equals_ligers_triton(triton_jsd, device, backend, beta, labels):
    arguments = problem(bias=False, device=device, labels="shift_labels")
    arguments |= {} if labels else {"shift_labels": None}
    settings = {"jsd_beta": beta, "temperature": 0.7}
    theirs = run(triton_jsd, settings, arguments)
    assert_like(theirs, run(FusedLinearJSD, {**settings, "backend": backend}, arguments))
    accumulated = run(FusedLinearJSD, {**settings, "backend": backend, "accum_dtype": torch.float32}, arguments)
    assert_like(theirs, accumulated)


@pytest.mark.quick
@pytest.mark.parametrize("beta", BETAS)
def test_sixteen_bits_are_closer_than_ligers(beta):
    """Liger rounds both models' logits, and their log-softmax, to bf16."""
    settings, arguments = {"beta": beta, "weight_hard_loss": 0.0}, problem(torch.bfloat16)
    (truth, *_), gradients = run(Plain, settings, arguments)
    theirs = run(chunked_loss.LigerFusedLinearJSDLoss, {"compiled": False, **settings}, arguments)
    ours = run(FusedLinearJSDLoss, settings, arguments)
    far, near = (relative_error(x[0][0], truth) for x in (theirs, ours))
    assert near < 1e-5 < 1e-4 < far
    far, near = ([relative_error(x, y) for x, y in zip(found[1], gradients)] for found in (theirs, ours))
    assert all(a <= b for a, b in zip(near, far))
    assert max(near) < 5e-3


@pytest.mark.quick
def test_ignored_rows_may_hold_anything():
    settings, arguments = {"beta": 0.3}, problem()
    clean = run(FusedLinearJSDLoss, settings, arguments)
    out = arguments["true_labels"] == -100
    dirty = arguments | {
        k: arguments[k].masked_fill(out[:, None], torch.nan) for k in ("student_input", "teacher_input")
    }
    found = run(FusedLinearJSDLoss, settings, dirty)
    assert found[0][0].equal(clean[0][0])
    assert all(a.equal(b) for a, b in zip(found[1], clean[1]))
    theirs = run(chunked_loss.LigerFusedLinearJSDLoss, {"compiled": False, **settings}, dirty)
    assert theirs[1][1].isnan().any()
    none = run(FusedLinearJSDLoss, settings, arguments | {"true_labels": torch.full((N,), -100)})
    assert all((x == 0).all() for x in none[0] + none[1])


def test_sequences_lora_softcap_and_the_order_of_gradients():
    """(B, T, D), and what Liger has not, in fp64; gradients taken in the call and in the backward."""
    flat = problem(torch.float64)
    a, b = torch.randn(3, D, dtype=torch.float64), torch.randn(V, 3, dtype=torch.float64)
    cut = {k: v[:36].view(4, 9, *v.shape[1:]) if len(v) == N else v for k, v in flat.items()}
    flat = {k: v[:36] if len(v) == N else v for k, v in flat.items()}
    whole = flat | {"student_weight": flat["student_weight"] + 0.5 * b @ a}
    truth = run(Plain, {"beta": 0.3}, whole)
    ours, later = (
        run(FusedLinearJSDLoss, {"beta": 0.3, "grad_in_forward": x}, cut | {"lora": (a, b, 0.5)}) for x in (True, False)
    )
    assert_like(([truth[0][0]], truth[1]), (ours[0], [x.reshape_as(y) for x, y in zip(ours[1], truth[1])]), 1e-10)
    assert_like(ours, later, 1e-12)
    adapter = a.requires_grad_(), b.requires_grad_(), 0.5
    FusedLinearJSDLoss(beta=0.3)(**cut, lora=adapter).backward()
    want = torch.autograd.grad(
        Plain(beta=0.3)(**flat | {"student_weight": flat["student_weight"] + 0.5 * b @ a})[0], [a, b]
    )
    assert max(relative_error(x.grad, y) for x, y in zip((a, b), want)) < 1e-10
    capped = FusedLinearJSDLoss(beta=0.3, weight_hard_loss=0.0, weight_soft_loss=1.0, softcap=3.0, teacher_softcap=4.0,
                                logit_scale=0.7, teacher_logit_scale=1.3, temperature=0.8)(**flat)  # fmt: skip
    heads = [flat[k] for k in ("student_input", "student_weight", "teacher_input", "teacher_weight")]
    want = reference.linear_divergence(
        *heads, flat["true_labels"] != -100, beta=0.3, bias=flat["student_bias"], teacher_bias=flat["teacher_bias"],
        softcap=3.0, teacher_softcap=4.0, logit_scale=0.7, teacher_logit_scale=1.3, temperature=0.8,
    ).divergence.sum() / (flat["true_labels"] != -100).sum()  # fmt: skip
    torch.testing.assert_close(capped, want)


def test_the_heads_may_be_gone_in_the_backward():
    """As when ZeRO-3 shards them again after the call."""
    arguments, found = problem(), []
    for gone in (False, True):
        leaves = problems.with_grad(arguments, LEAVES)
        leaves["teacher_weight"] = leaves["teacher_weight"].clone()
        loss = FusedLinearJSDLoss(beta=0.3)(**leaves)
        if gone:
            for name in ("student_weight", "teacher_weight"):
                leaves[name].data.fill_(torch.nan)
        loss.backward()
        found.append([leaves[k].grad for k in LEAVES])
    assert all(x.equal(y) for x, y in zip(*found))
    frozen = problems.with_grad(arguments, ("student_input",))
    FusedLinearJSDLoss(beta=0.3)(**frozen).backward()
    torch.testing.assert_close(frozen["student_input"].grad, found[0][0])
    with torch.no_grad():
        assert not FusedLinearJSDLoss()(**problems.with_grad(arguments, LEAVES)).requires_grad


def test_attributes_count_at_each_call():
    loss = FusedLinearJSDLoss(beta=0.3)
    loss.beta, loss.temperature = 1.0, 0.7
    assert loss(**problem()) == FusedLinearJSDLoss(beta=1.0, temperature=0.7)(**problem())
    loss.beta = 2.0
    with pytest.raises(ValueError, match=r"beta must be in \[0, 1\], got 2.0"):
        loss(**problem())


@pytest.mark.parametrize(
    ("kind", "settings", "changes", "message"),
    [
        (FusedLinearJSDLoss, {"beta": -0.1}, {}, r"beta must be in \[0, 1\], got -0.1"),
        (FusedLinearJSD, {"jsd_beta": 1.1}, {}, r"jsd_beta must be in \[0, 1\], got 1.1"),
        (FusedLinearJSD, {"temperature": 0.0}, {}, "temperature must be > 0, got 0.0"),
        (FusedLinearJSD, {"ignore_index": 0.5}, {}, "ignore_index must be"),
        (FusedLinearJSD, {"accum_dtype": "fp32"}, {}, "accum_dtype must be a torch.dtype or None, got 'fp32'"),
        (FusedLinearJSDLoss, {"weight_hard_loss": 0.0, "weight_soft_loss": 0.0}, {}, "weight_hard_loss or weight_soft"),
        (FusedLinearJSDLoss, {"chunk_size": 0}, {}, "chunk_size must be >= 1, got 0"),
        (FusedLinearJSDLoss, {"backend": "cuda"}, {}, "backend must be one of"),
        (FusedLinearJSDLoss, {}, {"true_labels": torch.zeros(N + 1).long()}, r"true_labels must be \(37,\)"),
        (FusedLinearJSDLoss, {}, {"true_labels": torch.full((N,), V)}, rf"true_labels must be in \[0, {V}\)"),
        (FusedLinearJSDLoss, {"ignore_index": 0}, {"true_labels": torch.full((N,), -100)}, "true_labels must be in"),
        (FusedLinearJSDLoss, {}, {"student_weight": torch.randn(V, D + 1)},
         rf"student_weight must be \(V, D\) with D = {D}"),
        (FusedLinearJSDLoss, {}, {"student_bias": torch.randn(V + 1)}, "student_bias must have shape"),
        (FusedLinearJSDLoss, {}, {"teacher_input": torch.randn(N + 1, D_T)},
         "teacher_input must have the positions of student_input"),
        (FusedLinearJSDLoss, {}, {"teacher_weight": torch.randn(V + 3, D_T)},
         rf"teacher_weight must be \(V, D_t\) = \({V}, {D_T}\), the student's vocabulary, got \({V + 3}, {D_T}\)"),
    ],
)  # fmt: skip
def test_bad_input(kind, settings, changes, message):
    arguments = problem(bias=kind is FusedLinearJSDLoss)
    if kind is FusedLinearJSD:
        arguments["shift_labels"] = arguments.pop("true_labels")
    with pytest.raises(ValueError, match=f"^{message}"):
        kind(**settings)(**arguments | changes)


@pytest.mark.works(
    "Liger's slot", "liger_jsd.apply(): in Liger's packages and in modules that have imported the classes"
)
def test_apply_and_undo(triton_jsd):
    import liger_kernel.transformers as layers

    theirs = chunked_loss.LigerFusedLinearJSDLoss
    trainer = ModuleType("a_distillation_trainer")
    trainer.Loss, trainer.LigerFusedLinearJSD = theirs, triton_jsd
    sys.modules[trainer.__name__] = trainer
    try:
        with apply():
            assert chunked_loss.LigerFusedLinearJSDLoss is trainer.Loss is FusedLinearJSDLoss
            assert layers.LigerFusedLinearJSD is trainer.LigerFusedLinearJSD is FusedLinearJSD
            with apply():  # once more is nothing, and ends nothing
                pass
            assert trainer.Loss is FusedLinearJSDLoss
    finally:
        del sys.modules[trainer.__name__]
    assert chunked_loss.LigerFusedLinearJSDLoss is trainer.Loss is theirs
    assert layers.LigerFusedLinearJSD is trainer.LigerFusedLinearJSD is triton_jsd


def test_another_liger_is_refused_whole(triton_jsd, monkeypatch):
    """One class has another call: neither is replaced."""
    import liger_kernel.transformers.fused_linear_jsd as home

    other = type("Other", (triton_jsd,), {"forward": lambda self, student_input, labels: None})
    monkeypatch.setattr(home, "LigerFusedLinearJSD", other)
    with pytest.raises(ImportError, match=r"LigerFusedLinearJSD.forward of 0.8.5.* differs from labels on"):
        apply()
    assert chunked_loss.LigerFusedLinearJSDLoss is not FusedLinearJSDLoss


def test_without_liger(monkeypatch):
    for name in [n for n in sys.modules if n.split(".")[0] == "liger_kernel"]:
        monkeypatch.setitem(sys.modules, name, None)
    spec = importlib.util.spec_from_file_location("without_liger", liger_jsd.__file__)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert torch.isfinite(module.FusedLinearJSDLoss()(**problem()))
    with pytest.raises(ImportError, match=r"liger_kernel is needed here: pip install 'fastgrpo\[liger\]'"):
        module.apply()

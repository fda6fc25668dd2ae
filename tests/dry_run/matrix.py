"""What is driven through Triton's JIT: every kernel and every option, through the public functions where they reach."""

import itertools
import json
import tempfile
from pathlib import Path
from typing import NamedTuple

import torch

from fastgrpo import GRPOLossConfig, grpo_loss, linear_divergence, linear_logprobs
from fastgrpo.config import CLIPPED, DIVERGENCE_MASKS, KL_ESTIMATORS, LOSS_TYPES

V, D, RANK = 5008, 256, 16  # multiples of 16, as in the kernel report: what one compiles the other need not
FORWARD = 4  # its documented launches: rows gathered, their labels, the vocabulary, the combination of its runs
FROZEN = 4, 3  # a chunk: masses, fold, level, their product with the weight; gather, combination, directions
TERMS = 1  # what tiles of dlogits need of each row, where it has a label
EXACT = 6 + TERMS  # chunks cut, rows gathered; dlogits, dX, dW of the one chunk; scatter
PLAN = 8  # rows weighed, sorted out, counted, placed; entries' need, their offsets, places, the labels' places
AUDIT = 10 + TERMS  # samples' labels, rows gathered, dlogits; masses, shares, ranking; dlogits, lost, errors, choice
ORDER = 1  # of the rows of a certified forward
UNHINTED = 2  # of one without a hint: an order and rows gathered for the labels' logits, which order the rows
CERTIFIED = ORDER + EXACT + 1 + PLAN + AUDIT  # 1: entries copied in their order, where descriptors read them
UNLABELLED = CERTIFIED - 2 * TERMS + 1  # of a divergence; 1: the teacher's entries copied
AUDITED = 2  # of one gradient more: what is lost, errors
TOPK = FORWARD - 1 + 3  # no labels; the targets' logits, and their part of dX and dW
LORA = 4  # its pair's: gather, dX, dW, scatter
BIAS, OBJECTIVE = 1, 1
PAIR = 4  # of two models: rows of both gathered, the vocabulary, the combination of its runs
ALONE = FORWARD - 1  # of one model, without labels
MIXTURE = 2 * ALONE + 3  # each model alone; rows of both gathered, the vocabulary
HELD = 6  # a panel of a mixture's rows that is held: rows of both gathered, each model's vocabulary, levels, sums
HELD_GRADIENT = 4  # chunks cut; dlogits and dX of the one chunk; scatter
LEGS = 11  # of a certified divergence, at most
PAIR_CERTIFIED = 2 + 2 * LEGS  # rows of both gathered; each leg and its combination
MIXTURE_CERTIFIED = 2 * ALONE + 2 + LEGS
ROW_CHUNKS = 6  # at most, of those cases that have several: each gathers its rows
HINT = 4  # of a certified divergence of two models' labels: rows gathered, logits


class Case(NamedTuple):
    name: str
    run: object  # () -> None
    launches: int | None  # as documented; None: depends on what the certificate holds
    compiles: int | None = None  # None: any number
    bound: int | None = None  # of the launches, whose arguments go through Triton's binder; None: any number


def tensors(dtype, n=300, batch=1, v=V, d=D, view=False, columns_first=False):
    """hidden (B, T, D), weight (V, D), targets (B, T); some ignored."""
    length = n // batch
    hidden = torch.zeros(batch, length + view, d, dtype=dtype)[:, :length]
    weight = torch.zeros(d, v, dtype=dtype).t() if columns_first else torch.zeros(v, d, dtype=dtype)
    targets = torch.arange(batch * length).view(batch, length) % v
    targets[:, 1::7] = -100
    return hidden.requires_grad_(), weight.requires_grad_(), targets


def logprobs(dtype, frozen=False, lora=None, bias=False, options=False, hint=False, entropy=False, backward="exact",
             workspace_mb=128, support=False, topk=0, **shape):  # fmt: skip
    """One forward and backward of linear_logprobs."""
    hidden, weight, targets = tensors(dtype, **shape)
    v, d = weight.shape
    weight.requires_grad_(not frozen)
    keywords = {"backward": backward, "workspace_mb": workspace_mb, "return_entropy": entropy}
    if options:
        keywords |= {"softcap": 30.0, "logit_scale": 0.5, "temperature": torch.ones(targets.shape)}
    if lora is not None:
        a, b = torch.zeros(RANK, d, dtype=lora), torch.zeros(v, RANK, dtype=lora)
        keywords["lora"] = (a.requires_grad_(), b.requires_grad_(), 2.0)
    if hint:
        keywords["old_logprobs"] = -torch.rand(targets.shape)
    if support:
        keywords["support"] = (targets.flatten().clamp(min=0), torch.arange(targets.numel() + 1))
    if topk:
        targets = targets[..., None] + torch.arange(topk).where(targets[..., None] != -100, 0)
        targets = targets.where(targets < v, -100)
    out = linear_logprobs(hidden, weight, targets, torch.zeros(v, dtype=dtype).requires_grad_(not frozen) if bias
                          else None, **keywords)  # fmt: skip
    (out.logprobs.sum() + sum(x.sum() for x in (out.entropy, out.rest) if x is not None)).backward()


def problem_of(dtype, options=False, bias=False, **others):
    """A HeadProblem for what no public function calls alone; others: of its parameters or of the shape."""
    from fastgrpo.backends.problem import HeadParams, HeadProblem

    params = {k: others.pop(k) for k in ("workspace", "tolerance", "entropy") if k in others}
    hidden, weight, targets = (x.detach() for x in tensors(dtype, **others))
    params = HeadParams(
        temperature=None if options else 1.0, softcap=30.0 if options else None, logit_scale=0.5 if options else 1.0,
        compute_dtype=dtype, backend="triton", **{"entropy": False, "workspace": 2**27, **params},
    )  # fmt: skip
    return HeadProblem(
        hidden, weight, weight[:, 0].contiguous() if bias else None, targets.flatten(),
        torch.ones(targets.numel()) if options else None, params,
    )  # fmt: skip


def dx_in_forward(dtype, **keywords):
    """The forward that makes the gradient of a head that takes none."""
    from fastgrpo.backends import triton_backend

    triton_backend.frozen_forward(problem_of(dtype, **keywords), None, None)


def partial(dtype, certified):
    """What a vocabulary that ranks share calls on each of them."""
    from fastgrpo.backends import triton_backend

    problem = problem_of(dtype, tolerance=0.005 if certified else None)
    targets = problem.targets
    if certified:
        row = torch.zeros(targets.numel())
        triton_backend.certified_partial_forward(problem, row, row)
    else:
        triton_backend.partial_forward(problem)


def audit_by_torch(dtype):
    """Where the workspace is too small for the kernels'."""
    from fastgrpo.backends import staircase, triton_backend
    from fastgrpo.backends.problem import Gradients

    problem = problem_of(dtype, tolerance=0.005)
    stats, certificate = triton_backend.certified_forward(problem, None)
    staircase.sort_out(problem, stats, certificate, torch.ones(problem.targets.numel()), Gradients(True, True), True)


def loss(config, gated=False, dtype=torch.bfloat16, n=64, batch=4):
    hidden, weight, targets = tensors(dtype, n=n, batch=batch)
    row = torch.zeros(targets.shape)
    grpo_loss(
        hidden, weight, targets, torch.ones(batch), GRPOLossConfig(log_entropy=False, **config), old_logprobs=row,
        ref_logprobs=row if config.get("beta") else None, importance_weights=torch.ones(batch) if gated else None,
    ).loss.backward()  # fmt: skip


def divergence(dtype, beta, options=False, frozen=False, backward="exact", teacher_depth=D // 2, hinted=False,
               workspace_mb=128, **shape):  # fmt: skip
    """One forward and backward of linear_divergence."""
    hidden, weight, targets = tensors(dtype, **shape)
    others, teacher, _ = tensors(dtype, d=teacher_depth, **shape)
    weight.requires_grad_(not frozen)
    keywords = {"backward": backward, "workspace_mb": workspace_mb}
    if hinted:
        keywords |= {"targets": targets, "old_logprobs": torch.full(targets.shape, -0.1)}
    if options:
        bias = torch.zeros(V, dtype=dtype).requires_grad_()
        keywords |= {"bias": bias, "teacher_bias": bias, "softcap": 30.0, "return_entropy": True,
                     "temperature": torch.ones(targets.shape)}  # fmt: skip
    out = linear_divergence(hidden, weight, others, teacher, targets != -100, beta=beta, **keywords)
    out.divergence.sum().backward()


def objectives(every):
    """Settings of the objective that differ in code: all of them, or each value at least once."""
    kinds = [{"loss_type": t} for t in LOSS_TYPES if t not in CLIPPED[1:]]  # the five reductions share one kernel
    kinds += [{"loss_type": t, "divergence_mask": m} for t in ("dapo", "cispo") for m in DIVERGENCE_MASKS]
    kls = [{}] + [
        {"beta": 0.1, "kl_estimator": k, "use_bias_correction_kl": c} for k in KL_ESTIMATORS for c in (True, False)
    ]
    gates = (False, True)
    if every:
        return [({**kind, **kl}, gate) for kind, kl, gate in itertools.product(kinds, kls, gates)]
    length = max(len(kinds), len(kls))
    return [({**kinds[i % len(kinds)], **kls[i % len(kls)]}, gates[i % 2]) for i in range(length)]


def first_contact(step):
    """A step of the first command on a GPU, at its small sizes; a row that says of an error is one."""
    from bench import first_contact

    with tempfile.TemporaryDirectory() as folder:
        book = first_contact.Book(Path(folder), "cpu")
        status = first_contact.run_step(step, first_contact.Contact("cpu", first_contact.REHEARSAL), book)
        rows = [json.loads(line) for line in (Path(folder) / "first-contact.jsonl").read_text().splitlines()]
    errors = [row["error"] for row in rows if "error" in row]
    if status or errors or not rows:
        raise RuntimeError(f"{len(errors)} of {len(rows)} rows: {errors[:1]}")


def cases(everything):
    bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32

    def case(name, launches, function, *args, compiles=None, bound=None, **kwargs):
        return Case(name, lambda: function(*args, **kwargs), launches, compiles, bound)

    for dtype in (bf16, fp16, fp32):
        kind = str(dtype).removeprefix("torch.")
        loras = (fp32,) if dtype == fp32 else (dtype, fp32)
        yield case(f"{kind}", FORWARD + EXACT, logprobs, dtype)
        yield case(f"{kind} frozen head", sum(FROZEN), logprobs, dtype, frozen=True)
        yield case(f"{kind} dX in forward", sum(FROZEN), dx_in_forward, dtype)
        yield case(f"{kind} dX in forward, everything", sum(FROZEN), dx_in_forward, dtype, bias=True, options=True,
                   entropy=True)  # fmt: skip
        for beta in (0.0, 1.0, 0.3) if everything or dtype == bf16 else (1.0,):
            forward, flagged = (HELD, MIXTURE_CERTIFIED) if beta == 0.3 else (PAIR, PAIR_CERTIFIED)
            name = f"{kind} divergence, beta {beta}, certified"
            yield case(name, flagged + UNLABELLED, divergence, dtype, beta, backward="certified")
            if beta == 0.0 and dtype == bf16:
                yield case(f"{name}, frozen head", flagged + UNLABELLED - AUDIT, divergence, dtype, beta,
                           backward="certified", frozen=True)  # fmt: skip
                yield case(f"{name}, another batch", flagged + UNLABELLED, divergence, dtype, beta, compiles=0,
                           backward="certified", n=301)  # fmt: skip
                yield case(f"{name}, hinted", flagged + UNLABELLED + HINT, divergence, dtype, beta,
                           backward="certified", hinted=True)  # fmt: skip
            if everything:
                yield case(f"{name}, everything", flagged + UNLABELLED + BIAS + AUDITED, divergence, dtype, beta,
                           options=True, backward="certified")  # fmt: skip
            launches = forward + EXACT - TERMS
            yield case(f"{kind} divergence, beta {beta}", launches, divergence, dtype, beta)
            if everything or beta == 1.0:
                yield case(f"{kind} divergence, beta {beta}, everything", launches + BIAS, divergence, dtype,
                           beta, options=True)  # fmt: skip
        if everything or dtype == bf16:  # elsewhere only together, as "LoRA, everything"
            yield case(f"{kind} entropy", FORWARD + EXACT, logprobs, dtype, entropy=True)
            yield case(f"{kind} bias, softcap, temperatures", FORWARD + EXACT + BIAS, logprobs, dtype, bias=True,
                       options=True)  # fmt: skip
        for lora in loras:
            name = f"{kind}, LoRA {str(lora).removeprefix('torch.')}"
            yield case(name, FORWARD + EXACT + LORA, logprobs, dtype, lora=lora)
            yield case(f"{name}, frozen head", FORWARD + EXACT - 1 + LORA, logprobs, dtype, lora=lora, frozen=True)
            yield case(f"{name}, everything", FORWARD + EXACT + LORA + BIAS, logprobs, dtype, lora=lora, bias=True,
                       options=True, entropy=True)  # fmt: skip
            yield case(f"{name}, certified", FORWARD + UNHINTED + CERTIFIED + LORA + AUDITED, logprobs, dtype,
                       lora=lora, backward="certified")  # fmt: skip
            yield case(f"{name}, support", None, logprobs, dtype, lora=lora, support=True, options=True, bias=True)
        for frozen, hint in itertools.product((False, True), (False, True)):
            name = f"{kind} certified{', hint' if hint else ''}{', frozen head' if frozen else ''}"
            launches = FORWARD + UNHINTED * (not hint) + CERTIFIED - (1 + AUDIT) * frozen
            yield case(name, launches, logprobs, dtype, backward="certified", hint=hint,
                       frozen=frozen)  # fmt: skip
        yield case(f"{kind} certified, everything", FORWARD + CERTIFIED + BIAS + AUDITED, logprobs, dtype,
                   backward="certified",
                   hint=True, bias=True, options=True)  # fmt: skip
        yield case(f"{kind} support", 3, logprobs, dtype, support=True)  # logits, dX, dW
        yield case(f"{kind} top-k", TOPK + EXACT, logprobs, dtype, topk=5)
        yield case(f"{kind} top-k, frozen head", TOPK - 1 + EXACT - 1, logprobs, dtype, topk=5, frozen=True)
        yield case(f"{kind} top-k, everything", None, logprobs, dtype, topk=5, lora=dtype, bias=True, options=True,
                   entropy=True)  # fmt: skip
        yield case(f"{kind} top-k, certified", TOPK + CERTIFIED + 2, logprobs, dtype, topk=5, backward="certified")
        yield case(f"{kind} top-k of another batch", None, logprobs, dtype, topk=5, n=99, batch=3, compiles=0)
        yield case(f"{kind} shard", FORWARD, partial, dtype, certified=False)
        yield case(f"{kind} shard, certified", FORWARD + ORDER, partial, dtype, certified=True)
        yield case(f"{kind} audit by torch", FORWARD + UNHINTED + ORDER, audit_by_torch, dtype)
    # Nothing is compiled again when only the batch changes.
    for options in ({}, {"frozen": True}, {"backward": "certified", "hint": True}):
        launches = FORWARD + CERTIFIED if "backward" in options else None
        for shape in ({"n": 301}, {"n": 512}, {"n": 1}, {"n": 16}, {"n": 432, "batch": 3}, {"n": 300, "batch": 300},
                      {"n": 404, "batch": 4}, {"n": 404, "batch": 4, "view": True}):  # fmt: skip
            name = f"bfloat16 {options or ''} {shape}"
            yield case(name, launches, logprobs, bf16, compiles=0, **options, **shape)
        for workspace in (16, 2, 1):
            fresh = (2, 16) if "backward" in options else (2,)  # chunks of rows; no room to split chunks
            bound = FORWARD + (CERTIFIED if "backward" in options else EXACT) + ROW_CHUNKS
            yield case(f"bfloat16 {options or ''} {workspace} MiB", None, logprobs, bf16, n=1500, **options,
                       workspace_mb=workspace, compiles=None if workspace in fresh else 0, bound=bound)  # fmt: skip
    for shape in ({"n": 301}, {"n": 1}, {"n": 432, "batch": 3}, {"n": 404, "batch": 4, "view": True}):
        yield case(f"bfloat16 dX in forward {shape}", sum(FROZEN), dx_in_forward, bf16, compiles=0, **shape)
    for n, size, chunks in ((1500, 2, 16), (1400, 2, 16), (1500, 1, 32)):
        launches = chunks * FROZEN[0] + FROZEN[1]
        yield case(f"bfloat16 dX in forward, {n} rows, {size} MiB", launches, dx_in_forward, bf16, n=n,
                   workspace=size * 2**20, compiles=0, bound=sum(FROZEN) + ROW_CHUNKS)  # fmt: skip
    yield case("bfloat16 LoRA, bias, 2 MiB", None, logprobs, bf16, n=1500, lora=bf16, bias=True, workspace_mb=2,
               bound=FORWARD + EXACT + LORA + BIAS + ROW_CHUNKS)  # fmt: skip
    yield case("bfloat16 divergence, 2 MiB", None, divergence, bf16, 1.0, n=1500, workspace_mb=2,
               bound=PAIR + EXACT + ROW_CHUNKS)  # fmt: skip
    for options in (False, True):
        name = f"bfloat16 mixture{', everything' if options else ''}"
        yield case(f"{name}, not held", MIXTURE + EXACT - TERMS + options * BIAS, divergence, bf16, 0.3, workspace_mb=6,
                   options=options)  # fmt: skip
        yield case(f"{name}, frozen head", None if options else HELD + HELD_GRADIENT, divergence, bf16, 0.3,
                   options=options, frozen=True)  # fmt: skip
    yield case("bfloat16 mixture, another batch", HELD + EXACT - TERMS, divergence, bf16, 0.3, n=500, compiles=0)
    yield case("bfloat16 mixture, panels of rows", None, divergence, bf16, 0.3, n=1500, workspace_mb=12, frozen=True)
    yield case("bfloat16, row chunks again", None, logprobs, bf16, n=1400, workspace_mb=1, compiles=0)
    yield case("bfloat16 twice the width", FORWARD + EXACT, logprobs, bf16, d=2 * D, compiles=0)
    yield case("bfloat16 ragged V", FORWARD + EXACT, logprobs, bf16, v=V + 1)
    yield case("bfloat16 weight of the other layout", FORWARD + EXACT, logprobs, bf16, columns_first=True)
    for width in (250, 272, 24):
        yield case(f"bfloat16 D {width}", FORWARD + EXACT, logprobs, bf16, d=width)
        yield case(f"bfloat16 D {width} again", FORWARD + EXACT, logprobs, bf16, d=width, n=512, compiles=0)
    for step in ("kernels", "exact", "loss_step", "certified", "compile_tiles", "tiles_timed") * everything:
        yield case(f"first contact: {step}", None, first_contact, step)
    for config, gated in objectives(everything):
        name = " ".join(f"{k}={v}" for k, v in config.items()) + (" gated" if gated else "")
        yield case(name, FORWARD + OBJECTIVE + EXACT, loss, config, gated)
    for loss_type in CLIPPED[1:]:
        yield case(f"loss_type={loss_type}", FORWARD + OBJECTIVE + EXACT, loss, {"loss_type": loss_type}, compiles=0)
    yield case("loss of another batch", FORWARD + OBJECTIVE + EXACT, loss, {"loss_type": "dapo", "epsilon": 0.3},
               n=99, batch=3, compiles=0)  # fmt: skip

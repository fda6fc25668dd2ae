"""What a learner and the torch code around the kernels do on a device alone: memory, precisions, layouts of a batch."""

import copy
import functools
import gc
import itertools
from contextlib import contextmanager
from typing import NamedTuple

import torch

from bench.contact.device import absent, attempt, draw, relative

ENOUGH = 10**6  # tokens: a budget that never cuts
# relative errors of gradients; what the certified backward may leave out. A CPU's bf16 is at 0.06 on the GPU's case
FP32, ROUNDED, CERTIFIED = 1e-4, 0.15, 5e-3


def learner(contact, shard=0, shards=1):
    """Each check in a row of its own."""
    for function, options in CASES[shard::shards]:
        needs = () if function in PLAIN else ("transformers", "accelerate", "matplotlib")
        row = absent(*needs) or attempt(function, contact, **options)
        yield {"what": function.__name__, **options, **row}


class Learnt(NamedTuple):
    """One pass."""

    gradients: dict[str, torch.Tensor]
    peak: int  # bytes beyond weights
    reserved: int  # bytes that torch had taken of the device
    scores: torch.Tensor


@functools.cache
def data(contact):
    """-> a model and episodes, both on the CPU."""
    from bench.learner import Case, make_episodes, make_model

    small = Case(6, 12, 0.0, vocabulary=96, width=64, layers=2)
    case = Case(128, 512, 0.0, vocabulary=8192, width=256, layers=4) if contact.cuda else small
    fresh()
    model = make_model(case)
    return model, make_episodes(model, case)


def fresh():
    """accelerate may be given other settings than before, and memory is free."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(True)
    if torch.cuda.is_available():
        gc.collect()
        torch.cuda.empty_cache()


def make(contact, model, precision="no", kind=None, **options):
    """A learner of a copy of the model on the device."""
    from accelerate import Accelerator

    from fastgrpo import GRPOLossConfig
    from fastgrpo.integrations.transformers import fuse_lm_head
    from fastgrpo.trainer.learner import Learner

    fresh()
    accelerator = Accelerator(cpu=not contact.cuda, mixed_precision=precision)
    mine = accelerator.prepare(fuse_lm_head(copy.deepcopy(model)).train())
    return (kind or Learner)(mine, accelerator, GRPOLossConfig(), **{"budget": ENOUGH, "longest": 1024, **options})


def run(learner, episodes):
    before = torch.cuda.memory_allocated() if learner.on_gpu else 0
    learner.gradients(episodes)
    peak = torch.cuda.max_memory_allocated() - before if learner.on_gpu else 0
    reserved = torch.cuda.max_memory_reserved() if learner.on_gpu else 0
    grads = {name: p.grad.cpu() for name, p in learner.model.named_parameters()}
    return Learnt(grads, peak, reserved, torch.cat(learner.score(episodes)))


def learn(contact, model, episodes, **options):
    """A pass of a learner that is gone afterwards."""
    return run(make(contact, model, **options), episodes)


def apart(got, want):
    """Relative errors of all gradients together, of log-probs."""
    from bench.learner import difference

    return {
        "gradients": difference(got.gradients, want.gradients),
        "logprobs": relative(got.scores, want.scores.double()),
    }


def within(errors, limit):
    return all(error < limit for error in errors.values())


def mib(size):
    return round(size / 2**20, 1)


def offloading(contact):
    """Activations in host memory: the same gradients, and a lower peak."""
    model, episodes = data(contact)
    learn(contact, model, episodes[:2])  # what a first pass leaves allocated
    want = learn(contact, model, episodes)
    got = learn(contact, model, episodes, offload=True)
    errors = apart(got, want)
    row = {"errors": errors, "peak_mib": mib(want.peak), "offloaded_mib": mib(got.peak)}
    return {**row, "ok": within(errors, 1e-5) and (not contact.cuda or got.peak < 0.8 * want.peak)}


@contextmanager
def little_memory(contact, size):
    """Torch gets so many bytes of the device."""
    if not contact.cuda:
        yield
        return
    torch.cuda.set_per_process_memory_fraction(size / torch.cuda.get_device_properties(0).total_memory)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def full_from(size):
    """A learner of a rehearsal: memory runs out where a micro-batch has more than so many answers."""
    from fastgrpo.trainer.learner import Learner

    class Full(Learner):
        def backward(self, model, batch, *rest):
            if len(batch) > size:
                raise torch.OutOfMemoryError("CUDA out of memory.")
            return super().backward(model, batch, *rest)

    return Full


def out_of_memory(contact):
    """A budget that is too large: the step starts over with less, and has the gradients of a small one."""
    model, episodes = data(contact)
    whole = learn(contact, model, episodes)
    want = learn(contact, model, episodes, budget=1)  # an answer at a time
    size = (whole.reserved + want.reserved) // 2
    mine = make(contact, model, budget="auto", kind=None if contact.cuda else full_from(len(episodes) // 2))
    mine.budget = ENOUGH
    with little_memory(contact, size):
        got = run(mine, episodes)
        budget = mine.budget
        mine.grow()
    errors = apart(got, want)
    row = {"errors": errors, "whole_mib": mib(whole.reserved), "smallest_mib": mib(want.reserved)}
    row |= {"given_mib": mib(size), "budget": budget, "grown": mine.budget}  # it must not grow into what did not fit
    return {**row, "ok": within(errors, FP32) and budget < ENOUGH and mine.budget == budget}


def growth(contact):
    """A budget that cuts a step doubles while memory allows."""
    if not contact.cuda:
        return {"skipped": "needs a CUDA device"}
    model, episodes = data(contact)
    mine = make(contact, model, budget="auto")
    mine.budget = before = 2 * max(e.length for e in episodes)
    run(mine, episodes)
    mine.grow()
    return {"budget": before, "grown": mine.budget, "ok": mine.budget == 2 * before}


def shared_prompts(contact, precision):
    """Answers behind one copy of their prompt: fp32's gradients of whole rows, bf16's as near to those as its own."""
    model, episodes = data(contact)
    want = learn(contact, model, episodes)
    whole = learn(contact, model, episodes, precision=precision)
    got = learn(contact, model, episodes, precision=precision, share_prompts=True)
    errors, rounding = apart(got, want), apart(whole, want)
    row = {"errors": errors, "whole_rows": rounding, "peak_mib": mib(whole.peak), "shared_mib": mib(got.peak)}
    return {**row, "ok": as_near(errors, rounding, FP32 if precision == "no" else 1e-3)}


def as_near(errors, others, slack):
    """Errors are at most twice the others', and a slack."""
    return all(errors[name] <= 2 * others[name] + slack for name in others)


def packed(contact):
    """Rows without padding, by position ids."""
    model, episodes = data(contact)
    errors = apart(learn(contact, model, episodes, packed=True), learn(contact, model, episodes))
    return {"errors": errors, "ok": within(errors, FP32)}


def precisions(contact, **options):
    """An autocast against fp32, within 16 bits' rounding, and the certified backward beside the exact one."""
    model, episodes = data(contact)
    want = learn(contact, model, episodes, backward="exact")
    exact, certified = (
        apart(learn(contact, model, episodes, backward=backward, **options), want)
        for backward in ("exact", "certified")
    )
    ok = within(exact, ROUNDED if options else FP32) and as_near(certified, exact, CERTIFIED)
    return {"exact": exact, "certified": certified, "ok": ok and (not options or exact["gradients"] > 0)}


def narrow_products(contact):
    """``lora.mm16`` of every layout that may reach it, against float64."""
    from fastgrpo import lora

    product = lora.mm16 if contact.cuda else lambda a, b: a.float() @ b.float()
    found = {}
    for dtype in (torch.bfloat16, torch.float16):
        for name, (a, b) in operands(draw(dtype, torch.Generator(contact.device).manual_seed(0))).items():
            found[f"{dtype} {name}"] = attempt(product_error, product, a, b)
    wrong = {name: error for name, error in found.items() if not isinstance(error, float) or error > 1e-5}
    row = {"products": len(found), "wrong": wrong, "ok": not wrong}
    return row if contact.cuda else {"stand_in": True, **row}


def operands(random):
    """-> {layout: (a, b)}, 16 bits"""
    columns = torch.arange(48) % 8  # as logits read LoRA's B in parts
    return {
        "plain": (random(40, 64), random(64, 24)),
        "rank 1": (random(40, 64), random(64, 1)),
        "of rank 1": (random(40, 1), random(1, 24)),
        "transposed": (random(40, 64), random(24, 64).t()),
        "both transposed": (random(64, 40).t(), random(24, 64).t()),
        "sliced rows": (random(80, 64)[7:47], random(64, 24)),
        "sliced columns": (random(40, 100)[:, 3:67], random(24, 100)[:, 3:67].t()),
        "every second column": (random(40, 128)[:, ::2], random(64, 24)),
        "gathered columns": (random(40, 48), random(24, 8)[:, columns].t()),
        "an odd width": (random(40, 37), random(37, 5)),
        "no rows": (random(0, 64), random(64, 24)),
    }


def product_error(product, a, b):
    got = product(a, b)
    if got.dtype != torch.float32 or got.shape != (len(a), b.shape[1]):
        raise ValueError(f"expected float32 {(len(a), b.shape[1])}, got {got.dtype} {tuple(got.shape)}")
    return relative(got, a.double() @ b.double())


def segment_sums(contact, offsets):
    """Sums of packed runs, some or all of them empty."""
    from fastgrpo.inputs import Segments

    x = torch.randn(offsets[-1], device=contact.device)
    got = Segments.packed(torch.tensor(offsets, device=contact.device), len(x)).sum(x)
    want = x.new_tensor([x[a:b].sum() for a, b in itertools.pairwise(offsets)])
    error = float((got - want).abs().sum())
    return {"error": error, "ok": got.shape == want.shape and error < 1e-5}


def packed_losses(contact, offsets, support=False):
    """A packed batch with empty sequences against float64; ``support``: of some entries of each position, of none where
    one does not count."""
    from fastgrpo import GRPOLossConfig, grpo_loss, reference

    hidden, weight, targets = contact.head(offsets[-1], 32, torch.float32, 96)
    targets[5:6] = -100
    arguments = {
        "advantages": torch.linspace(-1.0, 1.0, len(offsets) - 1, device=contact.device),
        "cu_seqlens": torch.tensor(offsets, dtype=torch.int32, device=contact.device),
        "config": GRPOLossConfig(loss_type="grpo"),
        "support": some_entries(targets, 96) if support else None,
    }

    def losses(function, dtype):
        h, w = (x.to(dtype, copy=True).requires_grad_() for x in (hidden[None], weight))
        cast = arguments | {"advantages": arguments["advantages"].to(dtype)}
        loss = function(h, w, targets[None], **cast).loss
        return torch.cat([x.flatten() for x in (loss.detach(), *torch.autograd.grad(loss, (h, w)))])

    got, want = losses(grpo_loss, torch.float32), losses(reference.grpo_loss, torch.float64)
    error = relative(got, want)
    return {"error": error, "size": float(want.norm()), "ok": error < FP32}


def some_entries(targets, vocabulary):
    """Eight entries of each position, its label among them; none where it does not count."""
    ids = (targets[:, None] + 11 * torch.arange(8, device=targets.device)) % vocabulary
    counts = torch.where(targets >= 0, 8, 0)
    return ids[targets >= 0].flatten(), torch.nn.functional.pad(counts.cumsum(0), (1, 0))


SOME_EMPTY = [0, 0, 9, 9, 24, 24]
PLAIN = (narrow_products, segment_sums, packed_losses)  # need torch alone
CASES = [
    (out_of_memory, {}),
    (shared_prompts, {"precision": "no"}),
    (shared_prompts, {"precision": "bf16"}),
    (precisions, {}),
    (precisions, {"precision": "bf16"}),
    (precisions, {"half": True}),
    (offloading, {}),
    (growth, {}),
    (packed, {}),
    (narrow_products, {}),
    *((segment_sums, {"offsets": offsets}) for offsets in (SOME_EMPTY, [0, 5], [0, 0], [0])),
    (packed_losses, {"offsets": SOME_EMPTY}),
    (packed_losses, {"offsets": SOME_EMPTY, "support": True}),
    (packed_losses, {"offsets": [0, 0]}),
]

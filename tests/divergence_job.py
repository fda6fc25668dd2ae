"""What each gloo process of test_divergence.py does: ``main(output)``, started by processes.run_ranks."""

from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist

from fastgrpo.vocab_parallel_divergence import vocab_parallel_divergence

import interpreter
import problems

VOCABULARY = 70
SHARDS = (50, 20)
CASES = {
    f"{backend}, beta {beta}{', all options' if options else ''}": {"backend": backend, "beta": beta, **options}
    for backend in ("torch", "triton")
    for beta in (0.0, 1.0, 0.3)
    for options in ({}, {"softcap": 6.0, "teacher_softcap": 9.0, "temperature": 0.8, "return_entropy": True})
}
FROZEN = {
    f"frozen, beta {beta}": {"frozen": True, "backend": "torch", "beta": beta, "softcap": 6.0}
    for beta in (0.0, 1.0, 0.3)
}  # made in the forward
PEAKED = {"torch": (512, 3000), "triton": (64, 640)}  # tokens, entries; the interpreter takes 20 ms a tile
CERTIFIED = {
    f"certified, {backend}, beta {beta}": {"backend": backend, "beta": beta, "backward": "certified", "tolerance": 0.1,
                                           "row_tolerance": 1.0}
    for backend in PEAKED
    for beta in (0.0, 1.0, 0.3)
}  # fmt: skip
CERTIFIED |= {f"frozen, {k}": {**v, "frozen": True} for k, v in CERTIFIED.items()}
ENTRIES = ("weight", "teacher_weight", "bias", "teacher_bias")


def tensors(dtype):
    hidden, weight, _, bias = problems.head(9, VOCABULARY, 12, dtype, bias=True)
    others, teacher, _, teacher_bias = problems.head(9, VOCABULARY, 8, dtype, seed=1, bias=True)
    return {
        "hidden": hidden, "weight": weight, "teacher_hidden": others, "teacher_weight": teacher, "bias": bias,
        "teacher_bias": teacher_bias, "mask": torch.arange(9) != 4,
    }  # fmt: skip


def peaked_tensors(case, depth=16):
    """A student as far from flat as makes leaving entries out pay, and a teacher near it, some entries likely in all
    rows."""
    (n, vocab), g = PEAKED[case["backend"]], torch.Generator().manual_seed(0)
    dtype = torch.float64 if case["backend"] == "torch" else torch.float32

    def normal(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)

    hidden, weight = normal(n, depth), normal(vocab, depth)
    hidden[:, 0], weight[:, 0] = 4.0, 3 * normal(vocab)
    return {
        "hidden": hidden, "weight": weight, "teacher_hidden": hidden + 0.2 * normal(n, depth),
        "teacher_weight": weight.clone(), "bias": None, "teacher_bias": None, "mask": torch.arange(n) % 5 != 4,
    }  # fmt: skip


def outcome(op, case, shard=slice(None), given=None, **others):
    if given is None:
        given = tensors(torch.float64 if case["backend"] == "torch" else torch.float32)
    given = {k: v[shard] if k in ENTRIES and v is not None else v for k, v in given.items()}
    case = dict(case)
    given = problems.with_grad(given, ("hidden",) if case.pop("frozen", False) else ("hidden", "weight", "bias"))
    out = op(**given, **case, **others)
    (out.divergence * torch.arange(1.0, 1.0 + len(given["mask"]), dtype=out.divergence.dtype)).sum().backward()
    return {
        "divergence": out.divergence.detach(), "entropy": out.entropy,
        **{k: given[k].grad for k in ("hidden", "weight", "bias") if given[k] is not None},
    }  # fmt: skip


def main(output):
    interpreter.patch()
    dist.init_process_group("gloo", init_method="env://")
    rank = dist.get_rank()
    shard = slice(sum(SHARDS[:rank]), sum(SHARDS[: rank + 1]))
    results = {
        name: outcome(vocab_parallel_divergence, case, shard, group=dist.group.WORLD) for name, case in CASES.items()
    }
    with mock.patch("fastgrpo.backends.dense_backward.add_exact_rows", side_effect=AssertionError):
        for name, case in FROZEN.items():
            results[name] = outcome(vocab_parallel_divergence, case, shard, group=dist.group.WORLD)
    for name, case in CERTIFIED.items():
        given = peaked_tensors(case)
        cut = len(given["weight"]) * 2 // 3
        own = slice(0, cut) if rank == 0 else slice(cut, None)
        results[name] = outcome(vocab_parallel_divergence, case, own, given, group=dist.group.WORLD)
    torch.save(results, Path(output) / f"rank{rank}.pt")
    dist.destroy_process_group()

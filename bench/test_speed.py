"""What a change costs: ``pytest bench --benchmark-compare`` against the runs saved with ``--benchmark-save``."""

import functools

import pytest
import torch

from bench import measure
from bench.cases import Case, problem, tensors, truth
from bench.entries import ENTRIES

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CASES = (
    Case(512, 8192, 256, dtype="fp32" if DEVICE == "cpu" else "bf16"),
    Case(512, 8192, 256, profile="flat", dtype="fp32" if DEVICE == "cpu" else "bf16"),
    Case(512, 8192, 256, head="frozen", dtype="fp32" if DEVICE == "cpu" else "bf16"),
)
NAMES = ("fastgrpo certified", "fastgrpo exact", "full logits")


@functools.cache
def prepare(case):
    p = problem(case, tensors(case, DEVICE))
    return p, truth(p)


@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c.profile}-{c.head}")
@pytest.mark.parametrize("name", NAMES)
def test_forward_and_backward(benchmark, name, case):
    p, want = prepare(case)
    benchmark.group = case.title
    assert measure.errors(ENTRIES[name], p, want)["correct"]
    clock = measure.Clock(DEVICE)
    benchmark.pedantic(lambda: clock(lambda: measure.step(ENTRIES[name], p)), rounds=10, warmup_rounds=2)


@pytest.mark.parametrize("name", NAMES)
def test_logprobs_alone(benchmark, name):
    p, _ = prepare(CASES[0])
    benchmark.group = "log-probs alone"
    clock = measure.Clock(DEVICE)
    with torch.no_grad():
        benchmark.pedantic(lambda: clock(lambda: ENTRIES[name].logprobs(p, False)), rounds=10, warmup_rounds=2)


def test_bare_gemm(benchmark):
    """The floor."""
    p, _ = prepare(CASES[0])
    benchmark.group = CASES[0].title
    gemm, clock = measure.bare_gemm(p), measure.Clock(DEVICE)
    benchmark.pedantic(lambda: clock(gemm), rounds=10, warmup_rounds=2)

"""The kernels are clean of what a device would not forgive; and each of these faults is found where it is planted."""

import pytest
import torch

pytest.importorskip("triton")

import sanitizer
import triton
import triton.language as tl
from sanitizer import sanitizing

from fastgrpo import GRPOLossConfig, grpo_loss, linear_divergence, linear_logprobs
from fastgrpo.backends import grouping
from fastgrpo.kernels import report, tiles

import problems

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="looks at interpreted kernels")
BLOCK, VOCABULARY = 16, 600
HELD_PANELS = 1.5 * 128 * 8 * 768 / 2**20  # MiB of which 128 rows of a mixture's logits are held


@triton.jit
def beyond_kernel(x, BLOCK: tl.constexpr):
    tl.load(x + 1 + tl.arange(0, BLOCK))


@triton.jit
def neighbour_kernel(x, BLOCK: tl.constexpr):
    at = tl.program_id(0) + tl.arange(0, BLOCK // 2)
    tl.store(x + at, tl.load(x + at) + 1)


@triton.jit
def shared_kernel(x, BLOCK: tl.constexpr):
    tl.store(x + tl.arange(0, BLOCK), 1.0)


@triton.jit
def read_later_kernel(x, BLOCK: tl.constexpr):
    pid = tl.program_id(0)
    tl.load(x + tl.arange(0, BLOCK), mask=pid > 0)
    tl.store(x + tl.arange(0, BLOCK), 1.0, mask=pid == 0)


@triton.jit
def no_barrier_kernel(x, BARRIER: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(x + at, 1.0)
    if BARRIER:
        tl.debug_barrier()
    tl.load(x + (BLOCK - 1 - at))


@triton.jit
def twice_kernel(x, BLOCK: tl.constexpr):
    tl.store(x + tl.arange(0, BLOCK) // 2, 1.0)


@pytest.mark.parametrize(
    ("kernel", "programs", "fault"),
    [
        (beyond_kernel, 1, "outside of every tensor"),
        (neighbour_kernel, 2, "reads what another program has written"),
        (neighbour_kernel, 2, "writes what another program has read"),
        (shared_kernel, 2, "writes what another program has written"),
        (read_later_kernel, 2, "reads what another program has written"),
        (twice_kernel, 1, "writes an address several times at once"),
    ],
)
def test_a_planted_fault_is_found(kernel, programs, fault, monkeypatch):
    monkeypatch.setattr(sanitizer, "KERNELS", sanitizer.Path(__file__).parent)
    with sanitizing() as seen:
        kernel[(programs,)](torch.zeros(BLOCK), BLOCK=BLOCK)
    assert seen.names == {kernel.fn.__name__}
    assert fault in {what for what, _ in seen.found}
    assert all(kernel.fn.__name__ in line for _, line in seen.found)


@pytest.mark.parametrize("barrier", [False, True])
def test_a_missing_barrier_is_found(barrier):
    with sanitizing() as seen:
        no_barrier_kernel[(1,)](torch.zeros(BLOCK), BARRIER=barrier, BLOCK=BLOCK)
    assert {what for what, _ in seen.found} == (
        set() if barrier else {"reads what its program has written, no barrier between"}
    )


CERTIFIED = {"backward": "certified", "tolerance": 0.05}
EXACT = {"backward": "exact"}
EVERY = {"bias": True, "softcap": 20.0, "temperature": 0.8, "logit_scale": 0.9}
CASES = {
    "exact, all options": lambda: logprobs(**EXACT, **EVERY, workspace_mb=0.3),
    "top-k": lambda: logprobs(**EXACT, taken=3),
    "certified, rows of dW, all options": lambda: logprobs(**CERTIFIED, **EVERY, row_tolerance=0.3, hint=True),
    "certified, bf16, descriptors": lambda: logprobs(**CERTIFIED, row_tolerance=0.3, dtype=torch.bfloat16),
    "exact, bf16, descriptors": lambda: logprobs(**EXACT, dtype=torch.bfloat16),
    "frozen": lambda: logprobs(**EXACT, trained=("hidden",)),
    "frozen, certified, small workspace": lambda: logprobs(**CERTIFIED, trained=("hidden",), workspace_mb=0.3),
    "a few kept": lambda: logprobs(**CERTIFIED, n=20, trained=("hidden",), peak=30.0),
    "loss": lambda: loss(),
    "reverse KL": lambda: divergence(**EXACT, beta=1.0),
    "reverse KL, certified": lambda: divergence(**CERTIFIED, beta=1.0),
    "forward KL, certified": lambda: divergence(**CERTIFIED, beta=0.0, trained=("hidden",)),
    "JSD, certified, bf16": lambda: divergence(**CERTIFIED, beta=0.3, dtype=torch.bfloat16),
    "JSD": lambda: divergence(**EXACT, beta=0.3, workspace_mb=0.3),
    "JSD, held": lambda: divergence(**EXACT, beta=0.3, n=200, workspace_mb=HELD_PANELS),
    "JSD, held, frozen, bf16": lambda: divergence(
        **EXACT, beta=0.3, n=200, workspace_mb=HELD_PANELS, dtype=torch.bfloat16, trained=("hidden",)
    ),
}


def logprobs(
    n=150, peak=12.0, dtype=torch.float32, trained=("hidden", "weight", "bias"), taken=1, bias=False, hint=False,
    **options,
):  # fmt: skip
    hidden, weight, targets, bias = problems.head(n, VOCABULARY, 24, dtype, peak=peak, bias=bias)
    hidden *= torch.linspace(0.8, 2.5, n, dtype=dtype)[:, None]  # tails of very different mass: dW needs some
    targets[3] = -100
    leaf = problems.with_grad({"hidden": hidden, "weight": weight, "bias": bias}, trained)
    old = linear_logprobs(hidden, weight, targets, bias, backend="torch", **EXACT).logprobs if hint else None
    if taken > 1:
        targets = torch.stack([targets, *((targets + k) % VOCABULARY for k in range(1, taken))], 1)
    out = linear_logprobs(
        leaf["hidden"], leaf["weight"], targets, leaf["bias"], old_logprobs=old, backend="triton", **options
    )
    out.logprobs.sum().backward()


def divergence(beta, trained=("hidden", "weight"), dtype=torch.float32, n=100, **options):
    student, teacher = (problems.head(n, VOCABULARY, depth, dtype, seed=depth, peak=8.0)[:2] for depth in (24, 16))
    leaf = problems.with_grad(dict(zip(("hidden", "weight"), student)), trained)
    out = linear_divergence(leaf["hidden"], leaf["weight"], *teacher, beta=beta, backend="triton", **options)
    out.divergence.sum().backward()


def loss():
    batch = problems.with_grad(problems.batch(dtype=torch.float32))
    grpo_loss(**batch, config=GRPOLossConfig(beta=0.1), backend="triton").loss.backward()


@pytest.fixture(scope="module")
def found():
    """{case: (what was found, names of the kernels)}"""
    everything = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            grouping, "OVERHEAD_ROWS", dict.fromkeys(("cpu", "oneDNN", "cuda"), (48, 48))
        )  # so few rows are certified too
        for case, run in CASES.items():
            patch.setattr(tiles, "has_descriptors", lambda device, kernel, case=case: "descriptors" in case)
            with sanitizing() as seen:
                run()
            everything[case] = seen
    return everything


@pytest.mark.parametrize("case", CASES)
def test_kernels_are_clean(found, case):
    assert not found[case].found


def test_every_kernel_was_looked_at(found):
    assert {name for _, name, _ in report.all_kernels()} == set().union(*(seen.names for seen in found.values()))

"""Launches of a chunk loop: bound once, then with the arguments that binding them anew would have given."""

from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch

pytest.importorskip("triton")

from triton.compiler import CompiledKernel
from triton.tools.tensor_descriptor import TensorDescriptor

from bench import counts
from fastgrpo.backends.problem import HeadProblem
from fastgrpo.kernels import backward, certified, forward, frozen, launches, report

pytestmark = pytest.mark.quick

# in a certified backward, an exact one (several chunks of rows where the head is frozen), a forward that makes dX
BOUND = {"trained": (26, 7, 7), "frozen": (15, 8, 7)}


class Compiled(CompiledKernel):
    """What a launch returns, launched again by position."""

    def __init__(self, kernel, options):
        self.kernel, self.options = kernel, options

    def __getitem__(self, grid):
        assert len(grid) == 3
        return lambda *values: self.kernel.note(grid, {**dict(zip(self.kernel.arg_names, values)), **self.options})


class Kernel:
    """A compiled kernel's part in a launch; ``launches`` as :class:`report.Recorder` keeps them, ``bound`` by name."""

    bound: ClassVar = []

    def __init__(self, kernel, launches):
        self.kernel, self.launches, self.grids, self.pre_run_hooks = kernel, launches, [], []
        self.arg_names = kernel.arg_names
        # the interpreter's functions keep it with their other options
        self.do_not_specialize = getattr(kernel, "kwargs", vars(kernel)).get("do_not_specialize", ())

    def note(self, grid, arguments):
        self.grids.append(grid[0])
        self.launches.append((self.kernel, arguments))

    def __getitem__(self, grid):
        def bind(**arguments):
            self.note(grid, arguments)
            self.bound.append(self.kernel.fn.__name__)
            return Compiled(self, {k: v for k, v in arguments.items() if k not in self.arg_names})

        return bind


@pytest.fixture
def compiled(monkeypatch):
    """Within :func:`report.recording` kernels return compiled ones; -> names of those bound."""
    monkeypatch.setattr(report, "Recorder", Kernel)
    monkeypatch.setattr(Kernel, "bound", [])
    return Kernel.bound


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Filling every buffer with NaN would be work on the meta device."""


@pytest.mark.parametrize(
    ("marked", "hooks", "returns", "binds"),
    [
        (["n"], [], CompiledKernel, 1),
        ([], [], CompiledKernel, 3),
        (["n"], [print], CompiledKernel, 3),
        (["n"], [], int, 3),
    ],
    ids=["bound once", "not marked", "hooks of the kernel", "not compiled"],
)
def test_bound_once_where_that_is_safe(compiled, monkeypatch, marked, hooks, returns, binds):
    monkeypatch.setattr(launches, "CompiledKernel", returns)
    function = SimpleNamespace(arg_names=["n", "a"], do_not_specialize=marked, fn=SimpleNamespace(__name__="f"))
    kernel = Kernel(function, [])
    kernel.pre_run_hooks = hooks
    launch = launches.Launch(kernel, a=1, num_warps=4)
    for k in range(3):
        launch(k, n=k)
    assert kernel.launches == [(function, {"n": k, "a": 1, "num_warps": 4}) for k in range(3)]
    assert kernel.grids == [0, 1, 2]
    assert len(compiled) == binds


def plainly(x):
    """Arguments that can be compared between two runs on the meta device."""
    if isinstance(x, torch.Tensor):
        return x.dtype, tuple(x.shape), x.stride()
    if isinstance(x, TensorDescriptor):
        return plainly(x.base), x.block_shape
    if isinstance(x, (tuple, list)):
        return [plainly(y) for y in x]
    return str(x)


def passes(head):
    """-> a certified backward, an exact one and a frozen head's forward, at real size."""

    def empty(*shape, dtype=torch.bfloat16):
        return torch.empty(shape, dtype=dtype, device="meta")

    n, vocab, depth = 16384, 151936, 1536
    hidden, weight, row = empty(1, n, depth), empty(vocab, depth), empty(n, dtype=torch.float32)
    params = [counts.params_of(torch.bfloat16, 128, tolerance) for tolerance in (0.005, None)]
    problem, exact = (HeadProblem(hidden, weight, None, empty(n, dtype=torch.int64), None, p) for p in params)
    stats, certificate = forward.certified_forward(problem, row)
    yield lambda: certified.certified_backward(problem, stats, certificate, row, counts.NEEDS[head])
    yield lambda: backward.backward(exact, stats, row, None, counts.NEEDS[head])
    yield lambda: frozen.frozen_forward(exact)


def run_all(head):
    """-> [(kernel, arguments)] of each pass."""
    with report.recording("sm_90") as seen, counts.native():
        for run in passes(head):
            seen.clear()
            Kernel.bound.clear()
            run()
            yield [(k.fn.__name__, {name: plainly(x) for name, x in arguments.items()}) for k, arguments in seen]


@pytest.mark.parametrize("head", counts.NEEDS)
def test_a_pass_is_bound_once(compiled, monkeypatch, head):
    """Of hundreds of launches a handful is bound, and all have the arguments of plain launches."""
    found = []
    for seen, most in zip(run_all(head), BOUND[head]):
        assert len(seen) > 150
        assert len(compiled) <= most
        found.append(seen)
    monkeypatch.setattr(launches, "CompiledKernel", int)
    assert list(run_all(head)) == found
    assert len(compiled) == len(found[-1])

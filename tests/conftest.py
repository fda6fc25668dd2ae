"""Without a GPU the Triton kernels run in the interpreter; new memory is NaN, so that nothing unwritten is read."""

import os
import sys

import torch

# Read when a kernel is decorated, so it must be set before fastgrpo.kernels is imported; tests/emulator compiles them.
if not torch.cuda.is_available() and "FASTGRPO_EMULATE" not in os.environ:
    os.environ["TRITON_INTERPRET"] = "1"

import importlib.util

import pytest

from fastgrpo.backends import products

pytest_plugins = ["works"]
HAS_TRITON = importlib.util.find_spec("triton") is not None
if HAS_TRITON and os.environ.get("TRITON_INTERPRET") == "1":
    import interpreter

    interpreter.patch()
if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
with torch.device(DEVICE):  # torch notes once which functions take a default device: before they are replaced below
    torch.empty(0)
# The dearest files, dearest first: workers take whole files in this order, and so end at about the same time.
DEAREST = [
    f"test_{name}.py"
    for name in (
        "graph",
        "trl",
        "certified",
        "examples",
        "divergence",
        "distributed",
        "tune",
        "fuse_lm_head",
        "verl",
        "memory_bound",
        "bench",
    )
]


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: DEAREST.index(item.path.name) if item.path.name in DEAREST else len(DEAREST))
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
        if "triton" in getattr(getattr(item, "callspec", None), "params", {}).values() and not HAS_TRITON:
            item.add_marker(pytest.mark.skip(reason="triton is not installed"))


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch):
    """torch.empty and new_empty return NaN (or a large integer), as freed memory might."""
    plain_empty, plain_new_empty, plain_empty_like = torch.empty, torch.Tensor.new_empty, torch.empty_like

    def poison(x):
        if x.is_floating_point():
            return x.fill_(torch.nan)
        return x if x.dtype == torch.bool or x.is_complex() else x.fill_(torch.iinfo(x.dtype).max // 2)

    monkeypatch.setattr(torch, "empty", lambda *a, **k: poison(plain_empty(*a, **k)))
    monkeypatch.setattr(torch, "empty_like", lambda *a, **k: poison(plain_empty_like(*a, **k)))
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *a, **k: poison(plain_new_empty(*a, **k)))


@pytest.fixture(autouse=True)
def fresh_accelerator():
    """accelerate keeps its settings for the whole process, and refuses others."""
    yield
    if state := sys.modules.get("accelerate.state"):
        state.AcceleratorState._reset_state()


@pytest.fixture(params=["torch", "triton"])
def backend(request):
    return request.param


@pytest.fixture
def device(request):
    """Triton kernels run on the GPU where there is one, in the interpreter on the CPU otherwise."""
    return DEVICE


@pytest.fixture
def torch_mm(monkeypatch):
    """torch.mm on every CPU: what products cost decides how much is left out."""
    monkeypatch.setattr(products, "FASTER_ONEDNN", False)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)

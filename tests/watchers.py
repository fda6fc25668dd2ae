"""Modes that watch what an op does: whether the host would wait, how large its tensors are."""

import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

WAITING = {
    "_local_scalar_dense", "nonzero", "masked_select", "item", "is_nonzero", "equal", "unique", "_unique2",
    "repeat_interleave",
}  # fmt: skip


class NoSync(TorchDispatchMode):
    """Fails on operations whose result, or its shape, the host needs."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        by_mask = name in ("index", "index_put", "index_put_") and any(
            x is not None and x.dtype in (torch.bool, torch.uint8) for x in args[1]
        )
        assert name not in WAITING, name
        assert not by_mask, f"{name} with a boolean mask"
        return func(*args, **(kwargs or {}))


def forbid_lists(monkeypatch):
    """tolist and numpy read a device's memory without an operation that a dispatch mode could see."""
    for name in ("tolist", "numpy"):
        monkeypatch.setattr(torch.Tensor, name, lambda *_, name=name: pytest.fail(f"Tensor.{name} was called"))


class Largest(TorchDispatchMode):
    """The largest tensor any operation makes."""

    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else (out,):
            if isinstance(x, torch.Tensor):
                self.numel = max(self.numel, x.numel())
        return out


class Live(TorchDispatchMode):
    """Bytes of the tensors made inside it that are alive, and the most there ever were."""

    def __init__(self):
        super().__init__()
        self.live, self.peak, self.known, self.before = 0, 0, set(), set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        for x in tree_flatten((args, kwargs))[0]:
            if isinstance(x, torch.Tensor):
                self.before.add(self.storage(x)._cdata)
        out = func(*args, **(kwargs or {}))
        for x in tree_flatten(out)[0]:
            if isinstance(x, torch.Tensor):
                self.count(self.storage(x))
        return out

    def storage(self, x):
        return (x if type(x) in (torch.Tensor, torch.nn.Parameter) else x.inner).untyped_storage()

    def count(self, storage):
        key, size = storage._cdata, storage.nbytes()
        if key in self.known or key in self.before or not size:
            return
        self.known.add(key)
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self.free, key, size)

    def free(self, key, size):
        self.live -= size
        self.known.discard(key)
        self.before.discard(key)


class Gemms(TorchDispatchMode):
    """Multiplications of all matrix products, and how many denormal numbers these read."""

    def __init__(self):
        super().__init__()
        self.products, self.denormals = 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name in ("mm", "addmm", "addmm_", "_linear_pointwise"):
            a, b = (args[0], args[1].t()) if name == "_linear_pointwise" else args[-2:]
            self.products += a.shape[0] * a.shape[1] * b.shape[1]
            for x in (a, b):
                size = x.abs()
                self.denormals += int(((size > 0) & (size < torch.finfo(x.dtype).smallest_normal)).sum())
        return func(*args, **(kwargs or {}))


class Watched:
    """Stands in the place of a kernel: runs it, and shows ``look`` the name and arguments of each launch before."""

    def __init__(self, kernel, look):
        self.kernel, self.look = kernel, look

    def __getitem__(self, grid):
        def launch(**arguments):
            self.look(self.kernel.fn.__name__, arguments)
            self.kernel[grid](**arguments)

        return launch

"""What compute-sanitizer would see, seen in the interpreter: memcheck and racecheck of Triton kernels. For tests only.

The interpreter runs one program of a launch after the other and an instruction for all threads at once, so it forgives
what a device does not: addresses outside the tensors, a program that reads what another one of its launch writes, a
thread that reads what another thread of its program has written since the last barrier.
"""

import contextlib
import sys
from pathlib import Path

import numpy as np
import torch
from triton.runtime.interpreter import GridExecutor, InterpreterBuilder
from triton.tools.tensor_descriptor import TensorDescriptor

KERNELS = Path(__file__).parent.parent / "kernels"
NOBODY, SEVERAL = -1, -2  # who has read or written


class Memory:
    """Bytes of tensors that lie together, and which programs have touched them.

    Attributes:
        writer, reader: (bytes,) int64, of each byte the program, or NOBODY, SEVERAL. epoch: the barrier before the last
            store.
    """

    def __init__(self, first, last):
        self.first, self.last = first, last
        self.writer, self.reader, self.epoch = (np.full(last - first, NOBODY, np.int64) for _ in range(3))


def tensors_in(x):
    """Every tensor of a kernel's arguments, named tuples and descriptors opened."""
    if isinstance(x, torch.Tensor):
        yield x
    elif isinstance(x, TensorDescriptor):
        yield x.base
    elif isinstance(x, (tuple, list, dict)):
        for y in x.values() if isinstance(x, dict) else x:
            yield from tensors_in(y)


def address_of(tensor):
    """From where to where its elements lie."""
    size = tensor.element_size()
    reach = sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride())) + 1
    return tensor.data_ptr(), tensor.data_ptr() + reach * size


class Sanitizer:
    """Looks at the loads and stores of every launch while it is in force.

    Attributes:
        found: {(what, kernel's line)}. names: of the kernels that were looked at.
    """

    def __init__(self):
        self.found, self.names, self.memories, self.barriers = set(), set(), [], 0

    def begin(self, name, arguments):
        self.names.add(name)
        self.memories, self.barriers = [], 0
        spans = sorted({address_of(x) for x in tensors_in(arguments) if x.numel()})
        for first, last in spans:
            if self.memories and first <= self.memories[-1].last:
                known = self.memories.pop()
                first, last = known.first, max(last, known.last)
            self.memories.append(Memory(first, last))
        self.firsts = np.array([m.first for m in self.memories], np.int64)

    def look(self, builder, pointers, mask, store):
        size = pointers.get_element_ty().primitive_bitwidth // 8 or 1
        addresses = np.asarray(pointers.data).astype(np.int64)
        active = np.broadcast_to(np.asarray(mask.data).astype(bool), addresses.shape)
        addresses = addresses[active].ravel()
        grid, dims = builder.grid_idx, builder.grid_dim
        program = (grid[0] * dims[1] + grid[1]) * dims[2] + grid[2]
        which = np.searchsorted(self.firsts, addresses, side="right") - 1
        for k in np.unique(which):
            memory = self.memories[k]
            at = (addresses[which == k] - memory.first)[:, None] + np.arange(size)
            if k < 0 or (at >= memory.writer.size).any():
                self.note("outside of every tensor")
            else:
                (self.store if store else self.load)(memory, at, program)

    def load(self, memory, at, program):
        writer = memory.writer[at]
        if ((writer != NOBODY) & (writer != program)).any():
            self.note("reads what another program has written")
        if ((writer == program) & (memory.epoch[at] == self.barriers)).any():
            self.note("reads what its program has written, no barrier between")
        reader = memory.reader[at]
        memory.reader[at] = np.where((reader == NOBODY) | (reader == program), program, SEVERAL)

    def store(self, memory, at, program):
        if len(np.unique(at[:, 0])) < len(at):
            self.note("writes an address several times at once")
        writer, reader = memory.writer[at], memory.reader[at]
        if ((writer != NOBODY) & (writer != program)).any():
            self.note("writes what another program has written")
        if ((reader != NOBODY) & (reader != program)).any():
            self.note("writes what another program has read")
        memory.writer[at], memory.epoch[at] = program, self.barriers

    def note(self, what):
        self.found.add((what, line_of_kernel()))


def line_of_kernel():
    """Where in the kernels, innermost first: ``file:function:line``."""
    frame, lines = sys._getframe(1), []
    while frame:
        name = frame.f_code.co_filename
        if Path(name).parent == KERNELS:
            lines.append(f"{Path(name).name}:{frame.f_code.co_name}:{frame.f_lineno}")
            if frame.f_code.co_name.endswith("_kernel"):
                break
        frame = frame.f_back
    return " < ".join(lines)


@contextlib.contextmanager
def sanitizing():
    """Inside, every launch of an interpreted kernel is looked at: a :class:`Sanitizer`."""
    plain = {
        name: getattr(InterpreterBuilder, name)
        for name in ("create_masked_load", "create_masked_store", "create_barrier")
    }
    launch, seen = GridExecutor.__call__, Sanitizer()

    def load(self, pointers, mask, *rest, **options):
        seen.look(self, pointers, mask, store=False)
        return plain["create_masked_load"](self, pointers, mask, *rest, **options)

    def store(self, pointers, value, mask, *rest, **options):
        seen.look(self, pointers, mask, store=True)
        return plain["create_masked_store"](self, pointers, value, mask, *rest, **options)

    def barrier(self):
        seen.barriers += 1
        return plain["create_barrier"](self)

    def begin(self, *arguments, **options):
        seen.begin(self.fn.__name__, (arguments, options))
        return launch(self, *arguments, **options)

    InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store = load, store
    InterpreterBuilder.create_barrier, GridExecutor.__call__ = barrier, begin
    try:
        yield seen
    finally:
        GridExecutor.__call__ = launch
        for name, function in plain.items():
            setattr(InterpreterBuilder, name, function)

"""What sm_90 adds: boxes of tensor maps, barriers in memory that count their bytes, products of four warps."""

import ctypes

import numpy as np
from arith import widen
from memory import FIRST, GLOBAL, UNSIGNED, Waits

GROUP = 128  # threads of the four warps that multiply together
MAP_WIDTHS = {1: 2, 2: 4, 6: 2, 7: 4, 9: 2}  # of CUtensorMapDataType, in bytes
MAP_SWIZZLES = {0: 0, 1: 32, 2: 64, 3: 128}  # of CUtensorMapSwizzle, in bytes
DESCRIPTOR_SWIZZLES = {1: 128, 2: 64, 3: 32}  # of wgmma's descriptors


class Map(ctypes.Structure):
    """A tensor map as tests/dry_run/libcuda.c writes it."""

    _fields_ = [
        ("address", ctypes.c_uint64), ("dims", ctypes.c_uint64 * 2), ("stride", ctypes.c_uint64),
        ("box", ctypes.c_uint32 * 2), ("type", ctypes.c_uint32), ("swizzle", ctypes.c_uint32),
    ]  # fmt: skip


class Barrier:
    """Of one arrival a phase, and of what must have come: copies, ``expected`` bytes of them (None before the arrival),
    and on sm_100 the first so many ``products``."""

    def __init__(self):
        self.parity, self.expected, self.copies, self.products = 0, None, [], 0


def swizzle(address, width):
    """Within rows of ``width`` bytes, 16 bytes change places by the row."""
    return address ^ ((address >> 7) & (width // 16 - 1)) << 4 if width else address


def places_of(descriptor, width, rows, depth, size, transposed):
    """-> (rows, depth) addresses of a tile's numbers, of ``size`` bytes, in lines of ``width``.

    As the PTX ISA has it under "Shared Memory Matrix Layout" and "Matrix Descriptor".
    """
    if descriptor >> 49 & 7:
        raise NotImplementedError(f"a descriptor with a base offset, {descriptor:#x}")
    base, lead, stride = ((descriptor >> k & 0x3FFF) << 4 for k in (0, 16, 32))
    row, k = np.arange(rows)[:, None], np.arange(depth)
    if transposed:
        line = width // size
        at = row // line * lead + k // 8 * stride + k % 8 * width + row % line * size
    else:
        at = row // 8 * stride + row % 8 * width + k * size
    return swizzle(base + at, width)


def bits_of(group):
    """Of its warps, as :class:`memory.Races` wants them."""
    return np.uint32(15 << 4 * group)


class Hopper:
    """A part of :class:`machine.Program`."""

    def issued(self, mask, *registers):
        """Of each thread that issues something, its operands as numbers."""
        mask = self.every(mask)
        return zip(*(self.every(x)[mask].tolist() for x in registers))

    def leaders(self):
        """elect.sync: one thread of each warp."""
        return self.thread % 32 == 0

    def start_barrier(self, address, count, mask):
        for at, arrivals in self.issued(mask, address, count):
            if arrivals != 1:
                raise NotImplementedError("a barrier of several arrivals")
            if at in self.barriers:
                raise ValueError("a barrier is made again that was not ended")
            self.barriers[at] = Barrier()

    def end_barrier(self, address, mask):
        """mbarrier.inval"""
        for (at,) in self.issued(mask, address):
            if self.barriers.pop(at).copies:
                raise ValueError("copies were not waited for")

    def expect(self, address, size, mask):
        for at, coming in self.issued(mask, address, size):
            if self.barriers[at].expected is not None:
                raise ValueError("a barrier was arrived at twice in a phase")
            self.barriers[at].expected = coming

    def fetch(self, to, tensor, column, row, address, mask):
        """cp.async.bulk.tensor: it arrives when its barrier is waited for, no sooner."""
        operands = self.thread, to, tensor, column.view(np.int32), row.view(np.int32), address
        for thread, first, described, x, y, at in self.issued(mask, *operands):
            box = Map.from_address(described)
            size = box.box[0] * box.box[1] * MAP_WIDTHS[box.type]
            own, group = np.uint32(1) << np.uint32(thread // 32), bits_of(thread // GROUP)
            self.races.note_coming(first + np.arange(size), own, group)
            self.barriers[at].copies.append((first, box, x, y))

    def wait_barrier(self, address, parity, mask=None):
        """mbarrier.try_wait: the barrier's phase of that parity is over."""
        waiting = {*self.issued(np.array([True]) if mask is None else mask, address, parity)}
        if not waiting:
            return
        ((at, wanted),) = waiting  # threads that wait for different ones are more than is known here
        barrier = self.barriers[at]
        if barrier.parity != wanted:
            return
        coming = sum(box.box[0] * box.box[1] * MAP_WIDTHS[box.type] for _, box, *_ in barrier.copies)
        if coming != barrier.expected:
            raise Waits(f"a barrier waits for {barrier.expected} bytes, {coming} come")
        for copy in barrier.copies:
            self.place_box(*copy)
        self.multiply_until(barrier.products)
        barrier.parity, barrier.expected, barrier.copies = 1 - barrier.parity, None, []

    def place_box(self, to, tensor, column, row):
        """0 where the box is beyond its tensor."""
        width = MAP_WIDTHS[tensor.type]
        if to % 128:
            raise ValueError(f"misaligned: a tensor map's box goes to {to}")
        self.races.note_arrived(to + np.arange(tensor.box[0] * tensor.box[1] * width))
        rows, columns = np.arange(tensor.box[1])[:, None], np.arange(tensor.box[0])
        inside = (row + rows >= 0) & (row + rows < tensor.dims[1])
        inside = inside & (column + columns >= 0) & (column + columns < tensor.dims[0])
        source = tensor.address + (row + rows) * tensor.stride + (column + columns) * width - FIRST
        numbers = np.zeros(inside.shape, UNSIGNED[width])
        numbers[inside] = GLOBAL[width][source[inside] // width]
        at = swizzle(to + (rows * tensor.box[0] + columns) * width, MAP_SWIZZLES[tensor.swizzle])
        self.shared[width][at // width] = numbers

    def multiply_group(self, kind, columns, c, a, b, keep, transposed):
        """wgmma.m64nNk16: b, and a unless it lies in registers, by descriptors of tiles in shared memory."""
        groups = range(self.threads // GROUP)
        if len(a) == 1:
            x = [self.tile(kind, group, a, 64, transposed[0]) for group in groups]
        else:
            x = self.left(kind, a).reshape(len(groups), 64, 16)
        y = [self.tile(kind, group, b, columns, transposed[-1]) for group in groups]
        sums = np.stack([x[group] @ y[group].T for group in groups]).reshape(-1, 16, columns)
        kept = [np.where(keep, self.every(register), np.uint32(0)) for register in c]
        return self.add(kept, sums)

    def tile(self, kind, group, descriptor, rows, transposed):
        """-> (rows, 16) numbers."""
        descriptor = int(self.every(*descriptor)[group * GROUP])
        at = places_of(descriptor, DESCRIPTOR_SWIZZLES[descriptor >> 62], rows, 16, 2, transposed)
        self.races.note_product(at[..., None] + np.arange(2), bits_of(group))
        return widen(kind, self.shared[2][at // 2])

"""A program of a compiled kernel, all its threads at once: what those instructions do that are more than arithmetic.

A register is a numpy array, of one element a thread, or one in all where every thread has the same. Numbers are kept
as bits, unsigned. Between two instructions all threads have done the first: what could differ on a GPU, where warps run
in any order and copies arrive when they like, is looked for (:class:`memory.Races`), or comes as late as it may.
"""

import numpy as np
from arith import pack, widen
from blackwell import Blackwell
from hopper import Hopper
from memory import FIRST, GLOBAL, UNSIGNED, Races, Waits, views

WARP = 32
LANES = np.arange(WARP)
ROW, PAIR = LANES // 4, 2 * (LANES % 4)  # where a lane's two numbers stand in the 8 x 8 matrices of mma and ldmatrix


def places(corners, rows):
    """-> (rows, 16): where each number of a matrix lies among a warp's registers, whose parts begin at the corners."""
    out = np.empty((rows, 16), np.int64)
    for k, (row, column) in enumerate(corners):
        for half in range(2):
            out[row + ROW, column + PAIR + half] = 64 * k + 2 * LANES + half
    return out


A_PLACES, B_PLACES = places([(0, 0), (8, 0), (0, 8), (8, 8)], 16), places([(0, 0), (0, 8)], 8)


class Program(Hopper, Blackwell):
    """``place`` in its ``grid``; ``shared``: bytes of shared memory, NaN in every type until they are written."""

    def __init__(self, place, grid, threads, shared):
        self.place, self.grid, self.threads = place, grid, threads
        self.thread = np.arange(threads, dtype=np.uint32)
        self.bit = np.uint32(1) << self.thread // WARP  # the warp's, for races
        self.bytes = np.full(-(-shared // 16) * 16, 0xFF, np.uint8)
        self.shared, self.races = views(self.bytes), Races(self.bytes.size)
        self.copies, self.groups = [], []  # cp.async: not yet in a group, in groups that nobody waited for
        self.barriers, self.fragments = {}, {}
        self.tensor, self.products, self.multiplied = None, [], 0
        self.at: np.ndarray | None = None  # the block of instructions of each thread, once they have parted

    def end(self):
        if self.multiplied < len(self.products):
            raise ValueError("products were not waited for")
        if self.copies or any(self.groups) or any(barrier.copies for barrier in self.barriers.values()):
            raise ValueError("copies were not waited for")

    def every(self, x):
        """A register with an element a thread."""
        return x if x.shape == (self.threads,) else np.broadcast_to(x, (self.threads,))

    def warps(self, x):
        return self.every(x).reshape(-1, WARP)

    def check_whole(self, active, size):
        """Threads of which so many act as one wait until all are there."""
        groups = active.reshape(-1, size)
        if (groups.any(1) != groups.all(1)).any():
            raise Waits("threads wait for others, to act as one")

    def meet(self, active, end):
        """bar.sync of threads that have parted: all that have not ended wait for each other."""
        if (active != (self.at < end)).any():
            raise Waits("threads wait for others that do not come")
        self.races.barrier()

    # memory

    def aligned(self, address, size, mask):
        """-> (addresses of the threads that are not masked, the mask)."""
        address = self.every(address).astype(np.int64)
        if mask is not None:
            mask = self.every(mask)
            address = address[mask]
        if (wrong := address % size != 0).any():
            raise ValueError(f"misaligned: {size} bytes at {address[wrong][:4]}")
        return address, mask

    def load(self, memory, at, count, width, mask):
        """0 for threads that are masked."""
        found = [memory[width][at // width + k] for k in range(count)]
        if mask is None:
            return found
        out = [np.zeros(self.threads, UNSIGNED[width]) for _ in found]
        for whole, x in zip(out, found):
            whole[mask] = x
        return out

    def store(self, memory, at, values, width, mask):
        for k, value in enumerate(values):
            value = self.every(value)
            memory[width][at // width + k] = value if mask is None else value[mask]

    def load_global(self, address, count, width, mask=None):
        at, mask = self.aligned(address, count * width, mask)
        return self.load(GLOBAL, at - FIRST, count, width, mask)

    def store_global(self, address, values, width, mask=None):
        at, mask = self.aligned(address, len(values) * width, mask)
        self.store(GLOBAL, at - FIRST, values, width, mask)

    def touched(self, at, size, mask):
        """-> (each thread's bytes, its warp's bit)."""
        return at[:, None] + np.arange(size), (self.bit if mask is None else self.bit[mask])[:, None]

    def load_shared(self, address, count, width, mask=None):
        at, mask = self.aligned(address, count * width, mask)
        self.races.note_read(*self.touched(at, count * width, mask))
        return self.load(self.shared, at, count, width, mask)

    def store_shared(self, address, values, width, mask=None):
        at, mask = self.aligned(address, len(values) * width, mask)
        touched, bits = self.touched(at, len(values) * width, mask)
        before = self.bytes[touched]
        self.store(self.shared, at, values, width, mask)
        after, wanted = self.bytes[touched], np.stack([self.every(value) for value in values], 1)
        wanted = (wanted if mask is None else wanted[mask]).view(np.uint8).reshape(after.shape)
        self.races.note_lost(touched, bits, wanted, after != wanted)
        self.races.note_write(touched, bits, before != after)

    def copy(self, to, source, size, filled, mask=None):
        """cp.async: ``filled`` bytes of ``size`` are read, the rest is 0. They arrive when waited for, no sooner."""
        width = min(size, 8)
        filled, mask = self.every(filled), self.every(np.array([True]) if mask is None else mask)
        if not ((filled == 0) | (filled == size))[mask].all():
            raise NotImplementedError("a copy of a part")
        values = self.load_global(source, size // width, width, mask & (filled > 0))
        at, bits = self.touched(*self.aligned(to, size, mask)[:1], size, mask)
        self.races.note_coming(at, bits, bits)
        self.copies.append((at, (to, values, width, mask)))

    def commit(self):
        self.groups.append(self.copies)
        self.copies = []

    def wait(self, pending):
        while len(self.groups) > pending:
            for at, copy in self.groups.pop(0):
                self.races.note_arrived(at)
                self.store_shared(*copy)

    # among the threads of a warp

    def shuffle(self, kind, x, by, limit):
        x, by = self.warps(x), self.warps(by).astype(np.int64)
        source = {"bfly": LANES ^ by, "idx": by & 31, "up": LANES - by}[kind]
        low, high = (limit & 31, 31) if kind == "up" else (0, limit & 31)
        source = np.where((source >= low) & (source <= high), source, LANES)
        return np.take_along_axis(x, source, 1).reshape(-1)

    def reduce(self, function, x, threads):
        if (threads != 0xFFFFFFFF).any():
            raise NotImplementedError("redux of a part of a warp")
        x = function.reduce(self.warps(x), 1, keepdims=True, dtype=x.dtype)
        return np.broadcast_to(x, (x.shape[0], WARP)).reshape(-1)

    def rows(self, address, count, warps):
        """-> (warps, 8 count, 8) 16-bit numbers' places: 8 lanes each have the addresses of a matrix's rows."""
        address = self.warps(address)[warps].astype(np.int64)[:, : 8 * count]
        if (wrong := address % 16 != 0).any():
            raise ValueError(f"misaligned: rows of matrices at {address[wrong][:4]}")
        return address[..., None] // 2 + np.arange(8)

    def touched_rows(self, rows, warps):
        return 2 * rows[..., None] + np.arange(2), self.warps(self.bit)[warps, :1, None, None]

    def matrices(self, address, count, transposed, active=None):
        """ldmatrix, of ``count`` 8 x 8 matrices, by the warps that are active."""
        warps = slice(None) if active is None else self.warps(active)[:, 0]
        rows = self.rows(address, count, warps)
        self.races.note_read(*self.touched_rows(rows, warps))
        numbers, out = self.shared[2][rows], []
        for k in range(count):
            matrix = numbers[:, 8 * k : 8 * k + 8]
            matrix = matrix.swapaxes(1, 2) if transposed else matrix
            register = np.zeros((self.threads // WARP, WARP), np.uint32)
            register[warps] = pack(matrix[:, ROW, PAIR], matrix[:, ROW, PAIR + 1])
            out.append(register.reshape(-1))
        return out

    def store_matrices(self, address, registers, transposed, active=None):
        """stmatrix"""
        warps = slice(None) if active is None else self.warps(active)[:, 0]
        rows = self.rows(address, len(registers), warps)
        wanted = np.empty(rows.shape, np.uint16)
        for k, register in enumerate(registers):
            bits, matrix = self.warps(register)[warps], np.empty((len(rows), 8, 8), np.uint16)
            matrix[:, ROW, PAIR], matrix[:, ROW, PAIR + 1] = bits & np.uint32(0xFFFF), bits >> np.uint32(16)
            wanted[:, 8 * k : 8 * k + 8] = matrix.swapaxes(1, 2) if transposed else matrix
        before = self.shared[2][rows]
        self.shared[2][rows] = wanted
        touched, bits = self.touched_rows(rows, warps)
        after = self.shared[2][rows]
        self.races.note_lost(touched[..., 0], bits[..., 0], wanted, after != wanted)
        self.races.note_write(touched, bits, (before != after)[..., None].repeat(2, 3))

    def multiply(self, kind, a, b, c):
        """mma.m16n8k16: 16-bit a (16, 16) and b (16, 8), sums in float32."""
        return self.add(c, self.left(kind, a) @ self.fragment(kind, b, B_PLACES).swapaxes(1, 2))

    def add(self, registers, sums):
        """To registers what they hold of (warps, 16, columns)."""
        out = []
        for k, register in enumerate(registers):
            part = sums[:, ROW + 8 * (k % 4 // 2), 8 * (k // 4) + PAIR + k % 2].reshape(-1)
            out.append((part + self.every(register).view(np.float32)).view(np.uint32))
        return out

    def left(self, kind, registers):
        return self.fragment(kind, registers, A_PLACES)

    def fragment(self, kind, registers, where):
        """-> (warps, rows, 16) numbers; the same registers are met again and again."""
        key = kind, id(where), *map(id, registers)
        if key not in self.fragments:
            if len(self.fragments) > 200:
                self.fragments.clear()
            bits = np.stack([self.warps(x) for x in registers], 1).view(np.uint16)
            numbers = widen(kind, bits.reshape(len(bits), -1)[:, where])
            self.fragments[key] = registers, numbers  # what the key names stays alive
        return self.fragments[key][1]

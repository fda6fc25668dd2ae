"""What sm_100 adds: tensor memory, and products that one thread starts and a barrier waits for."""

import numpy as np
from arith import widen
from hopper import places_of

ALL_LANES, COLUMNS = 128, 512  # of tensor memory, 32 bits each
SWIZZLES = {2: 128, 4: 64, 6: 32}  # of its descriptors, in bytes
KINDS = {0: "f16", 1: "bf16", 2: "tf32"}


def cells(address, rows, columns):
    """-> lanes and columns of a matrix in tensor memory; of 64 rows each warp has 16 (PTX ISA, "Data Path Layout")."""
    row = np.arange(rows)
    lane = (address >> 16) + (row if rows == ALL_LANES else row // 16 * 32 + row % 16)[:, None]
    return lane, (address & 0xFFFF) + np.arange(columns)


class Blackwell:
    """A part of :class:`machine.Program`. ``tensor``: None before its first allocation, NaN until it is written."""

    def allocate(self, address, columns, mask):
        """tcgen05.alloc: where it begins is written to shared memory."""
        if self.tensor is None:
            self.tensor, self.taken = np.full((ALL_LANES, COLUMNS), 0xFFFFFFFF, np.uint32), 0
        if self.taken + columns > COLUMNS:
            raise ValueError(f"{columns} columns of tensor memory asked for, {COLUMNS - self.taken} are left")
        self.store_shared(address, [np.full(1, self.taken, np.uint32)], 4, mask)
        self.taken += columns

    def lanes_columns(self, address, halves, second):
        """-> (lane, first column) of each thread; halves: two groups of 16 lanes, the latter's columns further on."""
        address = self.every(address).astype(np.int64)
        lane, column = (address >> 16) + self.thread % 32, address & 0xFFFF
        if halves:
            lane, column = lane - self.thread % 32 // 16 * 16, column + self.thread % 32 // 16 * second
        if (lane // 32 != self.thread // 32 % 4).any():
            raise ValueError("a warp's tensor memory is a quarter of the lanes, its own")
        return lane, column

    def load_tensor(self, address, count, halves, second):
        lane, column = self.lanes_columns(address, halves, second)
        return [self.tensor[lane, column + k] for k in range(count)]

    def store_tensor(self, address, values, halves, second, mask):
        lane, column = self.lanes_columns(address, halves, second)
        mask = self.every(np.array([True]) if mask is None else mask)
        for k, value in enumerate(values):
            self.tensor[lane[mask], column[mask] + k] = self.every(value)[mask]

    def start_product(self, tf32, in_tensor, to, a, b, shape, keep, mask):
        """tcgen05.mma: it reads and writes when it is waited for, no sooner. in_tensor: a is in tensor memory."""
        keep = self.every(keep)
        for thread, where, left, right, bits in self.issued(mask, self.thread, to, a, b, shape):
            kind, size = KINDS[bits >> 7 & 7], 4 if tf32 else 2
            rows, columns = (bits >> 24 & 31) << 4, (bits >> 17 & 63) << 3
            if bits >> 4 & 3 != 1 or bits >> 2 & 3 or kind != KINDS[bits >> 10 & 7] or bits >> 13 & 3:
                raise NotImplementedError(f"a product described by {bits:#x}")
            sides = [(rows, left)] if in_tensor else []
            described = (left, rows, bits >> 15 & 1), (right, columns, bits >> 16 & 1)
            for descriptor, extent, transposed in described[in_tensor:]:
                at = places_of(descriptor, SWIZZLES[descriptor >> 61], extent, 32 // size, size, transposed)
                self.races.note_product(at[..., None] + np.arange(size), np.uint32(1) << np.uint32(thread // 32))
                sides.append(at)
            self.products.append((kind, size, where, *sides, bool(keep[thread])))

    def commit_products(self, address, mask):
        """tcgen05.commit: the barrier's phase is over when all products so far are done."""
        self.expect(address, np.zeros(1, np.uint32), mask)
        for (at,) in self.issued(mask, address):
            self.barriers[at].products = len(self.products)

    def multiply_until(self, count):
        for kind, size, where, left, right, keep in self.products[self.multiplied : count]:
            y = widen(kind, self.shared[size][right // size])
            if isinstance(left, tuple):
                bits = np.ascontiguousarray(self.tensor[cells(left[1], left[0], 8)])
                x = widen(kind, bits.view(np.uint16) if size == 2 else bits)
            else:
                x = widen(kind, self.shared[size][left // size])
            at = cells(where, len(x), len(y))
            before = self.tensor[at].view(np.float32) if keep else np.float32(0)
            self.tensor[at] = (x @ y.T + before).view(np.uint32)
        self.multiplied = max(self.multiplied, count)

"""Memory as a kernel sees it: the process's own, by address, and a program's shared memory."""

import ctypes

import numpy as np

UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}  # by bytes
FIRST = 4096  # no address is below


def views(memory):
    """{bytes of a number: the memory as an array of such}"""
    return {width: memory.view(dtype) for width, dtype in UNSIGNED.items()}


GLOBAL = views(np.ctypeslib.as_array((ctypes.c_uint8 * (2**47 - FIRST)).from_address(FIRST)))


class Waits(ValueError):
    """A barrier is not complete yet: its threads wait for others, or nobody comes."""


class Race(ValueError):
    """Two warps at one byte of shared memory, one of which writes, and no barrier between them."""


class Races:
    """Who touched which byte since the last barrier: between two of them warps run in no order.

    What is written again as it was harms nobody: warps often hold the same numbers.
    """

    def __init__(self, size):
        self.read, self.written, self.multiplied = (np.zeros(size, np.uint32) for _ in range(3))  # a bit for each warp
        self.coming = np.zeros(size, np.int32)  # copies under way

    def barrier(self):
        for bits in (self.read, self.written, self.multiplied):
            bits[:] = 0

    def check_coming(self, at):
        if self.coming[at].any():
            raise Race("shared memory is read or written while a copy to it is under way")

    def note_read(self, at, warps):
        """at: bytes. warps: bits, of a shape that broadcasts to theirs."""
        self.check_coming(at)
        if (self.written[at] & ~warps).any():
            raise Race("shared memory is read that another warp has written, without a barrier")
        np.bitwise_or.at(self.read, at, np.broadcast_to(warps, at.shape))

    def note_product(self, at, warps):
        """Warps that multiply together read."""
        self.check_coming(at)
        if (self.written[at] & ~warps).any():
            raise Race("a product reads what another warp has written, without a barrier")
        np.bitwise_or.at(self.multiplied, at, np.broadcast_to(warps, at.shape))

    def note_write(self, at, warps, changed):
        """changed: which bytes were others before."""
        self.check_coming(at)
        if ((self.written[at] | self.read[at] | self.multiplied[at]) & ~warps)[changed].any():
            raise Race("shared memory is written that another warp has read or written, without a barrier")
        np.bitwise_or.at(self.written, at, np.broadcast_to(warps, at.shape))

    def note_coming(self, at, warps, group):
        """A copy begins. warps: bits of those that began it; group: of those whose products they have waited for."""
        if ((self.written[at] | self.read[at]) & ~warps | self.multiplied[at] & ~group).any():
            raise Race("a copy goes where another warp has read or written, without a barrier")
        np.add.at(self.coming, at, 1)

    def note_arrived(self, at):
        np.subtract.at(self.coming, at, 1)

    def note_lost(self, at, warps, wanted, lost):
        """lost: which of a store's bytes hold another thread's number than wanted. Which of a warp's lanes wins is the
        GPU's choice, and the same in each: two warps must have the same numbers in the same order."""
        if not lost.any():
            return
        warps, several = np.broadcast_to(warps, at.shape), np.isin(at, at[lost])
        orders = {}
        for place, warp, number in zip(at[several].tolist(), warps[several].tolist(), wanted[several].tolist()):
            orders.setdefault(place, {}).setdefault(warp, []).append(number)
        for of_warps in orders.values():
            first, *others = of_warps.values()
            if any(other != first for other in others):
                raise Race("two warps write different numbers to one place")

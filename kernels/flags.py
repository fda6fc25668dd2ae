"""The flags of a certified forward, packed into words, and read back for the plan of its backward."""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from fastgrpo.backends.certified import Certificate
from fastgrpo.kernels import tiles
from fastgrpo.kernels.arguments import pick_tile
from fastgrpo.kernels.tiles import cdiv

WIDEST = tl.constexpr(tiles.FLAGGED[1])  # entries of a tile: a block's flags are padded to it
WORDS = 64  # of a program


@triton.jit
def either(a, b):
    return a | b


@triton.jit
def pack_flags(hit, local, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr):
    """(BLOCK_V // 32,) int32: of each entry of the tile whether some row hits it or has it as its label.

    Column c is bit c // W of word c % W, W the number of words: the bits of a word are in one thread's registers.
    local: (BLOCK_N,) the labels, counted from the tile's first entry; None: there are none.
    """
    W: tl.constexpr = BLOCK_V // 32
    bits = tl.reshape(hit.to(tl.int32), (BLOCK_N, 32, W)) << tl.arange(0, 32)[None, :, None]
    bits = tl.sum(bits, axis=1)
    if local is not None:
        here = (local >= 0) & (local < BLOCK_V)
        own = here[:, None] & ((local % W)[:, None] == tl.arange(0, W)[None, :])
        bits |= tl.where(own, (1 << (local // W))[:, None], 0)
    return tl.reduce(bits, 0, either)


@triton.jit
def sum_unflagged(e, words, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr):
    """(BLOCK_N,) sum over the entries that are not flagged."""
    W: tl.constexpr = BLOCK_V // 32
    kept = (words[None, None, :] & (1 << tl.arange(0, 32))[None, :, None]) != 0
    return tl.sum(tl.sum(tl.where(kept, 0.0, tl.reshape(e, (BLOCK_N, 32, W))), axis=1), axis=1)


@triton.jit
def see_terms(x, y, center, least, words_ptr, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr):
    """Flags the entries of a tile that have a term of ``least`` or more, see :mod:`fastgrpo.pair_math`.

    -> (BLOCK_N,) each: the sums of x^2, x y and y^2 over the tile, then over what is not flagged.
    """
    hit = tl.abs(x - center[:, None] * y) >= least[:, None]
    words = pack_flags(hit, None, BLOCK_N, BLOCK_V)
    tl.store(words_ptr + tl.arange(0, BLOCK_V // 32), words)
    kept = tl.reshape((words[None, :] & (1 << tl.arange(0, 32))[:, None]) != 0, (BLOCK_V,))[None, :]
    left_x, left_y = tl.where(kept, 0.0, x), tl.where(kept, 0.0, y)
    left_xx, left_xy = tl.sum(left_x * left_x, axis=1), tl.sum(left_x * left_y, axis=1)
    left_yy = tl.sum(left_y * left_y, axis=1)
    return tl.sum(x * x, axis=1), tl.sum(x * y, axis=1), tl.sum(y * y, axis=1), left_xx, left_xy, left_yy


@triton.jit
def block_words(V, block, first_v, BLOCK_V: tl.constexpr):
    """Where a tile's words of flags begin, int64."""
    words = tl.cdiv(V, WIDEST) * (WIDEST // 32)
    return tl.cast(block, tl.int64) * words + first_v // BLOCK_V * (BLOCK_V // 32)


@triton.jit(do_not_specialize=["blocks"])
def last_keeping_kernel(
    flags_ptr,  # (blocks, words) int32
    alive_ptr,  # (K, blocks) bool
    last_ptr,  # (K, 32 * words) int32 out
    blocks,
    words,
    K: tl.constexpr,
    TILE: tl.constexpr,  # entries that share their words
    BLOCK_W: tl.constexpr,
):
    """1 + the last block that is alive and keeps each entry; columns as in :func:`pack_flags`."""
    W: tl.constexpr = TILE // 32
    offs = tl.program_id(0) * BLOCK_W + tl.arange(0, BLOCK_W)
    inside = offs < words
    bits = tl.arange(0, 32)
    entries = (offs // W * TILE + offs % W)[:, None] + bits[None, :] * W
    for k in tl.static_range(K):
        last = tl.zeros((BLOCK_W, 32), tl.int32)
        for block in range(blocks):
            word = tl.load(flags_ptr + tl.cast(block, tl.int64) * words + offs, mask=inside, other=0)
            alive = tl.load(alive_ptr + k * blocks + block) != 0
            kept = ((word[:, None] >> bits[None, :]) & 1) != 0
            last = tl.where(kept & alive, block + 1, last)
        tl.store(last_ptr + tl.cast(k, tl.int64) * words * 32 + entries, last, mask=inside[:, None])


class FlagShape(NamedTuple):
    block: int  # rows that share their flags
    words: int  # int32 words of a block: of every tile's width, so that a graph knows it


def flag_shape(problem, kernel):
    """Of what a certified forward flags. kernel: its name in :mod:`fastgrpo.kernels.tiles`."""
    block = tiles.for_tensor(kernel, problem.params.compute_dtype, problem.hidden.device).rows
    return FlagShape(block, cdiv(problem.weight.shape[0], WIDEST.value) * (WIDEST.value // 32))


def flag_tile(problem, kernel):
    """Entries that share their words of flags."""
    return pick_tile(kernel, problem)[0].cols


def new_flags(problem, kernel):
    """(blocks, words) int32: nothing is flagged."""
    n, (block, words) = problem.targets.numel(), flag_shape(problem, kernel)
    return torch.zeros(cdiv(n, block), words, dtype=torch.int32, device=problem.hidden.device)


class PackedCertificate(Certificate):
    """One that a Triton forward made, read by a kernel."""

    def last_keeping(self, alive):
        blocks, words = self.flags.shape
        last = torch.zeros(len(alive), 32 * words, dtype=torch.int32, device=alive.device)
        last_keeping_kernel[(cdiv(words, WORDS),)](
            flags_ptr=self.flags,
            alive_ptr=alive,
            last_ptr=last,
            blocks=blocks,
            words=words,
            K=len(alive),
            TILE=self.tile,
            BLOCK_W=WORDS,
            num_warps=8,
        )
        return last


def certificate(problem, kernel, rows, flags, dropped):
    """The :class:`PackedCertificate` of what a certified forward kernel left."""
    return PackedCertificate(rows, flags, dropped, flag_shape(problem, kernel).block, flag_tile(problem, kernel))

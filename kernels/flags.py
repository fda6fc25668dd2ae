"""The flags of a certified forward, packed into words, and read back for the plan of its backward."""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from fastgrpo.backends.certified import Certificate
from fastgrpo.kernels import tiles
from fastgrpo.kernels.arguments import pick_tile
from fastgrpo.kernels.common import pieces_of, sum_parts
from fastgrpo.kernels.tiles import cdiv

WIDEST = tl.constexpr(tiles.FLAGGED[1])  # entries of a tile: a block's flags are padded to it


@triton.jit
def either(a, b):
    return a | b


@triton.jit
def pack_flags(hit, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, PARTS: tl.constexpr, FLAGS: tl.constexpr):
    """(BLOCK_V // 32,) int32: of each column of the tile whether some row hits it.

    FLAGS columns share W words: column c of theirs is bit c // W of word c % W, so that a thread has most of the bits
    of its words in its registers.
    """
    W: tl.constexpr = FLAGS // 32
    if BLOCK_V > FLAGS:  # bits first: they are then in few registers
        bits = (1 << tl.arange(0, 32))[None, None, :, None]
        bits = tl.where(tl.reshape(hit, (BLOCK_N, BLOCK_V // FLAGS, 32, W)), bits, 0)
        words = tl.reshape(tl.reduce(tl.reduce(bits, 2, either), 0, either), (BLOCK_V // 32,))
    else:
        if PARTS > 1:  # a thread has two rows of each piece
            hit = tl.reduce(tl.reshape(hit, (BLOCK_N // 16, 2, 8, BLOCK_V)), 1, either)
        rows: tl.constexpr = BLOCK_N // 2 if PARTS > 1 else BLOCK_N
        bits = tl.where(tl.reshape(hit, (rows, 32, W)), (1 << tl.arange(0, 32))[None, :, None], 0)
        words = tl.reduce(tl.reshape(bits, (rows * 32, W)), 0, either)  # at once: threads before lanes
    return words


@triton.jit
def label_flags(local, BLOCK_V: tl.constexpr, FLAGS: tl.constexpr):
    """As :func:`pack_flags`, of the labels, counted from the tile's first column."""
    W: tl.constexpr = FLAGS // 32
    inside = (local >= 0) & (local < BLOCK_V)
    word = local // FLAGS * W + local % W
    own = inside[:, None] & (word[:, None] == tl.arange(0, BLOCK_V // 32)[None, :])
    return tl.reduce(tl.where(own, (1 << (local % FLAGS // W))[:, None], 0), 0, either)


@triton.jit
def sum_unflagged(e, words, FLAGS: tl.constexpr):
    """As :func:`sum_parts`, over the columns that are not flagged in the words of :func:`pack_flags`."""
    W: tl.constexpr = FLAGS // 32
    bits = (1 << tl.arange(0, 32))[None, :, None]
    if words.shape[0] > W:
        GROUPS: tl.constexpr = words.shape[0] // W
        flagged = tl.reshape((tl.reshape(words, (GROUPS, 1, W)) & bits) != 0, (1, GROUPS * 32, W))
    else:
        flagged = (words[None, None, :] & bits) != 0
    left = tl.reshape(e, (e.shape[0], flagged.shape[1], W)) * tl.where(flagged, 0.0, 1.0)
    return sum_parts(tl.reshape(left, e.shape))


@triton.jit
def see_terms(
    xs, ys, center, least, words_ptr,
    CUTS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, FLAGS: tl.constexpr,
):  # fmt: skip
    """Flags the entries of a tile that have a term of ``least`` or more, see :mod:`fastgrpo.pair_math`.

    xs, ys: the tile in pieces; FLAGS: columns that share their words. -> (BLOCK_N,) each: the sums of x^2, x y and y^2
    over the tile, then over what is not flagged.
    """
    W: tl.constexpr = FLAGS // 32
    GROUPS: tl.constexpr = BLOCK_V // FLAGS
    EACH: tl.constexpr = 2**CUTS // GROUPS  # pieces of a group
    BITS: tl.constexpr = 32 // EACH  # of each word, that a piece has
    xx = tl.zeros((BLOCK_N,), tl.float32)
    xy, yy, left_xx, left_xy, left_yy = xx, xx, xx, xx, xx
    for group in tl.static_range(GROUPS):
        bits = tl.zeros((BLOCK_N, BITS, W), tl.int32)
        for k in tl.static_range(EACH):
            x, y = xs[group * EACH + k], ys[group * EACH + k]
            hit = tl.reshape(tl.abs(x - center[:, None] * y) >= least[:, None], (BLOCK_N, BITS, W))
            bits |= tl.where(hit, (1 << (k * BITS + tl.arange(0, BITS)))[None, :, None], 0)
        words = tl.reduce(tl.reshape(bits, (BLOCK_N * BITS, W)), 0, either)
        tl.store(words_ptr + group * W + tl.arange(0, W), words)
        kept = tl.reshape((words[None, :] & (1 << tl.arange(0, 32))[:, None]) != 0, (FLAGS,))
        keeps = pieces_of(kept[None, :], CUTS - GROUPS // 2)
        for k in tl.static_range(EACH):
            x, y = xs[group * EACH + k], ys[group * EACH + k]
            xx, xy, yy = xx + tl.sum(x * x, axis=1), xy + tl.sum(x * y, axis=1), yy + tl.sum(y * y, axis=1)
            x, y = tl.where(keeps[k], 0.0, x), tl.where(keeps[k], 0.0, y)
            left_xx, left_xy = left_xx + tl.sum(x * x, axis=1), left_xy + tl.sum(x * y, axis=1)
            left_yy += tl.sum(y * y, axis=1)
    return xx, xy, yy, left_xx, left_xy, left_yy


@triton.jit
def block_words(V, block, first_v, BLOCK_V: tl.constexpr):
    """Where a tile's words of flags begin, int64."""
    words = tl.cdiv(V, WIDEST) * (WIDEST // 32)
    return tl.cast(block, tl.int64) * words + first_v // BLOCK_V * (BLOCK_V // 32)


class FlagShape(NamedTuple):
    block: int  # rows that share their flags
    words: int  # int32 words of a block: of every tile's width, so that a graph knows it


def flag_shape(problem, kernel):
    """Of what a certified forward flags. kernel: its name in :mod:`fastgrpo.kernels.tiles`."""
    block = tiles.for_tensor(kernel, problem.tile_dtype, problem.hidden.device).rows
    return FlagShape(block, cdiv(problem.weight.shape[0], WIDEST.value) * (WIDEST.value // 32))


def flag_tile(problem, kernel):
    """Entries that share their words of flags."""
    return tiles.flag_columns(kernel, pick_tile(kernel, problem)[0])


def new_flags(problem, kernel):
    """(blocks, words) int32: nothing is flagged."""
    n, (block, words) = problem.targets.numel(), flag_shape(problem, kernel)
    return torch.zeros(cdiv(n, block), words, dtype=torch.int32, device=problem.hidden.device)


def certificate(problem, kernel, rows, flags, dropped):
    """The packed :class:`Certificate` of what a certified forward kernel left."""
    return Certificate(rows, flags, dropped, flag_shape(problem, kernel).block, flag_tile(problem, kernel))

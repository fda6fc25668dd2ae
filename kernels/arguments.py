"""What the launchers hand to the kernels beside tensors and numbers: named tuples of what belongs together.

No tuple holds a None, which Triton 3.6 cannot compile, nor a number that changes with the batch, which would be
compiled for.
"""

from typing import NamedTuple

import torch
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from fastgrpo.kernels import tiles

TO_TRITON = {"torch.bfloat16": tl.bfloat16, "torch.float16": tl.float16, "torch.float32": tl.float32}


class RowStrides(NamedTuple):
    """Of a (B, T, D) tensor, in elements."""

    b: int
    t: int
    d: int


class Head(NamedTuple):
    """The weight (V, D), its sizes and strides."""

    weight_ptr: object
    V: int
    D: int
    stride_v: int
    stride_d: int


class LowRank(NamedTuple):
    """:class:`fastgrpo.lora.Operands`: low (N, depth), up (V, width), column k of low meets column k % width of up."""

    low_ptr: object
    up_ptr: object
    scale_ptr: object  # (1,) factor of the product
    depth: int
    width: int
    stride_v: int
    stride_r: int


class Held(NamedTuple):
    """Raw logits of some rows in fp32, by panels of columns as dlogits: (panels, rows, PANEL), anything beyond V."""

    logits_ptr: object
    rows: int  # a multiple of PANEL


class Logits(NamedTuple):
    """From the raw product to the logit: scale (None: 1), cap (None: none), divide by the temperature."""

    inv_temperature: float
    softcap: float
    logit_scale: float


class Selection(NamedTuple):
    """The rows to do, and every row's label."""

    rows_ptr: object  # (N,)
    count_ptr: object  # (1,) how many of them
    targets_ptr: object  # (N,)


class Taken(NamedTuple):
    """Of every row the positions of entries that do not count, rising; NOWHERE where there is none."""

    positions_ptr: object  # (N, K) int64
    K: int


def row_strides(x):
    """Of a (B, T, D) tensor, 0 between sequences where there is one: that number would only be compiled for."""
    return RowStrides(x.stride(0) if x.shape[0] > 1 else 0, x.stride(1), x.stride(2))


def low_rank_arguments(operands):
    """:class:`LowRank` or None."""
    if operands is None:
        return None
    low, up, scale = operands.low, operands.up, operands.scale
    scale = torch.ones((), device=low.device) if scale is None else scale
    return LowRank(low, up, scale, low.shape[1], up.shape[1], *up.stride())


def taken_arguments(positions):
    """:class:`Taken` or None, of (N, K) int64 or None."""
    return None if positions is None else Taken(positions, positions.shape[1])


def logit_arguments(problem):
    """-> :class:`Head`, :class:`Logits`, :class:`LowRank` or None."""
    params = problem.params
    inverse = 1.0 if params.temperature is None else 1.0 / params.temperature
    head = Head(problem.weight, *problem.weight.shape, *problem.weight.stride())
    scale = None if params.logit_scale == 1.0 else params.logit_scale
    return head, Logits(inverse, params.softcap, scale), low_rank_arguments(problem.lora_operands)


def has_extras(problem):
    """Whether a tile of logits needs more than a scalar factor."""
    params = problem.params
    return any(x is not None for x in (problem.bias, params.softcap, problem.temperature, problem.low))


def describable(kernel, device, dtype, *matrices):
    """Whether tensor descriptors can bring tiles of these (n, m) matrices, which the kernel then takes as they are.

    They need 16-byte rows of the dtype that is computed in, and hardware that copies tiles.
    """
    return tiles.has_descriptors(device, kernel) and all(
        x.dtype == dtype and dtype.itemsize == 2 and x.stride(1) == 1 and 2 * x.stride(0) % 16 == 0
        and x.data_ptr() % 16 == 0
        for x in matrices
    )  # fmt: skip


def describe(x, rows, cols):
    """Descriptor of a matrix that is read in tiles of rows x cols."""
    return TensorDescriptor(x, list(x.shape), list(x.stride()), [rows, cols])


def is_described(kernel, head):
    """Whether descriptors bring a :class:`HeadProblem`'s operands, its rows being gathered."""
    dtype, hidden = head.params.compute_dtype, head.hidden
    dense = hidden.dtype == dtype and hidden.shape[2] % 8 == 0
    return dense and describable(kernel, hidden.device, dtype, head.weight)


def pick_tile(kernel, problem):
    """-> Tile of a kernel that makes logits of dense rows, and whether its own head's operands come by descriptors."""
    described = [is_described(kernel, head) for head in problem.heads]
    tile = tiles.for_tensor(kernel, problem.tile_dtype, problem.hidden.device, all(described), problem.sizes[2])
    return tile, described[0]


def is_same(a, b):
    """Whether two tensors are one in memory."""
    if a is b or a.device.type == "meta":
        return a is b
    return a.data_ptr() == b.data_ptr() and (a.dtype, a.shape, a.stride()) == (b.dtype, b.shape, b.stride())

"""Device functions that the forward and the backward kernels share."""

from typing import NamedTuple

import triton
import triton.language as tl

from fastgrpo.backends import problem

FLOOR, NOTHING, ABSENT = map(tl.constexpr, (problem.FLOOR, problem.NOTHING, problem.ABSENT))
NEGLIGIBLE = tl.constexpr(2.0**-100)  # beside values near 1
TO_TRITON = {"torch.bfloat16": tl.bfloat16, "torch.float16": tl.float16, "torch.float32": tl.float32}


class Strides(NamedTuple):
    """In elements, of hidden (B, T, D) and weight (V, D)."""

    hidden_b: int
    hidden_t: int
    hidden_d: int
    weight_v: int
    weight_d: int


def row_strides(x):
    """Of a (B, T, D) tensor, 0 between sequences where there is one: that number would only be compiled for."""
    return x.stride(0) if x.shape[0] > 1 else 0, x.stride(1), x.stride(2)


class LowRank(NamedTuple):
    """:class:`fastgrpo.lora.Operands`: low (N, depth), up (V, width), column k of low meets column k % width of up."""

    low_ptr: object
    up_ptr: object
    scale_ptr: object  # (1,) factor of the product; never None: Triton 3.6 cannot compile a None in a tuple
    depth: int
    width: int
    stride_v: int
    stride_r: int


class Logits(NamedTuple):
    """From the raw product to the logit: scale, cap (None: none), divide by the temperature."""

    inv_temperature: float
    softcap: float
    logit_scale: float


@triton.jit
def grouped(pid, runs, GROUP: tl.constexpr):
    """-> block of rows, run of columns: GROUP blocks share a run of the weight in L2 before the next run comes."""
    in_group = pid % (GROUP * runs)
    return pid // (GROUP * runs) * GROUP + in_group % GROUP, in_group // GROUP


@triton.jit
def row_offsets(rows, T, stride_b, stride_t):
    """Where each row of a (B, T, D) tensor begins, int64. There are fewer than 2^31: a 64-bit division is a call."""
    b = rows.to(tl.int32) // T
    t = rows.to(tl.int32) - b * T
    return b.to(tl.int64) * stride_b + t.to(tl.int64) * stride_t


@triton.jit
def known_label(targets_ptr, rows, mask, V):
    """The label's column of each row, int32; -1 for a masked row or an id outside the vocabulary."""
    label = tl.load(targets_ptr + rows, mask=mask, other=-1)
    return tl.where((label >= 0) & (label < V), label, -1).to(tl.int32)


@triton.jit
def low_values(low_rank, rows, k, COMPUTE: tl.constexpr):
    """low[rows, k], 0 beyond its depth; rows int64."""
    return tl.load(low_rank.low_ptr + rows * low_rank.depth + k, mask=k < low_rank.depth, other=0.0).to(COMPUTE)


@triton.jit
def up_values(low_rank, columns, k, COMPUTE: tl.constexpr):
    """up[columns, k % width]; columns int64."""
    pointers = low_rank.up_ptr + columns * low_rank.stride_v + (k % low_rank.width).to(tl.int64) * low_rank.stride_r
    return tl.load(pointers, mask=k < low_rank.depth, other=0.0).to(COMPUTE)


@triton.jit
def raw_logits(
    hidden_ptrs,  # (BLOCK_N,) first value of each row
    weight_ptr,  # (V, D)
    bias_ptr,  # (V,) or None
    low_rank,  # LowRank or None
    rows,  # (BLOCK_N,) int64
    first_v,  # first column of the tile
    V,
    D,
    strides,
    WHOLE_D: tl.constexpr,  # whether BLOCK_D divides D
    COMPUTE: tl.constexpr,  # operands are cast to it as they are loaded
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """hidden @ weight.T + low @ up.T + bias of one tile, (BLOCK_N, BLOCK_V) in fp32.

    Columns beyond V repeat column 0's product.
    """
    offs_v = tl.arange(0, BLOCK_V)
    offs_d = tl.arange(0, BLOCK_D)
    local_v = tl.where(first_v + offs_v < V, offs_v, 0)
    weight_base = weight_ptr + tl.cast(first_v, tl.int64) * strides.weight_v
    h_ptrs = hidden_ptrs[:, None] + offs_d[None, :] * strides.hidden_d
    w_ptrs = weight_base + local_v[None, :] * tl.cast(strides.weight_v, tl.int64) + offs_d[:, None] * strides.weight_d
    acc = tl.zeros((BLOCK_N, BLOCK_V), dtype=tl.float32)
    if low_rank is not None:
        columns = (first_v + local_v).to(tl.int64)
        for start in range(0, low_rank.depth, BLOCK_D):
            low = low_values(low_rank, rows[:, None], (start + offs_d)[None, :], COMPUTE)
            up = up_values(low_rank, columns[None, :], (start + offs_d)[:, None], COMPUTE)
            acc = tl.dot(low, up, acc, input_precision="ieee")
        acc *= tl.load(low_rank.scale_ptr)
    for start in range(0, D, BLOCK_D):
        if WHOLE_D:
            h = tl.load(h_ptrs)
            w = tl.load(w_ptrs)
        else:
            h = tl.load(h_ptrs, mask=(start + offs_d < D)[None, :], other=0.0)
            w = tl.load(w_ptrs, mask=(start + offs_d < D)[:, None], other=0.0)
        acc = tl.dot(h.to(COMPUTE), w.to(COMPUTE), acc, input_precision="ieee")
        h_ptrs += BLOCK_D * strides.hidden_d
        w_ptrs += BLOCK_D * strides.weight_d
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + first_v + local_v).to(tl.float32)
        acc += tl.where(bias < NOTHING, NOTHING, bias)[None, :]
    return acc


@triton.jit
def cap(z, logits):
    """Scale and softcap."""
    z = z * logits.logit_scale
    if logits.softcap is not None:
        z = logits.softcap * tanh(z / logits.softcap)
    return z


@triton.jit
def tanh(x):
    """To fp32's relative accuracy: near 0, where (1 - e) / (1 + e) cancels, by its series."""
    e = tl.exp(-2.0 * tl.abs(x))
    far = (1.0 - e) / (1.0 + e)
    q = x * x
    near = 1.0 + q * (-1 / 3 + q * (2 / 15 + q * (-17 / 315 + q * (62 / 2835 + q * (-1382 / 155925)))))
    return tl.where(q < 0.09, x * near, tl.where(x < 0, -far, far))


@triton.jit
def cap_slope(raw, logits):
    """d cap(raw) / d raw."""
    return logits.logit_scale * softcap_slope(raw, logits)


@triton.jit
def softcap_slope(raw, logits):
    """sech^2, in (0, 1], in a form that keeps its relative accuracy far out."""
    if logits.softcap is not None:
        e = tl.exp(-tl.abs(raw * (2.0 * logits.logit_scale / logits.softcap)))
        slope = 4.0 * e / ((1.0 + e) * (1.0 + e))
    else:
        slope = 1.0
    return slope


@triton.jit
def log1p_unit(y):
    """log(1 + y) for y in [0, 1] to fp32 accuracy: 2 artanh(y / (2 + y)); the hardware log is not accurate near 1."""
    s = y / (2.0 + y)
    q = s * s
    series = 1.0 + q * (1 / 3 + q * (1 / 5 + q * (1 / 7 + q * (1 / 9 + q * (1 / 11 + q * (1 / 13 + q / 15))))))
    return 2.0 * s * series


@triton.jit
def softplus(x):
    """log(1 + exp(x)), exp(x) itself far to the left; NaN stays NaN."""
    return tl.where(x < 0, 0.0, x) + log1p_unit(tl.exp(-tl.abs(x)))


@triton.jit
def without_dust(x):
    """fp32 x that a GEMM is to read in some dtype, 0 where it cannot matter: so no fp32 or bf16 value is denormal.

    fp16's denormals (2^-24 to 2^-14) stay: they carry information, and tensor cores take them at full speed.
    """
    return tl.where(tl.abs(x) < NEGLIGIBLE, 0.0, x)

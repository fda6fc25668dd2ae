"""Device functions that several kernels share."""

import torch
import triton
import triton.language as tl

from fastgrpo.backends import problem

FLOOR, NOTHING = map(tl.constexpr, (problem.FLOOR, problem.NOTHING))
NEGLIGIBLE = tl.constexpr(problem.negligible(torch.float32))


@triton.jit
def group_blocks(pid, runs, GROUP: tl.constexpr):
    """-> block of rows, run of entries: GROUP blocks share a run of the weight in L2 before the next run comes."""
    in_group = pid % (GROUP * runs)
    return pid // (GROUP * runs) * GROUP + in_group % GROUP, in_group // GROUP


@triton.jit
def row_offsets(rows, T, strides):
    """Where each row of a (B, T, D) tensor begins, int64. There are fewer than 2^31: a 64-bit division is a call."""
    b = rows.to(tl.int32) // T
    t = rows.to(tl.int32) - b * T
    return b.to(tl.int64) * strides.b + t.to(tl.int64) * strides.t


@triton.jit
def known_label(targets_ptr, rows, mask, V):
    """The label's entry of each row, int32; -1 for a masked row or an id outside the vocabulary."""
    label = tl.load(targets_ptr + rows, mask=mask, other=-1)
    return tl.where((label >= 0) & (label < V), label, -1).to(tl.int32)


@triton.jit
def selected_rows(selection, offs, mask, V):
    """-> rows, int64, and their labels as :func:`known_label`."""
    rows = tl.load(selection.rows_ptr + offs, mask=mask, other=0)
    return rows, known_label(selection.targets_ptr, rows, mask, V)


@triton.jit
def inverse_temperatures(temperature_ptr, rows, mask, logits, BLOCK_N: tl.constexpr):
    """(BLOCK_N,), of every row its own or all rows' one."""
    if temperature_ptr is not None:
        inverse = 1.0 / tl.load(temperature_ptr + rows, mask=mask, other=1.0)
    else:
        inverse = tl.full((BLOCK_N,), logits.inv_temperature, tl.float32)
    return inverse


@triton.jit
def load_stats(stats_ptr, N, rows, mask):
    """Of some rows the values of :class:`RowStats`, 0 where masked; what is not used is not loaded."""
    at, step = stats_ptr + rows, tl.cast(N, tl.int64)
    logp = tl.load(at, mask=mask, other=0.0)
    peak = tl.load(at + step, mask=mask, other=0.0)
    offset = tl.load(at + 2 * step, mask=mask, other=0.0)
    other_mass = tl.load(at + 3 * step, mask=mask, other=0.0)
    entropy = tl.load(at + 4 * step, mask=mask, other=0.0)
    return logp, peak, offset, other_mass, entropy


@triton.jit
def load_partials(at, step, mask):
    """:class:`RowPartials` of a table whose rows are ``step`` apart, of no entry where masked."""
    peak = tl.load(at, mask=mask, other=FLOOR)
    total = tl.load(at + step, mask=mask, other=0.0)
    spread = tl.load(at + 2 * step, mask=mask, other=0.0)
    label = tl.load(at + 3 * step, mask=mask, other=0.0)
    return peak, total, spread, label


@triton.jit
def store_rows(at, values, step, mask):
    """values[k] into row k of a table whose rows are ``step`` apart."""
    for k in tl.static_range(len(values)):
        tl.store(at + k * tl.cast(step, tl.int64), values[k], mask=mask)


@triton.jit
def low_values(low_rank, rows, k, COMPUTE: tl.constexpr):
    """low[rows, k], 0 beyond its depth; rows int64."""
    return tl.load(low_rank.low_ptr + rows * low_rank.depth + k, mask=k < low_rank.depth, other=0.0).to(COMPUTE)


@triton.jit
def up_values(low_rank, entries, k, COMPUTE: tl.constexpr):
    """up[entries, k % width]; entries int64."""
    pointers = low_rank.up_ptr + entries * low_rank.stride_v + (k % low_rank.width).to(tl.int64) * low_rank.stride_r
    return tl.load(pointers, mask=k < low_rank.depth, other=0.0).to(COMPUTE)


@triton.jit
def raw_logits(
    hidden_ptrs,  # (BLOCK_N,) first value of each row
    stride_d,  # of hidden
    head,  # Head
    bias_ptr,  # (V,) or None
    low_rank,  # LowRank or None
    rows,  # (BLOCK_N,) int64
    first_v,  # first entry of the tile
    WHOLE_D: tl.constexpr,  # whether BLOCK_D divides D
    COMPUTE: tl.constexpr,  # operands are cast to it as they are loaded
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """hidden @ weight.T + low @ up.T + bias of one tile, (BLOCK_N, BLOCK_V) in fp32.

    Entries beyond V repeat entry 0's product.
    """
    offs_v = tl.arange(0, BLOCK_V)
    offs_d = tl.arange(0, BLOCK_D)
    local_v = tl.where(first_v + offs_v < head.V, offs_v, 0)
    weight_base = head.weight_ptr + tl.cast(first_v, tl.int64) * head.stride_v
    h_ptrs = hidden_ptrs[:, None] + offs_d[None, :] * stride_d
    w_ptrs = weight_base + local_v[None, :] * tl.cast(head.stride_v, tl.int64) + offs_d[:, None] * head.stride_d
    acc = tl.zeros((BLOCK_N, BLOCK_V), dtype=tl.float32)
    if low_rank is not None:
        entries = (first_v + local_v).to(tl.int64)
        for start in range(0, low_rank.depth, BLOCK_D):
            low = low_values(low_rank, rows[:, None], (start + offs_d)[None, :], COMPUTE)
            up = up_values(low_rank, entries[None, :], (start + offs_d)[:, None], COMPUTE)
            acc = tl.dot(low, up, acc, input_precision="ieee")
        acc *= tl.load(low_rank.scale_ptr)
    for start in range(0, head.D, BLOCK_D):
        if WHOLE_D:
            h = tl.load(h_ptrs)
            w = tl.load(w_ptrs)
        else:
            h = tl.load(h_ptrs, mask=(start + offs_d < head.D)[None, :], other=0.0)
            w = tl.load(w_ptrs, mask=(start + offs_d < head.D)[:, None], other=0.0)
        acc = tl.dot(h.to(COMPUTE), w.to(COMPUTE), acc, input_precision="ieee")
        h_ptrs += BLOCK_D * stride_d
        w_ptrs += BLOCK_D * head.stride_d
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
def without_dust(x):
    """fp32 x that a GEMM is to read in some dtype, 0 where it cannot matter: so no fp32 or bf16 value is denormal.

    fp16's denormals (2^-24 to 2^-14) stay: they carry information, and tensor cores take them at full speed.
    """
    return tl.where(tl.abs(x) < NEGLIGIBLE, 0.0, x)

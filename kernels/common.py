"""Device functions that several kernels share."""

import math

import torch
import triton
import triton.language as tl

from fastgrpo import inputs
from fastgrpo.backends import problem

NOWHERE = tl.constexpr(inputs.NOWHERE)
LOG2E, LN2 = tl.constexpr(math.log2(math.e)), tl.constexpr(math.log(2.0))
FLOOR, NOTHING = map(tl.constexpr, (problem.FLOOR, problem.NOTHING))
NEGLIGIBLE = tl.constexpr(problem.negligible(torch.float32))
ROOM, SMALLEST = map(tl.constexpr, (problem.ROOM, problem.SMALLEST))


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
        temperature = tl.load(temperature_ptr + rows, mask=mask, other=1.0)
        inverse = 1.0 / temperature
        inverse += inverse * tl.fma(-temperature, inverse, 1.0)  # GPUs divide to within 2 units of the last place
    else:
        inverse = tl.full((BLOCK_N,), logits.inv_temperature, tl.float32)
    return inverse


@triton.jit
def rounded_product(a, b):
    """a * b in fp32. As an fma: a plain product may be fused with what is subtracted from it, which must cancel."""
    return tl.fma(a, b, 0.0)


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
def entry_ids(ids_ptr, first, offs, V):
    """The entries at positions ``first + offs``, int64; some entry where there is none."""
    at = tl.minimum(first, V - 1) + tl.where(first + offs < V, offs, 0)
    return tl.load(ids_ptr + at).to(tl.int64) if ids_ptr is not None else at.to(tl.int64)


@triton.jit
def raw_logits(
    x_ptr,  # (held, D) rows of hidden, dense
    x_desc,  # of it, tiles of (BLOCK_N, BLOCK_D), and
    w_desc,  # of the weight or the chunk's entries of it, (BLOCK_V, BLOCK_D); None: by pointers
    head,  # Head
    bias_ptr,  # (V,) or None
    low_rank,  # LowRank or None
    ids_ptr,  # (V,) entry at each position; None: in their order
    rows,  # (BLOCK_N,) int64, of N: LoRA's
    at_x,  # the tile's first row of x
    last_x,  # its last row that counts; later ones may be anything
    first_v,  # the tile's first position
    first_w,  # its row of w_desc
    WHOLE_D: tl.constexpr,  # whether BLOCK_D divides D
    COMPUTE: tl.constexpr,  # operands are cast to it as they are loaded
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """hidden @ weight.T + low @ up.T + bias of one tile, (BLOCK_N, BLOCK_V) in fp32; anything beyond V."""
    offs_v = tl.arange(0, BLOCK_V)
    offs_d = tl.arange(0, BLOCK_D)
    acc = tl.zeros((BLOCK_N, BLOCK_V), dtype=tl.float32)
    if low_rank is not None:
        entries = entry_ids(ids_ptr, first_v, offs_v, head.V)
        for start in range(0, low_rank.depth, BLOCK_D):
            low = low_values(low_rank, rows[:, None], (start + offs_d)[None, :], COMPUTE)
            up = up_values(low_rank, entries[None, :], (start + offs_d)[:, None], COMPUTE)
            acc = tl.dot(low, up, acc, input_precision="ieee")
        acc *= tl.load(low_rank.scale_ptr)
    if w_desc is not None:
        for start in range(0, head.D, BLOCK_D):
            x = x_desc.load([at_x, start])
            w = w_desc.load([first_w, start])
            acc = tl.dot(x, w.T, acc)
    else:
        local_n = tl.minimum(tl.arange(0, BLOCK_N), last_x - at_x)  # within the tile in 32 bits
        x_ptrs = x_ptr + tl.cast(at_x, tl.int64) * head.D + local_n[:, None] * head.D + offs_d[None, :]
        if ids_ptr is not None:
            entries = entry_ids(ids_ptr, first_v, offs_v, head.V)
            w_ptrs = head.weight_ptr + entries[None, :] * head.stride_v + offs_d[:, None] * head.stride_d
        else:
            local_v = tl.where(first_v + offs_v < head.V, offs_v, 0)
            weight_base = head.weight_ptr + tl.cast(tl.minimum(first_v, head.V - 1), tl.int64) * head.stride_v
            w_ptrs = weight_base + local_v[None, :] * tl.cast(head.stride_v, tl.int64)
            w_ptrs = w_ptrs + offs_d[:, None] * head.stride_d
        for start in range(0, head.D, BLOCK_D):
            if WHOLE_D:
                x = tl.load(x_ptrs)
                w = tl.load(w_ptrs)
            else:
                x = tl.load(x_ptrs, mask=(start + offs_d < head.D)[None, :], other=0.0)
                w = tl.load(w_ptrs, mask=(start + offs_d < head.D)[:, None], other=0.0)
            acc = tl.dot(x.to(COMPUTE), w.to(COMPUTE), acc, input_precision="ieee")
            x_ptrs += BLOCK_D
            w_ptrs += BLOCK_D * head.stride_d
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + entry_ids(ids_ptr, first_v, offs_v, head.V)).to(tl.float32)
        acc += tl.where(bias < NOTHING, NOTHING, bias)[None, :]
    return acc


@triton.jit
def has_label(local, BLOCK_V: tl.constexpr):
    """Whether one of the labels, counted from a tile's first position, is in the tile: of most tiles none is."""
    return tl.max(((local >= 0) & (local < BLOCK_V)).to(tl.int32), axis=0) > 0


@triton.jit
def next_from(label, first):
    """The least label from an entry on; one that is no entry's where there is none."""
    return tl.min(tl.where(label >= first, label, NOWHERE), axis=0)


@triton.jit
def in_parts(x, PARTS: tl.constexpr):
    """(n, V) as (n, V // (2 * PARTS), PARTS, 2): a thread of the tensor cores' layout has all columns of a part."""
    return tl.reshape(x, (x.shape[0], x.shape[1] // (2 * PARTS), PARTS, 2))


@triton.jit
def sum_parts(x):
    """(n, PARTS) sums of what :func:`in_parts` shaped."""
    return tl.sum(tl.sum(x, axis=1), axis=2)


@triton.jit
def halves(x):
    """(n, V) as two of (n, V // 2): the first columns, the last ones. Free where a thread has some of both."""
    return tl.split(tl.permute(tl.reshape(x, (x.shape[0], 2, x.shape[1] // 2)), (0, 2, 1)))


@triton.jit
def pieces_of(x, CUTS: tl.constexpr):
    """(n, V) halved so many times: a tuple. What is computed piece by piece keeps few values alive at once."""
    pieces = (x,)
    for _ in tl.static_range(CUTS):
        finer = ()
        for k in tl.static_range(len(pieces)):
            finer += halves(pieces[k])
        pieces = finer
    return pieces


@triton.jit
def count_taken(taken, rows, mask, first):
    """(BLOCK_N,) int32: how many of each row's taken positions come before ``first``; by halving."""
    at = taken.positions_ptr + rows * taken.K
    low = tl.zeros_like(rows).to(tl.int32)
    high = tl.where(mask, taken.K, 0).to(tl.int32)
    size = taken.K
    while size > 0:
        middle = (low + high) // 2
        left = low < high
        before = left & (tl.load(at + middle, mask=left, other=0) < first)
        high = tl.where(before, high, middle)
        low = tl.where(before, middle + 1, low)
        size = size // 2
    return low


@triton.jit
def load_taken(taken, rows, mask, count):
    """(BLOCK_N,) the position that comes after ``count`` of them, int32."""
    at = taken.positions_ptr + rows * taken.K + count
    return tl.load(at, mask=mask & (count < taken.K), other=NOWHERE).to(tl.int32)


@triton.jit
def hide_taken(x, value, taken, rows, mask, count, upcoming, first_v, BLOCK_V: tl.constexpr):
    """x (BLOCK_N, BLOCK_V) with ``value`` at what is taken of a tile; then count and upcoming behind it.

    As many steps as the most that a row has there: of most tiles none or one.
    """
    offs_v, last = tl.arange(0, BLOCK_V), first_v + BLOCK_V
    while tl.min(upcoming, axis=0) < last:
        x = tl.where(offs_v[None, :] == (upcoming - first_v)[:, None], value, x)
        count += (upcoming < last).to(tl.int32)
        upcoming = load_taken(taken, rows, mask, count)
    return x, count, upcoming


@triton.jit
def chunk_panels(cuts_ptr, stops_ptr, chunk, first_row, last_row, PANEL: tl.constexpr):
    """-> first panel of a chunk of entries, the one after its last, and the rows that each of its panels holds.

    A panel is (rows, PANEL) of dlogits, dense; a chunk's stand one after the other. Rows come in whole PANELs, those of
    the chunk's first panel, which needs the most.
    """
    first = tl.load(cuts_ptr + chunk)
    last = tl.load(cuts_ptr + chunk + 1)
    stop = tl.load(stops_ptr + first, mask=first < last, other=0)
    rows = tl.maximum(tl.minimum(stop, last_row) - first_row, 0)
    return first, last, tl.cdiv(rows, PANEL) * PANEL


@triton.jit
def panel_pointers(panels_ptr, height, row, local_v, PANEL: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr):
    """Of a tile's rows, from ``row`` on, and columns: one wide offset, the others in 32 bits."""
    first = panels_ptr + tl.cast(local_v // PANEL * height + row, tl.int64) * PANEL
    first = first + tl.multiple_of(local_v % PANEL, BLOCK_V)
    return first + tl.arange(0, BLOCK_N)[:, None] * PANEL + tl.arange(0, BLOCK_V)[None, :]


@triton.jit
def hold(value, held, row, first_v, PANEL: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr):
    """A tile of logits into :class:`Held`, from its row ``row`` on."""
    CUTS: tl.constexpr = 1 if BLOCK_V > PANEL else 0
    COLS: tl.constexpr = BLOCK_V // 2**CUTS
    pieces = pieces_of(value, CUTS)
    for k in tl.static_range(2**CUTS):
        at = panel_pointers(held.logits_ptr, held.rows, row, first_v + k * COLS, PANEL, BLOCK_N, COLS)
        tl.store(at, pieces[k])


@triton.jit
def load_held(held, row, first_v, PANEL: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr):
    """A tile of logits that :func:`hold` stored."""
    return tl.load(panel_pointers(held.logits_ptr, held.rows, row, first_v, PANEL, BLOCK_N, BLOCK_V))


@triton.jit
def cap(z, logits):
    """Scale and softcap."""
    if logits.logit_scale is not None:
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
    slope = softcap_slope(raw, logits)
    if logits.logit_scale is not None:
        slope = slope * logits.logit_scale
    return slope


@triton.jit
def softcap_slope(raw, logits):
    """sech^2, in (0, 1], in a form that keeps its relative accuracy far out."""
    if logits.softcap is not None:
        z = raw
        if logits.logit_scale is not None:
            z = raw * logits.logit_scale
        e = tl.exp(-tl.abs(z * (2.0 / logits.softcap)))
        slope = 4.0 * e / ((1.0 + e) * (1.0 + e))
    else:
        slope = 1.0
    return slope


@triton.jit
def log1p_unit(y):
    """log(1 + y) for y in [-1/2, 1] to fp32 accuracy: 2 artanh(y / (2 + y)); the hardware's is not near 1."""
    s = y / (2.0 + y)
    q = s * s
    series = 1.0 + q * (1 / 3 + q * (1 / 5 + q * (1 / 7 + q * (1 / 9 + q * (1 / 11 + q * (1 / 13 + q / 15))))))
    return 2.0 * s * series


@triton.jit
def raw_size(size, inverse, logits):
    """Of a row's largest d loss / d logit that of its raw products, as ``row_scale`` counts it; NaN stays."""
    size = tl.where(size < SMALLEST, SMALLEST, size) * inverse
    if logits.logit_scale is not None:
        size *= tl.abs(logits.logit_scale)
    return size


@triton.jit
def to_room(x):
    """2^(ROOM - floor(log2(x))) of fp32 x > 0, from its exponent; see ``row_scale``."""
    field = tl.minimum(x.to(tl.int32, bitcast=True) >> 23, 253)
    return ((254 - field + ROOM) << 23).to(tl.float32, bitcast=True)


@triton.jit
def without_dust(x):
    """fp32 x that a GEMM is to read in some dtype, 0 where it cannot matter: so no fp32 or bf16 value is denormal.

    fp16's denormals (2^-24 to 2^-14) stay: they carry information, and tensor cores take them at full speed.
    """
    return tl.where(tl.abs(x) < NEGLIGIBLE, 0.0, x)


@triton.jit
def chunk_tiles(first, last, height, PANEL: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr):
    """How many tiles of dlogits a chunk has, see :func:`chunk_panels`."""
    return height // BLOCK_N * (last - first) * (PANEL // BLOCK_V)


@triton.jit
def dlogits_tile(
    number, first, last, height, stops_ptr, ids_ptr, first_row, last_row, copied_rows,
    PANEL: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """The ``number``-th tile of a chunk's dlogits, of :func:`chunk_tiles`; GROUP blocks of rows share entries in L2.

    -> its block of rows, its tile of columns; its first row, the row after its panel's last (0 where there is nothing
    to do); its first entry, and where a descriptor reads it.
    """
    across = (last - first) * (PANEL // BLOCK_V)
    in_group = GROUP * tl.maximum(across, 1)
    first_block, in_group = number // in_group * GROUP, number % in_group
    together = tl.maximum(tl.minimum(height // BLOCK_N - first_block, GROUP), 1)
    block, tile = first_block + in_group % together, in_group // together
    local_v = tile * BLOCK_V
    start = first_row + block * BLOCK_N
    is_there = (block * BLOCK_N < height) & (tile < across)
    stop = tl.load(stops_ptr + first + local_v // PANEL, mask=is_there, other=0)
    stop = tl.minimum(stop, last_row)
    stop = tl.where(first_row + block * BLOCK_N // PANEL * PANEL < stop, stop, 0)  # the GEMMs read PANELs of rows
    first_v = first * PANEL + local_v
    first_w = first_v if ids_ptr is None else copied_rows - (last - first) * PANEL + local_v
    return block, tile, start, stop, first_v, first_w


@triton.jit
def store_dlogits(
    dz, dlogits_ptr, sums_ptr, block, tile, height,
    PANEL: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """A tile of a chunk's dlogits, without dust, and the sums of its rows, where these are wanted."""
    if sums_ptr is not None:
        store_sums(tl.sum(dz, axis=1), sums_ptr, block, tile, height, BLOCK_N)
    store_piece(dz, dlogits_ptr, block, tile * BLOCK_V, height, PANEL, BLOCK_N, BLOCK_V)


@triton.jit
def store_sums(sums, sums_ptr, block, tile, height, BLOCK_N: tl.constexpr):
    tl.store(sums_ptr + tile * height + block * BLOCK_N + tl.arange(0, BLOCK_N), sums)


@triton.jit
def store_piece(
    dz, dlogits_ptr, block, local_v, height, PANEL: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr
):
    """Some columns of a chunk's dlogits, from ``local_v`` on."""
    out = panel_pointers(dlogits_ptr, height, block * BLOCK_N, local_v, PANEL, BLOCK_N, BLOCK_V)
    tl.store(out, dz.to(dlogits_ptr.dtype.element_ty))

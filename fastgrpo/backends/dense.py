"""The op in plain torch, exact: any device, any float dtype, chunked into a bounded workspace.

Tiles of logits are made in fp32 (fp64 for fp64 input) and overwritten in place; nothing of shape (N, V) is held.
"""

import math

import torch
import torch.nn.functional as F

from fastgrpo import lora
from fastgrpo.backends.problem import NOTHING, RowStats, negligible, new_gradients, plan_tiles, row_scale
from fastgrpo.inputs import IGNORE, accumulator_dtype, take_rows
from fastgrpo.row_math import gradient_at_label, rescaled, row_stats

# A tile that stays in a CPU core's share of the cache between the GEMM and the passes over it.
CPU_ROWS, CPU_COLS = 2048, 2048
LOG2_E = math.log2(math.e)
FAR = -1e4  # a log-probability below it is as good as -inf, and finite times 0


class Reader:
    """Chunks of hidden and weight, and of LoRA's pair, in the dtype the GEMM wants, cast as they are read."""

    def __init__(self, problem):
        self.problem = problem
        self.accumulate = accumulator_dtype(problem.hidden)
        self.compute = problem.params.compute_dtype
        # On CUDA a 16-bit GEMM can return its fp32 accumulator; elsewhere the operands are widened first, exactly.
        self.native = lora.has_native(problem.hidden) and self.compute in (torch.bfloat16, torch.float16)
        self.operand = self.compute if self.native else self.accumulate
        self.lora = None if problem.low is None else self.lora_operands(problem)

    def lora_operands(self, problem):
        if self.native:
            return problem.lora_operands
        return lora.Operands(problem.low.flatten(0, 1), problem.up, problem.up.shape[1], None, None)

    def cast(self, x):
        return x.to(self.compute).to(self.operand)

    def hidden(self, rows):  # (n,) -> (n, D)
        return self.cast(take_rows(self.problem.hidden, rows))

    def rows(self, index):
        """Each factor's rows: hidden (n, D) and, with LoRA, low (n, depth), see :class:`fastgrpo.lora.Operands`."""
        return [self.hidden(index)] + ([] if self.lora is None else [self.lora.low.index_select(0, index)])

    @property
    def heads(self):
        """Each factor's columns, not cast: weight (V, D) and, with LoRA, up (V, width)."""
        return [self.problem.weight] + ([] if self.lora is None else [self.lora.up])

    def columns(self, span):
        return [self.cast_columns(k, head[span]) for k, head in enumerate(self.heads)]

    def cast_columns(self, factor, x):
        """The head's as operands; LoRA's, which may be wider than the head, are ready or keep their accuracy."""
        if factor == 0 or self.native:
            return self.cast(x)
        return x.to(self.problem.params.lora_dtype).to(self.accumulate)

    def raw_logits(self, rows, columns, out):
        """The sum of the factors' products, (n, C) in the accumulator's dtype; ``out``: where to put it, or None."""
        z = self.mm(rows[0], columns[0].t(), out)
        if self.lora is None:
            return z
        if not self.native:
            return z.addmm_(rows[1], columns[1].t())
        product = lora.mm16(rows[1], columns[1][:, self.lora.columns].t())
        return z.add_(product if self.lora.scale is None else product * self.lora.scale)

    def paired_logits(self, rows, columns):
        """(n,): the raw logit of each row with the column beside it."""
        z = (rows[0].to(self.accumulate) * columns[0].to(self.accumulate)).sum(1)
        if self.lora is None:
            return z
        up = columns[1][:, self.lora.columns].to(self.accumulate)
        product = (rows[1].to(self.accumulate) * up).sum(1)
        return z + (product if self.lora.scale is None else product * self.lora.scale)

    def gradient_operands(self, rows, columns):
        """-> [(rows, columns)] of each factor, as a gradient's GEMMs read them."""
        pairs = list(zip(rows, columns))
        return pairs[:1] + [tuple(x[:, : self.lora.rank] for x in pair) for pair in pairs[1:]]

    def unscaled(self, side, x, factor):
        """In place: a factor's gradient without the power of two of the operand it was made with. side: "low", "up"."""
        return x if x is None or factor == 0 else unscaled(x, getattr(self.lora, f"{side}_scale"))

    def mm(self, a, b, out):  # (n, k), (k, m) -> (n, m) in the accumulator's dtype
        if self.native:
            return lora.mm16(a, b)
        return torch.mm(a, b) if out is None else torch.mm(a, b, out=out)

    def add_mm(self, total, a, b):  # total += a @ b
        if self.native:
            total += lora.mm16(a, b)
        else:
            total.addmm_(a, b)


def unscaled(x, scale):
    """x / scale in place, a copy would be as large as the gradient in fp32; either may be None."""
    return x if x is None or scale is None else x.div_(scale)


def transformed(problem, z, bias, inv_temperature, with_slope=False):
    """Logits from the raw product, in place; with_slope: also softcap's derivative, or None where it is 1."""
    slope = None
    if bias is not None:
        z += bias.to(z.dtype)
        z.clamp_(min=NOTHING)  # a column masked by -inf must not meet 0 * inf
    scale, softcap = problem.params.logit_scale, problem.params.softcap
    if scale != 1.0:
        z *= scale
    if softcap is not None:
        z /= softcap
        if with_slope:
            slope = 4 * torch.sigmoid(2 * z) * torch.sigmoid(-2 * z)
        z.tanh_().mul_(softcap)
    if inv_temperature is not None:
        z *= inv_temperature
    return z, slope


def row_inverse_temperature(problem, rows):
    """(n, 1) tensor, a number, or None where the temperature is 1."""
    if problem.temperature is not None:
        return 1.0 / problem.temperature[rows, None]
    return None if problem.params.temperature == 1.0 else 1.0 / problem.params.temperature


def tiling(problem, rows, buffers, held=0):
    """buffers: tiles alive at once. held: bytes of the workspace that are taken."""
    vocab, depth = problem.weight.shape[0], sum(columns.shape[1] for _, columns in problem.factors)
    size = 8 if problem.hidden.dtype == torch.float64 else 4
    max_rows, max_cols = (CPU_ROWS, CPU_COLS) if problem.hidden.device.type == "cpu" else (16384, 16384)
    budget, per_row, cell = problem.params.workspace - held, size * depth, size * buffers
    if problem.params.compute_dtype.itemsize == 2 and lora.has_native(problem.hidden):
        cell, per_row = cell + 2, per_row + 2 * depth  # the tile and its rows once more, in 16 bits
    return plan_tiles(min(rows, max_rows), min(vocab, max_cols), budget, cell, per_row, 2 * size * depth)


def forward(problem):
    """Per-row statistics: see :meth:`HeadProblem.new_stats`."""
    stats = problem.new_stats(accumulator_dtype(problem.hidden))
    rows, running, label = fold_vocabulary(problem)
    stats[:, rows] = combine(running, label)
    return stats


def partial_forward(problem):
    """What :func:`combine` needs, not yet combined: see :meth:`HeadProblem.new_partials`."""
    partials = problem.new_partials(accumulator_dtype(problem.hidden))
    rows, running, label = fold_vocabulary(problem)
    partials[:, rows] = torch.cat((running, label[None]))
    return partials


def new_running(problem, rows):
    """(3, n) running statistics of no column, (n,) labels' logits, NaN where no column is the label."""
    running = problem.new_partials(accumulator_dtype(problem.hidden))[:3, rows]
    return running, running.new_full((rows.numel(),), torch.nan)


class RowSource:
    """Rows of hidden (and of LoRA's low) as operands, gathered once where a quarter of the workspace holds them."""

    def __init__(self, reader, rows):
        depth = sum(columns.shape[1] for _, columns in reader.problem.factors)
        size = rows.numel() * depth * reader.operand.itemsize
        self.reader, self.rows, self.held, self.gathered = reader, rows, 0, None
        if size <= reader.problem.params.workspace // 4:
            self.held, self.gathered = size, reader.rows(rows)

    def __getitem__(self, part):
        if self.gathered is None:
            return self.reader.rows(self.rows[part])
        return [x[part] for x in self.gathered]


def logit_tiles(problem, rows, buffers, with_slope=False, multiple=1):
    """Transformed logits of some rows, tile by tile, all rows of one range of columns after the other.

    Yields ``z, slope, index, r, v, columns``: z (n, C), overwritten by the next tile, with ``multiple`` more than one
    padded to a multiple of it by rows of NOTHING; slope as :func:`transformed`'s; index (n,) the rows of the tile, of
    which the first is ``rows[r]``; v the first column; columns the factors' as operands. ``buffers``: how many tiles
    are alive at once.
    """
    reader, vocab, n = Reader(problem), problem.weight.shape[0], rows.numel()
    if n == 0:
        return
    source = RowSource(reader, rows)
    tile = tiling(problem, n, buffers, source.held)
    height = -(-min(tile.rows, n) // multiple) * multiple
    own_memory = reader.native and multiple == 1
    buffer = torch.empty(
        0 if own_memory else height, min(tile.cols, vocab), dtype=reader.accumulate, device=rows.device
    )
    for v in range(0, vocab, tile.cols):
        columns = reader.columns(slice(v, v + tile.cols))
        bias = None if problem.bias is None else problem.bias[v : v + tile.cols]
        for r in range(0, n, height):
            index = rows[r : r + height]
            whole = buffer[: -(-index.numel() // multiple) * multiple, : columns[0].shape[0]]
            factors = source[r : r + height]
            z = reader.raw_logits(factors, columns, None if own_memory else whole[: index.numel()])
            z, slope = transformed(problem, z, bias, row_inverse_temperature(problem, index), with_slope)
            if multiple > 1:
                if z.data_ptr() != whole.data_ptr():
                    whole[: index.numel()] = z
                whole[index.numel() :] = NOTHING
                z = whole
            yield z, slope, index, r, v, columns
            z = slope = None  # the last tile goes before the next one comes


def fold_vocabulary(problem):
    """-> counted rows (n,); (3, n) peak, sum of exp, sum of exp * (peak - z), all without the label; (n,) its logit."""
    rows = counted_rows(problem.targets)
    running, label = new_running(problem, rows)
    for z, _, index, r, v, _ in logit_tiles(problem, rows, buffers=2 if problem.params.entropy else 1):
        part = slice(r, r + index.numel())
        fold_tile(z, problem.targets[index] - v, running[:, part], label[part], problem.params.entropy)
        z = None  # the last tile goes before the next one comes
    return rows, running, label


def exp_(z):
    """e^z in place, 0 where that is :func:`fastgrpo.backends.problem.negligible`.

    On a CPU by exp2, kept from underflow: torch.exp is 4 times slower, or 30 where it underflows.
    """
    if z.device.type != "cpu":
        return z.exp_()
    return F.threshold_(z.mul_(LOG2_E), math.log2(negligible(z.dtype)), -math.inf).exp2_()


def without_denormals(dz):
    """0 in place of what is negligible, in place: on Intel CPUs a GEMM over denormals is 40 times slower. A GPU's GEMMs
    do not mind."""
    return torch.ops.aten.hardshrink.out(dz, negligible(dz.dtype), out=dz) if dz.device.type == "cpu" else dz


def fold_tile(z, local, running, label, entropy):
    """Fold one tile of logits into the running statistics, the label's own logit kept apart. Overwrites z.

    Returns:
        (n, C) exp(z - peak), 0 at the label; (n,) the factor that what was summed before with the old peak wants.
    """
    take_label(z, local, label)
    peak, total, spread = running
    new_peak = torch.maximum(peak, z.amax(1))
    old_total, old_spread, decay = rescaled(peak, total, spread, new_peak)
    z -= new_peak[:, None]
    if entropy:
        weighted = exp_(z.clamp_(min=FAR).clone())
        z *= weighted
        torch.sub(old_spread, z.sum(1), out=spread)
        z = weighted
    else:
        exp_(z)
    torch.add(old_total, z.sum(1), out=total)
    peak.copy_(new_peak)
    return z, decay


def take_label(z, local, label):
    """Move the label's logit out of the tile into ``label``, for the rows whose label is in it."""
    inside = (local >= 0) & (local < z.shape[1])
    index = local.clamp(0, z.shape[1] - 1)[:, None]
    found = z.gather(1, index).squeeze(1)
    label.copy_(torch.where(inside, found, label))
    z.scatter_(1, index, torch.where(inside, NOTHING, found)[:, None])


def combine(running, label):
    """(5, n) :class:`RowStats` from the running ones, (n,) each, and the labels' logits."""
    return torch.stack(row_stats(*running, label))


def backward(problem, stats, grad_logp, grad_entropy, needs):
    """Gradients of hidden, weight and bias, and with LoRA of low and up, logits recomputed tile by tile.

    Args:
        grad_logp: (N,) incoming gradient of the log-probs. grad_entropy: (N,) or None.
        needs: a bool for each of them; the result has None where it is False.
    """
    grads = [grad_logp] if grad_entropy is None else [grad_logp, grad_entropy]
    active = (problem.targets != IGNORE) & torch.stack([g != 0 for g in grads]).any(0)
    out = new_gradients(problem, needs)
    if any(needs):
        add_exact_rows(problem, stats, active.nonzero().squeeze(1), grads, out)
    return out


def add_exact_rows(problem, stats, rows, grads, out, extra=None):
    """Write the gradients of some rows into ``out``, fresh from :func:`new_gradients`, every column of each.

    Args:
        rows: (n,) the rows, rising. grads: [(N,)] of the log-probs and, if it has one, of the entropy.
        extra: None, or something whose ``add(span, d_columns, d_bias)`` adds other rows' part, chunk by chunk.
    """
    reader = Reader(problem)
    vocab, n = problem.weight.shape[0], rows.numel()
    d_rows_out, d_columns_out, d_bias_out = out.of_rows, out.of_head, out.bias
    if n == 0 and extra is None:
        for x in d_columns_out:
            if x is not None:
                x.zero_()
        return
    source = RowSource(reader, rows)
    tile = tiling(problem, n, 2 if problem.params.softcap or len(grads) > 1 else 1, source.held)
    frozen = d_bias_out is None and all(x is None for x in d_columns_out)
    if frozen and n > tile.rows:  # finish dX a chunk of rows at a time
        for part in rows.split(tile.rows):
            add_exact_rows(problem, stats, part, grads, out)
        return
    buffer = stats.new_empty(0 if reader.native else min(tile.rows, n), min(tile.cols, vocab))
    scale = row_scale(*(g[rows] for g in grads)) if reader.native and n else None
    totals = [rows_accumulator(x, n, reader.accumulate) for x in d_rows_out]
    for v in range(0, vocab, tile.cols):
        span = slice(v, min(v + tile.cols, vocab))
        columns = reader.columns(span)
        bias = None if problem.bias is None else problem.bias[span]
        d_columns = [accumulator(x, span, stats.dtype, in_place=scale is None and n > 0) for x in d_columns_out]
        d_bias = accumulator(d_bias_out, span, stats.dtype, in_place=scale is None)
        for r in range(0, n, tile.rows):
            z = dz = factors = operands = None  # the last tile goes before the next one comes
            index = rows[r : r + tile.rows]
            factors = source[r : r + tile.rows]
            operands = reader.gradient_operands(factors, columns)
            z = reader.raw_logits(factors, columns, buffer[: index.numel(), : columns[0].shape[0]])
            row_grads = [g[index] if scale is None else g[index] * scale for g in grads]
            dz = logits_gradient(problem, z, bias, index, problem.targets[index] - v, stats[:, index], *row_grads)
            if d_bias is not None:
                d_bias += dz.sum(0)
            if reader.native:
                dz = dz.to(reader.compute)
            for (x, w), total, d_column in zip(operands, totals, d_columns):
                if total is not None:
                    reader.add_mm(total[r : r + tile.rows], dz, w)
                if d_column is not None and r == 0 and not reader.native:
                    reader.mm(dz.t(), x, d_column)
                elif d_column is not None:
                    reader.add_mm(d_column, dz.t(), x)
        if scale is not None:
            for x in (*d_columns, d_bias):
                unscaled(x, scale)
            d_columns = [reader.unscaled("low", x, k) for k, x in enumerate(d_columns)]
        if extra is not None:
            extra.add(span, d_columns, d_bias)
        for destination, value in zip((*d_columns_out, d_bias_out), (*d_columns, d_bias)):
            if destination is not None and value.data_ptr() != destination[span].data_ptr():
                destination[span] = value
    for k, (d_rows, total) in enumerate(zip(d_rows_out, totals)):
        if total is not None and scale is not None:
            reader.unscaled("up", unscaled(total, scale), k)
        if total is None or total.data_ptr() == d_rows.data_ptr():
            continue
        for index, value in zip(rows.split(tile.rows), total.split(tile.rows)):
            d_rows.flatten(0, 1).index_copy_(0, index, value.to(d_rows.dtype))


def accumulator(destination, span, dtype, in_place):
    """Where to sum one chunk of dW or db: the chunk itself where its dtype is the accumulator's, else zeros."""
    if destination is None:
        return None
    chunk = destination[span]
    return chunk if in_place and chunk.dtype == dtype else torch.zeros_like(chunk, dtype=dtype)


def rows_accumulator(d_rows, n, dtype):
    """Where dX is summed over the vocabulary chunks: dX itself when it has the dtype and every row is active."""
    if d_rows is None:
        return None
    flat = d_rows.flatten(0, 1)
    return flat if d_rows.dtype == dtype and 0 < n == len(flat) else flat.new_zeros(n, flat.shape[1], dtype=dtype)


def logits_gradient(problem, z, bias, index, local, stats, grad_logp, grad_entropy=None):
    """d loss / d raw logits of one tile, over z's memory: g (onehot - p) - h p (log p + H), chained to the raw product.

    The label's term is made of the statistics.
    """
    inv_temperature = row_inverse_temperature(problem, index)
    chain = problem.params.logit_scale * (1.0 if inv_temperature is None else inv_temperature)
    z, slope = transformed(problem, z, bias, inv_temperature, with_slope=True)
    rows = RowStats(*stats)
    z.sub_(rows.peak[:, None]).sub_(rows.offset[:, None])
    at_label = gradient_at_label(grad_logp, grad_entropy, rows.logp, rows.other_mass, rows.entropy)
    if grad_entropy is None:
        exp_(z).mul_(-grad_logp[:, None] * chain)
    else:
        p = exp_(z.clamp_(min=FAR).clone())
        z += rows.entropy[:, None]
        z.mul_(-grad_entropy[:, None]).sub_(grad_logp[:, None]).mul_(p).mul_(chain)
    inside = (local >= 0) & (local < z.shape[1])
    column = local.clamp(0, z.shape[1] - 1)[:, None]
    z.scatter_(1, column, torch.where(inside[:, None], at_label[:, None] * chain, z.gather(1, column)))
    return without_denormals(z if slope is None else z.mul_(slope))


def label_positions(columns, targets):
    """(n,) where in the rising ``columns`` each label stands, or -1."""
    at = torch.searchsorted(columns, targets)
    found = columns[at.clamp(max=columns.numel() - 1)] == targets
    return torch.where(found, at, -1)


def counted_rows(targets):
    """(n,) the rows that are not ignored; the host waits for their number."""
    return (targets.reshape(-1) != IGNORE).nonzero().squeeze(1)


def kept_logits(problem, support):
    """(K,) raw logits of the kept entries, each one row of hidden times one of the head; 0 where ignored."""
    reader = Reader(problem)
    out = torch.zeros(support.ids.shape, dtype=reader.accumulate, device=problem.hidden.device)
    entries = (problem.targets[support.rows] != IGNORE).nonzero().squeeze(1)
    for part in entries.split(entries_at_once(problem)):
        out[part] = reader.paired_logits(reader.rows(support.rows[part]), reader.columns(support.ids[part]))
    return out


def entries_at_once(problem):
    """How many pairs of rows, their products and their sums fit half the workspace."""
    depth = sum(columns.shape[1] for _, columns in problem.factors)
    return max(problem.params.workspace // (2 * 4 * accumulator_dtype(problem.hidden).itemsize * depth), 1)


def kept_sums(problem, source, coefficients, index, offsets, cast, dtype):
    """out[m] = sum of ``coefficients[e] * source[index[e]]`` over offsets[m] <= e < offsets[m + 1], in that order.

    Args:
        source: (B, T, D), any strides, of B * T rows, read as ``cast``. coefficients, index: (K,). offsets: (M + 1,).

    Returns:
        (M, D) in ``dtype``, summed in the accumulator's. An entry whose coefficient is 0 is not read.
    """
    out = torch.zeros(offsets.numel() - 1, source.shape[2], dtype=dtype, device=source.device)
    entries = (coefficients != 0).nonzero().squeeze(1)
    if not entries.numel():
        return out
    owner = torch.searchsorted(offsets[1:].contiguous(), entries, right=True)
    begun = None  # an owner whose entries began in the last chunk, and its sum so far
    for part, mine in zip(*(x.split(entries_at_once(problem)) for x in (entries, owner))):
        rows = take_rows(source, index[part]).to(cast)
        products = rows.to(coefficients.dtype) * coefficients[part, None]
        owners, counts = torch.unique_consecutive(mine, return_counts=True)
        total = torch.segment_reduce(products, "sum", lengths=counts, axis=0, unsafe=True)
        if begun is not None:
            total[0] += torch.where(owners[0] == begun[0], begun[1], 0.0)
        out.index_copy_(0, owners, total.to(out.dtype))
        begun = owners[-1], total[-1]
    return out

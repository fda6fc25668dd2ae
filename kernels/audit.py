"""Which rows each entry's gradient needs whole, on the device: :mod:`fastgrpo.backends.row_audit` in eleven launches.

The dlogits of the sampled entries come from the backward's own kernel, to which the samples are a small vocabulary: the
ranking ones, then the audited ones, each filled up to whole panels.
"""

import itertools
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from fastgrpo import lora
from fastgrpo.backends import row_audit
from fastgrpo.backends.row_audit import SKETCH, STEPS, WITHIN
from fastgrpo.kernels import tiles
from fastgrpo.kernels.row_order import LARGEST, SPARSE, USABLE, order_rows
from fastgrpo.kernels.samples import SampleWork, samples_on
from fastgrpo.kernels.tiles import cdiv

PARTS = 32  # of the rows, whose masses are added up apart
AUDIT_STEPS = tl.constexpr(STEPS)


@triton.jit
def sampled(dlogits_ptr, states_ptr, places, columns, height, mask_n, PANEL: tl.constexpr):
    """(n, C) dlogits of rows of the certificate's order and columns of the chunk, 0 of unusable ones; (n,) usable."""
    usable = mask_n & ((tl.load(states_ptr + places, mask=mask_n, other=0) & USABLE) != 0)
    at = (columns // PANEL).to(tl.int64)[None, :] * height * PANEL + (columns % PANEL)[None, :]
    at += places.to(tl.int64)[:, None] * PANEL
    return tl.load(dlogits_ptr + at, mask=usable[:, None], other=0.0), usable


@triton.jit
def keeps(flags_ptr, blocks, words, ids, mask_n, TILE: tl.constexpr):
    """(n, C) whether blocks of the certificate keep entries; columns as in flags.pack_flags."""
    W: tl.constexpr = TILE // 32
    column = ids % TILE
    at = (ids // TILE * W + column % W)[None, :] + blocks.to(tl.int64)[:, None] * words
    word = tl.load(flags_ptr + at, mask=mask_n[:, None], other=0)
    return ((word >> (column // W)[None, :]) & 1) != 0


@triton.jit
def kept_samples(kept_ptr, blocks, columns, samples, mask_n):
    """(n, C) what :func:`keeps` says of some columns of all samples, read from where it was written."""
    at = kept_ptr + blocks.to(tl.int64)[:, None] * samples + columns[None, :]
    return tl.load(at, mask=mask_n[:, None], other=0) != 0


@triton.jit(do_not_specialize=["N", "height", "blocks"])
def mass_kernel(
    dlogits_ptr,  # panels of the chunk
    states_ptr,  # (N,) uint8
    ids_ptr,  # (samples,) all samples
    flags_ptr,  # (blocks, words) int32
    masses_ptr,  # (parts, columns) fp32 out: of each column the sum of sizes over a part of the rows
    kept_ptr,  # (blocks, samples) uint8 out: whether each block of the certificate keeps each sample
    columns,
    N,
    height,
    blocks,  # 0: with the chunk before, ``kept`` was written
    words,
    samples,  # whole panels of them
    TILE: tl.constexpr,
    PANEL: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_B: tl.constexpr,
):
    """Flags are read here once: of each sample they lie in a word of their own, far from those of the others."""
    panels = samples // PANEL
    for tile in range(tl.program_id(0), tl.cdiv(blocks, BLOCK_B) * panels, tl.num_programs(0)):
        sample = tile % panels * PANEL + tl.arange(0, PANEL)
        block = tile // panels * BLOCK_B + tl.arange(0, BLOCK_B)
        kept = keeps(flags_ptr, block, words, tl.load(ids_ptr + sample), block < blocks, TILE)
        at = kept_ptr + block.to(tl.int64)[:, None] * samples + sample[None, :]
        tl.store(at, kept.to(tl.uint8), mask=(block < blocks)[:, None])
    parts = tl.num_programs(0) // (columns // PANEL)
    part, panel = tl.program_id(0) % parts, tl.program_id(0) // parts
    column = panel * PANEL + tl.arange(0, PANEL)
    rows = tl.cdiv(N, parts)
    last = tl.minimum((part + 1) * rows, N)
    total = tl.zeros((PANEL,), tl.float32)
    for first in range(part * rows, last, BLOCK_N):
        places = first + tl.arange(0, BLOCK_N)
        dz, _ = sampled(dlogits_ptr, states_ptr, places, column, height, places < last, PANEL)
        total += tl.sum(tl.abs(dz.to(tl.float32)), axis=0)
    tl.store(masses_ptr + part * columns + column, total)


@triton.jit(do_not_specialize=["N", "height", "count", "parts"])
def share_kernel(
    dlogits_ptr,  # panels of the chunk
    states_ptr,  # (N,) uint8
    kinds_ptr,  # (N,) uint8
    costs_ptr,  # (N,) fp32
    masses_ptr,  # (parts, columns) fp32
    kept_ptr,  # (blocks, samples) uint8
    shares_ptr,  # (N,) fp32, of the chunks before; out
    keys_ptr,  # (N,) fp32 out, with the last chunk: what the rows are ranked by, inf where they are not
    N,
    height,
    first_column,  # of the chunk's
    columns,
    count,  # samples to rank by
    parts,
    samples,
    CERTIFIED: tl.constexpr,  # rows of a block of the certificate
    PARTS: tl.constexpr,  # at least as many as there are
    PANEL: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Each row's sum over the samples of the part of their mass that it leaves out."""
    places = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = places < N
    total = tl.load(shares_ptr + places, mask=mask_n & (first_column > 0), other=0.0)
    for first in range(0, columns, PANEL):
        column = first + tl.arange(0, PANEL)
        part = tl.arange(0, PARTS)
        at = masses_ptr + part[:, None] * columns + column[None, :]
        mass = tl.sum(tl.load(at, mask=(part < parts)[:, None], other=0.0), axis=0)
        counted = (mass > 0) & (first_column + column < count)
        weight = tl.where(counted, 1.0 / tl.where(counted, mass, 1.0), 0.0)
        dz, _ = sampled(dlogits_ptr, states_ptr, places, column, height, mask_n, PANEL)
        sample = first_column + column
        kept = kept_samples(kept_ptr, places // CERTIFIED, sample, samples, mask_n)
        total += tl.sum(tl.where(kept, 0.0, tl.abs(dz.to(tl.float32)) * weight[None, :]), axis=1)
    tl.store(shares_ptr + places, total, mask=mask_n)
    key = total * tl.load(costs_ptr + places, mask=mask_n, other=0.0)
    key = tl.where(key < LARGEST, key, LARGEST)
    sparse = tl.load(kinds_ptr + places, mask=mask_n, other=0) == SPARSE
    tl.store(keys_ptr + places, tl.where(sparse, key, float("inf")), mask=mask_n)


@triton.jit(do_not_specialize=["N", "height", "columns", "blocks_a"])
def lost_kernel(
    dlogits_ptr,  # panels of the chunk
    states_ptr,  # (N,) uint8
    ranked_ptr,  # (N,) int64 places in the certificate's order, those that lose least first
    count_ptr,  # (1,) rows that are ranked
    x_ptr,  # (N, depth) what the gradient's GEMM multiplies dlogits with, in the certificate's order
    kept_ptr,  # (blocks, samples) uint8
    sums_ptr,  # (2, STEPS, columns, depth) fp32 out: what each step's rows leave out of the entries' gradients, and
    # what as many parts of all rows bring to them
    N,
    height,
    first_column,
    columns,
    blocks_a,
    samples,
    depth,
    stride_x,
    COMPUTE: tl.constexpr,
    CERTIFIED: tl.constexpr,
    PANEL: tl.constexpr,
    BLOCK_A: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    part = tl.program_id(0) % (2 * AUDIT_STEPS)
    step = part % AUDIT_STEPS
    block = tl.program_id(0) // (2 * AUDIT_STEPS)
    column = block % blocks_a * BLOCK_A + tl.arange(0, BLOCK_A)
    offs_d = block // blocks_a * BLOCK_D + tl.arange(0, BLOCK_D)
    mask_d = (offs_d < depth)[None, :]
    count = (tl.load(count_ptr) if part < AUDIT_STEPS else N).to(tl.int64)
    first, last = (count * step // AUDIT_STEPS).to(tl.int32), (count * (step + 1) // AUDIT_STEPS).to(tl.int32)
    total = tl.zeros((BLOCK_A, BLOCK_D), tl.float32)
    if part < AUDIT_STEPS:
        sample = first_column + column
        for n in range(first, last, BLOCK_N):
            rank = n + tl.arange(0, BLOCK_N)
            mask_n = rank < last
            places = tl.load(ranked_ptr + rank, mask=mask_n, other=0)
            dz, usable = sampled(dlogits_ptr, states_ptr, places, column, height, mask_n, PANEL)
            kept = kept_samples(kept_ptr, places // CERTIFIED, sample, samples, mask_n)
            dz = tl.where(kept, 0.0, dz).to(COMPUTE)
            x = tl.load(x_ptr + places[:, None] * stride_x + offs_d[None, :], mask=usable[:, None] & mask_d, other=0.0)
            total = tl.dot(tl.trans(dz), x.to(COMPUTE), total, input_precision="ieee")
    else:
        for n in range(first, last, BLOCK_N):
            places = (n + tl.arange(0, BLOCK_N)).to(tl.int64)
            dz, usable = sampled(dlogits_ptr, states_ptr, places, column, height, places < last, PANEL)
            x = tl.load(x_ptr + places[:, None] * stride_x + offs_d[None, :], mask=usable[:, None] & mask_d, other=0.0)
            total = tl.dot(tl.trans(dz.to(COMPUTE)), x.to(COMPUTE), total, input_precision="ieee")
    out = (part * tl.cast(columns, tl.int64) + column)[:, None] * depth + offs_d[None, :]
    tl.store(sums_ptr + out, total, mask=mask_d)


@triton.jit(do_not_specialize=["columns", "first_audited", "count", "known"])
def error_kernel(
    sums_ptr,  # (2, STEPS, columns, depth) fp32 of lost_kernel
    errors_ptr,  # (1 + STEPS, audited) fp32, of the gradients before; out, see row_audit.fewest_whole
    columns,  # of the chunk
    first_audited,  # the first of them among the audited
    count,  # audited entries
    audited,  # columns of errors
    known,  # whether gradients came before
    depth,
    BLOCK_D: tl.constexpr,
):
    """Relative errors of an entry's gradients, NaN where these are 0; of several gradients the largest."""
    column = tl.program_id(0)
    steps = tl.arange(0, AUDIT_STEPS)
    lost_ptr = sums_ptr + (steps * tl.cast(columns, tl.int64) + column)[:, None] * depth
    whole_ptr = lost_ptr + AUDIT_STEPS * tl.cast(columns, tl.int64) * depth
    square = tl.zeros((), tl.float32)
    squares = tl.zeros((AUDIT_STEPS,), tl.float32)
    for first in range(0, depth, BLOCK_D):
        offs_d = first + tl.arange(0, BLOCK_D)
        mask = (offs_d < depth)[None, :]
        whole = tl.sum(tl.load(whole_ptr + offs_d[None, :], mask=mask, other=0.0), axis=0)
        lost = tl.cumsum(tl.load(lost_ptr + offs_d[None, :], mask=mask, other=0.0), axis=0)
        square += tl.sum(whole * whole, axis=0)
        squares += tl.sum(lost * lost, axis=1)
    counts = (square > 0) & (first_audited + column < count)
    norm = tl.where(counts, tl.sqrt(square), float("nan"))
    out = errors_ptr + first_audited + column
    before = tl.load(out, mask=known != 0, other=float("nan"))
    tl.store(out, larger_error(0.0 / norm, before))
    out += (1 + steps) * audited
    before = tl.load(out, mask=(steps < AUDIT_STEPS) & (known != 0), other=float("nan"))
    tl.store(out, larger_error(tl.sqrt(squares) / norm, before))


@triton.jit
def larger_error(error, before):
    """Of NaN and a number the number."""
    return tl.where((error > before) | (before != before), error, before)


@triton.jit(do_not_specialize=["tolerance", "tight", "allowed", "allowed_tight", "entries"])
def choose_kernel(
    errors_ptr,  # (1 + STEPS, audited) fp32; NaN: does not count
    count_ptr,  # (1,) rows that are ranked
    kept_ptr,  # (1,) int32 out: how many of them are left to their kept entries
    audited,
    tolerance,  # of the errors, and that of the other limit
    tight,
    allowed,  # errors over each that are allowed, if all entries count
    allowed_tight,
    entries,
    BLOCK: tl.constexpr,
):
    """:func:`row_audit.fewest_whole`, by one program."""
    counted = tl.zeros((BLOCK,), tl.int32)
    for first in range(0, audited, BLOCK):
        offs = first + tl.arange(0, BLOCK)
        error = tl.load(errors_ptr + AUDIT_STEPS * audited + offs, mask=offs < audited, other=float("nan"))
        counted += (error == error).to(tl.int32)
    share = tl.sum(counted, axis=0).to(tl.float32)
    step, going = 0, 1
    for k in range(1, AUDIT_STEPS + 1):
        over = tl.zeros((BLOCK,), tl.int32)
        over_tight = tl.zeros((BLOCK,), tl.int32)
        for first in range(0, audited, BLOCK):
            offs = first + tl.arange(0, BLOCK)
            error = tl.load(errors_ptr + k * audited + offs, mask=offs < audited, other=float("nan"))
            over += (error > tolerance).to(tl.int32)
            over_tight += (error > tight).to(tl.int32)
        fine = tl.sum(over, axis=0).to(tl.float32) <= allowed * share / entries
        fine_tight = tl.sum(over_tight, axis=0).to(tl.float32) <= allowed_tight * share / entries
        going = going * fine.to(tl.int32) * fine_tight.to(tl.int32)
        step += going
    count = tl.load(count_ptr).to(tl.int64)
    tl.store(kept_ptr, (count * step // AUDIT_STEPS).to(tl.int32))


def choose(errors, count, kept, tolerance, vocab, audited):
    """kept (1,) int32 out: how many of ``count`` ranked rows are left to their kept entries.

    Args:
        errors: (1 + STEPS, columns) float32, of which ``audited`` are entries.
    """
    (part, share), (tight, share_tight) = WITHIN
    choose_kernel[(1,)](
        errors_ptr=errors,
        count_ptr=count,
        kept_ptr=kept,
        audited=errors.shape[1],
        tolerance=part * tolerance,
        tight=tight * tolerance,
        allowed=row_audit.allowed_over(share, audited, vocab),
        allowed_tight=row_audit.allowed_over(share_tight, audited, vocab),
        entries=float(audited),
        BLOCK=1024,
    )


class Memory(NamedTuple):
    """What an audit takes of the workspace: host numbers only."""

    rows: int  # of a panel
    ranking: int  # panels at once; 0: not even one fits
    audited: int


def plan_memory(problem, needs):
    """:class:`Memory`. Hidden's rows, gathered, stand in the room of dX's sum where there is to be one."""
    n, _, depth = problem.sizes
    rows, size = cdiv(n, tiles.WIDTH) * tiles.WIDTH, problem.params.compute_dtype.itemsize
    depths = operand_depths(problem, needs)
    room = problem.params.workspace - 4 * n * sum(depths)
    if not needs.hidden:
        room -= n * depth * problem.hidden.element_size()
    panel, widest = rows * tiles.WIDTH * size, max(depths)
    audited = panel + 2 * STEPS * tiles.WIDTH * widest * 4
    return Memory(rows, max(room, 0) // panel, max(room, 0) // audited)


def operand_depths(problem, needs):
    """Columns of what each gradient's GEMM multiplies dlogits with."""
    depths = [min(entries.shape[1], SKETCH) for (_, entries), need in zip(problem.factors, needs.of_head) if need]
    return depths + [1] * bool(needs.bias)


class Audit:
    """Audits the rows of a certificate; :meth:`places` is the result.

    Args:
        weights: :class:`fastgrpo.kernels.row_order.Weights`. memory: :class:`Memory`, in which something fits.
        launcher: makes dlogits of a :class:`SampleWork`.
    """

    def __init__(self, problem, stats, certificate, weights, grad_logp, needs, memory, launcher):
        self.problem, self.certificate, self.weights, self.needs = problem, certificate, weights, needs
        (self.n, vocab, _), self.device, self.rows = problem.sizes, problem.hidden.device, memory.rows
        self.samples = samples_on(str(self.device), vocab)
        width = tiles.WIDTH
        first, end = self.samples.first // width, self.samples.ids.numel() // width
        ranked = spread_out(0, cdiv(self.samples.ranking, width), memory.ranking)
        audited = spread_out(first, end, memory.audited)
        self.ranked, self.audited = self.chunks(ranked, 0), self.chunks(audited, len(ranked))
        self.work = SampleWork(problem, certificate.order, self.samples, memory.rows, ranked + audited)
        self.launch = launcher(self.work, problem, stats, grad_logp, weights.scale)
        self.dlogits = self.work.panels.dlogits
        shape = len(certificate.flags), self.samples.ids.numel()
        self.kept = torch.empty(shape, dtype=torch.uint8, device=self.device)  # whether blocks keep samples

    @staticmethod
    def chunks(bounds, at):
        """[(number, first column, last column)]"""
        pairs = itertools.pairwise(bounds)
        return [(at + k, first * tiles.WIDTH, last * tiles.WIDTH) for k, (first, last) in enumerate(pairs)]

    def places(self, tolerance):
        """-> places (N,) in a ranking of the rows, and (1,) how many of them may be left to their kept entries."""
        ranked, places, count = order_rows(self.keys(), None, places=True)
        errors = self.errors(ranked, count)
        kept = torch.empty_like(count)
        choose(errors, count, kept, tolerance, self.problem.weight.shape[0], self.samples.audited)
        return places, kept

    def keys(self):
        """(N,) fp32 what the rows are ranked by, see :meth:`row_audit.RowAudit.tail`."""
        n, parts, (blocks, words) = self.n, min(PARTS, cdiv(self.n, tiles.WIDTH)), self.certificate.flags.shape
        shares, keys = (torch.empty(n, dtype=torch.float32, device=self.device) for _ in range(2))
        for chunk, first, last in self.ranked:
            self.launch.dlogits(0, n, chunk)
            columns = last - first
            masses = torch.empty(parts, columns, dtype=torch.float32, device=self.device)
            mass_kernel[(parts * (columns // tiles.WIDTH),)](
                dlogits_ptr=self.dlogits,
                states_ptr=self.weights.states,
                ids_ptr=self.samples.ids,
                flags_ptr=self.certificate.flags,
                masses_ptr=masses,
                kept_ptr=self.kept,
                columns=columns,
                N=n,
                height=self.rows,
                blocks=0 if first > 0 else blocks,
                words=words,
                samples=self.samples.ids.numel(),
                TILE=self.certificate.tile,
                PANEL=tiles.WIDTH,
                BLOCK_N=32,
                BLOCK_B=8,
            )
            share_kernel[(cdiv(n, 32),)](
                dlogits_ptr=self.dlogits,
                states_ptr=self.weights.states,
                kinds_ptr=self.weights.kinds,
                costs_ptr=self.weights.costs,
                masses_ptr=masses,
                kept_ptr=self.kept,
                shares_ptr=shares,
                keys_ptr=keys,
                N=n,
                height=self.rows,
                first_column=first,
                columns=columns,
                count=self.samples.ranking,
                parts=parts,
                samples=self.samples.ids.numel(),
                CERTIFIED=self.certificate.block,
                PARTS=PARTS,
                PANEL=tiles.WIDTH,
                BLOCK_N=32,
            )
        return keys

    def errors(self, ranked, count):
        """(1 + STEPS, columns) relative errors of the audited entries, see :func:`row_audit.fewest_whole`."""
        columns = self.samples.ids.numel() - self.samples.first
        errors = torch.empty(1 + STEPS, columns, dtype=torch.float32, device=self.device)
        operands = self.operands()
        for chunk, first, last in self.audited:
            self.launch.dlogits(0, self.n, chunk)
            for k, x in enumerate(operands):
                sums = torch.empty(2, STEPS, last - first, x.shape[1], dtype=torch.float32, device=self.device)
                self.add_up(ranked, count, x, first, sums)
                error_kernel[(last - first,)](
                    sums_ptr=sums,
                    errors_ptr=errors,
                    columns=last - first,
                    first_audited=first - self.samples.first,
                    count=self.samples.audited,
                    audited=columns,
                    known=int(k > 0),
                    depth=x.shape[1],
                    BLOCK_D=min(triton.next_power_of_2(x.shape[1]), SKETCH),
                )
        return errors

    def add_up(self, ranked, count, x, first, sums):
        columns, tile = sums.shape[2], tiles.for_audit(self.dlogits.dtype)
        blocks, cols = columns // tile.rows, max(min(tile.cols, triton.next_power_of_2(x.shape[1])), 16)
        lost_kernel[(2 * STEPS * blocks * cdiv(x.shape[1], cols),)](
            dlogits_ptr=self.dlogits,
            states_ptr=self.weights.states,
            ranked_ptr=ranked,
            count_ptr=count,
            x_ptr=x,
            kept_ptr=self.kept,
            sums_ptr=sums,
            N=self.n,
            height=self.rows,
            first_column=first,
            columns=columns,
            blocks_a=blocks,
            samples=self.samples.ids.numel(),
            depth=x.shape[1],
            stride_x=x.stride(0),
            COMPUTE=tl.float32 if self.dlogits.dtype == torch.float32 else tl.bfloat16,
            CERTIFIED=self.certificate.block,
            PANEL=tiles.WIDTH,
            BLOCK_A=tile.rows,
            BLOCK_D=cols,
            BLOCK_N=tile.depth,
            **tile.options,
        )

    def operands(self):
        """Of each gradient what its GEMM multiplies dlogits with, (N, depth) in the certificate's order; long rows in
        short, whose norms are then off by a 20th, either way."""
        found, low = [], self.problem.lora_operands
        if self.needs.weight:
            found.append(self.shorten(self.work.gathered[0]))
        if self.needs.up:
            found.append(low.low[:, : low.rank].index_select(0, self.certificate.order))
        if self.needs.bias:
            found.append(torch.ones(self.n, 1, dtype=torch.float32, device=self.device))
        return found

    def shorten(self, x):
        if x.shape[1] <= SKETCH:
            return x
        compute = self.problem.params.compute_dtype
        signs = row_audit.signs_on(str(self.device), x.shape[1], compute)
        if lora.has_native(x) and compute == torch.bfloat16:  # what the kernel casts it to
            return x.to(compute) @ signs
        narrow = lora.has_native(x) and compute.itemsize == 2
        return lora.mm16(x.to(compute), signs) if narrow else x.float() @ signs.float()


def spread_out(first, last, most):
    """First panel of each chunk, as few as can be and alike, and the one after the last."""
    chunks = cdiv(last - first, min(most, last - first))
    return tuple(first + (last - first) * k // chunks for k in range(chunks + 1))

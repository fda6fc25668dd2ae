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
from fastgrpo.kernels.audit_sums import AUDIT_STEPS, error_kernel, lost_kernel, mass_kernel, share_kernel
from fastgrpo.kernels.row_order import order_rows
from fastgrpo.kernels.samples import SampleWork, samples_on
from fastgrpo.kernels.tiles import cdiv

PARTS = 32  # of the rows, whose masses are added up apart


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

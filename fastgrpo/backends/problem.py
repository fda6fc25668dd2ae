"""What both backends work on, and how they cut it into pieces that fit the workspace.

Words of the op, in all its files:
    row          one token: a row of hidden, N = B * T of them
    entry        one id of the vocabulary: a row of the head's weight and its bias, V of them
    factor       rows and entries whose product is a part of the logits: hidden and weight, LoRA's low and up
    chunk, tile  a range of entries; the logits of some rows over it, one alive at a time
    workspace    bytes that a tile may take, with its operands and what is made of it
    block        neighbouring rows that share their flags
    flag         of a block and an entry, set where the entry matters to one of the rows: it is kept
    taken        of a row, entries that are left out of its sums because something else sees to them
    dropped      of a row, the probability of the entries that are not kept
    certificate  the order of the rows, their flags and what they drop: made by the forward, bounds the backward's error
    whole row    one that keeps every entry, because it would drop too much; a tail row: whole for the head's gradient
"""

import functools
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch

from fastgrpo import lora
from fastgrpo.inputs import ELSEWHERE, IGNORE

FLOOR = -1e29  # below every real logit; finite, so that an empty sum of exp(z - FLOOR) meets no inf - inf
NOTHING = -1e30  # an entry that must not count: exp(NOTHING - FLOOR) is 0, and so is 0 * NOTHING
ABSENT = -1e20  # a logit below it stands for -inf


def negligible(dtype):
    """What cannot matter beside values near 1, and times a hidden state or a weight is not yet a denormal number."""
    return 2.0**20 * torch.finfo(dtype).tiny


class RowStats(NamedTuple):
    """What the forward knows of each row: ``RowStats(*stats)`` names the rows of the (5, N) tensor that it makes."""

    logp: torch.Tensor
    peak: torch.Tensor  # one of the logits, the largest or near it
    offset: torch.Tensor  # log-sum-exp minus that peak: apart, so that logits of any size keep their accuracy
    other_mass: torch.Tensor  # 1 - p of the label
    entropy: torch.Tensor


class RowPartials(NamedTuple):
    """What is known of each row after some entries, the label's left out: see :meth:`HeadProblem.new_partials`."""

    peak: torch.Tensor
    total: torch.Tensor  # sum of exp(z - peak)
    spread: torch.Tensor  # sum of exp(z - peak) * (peak - z), with ``params.entropy`` only
    label: torch.Tensor  # its logit


class Gradients(NamedTuple):
    """Of each tensor of a problem its gradient or None; or whether it is needed."""

    hidden: Any
    weight: Any
    bias: Any = None
    low: Any = None
    up: Any = None

    @property
    def of_rows(self):
        """Of the factors' rows: hidden and, with LoRA, low."""
        return self.hidden, self.low

    @property
    def of_head(self):
        """Of the factors' entries: weight and, with LoRA, up."""
        return self.weight, self.up


@dataclass(frozen=True)
class HeadParams:
    """Everything about the projection that is not a tensor."""

    temperature: float | None  # None: one per token, a tensor
    softcap: float | None
    logit_scale: float
    compute_dtype: torch.dtype  # tiles of hidden and weight are cast to it as they are loaded
    entropy: bool
    backend: str
    workspace: int  # bytes
    scaling: float = 1.0  # of LoRA
    lora_dtype: torch.dtype | None = None  # what LoRA's A and B are cast to; adapters may be wider than the head
    tolerance: float | None = None  # of the certified backward; None: exact
    row_tolerance: float = 1.0  # of each entry's gradient in it; 1: not asked for
    hidden_grad: torch.dtype | None = None  # dtype of dX; None: that of hidden
    shard: bool = False  # whether the entries are a part of the vocabulary, something else having the rest


@dataclass(frozen=True)
class HeadProblem:
    hidden: torch.Tensor  # (B, T, D), any strides
    weight: torch.Tensor  # (V, D), any strides
    bias: torch.Tensor | None  # (V,)
    targets: torch.Tensor  # (N,) int64, N = B * T
    temperature: torch.Tensor | None  # (N,) in the accumulator's dtype
    params: HeadParams
    low: torch.Tensor | None = None  # (B, T, r) in the accumulator's dtype, contiguous: LoRA's scaling * hidden @ A.T
    up: torch.Tensor | None = None  # (V, r): LoRA's B
    taken: torch.Tensor | None = None  # (N, K) int64 entries, rising in a row, NOWHERE where none; no row has a label

    @property
    def factors(self):
        """[(rows (B, T, D), entries (V, D))], whose products add up to the raw logits: the head's, then LoRA's."""
        head = (self.hidden, self.weight)
        return [head] if self.low is None else [head, (self.low, self.up)]

    @property
    def depth(self):
        """Columns of all factors together."""
        return sum(entries.shape[1] for _, entries in self.factors)

    @property
    def heads(self):
        """Whose logits a kernel makes, this one's first."""
        return (self,)

    @property
    def tile_dtype(self):
        """Whose tiles a kernel of these logits takes: of the widest that is computed in."""
        return max((head.params.compute_dtype for head in self.heads), key=lambda dtype: dtype.itemsize)

    @property
    def tiles_alive(self):
        """Tiles that a tile's gradient takes, its own included."""
        return 1

    @property
    def of_tolerance(self):
        """How much of the tolerance the certificate's bounds may use, so that the gradients keep what it promises."""
        return 1.0

    @property
    def knows_left_out(self):
        """Whether a certificate's ``dropped`` is what is left out, rather than a bound on it."""
        return True

    def norms(self, stats):
        """(N,) at most the norm of each row's d loss / d logits for a gradient of 1: the label's entry alone."""
        return RowStats(*stats).other_mass

    def largest(self, stats):
        """Of what a row gives, (N,) each: at least the largest of its d loss / d logits for a gradient of 1, but for a
        small factor."""
        rows = RowStats(*stats)
        if self.taken is not None:  # what is not taken is a distribution of its own, of which no p is known
            return (torch.ones_like(rows.logp),) * 2
        return rows.other_mass, rows.entropy

    def chain(self, rows):
        """d logit / d raw product of these rows, softcap's slope aside: (n,), or a number."""
        temperature = self.params.temperature if self.temperature is None else self.temperature[rows]
        return self.params.logit_scale * (1.0 / temperature)

    @functools.cached_property
    def lora_operands(self):
        """:class:`fastgrpo.lora.Operands`, made once, or None."""
        return None if self.low is None else lora.operands(self)

    def within(self, workspace):
        """The same problem in another workspace (bytes), LoRA's operands not made again."""
        other = replace(self, params=replace(self.params, workspace=workspace))
        if lora.has_native(self.hidden):  # elsewhere nothing reads them
            other.__dict__["lora_operands"] = self.lora_operands
        return other

    def without(self, taken):
        """The same problem with some entries of each row taken out and no labels, LoRA's operands not made again.

        Its gradients are those of the other entries alone, whose sum over a row is not 0: as if they were a shard.
        """
        targets = torch.where(self.targets == IGNORE, IGNORE, ELSEWHERE)
        other = replace(self, targets=targets, taken=taken, params=replace(self.params, shard=True))
        if lora.has_native(self.hidden):
            other.__dict__["lora_operands"] = self.lora_operands
        return other

    def apart(self, rows):
        """Entries that are kept out of the rows' sums: (n,) their labels, or (n, K) what is taken."""
        return (self.targets if self.taken is None else self.taken)[rows]

    @property
    def sizes(self):
        """N, V, D."""
        return self.targets.numel(), *self.weight.shape

    def new_stats(self, dtype):
        """(5, N) of :class:`RowStats`, 0 at ignored rows."""
        return torch.zeros(len(RowStats._fields), self.targets.numel(), dtype=dtype, device=self.hidden.device)

    def new_partials(self, dtype):
        """(4, N) of :class:`RowPartials`, those of no entry; a label that is nowhere has the logit NaN."""
        partials = self.new_stats(dtype)[: len(RowPartials._fields)]
        RowPartials(*partials).peak.fill_(FLOOR)
        RowPartials(*partials).label.fill_(torch.nan)
        return partials


def new_gradients(problem, needs):
    """:class:`Gradients`: zeros, but dW and dup, of which a backward writes every row. needs: the same, of bools."""
    makers = (torch.zeros_like, torch.empty_like, torch.zeros_like, torch.zeros_like, torch.empty_like)
    tensors = (problem.hidden, problem.weight, problem.bias, problem.low, problem.up)
    dtypes = (problem.params.hidden_grad, None, None, None, None)
    options = {"memory_format": torch.contiguous_format}
    return Gradients(
        *(make(x, dtype=d, **options) if need else None for make, x, d, need in zip(makers, tensors, dtypes, needs))
    )


def sum_entries(x, dtype):
    """(V, D) -> (D,) in a wider dtype, which x is not copied in whole."""
    if x.dtype == dtype and x.device.type == "cpu":  # there torch's sum over the outer axis takes several times as long
        return torch.mv(x.t(), x.new_ones(len(x)))
    return sum(
        (part.sum(0, dtype=dtype) for part in x.split(4096)), torch.zeros(x.shape[1], dtype=dtype, device=x.device)
    )


@dataclass(frozen=True)
class Tiling:
    rows: int
    cols: int


def plan_tiles(rows, cols, budget, cell, per_row, per_col, multiple=16):
    """The largest tile whose bytes, ``cell * R * C + per_row * R + per_col * C``, fit the budget.

    Halves the longer side until it fits; both sides stay multiples of ``multiple``.
    """

    def up(x):
        return max(-(-x // multiple), 1) * multiple

    rows, cols = up(rows), up(cols)
    while cell * rows * cols + per_row * rows + per_col * cols > budget and max(rows, cols) > multiple:
        if rows > cols:
            rows = up(rows // 2)
        else:
            cols = up(cols // 2)
    return Tiling(rows, cols)


def active_rows(targets, *grads):
    """(N,) bool: the rows that count and have a gradient. grads: (N,) each, of what a row gives."""
    moved = grads[0] != 0
    for g in grads[1:]:
        moved = moved | (g != 0)
    return moved & (targets != IGNORE)


# What the largest dlogits are brought to, 2^ROOM: fp16 holds 2,000 times as much, and a millionth of it to 8 bits. The
# smallest that is told from 0: of less, rounding may have made a part.
ROOM, SMALLEST = 4, 2.0**-16


def row_scale(problem, stats, rows, *grads):
    """A power of two that brings the largest dlogits to about 2^ROOM, so that 16-bit ones do not underflow: 0-dim.

    Args:
        rows: an index of at least one. grads: (N,) each, of what a row gives.
    """
    chain, sizes = abs(problem.chain(rows)), problem.largest(stats[:, rows])
    sizes = [g[rows].abs() * size.clamp(min=SMALLEST) * chain for size, g in zip(sizes, grads)]
    largest = torch.stack([torch.nan_to_num(size, nan=0.0, posinf=0.0).amax() for size in sizes]).amax()
    return torch.exp2(ROOM - torch.floor(torch.log2(largest.clamp(min=1e-30))))

"""What both backends work on, and how they cut it into pieces that fit the workspace."""

import functools
from dataclasses import dataclass, replace

import torch

FLOOR = -1e29  # below every real logit; finite, so that an empty sum of exp(z - FLOOR) meets no inf - inf
NOTHING = -1e30  # a column that must not count: exp(NOTHING - FLOOR) is 0, and so is 0 * NOTHING
ABSENT = -1e20  # a logit below it stands for -inf


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
    row_tolerance: float = 1.0  # of the rows of dW in it; 1: not asked for
    hidden_grad: torch.dtype | None = None  # dtype of dX; None: that of hidden
    frozen: bool = False  # hidden alone has a gradient, which the forward makes


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

    @property
    def factors(self):
        """[(rows (B, T, D), columns (V, D))], whose products add up to the raw logits: the head's, then LoRA's."""
        head = (self.hidden, self.weight)
        return [head] if self.low is None else [head, (self.low, self.up)]

    @functools.cached_property
    def lora_operands(self):
        """:class:`fastgrpo.lora.Operands`, made once, or None."""
        from fastgrpo import lora

        return None if self.low is None else lora.operands(self)

    def within(self, workspace):
        """The same problem in another workspace (bytes), LoRA's operands not made again."""
        from fastgrpo import lora

        other = replace(self, params=replace(self.params, workspace=workspace))
        if lora.has_native(self.hidden):  # elsewhere nothing reads them
            other.__dict__["lora_operands"] = self.lora_operands
        return other

    @property
    def sizes(self):
        """N, V, D."""
        return self.targets.numel(), *self.weight.shape

    def new_stats(self, dtype):
        """(5, N), 0 at ignored rows: log-prob, a peak of the logits, log-sum-exp minus that peak (apart, so that
        logits of any size keep their accuracy), 1 - p of the label, entropy."""
        return torch.zeros(5, self.targets.numel(), dtype=dtype, device=self.hidden.device)

    def new_partials(self, dtype):
        """(4, N): peak, sum of exp(z - peak) and of exp(z - peak) * (peak - z) over the columns that are not the label
        (the last only with ``params.entropy``), here those of no column; the label's logit, NaN where it has none."""
        partials = self.new_stats(dtype)[:4]
        partials[0].fill_(FLOOR)
        partials[3].fill_(torch.nan)
        return partials


def new_gradients(problem, needs):
    """[dX, dW, db, dlow, dup]: zeros, but dW and dup, of which a backward writes every row.

    The last two are there with LoRA: ``out[0::3]`` are the factors' rows, ``out[1::3]`` their columns.
    """
    makers = (torch.zeros_like, torch.empty_like, torch.zeros_like, torch.zeros_like, torch.empty_like)
    tensors = (problem.hidden, problem.weight, problem.bias, problem.low, problem.up)
    dtypes = (problem.params.hidden_grad, None, None, None, None)
    return [make(x, dtype=dtype, memory_format=torch.contiguous_format) if need else None
            for make, x, dtype, need in zip(makers, tensors, dtypes, needs)]  # fmt: skip


def take_rows(x, index):
    """(B, T, D) of any strides, (n,) -> (n, D): rows of the flattened tensor, which is never copied whole."""
    batch, length, depth = x.shape
    if batch <= 1 or length == 0 or x.stride(0) == length * x.stride(1):
        return x.view(batch * length, depth).index_select(0, index)
    return x[index // length, index % length]


def column_sum(x, dtype):
    """(V, D) -> (D,) in a wider dtype, which x is not copied in whole."""
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


def row_scale(*grads):
    """A power of two that brings the largest gradient to about 1, so that 16-bit dlogits do not underflow: 0-dim."""
    largest = torch.stack([torch.nan_to_num(g, nan=0.0, posinf=0.0, neginf=0.0).abs().amax() for g in grads]).amax()
    return torch.exp2(-torch.floor(torch.log2(largest.clamp(min=1e-30))))

"""LoRA on the LM head (Hu et al. 2021): logits gain ``scaling * (hidden @ A.T) @ B.T``, without a merged copy of W.

The op sees a second, narrow pair of factors beside hidden and weight: ``low = scaling * hidden @ A.T`` and ``up = B``.
Here stand the steps between them and the caller's hidden, A and B.
"""

import math
from typing import NamedTuple

import torch

from fastgrpo import inputs

PARTS = 3  # 16-bit tensors whose sum holds the 24 bits of an fp32 one
EXPONENTS = (-40.0, 40.0)  # of the powers of two that bring a tensor to the middle of fp16's range


class LoRA(NamedTuple):
    """What ``lora=`` takes."""

    A: torch.Tensor  # (r, D)
    B: torch.Tensor  # (V, r)
    scaling: float


def unpack_lora(lora):
    """-> A, B, scaling; None: no adapter."""
    if lora is None:
        return LoRA(None, None, 1.0)
    if not isinstance(lora, (tuple, list)) or len(lora) != 3:
        raise ValueError(f"lora must be a tuple (A, B, scaling), got {inputs.kind(lora)}")
    return LoRA(*lora)


def check_lora(lora, hidden, weight):
    """-> :class:`LoRA`; raises before anything runs."""
    if lora is None:
        return unpack_lora(lora)
    a, b, scaling = unpack_lora(lora)
    for name, x in (("lora A", a), ("lora B", b)):
        inputs.check_tensor(name, x, hidden.device, floating=True)
        inputs.check_dtype(name, x)
        if (x.dtype == torch.float64) != (hidden.dtype == torch.float64):
            raise ValueError(f"{name} and hidden must both be float64 or neither, got {x.dtype} and {hidden.dtype}")
        inputs.check_whole(name, x)
    if a.ndim != 2 or a.shape[0] == 0 or a.shape[1] != hidden.shape[-1]:
        raise ValueError(f"lora A must be (r, D) with D = {hidden.shape[-1]}, got shape {tuple(a.shape)}")
    if b.shape != (weight.shape[0], a.shape[0]):
        raise ValueError(f"lora B must be (V, r) = {(weight.shape[0], a.shape[0])}, got shape {tuple(b.shape)}")
    inputs.check_finite("lora scaling", scaling)
    return LoRA(a, b, float(scaling))


def project(hidden, a, params, rows=None):
    """(B, T, D), (r, D) -> low (B, T, r) in the accumulator's dtype; rows: (n,) those to do, None: all; 0 elsewhere."""
    accumulate, cast = inputs.accumulator_dtype(hidden), params.lora_dtype
    low = torch.zeros(*hidden.shape[:-1], a.shape[0], dtype=accumulate, device=hidden.device)
    if is_native(hidden, params.compute_dtype):  # 16-bit GEMMs lose nothing, whatever TF32 is set to
        scale = power_of_two(a) if params.compute_dtype == torch.float16 else None
        parts = split(a if scale is None else a * scale, params.compute_dtype, 1 if cast.itemsize == 2 else PARTS)

        def product(x):
            total = sum(mm16(x.to(params.compute_dtype), part.t()) for part in parts)
            return total if scale is None else total / scale
    else:
        wide = a.to(cast).to(accumulate).t()

        def product(x):
            return x.to(params.compute_dtype).to(accumulate) @ wide

    for index in chunks(hidden, rows, params.workspace):
        low.flatten(0, 1).index_copy_(0, index, product(inputs.take_rows(hidden, index)) * params.scaling)
    return low


def gradients(hidden, a, params, d_low, d_hidden, needs_a, rows=None):
    """Adds ``low``'s part to d_hidden (None: not needed) in place; -> d_A or None. rows: as in :func:`project`."""
    accumulate = d_low.dtype
    wide, d_low = a.to(params.lora_dtype).to(accumulate), d_low.flatten(0, 1)
    d_a = torch.zeros_like(wide) if needs_a else None
    for index in chunks(hidden, rows, params.workspace):
        part = d_low[index] * params.scaling
        if d_hidden is not None:
            d_hidden.flatten(0, 1).index_add_(0, index, (part @ wide).to(d_hidden.dtype))
        if needs_a:  # a row without a gradient may hold anything, NaN included
            x = inputs.take_rows(hidden, index).to(params.compute_dtype).to(accumulate)
            d_a.addmm_(part.t(), x.masked_fill_((part == 0).all(1, keepdim=True), 0.0))
    return None if d_a is None else d_a.to(a.dtype)


def chunks(hidden, rows, workspace):
    """Indices of rows, as many at once as may be widened within the workspace."""
    rows = torch.arange(hidden.shape[0] * hidden.shape[1], device=hidden.device) if rows is None else rows
    size = inputs.accumulator_dtype(hidden).itemsize * hidden.shape[2]
    return rows.split(max(workspace // (3 * size), 16))


class Operands(NamedTuple):
    """LoRA's pair as the logits' GEMM reads it: ``low @ up[:, k % up.shape[1]].T``, over ``low_scale * up_scale``.

    In 16 bits a tensor that is wider stands as a sum of parts side by side, so that tensor cores lose nothing; the
    first ``rank`` columns of either are the tensor rounded, which is what a gradient's GEMM reads. fp16's narrow range
    is met by powers of two.
    """

    low: torch.Tensor  # (N, depth)
    up: torch.Tensor  # (V, width)
    rank: int
    low_scale: torch.Tensor | None  # 0-dim
    up_scale: torch.Tensor | None

    @property
    def scale(self):
        scales = [s for s in (self.low_scale, self.up_scale) if s is not None]
        return 1.0 / math.prod(scales) if scales else None

    @property
    def columns(self):
        """(depth,) which column of up each column of low meets."""
        return torch.arange(self.low.shape[1], device=self.up.device) % self.up.shape[1]


def operands(problem):
    """:class:`Operands`: with 16-bit operands and wider adapters 6 V r bytes more than B, else no copy of it."""
    params, low, up = problem.params, problem.low.flatten(0, 1), problem.up
    compute, rank = params.compute_dtype, problem.up.shape[1]
    if compute.itemsize != 2:
        return Operands(low, up, rank, None, None)
    low_scale = up_scale = None
    if compute == torch.float16:
        low_scale = power_of_two(low)
        low = low * low_scale
    a, b, c = parts = split(low, compute)
    if params.lora_dtype.itemsize == 2:
        up = up.to(compute)
    else:  # each part of low with those of up that still matter
        parts = [a, a, a, b, b, torch.zeros_like(c), c]
        up_scale = power_of_two(up) if compute == torch.float16 else None
        wide = torch.empty(up.shape[0], PARTS * rank, dtype=compute, device=up.device)
        for rows, out in zip(up.split(4096), wide.split(4096)):
            rows = rows.to(params.lora_dtype).float()
            torch.cat(split(rows if up_scale is None else rows * up_scale, compute), 1, out=out)
        up = wide
    return Operands(torch.cat(parts, 1), up, rank, low_scale, up_scale)


def split(x, dtype, count=PARTS):
    """Tensors of a 16-bit dtype whose sum is x."""
    parts = []
    for _ in range(count):
        parts.append(x.to(dtype))
        x = x - parts[-1].to(x.dtype)
    return parts


def power_of_two(x):
    """What brings the largest value to about 1; 0-dim, fp32."""
    if not x.numel():
        return torch.ones((), device=x.device)
    largest = torch.nan_to_num(x.detach().float(), nan=0.0, posinf=0.0, neginf=0.0).abs().amax()
    return torch.exp2(-torch.floor(torch.log2(largest.clamp(min=1e-30))).clamp(*EXPONENTS))


def has_native(hidden):
    """Whether a 16-bit GEMM can return its fp32 accumulator: not on AMD, whose tensors are on "cuda" too."""
    return hidden.is_cuda and torch.version.hip is None


def is_native(hidden, compute):
    """Whether products in this dtype are such GEMMs."""
    return compute.itemsize == 2 and has_native(hidden)


def mm16(a, b):
    """16-bit operands, fp32 result: CUDA alone."""
    return torch.mm(a, b, out_dtype=torch.float32)

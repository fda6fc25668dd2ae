"""LoRA on the LM head (Hu et al. 2021): logits gain ``scaling * (hidden @ A.T) @ B.T``, without a merged copy of W.

The op sees a second, narrow pair of factors beside hidden and weight: ``low = scaling * hidden @ A.T`` and ``up = B``.
Here stand the steps between them and the caller's hidden, A and B.
"""

from typing import NamedTuple

import torch

from fastgrpo import inputs
from fastgrpo.backends.problem import take_rows

CHUNK = 8192  # rows of hidden that are widened at once


class LoRA(NamedTuple):
    """What ``lora=`` takes."""

    A: torch.Tensor  # (r, D)
    B: torch.Tensor  # (V, r)
    scaling: float


def unpacked(lora):
    """-> A, B, scaling; None: no adapter."""
    if lora is None:
        return LoRA(None, None, 1.0)
    if not isinstance(lora, tuple | list) or len(lora) != 3:
        raise ValueError(f"lora must be a tuple (A, B, scaling), got {type(lora).__name__}: {str(lora)[:80]}")
    return LoRA(*lora)


def checked(lora, hidden, weight):
    """-> :class:`LoRA`; raises before anything runs."""
    if lora is None:
        return unpacked(lora)
    a, b, scaling = unpacked(lora)
    for name, x in (("lora A", a), ("lora B", b)):
        inputs.check_tensor(name, x, hidden.device, floating=True)
        if (x.dtype == torch.float64) != (hidden.dtype == torch.float64):
            raise ValueError(f"{name} and hidden must both be float64 or neither, got {x.dtype} and {hidden.dtype}")
        inputs.check_whole(name, x)
    if a.ndim != 2 or a.shape[0] == 0 or a.shape[1] != hidden.shape[-1]:
        raise ValueError(f"lora A must be (r, D) with D = {hidden.shape[-1]}, got shape {tuple(a.shape)}")
    if b.shape != (weight.shape[0], a.shape[0]):
        raise ValueError(f"lora B must be (V, r) = {(weight.shape[0], a.shape[0])}, got shape {tuple(b.shape)}")
    inputs.check_finite("lora scaling", scaling)
    return LoRA(a, b, float(scaling))


def project(hidden, a, scaling, compute):
    """(B, T, D), (r, D) -> low (B, T, r) in the accumulator's dtype, of operands rounded to ``compute``."""
    accumulate = inputs.accumulator_dtype(hidden)
    low = torch.empty(*hidden.shape[:-1], a.shape[0], dtype=accumulate, device=hidden.device)
    scaled = widened(a, compute, accumulate).t() * scaling
    for rows, out in zip(chunks(hidden), low.flatten(0, 1).split(CHUNK)):
        torch.mm(widened(take_rows(hidden, rows), compute, accumulate), scaled, out=out)
    return low


def gradients(hidden, a, scaling, compute, d_low, d_hidden, needs_a):
    """Adds ``low``'s part to d_hidden (None: not needed) in place; -> d_A or None."""
    accumulate = d_low.dtype
    wide, d_low = widened(a, compute, accumulate), d_low.flatten(0, 1) * scaling
    active = (d_low != 0).any(1, keepdim=True)  # a row without a gradient may hold anything, NaN included
    d_a = torch.zeros_like(wide) if needs_a else None
    for rows, part in zip(chunks(hidden), d_low.split(CHUNK)):
        if d_hidden is not None:
            d_hidden.flatten(0, 1)[rows] += (part @ wide).to(d_hidden.dtype)
        if needs_a:
            x = torch.where(active[rows], widened(take_rows(hidden, rows), compute, accumulate), 0.0)
            d_a.addmm_(part.t(), x)
    return None if d_a is None else d_a.to(a.dtype)


def chunks(hidden):
    return torch.arange(hidden.shape[0] * hidden.shape[1], device=hidden.device).split(CHUNK)


def widened(x, compute, accumulate):
    return x.to(compute).to(accumulate)

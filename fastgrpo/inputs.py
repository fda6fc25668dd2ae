"""Tensor checks, flattening and row compaction: everything that happens before a kernel starts."""

import math
import os
from dataclasses import dataclass
from typing import Literal, get_args

import torch

from fastgrpo.checks import check_field, is_finite

IGNORE = -100
ELSEWHERE = -1  # entry of a label that something else sees to: another rank, or top-k's pairs
NOWHERE = 2**31 - 1  # an entry that no vocabulary has
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
Backend = Literal["auto", "triton", "torch"]
Backward = Literal["auto", "exact", "certified"]
BACKENDS, BACKWARDS = get_args(Backend), get_args(Backward)
# Nats that rounding may lift a log-prob above 0: half a bf16 step of a log-sum-exp under 128, the worst of the dtypes.
ROUNDING = 0.25


def checks_values(device):
    """Whether tensor values may be looked at: on a CPU that costs nothing, on a GPU the host would wait; torch.compile
    traces shapes alone."""
    if torch.compiler.is_compiling():
        return False
    return device.type == "cpu" or os.environ.get("FASTGRPO_DEBUG", "0") not in ("", "0")


def accumulator_dtype(hidden):
    return torch.float64 if hidden.dtype == torch.float64 else torch.float32


def check_choice(name, value, allowed):
    if not isinstance(value, str) or value not in allowed:  # torch.compile traces this, and no Literal
        check_field(name, value, Literal[allowed])


def check_tensor(name, value, device=None, floating=None):
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")
    if value.layout != torch.strided:
        raise ValueError(f"{name} must be a dense tensor, got {value.layout}")
    if device is not None and value.device != device:
        raise ValueError(f"{name} must be on the device of hidden ({device}), got {value.device}")
    if floating is True and not value.is_floating_point():
        raise ValueError(f"{name} must be a floating point tensor, got {value.dtype}")
    if floating is False and (value.is_floating_point() or value.is_complex() or value.dtype == torch.bool):
        raise ValueError(f"{name} must be an integer tensor, got {value.dtype}")


def check_dtype(name, value):
    if value.dtype not in DTYPES:
        raise ValueError(f"{name} must be float32, bfloat16, float16 or float64, got {value.dtype}")


def kind(value):
    """What came, without a tensor's numbers."""
    if isinstance(value, tuple | list):
        return f"a {type(value).__name__} of {len(value)}"
    return f"{type(value).__name__}" if isinstance(value, torch.Tensor) else repr(value)[:80]


def check_whole(name, value):
    if type(value).__name__ == "DTensor":
        raise ValueError(
            f"{name} must be a whole plain tensor, got a DTensor: call the op inside lm_head's forward, where "
            "FSDP2 has unsharded it (full_tensor() would leave its gradient unreduced)"
        )


def check_head(hidden, weight, targets, bias):
    """Shapes, dtypes and devices of the projection; raises before anything runs."""
    check_tensor("hidden", hidden)
    check_dtype("hidden", hidden)
    if hidden.ndim not in (2, 3):
        raise ValueError(f"hidden must be (N, D) or (B, T, D), got shape {tuple(hidden.shape)}")
    if isinstance(weight, torch.nn.Module):
        raise TypeError(f"weight must be a torch.Tensor, got the module {type(weight).__name__}: pass lm_head.weight")
    check_tensor("weight", weight, hidden.device)
    for name, value in (("hidden", hidden), ("weight", weight), ("bias", bias)):
        check_whole(name, value)
    check_dtype("weight", weight)
    if (weight.dtype == torch.float64) != (hidden.dtype == torch.float64):
        raise ValueError(f"weight and hidden must both be float64 or neither, got {weight.dtype} and {hidden.dtype}")
    if weight.ndim != 2 or weight.shape[1] != hidden.shape[-1]:
        raise ValueError(f"weight must be (V, D) with D = {hidden.shape[-1]}, got shape {tuple(weight.shape)}")
    if weight.shape[0] == 0 or weight.shape[1] == 0:
        raise ValueError(
            f"weight must not be empty, got shape {tuple(weight.shape)} (a ZeRO-3 or FSDP shard outside its module?)"
        )
    check_tensor("targets", targets, hidden.device, floating=False)
    if targets.shape != hidden.shape[:-1]:
        raise ValueError(
            f"targets must have shape {tuple(hidden.shape[:-1])}, hidden's without D (hidden[:, :-1] predicts "
            f"ids[:, 1:]), got {tuple(targets.shape)} for hidden of shape {tuple(hidden.shape)}"
        )
    if bias is not None:
        check_tensor("bias", bias, hidden.device, floating=True)
        check_dtype("bias", bias)
        if bias.shape != weight.shape[:1]:
            raise ValueError(f"bias must have shape ({weight.shape[0]},), got {tuple(bias.shape)}")


def check_targets(targets, vocab):
    """Ids of counted positions, where they can be seen without a sync; elsewhere a bad id gives NaN."""
    if targets.numel() and checks_values(targets.device):
        bad = ((targets < 0) | (targets >= vocab)) & (targets != IGNORE)
        if bad.any():
            raise ValueError(
                f"targets must be in [0, {vocab}) or {IGNORE} (ignored), got {targets[bad][0].item()} "
                f"at {int(bad.sum())} position(s)"
            )


def check_finite(name, value):
    if not is_finite(value):
        hint = " (a Python number: .item())" if isinstance(value, torch.Tensor) else ""
        raise ValueError(f"{name} must be a finite number, got {value!r}{hint}")


def check_scalar(name, value, positive=True):
    check_finite(name, value)
    if value == 0 or (positive and value < 0):
        raise ValueError(f"{name} must be {'> 0' if positive else 'other than 0'}, got {value!r}")


def check_temperature(temperature, targets):
    if not isinstance(temperature, torch.Tensor):
        check_scalar("temperature", temperature)
        return
    check_tensor("temperature", temperature, targets.device, floating=True)
    if temperature.shape != targets.shape and temperature.ndim != 0:
        raise ValueError(
            f"temperature must be a number or a tensor of shape {tuple(targets.shape)}, got {tuple(temperature.shape)}"
        )
    if checks_values(targets.device):
        wrong = ~((temperature > 0) & temperature.isfinite()) & (targets != IGNORE)
        if wrong.any():
            raise ValueError(
                "temperature must be > 0 and finite at every counted position, got "
                f"{temperature.expand(wrong.shape)[wrong][0].item()}"
            )


def compact_rows(active):
    """The rows in a new order, those that are active first, and how many there are, without the host waiting.

    Args:
        active: (N,) bool.

    Returns:
        rows (N,) int64, a permutation: the active rows in order, then the others in order; count (1,) int32.
    """
    if not active.numel():
        return torch.zeros(0, dtype=torch.int64, device=active.device), active.new_zeros(1, dtype=torch.int32)
    position = active.cumsum(0)
    count = position[-1:]
    index = torch.arange(active.numel(), device=active.device)
    destination = torch.where(active, position - 1, count + index - position)
    return torch.empty_like(index).scatter_(0, destination, index), count.to(torch.int32)


@dataclass(frozen=True)
class Segments:
    """The sequences of a flat batch: B equal padded rows, or B packed runs given by their offsets."""

    count: int  # B
    padded_length: int | None  # T of a (B, T) batch, None for a packed one
    offsets: torch.Tensor | None  # (B + 1,) int64 of a packed batch
    ids: torch.Tensor | None  # (N,) sequence of each packed token

    @classmethod
    def padded(cls, batch, length):
        return cls(batch, length, None, None)

    @classmethod
    def packed(cls, cu_seqlens, tokens):
        offsets = cu_seqlens.to(torch.int64).clamp(0, tokens)  # a bad one must not reach memory that is not ours
        ids = torch.searchsorted(offsets[1:].contiguous(), torch.arange(tokens, device=offsets.device), right=True)
        ids = ids.clamp(max=max(offsets.numel() - 2, 0))
        return cls(offsets.numel() - 1, None, offsets, ids)

    def sum(self, x):  # (N,) -> (B,)
        if self.padded_length is not None:
            return x.reshape(self.count, self.padded_length).sum(1)
        if not self.count:
            return x.new_zeros(0)
        if x.device.type not in ("cpu", "cuda"):
            return x.new_zeros(self.count).index_add_(0, self.ids, x)
        return torch.segment_reduce(x.contiguous(), "sum", offsets=self.offsets, axis=0, initial=0, unsafe=True)

    def expand(self, x):  # (B,) -> (N,)
        if self.padded_length is not None:
            return x[:, None].expand(self.count, self.padded_length).reshape(-1)
        return x[self.ids]


def check_cu_seqlens(cu_seqlens, targets):
    check_tensor("cu_seqlens", cu_seqlens, targets.device, floating=False)
    tokens = targets.numel()
    if cu_seqlens.ndim != 1 or cu_seqlens.numel() < 1:
        raise ValueError(f"cu_seqlens must be (B + 1,), got shape {tuple(cu_seqlens.shape)}")
    if targets.ndim == 2 and targets.shape[0] != 1:
        raise ValueError(
            f"targets must be flat, (N,) or (1, N), when cu_seqlens is given, got shape {tuple(targets.shape)}"
        )
    if checks_values(targets.device):
        ends = cu_seqlens.tolist()
        if ends[0] != 0 or ends[-1] != tokens or ends != sorted(ends):
            raise ValueError(f"cu_seqlens must rise from 0 to {tokens} (the number of tokens), got {ends[:8]}...")


def check_mask(mask, targets):
    check_tensor("mask", mask, targets.device)
    if mask.is_complex():
        raise ValueError(f"mask must be of a real dtype, got {mask.dtype}")
    if mask.numel() != targets.numel() or mask.shape not in (targets.shape, (targets.numel(),)):
        raise ValueError(f"mask must have the shape of targets, {tuple(targets.shape)}, got {tuple(mask.shape)}")
    if mask.dtype != torch.bool and checks_values(mask.device) and not ((mask == 0) | (mask == 1)).all():
        raise ValueError(f"mask must hold 0 and 1 only, got values from {mask.min().item()} to {mask.max().item()}")


def check_labels(labels, targets):
    """Ids shaped like the targets; any value, for they are a hint."""
    check_tensor("targets", labels, targets.device, floating=False)
    if labels.shape not in (targets.shape, (targets.numel(),)):
        raise ValueError(f"targets must have the shape {tuple(targets.shape)}, got {tuple(labels.shape)}")


def check_per_token(name, value, targets):
    """A float tensor shaped like the targets (or flat)."""
    check_tensor(name, value, targets.device, floating=True)
    if value.shape not in (targets.shape, (targets.numel(),)):
        raise ValueError(f"{name} must have the shape of targets, {tuple(targets.shape)}, got {tuple(value.shape)}")


def check_per_sequence(name, value, targets, sequences):
    """A float tensor of one value a sequence, (B,) or (B, 1), or one a token."""
    check_tensor(name, value, targets.device, floating=True)
    if value.shape not in ((sequences,), (sequences, 1), targets.shape, (targets.numel(),)):
        raise ValueError(
            f"{name} must be ({sequences},) or shaped like targets, {tuple(targets.shape)}, got {tuple(value.shape)}"
        )


def is_per_sequence(value, targets, sequences):
    """(B,) and (B, 1) are one value a sequence; a shape that is also that of the targets, flat or not, one a token."""
    return value.shape in ((sequences,), (sequences, 1)) and value.shape not in (targets.shape, (targets.numel(),))


def zero_dim(value):
    """A number, or a tensor of one as a 0-dim one: that may stay on the CPU beside tensors of another device."""
    return value.reshape(()) if isinstance(value, torch.Tensor) else value


def check_logprobs(name, value):
    """Log-probs of counted tokens, 0 elsewhere; NaN, unknown, passes. A GPU's are not looked at."""
    if checks_values(value.device) and (wrong := value > ROUNDING).any():
        raise ValueError(
            f"{name} must be log-probs, at most 0 (+{ROUNDING} for rounding), got {value[wrong].max().item():.4g} "
            f"at {int(wrong.sum())} counted position(s): probabilities, or log-probs times -1?"
        )


def check_advantages(value):
    """Advantages of counted tokens, 0 elsewhere. A GPU's are not looked at."""
    if checks_values(value.device) and not (fine := value.isfinite()).all():
        raise ValueError(
            f"advantages must be finite where tokens count, got {value[~fine][0].item()} at "
            f"{int((~fine).sum())} position(s)"
        )


def check_importance(weights, logs):
    """Importance weights of counted tokens, 0 elsewhere, or what VESPO sums of their logs. A GPU's are not looked at.

    Args:
        weights: (N,) or None. logs: (B,) or None, NaN where one of the weights was negative or NaN.
    """
    wrong = None
    if weights is not None and checks_values(weights.device):
        wrong = weights[~(weights.isfinite() & (weights >= 0))]
    elif logs is not None and checks_values(logs.device):
        wrong = logs[logs.isnan()]
    if wrong is not None and len(wrong):
        found = "a negative one or NaN" if weights is None else wrong[0].item()
        raise ValueError(f"importance_weights must be finite and >= 0 where tokens count, got {found}")


def check_number(name, value):
    """A tensor in the place of a number."""
    if value.numel() != 1 or value.is_complex() or value.dtype == torch.bool:
        raise ValueError(f"{name} must be a number or a tensor of one, got {value.dtype} of shape {tuple(value.shape)}")


def check_num_items(num_items):
    if isinstance(num_items, torch.Tensor):
        check_number("num_items", num_items)
        if checks_values(num_items.device) and not 0 <= num_items.item() < math.inf:
            raise ValueError(f"num_items must be a number >= 0, got {num_items.item()}")
    elif not is_finite(num_items) or num_items < 0:
        raise ValueError(f"num_items must be a number >= 0, got {num_items!r}")


def check_some_items(num_items, mask):
    """A normaliser of 0 says that nothing counts on any rank: then nothing may count here. mask: (N,)."""
    given = num_items if isinstance(num_items, torch.Tensor) else mask
    if checks_values(mask.device) and checks_values(given.device) and float(num_items) == 0 and (mask != 0).any():
        raise ValueError(
            "num_items must be > 0 where tokens count (it is their number on all ranks), got 0 with "
            f"{int((mask != 0).sum())} of them here"
        )


def take_rows(x, index):
    """(B, T, D) of any strides, (n,) -> (n, D): rows of the flattened tensor, which is never copied whole."""
    batch, length, depth = x.shape
    if batch <= 1 or length == 0 or x.stride(0) == length * x.stride(1):
        return x.view(batch * length, depth).index_select(0, index)
    return x[index // length, index % length]

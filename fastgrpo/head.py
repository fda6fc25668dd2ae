"""How the LM head is to be read: one object for what the user chose, checked once, and what follows from it."""

import functools
import math
from dataclasses import dataclass

import torch

from fastgrpo import backends, inputs
from fastgrpo.backends import products
from fastgrpo.backends.problem import HeadParams

TOLERANCE = 0.005  # adds less than a quarter of what bf16 GEMMs add to the gradients' errors anyway
AUTO_FP32_TOLERANCE = 0.0007  # the most that keeps both gradients within 1e-4 on every profile of bench/
ROW_TOLERANCE = 0.1
# Tokens, vocabulary and width from which "auto" certifies; on a GPU launches cost more than a small case's GEMMs.
CERTIFIED_FROM = {"cpu": (256, 4096, 256), "cuda": (4096, 32768, 512)}
CERTIFIED_CELLS_ONEDNN = 512 * 8192  # tokens times vocabulary, too, where GEMMs take half of a CPU's usual time


@dataclass(frozen=True)
class HeadOptions:
    """What :func:`fastgrpo.linear_logprobs` takes beside hidden, weight and targets, as it takes it."""

    bias: torch.Tensor | None = None
    temperature: float | torch.Tensor = 1.0
    softcap: float | None = None
    logit_scale: float = 1.0
    lora: tuple | None = None
    support: tuple | None = None
    backend: str = "auto"
    backward: str = "auto"
    tolerance: float | None = None
    workspace_mb: float = 128
    row_tolerance: float | None = None
    old_logprobs: torch.Tensor | None = None
    return_entropy: bool = False
    entropy_grad: bool | None = None  # whether the entropy may have a gradient; None: where it is returned
    moving: torch.Tensor | None = None  # bool, like targets: whose log-prob may have a gradient; None: all

    def check(self, hidden, weight, targets):
        """-> targets as int64; raises before anything runs."""
        inputs.check_head(hidden, weight, targets, self.bias)
        targets = targets.to(torch.int64)  # before any comparison: -100 wraps in uint8
        inputs.check_temperature(self.temperature, targets)
        if self.softcap is not None:
            inputs.check_scalar("softcap", self.softcap)
        inputs.check_scalar("logit_scale", self.logit_scale, positive=False)
        inputs.check_scalar("workspace_mb", self.workspace_mb)
        if self.old_logprobs is not None:
            inputs.check_per_token("old_logprobs", self.old_logprobs, targets)
        if self.tolerance is not None:
            inputs.check_scalar("tolerance", self.tolerance)
        inputs.check_choice("backward", self.backward, inputs.BACKWARDS)
        if self.row_tolerance is not None:
            inputs.check_scalar("row_tolerance", self.row_tolerance)
            if self.row_tolerance > 1:
                raise ValueError(f"row_tolerance must be in (0, 1], got {self.row_tolerance!r}")
        if self.support is not None and self.backward == "certified":
            raise ValueError(
                "backward must be 'auto' or 'exact' with support (nothing kept is left out), got 'certified'"
            )
        return targets

    def params(self, hidden, weight, trained, sizes=None, **others):
        """:class:`HeadParams` of checked options.

        Args:
            trained: tensors that may require a gradient, hidden first. sizes: N, V, D that "auto" decides by.
        """
        compute = compute_dtype(hidden, weight)
        wants = [x is not None and x.requires_grad and torch.is_grad_enabled() for x in trained]
        # torch.Size's own numel() makes a constant of a length that export is to leave open
        sizes = (math.prod(hidden.shape[:-1]), *weight.shape) if sizes is None else sizes
        return HeadParams(
            temperature=None if isinstance(self.temperature, torch.Tensor) else float(self.temperature),
            softcap=None if self.softcap is None else float(self.softcap),
            logit_scale=float(self.logit_scale),
            compute_dtype=compute,
            entropy=bool(self.return_entropy),
            backend=backends.choose(self.backend, hidden),
            workspace=int(self.workspace_mb * 2**20),
            tolerance=certified_tolerance(self.backward, self.tolerance, compute, sizes, any(wants), hidden.device),
            row_tolerance=ROW_TOLERANCE if self.row_tolerance is None else float(self.row_tolerance),
            **others,
        )

    def flat_temperature(self, hidden, targets):
        """(N,) in the accumulator's dtype, or None for a number, which goes into the parameters."""
        if not isinstance(self.temperature, torch.Tensor):
            return None
        temperature = self.temperature.detach().to(inputs.accumulator_dtype(hidden))
        return temperature.expand(targets.shape).reshape(-1).contiguous()

    def flat_hint(self, hidden):
        """(N,) log-probs <= 0 in the accumulator's dtype, fit to sort by, or None."""
        if self.old_logprobs is None:
            return None
        hint = torch.nan_to_num(self.old_logprobs.detach(), nan=0.0, neginf=-1e4).clamp(max=0.0)
        return hint.reshape(-1).to(inputs.accumulator_dtype(hidden)).contiguous()


def compute_dtype(hidden, *others):
    """What tiles are cast to: autocast's dtype inside autocast, else the widest."""
    device = hidden.device.type
    if hidden.dtype != torch.float64 and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return functools.reduce(torch.promote_types, (x.dtype for x in others), hidden.dtype)


def certified_tolerance(backward, tolerance, compute, sizes, with_grad, device):
    """The tolerance of the certified backward, or None where the exact one is taken."""
    if not with_grad or backward == "exact" or (backward == "auto" and not is_worthwhile(compute, sizes, device)):
        return None
    if tolerance is not None:
        return float(tolerance)
    return AUTO_FP32_TOLERANCE if backward == "auto" and compute == torch.float32 else TOLERANCE


def is_worthwhile(compute, sizes, device):
    """Whether "auto" certifies."""
    least = CERTIFIED_FROM.get(device.type, CERTIFIED_FROM["cuda"])
    cells = CERTIFIED_CELLS_ONEDNN if device.type == "cpu" and products.onednn_is_faster() else 0
    # tokens last: a graph is bound to the answer
    large = compute != torch.float64 and all(a >= b for a, b in zip(sizes[::-1], least[::-1]))
    return large and sizes[0] * sizes[1] >= cells

"""The names of ``triton.language`` over torch, for mathematics that is written once; kernels/rebind.py has the rest."""

from types import SimpleNamespace

import torch

tl = SimpleNamespace(
    exp=torch.exp,
    log=torch.log,
    abs=torch.abs,
    where=torch.where,
    sigmoid=torch.sigmoid,
    zeros_like=torch.zeros_like,
    constexpr=None,
)


def split_sides(x, share):
    """-> x where it is above 0, else 0; x where it is not, else 0; ``share`` where it is above 0, else 1 - share (at 0
    anything). On a CPU ``where`` takes many times as long."""
    side = share if share == 0.5 else torch.sign(x).mul_(share - 0.5).add_(0.5)
    return x.clamp(min=0.0), x.clamp(max=0.0), side

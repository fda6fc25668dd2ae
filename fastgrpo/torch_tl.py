"""The names of ``triton.language`` over torch, for mathematics that is written once; kernels/rebind.py has the rest."""

from types import SimpleNamespace

import torch

tl = SimpleNamespace(
    exp=torch.exp,
    log=torch.log,
    abs=torch.abs,
    where=torch.where,
    sigmoid=torch.sigmoid,
    sqrt=torch.sqrt,
    zeros_like=torch.zeros_like,
    constexpr=None,
)

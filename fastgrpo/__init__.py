"""fastgrpo: GRPO's loss from hidden states and LM head to loss and gradients, without the logits."""

import importlib

from fastgrpo import reference
from fastgrpo.advantages import group_advantages
from fastgrpo.config import GRPOLossConfig
from fastgrpo.divergence import Divergence, linear_divergence
from fastgrpo.logprobs import LogProbs, TopKLogProbs, linear_logprobs
from fastgrpo.loss import GRPOLoss, grpo_loss

__version__ = "0.1.0"

__all__ = [
    "Divergence",
    "GRPOLoss",
    "GRPOLossConfig",
    "LogProbs",
    "TopKLogProbs",
    "group_advantages",
    "grpo_loss",
    "linear_divergence",
    "linear_logprobs",
    "reference",
]
OPTIONAL = ("integrations", "trainer", "vocab_parallel", "vocab_parallel_divergence")  # imported on use


def __getattr__(name):
    if name in OPTIONAL:
        return importlib.import_module(f"fastgrpo.{name}")
    raise AttributeError(f"module 'fastgrpo' has no attribute {name!r}")

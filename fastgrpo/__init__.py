"""fastgrpo: GRPO's loss from hidden states and LM head to loss and gradients, without the logits."""

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

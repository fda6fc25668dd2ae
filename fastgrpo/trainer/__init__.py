"""The thin trainer: ``GRPOTrainer(model, reward_funcs, train_dataset, config).train()``, ``SFTTrainer(model,
train_dataset, config).train()`` and ``DistillTrainer(model, teacher_model, train_dataset, config).train()``; needs
fastgrpo[train]."""

import importlib
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from fastgrpo.checks import need

if TYPE_CHECKING:
    from fastgrpo.trainer.config import GRPOConfig
    from fastgrpo.trainer.distill import DistillConfig, DistillTrainer
    from fastgrpo.trainer.loop import GRPOTrainer
    from fastgrpo.trainer.sft import SFTConfig, SFTTrainer

HOMES = {
    "GRPOConfig": "config",
    "GRPOTrainer": "loop",
    "SFTConfig": "sft",
    "SFTTrainer": "sft",
    "DistillConfig": "distill",
    "DistillTrainer": "distill",
}


@contextmanager
def quiet_bitsandbytes() -> Iterator[None]:
    """Inside, bitsandbytes may be imported (PEFT does) without its warning of kernels that this CPU does without."""
    logger = logging.getLogger("bitsandbytes")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def __getattr__(name: str):
    if name not in HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    for package in ("yaml", "accelerate", "matplotlib", "rich"):
        need(package)
    with quiet_bitsandbytes():
        return getattr(importlib.import_module(f"fastgrpo.trainer.{HOMES[name]}"), name)


__all__ = ["DistillConfig", "DistillTrainer", "GRPOConfig", "GRPOTrainer", "SFTConfig", "SFTTrainer"]

"""The thin trainer: ``GRPOTrainer(model, reward_funcs, train_dataset, config).train()``; needs fastgrpo[train]."""

import importlib

from fastgrpo.checks import need

HOMES = {"GRPOConfig": "config", "GRPOTrainer": "loop"}


def __getattr__(name):
    if name not in HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    for package in ("yaml", "accelerate", "matplotlib", "rich"):
        need(package)
    return getattr(importlib.import_module(f"fastgrpo.trainer.{HOMES[name]}"), name)


__all__ = ["GRPOConfig", "GRPOTrainer"]

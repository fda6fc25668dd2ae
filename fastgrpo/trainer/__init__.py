"""The thin trainer: ``GRPOTrainer(model, reward_funcs, train_dataset, config).train()``; needs fastgrpo[train]."""


def __getattr__(name):
    if name == "GRPOTrainer":
        from fastgrpo.trainer.loop import GRPOTrainer as found
    elif name == "GRPOConfig":
        from fastgrpo.trainer.config import GRPOConfig as found
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return found


__all__ = ["GRPOConfig", "GRPOTrainer"]

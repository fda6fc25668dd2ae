"""What a trainer is given besides its config, checked before a model loads, every mistake at once."""

from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch

from fastgrpo.checks import Checked, mistake, together
from fastgrpo.trainer import checkpoint
from fastgrpo.trainer.data import load_rows
from fastgrpo.trainer.model import check_source
from fastgrpo.trainer.rewards import RewardFunction, Rewards, name_rewards

Config = TypeVar("Config", bound=Checked)


class Given(NamedTuple):
    """What a run starts from."""

    rows: Any
    eval_rows: Any  # None: no evaluation
    rewards: dict[str, RewardFunction]
    start_from: Path | str | None  # a checkpoint


def choose(cls: type[Config], config: Any, args: Any, call: str) -> Config:
    """The config of a trainer: ``args`` is TRL's name of it; None: its defaults.

    Raises:
        TypeError: both are given, or what is given is no ``cls``.
    """
    if config is not None and args is not None:
        raise TypeError("args is another name of config: expected one of them, got both")
    given = args if config is None else config
    if given is not None and not isinstance(given, cls):
        raise TypeError(f"expected {call}, config (or args) a fastgrpo.trainer.{cls.__name__}, got {type(given)}")
    return cls() if given is None else given


def check(
    config: Any,
    model: Any,
    train_dataset: Any,
    eval_dataset: Any,
    reward_funcs: Rewards = (),
    load=load_rows,
) -> Given:
    """Datasets, rewards, the model's name and the checkpoint to go on from; ``load``: how a dataset becomes rows.
    ``config`` None: it is wrong in itself, and what depends on it is left unchecked.

    Raises:
        ValueError, TypeError: all that is wrong.
    """
    with together() as attempt:
        rows = attempt(load, train_dataset)
        eval_rows = None if eval_dataset is None else attempt(load, eval_dataset, "eval_dataset")
        first = [found[0] for found in (rows, eval_rows) if found is not None]
        rewards = {} if reward_funcs == () else attempt(name_rewards, reward_funcs, *first)
        if isinstance(model, str):
            attempt(check_source, model)
        elif not isinstance(model, torch.nn.Module):
            mistake(f"model must be a folder, a name or a causal LM, got {model!r:.80}")
        start_from = None if config is None else attempt(checkpoint.start, config)
        if config is not None:
            check_with(config, model, eval_dataset, rewards)
    assert rewards is not None  # else the mistake was raised
    return Given(rows, eval_rows, rewards, start_from)


def check_with(config, model, eval_dataset, rewards):
    """What a config asks of the other arguments."""
    if eval_dataset is None and (config.eval_strategy == "steps" or config.eval_on_start):
        mistake("eval_strategy and eval_on_start need an eval_dataset, got None")
    weights = getattr(config, "reward_weights", None)
    if weights is not None and rewards is not None and len(weights) != len(rewards):
        mistake(f"reward_weights must have one for each of {[*rewards]}, got {weights}")
    output = Path(config.output_dir)
    if not next(path for path in (output, *output.parents) if path.exists()).is_dir():
        mistake(f"output_dir must be a folder, or become one, got {config.output_dir!r}")
    base = output / "model"
    adapts = config.use_peft and isinstance(model, str) and not Path(model, "adapter_config.json").is_file()
    if adapts and base.exists() and Path(model).resolve() == base.resolve():
        mistake(f"output_dir must be another: the adapter would be written over its base, {model}")

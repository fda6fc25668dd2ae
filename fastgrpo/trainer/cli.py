"""The ``fastgrpo`` command."""

import argparse
import logging

from fastgrpo import __version__


def main(argv=None):
    parser = argparse.ArgumentParser(prog="fastgrpo", description="GRPO without the logits.")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True)
    train = commands.add_parser("train", help="train a model: fastgrpo train config.yaml [--key value] ...")
    train.add_argument("config", help="a YAML file, or a preset's name")
    commands.add_parser("demo", help="train a small model to sort digits, in about a minute on a CPU")
    options, overrides = parser.parse_known_args(argv)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns of kernels that this CPU could do without
    try:
        from transformers.utils.logging import disable_progress_bar

        from fastgrpo.trainer import GRPOTrainer

        disable_progress_bar()
        job, config = read(getattr(options, "config", "demo"), overrides)
        missing = {"model", "reward_funcs", "train_dataset"} - job.keys()
        if missing:
            raise ValueError(f"the config must also give {', '.join(sorted(missing))}")
        trainer = GRPOTrainer(config=config, **job)
    except (ValueError, TypeError, ImportError, OSError) as error:  # OSError: transformers finds no such model
        parser.error(str(error))
    trainer.train()
    return 0


def read(source, overrides):
    """A config and the command line's words -> (other arguments of GRPOTrainer, GRPOConfig)."""
    import yaml

    from fastgrpo.trainer.config import load_config

    try:
        return load_config(source, parse(overrides))
    except yaml.YAMLError as error:
        raise ValueError(f"this is not YAML: {error}") from error


def parse(words):
    """``--key value``, ``--key=value`` and ``--flag`` -> settings; values are YAML's."""
    import yaml

    from fastgrpo.trainer.config import Loader

    settings = {}
    words = [part for word in words for part in (word.split("=", 1) if word.startswith("--") else [word])]
    while words:
        key = words.pop(0)
        if not key.startswith("--"):
            raise ValueError(f"expected --key value, got {key!r}")
        flag = not words or words[0].startswith("--")
        settings[key[2:].replace("-", "_")] = True if flag else yaml.load(words.pop(0), Loader)
    return settings

"""The ``fastgrpo`` command."""

import argparse

from fastgrpo import __version__
from fastgrpo.checks import UserError
from fastgrpo.trainer import quiet_bitsandbytes

USAGE = "any setting may follow as --key value, or --key alone for true; --resume goes on from the newest checkpoint"


class Command(argparse.ArgumentParser):
    """Its help ends with the settings, which only the optional packages can tell."""

    def format_help(self):
        try:
            from fastgrpo.trainer import GRPOConfig  # noqa: F401 - where a package is missing, it names the extra
            from fastgrpo.trainer.job import settings_help

            return f"{super().format_help()}\n{settings_help()}"
        except ImportError as error:
            return f"{super().format_help()}\nThe settings cannot be listed: {error}\n"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="fastgrpo", description="GRPO without the logits.")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True, parser_class=Command)
    train = commands.add_parser(
        "train",
        help="train a model: fastgrpo train CONFIG [--key value] ...",
        description=f"Train a model; {USAGE}.",
        usage="fastgrpo train CONFIG [--key value] ... [--resume]",
    )
    train.add_argument("config", metavar="CONFIG", help="a YAML file, or a preset's name")
    commands.add_parser(
        "demo",
        help="train a small model to sort digits, in about a minute on a CPU",
        usage="fastgrpo demo [--key value] ...",
        description=f"Train a small model to sort digits; {USAGE}.",
    )
    options, overrides = parser.parse_known_args(argv)
    try:
        with quiet_bitsandbytes():
            trainer = make_trainer(getattr(options, "config", "demo"), overrides)
    except (ValueError, TypeError, ImportError, OSError) as error:  # OSError: transformers finds no such model
        parser.error(str(error))
    try:
        trainer.train()
    except (UserError, FloatingPointError) as error:
        parser.exit(1, f"fastgrpo: error: {error}\n")
    return 0


def make_trainer(source, overrides):
    """A GRPOTrainer from a config and the command line's words."""
    from fastgrpo.trainer import GRPOTrainer  # first: where a package is missing, it names the extra
    from fastgrpo.trainer.job import read

    job, config = read(source, overrides)
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    return GRPOTrainer(config=config, **job)

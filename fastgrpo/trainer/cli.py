"""The ``fastgrpo`` command."""

import argparse
import warnings
from contextlib import contextmanager
from pathlib import Path

import fastgrpo
from fastgrpo.checks import MISTAKES, UserError, need
from fastgrpo.trainer import quiet_bitsandbytes

USAGE = "any setting may follow as --key value, or --key alone for true; --resume goes on from the newest checkpoint"
PLAIN = warnings.formatwarning
COMMANDS = {  # name: (what it does, whose settings it takes)
    "train": ("train a model with GRPO", "train"),
    "sft": ("fine-tune a model on prompts and completions, conversations or texts", "sft"),
    "distill": ("train a model towards a teacher's distributions, on its own answers", "distill"),
    "demo": ("train a small model to sort digits, in about a minute on a CPU", "train"),
}


class Command(argparse.ArgumentParser):
    """Its help ends with the settings, which only the optional packages can tell. settings: whose, or nobody's."""

    def __init__(self, *arguments, settings=(), **options):
        super().__init__(*arguments, **options)
        self.settings = settings

    def format_help(self):
        if not self.settings:
            return f"{super().format_help()}\nfastgrpo COMMAND --help lists its presets and settings.\n"
        try:
            from fastgrpo.trainer import GRPOConfig  # noqa: F401 - where a package is missing, it names the extra
            from fastgrpo.trainer.describe import command_help

            return f"{super().format_help()}\n{command_help(self.settings)}"
        except ImportError as error:
            return f"{super().format_help()}\nThe settings cannot be listed: {error}\n"


def make_parser():
    parser = Command(prog="fastgrpo", description="GRPO without the logits, and what goes before or beside it.")
    parser.add_argument("--version", action="version", version=fastgrpo.__version__)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, (does, settings) in COMMANDS.items():
        config = "" if name == "demo" else " CONFIG"
        sub = commands.add_parser(
            name,
            help=does,
            description=f"{does.capitalize()}; {USAGE}.".replace("grpo", "GRPO").replace(" cpu", " CPU"),
            usage=f"fastgrpo {name}{config} [--key value] ... [--resume]",
            settings=(settings,),
        )
        sub.set_defaults(parser=sub)
        if config:
            sub.add_argument("config", metavar="CONFIG", help="a YAML file, or a preset's name")
    return parser


def warning_line(message, category, filename, lineno, line=None):
    """Of a warning that is meant for the user its text alone, without the place in the code."""
    if category is UserWarning and str(filename).startswith(str(Path(fastgrpo.__file__).parent)):
        return f"fastgrpo: warning: {message}\n"
    return PLAIN(message, category, filename, lineno, line)


@contextmanager
def brief_warnings():
    warnings.formatwarning = warning_line
    try:
        yield
    finally:
        warnings.formatwarning = PLAIN


@brief_warnings()
def main(argv: list[str] | None = None) -> int:
    options, overrides = make_parser().parse_known_args(argv)
    parser = options.parser
    trainers = make_trainers(getattr(options, "config", "demo"), overrides, COMMANDS[options.command][1])
    while trainer := make_next(trainers, parser):
        trainer.accelerator.print(f"{trainer.name}: {trainer.total} steps")
        try:
            trainer.train()
        except (UserError, FloatingPointError) as error:
            parser.exit(1, f"fastgrpo: error: {error}\n")
        del trainer  # its memory is the next one's
    return 0


def make_next(trainers, parser):
    """The next trainer, or None; what was wrong with it ends the command."""
    try:
        with quiet_bitsandbytes():
            return next(trainers, None)
    except MISTAKES as error:
        parser.error(str(error))


def make_trainers(source, overrides, settings):
    """The trainers of a config and the command line's words, each made when the one before has been trained."""
    need("yaml")
    from fastgrpo.trainer.job_file import read_file

    read_file(source, settings)  # before the packages, which take seconds
    from fastgrpo.trainer import GRPOTrainer  # noqa: F401 - first: where a package is missing, it names the extra
    from fastgrpo.trainer.job import trainers

    made = trainers(source, overrides, settings)
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    yield from made

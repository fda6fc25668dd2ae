"""The ``fastgrpo`` command."""

import argparse
from dataclasses import fields

from fastgrpo import __version__
from fastgrpo.trainer.demo import DemoConfig, run


def main(argv=None):
    parser = argparse.ArgumentParser(prog="fastgrpo", description="GRPO without the logits.")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True)
    demo = commands.add_parser("demo", help="train a small model to sort digits, in about a minute on a CPU")
    for field in fields(DemoConfig):
        name = "--" + field.name.replace("_", "-")
        demo.add_argument(name, type=type(field.default), default=field.default, help=f"default: {field.default}")
    options = vars(parser.parse_args(argv))
    options.pop("command")
    try:
        run(DemoConfig(**options))
    except (ValueError, ImportError) as error:
        parser.error(str(error))
    return 0

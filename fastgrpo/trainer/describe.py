"""Every setting in words, from the one place where it is described: the ``Args:`` of the class it is a field of.

``python -m fastgrpo.trainer.describe`` prints all of them as Markdown.
"""

import inspect
import re
import textwrap
import types
import typing
from collections.abc import Iterable, Iterator
from dataclasses import fields
from typing import Annotated, Any, Literal, NamedTuple

from fastgrpo.checks import Checked, annotations
from fastgrpo.trainer.job import KINDS
from fastgrpo.trainer.job_file import preset_names
from fastgrpo.trainer.judge import JudgeSettings
from fastgrpo.trainer.rewards import SHIPPED

CONFIGS = {command: kind.config for command, kind in KINDS.items()}
ENTRY = re.compile(r"^    (\w+(?:, \w+)*):(.*)$")
WIDTH = 100


class Setting(NamedTuple):
    name: str
    kind: str  # what it may be
    default: str
    text: str  # what it does; of several settings described together, the same


class Group(NamedTuple):
    """The settings of one class that a config is made of."""

    title: str
    settings: list[Setting]


def descriptions(cls: type) -> dict[str, str]:
    """{setting: text} of the ``Args:`` in a class's own docstring."""
    lines = inspect.cleandoc(cls.__doc__ or "").partition("Args:\n")[2].splitlines()
    found, names = {}, []
    for line in lines:
        if line.strip() and not line.startswith("    "):
            break
        if entry := ENTRY.match(line):
            names = entry[1].split(", ")
            found |= dict.fromkeys(names, entry[2].strip())
        elif line.strip():
            found |= {name: f"{found[name]} {line.strip()}".strip() for name in names}
    return found


def kind(hint: Any) -> str:
    """What an annotation allows, in short."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        return f"{arguments[0].__name__} {arguments[1][0]}".replace("float a finite number", "float")
    if origin is Literal:
        return " | ".join(str(choice) for choice in arguments)
    if origin in (typing.Union, types.UnionType):
        return " | ".join(kind(argument) for argument in arguments)
    if origin is list:
        return f"list of {kind(arguments[0])}"
    return "None" if hint is types.NoneType else hint.__name__


def groups(cls: type[Checked]) -> Iterator[Group]:
    """The settings of a config, those of the class itself first; each under the first class that describes it."""
    defaults, hints, seen = {field.name: field for field in fields(cls)}, annotations(cls), set()  # pyright: ignore
    for base in cls.__mro__:
        words = descriptions(base).items()
        told = {name: plain(text) for name, text in words if name in hints and name not in seen}
        if issubclass(base, Checked) and told:
            seen |= told.keys()
            title = (base.__doc__ or "").split("\n\n")[0].replace("\n", " ")
            title = plain(" ".join(title.split())).replace("``", "")
            settings = [Setting(n, kind(hints[n]), default(defaults[n]), told[n]) for n in told]
            yield Group(f"{base.__name__}: {title}", settings)


def plain(text: str) -> str:
    """Without reStructuredText's roles: a reference is its last name."""
    return re.sub(r":\w+:`(?:[\w.]+\.)?(\w+)`", r"``\1``", text)


def default(field):
    return "required" if repr(field.default).startswith("<") else repr(field.default)


def settings_help(*classes: type[Checked]) -> str:
    """Every setting of some configs, for a terminal; what they share stands once."""
    indent = textwrap.TextWrapper(WIDTH, initial_indent=" " * 6, subsequent_indent=" " * 6, break_on_hyphens=False)
    lines, seen = [], set()
    for group in (group for cls in classes for group in groups(cls)):
        new = [setting for setting in group.settings if setting not in seen]
        seen |= set(new)
        lines += ["", *textwrap.wrap(group.title, WIDTH)] * bool(new)
        for name, allowed, default, text in new:
            lines.append(f"  --{name} ({allowed}; {default})")
            lines += indent.wrap(text.replace("``", ""))
    return "\n".join([*lines[1:], ""])


def command_help(commands: Iterable[str]) -> str:
    """What the help of some commands says beside their usage."""
    lines = []
    for name in commands:
        lines += [
            f"presets of {name}: {', '.join(preset_names(name))}",
            f"what {name} is given: {', '.join(KINDS[name].job)}",
        ]
    if {"train", "distill"} & {*commands}:
        lines += [f"reward_funcs: {', '.join(SHIPPED)}, or your own file.py:function"]
    lines += ["settings (what they may be; default), named as in TRL:", ""]
    return "\n".join(lines) + "\n" + settings_help(*(CONFIGS[name] for name in commands))


def settings_table(cls: type[Checked]) -> str:
    """The settings of a config as Markdown, a table for each group."""
    parts = []
    for group in groups(cls):
        rows = [f"| `{s.name}` | {escape(s.kind)} | `{s.default}` | {escape(s.text)} |" for s in group.settings]
        parts += [f"**{group.title}**", "", "| setting | values | default | |", "|---|---|---|---|", *rows, ""]
    return "\n".join(parts).replace("``", "`")


def escape(text):
    return text.replace("|", "\\|")


if __name__ == "__main__":
    for name, cls in {**CONFIGS, "the reward judge": JudgeSettings}.items():
        print(f"## {name}\n\n{settings_table(cls)}")

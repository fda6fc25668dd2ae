"""What a job's YAML file or a preset says, read without the packages that training needs."""

import difflib
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

PRESETS = Path(__file__).parent / "presets"


class Loader(yaml.SafeLoader):
    """YAML 1.2's numbers: 1e-6 is one; and its names, none of which may stand twice."""

    def construct_mapping(self, node, deep=False):
        seen = set()
        for name in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if name.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"{name.value} stands twice", name.start_mark)
            seen.add(name.value)
        return super().construct_mapping(node, deep)


NUMBER = re.compile(r"[-+]?\d+\.?\d*[eE][-+]?\d+$")
Loader.add_implicit_resolver("tag:yaml.org,2002:float", NUMBER, list("+-0123456789"))


@contextmanager
def as_mistake() -> Iterator[None]:
    """What is no YAML is the user's mistake."""
    try:
        yield
    except yaml.YAMLError as error:
        raise ValueError(f"this is not YAML: {error}") from error


def read_file(source: str | Path, command: str = "train") -> dict[str, Any]:
    """The settings of a YAML file or preset.

    Raises:
        ValueError: it is neither, a preset of another command, not YAML, or holds no settings.
    """
    path = Path(source) if Path(source).is_file() else PRESETS / f"{source}.yaml"
    if not path.is_file():
        raise ValueError(no_such_config(str(source), command))
    with as_mistake():
        settings = read_yaml(path)
    if not isinstance(settings, dict):
        got = "nothing: it is empty" if settings is None else repr(settings)
        raise ValueError(f"{path} must hold settings 'name: value', got {got}")
    if strange := [name for name in settings if not isinstance(name, str)]:
        raise ValueError(f"{path} must hold settings 'name: value', got the name {strange[0]!r}")
    if path.parent == PRESETS and (other := meant_for(settings)) != command:
        raise ValueError(f"{source} is a preset of another command: fastgrpo {other} {source}")
    return settings


def no_such_config(source: str, command: str) -> str:
    """What to say of a name that is no file and no preset."""
    if source.endswith((".yaml", ".yml")):
        return f"config must be a YAML file or a preset, got {source!r}, which does not exist"
    close = difflib.get_close_matches(source, preset_names(command), n=1)
    meant = f": did you mean {close[0]}?" if close else ""
    return f"config must be a YAML file or a preset ({', '.join(preset_names(command))}), got {source!r}{meant}"


def preset_names(command: str) -> list[str]:
    """The presets that are for a command."""
    return sorted(path.stem for path in PRESETS.glob("*.yaml") if meant_for(read_yaml(path)) == command)


def meant_for(settings):
    """The command that a preset is for."""
    return "distill" if "teacher_model" in settings else "train" if "reward_funcs" in settings else "sft"


def read_yaml(path):
    with path.open(encoding="utf-8") as file:
        return yaml.load(file, Loader)

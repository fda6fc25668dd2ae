"""A job as a YAML file or preset and the command line's words say it."""

import re
from pathlib import Path
from typing import Any

import yaml

from fastgrpo.checks import annotations, fits
from fastgrpo.trainer.config import JOB, GRPOConfig

PRESETS = Path(__file__).parent / "presets"


class Loader(yaml.SafeLoader):
    """YAML 1.2's numbers: 1e-6 is one."""


Loader.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(r"[-+]?\d[\d.]*[eE][-+]?\d+$"), list("+-0123456789"))


def read(source: str | Path, words: list[str]) -> tuple[dict[str, Any], GRPOConfig]:
    """A YAML file or preset and the command line's words -> (other arguments of GRPOTrainer, GRPOConfig).

    Raises:
        ValueError: as :func:`parse` and :func:`load_config`, not YAML, or without what every job needs.
    """
    try:
        job, config = load_config(source, parse(words))
    except yaml.YAMLError as error:
        raise ValueError(f"this is not YAML: {error}") from error
    missing = {"model", "reward_funcs", "train_dataset"} - job.keys()
    if missing:
        raise ValueError(f"the config must also give {', '.join(sorted(missing))}")
    return job, config


def load_config(source: str | Path, overrides: dict[str, Any] | None = None) -> tuple[dict[str, Any], GRPOConfig]:
    """A YAML file or preset and settings that go before its own -> (other arguments of GRPOTrainer, GRPOConfig).

    Raises:
        ValueError: unknown preset or key, wrong type, impossible combination.
    """
    path = Path(source) if Path(source).is_file() else PRESETS / f"{source}.yaml"
    if not path.is_file():
        raise ValueError(f"config must be a YAML file or a preset ({preset_names()}), got {str(source)!r}")
    with path.open(encoding="utf-8") as file:
        settings = yaml.load(file, Loader)
    if not isinstance(settings, dict):
        raise ValueError(f"{path} must hold settings 'name: value', got {settings!r}")
    settings |= overrides or {}
    settings["resume_from_checkpoint"] = settings.pop("resume", settings.get("resume_from_checkpoint"))
    job = {key: settings.pop(key) for key in JOB if key in settings}
    return job, GRPOConfig(**settings)


def parse(words: list[str]) -> dict[str, Any]:
    """``--key value``, ``--key=value`` and ``--flag`` -> settings; values are YAML's."""
    settings = {}
    words = [part for word in words for part in (word.split("=", 1) if word.startswith("--") else [word])]
    while words:
        key = words.pop(0)
        if not key.startswith("--"):
            raise ValueError(f"expected --key value, got {key!r}")
        name, alone = key[2:].replace("-", "_"), not words or words[0].startswith("--")
        if alone and not is_flag(name):
            raise ValueError(f"{key} needs a value: {key} VALUE")
        settings[name] = True if alone else yaml.load(words.pop(0), Loader)
    return settings


def is_flag(name):
    """Whether a setting can be true; a name that is no setting is refused later, with what may be meant."""
    return name not in JOB and fits(True, annotations(GRPOConfig).get(name, bool))


def preset_names():
    return ", ".join(sorted(path.stem for path in PRESETS.glob("*.yaml")))


def settings_help() -> str:
    """Every setting with its default, for people."""
    lines = [
        f"presets: {preset_names()}",
        f"the job: {', '.join(JOB)}",
        "settings and defaults, as in TRL (what is ours is explained in help(fastgrpo.trainer.GRPOConfig)):",
    ]
    lines += [f"  {name:<36} {field.default!r}" for name, field in sorted(GRPOConfig.__dataclass_fields__.items())]
    return "\n".join([*lines, ""])

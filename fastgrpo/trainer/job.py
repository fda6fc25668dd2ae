"""A job as a YAML file or preset and the command line's words say it."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from fastgrpo.checks import Checked, annotations, fits, mistake, together
from fastgrpo.trainer import arguments, distill, sft
from fastgrpo.trainer.config import JOB, GRPOConfig
from fastgrpo.trainer.data import load_rows
from fastgrpo.trainer.job_file import Loader, as_mistake, read_file
from fastgrpo.trainer.loop import GRPOTrainer
from fastgrpo.trainer.supervised import load_examples


class Kind(NamedTuple):
    """What a command makes of a file."""

    config: type[Checked]
    job: tuple[str, ...]  # what is the trainer's argument, not a setting
    needed: set[str]
    trainer: Callable[..., GRPOTrainer]


KINDS = {
    "train": Kind(GRPOConfig, JOB, {"model", "reward_funcs", "train_dataset"}, GRPOTrainer),
    "sft": Kind(sft.SFTConfig, sft.SFT_JOB, {"model", "train_dataset"}, sft.SFTTrainer),
    "distill": Kind(
        distill.DistillConfig,
        distill.DISTILL_JOB,
        {"model", "teacher_model", "train_dataset"},
        distill.DistillTrainer,
    ),
}


def trainers(source: str | Path, words: list[str], command: str = "train") -> Iterator[GRPOTrainer]:
    """A YAML file or preset and the command line's words -> the trainers they ask for, each made when the one before
    has been trained: an ``SFTTrainer`` for a job's ``sft`` section, then that of the ``command``.

    Raises:
        ValueError, TypeError: all mistakes in the settings, the datasets and the rewards.
    """
    with as_mistake():
        settings = read(source, parse(words, command), command)
    job, config = check(settings, command)
    if section := job.pop("sft", None):
        trainer, job["model"] = sft.before(section, job, config)
        if trainer is not None:
            yield trainer
            trainer.accelerator.wait_for_everyone()
            del trainer  # its memory is the next one's
    yield KINDS[command].trainer(config=config, **job)


def check(settings, command):
    """-> (the trainer's other arguments, its config): datasets read, rewards found."""
    kind = KINDS[command]
    job = {key: settings.pop(key) for key in kind.job if key in settings}
    config, found = None, {}
    with together() as attempt:
        if missing := kind.needed - job.keys():
            hint = ", as --model PATH; presets whose names end in -tiny make their own" if "model" in missing else ""
            mistake(f"the config must also give {', '.join(sorted(missing))}{hint}")
        config = attempt(kind.config, **settings)
        if config is not None and isinstance(job.get("sft"), dict):
            job["sft"], config = attempt(sft.hand_on_resume, job["sft"], config) or (None, config)
        found = {} if missing else attempt(check_job, job, config, command)
    return {**job, **(found or {})}, config


def check_job(job, config, command):
    """-> what was found behind the names in a job."""
    section = job.get("sft")
    with together() as attempt:
        load = load_examples if command == "sft" else load_rows
        rest = {name: job.get(name) for name in ("model", "train_dataset", "eval_dataset")}
        given = attempt(arguments.check, config, **rest, reward_funcs=job.get("reward_funcs", ()), load=load)
        if command == "distill" and config is not None and given:
            attempt(distill.check, config, job["model"], job["teacher_model"], given)
        if section is not None and not isinstance(section, dict):
            mistake(f"sft must hold settings 'name: value', got {section!r}")
        elif section and config is not None:
            attempt(load_examples, section.get("train_dataset", job["train_dataset"]), "sft's train_dataset")
    assert given is not None  # else the mistake was raised
    found = {"train_dataset": given.rows, "eval_dataset": given.eval_rows}
    return found | ({"reward_funcs": [*given.rewards.values()]} if given.rewards else {})


def load_config(
    source: str | Path, overrides: dict[str, Any] | None = None, command: str = "train"
) -> tuple[dict[str, Any], Any]:
    """A YAML file or preset and settings that go before its own -> (other arguments of the trainer, its config).

    Raises:
        ValueError: unknown preset, unknown keys, wrong types, impossible combinations.
    """
    settings, kind = read(source, overrides, command), KINDS[command]
    job = {key: settings.pop(key) for key in kind.job if key in settings}
    return job, kind.config(**settings)


def read(source: str | Path, overrides: dict[str, Any] | None = None, command: str = "train") -> dict[str, Any]:
    """The settings of a YAML file or preset, after those that go before its own."""
    settings = read_file(source, command) | (overrides or {})
    settings["resume_from_checkpoint"] = settings.pop("resume", settings.get("resume_from_checkpoint"))
    return settings


def parse(words: list[str], command: str = "train") -> dict[str, Any]:
    """``--key value``, ``--key=value`` and ``--flag`` -> settings; values are YAML's."""
    settings = {}
    words = [part for word in words for part in (word.split("=", 1) if word.startswith("--") else [word])]
    while words:
        key = words.pop(0)
        if not key.startswith("--"):
            raise ValueError(f"expected --key value, got {key!r}")
        name, alone = key[2:].replace("-", "_"), not words or words[0].startswith("--")
        if alone and not is_flag(name, KINDS[command]):
            raise ValueError(f"{key} needs a value: {key} VALUE")
        settings[name] = True if alone else yaml.load(words.pop(0), Loader)
    return settings


def is_flag(name, kind):
    """Whether a setting can be true; a name that is no setting is refused later, with what may be meant."""
    return name not in kind.job and fits(True, annotations(kind.config).get(name, bool))

"""Settings in words: every one is described, in one place, and a config's mistakes are told together."""

import dataclasses

import numpy as np
import pytest

pytest.importorskip("accelerate")
pytest.importorskip("rich")

from fastgrpo import checks
from fastgrpo.trainer import DistillConfig, GRPOConfig, GRPOTrainer, SFTConfig, cli, describe
from fastgrpo.trainer.judge import JudgeSettings

import trainer_job

pytestmark = pytest.mark.quick


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Real memory: transformers fills what it allocates."""


@pytest.mark.parametrize("cls", [GRPOConfig, SFTConfig, DistillConfig, JudgeSettings], ids=lambda cls: cls.__name__)
def test_every_setting_is_described_once(cls):
    told = [setting for group in describe.groups(cls) for setting in group.settings]
    names = [field.name for field in dataclasses.fields(cls)]
    assert sorted(setting.name for setting in told) == sorted(names)  # none twice, none undescribed
    assert all(len(setting.text) > 5 and ":class:" not in setting.text for setting in told)
    for base in cls.__mro__:  # and nothing is described that is no setting
        assert describe.descriptions(base).keys() <= set(names), base


def test_what_a_description_is_made_of():
    settings = {s.name: s for group in describe.groups(GRPOConfig) for s in group.settings}
    assert settings["beta"][:3] == ("beta", "float >= 0", "0.0")
    assert settings["beta"].text.startswith("weight of the KL term; above 0 ")
    assert settings["num_generations"].text.startswith("answers a prompt, the group")  # the config's own words go first
    assert settings["token_budget"].kind == "int >= 1 | auto"
    assert settings["sapo_temperature_pos"].text == settings["sapo_temperature_neg"].text
    assert settings["token_budget"].text.endswith("halved when memory runs out.")  # over two lines


def test_help_names_the_commands(capsys):
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    out = capsys.readouterr().out
    assert all(f"    {name} " in out for name in cli.COMMANDS)
    assert "fastgrpo COMMAND --help lists its presets and settings" in out
    assert "--num_generations" not in out


@pytest.mark.parametrize("command", ["train", "sft", "distill"])
def test_help_describes_the_settings(command, capsys):
    with pytest.raises(SystemExit) as end:
        cli.main([command, "--help"])
    out = " ".join(capsys.readouterr().out.split())
    assert end.value.code == 0
    configs = [cls for name, cls in describe.CONFIGS.items() if command == name]
    settings = {s for cls in configs for group in describe.groups(cls) for s in group.settings}
    assert len(settings) > 50
    for name, kind, default, text in settings:
        assert out.count(f"--{name} ({kind}; {default}) {' '.join(text.replace('``', '').split())}") == 1, name


def test_markdown_has_every_setting():
    lines = describe.settings_table(SFTConfig).splitlines()
    assert (
        "| `max_length` | int >= 1 \\| None | `1024` | longer sequences are cut at their end; None: never. |" in lines
    )
    assert len([line for line in lines if line.startswith("| `")]) == len(dataclasses.fields(SFTConfig))


def test_numpy_s_numbers_are_python_s():
    """A checkpoint is loaded without numpy's types, a log is JSON."""
    config = GRPOConfig(learning_rate=np.float64(1e-3), beta=np.float32(0.5), warmup_steps=1)
    assert [type(x) for x in (config.learning_rate, config.beta, config.warmup_steps)] == [float, float, int]
    assert (config.learning_rate, config.beta) == (1e-3, 0.5)


def test_mistakes_are_told_together():
    with pytest.raises(ValueError, match="3 mistakes:") as told:
        GRPOConfig(lr=0.1, beta=-1.0, optim="sgd")
    lines = str(told.value).splitlines()[1:]
    assert [line.split()[1] for line in lines] == ["lr", "beta", "optim"]
    assert lines[0] == "- lr is not a setting: say learning_rate"
    with pytest.raises(ValueError, match="2 mistakes:") as told:
        GRPOConfig(num_generations=3, load_in_4bit=True, seed=1)
    assert [str(error).split()[0] for error in told.value.found] == ["load_in_4bit", "num_generations"]
    with pytest.raises(ValueError, match=r"^num_generations must divide"):  # one is told as it always was
        GRPOConfig(num_generations=3)


def test_mistakes_of_a_whole_job_are_told_together(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("fastgrpo.trainer.model.load_model", None)
    (tmp_path / "job.yaml").write_text(
        "model: no/such/model\ntrain_dataset: nowhere.jsonl\nreward_funcs: [exact]\nbeta: -1\nlearning_rat: 1\n"
        "eval_dataset: [{prompt: a}]\nsft: 3\n"
    )
    with pytest.raises(SystemExit) as end:
        cli.main(["train", str(tmp_path / "job.yaml"), "--max_steps", "many"])
    said = capsys.readouterr().err
    assert end.value.code == 2
    assert "error: 7 mistakes:\n" in said
    parts = ("beta must be >= 0", "did you mean learning_rate?", "max_steps must be int", "model must be a folder",
             "train_dataset must be a .jsonl", "reward must be one of", "sft must hold settings")  # fmt: skip
    for part in parts:
        assert part in said


def test_what_is_missing_is_told_with_the_rest(tmp_path, capsys):
    (tmp_path / "job.yaml").write_text("model: tiny:sort\nbeta: -1\n")
    with pytest.raises(SystemExit):
        cli.main(["train", str(tmp_path / "job.yaml")])
    said = capsys.readouterr().err
    assert "- the config must also give reward_funcs, train_dataset\n- beta must be >= 0" in said


def test_an_error_of_a_checked_function_is_noted_and_others_are_not():
    def gather(*functions):
        with checks.together() as attempt:
            return [attempt(function) for function in functions]

    def wrong(message="a"):
        checks.mistake(message)

    with pytest.raises(KeyError):
        gather(wrong, lambda: {}["not a mistake"])
    with pytest.raises(TypeError, match="unhashable"):  # the only one, as it came
        gather(lambda: {[]: 1})
    with pytest.raises(ValueError, match="2 mistakes:\n- a\n- a"):
        gather(wrong, lambda: 3, wrong)
    assert gather(lambda: 3) == [3]
    with pytest.raises(ValueError, match="c"):  # nothing is gathered any more
        wrong("c")


def test_args_is_config(tmp_path):
    """As in trl.GRPOTrainer(model, reward_funcs, args=..., train_dataset=...)."""
    model, tokenizer = trainer_job.make_model()
    config = GRPOConfig(output_dir=str(tmp_path), **trainer_job.SETTINGS)
    trainer = GRPOTrainer(
        model=model, reward_funcs=trainer_job.digits, args=config, train_dataset=trainer_job.problems(10),
        processing_class=tokenizer,
    )  # fmt: skip
    assert trainer.config is config


def test_an_adapter_is_not_written_over_its_base(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model/config.json").write_text("{}")
    config = GRPOConfig(output_dir=str(tmp_path), use_peft=True)
    with pytest.raises(ValueError, match="output_dir must be another: the adapter would be written over its base"):
        GRPOTrainer(str(tmp_path / "model"), "exact_answer", [{"prompt": "1=", "answer": "1"}], config)


@pytest.mark.parametrize(
    ("words", "want"),
    [
        (["train", "job.yaml"], "got 'job.yaml', which does not exist"),
        (["train", "arithmetic_tiny"], "did you mean arithmetic-tiny?"),
        (["train", "sft-tiny"], "sft-tiny is a preset of another command: fastgrpo sft sft-tiny"),
        (["sft", "demo"], "demo is a preset of another command: fastgrpo train demo"),
        (["train", "real"], "must also give model, as --model PATH; presets whose names end in -tiny"),
    ],
    ids=str,
)
def test_the_command_line_names_the_cure(words, want, capsys):
    with pytest.raises(SystemExit):
        cli.main(words)
    said = capsys.readouterr().err
    assert want in said
    assert said.startswith(f"usage: fastgrpo {words[0]} CONFIG")


FILES = {
    "a name that is no text": ("model: tiny:sort\nyes: 3\n", "must hold settings 'name: value', got the name True"),
    "a name that stands twice": ("beta: 0.1\nmodel: tiny:sort\nbeta: 0.2\n", "beta stands twice"),
    "twice in a section": ("sft: {beta: 1, beta: 2}\n", "beta stands twice"),
    "empty": ("", "must hold settings 'name: value', got nothing: it is empty"),
}


@pytest.mark.parametrize("name", FILES)
def test_what_a_file_must_hold_is_told(tmp_path, capsys, name):
    text, want = FILES[name]
    (tmp_path / "job.yaml").write_text(text)
    with pytest.raises(SystemExit):
        cli.main(["train", str(tmp_path / "job.yaml")])
    said = capsys.readouterr().err
    assert want in said
    assert "job.yaml" in said

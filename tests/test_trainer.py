"""The trainer as a whole: its settings, its data, its memory options, and how thin it is."""

import ast
import io
import json
import tokenize
from pathlib import Path

import pytest
import torch

pytest.importorskip("accelerate")

from fastgrpo import GRPOLossConfig
from fastgrpo.checks import UserError
from fastgrpo.trainer import GRPOConfig, GRPOTrainer, cli, examples
from fastgrpo.trainer import model as models
from fastgrpo.trainer.data import draw, encode, load_rows, score
from fastgrpo.trainer.job import load_config, parse
from fastgrpo.trainer.learner import Learner

import trainer_job

ROWS = [{"prompt": "12=", "answer": "12"}, {"prompt": "31=", "answer": "13"}]


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Real memory: transformers fills what it allocates."""


@pytest.fixture
def no_model(monkeypatch):
    """Any attempt to load or make a model is a failure."""

    def load(*_):
        raise AssertionError("a model was loaded before the mistake was found")

    monkeypatch.setattr("fastgrpo.trainer.model.load_model", load)


MISTAKES = [
    ({"num_generations": 3}, "num_generations must divide a rank's rollout of 8 answers"),
    ({"lr_scheduler_type": "warp"}, "lr_scheduler_type must be one of 'constant'"),
    ({"num_generations": 1}, "num_generations must be >= 2, got 1"),
    ({"steps_per_generation": 3, "gradient_accumulation_steps": 2, "num_generations": 2}, "must be a multiple of"),
    ({"learning_rate": "fast"}, "learning_rate must be a number >= 0, got 'fast'"),
    ({"max_steps": 0}, "max_steps must be > 0 or -1"),
    ({"max_steps": 2.5}, "max_steps must be int, got 2.5"),
    ({"beta": -0.1}, "beta must be >= 0, got -0.1"),
    ({"loss_type": "ppo"}, "loss_type must be one of"),
    ({"delta": 2.0, "loss_type": "cispo"}, "delta bounds the clipped surrogate"),
    ({"scale_rewards": "max"}, "scale_rewards must be one of"),
    ({"top_p": 0.0}, r"top_p must be in \(0, 1\]"),
    ({"token_budget": 0}, "token_budget must be >= 1"),
    ({"packing": "yes"}, "packing must be one of"),
    ({"optim": "sgd"}, "optim must be one of"),
    ({"dtype": "float7"}, "dtype must be one of 'auto', 'bfloat16', 'float16', 'float32', 'float64', got 'float7'"),
    ({"loss_type": "gspo"}, "got 'gspo': GSPO is importance_sampling_level='sequence'"),
    ({"kl_coef": 0.1}, "kl_coef is not a setting: say beta"),
    ({"clip_eps": 0.1}, "clip_eps is not a setting: say epsilon"),
    ({"lr": 0.1}, "lr is not a setting: say learning_rate"),
    ({"load_in_4bit": True}, "need use_peft=True"),
    ({"load_in_4bit": True, "load_in_8bit": True, "use_peft": True}, "cannot both be True"),
    ({"sync_ref_model": True}, "sync_ref_model needs a reference"),
    ({"sync_ref_model": True, "beta": 0.1, "use_peft": True}, "model without its adapter"),
    ({"use_vllm": True, "loss_type": "vespo"}, "vllm"),
    ({"vllm_mode": "remote"}, "vllm_mode must be one of 'colocate', 'server'"),
    ({"vllm_importance_sampling_clip_min": 4.0}, "must be below clip_max"),
    ({"report_to": "carrier-pigeon"}, "report_to must be one of"),
    ({"learning_rat": 1.0}, "learning_rat is not a setting: did you mean learning_rate?"),
    ({"train_datasets": "x"}, "did you mean train_dataset?"),
    ({"generation_batch_size": 64}, "generation_batch_size is not a setting: say steps_per_generation"),
    ({"per_device_eval_batch_size": 8}, "is not a setting: evaluation is batched by max_generation_tokens"),
    ({"fp16": True, "bf16": True}, "fp16 and bf16 cannot both be True"),
    ({"fp16": True, "dtype": "bfloat16"}, "fp16 computes in float16: dtype must be 'float32'.* got 'bfloat16'"),
    ({"dtype": "float16"}, "dtype 'float16' needs use_peft=True: trained weights must be fp32.* say fp16=True"),
    ({"advantage_estimator": "ppo"}, "advantage_estimator must be one of 'grpo', 'rloo'"),
    ({"advantage_estimator": "rloo", "scale_rewards": "batch"}, "scale_rewards must be left out with 'rloo'"),
    ({"advantage_estimator": "pass_at_k", "pass_at_k": 8}, "pass_at_k must be from 2 to 7"),
    ({"multi_objective_aggregation": "normalize_then_sum", "scale_rewards": False}, "needs advantage_estimator 'grpo'"),
    ({"max_resample_times": -1}, "max_resample_times must be >= 0, got -1"),
    ({"vllm_geometric_mask_max": 0.9}, "vllm_geometric_mask_max must be > 1 or None, got 0.9"),
    ({"vllm_geometric_mask_min": 0.9}, "vllm_geometric_mask_min needs vllm_geometric_mask_max"),
    ({"lr_scheduler_kwargs": {"power": 2}}, "lr_scheduler_kwargs must be keywords of the schedule 'linear', got {'pow"),
]  # fmt: skip
if not torch.cuda.is_available():
    MISTAKES += [
        ({"use_liger_kernel": True}, "need a CUDA GPU, and there is none"),
        ({"optim": "paged_adamw_8bit"}, "pages GPU memory and there is no CUDA GPU"),
        ({"attn_implementation": "flash_attention_2"}, r"pip install 'fastgrpo\[flash\]'"),
    ]


@pytest.mark.quick
@pytest.mark.parametrize(("settings", "message"), MISTAKES, ids=[str(m[0]) for m in MISTAKES])
def test_mistakes_in_the_config(settings, message):
    with pytest.raises(ValueError, match=message):
        GRPOConfig(**settings)


ARGUMENTS = [
    ({"reward_funcs": "exact"}, "reward must be one of"),
    ({"reward_funcs": []}, "at least one function"),
    ({"reward_funcs": "no.such.module:f"}, "cannot be loaded"),
    ({"reward_funcs": "countdown"}, r"reward countdown needs the columns \['numbers', 'target'\]"),
    (
        {"config": GRPOConfig(reward_weights=[1.0, 2.0])},
        r"reward_weights must have one for each of \['exact_answer'\], got \[1.0, 2.0\]",
    ),
    ({"train_dataset": "no/such/file.jsonl"}, "train_dataset must be a .jsonl .* got 'no/such/file.jsonl', which does"),
    ({"train_dataset": []}, "at least one row"),
    ({"train_dataset": [{"question": "?"}]}, r"must have a 'prompt', .* got the keys \['question'\] at row 0"),
    ({"train_dataset": [*ROWS, {"prompt": "1="}]}, "same keys"),
    ({"train_dataset": [{"prompt": [{"text": "?"}]}]}, "must have a 'prompt', text or chat messages"),
    ({"train_dataset": "world:chess"}, "NAME one of"),
    ({"model": "tiny:chess"}, "NAME one of"),
    ({"config": GRPOConfig(eval_strategy="steps")}, "need an eval_dataset"),
    ({"reward_funcs": lambda completions: [0.0]}, "must accept what it does not use"),
    ({"eval_dataset": [{"prompt": "1="}]}, r"reward exact_answer needs the columns \['answer'\], got \['prompt'\]"),
    ({"train_dataset": {"train": ROWS}}, "must have a length and rows by number, got dict"),
    ({"train_dataset": __file__}, "train_dataset must be a .jsonl or .json file"),
    (
        {"train_dataset": [{"prompt": [{"role": "user", "content": "12="}], "answer": "12"}]},
        "train_dataset has chat prompts, but tokenizer '.*' no chat_template",
    ),
    ({"reward_funcs": "my_rewards.py"}, "'path/file.py:function'"),
    ({"reward_funcs": f"{trainer_job.__file__}:digit"}, r"has no function 'digit', it has \['digits', 'make_model',"),
    ({"config": {"max_steps": 3}}, "config .* a fastgrpo.trainer.GRPOConfig, got <class 'dict'>"),
    ({"args": object(), "config": None}, r"config \(or args\) a fastgrpo.trainer.GRPOConfig, got <class 'object'>"),
    ({"args": GRPOConfig()}, "args is another name of config: expected one of them, got both"),
    (
        {"train_dataset": GRPOConfig(), "config": ROWS},
        r"expected GRPOTrainer\(model, reward_funcs, train_dataset, config",
    ),
    ({"model": "./no/model"}, "model must be a folder, .* got './no/model', which does not exist"),
    ({"model": "no folder"}, "model must be a folder"),
    (
        {"config": GRPOConfig(resume_from_checkpoint=True, save_strategy="no")},
        "needs a checkpoint: output_dir trainer_output holds none, and save_strategy is 'no'",
    ),
    ({"config": GRPOConfig(beta=0.1, sync_ref_model=True), "peft_config": object()}, "model without its adapter"),
    ({"model": 5}, "model must be a folder, a name or a causal LM, got 5"),
    ({"config": GRPOConfig(output_dir=f"{__file__}/run")}, "output_dir must be a folder, or become one, got '/"),
    (
        {"config": GRPOConfig(resume_from_checkpoint=str(Path(__file__).parent))},
        "resume_from_checkpoint must be True or a checkpoint folder, got '/",
    ),
    (
        {"train_dataset": [*ROWS, *[{"prompt": "123456=", "answer": "1"}] * 8, {"prompt": " ", "answer": "1"}]},
        "a dataset's prompts must have tokens, got ' ', which has none",
    ),
]


@pytest.mark.parametrize(("arguments", "message"), ARGUMENTS, ids=[a[1][:40] for a in ARGUMENTS])
def test_mistakes_in_the_arguments_are_found_before_a_model_loads(no_model, monkeypatch, tmp_path, arguments, message):
    monkeypatch.chdir(tmp_path)
    plain = {"model": "tiny:sort", "reward_funcs": "exact_answer", "train_dataset": ROWS,
             "config": GRPOConfig(output_dir=str(tmp_path))}  # fmt: skip
    with pytest.raises((ValueError, TypeError), match=message):
        GRPOTrainer(**{**plain, **arguments})


COMMANDS = [
    (["train", "nonsense"], "must be a YAML file or a preset"),
    (["demo", "--max_stepz", "3"], "max_stepz is not a setting: did you mean max_steps?"),
    (["demo", "--max_steps", "many"], "max_steps must be int, got 'many'"),
    (["demo", "max_steps", "3"], "expected --key value, got 'max_steps'"),
    (["demo", "--num_generations", "7"], "num_generations must divide"),
    (["demo", "--reward_funcs", "[a, b"], "this is not YAML"),
    (["demo", "--reward_weights", "[.nan]"], "reward_weights must be a list, each a finite number or None, got [nan]"),
    (["demo", "--model", "no/such/model"], "model must be a folder, 'owner/name' on the hub, or 'tiny:NAME'"),
    (["demo", "--model"], "--model needs a value"),
    (["demo", "--learning_rate", "--use_cpu"], "--learning_rate needs a value"),
    (["demo", "--seed", "1.2.3e4"], "seed must be int, got '1.2.3e4'"),
    (["demo", "--seed", "4294967296"], "seed must be in [0, 2**31), got 4294967296"),
    (["demo", "--eval_pass_threshold", ".nan"], "eval_pass_threshold must be a finite number, got nan"),
]


@pytest.mark.parametrize(("command", "message"), COMMANDS)
def test_mistakes_on_the_command_line(no_model, capsys, command, message):
    with pytest.raises(SystemExit):
        cli.main(command)
    assert message in capsys.readouterr().err


def test_settings_are_given_by_name():
    with pytest.raises(TypeError, match=r"by name, as in GRPOConfig\(output_dir=...\), got 'runs/x'"):
        GRPOConfig("runs/x")
    with pytest.raises(ValueError, match="clip_range is not a setting: say epsilon"):
        GRPOLossConfig(clip_range=0.1)


def test_a_model_of_the_hub_is_not_asked_for_offline(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match="got 'some/model', which is not in the hub's cache, and HF_HUB_OFFLINE is"):
        models.check_source("some/model")
    monkeypatch.setattr(models, "try_to_load_from_cache", lambda *_: "/cache/config.json")
    models.check_source("some/model")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(models, "try_to_load_from_cache", lambda *_: None)
    models.check_source("some/model")


SCORES = {
    "short": ("return [1.0]", "reward function f must return 8 values, got 1"),
    "texts": ("return ['good' for _ in completions]", "reward function f must return a list of numbers or None"),
}


@pytest.mark.parametrize("name", SCORES)
def test_what_a_reward_returns_wrongly_is_one_line_on_the_command_line(tmp_path, capsys, name):
    body, message = SCORES[name]
    (tmp_path / "mine.py").write_text(f"def f(completions, **_):\n    {body}\n")
    with pytest.raises(SystemExit) as end:
        run_demo(tmp_path, reward_funcs=f"{tmp_path}/mine.py:f")
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert end.value.code == 1
    assert error.startswith(f"fastgrpo: error: {message}")


def run_demo(folder, **settings):
    """The demo's command on a model in a folder, for one small step."""
    model, tokenizer = trainer_job.make_model()
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    small = {"model": folder / "model", "output_dir": folder / "run", "max_steps": 1, "use_cpu": True,
             "per_device_train_batch_size": 8, "steps_per_generation": 1, "eval_strategy": "no",
             "eval_on_start": False, "sft": "null"}  # fmt: skip
    return cli.main(["demo", *(f"--{name}={value}" for name, value in {**small, **settings}.items())])


def test_a_short_run_prints_its_last_step_and_a_few_answers(tmp_path, capsys):
    run_demo(tmp_path, per_device_train_batch_size=64)
    out = capsys.readouterr().out
    assert "step 1/1  reward " in out
    assert sum("=" in line for line in out.splitlines()) == 8  # each prompt ends with one


def test_a_reward_that_fails_is_named():
    def broken(completions, **_):
        return [1 / 0 for _ in completions]

    with pytest.raises(RuntimeError, match="reward function broken failed: ZeroDivisionError: division by zero") as e:
        score({"broken": broken}, ROWS, ["x", "y"], [[1], [2]])
    assert isinstance(e.value.__cause__, ZeroDivisionError)


@pytest.mark.parametrize(("given", "said"), [([None, float("nan")], "all"), ([1.0, None], "some"), ([1.0, 0.0], None)])
def test_answers_without_any_reward_are_said_once(tmp_path, given, said):
    import warnings

    trainer = trainer_job.make_trainer(
        tmp_path, rewards=lambda completions, **_: given * (len(completions) // 2), save_strategy="no", max_steps=13
    )
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("default")
        trainer.train()  # two rollouts
    texts = [str(w.message) for w in seen if "got no reward" in str(w.message)]
    assert [text.partition(" answers got no reward")[0] for text in texts] == ([said] if said else [])


def test_help_lists_the_settings(capsys):
    with pytest.raises(SystemExit) as end:
        cli.main(["train", "--help"])
    out = capsys.readouterr().out
    assert end.value.code == 0
    assert all(part in out for part in ("CONFIG [--key value] ... [--resume]", "learning_rate ", "1e-06", "demo"))


def test_a_command_without_its_packages_names_the_extra(tmp_path):
    """As after a plain ``pip install .``; one process imports torch, and forks for each command."""
    import subprocess
    import sys

    commands = (["demo"], ["train", "x.yaml"], ["train", "--help"])
    code = (
        "import os, sys\n"
        "for name in ('yaml', 'rich', 'accelerate', 'matplotlib', 'datasets', 'peft'): sys.modules[name] = None\n"
        "from fastgrpo.trainer.cli import main\n"
        f"for command in {commands}:\n"
        "    if os.fork() == 0: sys.exit(main(command))\n"
        "    os.wait()\n"
        "    for stream in (sys.stdout, sys.stderr): print('#', file=stream, flush=True)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    said = [out + err for out, err in zip(done.stdout.split("#\n"), done.stderr.split("#\n"), strict=True)]
    for command, text in zip(commands, said[:3], strict=True):
        assert "needed here: pip install 'fastgrpo[train]'" in text, command
    assert "Traceback" not in done.stderr


def test_yaml_and_overrides(tmp_path):
    path = tmp_path / "job.yaml"
    path.write_text("model: m\nreward_funcs: [exact_answer]\ntrain_dataset: d.jsonl\nlearning_rate: 1e-5\n")
    words = ["--max-steps", "12", "--beta=0.04", "--use_cpu", "--packing", "true", "--output_dir", "a=b", "--resume"]
    job, config = load_config(path, parse(words))
    assert job == {"model": "m", "reward_funcs": ["exact_answer"], "train_dataset": "d.jsonl"}
    assert (config.learning_rate, config.max_steps, config.beta, config.use_cpu) == (1e-5, 12, 0.04, True)
    assert config.packing is True
    assert config.output_dir == "a=b"
    assert config.resume_from_checkpoint is True
    assert config.part(GRPOLossConfig).beta == 0.04


def test_names_and_defaults_are_trl_s():
    trl = pytest.importorskip("trl", minversion="1.16.0")
    import dataclasses

    theirs = {f.name: f.default for f in dataclasses.fields(trl.GRPOConfig)}
    theirs |= {f.name: f.default for f in dataclasses.fields(trl.ModelConfig) if f.name not in theirs}
    ours = {f.name: f.default for f in dataclasses.fields(GRPOConfig)}
    shared = ours.keys() & theirs.keys()
    assert len(shared) > 80
    # None there: transformers puts this folder in its place
    assert {n: ours[n] for n in shared if ours[n] != theirs[n]} == {"output_dir": "trainer_output"}
    assert trl.GRPOConfig(use_cpu=True, bf16=False).output_dir == "trainer_output"
    elsewhere = GRPOConfig.advice.keys() - GRPOLossConfig.advice.keys()
    elsewhere -= {"dataset_name", "max_prompt_length", "use_liger_loss", "warmup_ratio", "logging_dir"}
    elsewhere -= {"lr", "batch_size", "group_size", "max_tokens", "max_new_tokens"}
    assert elsewhere <= theirs.keys() - ours.keys()


def test_rows_from_everywhere(tmp_path):
    datasets = pytest.importorskip("datasets")
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(r) + "\n\n" for r in ROWS))
    (tmp_path / "a.json").write_text(json.dumps(ROWS))
    for source in (ROWS, tmp_path / "a.jsonl", str(tmp_path / "a.json"), datasets.Dataset.from_list(ROWS)):
        assert [dict(load_rows(source)[i]) for i in range(2)] == ROWS
    with pytest.raises(TypeError, match="must have a length"):
        load_rows(iter(ROWS))
    with pytest.raises(ValueError, match=r"must have a 'prompt'.*got None at row 2"):
        load_rows(datasets.Dataset.from_list([*ROWS, {"prompt": None, "answer": ""}]))


def test_a_bad_line_is_named_and_a_strange_one_is_read(tmp_path):
    """U+2028 ends a line for str.splitlines, not for JSON; a byte order mark is no JSON."""
    path = tmp_path / "a.jsonl"
    path.write_text("\ufeff" + json.dumps({"prompt": "a\u2028b"}, ensure_ascii=False) + "\n", encoding="utf-8")
    assert load_rows(path) == [{"prompt": "a\u2028b"}]
    path.write_text('{"prompt": "a"}\n\n{"prompt": ')
    with pytest.raises(ValueError, match=r"a.jsonl, line 3: expected JSON, got '{\"prompt\": '"):
        load_rows(path)


def test_a_prompt_without_room_is_found_before_the_first_step(tmp_path):
    rows = [{"prompt": "1="}, {"prompt": "2" * 58 + "="}]
    trainer_job.make_trainer(tmp_path, rows=rows, max_completion_length=5)
    with pytest.raises(
        ValueError, match="leave room for the longest prompt, 59 tokens, in the model's 64 positions, got"
    ):
        trainer_job.make_trainer(tmp_path, rows=rows, max_completion_length=6)


def test_the_order_of_prompts_has_no_state():
    whole = draw(10, 0, 45, seed=3)
    assert sorted(whole[:10]) == sorted(whole[30:40]) == list(range(10))
    assert whole[:10] != whole[10:20]
    assert [draw(10, i, 1, seed=3)[0] for i in range(45)] == whole
    assert draw(10, 8, 14, 0, shuffle=False) == [8, 9, *range(10), 0, 1]


@pytest.mark.quick
def test_chat_prompts_and_scores():
    tokenizer = examples.tiny_tokenizer(examples.WORLDS["sort"])
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.content }}{% endfor %}{% if add_generation_prompt %}={% endif %}"
    )
    chat = [{"role": "user", "content": "31"}]
    assert tokenizer.decode(encode(tokenizer, chat)) == "31="
    begun = [*chat, {"role": "assistant", "content": "=1"}]
    assert tokenizer.decode(encode(tokenizer, begun)) == "31=1"
    with pytest.raises(UserError, match=r"template refuses messages of a dataset: no system, got \[\{'role': 'user'"):
        encode(tokenizer, chat, {"chat_template": "{{ raise_exception('no system') }}"})
    seen = {}

    def reward(prompts, completions, completion_ids, level):
        seen.update(prompts=prompts, completions=completions, ids=completion_ids, level=level)
        return [1, None]

    rows = [{"prompt": chat, "level": 1}, {"prompt": chat, "level": 2}]
    scores = score({"a": reward, "b": lambda **_: [0.5, 2.0]}, rows, ["x", "y"], [[1], [2]])
    assert scores[0] == [1.0, 0.5]
    assert scores[1][0] != scores[1][0]  # NaN: cannot score
    assert seen == {"prompts": [chat, chat], "completions": ["x", "y"], "ids": [[1], [2]], "level": [1, 2]}
    odd = [{"prompt": "a", "completion": "?", "completions": "?", "completion_ids": "?", "prompts": "?"}]
    assert score({"a": lambda prompts, completions, completion_ids, **_: [len(prompts[0] + completions[0])]}, odd,
                 ["xy"], [[1]]) == [[3.0]]  # fmt: skip
    with pytest.raises(ValueError, match="reward function b must return 2 values, got 1"):
        score({"b": lambda **_: [0.5]}, rows, ["x", "y"], [[1], [2]])


def test_several_rewards_with_weights_and_missing_scores(tmp_path):
    """Answers that no function can score have no advantage; the mean of a function is over those it scored."""

    def half(completions, **_):
        return [None if i % 2 else float(len(c)) for i, c in enumerate(completions)]

    def never(completions, **_):
        return [None] * len(completions)

    trainer = trainer_job.make_trainer(
        tmp_path, rewards=[half, never, half], reward_weights=[1.0, 5.0, 0.5], save_strategy="no", max_steps=1
    )
    episodes = trainer.collect()
    for i, e in enumerate(episodes):
        assert (e.advantage == 0) or i % 2 == 0
        length = len(trainer.tokenizer.decode(e.completion_ids, skip_special_tokens=True))
        assert trainer.meter.reward(e) == pytest.approx(torch.nan if i % 2 else 1.5 * length, nan_ok=True)
    assert any(e.advantage != 0 for e in episodes)
    row = trainer.train()[0]
    assert {"rewards/half_0", "rewards/never", "rewards/half_2"} <= row.keys()
    assert row["rewards/half_0"] == row["rewards/half_2"] > 0
    assert row["rewards/never"] is None  # not 0, which would be a score
    assert row["reward"] == pytest.approx(1.5 * row["rewards/half_0"])  # of the answers that were scored


def test_evaluation_with_missing_scores(tmp_path):
    """The mean is over what could be scored; what could not was not right."""

    def odd(completions, **_):
        return [None if i % 2 else 1.0 for i, _ in enumerate(completions)]

    config = GRPOConfig(**{**trainer_job.SETTINGS, "output_dir": str(tmp_path), "save_strategy": "no", "max_steps": 1,
                           "eval_strategy": "steps", "num_generations_eval": 2})  # fmt: skip
    model, tokenizer = trainer_job.make_model()
    rows = GRPOTrainer(model, odd, ROWS, config, eval_dataset=ROWS, processing_class=tokenizer).train()
    assert rows[-1]["eval/reward"] == rows[-1]["eval/greedy_reward"] == 1
    assert (rows[-1]["eval/pass@1"], rows[-1]["eval/pass@2"], rows[-1]["eval/greedy_pass"]) == (0.5, 1, 0.5)


def test_rewards_know_how_far_the_training_is(tmp_path):
    """TRL's trainer_state, for rewards that change with the steps."""
    seen = []

    def curriculum(completions, trainer_state, **_):
        seen.append((trainer_state.global_step, trainer_state.max_steps))
        return [0.0] * len(completions)

    trainer_job.make_trainer(tmp_path, rewards=curriculum, max_steps=8, save_strategy="no").train()
    assert seen == [(0, 8), (6, 8)]


def test_warm_up_as_a_share(tmp_path):
    for warmup, expected in ((0.5, [0, 0.25, 0.5, 0.75, 1]), (2, [0, 0.5, 1, 1, 1])):
        settings = {"warmup_steps": warmup, "lr_scheduler_type": "constant_with_warmup", "save_strategy": "no"}
        rows = trainer_job.make_trainer(tmp_path, max_steps=8, **settings).train()
        assert [row["learning_rate"] for row in rows[:5]] == pytest.approx([1e-3 * x for x in expected])


def test_a_16_bit_module_is_scored_again_whatever_the_config_says(tmp_path):
    model, tokenizer = trainer_job.make_model()
    assert not trainer_job.make_trainer(tmp_path, (model, tokenizer)).rescore
    assert trainer_job.make_trainer(tmp_path, (model.bfloat16(), tokenizer)).rescore


@pytest.mark.parametrize(
    "settings",
    [
        {"loss_type": "grpo", "beta": 0.1, "scale_rewards": "batch"}, {"importance_sampling_level": "sequence"},
        {"loss_type": "vespo", "packing": True}, {"entropy_coef": 0.01, "top_entropy_quantile": 0.5},
        {"mask_truncated_completions": True, "loss_type": "dr_grpo"}, {"activation_offloading": True},
        {"gradient_checkpointing": True, "recompute_old_logprobs": True}, {"bf16": True},
        {"optim": "adamw_torch_fused"}, {"fp16": True}, {"advantage_estimator": "rloo"},
        {"multi_objective_aggregation": "normalize_then_sum"}, {"advantage_estimator": "pass_at_k", "pass_at_k": 2},
        {"token_budget": 8, "off_policy_mask_threshold": 0.1, "top_k": 3, "top_p": 0.9, "repetition_penalty": 1.1},
    ],
    ids=str,
)  # fmt: skip
def test_options_train(tmp_path, settings):
    trainer = trainer_job.make_trainer(
        tmp_path, trainer_job.make_model(dropout=0.0), max_steps=4, save_strategy="no", log_completions=True, **settings
    )
    before = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
    rows = trainer.train()
    assert len(rows) == 4
    assert all(torch.isfinite(torch.tensor([float(v) for v in row.values()])).all() for row in rows)
    moved = [n for n, p in trainer.model.named_parameters() if (p - before[n]).abs().max() > 0]
    truncated = settings.get("mask_truncated_completions") and all(row["truncated"] == 1 for row in rows)
    assert bool(moved) != bool(truncated)
    assert (tmp_path / "curves.png").read_bytes()[:4] == b"\x89PNG"
    if "beta" in settings:
        assert rows[0]["kl"] == pytest.approx(0, abs=1e-6)
        assert rows[-1]["kl"] > 0


def test_sampler_s_logprobs_are_the_policy_s(tmp_path):
    """fp32: what generate recorded and what the learner computes differ by rounding alone, so they are reused."""
    trainer = trainer_job.make_trainer(tmp_path, save_strategy="no", top_p=0.9, temperature=0.8)
    assert not trainer.rescore
    episodes = trainer.collect()
    for e, logp in zip(episodes, trainer.learner.score(episodes)):
        assert e.old is e.sampler
        assert (e.old - logp).abs().max() < 1e-5


@pytest.mark.quick
def test_the_reference_moves(tmp_path):
    """Every second step the reference becomes the policy, so the next rollout starts without KL."""
    settings = {"ref_model_sync_steps": 2, "ref_model_mixup_alpha": 1.0, "steps_per_generation": 2, "num_iterations": 1}
    trainer = trainer_job.make_trainer(
        tmp_path, trainer_job.make_model(dropout=0.0), beta=0.1, sync_ref_model=True, max_steps=3, save_strategy="no",
        **settings,
    )  # fmt: skip
    rows = trainer.train()
    assert rows[0]["kl"] == pytest.approx(0, abs=1e-6)
    assert rows[1]["kl"] > 1e-6
    assert rows[2]["kl"] == pytest.approx(0, abs=1e-6)


def test_lora_reference_is_the_model_without_its_adapter(tmp_path):
    pytest.importorskip("peft")
    model, tokenizer = trainer_job.make_model(dropout=0.0)
    base = {n: p.detach().clone() for n, p in model.named_parameters()}
    trainer = trainer_job.make_trainer(tmp_path, model=(model, tokenizer), use_peft=True, beta=0.05, lora_r=4,
                                       lora_target_modules="all-linear", max_steps=3, save_steps=3)  # fmt: skip
    assert trainer.reference is None
    rows = trainer.train()
    assert rows[0]["kl"] == pytest.approx(0, abs=1e-6)
    assert rows[-1]["kl"] > 0
    for name, p in trainer.model.named_parameters():
        assert p.requires_grad == ("lora" in name)
        plain = name.removeprefix("base_model.model.").replace(".base_layer", "")
        assert plain not in base or p.equal(base[plain]), name
    assert (tmp_path / "model" / "adapter_model.safetensors").is_file()
    assert not (tmp_path / "model" / "model.safetensors").exists()
    assert (tmp_path / "checkpoint-3" / "adapter_config.json").is_file()


@pytest.fixture(scope="module")
def on_disk(tmp_path_factory):
    """A model folder, as users have it."""
    folder = tmp_path_factory.mktemp("model")
    model, tokenizer = trainer_job.make_model(dropout=0.0, width=64)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def from_disk(folder, output, **settings):
    config = GRPOConfig(
        output_dir=str(output), **{**trainer_job.SETTINGS, "save_strategy": "no", "max_steps": 2, **settings}
    )
    return GRPOTrainer(folder, trainer_job.digits, ROWS * 8, config)


def test_a_four_bit_llama_learns(tmp_path):
    """Without biases nothing fails where the repacked weights have no backward: the gradients are zeros."""
    pytest.importorskip("bitsandbytes")
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 4}
    tokenizer = trainer_job.make_model()[1]
    config = LlamaConfig(vocab_size=len(tokenizer), num_hidden_layers=2, max_position_embeddings=64, **sizes)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    options = {"use_peft": True, "load_in_4bit": True, "learning_rate": 1e-2}
    trainer = from_disk(str(tmp_path / "model"), tmp_path / "out", **options)
    assert [row["grad_norm"] > 0 for row in trainer.train()] == [True, True]
    adapters = {n: p for n, p in trainer.model.named_parameters() if "lora_B" in n}
    assert len(adapters) == 4
    assert all(p.abs().max() > 0 for p in adapters.values())


@pytest.mark.parametrize("bits", ["load_in_4bit", "load_in_8bit"])
def test_qlora(on_disk, tmp_path, bits):
    """bitsandbytes' CPU kernels run the same layers; on a GPU this has not been run."""
    bitsandbytes = pytest.importorskip("bitsandbytes")
    options = {"use_peft": True, "lora_target_modules": "all-linear", "lora_dropout": 0.0, bits: True}
    trainer = from_disk(on_disk, tmp_path, **options)
    kind = bitsandbytes.nn.Linear4bit if bits == "load_in_4bit" else bitsandbytes.nn.Linear8bitLt
    layers = [m for m in trainer.model.modules() if isinstance(m, kind)]
    assert layers
    before = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
    rows = trainer.train()  # whose rollouts evaluate the layers, which must not repack them for inference
    assert [row["grad_norm"] > 0 for row in rows] == [True, True]
    moved = {n for n, p in trainer.model.named_parameters() if not p.equal(before[n])}
    assert moved == {n for n in before if "lora" in n}
    assert trainer.learner.share
    if bits == "load_in_4bit":  # 8 bits round a row by its neighbours' outliers
        whole = Learner(trainer.model, trainer.accelerator, GRPOLossConfig(), budget=1)
        turns = trainer_job.make_conversations(vocabulary=14)
        grads = [gradients_of(learner, turns) for learner in (trainer.learner, whole)]
        assert all((a - b).norm() <= 1e-5 * b.norm().clamp(min=1e-6) for a, b in zip(*grads))


def gradients_of(learner, episodes):
    learner.gradients(episodes)
    return [p.grad.clone() for p in learner.model.parameters() if p.requires_grad]


def test_training_an_adapter_further(on_disk, tmp_path):
    """The model folder of a LoRA run is a model for the next one: base and adapter, the adapter trained further."""
    pytest.importorskip("peft")
    options = {"use_peft": True, "lora_target_modules": "all-linear", "learning_rate": 1e-2}
    first = from_disk(on_disk, tmp_path / "a", **options)
    first.train()
    with pytest.raises(ValueError, match="is an adapter: use_peft must be True"):
        from_disk(str(tmp_path / "a/model"), tmp_path / "b")
    second = from_disk(str(tmp_path / "a/model"), tmp_path / "b", beta=0.1, **options)
    old, new = (dict(trainer.model.named_parameters()) for trainer in (first, second))
    assert all(new[name].equal(p) and new[name].requires_grad == ("lora" in name) for name, p in old.items())
    assert any(p.abs().max() > 0 for name, p in old.items() if "lora_B" in name)
    assert second.train()[0]["kl"] > 1e-6  # the reference is the base


def test_eight_bit_adam(on_disk, tmp_path):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    trainer = from_disk(on_disk, tmp_path, optim="adamw_8bit")
    assert isinstance(trainer.optimizer.optimizer, bitsandbytes.optim.AdamW8bit)
    before = trainer.model.lm_head.weight.detach().clone()
    trainer.train()
    assert not trainer.model.lm_head.weight.equal(before)


def test_checkpointing_by_the_name_this_transformers_has(on_disk, tmp_path):
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        trainer = from_disk(on_disk, tmp_path, gradient_checkpointing=True, use_peft=True)
    assert all(m.gradient_checkpointing for m in trainer.model.modules() if hasattr(m, "gradient_checkpointing"))


def test_attention_falls_back_clearly(on_disk, monkeypatch, capsys):
    plain = models.AutoModelForCausalLM.from_pretrained

    def limited(source, attn_implementation, **options):
        if attn_implementation == "sdpa":
            raise ValueError("this model does not support attention by sdpa")
        return plain(source, attn_implementation=attn_implementation, **options)

    monkeypatch.setattr(models.AutoModelForCausalLM, "from_pretrained", limited)
    model = models.load_model(on_disk, GRPOConfig(), torch.device("cpu"))
    assert model.config._attn_implementation == "eager"
    assert "attention: eager, because this model does not support" in capsys.readouterr().out
    with pytest.raises(ValueError, match="does not support"):
        models.load_model(on_disk, GRPOConfig(attn_implementation="sdpa"), torch.device("cpu"))


def test_a_tracker_gets_the_numbers(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    trainer = trainer_job.make_trainer(
        tmp_path, report_to=["tensorboard"], logging_steps=2, max_steps=5, save_strategy="no", run_name="mine"
    )
    rows = trainer.train()
    assert trainer.accelerator.trackers
    (folder,) = {path.parent for path in (tmp_path / "mine").glob("events.out.tfevents*")}
    events = EventAccumulator(str(folder)).Reload()
    for name in ("reward", "kl", "entropy", "clip_fraction", "skipped", "loss", "rewards/digits"):
        seen = [(event.step, event.value) for event in events.Scalars(name)]
        logged = [row for row in rows if row["step"] in (2, 4, 5)]  # the last step always
        assert seen == [(row["step"], pytest.approx(row[name], rel=1e-6)) for row in logged], name
    assert "learning_rate: 0.001" in next(tmp_path.rglob("hparams.yml")).read_text()


COUNTED = ("config", "data", "completions", "generate", "loop", "checkpoint", "logs")


def code_lines(path):
    """Logical lines, which no formatter breaks or joins: no blank ones, no comments, no docstrings."""
    source = path.read_text()
    lines = [t for t in tokenize.generate_tokens(io.StringIO(source).readline) if t.type == tokenize.NEWLINE]
    kinds = ast.Module | ast.ClassDef | ast.FunctionDef
    blocks = [node for node in ast.walk(ast.parse(source)) if isinstance(node, kinds)]
    return len(lines) - sum(ast.get_docstring(node) is not None for node in blocks)


@pytest.mark.quick
def test_the_trainer_is_thin():
    folder = Path(trainer_job.examples.__file__).parent
    assert sum(code_lines(folder / f"{name}.py") for name in COUNTED) <= 600

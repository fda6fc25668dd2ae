"""Resuming continues bit for bit, from any step and after a kill in the middle of a save; a NaN ruins nothing."""

import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("accelerate")

from safetensors.torch import load_file

from fastgrpo.trainer import checkpoint

import trainer_job


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Real memory: transformers fills what it allocates."""


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An uninterrupted run of 7 steps: rollouts of 3 optimiser steps, each used twice."""
    output = tmp_path_factory.mktemp("whole")
    trainer_job.make_trainer(output).train()
    return output


def assert_same_run(output, whole):
    assert trainer_job.log_rows(output) == trainer_job.log_rows(whole)
    ours, theirs = (load_file(x / "model" / "model.safetensors") for x in (output, whole))
    assert ours.keys() == theirs.keys()
    for name, weight in ours.items():
        assert weight.equal(theirs[name]), name


def test_resuming_says_what_it_does(whole, tmp_path, capsys):
    with pytest.raises(ValueError, match=r"resume_from_checkpoint needs a checkpoint: output_dir .* holds none$"):
        trainer_job.make_trainer(tmp_path, resume_from_checkpoint=True)
    shutil.copytree(whole / "checkpoint-6", tmp_path / "checkpoint-6")
    changed = {"learning_rate": 2e-3, "save_strategy": "no"}
    trainer_job.make_trainer(tmp_path, resume_from_checkpoint=True, **changed).train()
    out = capsys.readouterr().out
    assert f"resuming from checkpoint-6 in {tmp_path}\n" in out
    line = next(line for line in out.splitlines() if line.startswith("settings that differ from the checkpoint's: "))
    assert "learning_rate 0.001 -> 0.002" in line
    assert "save_strategy 'steps' -> 'no'" in line
    assert "max_steps" not in line
    assert "resume" not in line


@pytest.mark.parametrize("step", [1, 2, 3, 5, 6])
def test_resume_is_bit_exact(whole, tmp_path, step):
    """In the middle of a rollout's steps, between its two epochs, and between rollouts."""
    shutil.copytree(whole / f"checkpoint-{step}", tmp_path / f"checkpoint-{step}")
    shutil.copy(whole / "log.jsonl", tmp_path)
    torch.manual_seed(99)
    trainer = trainer_job.make_trainer(tmp_path, resume_from_checkpoint=True)
    trainer.train()
    assert_same_run(tmp_path, whole)


KILLED = """
import os, signal, sys
sys.path[:0] = [{tests!r}]
import trainer_job
from fastgrpo.trainer import checkpoint
plain, calls = checkpoint.{function}, []
def deadly(*arguments, **options):
    calls.append(1)
    if len(calls) == {call}:
        os.kill(os.getpid(), signal.SIGKILL)
    return plain(*arguments, **options)
checkpoint.{function} = deadly
trainer_job.make_trainer({output!r}, save_steps=2).train()
"""


@pytest.mark.parametrize(("function", "call"), [("flush", 16), ("describe", 2)])
def test_a_kill_in_the_middle_of_a_save(whole, tmp_path, function, call):
    """The half-written checkpoint of step 4 is not found; the one of step 2 gives the same end."""
    code = KILLED.format(tests=str(Path(__file__).parent), output=str(tmp_path), function=function, call=call)
    environment = {"PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": str(torch.get_num_threads()), "HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, env=environment)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert (tmp_path / "checkpoint-4.part").is_dir()
    (tmp_path / "checkpoint-1.part").mkdir()  # a kill in the middle of a removal
    assert [p.name for p in checkpoint.find_checkpoints(tmp_path)] == ["checkpoint-2"]
    assert len(trainer_job.log_rows(tmp_path)) == 4
    trainer_job.make_trainer(tmp_path, resume_from_checkpoint=True, save_steps=2).train()
    assert_same_run(tmp_path, whole)
    assert not list(tmp_path.glob("*.part"))


@pytest.mark.quick
def test_a_log_that_was_cut_in_the_middle_of_a_line(whole, tmp_path):
    shutil.copytree(whole / "checkpoint-5", tmp_path / "checkpoint-5")
    lines = (whole / "log.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "log.jsonl").write_text("".join(lines[:6]) + lines[6][:20])
    trainer_job.make_trainer(tmp_path, resume_from_checkpoint=True).train()
    assert_same_run(tmp_path, whole)


def test_a_rollout_of_another_size_is_refused(whole, tmp_path):
    shutil.copytree(whole / "checkpoint-5", tmp_path / "checkpoint-5")
    trainer = trainer_job.make_trainer(tmp_path, resume_from_checkpoint=True, steps_per_generation=2)
    with pytest.raises(ValueError, match="a rollout must have the 24 answers of the checkpoint's, got 8"):
        trainer.train()


def test_a_checkpoint_of_more_processes_is_refused(whole, tmp_path):
    shutil.copytree(whole / "checkpoint-5", tmp_path / "checkpoint-5")
    shutil.copy(tmp_path / "checkpoint-5/trainer_0.pt", tmp_path / "checkpoint-5/trainer_1.pt")
    trainer = trainer_job.make_trainer(tmp_path, resume_from_checkpoint=True)
    with pytest.raises(ValueError, match="must be of 1 processes, got one of 2"):
        trainer.train()


def test_an_older_checkpoint_goes_on_elsewhere(whole, tmp_path):
    """Beside newer ones, those of the abandoned run would be taken for the newest, and the newest removed as old."""
    folder = str(whole / "checkpoint-3")
    with pytest.raises(ValueError, match=r"holds checkpoint-7, newer than .*checkpoint-3: remove it or take another"):
        trainer_job.make_trainer(whole, resume_from_checkpoint=folder)
    trainer_job.make_trainer(tmp_path, resume_from_checkpoint=folder, save_total_limit=2).train()
    assert trainer_job.log_rows(tmp_path) == trainer_job.log_rows(whole)[3:]
    assert [p.name for p in checkpoint.find_checkpoints(tmp_path)] == ["checkpoint-6", "checkpoint-7"]


def test_an_adapter_by_another_name(tmp_path):
    peft = pytest.importorskip("peft")
    outputs, finals = [tmp_path / "whole", tmp_path / "resumed"], []
    for output, resume in zip(outputs, (False, str(outputs[0] / "checkpoint-2"))):
        model, tokenizer = trainer_job.make_model()
        torch.manual_seed(0)
        model = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM"), adapter_name="mine")
        trainer = trainer_job.make_trainer(output, (model, tokenizer), max_steps=3, resume_from_checkpoint=resume)
        trainer.train()
        finals.append({n: p.detach() for n, p in trainer.model.named_parameters() if "lora" in n})
    assert finals[0]
    assert all(finals[0][n].equal(finals[1][n]) for n in finals[0])


def test_a_checkpoint_is_a_model(whole):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(whole / "checkpoint-7")
    AutoTokenizer.from_pretrained(whole / "checkpoint-7")
    for name, weight in load_file(whole / "model" / "model.safetensors").items():
        assert model.state_dict()[name].equal(weight), name


def test_only_the_newest_are_kept(tmp_path):
    trainer_job.make_trainer(tmp_path, max_steps=4, save_total_limit=2).train()
    assert [p.name for p in checkpoint.find_checkpoints(tmp_path)] == ["checkpoint-3", "checkpoint-4"]
    with pytest.raises(ValueError, match=r"output_dir .* holds checkpoints of an earlier run"):
        trainer_job.make_trainer(tmp_path)
    with pytest.raises(ValueError, match="must be True or a checkpoint folder"):
        trainer_job.make_trainer(tmp_path, resume_from_checkpoint=str(tmp_path / "checkpoint-9"))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    "settings",
    [{"use_peft": True}, {"beta": 0.1, "sync_ref_model": True, "ref_model_sync_steps": 2}],
    ids=["lora", "ref"],
)
def test_adapter_and_moving_reference_resume_too(tmp_path, settings, tied):
    if "use_peft" in settings:
        pytest.importorskip("peft")
    outputs = [tmp_path / "whole", tmp_path / "resumed"]
    trainer_job.make_trainer(outputs[0], trainer_job.make_model(tied), max_steps=5, **settings).train()
    outputs[1].mkdir()
    shutil.copytree(outputs[0] / "checkpoint-3", outputs[1] / "checkpoint-3")
    shutil.copy(outputs[0] / "log.jsonl", outputs[1])
    resumed = {**settings, "resume_from_checkpoint": True}
    trainer_job.make_trainer(outputs[1], trainer_job.make_model(tied), max_steps=5, **resumed).train()
    assert trainer_job.log_rows(outputs[0]) == trainer_job.log_rows(outputs[1])
    name = "adapter_model.safetensors" if "use_peft" in settings else "model.safetensors"
    a, b = (load_file(x / "model" / name) for x in outputs)
    assert all(a[k].equal(b[k]) for k in a)
    if "use_peft" in settings:
        assert not (outputs[0] / "checkpoint-3" / "model.safetensors").exists()
        assert (outputs[0] / "checkpoint-3" / name).is_file()


def test_nan_stops_with_the_batch_saved_and_the_model_as_it_was(tmp_path):
    model, tokenizer = trainer_job.make_model()
    trainer = trainer_job.make_trainer(tmp_path, model=(model, tokenizer), save_strategy="no")
    seen = []

    def poison(module, arguments):
        if module.training and torch.is_grad_enabled():
            seen.append(1)
            if len(seen) == 3:
                return (arguments[0] * torch.nan,)
        return None

    model.lm_head.register_forward_pre_hook(poison)
    kept = []
    plain = trainer.learn
    trainer.learn = lambda episodes: (
        kept.append({k: v.clone() for k, v in model.state_dict().items()}),
        plain(episodes),
    )[1]
    with pytest.raises(FloatingPointError, match=r"step 3: loss nan.*weights are as they were"):
        trainer.train()
    for name, weight in model.state_dict().items():
        assert weight.equal(kept[-1][name]), name
    saved = torch.load(tmp_path / "bad-batch-3-rank0.pt", weights_only=True)
    assert len(saved["episodes"]) == 8
    assert saved["episodes"][0]["completion_ids"]

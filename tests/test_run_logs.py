"""What a run tells people: numbers over all answers, warnings said once, signs of life, samples without repetition."""

import io
import time
import warnings
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console

pytest.importorskip("accelerate")

from fastgrpo.trainer import cli, health
from fastgrpo.trainer import loop as loops
from fastgrpo.trainer.health import PATIENCE, Health, Pulse
from fastgrpo.trainer.log_file import begin
from fastgrpo.trainer.logs import RunLog
from fastgrpo.trainer.tables import shortened

import trainer_job

ONE_STEP = {"steps_per_generation": None, "num_iterations": 1, "save_strategy": "no"}


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Real memory: transformers fills what it allocates."""


def every_second_group(completions, **_):
    """Half of the groups, of four answers, without spread."""
    return [0.25 if i // 4 % 2 else score for i, score in enumerate(trainer_job.digits(completions))]


def rows_of(folder, rewards=every_second_group, **settings):
    model = trainer_job.make_model(dropout=0.0)
    return trainer_job.make_trainer(folder, model, rewards, **{**ONE_STEP, "max_steps": 4, **settings}).train()


NUMBERS = ("entropy", "ratio", "ratio_min", "ratio_max", "clip_fraction", "clip_low", "clip_high", "loss", "reward")


@pytest.mark.parametrize(
    "settings", [{}, {"steps_per_generation": 4, "num_iterations": 2, "max_steps": 8, "learning_rate": 1e-2}], ids=str
)
def test_skipping_does_not_change_the_log(tmp_path, monkeypatch, settings):
    """Also at steps whose policy has moved, if every skipped answer is a witness."""
    monkeypatch.setattr(loops, "WITNESSES", 1)
    settings = {"epsilon": 0.02, **settings}
    skipping = rows_of(tmp_path / "a", **settings)
    plain = rows_of(tmp_path / "b", skip_zero_advantages=False, **settings)
    assert any(row["skipped"] > 0.2 for row in skipping)
    assert all(row["skipped"] == 0 for row in plain)
    moved = [row["ratio_max"] > 1.001 for row in plain]
    assert any(moved) == bool(settings.get("num_iterations"))
    for ours, want in zip(skipping, plain, strict=True):
        for name in NUMBERS:
            if name != "entropy" or not any(moved):  # of skipped answers: the policy's that sampled them
                assert ours[name] == pytest.approx(want[name], rel=1e-4, abs=1e-5), name
        assert ours["entropy"] == pytest.approx(want["entropy"], rel=0.05)
        assert ours["frac_reward_zero_std"] == want["frac_reward_zero_std"] == 0.5


def test_an_eighth_of_the_skipped_answers_is_scored(tmp_path, monkeypatch):
    trainer = trainer_job.make_trainer(
        tmp_path,
        trainer_job.make_model(dropout=0.0),
        lambda completions, **_: [0.5] * len(completions),
        save_strategy="no",
    )
    episodes = trainer.collect()
    assert [e.old is not None for e in episodes] == [i % 8 == 0 for i in range(24)]
    numbers = trainer.learner.witness(episodes)
    assert numbers["witness_tokens"] == sum(len(e.completion_ids) for e in episodes[::8])
    assert numbers["witness_ratio_max"] == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("settings", [{}, {"mask_truncated_completions": True}], ids=str)
def test_nothing_is_0_because_everything_was_left_out(tmp_path, settings):
    def constant(completions, **_):
        return [0.5] * len(completions)

    trainer = trainer_job.make_trainer(
        tmp_path, trainer_job.make_model(dropout=0.0), constant, max_steps=1, **{**ONE_STEP, **settings}
    )
    answers = trainer.learner
    seen = []
    plain = trainer.collect
    trainer.collect = lambda: seen.append(plain()) or seen[0]
    row = trainer.train()[0]
    assert row["skipped"] == row["frac_reward_zero_std"] == 1
    assert (row["ratio"], row["ratio_min"], row["ratio_max"], row["clip_fraction"], row["loss"]) == (1, 1, 1, 0, 0)
    model, total = trainer_job.make_model(dropout=0.0)[0], []  # at a loss of 0 no weight has moved
    for e in seen[0]:
        logp = (
            model(torch.tensor([e.prompt_ids + e.completion_ids])).logits[0, len(e.prompt_ids) - 1 : -1].log_softmax(-1)
        )
        total += (-(logp.exp() * logp).sum(-1)).tolist()
    assert row["entropy"] == pytest.approx(sum(total) / len(total), rel=1e-4)
    assert answers.split(seen[0]) == ([], seen[0])


def test_kl_is_none_where_no_token_counts(tmp_path):
    row = rows_of(tmp_path, max_completion_length=1, mask_truncated_completions=True, beta=0.1)[0]
    assert row["truncated"] == 1
    assert row["kl"] is None
    assert row["entropy"] > 0


ROW = {"truncated": 0.0, "frac_reward_zero_std": 0.0, "reward": 0.5, "grad_norm": 1.0, "loss": 0.3, "ratio_max": 1.0,
       "ratio_min": 1.0}  # fmt: skip


def heard(*rows, quiet=False):
    """-> warnings, lines"""
    lines, doctor = [], None
    doctor = Health(lines.append, quiet, 64)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for row in rows:
            doctor.look({**ROW, **row})
    return [str(w.message) for w in caught], lines


@pytest.mark.quick
def test_health():
    (said,) = heard({}, {"skipped": 0.5}, {"skipped": 0.7})[1]
    assert said.startswith("skipped: the share of tokens in answers without")
    assert heard({}, {"truncated": 0.5}, *[{"frac_reward_zero_std": 0.9}] * 20) == ([], [])
    (said,), _ = heard({"truncated": 0.75}, {"truncated": 0.9})
    assert said.startswith("75% of the answers reached max_completion_length = 64 unfinished")
    flat = {"frac_reward_zero_std": 1.0, "grad_norm": 0.0, "loss": 0.0}
    assert heard(*[flat] * (PATIENCE - 1), {}, *[flat] * (PATIENCE - 1)) == ([], [])
    (said,), lines = heard(*[flat] * (PATIENCE + 5))
    assert f"for {PATIENCE} steps every group's answers had the same reward (the mean reward is 0.5)" in said
    assert lines == []  # a loss of 0 without a gradient is not normal
    (said,), _ = heard(*[{**flat, "reward": None}] * PATIENCE)
    assert "(no reward at all)" in said
    assert heard({"loss": 0.0, "truncated": 1.0}, *[flat] * 20, quiet=True) == ([], [])


def test_a_run_warns(tmp_path):
    with pytest.warns(UserWarning, match="reached max_completion_length = 1 unfinished"):
        rows_of(tmp_path, max_completion_length=1)


def make_log(folder, terminal=False):
    accelerator = SimpleNamespace(is_main_process=True, log=lambda *_, **__: None)
    log = RunLog(folder, 5, accelerator, Pulse())
    log.live.console = Console(file=io.StringIO(), force_terminal=terminal, width=200)
    return log, log.pulse


def until(told, seconds=20.0):
    """Wait for another thread's word."""
    end = time.monotonic() + seconds
    while not told() and time.monotonic() < end:
        time.sleep(0.01)


def test_a_silent_run_says_what_it_does(tmp_path, monkeypatch):
    monkeypatch.setattr(health, "SILENCE", 0.05)
    log, pulse = make_log(tmp_path)
    begin = time.monotonic()
    with pulse.beating(log, every=0.01):
        pulse.doing("sampling answers to 3 prompts")
        pulse.tell("4 of 12 answers done, 8 at token 7 of 9")
        until(lambda: log.console.file.getvalue().count("\n") >= 2)
    lines = log.console.file.getvalue().splitlines()
    silences = (time.monotonic() - begin) / health.SILENCE
    want = "sampling answers to 3 prompts, 4 of 12 answers done, 8 at token 7 of 9, 0 min 0 s; 0 of 5 steps done"
    assert set(lines) == {want}
    assert 2 <= len(lines) <= silences + 1
    time.sleep(0.1)
    assert len(log.console.file.getvalue().splitlines()) == len(lines)  # its thread has ended


def test_a_run_that_prints_is_left_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(health, "SILENCE", 5.0)
    log, pulse = make_log(tmp_path)
    with pulse.beating(log, every=0.01):
        time.sleep(0.1)
    assert log.console.file.getvalue() == ""


def test_on_a_terminal_it_stands_beside_the_bar(tmp_path):
    log, pulse = make_log(tmp_path, terminal=True)
    with pulse.beating(log, every=0.01):
        pulse.doing("scoring 8 answers")
        until(lambda: "scoring" in log.tasks[0].description)
    assert log.tasks[0].description == "GRPO, scoring 8 answers, 0 min 0 s"


def test_every_stage_is_told(tmp_path, monkeypatch):
    """Evaluation, generation token by token, rewards, learning."""
    seen = []
    monkeypatch.setattr(Pulse, "doing", lambda self, what: seen.append(what))
    monkeypatch.setattr(Pulse, "tell", lambda self, detail: seen.append(detail))
    trainer_job.make_trainer(
        tmp_path,
        eval_rows=trainer_job.problems(2),
        eval_on_start=True,
        max_steps=1,
        max_completion_length=2,
        **ONE_STEP,
    ).train()
    assert seen[:6] == [
        "starting", "sampling greedy answers to 2 prompts", "0 of 2 answers done, 2 at token 1 of 2",
        "0 of 2 answers done, 2 at token 2 of 2", "scoring 2 answers", "sampling answers to 2 prompts",
    ]  # fmt: skip
    assert seen[-1] == "learning from 8 sequences"


def test_a_prompt_is_shown_once(tmp_path):
    log, _ = make_log(tmp_path)
    log.answers("answers", [("why?", "so", 1.0), ("why?", "else", 0.0), ("who?", "me", 0.5), ("why?", "no", 0.0)])
    text = log.console.file.getvalue()
    assert text.count("why?") == 2
    assert [text.count(word) for word in ("who?", "so", "else", "me", "no")] == [1] * 5


@pytest.mark.quick
def test_what_all_prompts_share_is_shown_once():
    chats = [f"<system>You help people.<user>What is {sum}?<assistant>Let us count: " for sum in ("1 + 2", "3 + 4")]
    assert shortened([chats[0], chats[1], chats[0]]) == [chats[0], "…3 + 4…", chats[0]]
    assert shortened(["1+2=", "1+3="]) == ["1+2=", "1+3="]
    assert shortened([chats[0], chats[0]]) == [chats[0]] * 2
    assert shortened([]) == []


def test_a_line_is_a_line_however_wide(tmp_path):
    log, pulse = make_log(tmp_path)
    pulse.console, log.console.width = log.console, 20
    pulse.line("step 20/200  reward 0.473  entropy 0.772")
    assert log.console.file.getvalue() == "step 20/200  reward 0.473  entropy 0.772\n"


@pytest.mark.quick
def test_the_command_line_warns_without_the_place_in_the_code():
    ours = cli.warning_line("too long", UserWarning, health.__file__, 7)
    assert ours == "fastgrpo: warning: too long\n"
    theirs = cli.warning_line("old", DeprecationWarning, "/somewhere/else.py", 7, "old()")
    assert "/somewhere/else.py:7: DeprecationWarning: old" in theirs


@pytest.mark.quick
def test_an_earlier_runs_log_is_kept(tmp_path):
    path, kept = tmp_path / "log.jsonl", [{"step": 1}]
    for rows, text in (([], "first\n"), ([], "second\n"), ([], ""), (kept, "")):
        begin(path, rows)
        path.write_text(path.read_text() + text)
    assert {p.name: p.read_text() for p in tmp_path.iterdir()} == {
        "log-1.jsonl": "first\n",
        "log-2.jsonl": "second\n",
        "log.jsonl": '{"step": 1}\n',
    }

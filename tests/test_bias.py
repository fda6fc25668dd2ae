"""bench.bias at toy size: it trains, counts what was left out, pairs its runs, resumes and draws."""

import dataclasses

import pytest

pytest.importorskip("matplotlib")

from bench import bias
from bench.bias_tasks import Demo, Partners

TASK = Partners(vocabulary=300, length=4, groups=2, group_size=4, warm_up=2, steps=3)
ARMS = {"exact": {"backward": "exact"}, "auto": {"backward": "certified", "tolerance": 0.3, "row_tolerance": 1.0}}


@pytest.fixture(scope="module")
def rows():
    return list(bias.training_runs(TASK, seeds=2, arms=ARMS))


@pytest.mark.quick
def test_runs_of_a_seed_differ_in_the_backward_alone(rows):
    assert [(r["seed"], r["head"], r["arm"]) for r in rows[:4]] == [
        (0, "trained", "exact"), (0, "trained", "auto"), (0, "lora", "exact"), (0, "lora", "auto")
    ]  # fmt: skip
    first, second = rows[:2]
    assert first["reward"][0] == second["reward"][0]
    assert first["entropy"][0] == second["entropy"][0]
    assert max(first["left_out"]) == 0.0
    assert all(len(r[k]) == TASK.steps for r in rows for k in ("reward", "entropy", "left_out"))


def test_what_is_left_out_is_counted(rows):
    task, how = dataclasses.replace(TASK, length=32, groups=4), {"backward": "certified", "row_tolerance": 1.0}
    _, _, left_out = task.train(task.warm_up_policy(), 0, "trained", tolerance=10.0, **how)
    assert all(0 < x < 1 for x in left_out)
    _, _, left_out = task.train(task.warm_up_policy(), 0, "trained", tolerance=1e-7, **how)
    assert max(left_out) == 0.0


def test_it_goes_on_where_it_was(rows):
    done = [r for r in rows if (r["seed"], r["head"]) != (1, "lora")]
    again = list(bias.training_runs(TASK, seeds=2, done=done, arms=ARMS))
    assert again == [r for r in rows if r not in done]
    assert not list(bias.training_runs(TASK, seeds=2, done=rows, arms=ARMS))


def test_paired_differences():
    def run(arm, seed, entropy):
        return {"study": "training", "task": "partners", "head": "lora", "arm": arm, "seed": seed, "area": 1.0,
                "final_entropy": entropy, "final_reward": seed, "entropy": [entropy], "left_out": [0.75]}  # fmt: skip

    rows = [run("exact", 0, 1.0), run("exact", 1, 2.0), run("auto", 0, 1.5), run("auto", 1, 2.1), run("auto", 2, 9.0)]
    row = bias.pair_runs(rows, "auto", "lora")
    assert row["pairs"] == 2
    assert row["final_entropy"] == pytest.approx(0.3)
    assert row["final_entropy_error"] == pytest.approx(0.2)
    assert row["final_reward"] == row["area"] == 0
    assert row["entropy_change"] == pytest.approx(0.2)
    assert row["steps_with_half_left_out"] == 1.0
    assert bias.pair_runs(rows, "auto", "trained") is None


def test_own_answers_are_the_same_task(rows):
    exact, again = {"backward": "exact", "luck": 0}, {"backward": "exact", "luck": 1}
    policy = TASK.warm_up_policy()
    a, b, c = (TASK.train(policy, 0, "trained", **how)[1] for how in (exact, again, exact))
    assert a == c != b


def test_the_demo_is_a_task_too():
    pytest.importorskip("rich")
    task = Demo(vocabulary=64, supervised_steps=1, steps=2)
    rows = list(bias.training_runs(task, seeds=1))
    assert [r["arm"] for r in rows] == ["exact", "auto", "whole dW alone"]
    assert all(len(r[k]) == 2 for r in rows for k in ("reward", "entropy", "left_out"))
    assert rows[0]["entropy"][0] == pytest.approx(rows[1]["entropy"][0], abs=1e-3)


def test_the_picture(rows, tmp_path):
    bias.plot(rows, tmp_path / "bias.png")
    assert (tmp_path / "bias.png").stat().st_size > 10_000

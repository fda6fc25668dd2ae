"""The first command on a GPU, rehearsed without one: in the interpreter, where numbers are real."""

import functools
import json
import time

import pytest
import torch

pytest.importorskip("triton")
from bench import first_contact
from bench.contact import correct, device, kernels, launches, learner, trainer
from bench.contact.device import REHEARSAL, Contact

STEPS = (
    "versions", "ceilings", "large", "distributions", "kernels", "exact", "loss_step", "divergence", "certified", "ncu"
)  # fmt: skip
PARTS = {"trainer": trainer, "learner": learner}


@pytest.fixture
def rows(tmp_path):
    """-> run a step, its rows as they are on disk."""

    def run(name, sizes=REHEARSAL, **options):
        book = first_contact.Book(tmp_path, "cpu")
        status = first_contact.run_step(name, Contact("cpu", sizes), book, **options)
        found = [json.loads(line) for line in (tmp_path / "first-contact.jsonl").read_text().splitlines()]
        return status, found

    return run


@pytest.mark.parametrize("step", STEPS)
def test_a_step_runs_small(rows, step):
    status, found = rows(step)
    assert status == 0
    assert found
    assert all(row["step"] == step and row.get("ok", True) for row in found), found
    if step == "kernels":
        assert {row["kernel"] for row in found if "tflops" in row} == {*launches.SOURCES}


def test_every_kind_of_comparison_passes_and_can_fail(rows, monkeypatch):
    monkeypatch.setattr(correct, "compare_loss", functools.partial(correct.compare_loss, vocab=300))  # as the op's
    status, found = rows("correct")
    assert status == 0
    assert len(found) == 4
    assert all(row["ok"] for row in found), found
    plain = correct.relative
    monkeypatch.setattr(correct, "relative", lambda x, truth: plain(x * 1.1, truth))
    assert not rows("correct")[1][-1]["ok"]


def test_tiles_are_timed_and_the_fastest_written(rows, tmp_path, monkeypatch, capsys):
    from fastgrpo.kernels import tiles

    tile = tiles.INTERPRETER
    monkeypatch.setattr(tiles, "architecture", lambda device: "sm_90")
    monkeypatch.setattr(kernels, "candidates", lambda kernel, architecture: [tile, tile._replace(depth=16)])
    monkeypatch.setattr(kernels, "ONE", ("forward", "dweight"))
    small = REHEARSAL._replace(vocab=64)
    assert rows("compile_tiles", small)[0] == 0
    status, found = rows("tiles_timed", small)
    assert status == 0
    assert sum("ms" in row for row in found) == 4
    assert first_contact.summary(tmp_path, {}) == 0
    best = json.loads((tmp_path / "tiles.json").read_text())
    assert set(best) == {"forward", "dweight"}
    assert len(best["forward"]["tile"]) == len(tile)
    assert "fastest tiles" in capsys.readouterr().out


def test_what_was_known_stays_when_a_step_dies(rows, tmp_path, monkeypatch, capsys):
    def dying(contact):
        yield {"first": 1}
        raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setitem(first_contact.STEPS, "exact", first_contact.Step(dying, 10))
    status, found = rows("exact")
    assert status == 1
    assert found[0]["first"] == 1
    assert "illegal memory access" in found[1]["error"]
    assert "dying" in (tmp_path / "first-contact.log").read_text()
    assert first_contact.summary(tmp_path, {}) == 1
    assert "WRONG" in capsys.readouterr().out


def test_steps_are_processes_that_may_hang(tmp_path, monkeypatch, capsys):
    """A step beyond its time is stopped, the next one runs, the exit status tells."""
    monkeypatch.setitem(first_contact.STEPS, "ceilings", first_contact.Step(None, 0.2))
    monkeypatch.setitem(first_contact.STEPS, "versions", first_contact.Step(None, 120))
    arguments = ["--out", str(tmp_path), "--device", "cpu", "--rehearsal", "--steps", "ceilings", "versions"]
    start = time.monotonic()
    assert first_contact.main(arguments) == 1
    assert time.monotonic() - start < 110
    out = capsys.readouterr().out
    assert "ceilings: stopped after 0 s" in out
    assert "versions: done" in out
    assert json.loads((tmp_path / "first-contact.jsonl").read_text().splitlines()[-1])["torch"] == torch.__version__


class TestTrainer:
    """What needs fastgrpo[train]: every row right, wrong where the trainer is, and none that hides another."""

    @pytest.fixture(autouse=True)
    def poisoned_memory(self):
        """Real memory: transformers fills what it allocates."""
        pytest.importorskip("accelerate")

    @pytest.mark.parametrize("step", ["trainer", "learner"])
    def test_every_row_is_right(self, rows, step):
        status, found = rows(step)
        assert status == 0
        assert len(found) == len(PARTS[step].CASES)
        assert all(row.get("ok") or row["what"] == "growth" for row in found), found

    def test_a_resumed_job_without_its_random_numbers_is_seen(self, rows, monkeypatch):
        from fastgrpo.trainer import checkpoint

        plain = checkpoint.load
        monkeypatch.setattr(checkpoint, "load", lambda *a: (plain(*a), torch.manual_seed(7))[0])
        monkeypatch.setattr(PARTS["trainer"], "CASES", PARTS["trainer"].CASES[:1])
        (row,) = rows("trainer")[1]
        assert row["apart_again"] == 0 < row["apart_resumed"]
        assert row["ok"] is False

    def test_wrong_gradients_are_seen_beside_the_cpu_s(self, rows, monkeypatch):
        part = PARTS["trainer"]
        monkeypatch.setattr(part, "CASES", [case for case in part.CASES if case[0] == "GRPO beside the CPU"])
        plain, asked = part.batch_of, []

        def batch_of(trainer, episodes=None):
            asked.append(episodes)
            episodes, grads, scores = plain(trainer, episodes)
            return episodes, grads if asked[-1] is None else 1.01 * grads, scores

        monkeypatch.setattr(part, "batch_of", batch_of)
        (row,) = rows("trainer")[1]
        assert row["fp32"]["gradients"] == pytest.approx(0.01)
        assert row["ok"] is False

    def test_wrong_sums_are_seen_and_an_error_is_a_row(self, rows, monkeypatch):
        from fastgrpo.inputs import Segments

        part, plain = PARTS["learner"], Segments.sum

        def broken(contact):
            raise RuntimeError("an illegal memory access was encountered")

        cases = [(broken, {}), *(case for case in part.CASES if case[0] in part.PLAIN)]
        monkeypatch.setattr(part, "CASES", cases)
        monkeypatch.setattr(Segments, "sum", lambda self, x: plain(self, 2 * x))
        status, found = rows("learner")
        assert status == 0
        assert "illegal memory access" in found[0]["error"]
        wrong = [row for row in found[1:] if row["ok"] is False]
        assert {row["what"] for row in wrong} == {"segment_sums", "packed_losses"}
        assert len(found) == len(cases)

    def test_a_package_that_is_missing_is_said_and_not_wrong(self, rows, monkeypatch, tmp_path):
        plain = device.find_spec
        monkeypatch.setattr(device, "find_spec", lambda name: None if name in ("rich", "matplotlib") else plain(name))
        monkeypatch.setattr(PARTS["learner"], "CASES", PARTS["learner"].CASES[:2])
        (row,) = rows("trainer")[1]
        assert row["skipped"] == "needs matplotlib, rich"
        assert [row["skipped"] for row in rows("learner")[1][1:]] == ["needs matplotlib"] * 2
        assert first_contact.summary(tmp_path, {}) == 0


@pytest.mark.quick
def test_it_fits_nine_minutes():
    """Even if every step takes all it may, the parent stops in time."""
    assert first_contact.TIME_LIMIT + 10 < 540
    assert sum(step.seconds for name, step in first_contact.STEPS.items() if name != "once") < 910

"""``python -m bench.learner``: entries whose gradients agree, rows kept as they come, what is made of them."""

import itertools
import json

import pytest

for package in ("accelerate", "matplotlib", "trl"):
    pytest.importorskip(package)

from bench import curves, learner  # noqa: E402
from bench.learner import ENTRIES, PADDED, SHARED, SKIPPED, SORTED, TRL, Case  # noqa: E402

TINY = Case(prompt=12, longest=10, zeros=0.5, groups=2, vocabulary=64, width=64, layers=1, rounds=1)
ABOUT = {"device": "a CPU, 1 threads", "torch": "2", "date": "2026-11-26", "command": "x"}


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Real memory: transformers fills what it allocates."""


def test_every_saving_keeps_the_gradients():
    found = learner.child_time(TINY)
    assert [*found] == TINY.entries == [TRL, *ENTRIES]
    assert all(seconds > 0 and error < 1e-5 for seconds, error, _ in found.values())


def test_what_each_saving_leaves(monkeypatch):
    """Micro-batches of each entry: padded groups, sorted ones, those with an advantage, prompts once."""
    model = learner.make_model(TINY)
    episodes, tokens = learner.make_episodes(model, TINY), {}
    lengths = sorted(len(e.completion_ids) for e in episodes)
    assert (lengths[0], lengths[-1]) == (1, 10)
    plain = learner.Learner.call

    def call(self, model, inputs, function):
        seen.append(inputs["input_ids"].numel())
        return plain(self, model, inputs, function)

    monkeypatch.setattr(learner.Learner, "call", call)
    for name in ENTRIES:
        seen = []
        learner.ours(model, episodes, TINY, name)()
        tokens[name] = sum(seen)
    assert tokens[PADDED] > tokens[SORTED] > 1.5 * tokens[SKIPPED] > 3 * tokens[SHARED]
    first = [e for e in episodes if e.advantage]
    assert len(first) == 8
    assert tokens[SHARED] == 12 + sum(len(e.completion_ids) - 1 for e in first)


def made_up(tmp_path):
    rows = learner.Rows(tmp_path / "learner-cpu.jsonl")
    for prompt, longest, zeros in itertools.product((64, 512), (128,), (0.0, 0.5)):
        case = Case(prompt, longest, zeros)
        for i, name in enumerate(case.entries):
            more = {} if zeros else {"peak_mib": 100.0 / (i + 1)}
            rows.add(case, name, ABOUT, seconds=10.0 / (i + 1), times_faster_than_trl=i + 1.0, **more)
    return rows


def test_rows_are_kept_as_they_come(tmp_path):
    case = Case(512, 128, 0.0)
    made_up(tmp_path)
    again = learner.Rows(tmp_path / "learner-cpu.jsonl")
    assert len(again.rows) == 2 * (4 + 5)
    assert again.missing(case, case.entries, "seconds") == []
    assert again.missing(Case(2048, 128, 0.0), [TRL], "seconds") == [TRL]
    assert again.add(case, TRL, ABOUT, peak_mib=7.0)["seconds"] == 10.0
    assert learner.Rows(again.path).rows[512, 128, 0.0, TRL]["peak_mib"] == 7.0


def test_words_and_pictures(tmp_path):
    rows = [*made_up(tmp_path).rows.values()]
    assert "2.00 s a learner step, 10.00 s for TRL" in learner.summary(rows)
    assert "our own step 1.3 x faster and its activations 1.3 x smaller (4.0 x than TRL's)" in learner.summary(rows)
    lines = learner.table(rows).splitlines()
    assert lines[0] == "| | prompt 64, answers to 128 | prompt 512, answers to 128 |"
    assert lines[2].startswith(f"| {TRL} | 10.00 s (1.0 x); 10.00 s (1.0 x); 100 MiB |")
    learner.plot(rows, tmp_path / "picture.png")
    assert {p.name for p in tmp_path.glob("*.png")} == {"picture.png", "picture-memory.png"}


def test_curves(tmp_path):
    for seed in (0, 1):
        lines = {"step": 0, "eval/pass@1": 0.1}, {"step": 1, "reward": 0.4}, {"step": 2, "eval/pass@1": 0.6 + seed / 10}
        (tmp_path / f"{seed}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    rows = curves.collect([tmp_path / "0.jsonl", tmp_path / "1.jsonl"], ABOUT)
    assert (
        curves.summary(rows) == "Held-out problems, sampled answers, 2 steps: seed 0 0.10 to 0.60; seed 1 0.10 to 0.70."
    )
    assert curves.plot(rows, tmp_path / "curves.png").exists()

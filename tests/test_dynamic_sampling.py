"""DAPO's dynamic sampling: groups without spread give way to groups of the next prompts."""

import pytest

pytest.importorskip("accelerate")

from fastgrpo.trainer import loop as loops
from fastgrpo.trainer.data import draw

import trainer_job

SETTINGS = {"steps_per_generation": 4, "gradient_accumulation_steps": 4, "num_iterations": 1, "save_strategy": "no"}
ROWS = [{"prompt": f"{i}=", "dull": i in (1, 2, 5)} for i in range(10)]  # four groups of four a rollout


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Real memory: transformers fills what it allocates."""


def rewards(completions, dull, **_):
    return [0.5 if d else i % 4 for i, d in enumerate(dull)]


def make_trainer(folder, **settings):
    return trainer_job.make_trainer(
        folder, rewards=rewards, rows=ROWS, shuffle_dataset=False, **{**SETTINGS, **settings}
    )


def prompts(trainer, episodes):
    return [trainer.tokenizer.decode(e.prompt_ids) for e in episodes[::4]]


@pytest.mark.parametrize(
    ("times", "used", "position"),
    [(0, ["0=", "1=", "2=", "3="], 4), (1, ["0=", "4=", "5=", "3="], 6), (2, ["0=", "4=", "6=", "3="], 7),
     (9, ["0=", "4=", "6=", "3="], 7)],
)  # fmt: skip
def test_groups_without_spread_are_replaced(tmp_path, times, used, position):
    trainer = make_trainer(tmp_path, max_resample_times=times)
    episodes = trainer.collect()
    assert prompts(trainer, episodes) == used
    assert trainer.position == position
    assert trainer.resampled == (position - 4) / 4
    for i, prompt in enumerate(used):
        group = episodes[4 * i : 4 * i + 4]
        assert len({tuple(e.prompt_ids) for e in group}) == 1
        assert all(e.spread == (prompt not in ("1=", "2=", "5=")) for e in group)
        assert any(e.advantage != 0 for e in group) == group[0].spread
    assert prompts(trainer, trainer.collect())[0] == f"{position % 10}="


def test_the_log_counts_them(tmp_path):
    row = make_trainer(tmp_path, max_resample_times=1, max_steps=1).train()[0]
    assert row["resampled"] == 0.5
    assert row["frac_reward_zero_std"] == 0.25


def test_hopeless_prompts_end(tmp_path):
    trainer = trainer_job.make_trainer(
        tmp_path, rewards=lambda completions, **_: [0.0] * len(completions), rows=ROWS, max_resample_times=3, **SETTINGS
    )
    assert not any(e.spread for e in trainer.collect())
    assert trainer.position == 16


def test_ranks_that_replace_more_than_others_draw_different_rows(tmp_path, monkeypatch):
    """As if this were each of three ranks."""
    trainer, counts, taken = make_trainer(tmp_path), [2, 0, 3], []
    monkeypatch.setattr(loops, "gather_object", lambda mine: counts)
    for rank, count in enumerate(counts):
        trainer.position = 4
        monkeypatch.setattr(type(trainer.accelerator), "process_index", property(lambda self, rank=rank: rank))
        taken += [row["prompt"] for row in trainer.next_rows(count)]
        assert trainer.position == 9
    assert taken == [f"{i}=" for i in draw(10, 4, 5, 0, shuffle=False)]

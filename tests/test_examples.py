"""The worlds: their problems, files and tiny models; and that each preset's reward rises, through the command line."""

import json

import pytest
import torch

pytest.importorskip("rich")
pytest.importorskip("matplotlib")
pytest.importorskip("accelerate")

from fastgrpo.trainer import cli, examples
from fastgrpo.trainer.alphabet import check_alphabet
from fastgrpo.trainer.data import longest_prompt
from fastgrpo.trainer.job import load_config
from fastgrpo.trainer.rewards import resolve
from fastgrpo.trainer.supervised import longest_example

NAMES = list(examples.WORLDS)
REWARD = dict.fromkeys(("addition", "arithmetic", "gsm8k"), "numeric_answer")
REWARD |= {"sort": "exact_answer", "countdown": "countdown"}


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Real memory: transformers fills what it allocates."""


def rewards_of(name, rows, completions):
    columns = {key: [row[key] for row in rows] for key in rows[0] if key != "prompt"}
    return resolve(REWARD[name])(prompts=[r["prompt"] for r in rows], completions=completions, **columns)


@pytest.mark.quick
@pytest.mark.parametrize("tiny", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_the_solutions_are_right_and_wrong_ones_are_not(name, tiny):
    rows = examples.problems(examples.WORLDS[name], 300, seed=1, tiny=tiny)
    assert rewards_of(name, rows, [row["completion"] for row in rows]) == [1.0] * 300
    thought = [f"<think>first 1, then 2</think>\n<answer>{row['completion']}</answer>" for row in rows]
    assert rewards_of(name, rows, thought) == [1.0] * 300
    assert rewards_of(name, rows, ["99999"] * 300) == [0.0] * 300
    others = rewards_of(name, rows, [row["completion"] for row in rows[1:] + rows[:1]])
    assert sum(others) < 60


@pytest.mark.parametrize("name", NAMES)
def test_held_out_problems_are_never_trained_on(name):
    world = examples.WORLDS[name]
    train, test = ({row["prompt"] for row in examples.problems(world, 2000, 0, held_out)} for held_out in (False, True))
    assert not train & test
    assert len(test) > 20
    assert examples.problems(world, 5, 3) == examples.problems(world, 5, 3) != examples.problems(world, 5, 4)


@pytest.mark.quick
def test_characters_that_would_be_dropped_are_refused():
    digits, words = (examples.tiny_model(f"tiny:{name}")[1] for name in ("sort", "arithmetic"))
    assert digits("11+6=").input_ids == digits("116=").input_ids  # as the tokenizer itself has it
    for texts in (["11=", "11+6="], [[{"role": "user", "content": "1+"}]], [None, "+"]):
        with pytest.raises(ValueError, match=r"what the tokenizer knows, '0123456789=', got '\+'"):
            check_alphabet(digits, texts)
    check_alphabet(digits, ["12=\n", [{"role": "user", "content": "3 4"}], None])  # spaces may go
    check_alphabet(digits, ["12<eos>", 3])
    check_alphabet(words, ["Zoë has {x} ß"])  # it has bytes for everything
    with pytest.raises(ValueError, match="got '\\+'"):
        longest_prompt(digits, [{"prompt": "1+2="}])
    with pytest.raises(ValueError, match="got 'a'"):
        longest_example(digits, [{"prompt": "1=", "completion": "a"}])


def test_names_of_datasets():
    rows = examples.load_rows("world:countdown:test")
    assert len(rows) == examples.TEST_ROWS
    assert rows[0]["prompt"][0]["role"] == "user"
    assert "<answer>" in rows[0]["prompt"][0]["content"]
    assert isinstance(examples.load_rows("tiny:sort")[0]["prompt"], str)


GSM8K = [
    ("Mia bakes 12 rolls and sells 5. How many rolls are left?", "12-5=<<12-5=7>>7\n#### 7", "7"),
    ("A ship holds 1,100 crates on each of 3 decks. How many?", "3*1,100=<<3*1100=3300>>3,300\n#### 3,300", "3,300"),
    ("Leo owes $8 and pays $10. What is his debt?", "8-10=<<8-10=-2>>-2\n#### -2", "-2"),
]  # fmt: skip


def test_gsm8k_reads_a_file(tmp_path):
    path = tmp_path / "train.jsonl"
    path.write_text("\n".join(json.dumps({"question": q, "answer": a}) for q, a, _ in GSM8K) + "\n\n")
    for kind in ("tiny", "world"):
        rows = examples.load_rows(f"{kind}:gsm8k:{path}")
        assert [row["answer"] for row in rows] == [answer for *_, answer in GSM8K]
        assert rewards_of("gsm8k", rows, ["so it is 7.", r"\boxed{3300}", "<answer>$-2</answer>"]) == [1.0] * 3
        assert rewards_of("gsm8k", rows, [answer for _, answer, _ in GSM8K]) == [1.0] * 3
    assert rows[0]["prompt"][0]["content"].startswith(GSM8K[0][0])


@pytest.mark.parametrize("line", ['{"question": "?"}', "not JSON", "[1]"])
def test_gsm8k_names_the_bad_line(tmp_path, line):
    path = tmp_path / "train.jsonl"
    path.write_text('{"question": "?", "answer": "#### 1"}\n' + line + "\n")
    with pytest.raises(ValueError, match=r"train\.jsonl, (line|row) 2: expected"):
        examples.load_rows(f"world:gsm8k:{path}")


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("tiny:sorting", "NAME one of sort, addition, countdown, arithmetic, gsm8k, got 'tiny:sorting'"),
        ("big:sort", "expected 'world:NAME' or 'tiny:NAME'"),
        ("tiny:sort:tests", "a world's part must be 'train' or 'test', got 'tests'"),
        ("world:gsm8k", "gsm8k needs a file: 'world:gsm8k:path/train.jsonl'"),
        ("tiny:gsm8k:nowhere.jsonl", "gsm8k needs a file"),
    ],
)
def test_a_wrong_name_is_named(spec, message):
    with pytest.raises(ValueError, match=message):
        examples.load_rows(spec)


@pytest.mark.quick
@pytest.mark.parametrize("name", NAMES)
def test_tiny_tokenizers(name, tmp_path):
    """Problems survive the tokenizer, and so does the tokenizer a folder."""
    from transformers import AutoTokenizer

    world = examples.WORLDS[name]
    tokenizer = examples.tiny_tokenizer(world)
    for row in examples.problems(world, 50, 9, held_out=True):
        ids = tokenizer(row["prompt"] + row["completion"] + "<eos>").input_ids
        assert tokenizer.decode(ids, skip_special_tokens=True) == row["prompt"] + row["completion"]
        assert ids[-1] == tokenizer.eos_token_id
        assert tokenizer.pad_token_id not in ids[:-1]
    assert tokenizer.all_special_tokens == [tokenizer.eos_token]  # none is skipped within an answer
    tokenizer.save_pretrained(tmp_path)
    assert AutoTokenizer.from_pretrained(tmp_path)(row["prompt"]).input_ids == tokenizer(row["prompt"]).input_ids
    assert len(examples.tiny_tokenizer(examples.WORLDS["sort"], 128)) == 128


def test_tiny_models_are_reproducible():
    (a, _), (b, _), (c, _) = (examples.tiny_model("tiny:sort", seed) for seed in (0, 0, 1))
    assert torch.equal(a.lm_head.weight, b.lm_head.weight)
    assert not torch.equal(a.lm_head.weight, c.lm_head.weight)


@pytest.mark.quick
@pytest.mark.parametrize("preset", ["countdown", "arithmetic", "gsm8k", "gsm8k-4bit", "gsm8k-cpu"])
def test_presets_for_a_real_model(preset):
    """Their settings are legal (8-bit paging aside, which needs a GPU), and their rewards fit their rows."""
    job, settings = load_config(preset, {"optim": "adamw_torch", "use_peft": False, "load_in_4bit": False})
    assert len(job["reward_funcs"]) == len(settings.reward_weights)
    assert "model" not in job
    assert ("train_dataset" in job) == (not preset.startswith("gsm8k"))


def test_the_real_preset():
    """`make real`: numbers are asked for, and the answer's last one counts."""
    job, settings = load_config("real")
    assert "model" not in job
    assert settings.use_peft
    row = examples.load_rows(job["train_dataset"])[0]
    assert row["prompt"][0]["content"].endswith("Answer with the number only.")
    assert rewards_of("addition", [row, row], [f"It is {row['answer']}.", "It is 61."]) == [1.0, 0.0]


RISES = {"demo": 36, "countdown-tiny": 60, "arithmetic-tiny": 60, "gsm8k-tiny": 32}  # optimiser steps


@pytest.mark.parametrize("preset", RISES)
def test_the_reward_rises(preset, tmp_path):
    steps = str(RISES[preset])
    words = ["--output_dir", str(tmp_path), "--max_steps", steps, "--eval_steps", steps, "--use_cpu", "true"]
    cli.main(["train", preset, *words])
    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    rewards = [row["reward"] for row in rows if "reward" in row]
    assert len(rewards) == RISES[preset]
    assert sum(rewards[-6:]) / 6 > sum(rewards[:6]) / 6 + 0.1, rewards
    before, after = (row["eval/reward"] for row in rows if "eval/reward" in row)
    assert after > before + 0.1, (before, after)  # on prompts it was never trained on

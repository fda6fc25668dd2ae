"""The main job, shortened: the reward rises, and what it leaves behind can be used."""

import json

import pytest
import torch

pytest.importorskip("rich")
pytest.importorskip("matplotlib")
pytest.importorskip("accelerate")

from fastgrpo import checks
from fastgrpo.trainer import cli, examples
from fastgrpo.trainer.generate import Sampling, TransformersSampler


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Real memory: transformers fills what it allocates."""


def run(output, *options):
    """``fastgrpo demo`` -> the log's training rows, its evaluations."""
    assert cli.main(["demo", "--output_dir", str(output), *options]) == 0
    rows = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
    return [r for r in rows if "reward" in r], [r for r in rows if "eval/reward" in r]


def test_the_reward_rises(tmp_path):
    rows, evaluations = run(tmp_path, "--max_steps", "75")
    first, last = (sum(r["reward"] for r in part) / 10 for part in (rows[:10], rows[-10:]))
    assert last > first + 0.25
    assert evaluations[-1]["eval/reward"] > evaluations[0]["eval/reward"] + 0.2
    assert [r["step"] for r in rows] == list(range(1, 76))
    names = {"reward", "kl", "entropy", "clip_fraction", "skipped", "tokens_per_second", "grad_norm", "learning_rate"}
    assert names <= rows[0].keys()
    assert rows[0]["entropy"] > rows[-1]["entropy"] > 0.05
    assert any(r["clip_fraction"] > 0 for r in rows)  # every second step is off-policy
    assert all(0 <= r["skipped"] < 1 for r in rows)
    assert (tmp_path / "curves.png").read_bytes()[:4] == b"\x89PNG"
    check_model(tmp_path / "model", evaluations[-1]["eval/greedy_reward"])


def check_model(path, greedy):
    """transformers loads it, tokenizer and all, and it answers as the trained model did."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = AutoModelForCausalLM.from_pretrained(path), AutoTokenizer.from_pretrained(path)
    rows = examples.load_rows("tiny:sort:test")
    prompts = tokenizer([r["prompt"] for r in rows]).input_ids
    answers = TransformersSampler(tokenizer).generate(model, prompts, Sampling(max_completion_length=5), greedy=True)
    texts = [tokenizer.decode(group[0].ids, skip_special_tokens=True) for group in answers]
    right = [text == row["answer"] for text, row in zip(texts, rows)]
    assert sum(right) / len(right) == pytest.approx(greedy, abs=1e-6)


def test_triton_path_gives_the_same_steps(tmp_path, monkeypatch):
    """The same code through the kernels: two steps agree with the torch backend's."""
    pytest.importorskip("triton")
    sizes = {"per_device_train_batch_size": 8, "num_generations": 4, "max_steps": 2, "eval_on_start": False,
             "eval_strategy": "no", "use_cpu": not torch.cuda.is_available()}  # fmt: skip
    options = [word for name, value in sizes.items() for word in (f"--{name}", str(value).lower())]
    backends = [
        ["--backend", "torch"],
        ["--backend", "triton", "--model", f"{tmp_path}/torch/sft/model", "--sft", "null"],
    ]
    both = [run(tmp_path / words[1], *words, *options)[0] for words in backends]
    assert any(row["grad_norm"] > 0 for row in both[0])
    for a, b in zip(*both):
        for name in ("entropy", "loss", "grad_norm", "reward"):
            assert a[name] == pytest.approx(b[name], rel=1e-4, abs=1e-6), name


@pytest.mark.quick
def test_missing_extra_is_named():
    with pytest.raises(ImportError, match=r"pip install 'fastgrpo\[train\]'"):
        checks.need("a_package_nobody_has")

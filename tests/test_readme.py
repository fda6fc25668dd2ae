"""README's code runs as it stands."""

import re
from pathlib import Path

import pytest

README = (Path(__file__).resolve().parents[1] / "README.md").read_text()
EXAMPLES = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


@pytest.mark.parametrize("code", EXAMPLES, ids=range(len(EXAMPLES)))
def test_example(code, capsys):
    scope = {}
    exec(compile(code, "README.md", "exec"), scope)
    assert scope["hidden"].grad.abs().sum() > 0
    assert "active_tokens" in capsys.readouterr().out


def test_there_is_an_example():
    assert EXAMPLES


def test_every_figure_comes_from_the_results():
    """README's tables are what ``python -m bench report`` makes of the committed rows."""
    from bench import report

    assert report.rebuilt(README, report.ROOT / "bench/results") == README
    rows = [r for suite in report.SECTIONS for r in report.load(report.ROOT / "bench/results", suite, "cpu")]
    assert rows
    assert all({"device", "torch", "date", "command", "entry"} <= set(r) for r in rows)

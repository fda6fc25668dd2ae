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
    """README's table is what bench/report.py makes of the committed rows."""
    import importlib.util
    import json

    root = Path(__file__).resolve().parents[1]
    spec = importlib.util.spec_from_file_location("bench_report", root / "bench" / "report.py")
    report = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(report)
    rows = [json.loads(x) for x in (root / "bench/results/head-cpu.jsonl").read_text().splitlines()]
    assert report.rebuilt(README, rows) == README
    assert {r["profile"] for r in rows} == {"rl", "flat"}
    assert all({"device", "torch", "date", "command"} <= set(r) for r in rows)

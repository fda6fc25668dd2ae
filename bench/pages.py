"""``python -m bench report``: the figures of README and docs/benchmarks.md, rebuilt from bench/results/.

A page's generated part stands between ``<!-- NAME: written by ... -->`` and ``<!-- end of NAME -->``.
"""

import argparse
import importlib
import re
import sys

from bench import RESULTS, ROOT, bias, curves, front, learner, report

PARTS = {  # page: {name of a part: its text}
    "README.md": {"numbers": front.numbers, "results": front.results},
    "docs/gpu.md": {"passes": front.passes},
    "docs/benchmarks.md": {"figures": lambda: report.figures(RESULTS), "learner": lambda: learner.table(of_learner())},
    "docs/trainer.md": {
        "learner": lambda: learner.summary(of_learner()),
        "real": lambda: curves.summary(report.load(RESULTS, "real", "cpu")),
    },
}


def of_learner():
    return report.load(RESULTS, "learner", "cpu")


def fill(page, name, text):
    """The page with its part of that name replaced."""
    part = re.compile(rf"(<!-- {re.escape(name)}: [^\n]* -->\n)(.*?)(<!-- end of {re.escape(name)} -->)", re.DOTALL)
    if len(part.findall(page)) != 1:
        raise ValueError(f"expected one part {name!r}, got {len(part.findall(page))}")
    return part.sub(lambda found: f"{found[1]}{text}\n{found[3]}", page)


def rebuild(path):
    """A page's text, with its figures as the results have them."""
    text = (ROOT / path).read_text()
    for name, content in PARTS[path].items():
        text = fill(text, name, content())
    return text


def pictures():
    """Draws every picture of bench/results/ and docs/pictures/ again from the rows."""
    for suite in report.SECTIONS:
        for kind in report.KINDS:
            if rows := report.load(RESULTS, suite, kind):
                importlib.import_module(f"bench.suites.{suite}").charts(rows, str(RESULTS / f"{suite}-{kind}"))
    for module, name in ((bias, "bias"), (learner, "learner"), (curves, "real")):
        module.plot(report.load(RESULTS, name, "cpu"), RESULTS / f"{name}-cpu.png")
    front.main()


def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m bench report", description=__doc__)
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 if a page would change")
    parser.add_argument("--pictures", action="store_true", help="draw the pictures again too")
    options = parser.parse_args(argv)
    if options.pictures:
        pictures()
    for path in PARTS:
        text = rebuild(path)
        if not options.check:
            (ROOT / path).write_text(text)
        elif text != (ROOT / path).read_text():
            print(f"{path} is not what python -m bench report writes")
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

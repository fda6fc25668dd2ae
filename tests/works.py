"""The table of docs/compatibility.md, what works with which versions: the tests marked ``works(integration, what)``."""

import os
import re
from collections import defaultdict
from importlib.metadata import version
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "compatibility.md"
BEGIN, END = "<!-- works: written by pytest --write-works -->\n", "<!-- end of works -->\n"
HEAD = "| with | what the tests ran | versions |\n|---|---|---|\n"
PACKAGES = {
    "TRL": ("trl", "transformers", "peft", "accelerate"),
    "Liger's slot": ("liger_kernel",),
    "verl": (),
    "transformers": ("transformers", "peft", "accelerate"),
}


def line(integration, what):
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", *PACKAGES[integration]))
    return f"| {integration} | {what} | {versions} |\n"


def as_pinned(text):
    """Whether a line's versions are those of requirements.txt; with others the tests run, the table stays."""
    pins = set(re.split(r"[=\s]+", (ROOT / "requirements.txt").read_text()))
    return all(word.split("+")[0] in pins for word in text.split("|")[3].replace(",", " ").split())


def split(text):
    """-> what stands before the table, the table, what comes after."""
    before, rest = text.split(BEGIN)
    table, after = rest.split(END)
    return before, table, after


class Works:
    def __init__(self, write):
        self.write, self.outcomes = write, defaultdict(set)

    def pytest_runtest_logreport(self, report):
        for name, value in report.user_properties:
            if name == "works" and (report.when == "call" or report.outcome != "passed"):
                self.outcomes[value].add(report.outcome)

    def pytest_sessionfinish(self, session):
        order = list(PACKAGES)
        ran = sorted(
            (k for k, v in self.outcomes.items() if v == {"passed"}), key=lambda k: order.index(k.split("|")[1].strip())
        )
        before, table, after = split(PAGE.read_text())
        if self.write:
            PAGE.write_text(before + BEGIN + HEAD + "".join(ran) + END + after)
        elif missing := [text for text in ran if as_pinned(text) and text not in table]:
            print(
                "\nthe table of docs/compatibility.md is out of date (make test ARGS=--write-works):\n"
                + "".join(missing)
            )
            session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_addoption(parser):
    parser.addoption("--write-works", action="store_true", help="write the table of docs/compatibility.md")


def pytest_configure(config):
    config.addinivalue_line("markers", "works(integration, what): a line of docs/compatibility.md's table")
    if "PYTEST_XDIST_WORKER" not in os.environ:
        config.pluginmanager.register(Works(config.getoption("--write-works")))


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item):
    outcome = yield
    if marker := item.get_closest_marker("works"):
        outcome.get_result().user_properties.append(("works", line(*marker.args)))

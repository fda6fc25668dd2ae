"""pytest on the emulator: CPU tensors are a GPU's, and what Triton compiled for it runs."""

import os
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
import arith
import device

arith.APPROXIMATE = 2.0**-22 * int(os.environ["FASTGRPO_EMULATE_ERRORS"])
GPU = device.Emulator(os.environ["FASTGRPO_EMULATE"])


def pytest_collection_modifyitems(items, config):
    """But for tests of the torch backend."""
    of_torch = [i for i in items if "torch" in map(str, getattr(getattr(i, "callspec", None), "params", {}).values())]
    config.hook.pytest_deselected(items=of_torch)
    items[:] = [item for item in items if item not in of_torch]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    """What the launcher knows as a launch refused is what went wrong in it."""
    GPU.error = None
    try:
        return (yield)
    finally:
        if GPU.error is not None:
            raise GPU.error


def pytest_sessionfinish(session):
    """A session that launched nothing has shown nothing."""
    if not GPU.ran and session.exitstatus == 0:
        session.exitstatus = pytest.ExitCode.NO_TESTS_COLLECTED


def pytest_terminal_summary(terminalreporter):
    for name, (launches, programs, seconds) in sorted(GPU.ran.items(), key=lambda row: -row[1][2]):
        terminalreporter.write_line(f"{name:28} {launches:6} launches {programs:8} programs {seconds:8.1f} s")

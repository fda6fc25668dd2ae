"""The dry run's own parts: that it finds what it is there to find. ``make gpu-dry-run`` is the run itself."""

import contextlib
import ctypes
import importlib.util
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

pytestmark = pytest.mark.quick

pytest.importorskip("triton")
FOLDER = Path(__file__).parent / "dry_run"


@pytest.fixture
def dry_run(monkeypatch):
    monkeypatch.setattr(sys, "path", [str(FOLDER), *sys.path])
    spec = importlib.util.spec_from_file_location("dry_run_main", FOLDER / "__main__.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    sys.modules.pop("gpu", None)


class Device:
    def __init__(self, launches, compiles, bound=0, hooked=None):
        hooked = launches if hooked is None else hooked
        self.count = SimpleNamespace(launches=launches, compiles=compiles, bound=bound, hooked=hooked)

    @contextlib.contextmanager
    def counting(self):
        yield self.count


@pytest.mark.parametrize(
    ("counts", "wrong"),
    [
        ((7, 0), []),
        ((6, 0, 4, 6), []),
        ((8, 0), ["8 launches, documented 7"]),
        ((7, 1), ["1 compilations, expected 0"]),
        ((7, 0, 5), ["5 launches bound, expected 4"]),
        ((7, 0, 4, 4), ["4 of 7 launches seen by Triton's hook"]),
    ],
)
def test_counts_are_judged(dry_run, counts, wrong):
    case = SimpleNamespace(name="a", run=lambda: None, launches=7, compiles=0, bound=4)
    assert dry_run.judge(Device(*counts), case)["wrong"] == wrong


def test_an_exception_is_a_failure(dry_run):
    case = SimpleNamespace(name="a", run=lambda: 1 / 0, launches=None, compiles=None)
    assert "ZeroDivisionError" in dry_run.judge(Device(0, 0), case)["wrong"][0]


def test_a_child_that_dies_is_a_failure(dry_run, monkeypatch, capsys):
    done = SimpleNamespace(
        returncode=-6, stdout='{"case": "a", "launches": 1, "compiles": 0, "wrong": []}', stderr="abort"
    )
    monkeypatch.setattr(dry_run.subprocess, "run", lambda *a, **k: done)
    monkeypatch.setattr(dry_run, "triton_folder", lambda version: None)
    monkeypatch.setattr(dry_run.gpu.report, "triton_folder", lambda version: None)
    rows = dry_run.run("3.6.0", "9.0", False, False)
    assert "exit status -6 after 1 cases: abort" in rows[-1]["wrong"][0]
    monkeypatch.setattr(dry_run.gpu, "build", lambda folder: None)
    assert dry_run.main(["--triton", "3.6.0", "--capabilities", "9.0"]) == 1
    assert ", 1 failures" in capsys.readouterr().out


def test_the_libcuda_refuses_what_a_gpu_would(dry_run, tmp_path, monkeypatch):
    dry_run.gpu.build(tmp_path)
    monkeypatch.setenv("DRY_RUN_SHARED", "1000")
    library = ctypes.CDLL(str(tmp_path / "libcuda.so.1"))

    def launch(grid=1, shared=1000):
        shape = (ctypes.c_uint * 7)(grid, 1, 1, 128, 1, 1, shared)
        return library.cuLaunchKernelEx(shape, ctypes.c_void_p(1), ctypes.c_void_p(1), None)

    assert [launch(), launch(grid=0), launch(shared=1001), launch(grid=2**31)] == [0, 1, 1, 1]
    assert library.dry_run_launches() == 4
    assert library.dry_run_bad_launches() == 3


def test_the_matrix_reaches_every_objective(dry_run):
    import matrix

    from fastgrpo import GRPOLossConfig
    from fastgrpo.config import DIVERGENCE_MASKS, KL_ESTIMATORS

    for everything in (False, True):
        configs = [GRPOLossConfig(**settings) for settings, _ in matrix.objectives(everything)]
        assert {c.surrogate for c in configs} == {"clip", "capped", "sapo", "vespo"}
        assert {c.divergence_mask for c in configs} == {None, *DIVERGENCE_MASKS}
        assert {(c.kl_estimator, c.use_bias_correction_kl) for c in configs if c.beta} == {
            (k, corrected) for k in KL_ESTIMATORS for corrected in (True, False)
        }
    sys.modules.pop("matrix")

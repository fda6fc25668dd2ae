"""The kernel report: it compiles what the launchers launch, and it fails when it should."""

import importlib.metadata
import itertools
import subprocess
import sys

import pytest
from packaging.version import Version

report = pytest.importorskip("fastgrpo.kernels.report")

OWN = importlib.metadata.version("triton")
ROW = {
    "architecture": "sm_86", "triton": "3.7.1", "kernel": "forward_kernel", "variant": "bfloat16", "spill_bytes": 0,
    "shared": 1000, "tensor_core": 3, "registers": 200,
}  # fmt: skip


@pytest.mark.quick
@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({}, None),
        ({"spill_bytes": 8}, "spills 8 bytes"),
        ({"shared": 101377}, "101377 bytes of shared memory, limit 101376"),
        ({"tensor_core": 0}, "no tensor-core instruction"),
        ({"tensor_core": 0, "variant": "float32"}, None),
        ({"tensor_core": 0, "kernel": "combine_kernel"}, None),
    ],
    ids=str,
)
def test_complaints(change, complaint):
    assert report.complaints({**ROW, **change}) == ([complaint] if complaint else [])


KERNELS = (
    "choose", "combine", "combine_pair", "count_kinds", "cut", "dbias", "dhidden", "directions", "dlogits",
    "dlogits_pair", "dweight", "error", "fold", "forward", "forward_pair", "gather", "held_dlogits", "held_sums",
    "kept_logits", "kept_sums", "label", "level", "levels", "lost", "mass", "masses", "need", "objective", "offsets",
    "order", "place_entries", "place_rows", "positions", "row_terms", "scatter", "share", "sort_out", "weigh",
)  # fmt: skip


def test_every_kernel_and_tile_is_recorded():
    from fastgrpo.kernels import tiles

    for architecture in tiles.ARCHITECTURES:
        seen = {}
        for _, kernel, arguments in report.recorded_launches(architecture, depths=(2048,)):
            shape = tuple(v for k, v in arguments.items() if k.startswith("BLOCK"))
            seen.setdefault(kernel.fn.__name__, set()).add(shape)
        assert {f"{name}_kernel" for name in KERNELS} == set(seen)
        for name in tiles.TILES:
            described = (False, True) if name in tiles.DESCRIBED.get(architecture, ()) else (False,)
            for size, by_descriptors in itertools.product((2, 4), described):
                tile = tiles.lookup(name, size, architecture, by_descriptors, depth=2048)
                own = f"{'_'.join(name.split('_')[: 1 + ('pair' in name)])}_kernel"
                assert (tile.rows, tile.cols, tile.depth) in seen[own]


@pytest.mark.skipif(
    Version(OWN) < Version(report.OTHER_TRITON), reason="fp32 kernels spill a few bytes where Triton is older"
)
def test_one_architecture_compiles():
    """A frozen head's kernels; CI compiles all of them, for every architecture."""
    command = [sys.executable, "-m", "fastgrpo.kernels.report", "--architectures", "sm_89", "--triton", OWN]
    command += ["--only", "bfloat16 frozen head"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert ", 0 failures" in done.stdout
    assert all(f"{name}_kernel" in done.stdout for name in ("forward", "dlogits", "masses", "dhidden", "need"))


def test_a_failed_compilation_is_a_failure(monkeypatch):
    monkeypatch.setattr(report.ceilings, "load", dict)
    monkeypatch.setattr(report, "child", lambda architecture, version, only: ([], "exit status 134: abort"))
    assert report.main(["--architectures", "sm_80", "--triton", OWN]) == 1
    monkeypatch.setattr(report, "child", lambda architecture, version, only: ([{**ROW, "spill_bytes": 4}], None))
    assert report.main(["--architectures", "sm_86", "--triton", OWN]) == 1
    monkeypatch.setattr(report, "child", lambda architecture, version, only: ([ROW], None))
    assert report.main(["--architectures", "sm_86", "--triton", OWN]) == 0


def test_some_kernels_are_asked_for_by_name():
    with pytest.raises(ValueError, match=r"only must be one of bfloat16, .*, got 'bfloat'"):
        next(report.recorded_launches("sm_89", only="bfloat"))
    with pytest.raises(SystemExit):
        report.main(["--only", "bfloat16", "--update"])

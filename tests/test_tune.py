"""The tiles measured on a device: read, refused, chosen; and the command that measures them, rehearsed on a CPU."""

import importlib.metadata
import itertools
import json
import math
import subprocess
import sys
import types

import pytest
import torch

pytest.importorskip("triton")
from bench import candidates, tune
from bench.contact import distributions, launches
from fastgrpo.kernels import report, tiles

GPU = torch.device("cuda", 0)
NAME = "NVIDIA H200"
TILE = {"rows": 128, "cols": 128, "depth": 64, "warps": 8, "stages": 4, "group": 16}
ENTRY = {"kernel": "forward", "bytes": 2, "described": True, "tile": TILE}
NOTES = {"device": NAME, "architecture": "sm_90", "torch": "2.13.0", "triton": "3.7.1", "date": "2026-11-26"}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Where measured files are looked for, as if on an H200 outside the interpreter."""
    monkeypatch.setattr(tiles, "MEASURED", tmp_path)
    monkeypatch.setattr(tiles, "interpreting", lambda: False)
    monkeypatch.setattr(tiles, "architecture", lambda device: "sm_90")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: NAME)
    tiles.measured.cache_clear()
    yield tmp_path
    tiles.measured.cache_clear()


def put(folder, *entries, name="nvidia-h200.json", **notes):
    path = folder / name
    path.write_text(json.dumps({**NOTES, **notes, "tiles": entries}))
    return path


@pytest.mark.quick
def test_a_measured_tile_comes_first_and_is_read_once(folder):
    path = put(folder, ENTRY, {**ENTRY, "kernel": "dweight"})
    tile = tiles.for_tensor("forward", torch.bfloat16, GPU, described=True)
    assert tile == tiles.Tile(**TILE, registers=255)  # as lookup limits a forward's
    assert tiles.for_tensor("dweight", torch.float16, GPU, described=True) == tiles.Tile(**TILE)
    path.unlink()
    assert tiles.for_tensor("forward", torch.bfloat16, GPU, described=True) == tile
    for kernel, dtype, described in (
        ("forward", torch.bfloat16, False), ("forward", torch.float32, True), ("dhidden", torch.bfloat16, True),
    ):  # fmt: skip
        plain = tiles.lookup(kernel, dtype.itemsize, "sm_90", described)
        assert tiles.for_tensor(kernel, dtype, GPU, described) == plain


@pytest.mark.quick
def test_without_a_file_the_defaults_serve(folder, monkeypatch):
    for kernel in tiles.TILES:
        for dtype in (torch.bfloat16, torch.float32):
            for described in (False, True):
                plain = tiles.lookup(kernel, dtype.itemsize, "sm_90", described)
                assert tiles.for_tensor(kernel, dtype, GPU, described) == plain
    put(folder, ENTRY)
    assert tiles.for_tensor("forward", torch.bfloat16, torch.device("meta"), described=True) == tiles.lookup(
        "forward", 2, "sm_90", described=True
    )  # the report and the dry run see what is compiled in
    monkeypatch.setattr(tiles, "interpreting", lambda: True)
    assert tiles.for_tensor("forward", torch.bfloat16, GPU, described=True) == tiles.INTERPRETER


@pytest.mark.quick
@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"kernel": "backward"}, "kernel must be one of"),
        ({"bytes": 3}, "bytes must be 2 or 4"),
        ({"bytes": True}, "'bytes' must be of type int"),
        ({"described": 1}, "'described' must be of type bool"),
        ({"tile": {**TILE, "rows": 96}}, "rows must be a power of two"),
        ({"tile": {**TILE, "depth": 8}}, "depth must be a power of two of at least 16"),
        ({"tile": {**TILE, "warps": 16}}, "warps must be at most 8"),
        ({"tile": {**TILE, "stages": 0}}, "stages must be a number of at least 1"),
        ({"tile": {**TILE, "registers": 255}}, "a tile has rows, cols"),
        ({"tile": {**TILE, "cols": 512}}, r"cols must be in \[32, 256\]"),
        ({"kernel": "dlogits", "tile": {**TILE, "cols": 256}}, "dlogits: cols must divide 128, got 256"),
        ({"kernel": "masses_full", "tile": {**TILE, "rows": 256}}, "masses_full: rows must divide 128"),
        ({"kernel": "dhidden", "tile": {**TILE, "depth": 256}}, "dhidden: depth must divide 128"),
        ({"kernel": "dweight", "tile": {**TILE, "rows": 256}}, "dweight: rows must divide 128"),
        ({"kernel": "forward_certified", "tile": {**TILE, "rows": 64}}, "must not depend .*64, 128"),
        ({"kernel": "forward_pair_certified", "tile": {**TILE, "rows": 64}}, r"must not depend .*\(64, 64\)"),
        ({"kernel": "forward_pair_certified", "tile": {**TILE, "cols": 256}}, r"cols must be in \[32, 128\], got 256"),
    ],
    ids=str,
)  # fmt: skip
def test_what_the_kernels_cannot_run_is_refused(folder, change, complaint):
    path = put(folder, {**ENTRY, **change})
    with pytest.raises(ValueError, match=complaint) as caught:
        tiles.for_tensor("forward", torch.bfloat16, GPU)
    assert str(path) in str(caught.value)


@pytest.mark.quick
@pytest.mark.parametrize("architecture", tiles.ARCHITECTURES)
def test_what_is_shipped_can_be_run(architecture):
    for kernel, sizes in tiles.TILES.items():
        for size, described in itertools.product(sizes, (False, True)):
            tile = tiles.lookup(kernel, size, architecture, described)
            tiles.check_tile(kernel, size, tile, architecture)
            tiles.check_table({(kernel, size, described): tile}, architecture)


@pytest.mark.quick
def test_four_warps_of_two_models_on_blackwell_are_refused():
    """Triton gives both models' sums one place in tensor memory: found by the emulator."""
    tile = tiles.Tile(128, 64, 64, 4, 3)
    for kernel, architecture in (("dlogits", "sm_100"), ("dlogits_pair", "sm_90"), ("dlogits_pair", "sm_120")):
        tiles.check_tile(kernel, 2, tile, architecture)
    with pytest.raises(ValueError, match="dlogits_pair: warps must be 8 on sm_100, got 4"):
        tiles.check_tile("dlogits_pair", 2, tile, "sm_100")


@pytest.mark.quick
def test_both_ways_of_a_certified_forward_may_change_together(folder):
    entry = {**ENTRY, "kernel": "forward_certified", "tile": {**TILE, "rows": 64}}
    put(folder, entry, {**entry, "described": False})
    assert tiles.for_tensor("forward_certified", torch.bfloat16, GPU).rows == 64


@pytest.mark.quick
def test_malformed_files_are_refused(folder):
    path = put(folder, ENTRY)
    text = path.read_text()
    for broken, complaint in (
        (text[:-5], "Expecting"), ("[]", "'device' must be a text"), (text.replace('"date"', '"day"'), "'date'"),
        (text.replace(NAME, "NVIDIA H100"), "another name"), (text.replace('"tiles"', '"tile"'), "'tiles' must be"),
        (json.dumps({**NOTES, "tiles": [ENTRY, ENTRY]}), "two tiles of one kernel"),
        (json.dumps({**NOTES, "tiles": [7]}), "'kernel' must be of type str"),
        (text.replace("sm_90", "sm_100"), "architecture must be 'sm_90', got 'sm_100'"),
    ):  # fmt: skip
        path.write_text(broken)
        with pytest.raises(ValueError, match=complaint) as caught:
            tiles.for_tensor("forward", torch.bfloat16, GPU)
        assert str(path) in str(caught.value)


@pytest.mark.quick
def test_every_candidate_may_be_written():
    for architecture in tiles.ARCHITECTURES:
        keys = [candidates.key_of(name, architecture) for name in candidates.names_on(architecture)]
        assert len({*keys}) == len(keys)
        for name, key in zip(candidates.names_on(architecture), keys):
            shipped, *others = candidates.candidates(name, architecture)
            assert len(others) > 5
            assert len({shipped, *others}) == 1 + len(others)
            for tile in others:
                sizes = {name: getattr(tile, name) for name in tiles.SIZES}
                entry = dict(zip(tiles.ENTRY, (*key, sizes)))
                assert tiles.read_entry(entry, architecture) == (key, tile)
                tiles.check_table({key: tile}, architecture)


@pytest.mark.quick
def test_a_certified_divergence_is_tuned_both_ways_without_its_flags_changing():
    for architecture in tiles.ARCHITECTURES:
        for kernel in ("forward_pair_certified", "forward_pair_mixture_certified"):
            names = [name for name in (kernel, f"{kernel}:pointers") if name in candidates.names_on(architecture)]
            keys = [candidates.key_of(name, architecture) for name in names]
            for tried in itertools.product(*(candidates.candidates(name, architecture) for name in names)):
                tiles.check_table(dict(zip(keys, tried)), architecture)


@pytest.mark.quick
def test_every_kernel_is_tuned_or_left_out_for_a_reason():
    names = {f"{kernel}{kind}" for kernel in tiles.TILES for kind in ("", ":pointers", ":fp32")}
    assert {*candidates.TUNED} | {*candidates.LEFT_OUT} == names
    assert not {*candidates.TUNED} & {*candidates.LEFT_OUT}
    assert all(candidates.LEFT_OUT.values())
    assert {tuned.kernel for tuned in candidates.TUNED.values()} == {*launches.SOURCES}
    assert candidates.names_on("sm_90") == [*candidates.TUNED]
    assert not any(candidates.TUNED[name].padded for name in candidates.names_on("sm_80"))
    assert [name for group in tune.by_group(candidates.TUNED) for name in group] == [*candidates.TUNED]
    assert {*tune.CHECKS} == {*candidates.GROUPS}


@pytest.mark.quick
def test_what_the_report_launches_without_options_takes_each_tile():
    """What a candidate is compiled for is found among the recorded launches, by descriptors or without."""
    for architecture in ("sm_90", "sm_80"):
        last = {candidates.key_of(x, architecture): candidates.candidates(x, architecture)[-1] for x in
                candidates.names_on(architecture)}  # fmt: skip
        plain = {candidates.plain_operands(key, architecture) for key in last}
        with candidates.using(last):
            launched = {only: list(report.recorded_launches(architecture, (64,), only)) for only in plain}
        for key, tile in last.items():
            kernel, size, described = key
            seen = launched[candidates.plain_operands(key, architecture)]
            found = [arguments for label, one, arguments in seen
                     if candidates.takes(one, arguments, kernel, tile) and "teacher" not in label]  # fmt: skip
            assert found, key
            if "pair" in kernel:
                assert all((x["w_desc"] is not None) == (x["teacher_w_desc"] is not None) == described for x in found)
                assert {x["beta"] for x in found} == ({0.3} if "mixture" in kernel else {0.0, 1.0})
            if kernel.startswith("forward"):
                assert {x["COMPUTE"].primitive_bitwidth for x in found} == {8 * size}


def test_a_certified_divergence_is_timed_over_all_its_legs():
    """Two tiles cut the vocabulary into other legs, but both are timed over all of it."""
    contact = tune.Contact("cpu", tune.REHEARSAL)
    data = launches.beside_teacher(contact, 8, 32, torch.float16)
    kernel, shipped = "forward_pair_certified", tiles.INTERPRETER
    for tile in (shipped, shipped._replace(cols=32)):
        launch = launches.with_tile(kernel, tile, data)
        assert launch.flops == 2 * 8 * contact.sizes.vocab * (32 + 32)
        launch.run()


@pytest.mark.quick
def test_shipped_files_are_in_order():
    for path in tiles.MEASURED.glob("*.json"):
        assert tiles.read_measured(path).table is not None


@pytest.mark.parametrize("version", [report.OTHER_TRITON, importlib.metadata.version("triton")])
def test_shipped_tiles_compile_in_every_variant(version):
    """What the kernel report does of the defaults."""
    if not list(tiles.MEASURED.glob("*.json")):
        pytest.skip("no device's file is shipped")
    command = [sys.executable, "-m", "bench.tune", "--verify"]
    environment = report.environment(version)
    done = subprocess.run(command, cwd=tune.ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def rows_of(kernel, tile, shipped_ms, ms, widths=(896, 1536, 4096)):
    return [
        {"kernel": kernel, "tile": list(tile), "D": d, "ok": True, "ms": a, "shipped_ms": b}
        for d, a, b in zip(widths, ms, shipped_ms)
    ]


@pytest.mark.quick
def test_a_winner_is_two_per_cent_faster_over_the_widths():
    widths = (896, 1536, 4096)
    tile, other = tiles.Tile(64, 128, 64, 4, 3), tiles.Tile(64, 128, 64, 4, 4)

    def picked(*rows, bad=()):
        found = tune.pick([row for group in rows for row in group], lambda kernel: widths, bad, tune.GAIN)
        return {kernel: winner[0] for kernel, winner in found.items()}

    one = [1.0, 1.0, 1.0]
    assert picked(rows_of("forward", tile, [1.021] * 3, one)) == {"forward": tile}
    assert picked(rows_of("forward", tile, [1.019] * 3, one)) == {}
    assert picked(rows_of("forward", tile, [1.3, 1.0, 0.9], one)) == {"forward": tile}  # 1.17 of three
    assert picked(rows_of("forward", tile, [1.3, 1.0, 0.8], one)) == {}  # 1.04, but 1.013 in the geometric mean
    assert picked(rows_of("forward", tile, [1.5] * 2, one, widths[:2])) == {}  # not timed at all widths
    both = rows_of("forward", tile, [1.1] * 3, one), rows_of("forward", other, [1.2] * 3, one)
    assert picked(*both) == picked(*both[::-1]) == {"forward": other}
    assert picked(*both, bad={("forward", tuple(other))}) == {"forward": tile}
    failed = [{**row, "ok": False} for row in both[1]]
    assert picked(both[0], failed) == {"forward": tile}
    assert math.isclose(tune.speedup(dict(enumerate(both[0]))), 1.1)


@pytest.mark.quick
def test_widths_with_a_tile_of_their_own_are_not_timed(tmp_path):
    options = types.SimpleNamespace(out=tmp_path, time_limit=60, kernels=["one"], device="cpu", rehearsal=True)
    run = tune.Run(options, tune.Contact("cpu", tune.REAL))
    assert run.widths("forward_certified") == list(tune.REAL.widths)
    run.architecture = "sm_90"
    assert run.widths("forward_certified") == [d for d in tune.REAL.widths if d < tiles.DEEP] != []
    assert run.widths("forward_certified:fp32") == run.widths("forward") == list(tune.REAL.widths)


@pytest.mark.quick
def test_idle_processors_compile_the_runners_up(tmp_path, monkeypatch):
    monkeypatch.setattr(tune, "COMPILERS", 4)
    options = types.SimpleNamespace(out=tmp_path, time_limit=60, kernels=["one"], device="cpu", rehearsal=True)
    run = tune.Run(options, tune.Contact("cpu", tune.REHEARSAL))
    tried = [tiles.INTERPRETER._replace(stages=k) for k in range(2, 8)]
    for kernel in ("forward", "dweight"):
        for k, tile in enumerate(tried):
            row = {"kernel": kernel, "tile": list(tile), "D": 32, "ok": True, "ms": 1.0 + k, "shipped_ms": 5.5}
            run.rows.write(step="time", shipped=list(tiles.INTERPRETER), **row)
    rounds, spilling = [], {("forward", 2), ("forward", 3), ("forward", 4)}

    def do(step, jobs, shards, seconds):
        rounds.append([(job["kernel"], job["tile"][4]) for job in jobs])
        for job in jobs:
            run.rows.write(step=step, **job, ok=(job["kernel"], job["tile"][4]) not in spilling)
        return True

    run.do = do
    found = run.settle()
    assert {kernel: winner[0].stages for kernel, winner in found.items()} == {"forward": 5, "dweight": 2}
    assert [set(x) for x in rounds] == [
        {("forward", 2), ("forward", 3), ("dweight", 2), ("dweight", 3)},  # two kernels, two tiles each
        {("forward", 4), ("forward", 5), ("forward", 6)},  # all that are fast enough
    ]
    assert run.settle() == found
    assert len(rounds) == 2
    run.do = lambda *_: False  # the time is up
    spilling = set()
    run.rows.write(step="variants", kernel="forward", tile=list(tried[3]), ok=False)
    run.rows.write(step="variants", kernel="dweight", tile=list(tried[0]), ok=False)
    assert {kernel: winner[0].stages for kernel, winner in run.settle().items()} == {"forward": 6, "dweight": 3}


@pytest.fixture
def rehearse(tmp_path, capsys):
    """-> run the command small; its status, its rows, its file, what it said."""

    def run(*kernels):
        status = tune.main(["--rehearsal", "--out", str(tmp_path), "--kernels", *(kernels or ("forward", "dweight"))])
        files = list(tmp_path.glob("*.json"))
        rows = [json.loads(line) for path in tmp_path.glob("*.jsonl") for line in path.read_text().splitlines()]
        return status, rows, files, capsys.readouterr().out

    return run


@pytest.fixture
def in_process(monkeypatch):
    """Steps run in this process, which has imported everything; whatever the clock says, the other tile wins."""

    def children(self, step, jobs, shards, deadline, total):
        tune.work(step, jobs, self.contact, self.rows)
        return "ended"

    monkeypatch.setattr(tune.Run, "children", children)
    monkeypatch.setattr(tune, "GAIN", 0.0)


def test_the_command_end_to_end_and_a_second_run_times_nothing(rehearse, monkeypatch):
    monkeypatch.setattr(tune, "CHECKS", {"one": {name: tune.ONE[name] for name in ("exact", "certified, hint")}})
    monkeypatch.setattr(tune, "GAIN", 0.0)  # whatever the clock says, both tiles win
    status, rows, files, said = rehearse()
    assert status == 0, said
    assert "s left] time: 2 of 2 done" in said
    found = tiles.read_measured(*files)
    assert {kernel for kernel, _, _ in found.table} == {"forward", "dweight"}
    content = json.loads(files[0].read_text())
    assert content["torch"] == torch.__version__
    for entry in content["tiles"]:
        assert set(entry["milliseconds"]) == set(entry["shipped_milliseconds"]) == {"32"}
        assert entry["shipped"]["depth"] == 2 * entry["tile"]["depth"] == 32
    assert {row["case"] for row in rows if row["step"] == "check"} == {"one: exact", "one: certified, hint"}
    status, again, files, said = rehearse()
    assert status == 0, said
    assert {row["step"] for row in again[len(rows) :]} == {"check"}
    assert json.loads(files[0].read_text())["tiles"] == content["tiles"]


def test_two_models_and_fp32_end_to_end_group_by_group(rehearse, in_process, monkeypatch):
    cases = {"two": ("beta 0.5, certified",), "fp32": ("exact",), "one": ()}
    checks = {group: {name: tune.CHECKS[group][name] for name in names} for group, names in cases.items()}
    monkeypatch.setattr(tune, "CHECKS", checks)
    names = "dweight:fp32", "dlogits_pair", "forward_pair_mixture_certified", "forward_pair:pointers"
    status, rows, files, said = rehearse(*names)
    assert status == 0, said
    table = tiles.read_measured(*files).table
    assert {*table} == {(n.split(":")[0], 2 + 2 * (n == names[0]), False) for n in names[:3]}
    assert {row["case"] for row in rows if row["step"] == "check"} == {"two: beta 0.5, certified", "fp32: exact"}
    order = [row["kernel"] for row in rows if row["step"] == "time" and not row.get("begun")]
    assert order == ["dlogits_pair", "forward_pair_mixture_certified", "dweight:fp32"]  # the groups' order, not ours


@pytest.mark.parametrize("case", ["two: beta 1.0, exact", "two: beta 0.5, certified", "pointers: beta 0.0, certified"])
def test_a_check_of_two_models_takes_the_tiles_measured(tmp_path, monkeypatch, case):
    kernels = [name for name in candidates.TWO if "certified" not in name or "certified" in case]
    smaller = {**TILE, "rows": 32, "cols": 32, "depth": 16, "group": 2}
    entries = [{**ENTRY, "kernel": kernel, "described": False, "tile": smaller} for kernel in kernels]
    monkeypatch.setattr(tiles, "check_table", lambda table, architecture: None)  # other flags than a device's
    put(tmp_path, *entries, name="x.json", device="x", architecture="cpu")
    job, contact = {"case": case, "file": str(tmp_path / "x.json")}, tune.Contact("cpu", tune.REHEARSAL)
    assert tune.run_check(contact, job, "cpu")["ok"]
    monkeypatch.setattr(distributions, "relative", lambda x, truth: 0.1)
    assert not tune.run_check(contact, job, "cpu")["ok"]


@pytest.mark.quick
def test_rows_of_other_sources_or_sizes_do_not_count(tmp_path):
    known = tune.origin(tune.Contact("cpu", tune.REHEARSAL))
    rows = tune.Rows(tmp_path / "rows.jsonl", known)
    job = {"kernel": "forward", "tile": [1, 2], "D": 32}
    for change in ({"source": "another"}, {"triton": "3.6.0"}, {"tokens": 7}, {"widths": [64]}):
        tune.Rows(rows.path, {**known, **change}).write(step="time", **job, ok=True)
    rows.write(step="time", **job, begun=True)
    with rows.path.open("a") as file:
        file.write('{"half of a')
    assert rows.finished("time") == {}
    with rows.path.open("a") as file:
        file.write("\n")
    rows.write(step="time", **job, ok=True)
    assert list(rows.finished("time")) == [tune.job_of(job)]


@pytest.mark.parametrize(("wrong", "written"), [("one: exact", set()), ("fp32: exact", {"dweight"})])
def test_a_wrong_tile_is_not_written(rehearse, in_process, monkeypatch, wrong, written):
    """A child compares; here one that finds an error stands in."""

    def check(contact, job, architecture):
        return {"ok": job["case"] != wrong, "errors": {"hidden": 0.3 if job["case"] == wrong else 0.0}}

    monkeypatch.setattr(tune, "run_check", check)
    status, _, files, said = rehearse("dweight", "dweight:fp32")
    assert status == 1
    assert {kernel for path in files for kernel, *_ in tiles.read_measured(path).table} == written
    assert f"WRONG {wrong}: {{'hidden': 0.3}}" in said


def test_a_check_that_was_not_made_is_not_passed(rehearse, in_process, monkeypatch):
    plain = tune.Run.children

    def children(self, step, jobs, *arguments):
        return "time is up" if step == "check" else plain(self, step, jobs, *arguments)

    monkeypatch.setattr(tune.Run, "children", children)
    status, _, files, said = rehearse("dweight")
    assert (status, files) == (1, [])
    assert "left out for its checks: one" in said


def test_a_check_notices_a_tile_that_computes_something_else(tmp_path, monkeypatch):
    put(tmp_path, {**ENTRY, "described": False}, name="x.json", device="x", architecture="cpu")
    contact = types.SimpleNamespace(cuda=False, device="cpu", head=tune.Contact("cpu", tune.REHEARSAL).head)
    job = {"case": "one: exact", "file": str(tmp_path / "x.json")}
    right = tune.run_check(contact, job, "cpu")
    assert right["ok"]
    plain = tune.compare
    seen = []

    def with_other_tiles(*arguments, **options):
        seen.append(tiles.for_tensor("forward", torch.float16, torch.device("cpu")))
        return plain(*arguments, **options)

    monkeypatch.setattr(tune, "compare", with_other_tiles)
    tune.run_check(contact, job, "cpu")
    assert seen == [tiles.Tile(**TILE)]  # the file's, also in the interpreter


CHILD = """
import json, os, sys, time

given = json.load(open(sys.argv[1]))

def write(**row):
    with open(sys.argv[2], "a") as file:
        file.write(json.dumps({**given["origin"], "step": "time", **row}) + chr(10))

for job in given["jobs"]:
    write(**job, begun=True)
    if job["D"] == 1:
        os.abort()
    if job["D"] == 2:
        time.sleep(60)
    write(**job, ok=True)
"""


def test_a_process_that_dies_or_hangs_costs_its_own_row(tmp_path, monkeypatch, capsys):
    """The parent's half, with children that compute nothing."""
    options = types.SimpleNamespace(out=tmp_path, time_limit=60, kernels=[], device="cpu", rehearsal=True)
    run = tune.Run(options, tune.Contact("cpu", tune.REHEARSAL))
    child = tmp_path / "child.py"
    child.write_text(CHILD)
    plain = subprocess.Popen

    def popen(command, **keywords):
        jobs = command[command.index("--jobs") + 1]
        return plain([sys.executable, child, jobs, run.rows.path], **keywords)

    monkeypatch.setattr(tune.subprocess, "Popen", popen)
    monkeypatch.setattr(tune, "STALL", 3)
    assert run.do("time", [{"kernel": "forward", "tile": [1], "D": d} for d in range(5)], 1, 30)
    found = {row["D"]: row for row in run.rows.finished("time").values()}
    assert [found[d]["ok"] for d in range(5)] == [True, False, False, True, True]
    assert "status -6" in found[1]["error"]
    assert "silent" in found[2]["error"]
    monkeypatch.setattr(tune, "STALL", 30)
    late = [{"kernel": "forward", "tile": [1], "D": d} for d in (7, 2)]
    assert not run.do("time", late, 1, 4)  # the time is up: neither done nor failed
    assert set(found) | {7} == {row["D"] for row in run.rows.finished("time").values()}
    assert "1 of 2 done" in capsys.readouterr().out

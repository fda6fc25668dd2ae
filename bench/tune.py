"""Measure the tiles of the GPU at hand, inside eight minutes, for kernels/tiles.py to read.

``python -m bench.tune`` goes over groups of kernels, see bench/candidates.py: it compiles a group's candidates in
parallel and drops those that spill or do not fit; times the others in turns with the tile shipped; compiles each winner
in every variant of its kernel. It then checks what the winners compute against float64, and writes OUT/<device>.json.
Everything measured is in OUT/<device>.jsonl as soon as it is known: a second run of the same device, versions, sources
and sizes goes on from there. Steps are processes of their own, so that a kernel that hangs or dies costs its own row.
"""

import argparse
import hashlib
import json
import math
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from datetime import datetime, timezone
from pathlib import Path

import torch

from bench.candidates import GROUPS, TUNED, candidates, compile_tile, key_of, names_on, using
from bench.contact.correct import compare
from bench.contact.device import REAL, REHEARSAL, Contact, attempt, padded
from bench.contact.distributions import compare_divergence
from bench.contact.launches import beside_teacher, speed, with_tile

ROOT = Path(__file__).resolve().parents[1]
TIME_LIMIT = 470  # seconds in all, after the imports
RESERVED = 100  # of them for the winners' other variants and their numbers
STALL = 45  # seconds without a row after which the processes that time are ended
COMPILING = 120  # and those that compile
GAIN = 1.02  # how much faster than the tile shipped, over the widths
NEAR = 0.97  # of its speed at the first width, to be timed at the others
ROUNDS = 7
COMPILERS = min(len(os.sched_getaffinity(0)), 16)
WEIGHTS = (1, 4)  # of what a timed source is given
ROWS_FP32 = 4  # an fp32 product takes twenty times as long: of so many times fewer rows
ONE = {
    "exact": {},
    "certified": {"backward": "certified"},
    "certified, hint": {"backward": "certified", "hint": True},
    "frozen head": {"frozen": True},
}
TWO = {
    f"beta {beta}, {backward}": {"beta": beta, "backward": backward, "entropy": False, "wider": 0}
    for beta in (0.0, 0.5, 1.0)
    for backward in ("exact", "certified")
}
CHECKS = {  # {group: {case: keywords}}
    "one": ONE,
    "two": TWO,
    "pointers": {name: {**keywords, "apart": True} for name, keywords in TWO.items()},
    "fp32": ONE,
}
ORIGIN = ("device", "architecture", "torch", "triton", "source", "tokens", "vocab", "widths")


def origin(contact):
    """What rows must have been measured under to count."""
    import triton

    from fastgrpo.kernels import tiles

    name = torch.cuda.get_device_name() if contact.cuda else platform.machine()
    sources = sorted(
        path for path in (ROOT / "kernels").glob("*.py") if path.stem not in ("tiles", "report", "ceilings")
    )
    return {
        "device": name,
        "architecture": tiles.architecture(torch.device("cuda", 0)) if contact.cuda else "cpu",
        "torch": torch.__version__,
        "triton": triton.__version__,
        "source": hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()[:12],
        "tokens": contact.sizes.tokens,
        "vocab": contact.sizes.vocab,
        "widths": list(contact.sizes.widths),
    }


def rows_path(folder, origin):
    from fastgrpo.kernels import tiles

    return folder / f"{tiles.slug(origin['device'])}.jsonl"


class Rows:
    """The file of rows, and those of one origin in it."""

    def __init__(self, path, origin):
        self.path, self.origin = path, origin

    def write(self, **row):
        when = datetime.now(timezone.utc).isoformat(timespec="seconds")
        line = json.dumps({**self.origin, "date": when, **row}) + "\n"
        with self.path.open("a") as file:
            file.write(line)

    def read(self):
        if not self.path.exists():
            return []
        rows = []
        for line in self.path.read_text().splitlines():
            try:
                row = json.loads(line)
            except ValueError:  # half a line of a run that was ended
                continue
            if {k: row.get(k) for k in ORIGIN} == self.origin:
                rows.append(row)
        return rows

    def finished(self, step):
        """{job: its last row}."""
        return {job_of(row): row for row in self.read() if row["step"] == step and not row.get("begun")}


def job_of(row):
    """What a row is about, to be looked up by."""
    return tuple(tuple(x) if isinstance(x, list) else x for x in (row.get(k) for k in ("kernel", "tile", "D", "case")))


def by_group(names):
    """-> [[name]], in the order of the groups."""
    wanted = [[name for name in group if name in names] for group in GROUPS.values()]
    return [group for group in wanted if group]


def dtype_of(contact, size):
    """Of operands of so many bytes; the interpreter's bfloat16 is wrong."""
    return torch.float32 if size == 4 else torch.bfloat16 if contact.cuda else torch.float16


def jobs_for(kernel, architecture):
    """-> the tile shipped, [Tile] to compare it with."""
    from fastgrpo.kernels import tiles

    if architecture == "cpu":
        return tiles.INTERPRETER, [tiles.INTERPRETER._replace(depth=16)]
    shipped, *others = candidates(kernel, architecture)
    return shipped, others


# Steps, each in processes of its own: run one job, return its row.


def run_compile(contact, job, architecture, everything=False):
    from fastgrpo.kernels import tiles

    if not contact.cuda:
        return {"ok": True, "skipped": "interpreter"}
    return compile_tile(key_of(job["kernel"], architecture), tiles.Tile(*job["tile"]), architecture, everything)


def run_variants(contact, job, architecture):
    return run_compile(contact, job, architecture, everything=True)


class Timer:
    """Times tiles beside the one shipped; keeps what a width's launches share."""

    def __init__(self):
        self.data, self.shipped = {}, {}

    def __call__(self, contact, job, architecture):
        from fastgrpo.kernels import tiles

        name, depth = job["kernel"], job["D"]
        kernel, size, apart = TUNED[name]
        data = self.operands(contact, depth, size, apart, "pair" in kernel)
        if (name, depth) not in self.shipped:
            self.shipped = {(name, depth): with_tile(kernel, tiles.Tile(*job["shipped"]), data)}
        ours = self.shipped[name, depth]
        launch = with_tile(kernel, tiles.Tile(*job["tile"]), data)
        turns = [ours.run, launch.run]
        contact.interleaved(turns, 2)
        shipped_ms, ms = contact.interleaved(turns, ROUNDS if contact.cuda else 1)
        return {"ok": True, "ms": round(ms, 5), "shipped_ms": round(shipped_ms, 5), **speed(launch, ms)}

    def operands(self, contact, *kind):
        if kind not in self.data:
            depth, size, apart, pair = kind
            rows = contact.sizes.tokens // (ROWS_FP32 if size == 4 else 1)
            data = (beside_teacher if pair else Contact.head)(contact, rows, depth, dtype_of(contact, size))
            self.data[kind] = [padded(x) if apart and k in WEIGHTS else x for k, x in enumerate(data)]
        return self.data[kind]


def run_check(contact, job, architecture):
    """A small problem, of sizes for which nothing is compiled again, against float64."""
    from fastgrpo.kernels import tiles

    group, case = job["case"].split(": ")
    keywords, dtype = CHECKS[group][case], dtype_of(contact, 4 if group == "fp32" else 2)
    against = compare_divergence if "beta" in keywords else compare
    with using(tiles.read_measured(job["file"]).table):
        return against(contact, dtype, (300, 5008, 256) if contact.cuda else (8, 160, 32), **keywords)


def work(step, jobs, contact, rows):
    """In a child: one row a job, begun and done; -> exit status. Raises where the device is lost to it."""
    run = {"compile": run_compile, "variants": run_variants, "time": Timer(), "check": run_check}[step]
    for job in jobs:
        rows.write(step=step, **job, begun=True)
        start = time.monotonic()
        result = attempt(run, contact, job, rows.origin["architecture"])
        rows.write(step=step, **job, **result, seconds=round(time.monotonic() - start, 2))
        if not result["ok"] and contact.cuda and step in ("time", "check"):
            torch.cuda.synchronize()  # raises after an illegal access, as all that follows would
    return 0


class Run:
    """One run of the command: its clock, its rows, its processes."""

    def __init__(self, options, contact):
        self.options, self.contact = options, contact
        self.started = time.monotonic()
        known = origin(contact)
        from fastgrpo.kernels import tiles

        self.architecture, self.name = known["architecture"], tiles.slug(known["device"])
        self.rows = Rows(rows_path(options.out, known), known)
        asked = [name for kernel in options.kernels for name in GROUPS.get(kernel, [kernel])]
        self.kernels = [name for name in names_on(self.architecture) if name in asked]
        self.failed = []

    def left(self, reserve=0.0):
        return self.options.time_limit - reserve - (time.monotonic() - self.started)

    def say(self, text):
        print(f"[{max(self.left(), 0):4.0f} s left] {text}", flush=True)

    def do(self, step, jobs, shards, seconds):
        """Jobs until each has a row, or the time is up; one that ends its process has a row that says so."""
        total, deadline = len(jobs), time.monotonic() + seconds
        while jobs and time.monotonic() < deadline:
            before = len(self.rows.read())
            outcome = self.children(step, jobs, min(shards, len(jobs)), deadline, total)
            told = [row for row in self.rows.read()[before:] if row["step"] == step]
            done = {job_of(row) for row in told if not row.get("begun")}
            lost = [row for row in told if row.get("begun") and job_of(row) not in done]
            if outcome != "time is up":
                for row in lost:
                    job = {k: row[k] for k in ("kernel", "tile", "D", "case", "shipped") if k in row}
                    self.rows.write(step=step, **job, ok=False, error=f"its process {outcome}")
                    done.add(job_of(row))
            if not done:
                self.failed.append(f"{step}: {outcome}")
                break
            jobs = [job for job in jobs if job_of(job) not in done]
        self.say(f"{step}: {total - len(jobs)} of {total} done{'; run again to go on' if jobs else ''}")
        return not jobs

    def children(self, step, jobs, shards, deadline, total):
        """-> how they ended."""
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        with tempfile.TemporaryDirectory() as folder, (Path(folder) / "log").open("a+") as log:
            processes = []
            for k in range(shards):
                path = Path(folder) / f"{k}.json"
                path.write_text(json.dumps({"origin": self.rows.origin, "jobs": jobs[k::shards]}))
                command = [sys.executable, "-m", "bench.tune", "--step", step, "--jobs", str(path), *self.arguments()]
                processes.append(subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log))
            outcome = self.watch(step, processes, deadline, total)
            log.seek(0)
            if outcome.startswith("ended with"):
                print(log.read()[-2000:], file=sys.stderr, flush=True)
        return outcome

    def arguments(self):
        o, sizes = self.options, self.contact.sizes
        known = ["--out", str(o.out), "--device", o.device, "--tokens", str(sizes.tokens)]
        return [*known, "--widths", *map(str, sizes.widths), *(["--rehearsal"] if o.rehearsal else [])]

    def watch(self, step, processes, deadline, total):
        size, moved, told = -1, time.monotonic(), time.monotonic()
        outcome, stall = None, STALL if step == "time" else COMPILING
        while any(p.poll() is None for p in processes):
            time.sleep(0.05)
            now, current = time.monotonic(), self.rows.path.stat().st_size if self.rows.path.exists() else 0
            if current != size:
                size, moved = current, now
            if now - told > 10:
                told = now
                self.say(f"{step}: {sum(r['step'] == step and not r.get('begun') for r in self.rows.read())} rows")
            if now > deadline or now - moved > stall:
                outcome = "time is up" if now > deadline else f"was silent for {stall} s"
                break
        for process in processes:
            if process.poll() is None:
                process.kill()
            process.wait()
        statuses = sorted({p.returncode for p in processes} - {0})
        return outcome or (f"ended with status {statuses[0]}" if statuses else "ended")

    def compile(self, kernels):
        """Drop what spills or does not fit. What compiled is done again: its time is the cache's."""
        known, timed, jobs = self.rows.finished("compile"), self.timed(), []
        for kernel in kernels:
            shipped, others = jobs_for(kernel, self.architecture)
            for tile in [shipped, *others]:
                job = {"kernel": kernel, "tile": list(tile)}
                bad = not known.get(job_of(job), {"ok": True})["ok"]
                all_timed = all(job_of({**job, "D": d}) in timed for d in self.widths(kernel))
                if not bad and not all_timed and (self.contact.cuda or job_of(job) not in known):
                    jobs.append(job)
        self.do("compile", jobs, COMPILERS, 0.5 * self.left())

    def time(self, kernels):
        """All at the middle width, those that keep up at the others."""
        compiled, wanted, first = self.rows.finished("compile"), [], {}
        for kernel in kernels:
            shipped, others = jobs_for(kernel, self.architecture)
            widths = self.widths(kernel)
            first[kernel] = widths[len(widths) // 2]
            for tile in others:
                job = {"kernel": kernel, "tile": list(tile), "shipped": list(shipped)}
                if compiled.get(job_of(job), {"ok": False})["ok"]:
                    wanted.append(job)
        reserve = min(RESERVED, 0.35 * self.options.time_limit)
        self.measure([{**job, "D": first[job["kernel"]]} for job in wanted], reserve)
        known = self.timed()
        rest = []
        for job in wanted:
            begun = first[job["kernel"]]
            row = known.get(job_of({**job, "D": begun}), {"ok": False})
            if row["ok"] and row["shipped_ms"] / row["ms"] >= NEAR:
                slower = row["ms"] / row["shipped_ms"]
                rest += [(slower, {**job, "D": d}) for d in self.widths(job["kernel"]) if d != begun]
        self.measure([job for _, job in sorted(rest, key=lambda x: x[0])], reserve)

    def widths(self, kernel):
        """Those at which a measured tile is taken: wide hidden states may have a tile of their own, which stays."""
        from fastgrpo.kernels import tiles

        name, size, described = key_of(kernel, self.architecture)
        asked = self.contact.sizes.widths
        return [d for d in asked if not tiles.deep_tile(name, size, self.architecture, described, d)] or list(asked)

    def measure(self, jobs, reserve):
        known = self.timed()
        jobs = [job for job in jobs if job_of(job) not in known]
        if jobs:
            self.do("time", jobs, 1, self.left(reserve))

    def timed(self):
        """{job: row} of tiles timed beside what is shipped now."""
        shipped = {kernel: list(jobs_for(kernel, self.architecture)[0]) for kernel in TUNED}
        rows = self.rows.finished("time")
        return {key: row for key, row in rows.items() if row["shipped"] == shipped[row["kernel"]]}

    def winners(self, but=frozenset()):
        """{kernel: (tile, {D: row})} of those that are enough faster and compile in every variant.

        but: {(kernel, tile)} not to take either.
        """
        bad = {key[:2] for key, row in self.rows.finished("variants").items() if not row["ok"]}
        return pick(self.timed().values(), self.widths, bad | but, GAIN)

    def unsettled(self):
        """Jobs to compile next: of kernels whose winner has not been yet; the runners-up too where
        processors would be idle, since half of two models' tiles spill in some variant."""
        known, jobs = self.rows.finished("variants"), {}
        open_kernels = {
            k for k, (tile, _) in self.winners().items() if job_of({"kernel": k, "tile": tile}) not in known
        }
        for _ in range(max(COMPILERS // len(open_kernels), 1) if open_kernels else 0):
            found = self.winners(but=frozenset(jobs))
            jobs |= dict.fromkeys((k, tile) for k, (tile, _) in found.items() if k in open_kernels)
        return [job for k, tile in jobs if job_of(job := {"kernel": k, "tile": list(tile)}) not in known]

    def settle(self):
        """Winners whose every variant has been compiled; -> as :meth:`winners`."""
        while jobs := self.unsettled():
            if not self.do("variants", jobs, COMPILERS, self.left(0.4 * min(RESERVED, self.left()))):
                break
        found, known = self.winners(), self.rows.finished("variants")
        return {k: w for k, w in found.items() if known.get((k, tuple(w[0]), None, None), {"ok": False})["ok"]}

    def content(self, found):
        from fastgrpo.kernels import tiles

        entries = []
        for kernel, (tile, rows) in sorted(found.items()):
            shipped, _ = jobs_for(kernel, self.architecture)
            entries.append(
                {
                    **dict(zip(tiles.ENTRY, key_of(kernel, self.architecture))),
                    "tile": {name: getattr(tile, name) for name in tiles.SIZES},
                    "milliseconds": {str(d): row["ms"] for d, row in sorted(rows.items())},
                    "shipped": {name: getattr(shipped, name) for name in tiles.SIZES},
                    "shipped_milliseconds": {str(d): row["shipped_ms"] for d, row in sorted(rows.items())},
                }
            )
        today = datetime.now(timezone.utc).isoformat(timespec="seconds")
        return json.dumps({**self.rows.origin, "date": today, "tiles": entries}, indent=1) + "\n"

    def write(self, found):
        """The file, of the groups whose tiles compute what they should; -> whether all do."""
        target = self.options.out / f"{self.name}.json"
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / target.name
            self.put(path, found)
            wrong = self.check(path, found) if found else []
            for group in wrong:  # "one" has a part in all the others' checks
                found = {name: x for name, x in found.items() if name not in GROUPS[group] and "one" not in wrong}
            if wrong:
                self.say(f"left out for its checks: {', '.join(wrong)}")
            if found or not wrong:
                self.put(path, found)
                target.write_text(path.read_text())
                self.say(f"{target}: {len(found)} tiles")
        return not wrong

    def put(self, path, found):
        from fastgrpo.kernels import tiles

        path.write_text(self.content(found))
        tiles.read_measured(path)

    def check(self, path, found):
        """-> the groups of which a check has failed or was not made."""
        table = hashlib.sha256(json.dumps(table_of(found)).encode()).hexdigest()[:12]
        cases = {f"{group}: {case}": group for group in GROUPS if {*GROUPS[group]} & {*found} for case in CHECKS[group]}
        jobs = [{"case": case, "file": str(path), "table": table} for case in cases]
        before = len(self.rows.read())
        self.do("check", jobs, min(len(jobs), COMPILERS), self.left(3))
        rows = [row for row in self.rows.read()[before:] if row["step"] == "check" and not row.get("begun")]
        for row in rows:
            if not row["ok"]:
                self.say(f"WRONG {row['case']}: {row.get('error') or row['errors']}")
        right = {row["case"] for row in rows if row["ok"]}
        return list(dict.fromkeys(group for case, group in cases.items() if case not in right))

    def table(self, found):
        """What was measured, as lines."""
        best = pick(self.timed().values(), self.widths, (), 0.0)
        for kernel in self.kernels:
            if kernel not in best:
                self.say(f"{kernel}: no tile was timed at every width")
                continue
            tile, rows = best[kernel]
            gain = speedup(rows)
            kept = "" if kernel in found else ", the tile shipped stays"
            self.say(f"{kernel}: {tuple(tile)} {100 * (gain - 1):+.1f} %{kept}")


def table_of(found):
    return {kernel: list(tile) for kernel, (tile, _) in sorted(found.items())}


def speedup(rows):
    """Geometric mean over the widths. rows: {D: row}."""
    return math.exp(sum(math.log(row["shipped_ms"] / row["ms"]) for row in rows.values()) / len(rows))


def pick(rows, widths, bad, gain):
    """{kernel: (tile, {D: row})}, the fastest of those timed at every width, where it is ``gain`` times as fast.
    widths: {kernel: [D]} as a function."""
    from fastgrpo.kernels import tiles

    timed = defaultdict(dict)
    for row in rows:
        if row["ok"] and job_of(row)[:2] not in bad:
            timed[job_of(row)[:2]][row["D"]] = row
    found = {}
    for (kernel, tile), by_width in timed.items():
        least = speedup(found[kernel][1]) if kernel in found else gain
        if set(by_width) == set(widths(kernel)) and speedup(by_width) >= least:
            found[kernel] = tiles.Tile(*tile), by_width
    return found


def verify(folder):
    """Compile the tiles of every file, in every variant that takes them, without a GPU; -> exit status."""
    from fastgrpo.kernels import tiles

    status = 0
    for path in sorted(folder.glob("*.json")):
        found = tiles.read_measured(path)
        for key, tile in found.table.items():
            result = compile_tile(key, tile, found.architecture, everything=True)
            status |= not result["ok"]
            print(f"{path.name} {key}: {tuple(tile)} {result}", flush=True)
    return int(status)


def measure_all(options, contact):
    run = Run(options, contact)
    for kernels in by_group(run.kernels):  # one after the other: what the time does not suffice for costs its own group
        run.compile(kernels)
        run.time(kernels)
        run.settle()
    found = run.settle()
    right = run.write(found)
    run.table(found)
    for complaint in run.failed:
        run.say(complaint)
    return 0 if right and not run.failed else 1


def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m bench.tune", description=__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / "kernels" / "measured", help="folder of the two files")
    parser.add_argument("--time-limit", type=float, default=TIME_LIMIT, help="seconds")
    parser.add_argument(
        "--kernels", nargs="+", choices=[*GROUPS, *TUNED], default=list(GROUPS), metavar="NAME",
        help=f"groups, gone over in this order: {', '.join(GROUPS)}; or some of {', '.join(TUNED)}. The file has no "
        "others, unless they were measured before under the same versions, sources and sizes",
    )  # fmt: skip
    parser.add_argument("--widths", nargs="+", type=int, help="of hidden states")
    parser.add_argument("--tokens", type=int)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--rehearsal", action="store_true", help="small sizes, on the CPU: to see that it runs at all")
    parser.add_argument("--verify", action="store_true", help="only compile what the files hold; needs no GPU")
    parser.add_argument("--step", choices=("compile", "time", "variants", "check"), help=argparse.SUPPRESS)
    parser.add_argument("--jobs", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    options.out = options.out.resolve()
    if options.verify:
        return verify(options.out)
    if options.rehearsal:
        options.device = "cpu"
        os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is first imported
    sizes = REHEARSAL if options.rehearsal else REAL
    asked = {"widths": tuple(options.widths or ()), "tokens": options.tokens}
    sizes = sizes._replace(**{name: value for name, value in asked.items() if value})
    if options.device == "cuda" and not torch.cuda.is_available() and options.step not in ("compile", "variants"):
        parser.error("there is no CUDA device; --rehearsal runs small on a CPU")
    options.out.mkdir(parents=True, exist_ok=True)
    contact = Contact(options.device, sizes)
    if options.step:
        given = json.loads(options.jobs.read_text())
        return work(
            options.step, given["jobs"], contact, Rows(rows_path(options.out, given["origin"]), given["origin"])
        )
    return measure_all(options, contact)


if __name__ == "__main__":
    sys.exit(main())

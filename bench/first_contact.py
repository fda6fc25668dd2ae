"""The first minutes on a GPU nobody has run this on: what is right, what is slow, in one command of under nine minutes.

``python -m bench.first_contact --out FOLDER`` needs torch and triton; for the trainer also what fastgrpo[train] and
[peft] bring, and a step that misses a package says so. Every step is a process of its own, so that one that dies or
hangs takes nothing with it, and every row is on disk as soon as it is known. FOLDER gets ``first-contact.jsonl`` (rows
that ``bench/results/`` takes as they are), ``tiles.json`` (the fastest tile measured of each kernel, for
``kernels/tiles.py``) and ``first-contact.log`` (tracebacks).
"""

import argparse
import json
import math
import os
import platform
import subprocess
import sys
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timezone
from pathlib import Path
from typing import NamedTuple

import torch

from bench.contact.correct import correct, large
from bench.contact.device import REAL, REHEARSAL, Contact, failure
from bench.contact.distributions import distributions, divergence
from bench.contact.kernels import compile_tiles, kernels, ncu, once, time_tiles
from bench.contact.learner import learner
from bench.contact.trainer import trainer
from bench.contact.whole import ceilings, certified, exact, loss_step, versions

TIME_LIMIT = 510  # seconds in all


class Step(NamedTuple):
    run: object
    seconds: int  # at most
    shards: int = 1  # processes side by side


STEPS = {
    "versions": Step(versions, 30),
    "ceilings": Step(ceilings, 40),
    "correct": Step(correct, 120, 8),
    "distributions": Step(distributions, 70, 8),
    "large": Step(large, 40),
    "kernels": Step(kernels, 60),
    "exact": Step(exact, 70),
    "loss_step": Step(loss_step, 30),
    "divergence": Step(divergence, 44),
    "trainer": Step(trainer, 100, 5),
    "learner": Step(learner, 75, 6),
    "compile_tiles": Step(compile_tiles, 60, 12),
    "tiles_timed": Step(time_tiles, 60),
    "certified": Step(certified, 50),
    "ncu": Step(ncu, 60),
    "once": Step(once, 60),
}

# what the summary prints every row of
SHOWN = {
    "versions",
    "ceilings",
    "large",
    "kernels",
    "exact",
    "loss_step",
    "divergence",
    "trainer",
    "learner",
    "certified",
}


class Book:
    """Rows that are on disk the moment they are known."""

    def __init__(self, folder, device):
        self.file = (folder / "first-contact.jsonl").open("a")
        self.log = (folder / "first-contact.log").open("a")
        name = torch.cuda.get_device_name() if device == "cuda" else platform.machine()
        self.common = {"suite": "first_contact", "device": name, "torch": torch.__version__}

    def write(self, step, row):
        when = datetime.now(timezone.utc).isoformat(timespec="seconds")
        self.file.write(json.dumps({**self.common, "date": when, "step": step, **row}, default=str) + "\n")
        self.file.flush()
        os.fsync(self.file.fileno())


def run_step(name, contact, book, **options):
    """One step in this process; an exception is a row."""
    try:
        for row in STEPS[name].run(contact, **options):
            book.write(name, row)
    except Exception as error:
        book.write(name, failure(error))
        traceback.print_exc(file=book.log)
        book.log.flush()
        return 1
    return 0


def run_all(options, names):
    """Every step in processes of its own, until the time is up; -> what went wrong, by step."""
    started, wrong = time.monotonic(), {}
    for name in names:
        step, left = STEPS[name], options.time_limit - (time.monotonic() - started)
        if left < 10:
            wrong[name] = "no time left"
            continue
        command = [sys.executable, "-m", "bench.first_contact", "--out", str(options.out), "--device", options.device]
        command += ["--rehearsal"] if options.rehearsal else []
        shards = 1 if options.rehearsal else step.shards

        seconds = min(step.seconds, left)

        def child(i, name=name, command=command, shards=shards, seconds=seconds):
            extra = ["--step", name, "--shard", f"{i}/{shards}"]
            try:
                with (options.out / "first-contact.log").open("a") as log:
                    done = subprocess.run(command + extra, timeout=seconds, stdout=log, stderr=log)
            except subprocess.TimeoutExpired:
                return f"stopped after {seconds:.0f} s"
            return f"exit status {done.returncode}" if done.returncode else None

        with ThreadPoolExecutor(shards) as pool:
            said = [x for x in pool.map(child, range(shards)) if x]
        if said:
            wrong[name] = "; ".join(sorted(set(said)))
        print(f"[{time.monotonic() - started:4.0f} s] {name}: {wrong.get(name, 'done')}", flush=True)
    return wrong


def summary(folder, wrong):
    """Print what was found; -> exit status. Writes the fastest tiles."""
    lines = (folder / "first-contact.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    bad = [r for r in rows if r.get("ok") is False and r["step"] not in ("tiles_timed", "compile_tiles")]
    best = {}
    for r in rows:
        if r["step"] == "tiles_timed" and "ms" in r and r["ms"] < best.get(r["kernel"], {"ms": math.inf})["ms"]:
            best[r["kernel"]] = {"tile": r["tile"], "ms": r["ms"], "tflops": r.get("tflops")}
    (folder / "tiles.json").write_text(json.dumps(best, indent=1))
    for r in rows:
        if r["step"] in SHOWN:
            print({k: v for k, v in r.items() if k not in ("suite", "device", "torch", "date", "ops")})
    for r in bad:
        print("WRONG", {k: v for k, v in r.items() if k not in ("suite", "device", "torch", "date")})
    checked = sum(r["step"] in ("correct", "distributions") for r in rows)
    print(f"fastest tiles: {best}")
    print(f"{len(rows)} rows, {checked} variants compared, {len(bad)} wrong, steps not finished: {wrong or 'none'}")
    return 1 if bad or wrong else 0


def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m bench.first_contact", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", "runs/first-contact")))
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--rehearsal", action="store_true", help="small sizes: to see that the steps run at all")
    parser.add_argument("--time-limit", type=float, default=TIME_LIMIT, help="seconds")
    parser.add_argument("--steps", nargs="+", choices=list(STEPS), help="only these")
    parser.add_argument("--step", choices=list(STEPS), help=argparse.SUPPRESS)
    parser.add_argument("--shard", default="0/1", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error(
            "--device cuda: there is no CUDA device; --device cpu --rehearsal with TRITON_INTERPRET=1 runs small"
        )
    options.out.mkdir(parents=True, exist_ok=True)
    if options.step:
        os.environ.setdefault("HF_HUB_OFFLINE", "1")  # peft would ask it
        contact = Contact(options.device, REHEARSAL if options.rehearsal else REAL)
        shard, shards = map(int, options.shard.split("/"))
        sharded = {"shard": shard, "shards": shards} if STEPS[options.step].shards > 1 else {}
        return run_step(options.step, contact, Book(options.out, options.device), **sharded)
    wrong = run_all(options, options.steps or [name for name in STEPS if name != "once"])
    return summary(options.out, wrong)


if __name__ == "__main__":
    sys.exit(main())

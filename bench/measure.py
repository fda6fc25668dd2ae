"""Clocks, memory, errors: what a suite does with an entry and a problem."""

import contextlib
import functools
import importlib
import itertools
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from datetime import datetime, timezone
from pathlib import Path

import torch

import fastgrpo
from bench.cases import Case, problem, truth
from bench.divergences import entries_of
from bench.entries import needs_entropy, version
from fastgrpo.backends.divergence_panels import Pool

MIB = 2**20
# glibc keeps freed blocks and fragments them, up to 13 times a layer's true memory; this gives each back at once
RETURN_MEMORY = {"MALLOC_MMAP_THRESHOLD_": "131072", "MALLOC_ARENA_MAX": "1"}
FRONT = 1e13  # FLOPs of bare products that keep a GPU busy (10 ms) and warm while the host queues what is timed
# beyond is "wrong": log-probs and loss in nats, gradients and divergences relative; bf16: logits of 100 are off by 0.25
GATE = {
    "fp32": {"logp_max_error": 2e-3, "logp_rms_error": 2e-3, "loss_error": 2e-3, "relative": 1e-3},
    "bf16": {"logp_max_error": 2.0, "logp_rms_error": 0.1, "loss_error": 0.05, "relative": 0.4},
}


def machine(device, command):
    """What every row says of where it was measured."""
    versions = {name: version(name) for name in ("transformers", "triton", "trl", "liger_kernel")}
    versions |= {name: version(name) for name in ("cut_cross_entropy", "verl", "unsloth_zoo", "peft")}
    if device == "cuda":  # Liger's own kernels for Hopper are written in the latter
        versions |= {"cuda": torch.version.cuda, "nvidia_cutlass_dsl": version("nvidia_cutlass_dsl")}
    name = torch.cuda.get_device_name() if device == "cuda" else f"{cpu_name()}, {torch.get_num_threads()} threads"
    return {
        "device": name,
        "kind": device,
        "torch": torch.__version__,
        "tf32": torch.backends.cuda.matmul.allow_tf32,  # torch's default, which fp32 GEMMs of some peers depend on
        "fastgrpo": fastgrpo.__version__,
        "python": platform.python_version(),
        "versions": {k: v for k, v in versions.items() if v},
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": command,
        "commit": commit(),
    }


def commit():
    """Of the code that is measured, with a + where files differ from it; None outside a clone."""
    command = ("git", "describe", "--always", "--dirty=+", "--exclude=*", "--abbrev=12")
    try:
        done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def cpu_name():
    with contextlib.suppress(OSError, StopIteration):
        return next(x.split(":")[1].strip() for x in open("/proc/cpuinfo") if x.startswith("model name"))
    return platform.processor() or "CPU"


def reason_of(error):
    """One line for the row of an entry that failed."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return "out of memory"
    text = (str(error).strip() or "no message").splitlines()[0]
    return f"failed: {type(error).__name__}: {text[:100]}"


def read_rows(path):
    """Those of a file of results, none where there is none."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def attempt(function, *arguments, catch=Exception):
    """-> (result, None) or (None, why not): another project's code may raise anything, and its row then says so."""
    try:
        return function(*arguments), None
    except catch as error:
        reason = reason_of(error)
    if torch.cuda.is_available():
        try:
            torch.cuda.synchronize()
        except RuntimeError:  # an illegal access, say: no later call on this device can work
            raise RuntimeError(reason) from None
        torch.cuda.empty_cache()  # after the except block: the traceback held the tensors
    return None, reason


class Clock:
    """Wall time on a CPU; on a GPU the device is waited for at both ends."""

    def __init__(self, device):
        self.wait = torch.cuda.synchronize if device == "cuda" else (lambda: None)

    def __call__(self, function):
        """-> (seconds, result)"""
        self.wait()
        start = time.perf_counter()
        result = function()
        self.wait()
        return time.perf_counter() - start, result


def bare_gemm(p, rows=2048):
    """hidden @ weight.T alone, a chunk of rows at a time into one buffer: the floor."""
    hidden, weight = p.hidden.detach().flatten(0, 1), p.weight.detach()
    buffer = hidden.new_empty(min(rows, len(hidden)), len(weight))

    def run():
        for part in hidden.split(rows):
            torch.mm(part, weight.t(), out=buffer[: len(part)])

    return run


def gradients(loss, p):
    return torch.autograd.grad(loss, p.leaves)


def phases(device, front, *functions):
    """-> seconds of each of a chain of functions, which get what the one before returned.

    On a GPU events time the device: ``front`` queues work that it does first, so that it need not wait for the host to
    launch what is timed. That is how a trainer meets it; ``Clock`` has the time from an idle device on.
    """
    result, marks = None, []
    if device == "cuda":
        torch.cuda.synchronize()
        front()
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(len(functions) + 1)]
        marks[0].record()
        for function, mark in zip(functions, marks[1:]):
            result = function(result)
            mark.record()
        torch.cuda.synchronize()
        return [a.elapsed_time(b) / 1e3 for a, b in itertools.pairwise(marks)]
    marks = [time.perf_counter()]
    for function in functions:
        result = function(result)
        marks.append(time.perf_counter())
    return [b - a for a, b in itertools.pairwise(marks)]


def one_run(entry, p, front):
    """-> seconds of forward, backward and of log-probs alone (None where the entry has none)"""
    forward, backward = phases(p.device, front, lambda _: entry.run_loss(p), lambda loss: gradients(loss, p))
    logprobs = None
    if entry.logprobs is not None:
        with torch.no_grad():
            (logprobs,) = phases(p.device, front, lambda _: entry.logprobs(p, needs_entropy(p.case)))
    return forward, backward, logprobs


def timings(entries, p, repeats, tell=lambda name: None):
    """Interleaved: every repeat runs the bare GEMM and then each entry once, so that a slow minute slows all of them.

    On a GPU, where it costs little, the GEMM runs before each entry. ``tell`` hears which entry is next.

    -> ({name: list of (forward, backward, log-probs) seconds}, list of the GEMM's, {name: why it was given up})
    """
    gemm, fast = bare_gemm(p), p.device == "cuda"

    def front():
        for _ in range(math.ceil(FRONT / p.case.gemm_flops)):
            gemm()

    gemm()
    samples, gemms, lost = {name: [] for name in entries}, [], {}
    for i in range(repeats):
        for place, (name, entry) in enumerate(entries.items()):
            if fast or place == 0:
                gemms += phases(p.device, front, lambda _: gemm())
            if name in lost or (i and entry.slow_on_cpu and not fast):
                continue
            tell(name)
            sample, reason = attempt(one_run, entry, p, front)
            if reason:
                lost[name] = reason
            else:
                samples[name].append(sample)
    return {name: found for name, found in samples.items() if name not in lost}, gemms, lost


def statistics_row(samples, gemms, case):
    """Medians and extremes in seconds, and their ratios to the floor."""
    gemm = statistics.median(gemms)
    row = {"gemm_seconds": gemm, "gemm_low": min(gemms), "gemm_high": max(gemms), "repeats": len(samples)}
    columns = dict(zip(("forward", "backward", "logprobs"), zip(*samples)))
    columns["both"] = tuple(f + b for f, b, _ in samples)
    for name, values in columns.items():
        if values[0] is not None:
            row |= {f"{name}_seconds": statistics.median(values), f"{name}_low": min(values)}
            row |= {f"{name}_high": max(values)}
    return row | {"gemms": row["both_seconds"] / gemm, "tokens_per_second": case.N / row["both_seconds"]}


def relative(got, exact):
    """-> (Frobenius norm of the error, its component along the truth), both over the truth's."""
    difference = got.reshape(exact.shape).double() - exact
    return float(difference.norm() / exact.norm()), float((difference * exact).sum() / exact.square().sum())


def errors(entry, p, want):
    """Errors of log-probs, loss and gradients (relative, Frobenius); whether they pass the gate.

    Logits rounded to 16 bits move ratios across the clip's edge, where a gradient jumps to 0: a third of all gradients
    in "rl" cases. The entry is then judged on :func:`far_from_clip`'s inputs.
    """
    row = compare(entry, p, want)
    correct = passes(row, p.case)
    if not correct and p.case.dtype != "fp32" and not p.case.is_divergence:
        row["far_from_clip"] = compare(entry, *far_from_clip(p, want))
        correct = passes(row["far_from_clip"], p.case)
    return {**row, "correct": correct}


def compare(entry, p, want):
    loss = entry.run_loss(p)
    grads = dict(zip(("d_hidden", "d_weight"), gradients(loss, p)))
    row = {"loss_error": float((loss.detach().double() - want.loss).abs())}
    if p.case.is_divergence:  # which may be small
        row["relative_loss_error"] = row["loss_error"] / float(want.loss)
    for name, got in grads.items():
        row[f"{name}_error"] = relative(got, getattr(want, name))[0]
    if entry.logprobs is not None:
        with torch.no_grad():
            logp, _ = entry.logprobs(p, False)
        difference = logp.reshape(-1).double() - want.logprobs
        row["logp_max_error"] = float(difference.abs().max())
        row["logp_rms_error"] = float(difference.square().mean().sqrt())
    return row


def passes(row, case):
    limits = GATE[case.dtype]
    return all(
        row[k] <= limits["relative" if k.startswith(("d_", "relative")) else k] for k in row
    )  # NaN compares false


def far_from_clip(p, want):
    """-> (Problem, Truth) with the exact log-probs as the old ones and a wide clip; made once."""
    if want.far_from_clip is None:
        old = want.logprobs.view(p.old.shape).to(p.old.dtype)
        far = replace(p, old=old, config=replace(p.config, epsilon=0.9, epsilon_high=9.0))
        want.far_from_clip = far, truth(far)
    return want.far_from_clip


def peak_cuda(function):
    """MiB that a call takes at most beyond what was allocated before, and what it returned."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    kept = sum(x.numel() * x.element_size() for x in function())
    return (torch.cuda.max_memory_allocated() - before - kept) / MIB


def status(name):
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(name))
    return int(line.split()[1]) / 1024


def peak_cpu(function):
    """The same from the kernel's high-water mark of resident memory; noise of a few MiB."""
    Path("/proc/self/clear_refs").write_text("5")
    before = status("VmRSS")
    kept = sum(x.numel() * x.element_size() for x in function())
    return status("VmHWM") - before - kept / MIB


def from_idle(entry, p, repeats=2):
    """Seconds of forward and backward as a host that waits for nothing else sees them, its launches included."""
    clock = Clock(p.device)
    return min(clock(functools.partial(step, entry, p))[0] for _ in range(repeats))


def step(entry, p):
    return gradients(entry.run_loss(p), p)


def peaks_cpu(names, jobs):
    """Peak MiB of forward and backward for each entry and case: {name: [MiB or None, ...]}.

    One fresh process an entry, so that no other entry's arenas are counted.
    Args:
        jobs: list of (Case, data) as :func:`bench.cases.tensors` makes it.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "jobs.pt"
        torch.save([(asdict(case), data) for case, data in jobs], path)
        return dict(zip(names, children([("peaks", name, path) for name in names])))


def children(calls):
    """The results of ``child_process`` for each tuple of arguments: of memory, not time, so they run side by side."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(lambda arguments: child_process(*arguments), calls))


def child_process(*arguments):
    """``python -m bench --child ...``; its last line of output is JSON."""
    command = [sys.executable, "-m", "bench", "--child", *map(str, arguments)]
    environment = {**os.environ, **RETURN_MEMORY}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=Path(__file__).parents[1])
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def child_peaks(name, path):
    """In the fresh process: the peak of every case, after a small call that loads libraries and thread pools."""
    found = []
    for fields, data in torch.load(path):
        p = problem(Case(**fields), data)
        entry = entries_of(p.case)[name]
        if entry.why_not(p.case, "cpu"):
            found.append(None)
            continue
        small = p.part(1)
        step(entry, small)
        Pool.kept.clear()  # what ours keeps from call to call counts
        found.append(attempt(peak_cpu, functools.partial(step, entry, p))[0])
    return found


def child_suite(name, *arguments):
    """A suite's own child."""
    return importlib.import_module(f"bench.suites.{name}").child(*arguments)


CHILDREN = {"peaks": child_peaks, "suite": child_suite}

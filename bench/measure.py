"""Clocks, memory, errors: what a suite does with an entry and a problem."""

import contextlib
import functools
import importlib
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path

import torch

import fastgrpo
from bench.cases import Case, problem
from bench.entries import ENTRIES, needs_entropy, version

MIB = 2**20
# glibc keeps freed blocks and fragments them, up to 13 times a layer's true memory; this gives each back at once
RETURN_MEMORY = {"MALLOC_MMAP_THRESHOLD_": "131072", "MALLOC_ARENA_MAX": "1"}
GATE = {"fp32": (2e-3, 1e-3), "bf16": (0.5, 0.3)}  # log-prob or loss (nats), gradients (relative): beyond is "wrong"


def machine(device, command):
    """What every row says of where it was measured."""
    versions = {name: version(name) for name in ("transformers", "triton", "trl", "liger_kernel")}
    versions |= {name: version(name) for name in ("cut_cross_entropy", "verl", "unsloth_zoo", "peft")}
    name = torch.cuda.get_device_name() if device == "cuda" else f"{cpu_name()}, {torch.get_num_threads()} threads"
    return {
        "device": name,
        "kind": device,
        "torch": torch.__version__,
        "fastgrpo": fastgrpo.__version__,
        "python": platform.python_version(),
        "versions": {k: v for k, v in versions.items() if v},
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": command,
    }


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


def attempt(function, *arguments, catch=Exception):
    """-> (result, None) or (None, why not): another project's code may raise anything, and its row then says so."""
    try:
        return function(*arguments), None
    except catch as error:
        reason = reason_of(error)
    if torch.cuda.is_available():
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


def forward_backward(entry, p, clock):
    """-> seconds of each; what they made is freed on return."""
    forward, loss = clock(lambda: entry.run_loss(p))
    return forward, clock(lambda: gradients(loss, p))[0]


def one_run(entry, p, clock):
    """-> seconds of forward, backward and of log-probs alone (None where the entry has none)"""
    forward, backward = forward_backward(entry, p, clock)
    logprobs = None
    if entry.logprobs is not None:
        with torch.no_grad():
            logprobs, _ = clock(lambda: entry.logprobs(p, needs_entropy(p.case)))
    return forward, backward, logprobs


def timings(entries, p, repeats):
    """Interleaved: every repeat runs the bare GEMM and then each entry once, so that a slow minute slows all of them.

    -> ({name: list of (forward, backward, log-probs) seconds}, list of the GEMM's)
    """
    clock, gemm = Clock(p.device), bare_gemm(p)
    clock(gemm)
    samples, gemms = {name: [] for name in entries}, []
    for i in range(repeats):
        gemms.append(clock(gemm)[0])
        for name, entry in entries.items():
            if i == 0 or p.device == "cuda" or not entry.slow_on_cpu:
                samples[name].append(one_run(entry, p, clock))
    return samples, gemms


def statistics_row(samples, gemms, case):
    """Medians and extremes in seconds, and their ratios to the floor."""
    gemm = statistics.median(gemms)
    row = {"gemm_seconds": gemm, "repeats": len(samples)}
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
    """Largest log-prob error, the loss's, relative Frobenius errors of the gradients; whether they pass the gate."""
    loss = entry.run_loss(p)
    grads = dict(zip(("d_hidden", "d_weight"), gradients(loss, p)))
    row = {"loss_error": float((loss.detach().double() - want.loss).abs())}
    for name, got in grads.items():
        row[f"{name}_error"] = relative(got, getattr(want, name))[0]
    if entry.logprobs is not None:
        with torch.no_grad():
            logp, _ = entry.logprobs(p, False)
        row["logp_max_error"] = float((logp.reshape(-1).double() - want.logprobs).abs().max())
    near, far = GATE[p.case.dtype]
    limits = {k: far if k.startswith("d_") else near for k in row}
    row["correct"] = all(row[k] <= limit for k, limit in limits.items())  # NaN compares false
    return row


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
    entry, found = ENTRIES[name], []
    for fields, data in torch.load(path):
        p = problem(Case(**fields), data)
        if entry.why_not(p.case, "cpu"):
            found.append(None)
            continue
        small = p.part(1)
        step(entry, small)
        found.append(attempt(peak_cpu, functools.partial(step, entry, p))[0])
    return found


def child_suite(name, *arguments):
    """A suite's own child."""
    return importlib.import_module(f"bench.suites.{name}").child(*arguments)


CHILDREN = {"peaks": child_peaks, "suite": child_suite}

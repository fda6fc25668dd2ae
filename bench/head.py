"""The loss head, forward and backward, against everything else that computes it, in one run.

``python bench/head.py`` prints correctness first, then time in units of one bare logits GEMM (2 N D V) with the stages
of the certified path, and peak memory against its bound. Rows go to bench/results/ as JSON lines, a picture
beside them. On a GPU (``--device cuda``) the shapes are real models', dtype bf16, and CCE and Liger join where they are
installed.
"""

import argparse
import contextlib
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import datetime, timezone
from pathlib import Path

import profiles
import torch

import fastgrpo
from fastgrpo import linear_logprobs, reference
from fastgrpo.backends import certified, torch_backend

RESULTS = Path(__file__).resolve().parent / "results"
CPU_CASES = (  # N, V, D, profile
    (2048, 32768, 1024, "rl"),
    (2048, 32768, 1024, "flat"),
    (8192, 32768, 512, "rl"),
    (2048, 151936, 896, "rl"),  # Qwen2.5-0.5B's head
)
CUDA_CASES = (
    (8192, 151936, 1536, "rl"),  # Qwen2.5-1.5B
    (8192, 151936, 3584, "rl"),  # Qwen2.5-7B
    (16384, 151936, 4096, "rl"),
    (8192, 151936, 3584, "flat"),
)
MIB = 2**20


def logprob_entry(**options):
    def run(p):
        return linear_logprobs(
            p["hidden"], p["weight"], p["targets"], old_logprobs=p["old_logprobs"], **options
        ).logprobs

    return run


def without_hint(p):
    return linear_logprobs(p["hidden"], p["weight"], p["targets"], backward="certified").logprobs


def full_logits(p):
    return reference.linear_logprobs(p["hidden"], p["weight"], p["targets"]).logprobs


def trl_op(p):
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction

    return ChunkedLogProbFunction.apply(
        p["hidden"], p["weight"], None, p["targets"], 1.0, min(32768, p["weight"].shape[0]), None, 1.0, ()
    )[0]


def cce(p):
    from cut_cross_entropy import linear_cross_entropy

    return -linear_cross_entropy(p["hidden"], p["weight"], p["targets"], reduction="none")


def liger(p):
    from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction

    out = LigerFusedLinearCrossEntropyFunction.apply(
        p["hidden"], p["weight"], p["targets"], None, None, -100, 0.0, 0.0, "none"
    )
    return -(out[0] if isinstance(out, tuple) else out)


ENTRIES = {
    "TRL 1.16 op": trl_op,
    "full logits, autograd": full_logits,
    "fastgrpo exact": logprob_entry(backward="exact"),
    "fastgrpo auto": logprob_entry(backward="auto"),
    "fastgrpo certified": logprob_entry(backward="certified"),
    "fastgrpo certified, no hint": without_hint,
    "CCE": cce,
    "Liger FLCE": liger,
}
CUDA_ONLY = ("CCE", "Liger FLCE")


class Clock:
    """Wall time on a CPU; on a GPU the device is waited for at both ends."""

    def __init__(self, device):
        self.wait = torch.cuda.synchronize if device == "cuda" else (lambda: None)

    def measure(self, function):
        self.wait()
        start = time.perf_counter()
        result = function()
        self.wait()
        return time.perf_counter() - start, result


def bare_gemm(p, rows=2048):
    """hidden @ weight.T once, a chunk of rows at a time into one buffer."""
    hidden, weight = p["hidden"].detach(), p["weight"].detach()
    buffer = p.setdefault("buffer", hidden.new_empty(min(rows, len(hidden)), len(weight)))

    def run():
        for part in hidden.split(rows):
            torch.mm(part, weight.t(), out=buffer[: len(part)])

    return run


def step(entry, p):
    """-> log-probs, gradients of hidden and weight"""
    logp = entry(p)
    return logp.detach(), *torch.autograd.grad(logp, (p["hidden"], p["weight"]), p["upstream"].to(logp.dtype))


def truth(p):
    """Log-probs and gradients from the same inputs in fp64 accumulation, a chunk of rows at a time."""
    hidden, weight = p["hidden"].detach(), p["weight"].detach().double()
    logp, d_hidden, d_weight = [], [], torch.zeros_like(weight)
    for rows in torch.arange(len(hidden)).split(256):
        z = (hidden[rows].double() @ weight.T).log_softmax(1)
        index = p["targets"][rows, None]
        logp.append(z.gather(1, index)[:, 0])
        g = p["upstream"][rows].double()[:, None]
        dz = z.exp_().mul_(-g).scatter_add_(1, index, g)
        d_hidden.append(dz @ weight)
        d_weight.addmm_(dz.T, hidden[rows].double())
    return torch.cat(logp), torch.cat(d_hidden), d_weight


def errors(result, want):
    """Largest log-prob error; relative Frobenius errors of the gradients; the error's component along the truth."""
    row = {"logp_max_error": float((result[0].double() - want[0]).abs().max())}
    for name, got, exact in zip(("d_hidden", "d_weight"), result[1:], want[1:]):
        difference = got.double() - exact
        row[f"{name}_error"] = float(difference.norm() / exact.norm())
        row[f"{name}_bias"] = float((difference * exact).sum() / exact.square().sum())
    return row


GATE = {torch.float32: (2e-3, 6e-4), torch.bfloat16: (0.5, 0.1)}  # log-prob, gradient: beyond it the entry is wrong


def check(entries, p, dtype):
    """-> {entry: errors or the reason it cannot run}"""
    want, found = truth(p), {}
    for name, entry in entries.items():
        try:
            found[name] = errors(step(entry, p), want)
        except Exception as error:
            found[name] = f"cannot run: {type(error).__name__}: {str(error)[:80]}"
            continue
        worst = max(found[name]["d_hidden_error"], found[name]["d_weight_error"])
        found[name]["correct"] = found[name]["logp_max_error"] <= GATE[dtype][0] and worst <= GATE[dtype][1]
    return found


def timings(entries, p, device, repeats):
    """Medians of interleaved runs: {name: (forward, backward)} in seconds, and the bare GEMM."""
    clock, samples, gemms = Clock(device), {name: [] for name in entries}, []
    gemm = bare_gemm(p)
    gemm()
    for _ in range(repeats):
        gemms.append(clock.measure(gemm)[0])
        for name, entry in entries.items():
            forward, logp = clock.measure(lambda entry=entry: entry(p))
            upstream = p["upstream"].to(logp.dtype)
            backward, _ = clock.measure(
                lambda logp=logp, u=upstream: torch.autograd.grad(logp, (p["hidden"], p["weight"]), u)
            )
            samples[name].append((forward, backward))
            del logp
    median = {n: tuple(statistics.median(x) for x in zip(*s)) for n, s in samples.items()}
    return median, statistics.median(gemms)


class Stages:
    """Seconds spent in the named steps of one call, by wrapping the functions that do them (CPU)."""

    def __init__(self):
        self.seconds = {}

    def wrap(self, name, function):
        def timed(*args, **kwargs):
            start = time.perf_counter()
            result = function(*args, **kwargs)
            label = name(*args) if callable(name) else name
            self.seconds[label] = self.seconds.get(label, 0.0) + time.perf_counter() - start
            return result

        return timed

    @contextlib.contextmanager
    def active(self, phase):
        reader, fold = torch_backend.Reader, certified.Fold

        def product(_, a, b, out):
            return f"{phase}: " + ("dW" if not a.is_contiguous() else "logits GEMM")

        def added(_, total, a, b):
            return f"{phase}: " + ("dX" if a.is_contiguous() else "dW")

        targets = [
            (reader, "mm", product), (reader, "add_mm", added), (fold, "tile", f"{phase}: exp, sums, flags"),
            (torch, "index_select", f"{phase}: gather columns"), (reader, "hidden", f"{phase}: gather rows"),
            (torch_backend, "logits_gradient", f"{phase}: dlogits"), (certified, "plan_groups", f"{phase}: plan"),
            (certified, "label_logits", f"{phase}: label logits"),
        ]  # fmt: skip
        saved = [(owner, name, getattr(owner, name)) for owner, name, _ in targets]
        for owner, name, label in targets:
            setattr(owner, name, self.wrap(label, getattr(owner, name)))
        try:
            yield
        finally:
            for owner, name, value in saved:
                setattr(owner, name, value)


def stages(p, gemm):
    """The certified path's stages in units of the bare GEMM."""
    timer, total = Stages(), {}
    with timer.active("forward"):
        total["forward"], logp = Clock("cpu").measure(lambda: ENTRIES["fastgrpo certified"](p))
    with timer.active("backward"):
        total["backward"], _ = Clock("cpu").measure(
            lambda: torch.autograd.grad(logp, (p["hidden"], p["weight"]), p["upstream"])
        )
    for phase, seconds in total.items():
        known = sum(v for k, v in timer.seconds.items() if k.startswith(phase))
        timer.seconds[f"{phase}: rest"] = seconds - known
    return {k: round(v / gemm, 4) for k, v in sorted(timer.seconds.items(), reverse=True)}


def memory_bound(n, vocab, depth, workspace_mb=128):
    """DESIGN's bound beyond inputs and gradients, in MiB: workspace + 4 N D + 64 N + N V / 128."""
    return workspace_mb + (4 * n * depth + 64 * n + n * vocab / 128) / MIB


def peak_memory_cpu(name, p):
    """MiB beyond inputs and gradients of one step in a fresh process, from the kernel's high-water mark."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "problem.pt"
        torch.save({k: v.detach() for k, v in p.items() if k != "buffer"}, path)
        command = [sys.executable, __file__, "--child", name, str(path)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            return None
        return float(done.stdout.splitlines()[-1])


def child(name, path):
    """Print the high-water mark of resident memory that one step adds, less the gradients it returns."""
    p = torch.load(path)
    p["hidden"].requires_grad_()
    p["weight"].requires_grad_()
    small = {k: v[:64].detach().clone() if len(v) == len(p["targets"]) else v for k, v in p.items()}
    small["hidden"].requires_grad_()
    step(ENTRIES[name], small)  # libraries and thread pools are in memory before counting starts
    Path("/proc/self/clear_refs").write_text("5")
    before = status("VmRSS")
    result = step(ENTRIES[name], p)
    gradients = sum(x.numel() * x.element_size() for x in result[1:])
    print(status("VmHWM") - before - gradients / MIB)


def status(field):
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(field))
    return int(line.split()[1]) / 1024


def peak_memory_cuda(entry, p):
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = step(entry, p)
    gradients = sum(x.numel() * x.element_size() for x in result[1:])
    return (torch.cuda.max_memory_allocated() - before - gradients) / MIB


def machine(device):
    import transformers

    name = torch.cuda.get_device_name() if device == "cuda" else f"{cpu_name()}, {torch.get_num_threads()} threads"
    return {
        "device": name, "torch": torch.__version__, "fastgrpo": fastgrpo.__version__,
        "transformers": transformers.__version__, "python": platform.python_version(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": "python bench/head.py " + " ".join(sys.argv[1:]),
    }  # fmt: skip


def cpu_name():
    with contextlib.suppress(OSError, StopIteration):
        return next(x.split(":")[1].strip() for x in open("/proc/cpuinfo") if x.startswith("model name"))
    return platform.processor()


def run_case(case, device, repeats, show):
    n, vocab, depth, profile = case
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    p = profiles.problem(n, vocab, depth, profile, dtype=dtype, device=device)
    p["hidden"].requires_grad_()
    p["weight"].requires_grad_()
    entries = {k: v for k, v in ENTRIES.items() if device == "cuda" or k not in CUDA_ONLY}
    found = check(entries, p, dtype)
    show.correctness(case, found)
    times, gemm = timings({k: entries[k] for k, v in found.items() if isinstance(v, dict)}, p, device, repeats)
    rows = []
    for name, entry in entries.items():
        row = {"N": n, "V": vocab, "D": depth, "profile": profile, "dtype": str(dtype), "entry": name,
               "gemm_seconds": gemm, "floor_flops": 2 * n * vocab * depth,
               "floor_bytes": (n + vocab) * depth * p["weight"].element_size(),
               "memory_bound_mib": memory_bound(n, vocab, depth)}  # fmt: skip
        if isinstance(found[name], str):
            rows.append({**row, "reason": found[name]})
            continue
        forward, backward = times[name]
        memory = peak_memory_cuda(entry, p) if device == "cuda" else peak_memory_cpu(name, p)
        row |= {**found[name], "forward_seconds": forward, "backward_seconds": backward, "peak_mib": memory,
                "gemms": (forward + backward) / gemm}  # fmt: skip
        if name == "fastgrpo certified" and device == "cpu":
            row["stages"] = stages(p, gemm)
        rows.append(row)
    show.times(case, rows)
    return rows


class Show:
    def __init__(self):
        from rich.console import Console

        self.console = Console(width=150)

    def correctness(self, case, found):
        from rich.table import Table

        table = Table(title="correctness against fp64: N {}, V {}, D {}, {}".format(*case))
        for column in ("entry", "log-prob max", "dX error", "dW error", "dX bias", "dW bias", ""):
            table.add_column(column)
        for name, e in found.items():
            if isinstance(e, str):
                table.add_row(name, e)
                continue
            keys = ("logp_max_error", "d_hidden_error", "d_weight_error", "d_hidden_bias", "d_weight_bias")
            table.add_row(name, *(f"{e[k]:.1e}" for k in keys), "ok" if e["correct"] else "wrong")
        self.console.print(table)

    def times(self, case, rows):
        from rich.table import Table

        gemm, flops = rows[0]["gemm_seconds"], rows[0]["floor_flops"]
        read = rows[0]["floor_bytes"]
        table = Table(
            title=f"floor: one logits GEMM, {flops / 1e9:.0f} GFLOP, {read / MIB:.0f} MiB read once; measured bare: "
            f"{gemm * 1e3:.0f} ms, {flops / gemm / 1e9:.0f} GFLOP/s"
        )
        for column in ("entry", "forward", "backward", "both, in GEMMs", "x TRL", "peak MiB", "bound MiB"):
            table.add_column(column, justify="right" if column != "entry" else "left")
        trl = next((r.get("gemms") for r in rows if r["entry"] == "TRL 1.16 op"), None)
        for r in rows:
            if "reason" in r:
                table.add_row(r["entry"], r["reason"])
            elif not r["correct"]:
                table.add_row(r["entry"], "wrong")
            else:
                memory = "?" if r["peak_mib"] is None else f"{r['peak_mib']:.0f}"
                against = f"{trl / r['gemms']:.2f}" if trl else ""
                seconds = [f"{r[k] / gemm:.2f}" for k in ("forward_seconds", "backward_seconds")]
                bound = f"{r['memory_bound_mib']:.0f}"
                table.add_row(r["entry"], *seconds, f"{r['gemms']:.2f}", against, memory, bound)
        self.console.print(table)
        for r in rows:
            if "stages" in r:
                self.console.print(
                    "certified, by stage (GEMMs):", "  ".join(f"{k} {v:.3f}" for k, v in r["stages"].items())
                )


def plot(rows, path):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    cases = list(dict.fromkeys((r["N"], r["V"], r["D"], r["profile"]) for r in rows))
    figure, axes = plt.subplots(1, len(cases), figsize=(4.5 * len(cases), 3.6), layout="constrained", squeeze=False)
    for axis, case in zip(axes[0], cases):
        mine = [r for r in rows if (r["N"], r["V"], r["D"], r["profile"]) == case and r.get("correct")]
        names = [r["entry"] for r in mine]
        forward = [r["forward_seconds"] / r["gemm_seconds"] for r in mine]
        axis.barh(names, forward, color="tab:blue", label="forward")
        backward = [r["backward_seconds"] / r["gemm_seconds"] for r in mine]
        axis.barh(names, backward, left=forward, color="tab:orange", label="backward")
        axis.axvline(1.5, color="black", linestyle=":", linewidth=1)
        axis.invert_yaxis()
        axis.set(title="N {}, V {}, D {}, {}".format(*case), xlabel="bare logits GEMMs")
    axes[0][0].legend()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--case", nargs=4, action="append", metavar=("N", "V", "D", "PROFILE"), help="repeatable")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        return child(*options.child)
    cases = [(*map(int, c[:3]), c[3]) for c in options.case or ()]
    cases = cases or (CPU_CASES if options.device == "cpu" else CUDA_CASES)
    about, show, rows = machine(options.device), Show(), []
    show.console.print(about)
    for case in cases:
        rows += [{**about, **r} for r in run_case(case, options.device, options.repeats, show)]
    options.output.mkdir(parents=True, exist_ok=True)
    path = options.output / f"head-{options.device}.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    plot(rows, path.with_suffix(".png"))
    show.console.print(f"written: {os.path.relpath(path)}, {os.path.relpath(path.with_suffix('.png'))}")
    return None


if __name__ == "__main__":
    main()

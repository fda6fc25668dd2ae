"""The first minutes on a GPU nobody has run this on: what is right, what is slow, in one command of under nine minutes.

``python -m bench.first_contact --out FOLDER`` needs torch and triton alone. Every step is a process of its own, so that
one that dies or hangs takes nothing with it, and every row is on disk as soon as it is known. FOLDER gets
``first-contact.jsonl`` (rows that ``bench/results/`` takes as they are), ``tiles.json`` (the fastest tile measured of
each kernel, for ``kernels/tiles.py``) and ``first-contact.log`` (tracebacks).
"""

import argparse
import itertools
import json
import math
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
import traceback
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timezone
from pathlib import Path
from typing import NamedTuple

import torch

MIB = 2**20
TIME_LIMIT = 510  # seconds in all


class Sizes(NamedTuple):
    """How large the steps are; a rehearsal without a GPU takes small ones."""

    tokens: int  # of timings
    large: int  # N, so that N V > 2^31
    vocab: int
    widths: tuple
    square: int  # of the GEMM that tells what the device can do
    repeats: int


REAL = Sizes(8192, 16512, 151936, (896, 1536, 4096), 8192, 5)
REHEARSAL = Sizes(32, 34, 192, (32,), 64, 1)


class Contact:
    """What the steps share: the device, the sizes and the clock."""

    def __init__(self, device, sizes):
        self.device, self.sizes, self.cuda = device, sizes, device == "cuda"

    def milliseconds(self, function, repeats=None):
        """-> median and minimum over a few runs after two that warm up."""
        for _ in range(2):
            function()
        times = [self.once(function) for _ in range(repeats or self.sizes.repeats)]
        return round(statistics.median(times), 4), round(min(times), 4)

    def once(self, function):
        if not self.cuda:
            start = time.perf_counter()
            function()
            return 1e3 * (time.perf_counter() - start)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        function()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end)

    def head(self, n, depth, dtype=torch.bfloat16, vocab=None, seed=0):
        """hidden (N, D), weight (V, D), targets (N,): every second label at p near 1."""
        vocab = vocab or self.sizes.vocab
        g = torch.Generator(self.device).manual_seed(seed)
        hidden = torch.randn(n, depth, generator=g, device=self.device).to(dtype)
        weight = (torch.randn(vocab, depth, generator=g, device=self.device) / depth**0.5).to(dtype)
        targets = torch.randint(0, vocab, (n,), generator=g, device=self.device)
        hidden[::2] += (18 * weight[targets[::2]].float()).to(dtype)
        return hidden, weight, targets


# Steps: each yields rows.


def versions(contact):
    import triton

    row = {"triton": triton.__version__, "torch": torch.__version__, "cuda": torch.version.cuda}
    if contact.cuda:
        p = torch.cuda.get_device_properties(0)
        row |= {"name": p.name, "capability": f"{p.major}.{p.minor}", "processors": p.multi_processor_count,
                "memory_gib": round(p.total_memory / 2**30, 1)}  # fmt: skip
        query = [
            "nvidia-smi",
            "--query-gpu=driver_version,clocks.max.sm,clocks.sm,power.limit",
            "--format=csv,noheader",
        ]
        row["nvidia_smi"] = subprocess.run(query, capture_output=True, text=True).stdout.strip()
    yield row


def ceilings(contact):
    """What the device does without us: a square GEMM, a copy, the bare product of hidden and head."""
    n = contact.sizes.square
    for dtype in (torch.bfloat16, torch.float16):
        a, b = (torch.randn(n, n, device=contact.device).to(dtype) for _ in range(2))
        ms, best = contact.milliseconds(lambda a=a, b=b: a @ b)
        yield {"what": f"{n}^3 GEMM", "dtype": str(dtype), "ms": ms, "tflops": round(2e-9 * n**3 / best, 1)}
    source = torch.empty(64 * n * n // 16, dtype=torch.uint8, device=contact.device)
    target = torch.empty_like(source)
    ms, best = contact.milliseconds(lambda: target.copy_(source))
    yield {"what": "copy", "ms": ms, "gb_per_s": round(2e-6 * source.numel() / best, 1)}
    for depth in contact.sizes.widths:
        yield {"what": "bare hidden @ weight.T", "D": depth, "N": contact.sizes.tokens, **bare(contact, depth)}


def bare(contact, depth):
    hidden, weight, _ = contact.head(contact.sizes.tokens, depth)
    ms, best = contact.milliseconds(lambda: [rows @ weight.T for rows in hidden.split(2048)])
    flops = 2 * hidden.shape[0] * weight.shape[0] * depth
    return {"ms": ms, "tflops": round(1e-9 * flops / best, 1)}


def correct_cases():
    """-> name, dtype, shape (n, vocab, depth), keywords of :func:`compare`."""
    shapes = [(300, 5000, 256), (1, 1000, 128), (257, 4999, 250), (64, 5008, 272)]
    options = [{}, {"frozen": True}, {"bias": True, "softcap": 30.0, "temperatures": True}, {"entropy": True},
               {"lora": True}, {"lora": True, "bias": True, "softcap": 30.0, "entropy": True, "temperatures": True},
               {"backward": "certified"}, {"backward": "certified", "hint": True},
               {"backward": "certified", "hint": True, "bias": True, "softcap": 30.0, "lora": True},
               {"workspace_mb": 1}, {"support": True}]  # fmt: skip
    for dtype, option in itertools.product((torch.bfloat16, torch.float16, torch.float32), options):
        yield dtype, shapes[0], option
    for shape in shapes[1:]:
        yield torch.bfloat16, shape, {}
        yield torch.bfloat16, shape, {"backward": "certified", "hint": True}


def correct(contact, shard=0, shards=1):
    """Every variant of the op, then of the objective, against float64 over full logits on the same inputs."""
    cases = list(correct_cases())[:: 1 if contact.cuda else 16]
    for dtype, shape, options in cases[shard::shards]:
        shape = shape if contact.cuda else (8, 300, 64)
        yield {"dtype": str(dtype), "shape": shape, **options, **attempt(compare, contact, dtype, shape, **options)}
    for settings in list(objectives())[shard::shards] if contact.cuda else [{"beta": 0.04}]:
        yield {"objective": settings, **attempt(compare_loss, contact, settings)}


def objectives():
    from fastgrpo.config import CLIPPED, DIVERGENCE_MASKS, IMPORTANCE_SAMPLING_LEVELS, KL_ESTIMATORS, LOSS_TYPES

    for loss_type, level in itertools.product(LOSS_TYPES, IMPORTANCE_SAMPLING_LEVELS):
        yield {"loss_type": loss_type, "importance_sampling_level": level}
    for estimator, corrected in itertools.product(KL_ESTIMATORS, (True, False)):
        yield {"beta": 0.1, "kl_estimator": estimator, "use_bias_correction_kl": corrected}
    for loss_type, mask in itertools.product((CLIPPED[0], "cispo"), DIVERGENCE_MASKS):
        yield {"loss_type": loss_type, "divergence_mask": mask}
    yield {"entropy_coef": 0.01, "top_entropy_quantile": 0.5, "off_policy_mask_threshold": 0.1}


def compare(contact, dtype, shape, frozen=False, bias=False, temperatures=False, lora=False, hint=False, entropy=False,
            support=False, **keywords):  # fmt: skip
    """-> errors of the op, and whether each is within its limit."""
    from fastgrpo import linear_logprobs, reference

    n, vocab, depth = shape
    hidden, weight, targets = contact.head(n, depth, dtype, vocab)
    targets[5::7] = -100
    g = torch.Generator(contact.device).manual_seed(1)

    def random(*shape, dtype=dtype):
        return torch.randn(shape, generator=g, device=contact.device).to(dtype)

    leaves = {"hidden": hidden, "weight": weight, "bias": random(vocab) if bias else None}
    if lora:
        leaves |= {"A": random(8, depth, dtype=torch.float32), "B": 0.1 * random(vocab, 8, dtype=torch.float32)}
    options = {"softcap": keywords.pop("softcap", None), "return_entropy": entropy}
    if temperatures:
        options["temperature"] = 0.5 + torch.rand(n, generator=g, device=contact.device)
    if support:
        ids = (targets.clamp(min=0)[:, None] + torch.arange(8, device=contact.device) * 17) % vocab
        options["support"] = (ids.flatten(), 8 * torch.arange(n + 1, device=contact.device))
    upstream = random(n, dtype=torch.float32)

    def run(function, dtype=None, **extra):
        mine = {k: x.to(dtype or x.dtype, copy=True).requires_grad_(not (frozen and k in ("weight", "bias")))
                for k, x in leaves.items() if x is not None}  # fmt: skip
        pair = (mine["A"], mine["B"], 2.0) if lora else None
        out = function(mine["hidden"], mine["weight"], targets, mine.get("bias"), lora=pair, **options, **extra)
        total = (out.logprobs * upstream).sum() + (out.entropy.sum() if entropy else 0.0)
        total.backward()
        return out, {k: x.grad for k, x in mine.items() if x.requires_grad}

    truth, wanted = run(reference.linear_logprobs, torch.float64)
    if hint:
        keywords["old_logprobs"] = truth.logprobs.detach().float()
    out, grads = run(linear_logprobs, backend="triton", **({"backward": "exact"} | keywords))
    errors = {"logprobs": largest(out.logprobs, truth.logprobs)}
    if entropy:
        errors["entropy"] = largest(out.entropy, truth.entropy)
    errors |= {k: relative(grads[k], wanted[k]) for k in grads}
    near = {"logprobs": 2e-5, "entropy": 1e-4}
    limit = 1e-4 if dtype == torch.float32 else 1e-2
    if keywords.get("backward") == "certified":
        limit = max(limit, 2e-3)
    return {"errors": errors, "ok": all(errors[k] <= near.get(k, limit) for k in errors)}


def largest(x, truth):
    return float(((x.double() - truth) / (1 + truth.abs())).detach().abs().max())


def relative(x, truth):
    return float((x.double() - truth).norm() / truth.norm().clamp(min=1e-30))


def compare_loss(contact, settings, batch=4, length=48, vocab=2000, depth=64):
    from fastgrpo import GRPOLossConfig, grpo_loss, linear_logprobs, reference

    hidden, weight, targets = contact.head(batch * length, depth, torch.float32, vocab)
    shape = (batch, length)
    g = torch.Generator(contact.device).manual_seed(2)
    logp = linear_logprobs(hidden, weight, targets, backend="torch").logprobs.view(shape)
    noise = [0.2 * torch.randn(shape, generator=g, device=contact.device) for _ in range(3)]
    old, ref, sampling = ((logp + x).clamp(max=0.0) for x in noise)
    arguments = {
        "advantages": torch.randn(batch, generator=g, device=contact.device), "old_logprobs": old,
        "ref_logprobs": ref, "sampling_logprobs": sampling,
        "mask": torch.arange(length, device=contact.device) < torch.tensor([[48], [1], [30], [7]]).to(contact.device),
        "importance_weights": 0.5 + torch.rand(shape, generator=g, device=contact.device),
    }  # fmt: skip
    config = GRPOLossConfig(**settings)

    def run(function, dtype, **extra):
        h, w = (x.to(dtype).clone().requires_grad_() for x in (hidden.view(*shape, depth), weight))
        cast = {k: x.to(dtype) if x.is_floating_point() else x for k, x in arguments.items()}
        loss = function(h, w, targets.view(shape), config=config, **cast, **extra).loss
        return loss.detach(), *torch.autograd.grad(loss, (h, w))

    truth = run(reference.grpo_loss, torch.float64)
    ours = run(grpo_loss, torch.float32, backend="triton", backward="exact")
    errors = {"loss": largest(ours[0], truth[0])}
    errors |= {k: relative(a, b) for k, a, b in zip(("hidden", "weight"), ours[1:], truth[1:])}
    return {"errors": errors, "ok": max(errors.values()) < 2e-4}


def large(contact):
    """N V beyond 2^31, against float64 on some rows."""
    from fastgrpo import linear_logprobs

    n, depth = contact.sizes.large, contact.sizes.widths[0]
    hidden, weight, targets = contact.head(n, depth)
    h, w = hidden.requires_grad_(), weight.requires_grad_()
    out = linear_logprobs(h, w, targets, backend="triton", backward="exact").logprobs
    out.sum().backward()
    rows = torch.tensor([0, 1, n // 2, n - 2, n - 1], device=contact.device)
    with torch.no_grad():
        logp = (hidden[rows].double() @ weight.double().T).log_softmax(1)
        slope = torch.nn.functional.one_hot(targets[rows], weight.shape[0]) - logp.exp()
        want = slope @ weight.double()
        errors = {"logprobs": largest(out[rows], logp.gather(1, targets[rows, None])[:, 0]),
                  "hidden": relative(h.grad[rows], want)}  # fmt: skip
    yield {"N": n, "NV": n * weight.shape[0], "errors": errors,
           "ok": errors["logprobs"] < 2e-5 and errors["hidden"] < 1e-2 and bool(w.grad.isfinite().all())}  # fmt: skip


def kernels(contact):
    """Event time of each kernel as it is launched, with the shipped tiles."""
    for depth in contact.sizes.widths:
        for name, launch in launches(contact, depth).items():
            ms, best = contact.milliseconds(launch.run)
            yield {"kernel": name, "D": depth, "N": contact.sizes.tokens, "ms": ms, "tile": launch.tile,
                   **speed(launch, best)}  # fmt: skip


def speed(launch, ms):
    return {"tflops": round(1e-9 * launch.flops / ms, 1)} if launch.flops else {}


class Launch(NamedTuple):
    run: object  # launches it again
    tile: str
    flops: int


def launches(contact, depth, hint=True):
    """{kernel: its largest launch} of a forward, a certified forward and an exact backward."""
    from fastgrpo import linear_logprobs
    from fastgrpo.kernels import backward, forward, report

    hidden, weight, targets = contact.head(contact.sizes.tokens, depth)
    hidden.requires_grad_()
    weight.requires_grad_()
    found = {}
    with report.replaced((forward, backward), lambda kernel: Recorder(kernel, found)):
        logp = linear_logprobs(hidden, weight, targets, backend="triton", backward="exact").logprobs
        logp.sum().backward()
        old = logp.detach() if hint else None
        linear_logprobs(hidden, weight, targets, old_logprobs=old, backend="triton", backward="certified")
    return found


class Recorder:
    """Launches a kernel and keeps how, to do it again: the launch with the largest grid of each kind."""

    def __init__(self, kernel, found):
        self.kernel, self.name, self.found, self.grids = kernel, kernel.fn.__name__.removesuffix("_kernel"), found, {}

    def __getitem__(self, grid):
        def launch(**arguments):
            self.kernel[grid](**arguments)
            name = self.name + ("_certified" if arguments.get("flags_ptr") is not None else "")
            if grid[0] > self.grids.get(name, 0):
                self.grids[name] = grid[0]
                tile = "x".join(str(arguments[k]) for k in arguments if k.startswith("BLOCK"))
                tile += f", {arguments.get('num_warps')} warps, {arguments.get('num_stages')} stages"
                again = Launch(lambda: self.kernel[grid](**arguments), tile, flops_of(name, arguments))
                self.found[name] = again

        return launch


def flops_of(name, arguments):
    """2 x multiply-adds of a GEMM kernel's launch; 0 of the others."""
    if name.startswith("forward"):
        return 2 * arguments["N"] * arguments["V"] * arguments["D"]
    if name in ("dlogits", "dhidden", "dweight"):
        cells = (arguments["last_row"] - arguments["first_row"]) * (arguments["last_v"] - arguments["first_v"])
        return 2 * cells * arguments["D"]
    return 0


def candidates(kernel, architecture):
    """Tiles worth a try beside the shipped one, largest first."""
    from fastgrpo.kernels import tiles

    shipped = tiles.lookup(kernel, 2, architecture)
    shapes = [
        (128, 256, 64, 8, 3),
        (128, 128, 64, 8, 4),
        (128, 128, 64, 4, 3),
        (128, 128, 32, 8, 4),
        (64, 128, 64, 4, 4),
    ]
    return [shipped] + [
        t for shape in shapes if (t := shipped._replace(**dict(zip(shipped._fields, shape)))) != shipped
    ]


TUNED = ("forward", "forward_certified", "dlogits", "dhidden", "dweight")


def tile_jobs(architecture):
    return [(kernel, tile) for kernel in TUNED for tile in candidates(kernel, architecture)]


def with_tile(contact, kernel, tile, depth):
    """The kernel's largest launch under another tile."""
    from fastgrpo.kernels import tiles

    plain = tiles.for_tensor
    tiles.for_tensor = lambda name, dtype, device: tile if name == kernel else plain(name, dtype, device)
    try:
        return launches(contact, depth)[kernel]
    finally:
        tiles.for_tensor = plain


def compile_tiles(contact, shard=0, shards=1):
    """Fill Triton's cache from many processes, so that the tiles' timings wait for no compiler."""
    from fastgrpo.kernels import tiles

    small = Contact(contact.device, contact.sizes._replace(tokens=256, vocab=min(contact.sizes.vocab, 4096)))
    jobs = tile_jobs(tiles.architecture(torch.device(contact.device)))[shard::shards]
    for kernel, tile in jobs:
        start = time.monotonic()
        row = {"kernel": kernel, "tile": list(tile)}
        try:
            with_tile(small, kernel, tile, contact.sizes.widths[0])
        except Exception as error:
            row |= failure(error)
        yield {**row, "seconds": round(time.monotonic() - start, 1)}


def tiles_timed(contact):
    """Three or four tiles of each GEMM kernel at D 1536."""
    from fastgrpo.kernels import tiles

    depth = contact.sizes.widths[len(contact.sizes.widths) // 2]
    for kernel, tile in tile_jobs(tiles.architecture(torch.device(contact.device))):
        row = {"kernel": kernel, "tile": list(tile), "D": depth, "N": contact.sizes.tokens}
        try:
            launch = with_tile(contact, kernel, tile, depth)
            ms, best = contact.milliseconds(launch.run)
            yield {**row, "ms": ms, **speed(launch, best)}
        except Exception as error:
            yield {**row, **failure(error)}


def exact(contact):
    """The exact op at real size: time beside the bare product, peak memory, waits of the host, a CUDA graph."""
    from fastgrpo import linear_logprobs

    for depth, frozen in itertools.product(contact.sizes.widths, (False, True)):
        n, product = contact.sizes.tokens, bare(contact, depth)["ms"]
        hidden, weight, targets = contact.head(n, depth)
        h, w = hidden.requires_grad_(), weight.requires_grad_(not frozen)
        leaves = (h,) if frozen else (h, w)

        def forward(h=h, w=w, targets=targets):
            return linear_logprobs(h, w, targets, backend="triton", backward="exact").logprobs

        def both(forward=forward, leaves=leaves):
            return torch.autograd.grad(forward().sum(), leaves)

        first, row = both(), {"D": depth, "N": n, "frozen": frozen, "bare_ms": product}
        row |= {"forward_ms": contact.milliseconds(forward)[0], "both_ms": contact.milliseconds(both)[0]}
        row["passes"] = round(row["both_ms"] / product, 3)
        row["deterministic"] = all(torch.equal(a, b) for a, b in zip(first, both()))
        if contact.cuda:
            row |= cuda_checks(both, h, w, frozen, first)
        yield row


def cuda_checks(both, h, w, frozen, first):
    n, depth = h.shape
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    both()
    peak = torch.cuda.max_memory_allocated() - before - 2 * h.numel() - (0 if frozen else 2 * w.numel())
    bound = 128 * MIB + (0 if frozen else 4 * n * depth) + 64 * n + n * w.shape[0] / 128
    row = {"peak_mib": round(peak / MIB, 1), "bound_mib": round(bound / MIB, 1)}
    torch.cuda.set_sync_debug_mode("error")
    try:
        both()
        row["host_waits"] = 0
    except RuntimeError as error:
        row["host_waits"] = str(error)[:200]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    try:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = both()
        graph.replay()
        torch.cuda.synchronize()
        row["graph"] = all(torch.equal(a, b) for a, b in zip(first, captured))
    except Exception as error:
        row["graph"] = failure(error)["error"]
    return row


def certified(contact):
    """The certified backward, whose launches are many: profiled small, then once at full size."""
    from fastgrpo import linear_logprobs

    depth = contact.sizes.widths[len(contact.sizes.widths) // 2]
    for n in (min(2048, contact.sizes.tokens), contact.sizes.large):
        hidden, weight, targets = contact.head(n, depth)
        h, w = hidden.requires_grad_(), weight.requires_grad_()
        old = linear_logprobs(h.detach(), w.detach(), targets, backend="triton").logprobs

        def both(h=h, w=w, targets=targets, old=old):
            logp = linear_logprobs(h, w, targets, old_logprobs=old, backend="triton", backward="certified").logprobs
            return torch.autograd.grad(logp.sum(), (h, w))

        row = {"N": n, "D": depth}
        if n < contact.sizes.large:
            both()
            row |= profiled(contact, both)
        yield {**row, "ms": round(contact.once(both), 2)}


def profiled(contact, function):
    from torch.profiler import ProfilerActivity, profile

    kinds = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if contact.cuda else [])
    with profile(activities=kinds) as p:
        function()
        if contact.cuda:
            torch.cuda.synchronize()
    names = Counter(e.name for e in p.events())
    calls = sum(v for k, v in names.items() if "Launch" in k)
    waits = sum(v for k, v in names.items() if "Synchronize" in k or k == "aten::_local_scalar_dense")
    return {"launches": calls, "waits": waits, "ops": dict(names.most_common(12))}


def loss_step(contact):
    """grpo_loss as a trainer calls it: time, and no waiting."""
    from fastgrpo import GRPOLossConfig, grpo_loss

    batch, depth = 8, contact.sizes.widths[len(contact.sizes.widths) // 2]
    length = contact.sizes.tokens // batch
    hidden, weight, targets = contact.head(batch * length, depth)
    h, w = hidden.view(batch, length, depth).requires_grad_(), weight.requires_grad_()
    advantages = torch.randn(batch, device=contact.device)
    advantages[::2] = 0.0
    old = torch.full((batch, length), -0.7, device=contact.device)

    def step(config=GRPOLossConfig(beta=0.04)):  # noqa: B008
        result = grpo_loss(h, w, targets.view(batch, length), advantages, config, old_logprobs=old, ref_logprobs=old,
                           backend="triton")  # fmt: skip
        return torch.autograd.grad(result.loss, (h, w))

    yield {"N": batch * length, "D": depth, "beta": 0.04, "ms": contact.milliseconds(step)[0]}


METRICS = (
    "sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_active,sm__inst_executed_pipe_tensor.sum,"
    "smsp__issue_active.avg.pct_of_peak_sustained_active,lts__t_bytes.sum.per_second,dram__bytes.sum.per_second,"
    "sm__warps_active.avg.pct_of_peak_sustained_active,gpu__time_duration.sum"
)


def ncu(contact):
    """Tensor pipe, L2 and issue slots of the forward and dweight, where Nsight Compute is installed."""
    tool = shutil.which("ncu") or next(iter(sorted(Path("/opt/nvidia").glob("nsight-compute/*/ncu"))), None)
    if tool is None or not contact.cuda:
        yield {"skipped": "ncu is not installed" if contact.cuda else "needs a CUDA device"}
        return
    command = [str(tool), "--csv", "--metrics", METRICS, "--kernel-name", "regex:forward_kernel|dweight_kernel",
               "--launch-count", "4", sys.executable, "-m", "bench.first_contact", "--step", "once"]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True)
    yield {"rc": done.returncode, "csv": [line for line in done.stdout.splitlines() if line.startswith('"')][:80],
           "stderr": done.stderr[-500:]}  # fmt: skip


def once(contact):
    launches(contact, contact.sizes.widths[len(contact.sizes.widths) // 2])
    yield {"done": True}


class Step(NamedTuple):
    run: object
    seconds: int  # at most
    shards: int = 1  # processes side by side


STEPS = {
    "versions": Step(versions, 30), "ceilings": Step(ceilings, 40), "correct": Step(correct, 150, 8),
    "large": Step(large, 40), "kernels": Step(kernels, 60), "exact": Step(exact, 70),
    "loss_step": Step(loss_step, 30), "compile_tiles": Step(compile_tiles, 60, 12),
    "tiles_timed": Step(tiles_timed, 60),
    "certified": Step(certified, 50), "ncu": Step(ncu, 60), "once": Step(once, 60),
}  # fmt: skip


def attempt(function, *arguments, **keywords):
    """What it returns, or a row that says why not."""
    try:
        return function(*arguments, **keywords)
    except Exception as error:
        return failure(error)


def failure(error):
    return {"error": f"{type(error).__name__}: {str(error)[:400]}", "ok": False}


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
        if r["step"] in ("versions", "ceilings", "large", "kernels", "exact", "loss_step", "certified"):
            print({k: v for k, v in r.items() if k not in ("suite", "device", "torch", "date", "ops")})
    for r in bad:
        print("WRONG", {k: v for k, v in r.items() if k not in ("suite", "device", "torch", "date")})
    checked = sum(r["step"] == "correct" for r in rows)
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
        contact = Contact(options.device, REHEARSAL if options.rehearsal else REAL)
        shard, shards = map(int, options.shard.split("/"))
        sharded = {"shard": shard, "shards": shards} if STEPS[options.step].shards > 1 else {}
        return run_step(options.step, contact, Book(options.out, options.device), **sharded)
    wrong = run_all(options, options.steps or [name for name in STEPS if name != "once"])
    return summary(options.out, wrong)


if __name__ == "__main__":
    sys.exit(main())

"""The kernels one by one: their time with the shipped tiles and with others, their counters."""

import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import torch

from bench.contact.device import Contact, failure


def kernels(contact):
    """Event time of each kernel as it is launched, with the shipped tiles."""
    for depth in contact.sizes.widths:
        for name, launch in launches(contact, depth).items():
            ms, best = contact.milliseconds(launch.run)
            yield {
                "kernel": name,
                "D": depth,
                "N": contact.sizes.tokens,
                "ms": ms,
                "tile": launch.tile,
                **speed(launch, best),
            }


def speed(launch, ms):
    return {"tflops": round(1e-9 * launch.flops / ms, 1)} if launch.flops else {}


class Launch(NamedTuple):
    run: object  # launches it again
    tile: str
    flops: int


def launches(contact, depth, hint=True):
    """{kernel: its largest launch} of a forward, a certified and a frozen head's one, and an exact backward."""
    from fastgrpo import linear_logprobs
    from fastgrpo.kernels import report

    hidden, weight, targets = contact.head(contact.sizes.tokens, depth)
    hidden.requires_grad_()
    weight.requires_grad_()
    found = {}
    with report.replaced(lambda kernel: Recorder(kernel, found)):
        logp = linear_logprobs(hidden, weight, targets, backend="triton", backward="exact").logprobs
        logp.sum().backward()
        old = logp.detach() if hint else None
        linear_logprobs(hidden, weight, targets, old_logprobs=old, backend="triton", backward="certified")
    made_in_forward = {}
    with report.replaced(lambda kernel: Recorder(kernel, made_in_forward)):
        linear_logprobs(hidden, weight.detach(), targets, backend="triton", backward="exact")
    return made_in_forward | found  # of what both launch, the first's


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
    head = arguments.get("head")
    if name.startswith("forward"):
        return 2 * arguments["N"] * head.V * head.D
    if name in ("dlogits", "dhidden", "dweight", "masses"):
        last_v = arguments["first_v"] + arguments["width"] if name == "masses" else arguments["last_v"]
        columns = min(last_v, head.V if head else last_v) - arguments["first_v"]
        depth = head.D if head else arguments["D"]
        return 2 * (arguments["last_row"] - arguments["first_row"]) * columns * depth
    return 0


TUNED = ("forward", "forward_certified", "dlogits", "dhidden", "dweight")


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


def time_tiles(contact):
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
    command = [
        str(tool),
        "--csv",
        "--metrics",
        METRICS,
        "--kernel-name",
        "regex:forward_kernel|dweight_kernel",
        "--launch-count",
        "4",
        sys.executable,
        "-m",
        "bench.first_contact",
        "--step",
        "once",
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    yield {
        "rc": done.returncode,
        "csv": [line for line in done.stdout.splitlines() if line.startswith('"')][:80],
        "stderr": done.stderr[-500:],
    }


def once(contact):
    launches(contact, contact.sizes.widths[len(contact.sizes.widths) // 2])
    yield {"done": True}

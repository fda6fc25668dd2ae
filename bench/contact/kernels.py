"""The kernels one by one: their time with the shipped tiles and with others, their counters."""

import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch

from bench.candidates import ONE, candidates, compile_tile, key_of
from bench.contact.device import attempt, failure
from bench.contact.launches import exact, launches, speed, with_tile

FEW = 7  # tiles of each kernel: bench.tune tries them all


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


def tile_jobs(architecture):
    return [(kernel, tile) for kernel in ONE for tile in candidates(kernel, architecture)[:FEW]]


def compile_tiles(contact, shard=0, shards=1):
    """Fill Triton's cache from many processes, so that the tiles' timings wait for no compiler."""
    from fastgrpo.kernels import tiles

    architecture = tiles.architecture(torch.device(contact.device))
    for kernel, tile in tile_jobs(architecture)[shard::shards]:
        start = time.monotonic()
        compiled = {"skipped": "interpreter"}
        if contact.cuda:
            compiled = attempt(compile_tile, key_of(kernel, architecture), tile, architecture)
        yield {"kernel": kernel, "tile": list(tile), **compiled, "seconds": round(time.monotonic() - start, 1)}


def time_tiles(contact):
    """A few tiles of each GEMM kernel at D 1536."""
    from fastgrpo.kernels import tiles

    depth = contact.sizes.widths[len(contact.sizes.widths) // 2]
    data = contact.head(contact.sizes.tokens, depth)
    for kernel, tile in tile_jobs(tiles.architecture(torch.device(contact.device))):
        row = {"kernel": kernel, "tile": list(tile), "D": depth, "N": contact.sizes.tokens}
        try:
            launch = with_tile(kernel, tile, data)
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
    """Tensor pipe, L2 and issue slots of the forward and the backward's GEMMs, where Nsight Compute is installed."""
    tool = shutil.which("ncu") or next(iter(sorted(Path("/opt/nvidia").glob("nsight-compute/*/ncu"))), None)
    if tool is None or not contact.cuda:
        yield {"skipped": "ncu is not installed" if contact.cuda else "needs a CUDA device"}
        return
    command = [
        str(tool),
        "--csv",
        "--clock-control",  # the card's clocks stay as they are
        "none",
        "--metrics",
        METRICS,
        "--kernel-name",
        "regex:forward_kernel|dlogits_kernel|dhidden_kernel|dweight_kernel",
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
    """What ncu looks at: the first launch of each is the first that it matches."""
    exact(*contact.head(contact.sizes.tokens, contact.sizes.widths[len(contact.sizes.widths) // 2]))
    yield {"done": True}

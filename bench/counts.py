"""``python -m bench.counts``: what a certified backward on a GPU launches and works through, counted without one.

Launches: of the fused kernels under a recorder, and of torch's operations under a dispatch mode, both at the sizes
asked for; an operation counts once (a sort or a cumulative sum is several kernels of torch's). Work: the staircase of a
certificate that the torch backend made of the profile's logits, cut into chunks as the device cuts it; its FLOPs, what
padding to tiles adds, and what is lost where a chunk's programs do not fill the processors (programs start in order, on
the processor that is free first).
"""

import argparse
import collections
import dataclasses
import functools
import heapq
import json
import math
import sys
from typing import NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from bench import profiles
from fastgrpo import lora
from fastgrpo.backends import certified, staircase
from fastgrpo.backends.problem import Gradients, HeadParams, HeadProblem
from fastgrpo.inputs import IGNORE

VIEWS = {
    "view", "_unsafe_view", "slice", "select", "unsqueeze", "squeeze", "transpose", "t", "expand", "split",
    "split_with_sizes", "detach", "alias", "as_strided", "permute", "unbind", "unflatten", "empty", "empty_like",
    "new_empty", "empty_strided", "scalar_tensor", "lift_fresh",
}  # fmt: skip
NEEDS = {"trained": Gradients(True, True), "frozen": Gradients(True, False)}
PROCESSORS, RESIDENT = 132, {"dlogits": 2, "dhidden": 1, "dweight": 1}  # of an H200, and CTAs on each


class Operations(TorchDispatchMode):
    """Counts the operations that launch a kernel on a device."""

    def __init__(self):
        super().__init__()
        self.names = collections.Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket.__name__ not in VIEWS:
            self.names[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def params_of(dtype, workspace_mb, tolerance=0.005, row_tolerance=0.1):
    return HeadParams(
        temperature=1.0, softcap=None, logit_scale=1.0, compute_dtype=dtype, entropy=False, backend="triton",
        workspace=int(workspace_mb * 2**20), tolerance=tolerance, row_tolerance=row_tolerance,
    )  # fmt: skip


def count_launches(n, vocab, depth, head="trained", workspace_mb=128, architecture="sm_90"):
    """-> {part: {kernel or "torch: operation": launches}} of a certified forward and backward with a hint, bf16."""
    from fastgrpo.kernels import certified as kernels
    from fastgrpo.kernels import forward, report

    def empty(*shape, dtype=torch.bfloat16):
        return torch.empty(shape, dtype=dtype, device="meta")

    params = params_of(torch.bfloat16, workspace_mb)
    problem = HeadProblem(empty(1, n, depth), empty(vocab, depth), None, empty(n, dtype=torch.int64), None, params)
    row, needs, found = empty(n, dtype=torch.float32), NEEDS[head], {}
    with report.recording(architecture) as launches, native():

        def counted(function):
            function()  # the first uploads tables
            launches.clear()
            with Operations() as seen:
                result = function()
            names = collections.Counter(kernel.fn.__name__ for kernel, _ in launches)
            return result, names + collections.Counter({f"torch: {k}": v for k, v in seen.names.items()})

        (stats, certificate), found["forward"] = counted(lambda: forward.certified_forward(problem, row))
        arguments = problem, stats, certificate, row
        _, found["plan"] = counted(lambda: kernels.make_plan(*arguments, NEEDS["frozen"]))
        _, with_audit = counted(lambda: kernels.make_plan(*arguments, needs))
        _, everything = counted(lambda: kernels.certified_backward(*arguments, needs))
    found["audit"] = with_audit - found["plan"]
    found["gradients"] = everything - with_audit
    return {part: dict(names) for part, names in found.items()}


@functools.wraps(lora.has_native)
def has_native(x):
    return True


class native:
    """Products as on CUDA, where a 16-bit one returns its sum in fp32."""

    def __enter__(self):
        from fastgrpo.kernels import grids, work

        self.processors = grids.processor_count
        grids.processor_count = lambda device: PROCESSORS
        self.saved = [(module, name, getattr(module, name)) for module in (lora, work) for name in
                      ("has_native", "mm16")]  # fmt: skip
        for module, _, _ in self.saved:
            module.has_native, module.mm16 = has_native, torch.mm

    def __exit__(self, *error):
        from fastgrpo.kernels import grids

        grids.processor_count = self.processors
        for module, name, value in self.saved:
            setattr(module, name, value)


class Work(NamedTuple):
    """What one pass goes through, in cells (row, entry); each is 2 D FLOPs."""

    cells: float  # that the staircase asks for
    padded: float  # with tiles filled up
    longest: float  # until the last program of each chunk ends, times what all processors do meanwhile
    bytes: float  # between memory and processors, if each chunk's operands come once


def make_staircase(n, vocab, depth, profile="rl", head="trained", seed=0):
    """-> problem, certificate, :class:`Staircase` of the profile's logits, a hint, fp32 on a CPU."""
    p = profiles.problem(n, vocab, depth, profile, seed=seed)
    params = dataclasses.replace(params_of(torch.float32, 512), backend="torch")
    problem = HeadProblem(p["hidden"][None], p["weight"], None, p["targets"], None, params)
    stats, certificate = certified.forward(problem, p["old_logprobs"])
    assert (problem.targets != IGNORE).all(), "the order must have all rows"
    return problem, certificate, staircase.make(problem, stats, certificate, p["upstream"], NEEDS[head])


def cut_chunks(stairs, n, vocab, depth, head, workspace_mb):
    """-> [(first panel, the one after the last)] of the chunks that hold something, and how many are launched."""
    from fastgrpo.kernels.panels import Cut
    from fastgrpo.kernels.products import SLABS_SHARE, slab_rows, ways_for
    from fastgrpo.kernels.tiles import WIDTH, lookup

    summed = 4 * depth if head == "trained" else 0
    tile = lookup("dhidden", 2, "sm_90", described=True)
    slabs = 4 * depth * slab_rows(ways_for(tile, depth, PROCESSORS), tile)
    slabs = 0 if slabs > SLABS_SHARE * workspace_mb * 2**20 else slabs
    cut = Cut(n, vocab, int(workspace_mb * 2**20) - slabs, 2 + 4 / WIDTH, 0, depth, summed)
    stops, at, chunks = stairs.stops_head.tolist(), 0, []
    while at < len(stops):
        height = -(-max(min(stops[at], cut.rows), 1) // WIDTH) * WIDTH
        last = min(at + max(min(cut.room // (height + depth), cut.most), 1), len(stops))
        chunks.append((at, last))
        at = last
    return chunks, cut.chunks


def makespan(costs, slots):
    """When the last of some programs ends that start in order on the slot that is free first."""
    free = [0.0] * slots
    for cost in costs:
        heapq.heapreplace(free, free[0] + cost)
    return max(free)


def count_work(stairs, vocab, depth, head="trained", workspace_mb=128, processors=PROCESSORS, split=True):
    """-> {pass: :class:`Work`} of a backward in bf16 with Hopper's tiles. split: whether narrow chunks are, for dX."""
    from fastgrpo.kernels import tiles
    from fastgrpo.kernels.products import ways_for

    n, width = stairs.rows.numel(), tiles.WIDTH
    shapes = {name: tiles.lookup(name, 2, "sm_90", described=True) for name in RESIDENT}
    totals = {name: [0.0] * 4 for name in RESIDENT if head == "trained" or name != "dweight"}
    of_hidden, of_head = stairs.stops_hidden.tolist(), stairs.stops_head.tolist()
    for first, last in cut_chunks(stairs, n, vocab, depth, head, workspace_mb)[0]:
        made, entries = 2 * sum(of_head[first:last]) * width, 2 * (last - first) * width * depth
        for name, total in totals.items():
            stops = (of_hidden if name == "dhidden" else of_head)[first:last]
            splits = ways_for(shapes[name], depth, processors) if name == "dhidden" and split else 1
            programs = PROGRAMS[name](stops, shapes[name], width, depth, splits)
            cells, slots, rows = sum(stops) * width, processors * RESIDENT[name], max(stops) * depth
            # dlogits, entries and rows once each; entries are copied first, a sum of fp32 is read and written
            moved = made + entries + {"dlogits": 2 * rows + 2 * entries, "dhidden": 8 * rows, "dweight": 2 * rows}[name]
            for k, x in enumerate((cells, sum(programs), makespan(programs, slots) * slots, moved)):
                total[k] += x
    return {name: Work(*total) for name, total in totals.items()}


def dlogits_programs(stops, tile, width, depth, splits=1):
    """Cells that each program works through, in the order they start in; steps of D count as of the last, whole."""
    cells = tile.rows * tile.cols * math.ceil(depth / tile.depth) * tile.depth / depth
    return [cells] * sum(-(-s // tile.rows) * (width // tile.cols) for s in stops)


def dhidden_programs(stops, tile, width, depth, splits=1):
    """splits: ways that the first block's entries are split, see :func:`fastgrpo.kernels.products.own_split`."""
    across, share, costs = math.ceil(depth / tile.cols), tile.cols / depth, []
    blocks, split = math.ceil(stops[0] / tile.rows), splits // 2
    for block in [*range(split, blocks), *range(min(split, blocks))]:
        panels = sum(s > block * tile.rows for s in stops)
        ways = max(splits >> block.bit_length(), 1)
        costs += [(panels * (k + 1) // ways - panels * k // ways) * width for k in range(ways) for _ in range(across)]
    return [tile.rows * length * share for length in costs]


def dweight_programs(stops, tile, width, depth, splits=1):
    share = tile.cols / depth
    return [tile.rows * -(-s // tile.depth) * tile.depth * share for s in stops for _ in
            range(width // tile.rows * math.ceil(depth / tile.cols))]  # fmt: skip


PROGRAMS = {"dlogits": dlogits_programs, "dhidden": dhidden_programs, "dweight": dweight_programs}


def describe(work, cells, depth):
    """A :class:`Work` as a row. cells: of all rows and entries."""
    return {
        "share of cells": round(work.cells / cells, 4),
        "TFLOP": round(2e-12 * depth * work.cells, 3),
        "padding": round(work.padded / work.cells, 3),
        "imbalance": round(work.longest / work.padded, 3),
        "GB": round(work.bytes / 1e9, 2),
    }


def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m bench.counts", description=__doc__)
    parser.add_argument("--sizes", type=lambda x: tuple(map(int, x.split(","))), default=(16384, 151936, 1536),
                        metavar="N,V,D")  # fmt: skip
    parser.add_argument("--head", choices=NEEDS, default="trained")
    parser.add_argument("--profile", choices=profiles.PROFILES, help="count its work too; the logits are made on a CPU")
    parser.add_argument("--width", type=int, help="of the states that the profile's logits are made of; default: D")
    parser.add_argument("--workspace-mb", type=float, default=128)
    options = parser.parse_args(argv)
    n, vocab, depth = options.sizes
    parts = count_launches(n, vocab, depth, options.head, options.workspace_mb)
    for part, names in parts.items():
        print(json.dumps({"part": part, "launches": sum(names.values()), **names}))
    if options.profile is None:
        return 0
    _, certificate, stairs = make_staircase(n, vocab, options.width or depth, options.profile, options.head)
    chunks, launched = cut_chunks(stairs, n, vocab, depth, options.head, options.workspace_mb)
    kept = float(certificate.flags.sum()) * certificate.block / (n * vocab)
    print(json.dumps({"kept": round(kept, 4), "chunks": len(chunks), "chunks launched": launched}))
    for name, work in count_work(stairs, vocab, depth, options.head, options.workspace_mb).items():
        print(json.dumps({"pass": name, **describe(work, n * vocab, depth)}))
    return 0


if __name__ == "__main__":
    sys.exit(main())

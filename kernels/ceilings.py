"""How much of the tensor cores' peak a kernel's machine code leaves within reach: part of ``make kernel-report``.

The model, for one SM at steady state. A tile of the output takes ``steps`` steps of the reduction and an epilogue:

    tensor    cycles of a step's products at the tensor cores' dense peak
    alone     of one step: the most of tensor, the loop's busiest pipe, bytes / L2's share, latency / steps ahead
    serial    steps * alone + the epilogue's busiest pipe + exposed * latency
    ceiling   steps * tensor / max(serial / CTAs an SM, steps * tensor, each pipe's and L2's work for the whole tile)

Assumptions, each for a measurement to refute (ncu, at a clock that is held):

- Each of four schedulers issues one instruction a cycle and serves a quarter of a CTA's warps. Pipes take the cycles in
  ``PIPES`` an instruction (lanes as the CUDA guide's throughput table has them) and overlap with each other.
- Within the loop everything overlaps. A CTA's epilogue overlaps with nothing of its own; other CTAs fill it.
- Hopper's and B200's tensor cores read shared memory for nothing; accumulators in B200's tensor memory are free.
- Each instruction outside the hot loop runs once a tile, rare paths too; what a program does once for many tiles is
  left out. Dependencies, barriers, bank conflicts, replays, a tile's stores and its first reads of sums cost nothing.
- A tile exposes one latency, the first copies'; a program of one tile three: count, row numbers, copies. Each loop
  more, of a second model's logits, exposes its own.
- Both operands of a step come from L2, at ``l2`` bytes a cycle and SM as the SM receives them; nothing is left in L1,
  and DRAM keeps up. That figure is the least certain, so each ceiling is also given without it ("fed"). Hopper's was
  fitted to 91 pairs of tiles on an H200: docs/measured-facts.md, also for what the model gets wrong there.
- dhidden sums over a chunk's entries, dweight over its rows, of the exact backward; the others over D.
- The grid fills the device to the end. Padding of D to whole steps counts as loss.

So it is a ceiling: a measured share above it refutes a figure here, one far below it an assumption.
"""

import json
import math
import re
import subprocess
import tempfile
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from fastgrpo.kernels import tiles

COMMITTED = Path(__file__).with_name("ceilings.json")
DEPTHS = (896, 1536, 4096)
CHUNK = 4096  # entries that dhidden sums over, of 16384 rows in 128 MiB
SLACK = 0.05  # of a committed ceiling that may be lost
KINDS = ("ceiling", "fed")
REGISTERS, RESERVED = 65536, 1024  # of an SM; bytes of shared memory that the driver takes of each CTA


class Device(NamedTuple):
    """Of one SM, a cycle. l2 and latency are estimates from published microbenchmarks of such chips, but for the H200's
    l2."""

    name: str
    flops: int  # bf16 products summed in fp32, dense; GeForce has half of its professional sisters'
    l2: int  # bytes
    latency: int  # cycles of a hit in L2
    shared: int  # bytes a CTA may have
    warps: int  # resident at most
    fp32: int = 1  # cycles an instruction


DEVICES = {
    "sm_80": Device("A100", 2048, 47, 200, 166912, 64, fp32=2),
    "sm_86": Device("RTX 3090", 512, 24, 250, 101376, 48),
    "sm_89": Device("RTX 4090", 512, 16, 280, 101376, 48),
    "sm_90": Device("H200", 4096, 56, 270, 232448, 64),
    "sm_100": Device("B200", 8192, 64, 360, 232448, 64),
    "sm_120": Device("RTX 5090", 512, 16, 360, 101376, 48),
}

# {pipe: (names, cycles of an instruction)}: 16 lanes a scheduler take 2, 4 lanes 8, the memory pipe's 32 a SM 4.
PIPES = {
    "alu": (
        r"FMNMX3?|FSETP?|FSEL|FCHK|IADD3?|VIADD|VIADDMNMX|[VI]+MNMX3?|ISETP|LOP3|PLOP3|SEL|LEA|SHF|PRMT|P2R|R2P"
        r"|SGXT|IABS|F2FP|BMSK|FLO|POPC",
        2,
    ),
    "imad": (r"IMAD|IDP", 2),
    "mufu": (r"MUFU|[FI]2[FI]", 8),
    "memory": (r"SHFL|LDSM?|STSM?|LDGSTS|LDG|STG", 4),
}
WIDE = {"64": 2, "128": 4, "2": 2, "4": 4}  # times as long: bytes a lane, matrices of LDSM
FP32 = r"(?:FADD|FMUL|FFMA)2?|IMAD"
TENSOR = r"HMMA|HGMMA|UTC\w*MMA"
COPY = r"LDGSTS|UTMALDG"
INSTRUCTION = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(?:@(!?U?P[T0-9]+)\s+)?([A-Z][\w.]*)([^;]*);", re.M)


class Instruction(NamedTuple):
    address: int
    opcode: str  # with its suffixes
    operands: str


class Code(NamedTuple):
    """What the model takes from the machine code, a warp."""

    loop: Counter  # opcodes of the hot loop, or of the longest of several, a trip
    epilogue: Counter  # of what else a tile takes
    products: int  # multiplications of a trip, of the whole CTA
    ahead: float  # trips whose copies are under way before the first one computes
    one_tile: bool  # whether a program ends with its tile
    loops: int = 1  # of two models' logits two, one after the other


class Tile(NamedTuple):
    rows: int
    cols: int
    depth: int  # of a step of the reduction
    warps: int


def parse(sass):
    """-> [Instruction] of cuobjdump -sass. What is never executed but issued (@!PT) is a NOP."""
    return [
        Instruction(int(address, 16), "NOP" if predicate == "!PT" else opcode, operands)
        for address, predicate, opcode, operands in INSTRUCTION.findall(sass)
    ]


def find_loops(instructions):
    """-> [(first address, last)] of the ranges that a branch jumps back over, the shortest first."""
    found = set()
    for i in instructions:
        target = re.search(r"\b0x([0-9a-f]+)\b", i.operands) if is_a(i.opcode, "BRA") else None
        if target and int(target[1], 16) < i.address:
            found.add((int(target[1], 16), i.address))
    return sorted(found, key=lambda x: (x[1] - x[0], x))


def read(instructions, tile):
    """-> Code. The hot loop is the innermost one with the most tensor-core instructions, or all that have as many; one
    around it does tiles."""

    def inside(loop):
        return [i for i in instructions if loop[0] <= i.address <= loop[1]]

    loops = find_loops(instructions)
    tensor = {a: sum(is_a(i.opcode, TENSOR) for i in inside(a)) for a in loops}
    # a jump back into a loop, from a wait that stands apart, makes no loop
    innermost = [a for k, a in enumerate(loops) if tensor[a] and not any(tensor[b] and meet(a, b) for b in loops[:k])]
    if not innermost:
        raise ValueError("no loop with a tensor-core instruction")
    most = max(tensor[a] for a in innermost)
    alike = [a for a in innermost if tensor[a] == most]
    hot = max(alike, key=lambda a: len(inside(a)))
    outer = next((a for a in loops if all(contains(a, b) for b in alike)), None)
    around = instructions if outer is None else inside(outer)
    loop = Counter(i.opcode for i in inside(hot))
    outside = (i for i in around if not any(a[0] <= i.address <= a[1] for a in alike))
    rest = Counter(i.opcode for i in outside if i.opcode != "NOP")
    copies = sum(count(Counter(i.opcode for i in inside(a)), COPY) for a in alike)
    ahead = count(rest, COPY) / copies if copies else 0.0
    return Code(loop, rest, sum(products(i.opcode, tile) for i in inside(hot)), ahead, outer is None, len(alike))


def is_a(opcode, names):
    return re.fullmatch(names, opcode.split(".")[0]) is not None


def count(opcodes, names):
    return sum(n for opcode, n in opcodes.items() if is_a(opcode, names))


def contains(a, b):
    return a != b and a[0] <= b[0] and b[1] <= a[1]


def meet(a, b):
    return a[0] <= b[1] and b[0] <= a[1]


def products(opcode, tile):
    """Multiplications of one tensor-core instruction, all of a CTA's warps together; 0 of another."""
    name, *suffixes = opcode.split(".")
    if name == "HMMA":
        return {"16816": 16 * 8 * 16, "1688": 16 * 8 * 8}[suffixes[0]] * tile.warps
    if name == "HGMMA":
        return math.prod(map(int, suffixes[0].split("x"))) * tile.warps // 4
    return tile.rows * tile.cols * 16 if is_a(opcode, TENSOR) else 0  # UTCHMMA is the CTA's


def pipe_cycles(opcodes, warps, device):
    """{pipe: cycles it is busy}, of a scheduler's share of a CTA."""
    cycles = {"issue": opcodes.total(), "fp32": device.fp32 * count(opcodes, FP32)}
    for pipe, (names, each) in PIPES.items():
        cycles[pipe] = sum(each * n * width(o, pipe) for o, n in opcodes.items() if is_a(o, names))
    return {pipe: c * warps / 4 for pipe, c in cycles.items()}


def width(opcode, pipe):
    return max(WIDE.get(part, 1) for part in opcode.split(".")) if pipe == "memory" else 1


def ctas(device, registers, shared, warps):
    """How many fit on an SM."""
    by_registers = REGISTERS // (-(-registers // 8) * 8 * 32 * warps)
    return min(by_registers, (device.shared + RESERVED) // (shared + RESERVED), device.warps // warps)


def ceiling(code, tile, device, resident, length, fed=False):
    """Share of the tensor cores' peak, of a reduction over ``length``; fed: with an L2 of any speed."""
    size = tile.rows * tile.cols * tile.depth
    trips = -(-length // tile.depth) * size / code.products
    tensor = 2 * code.products / device.flops
    moved = 0 if fed else 2 * (tile.rows + tile.cols) * tile.depth * code.products / size / device.l2
    loop, epilogue = (pipe_cycles(part, tile.warps, device) for part in (code.loop, code.epilogue))
    late = device.latency / code.ahead if code.ahead else device.latency
    alone = max(tensor, moved, late, *loop.values())
    serial = trips * alone + max(epilogue.values()) + ((2 if code.one_tile else 0) + code.loops) * device.latency
    busiest = max(trips * loop[pipe] + epilogue[pipe] for pipe in loop)
    useful = length / tile.depth * size / code.products
    return useful * tensor / max(serial / resident, trips * tensor, trips * moved, busiest)


def looked_at(label):
    """What a label says of its problem, None where none of its launches is looked at."""
    found = re.fullmatch(r"bfloat16(?P<pair>, beta (?:0\.3|1\.0))?, D (?P<depth>\d+)", label)
    return found if found and int(found["depth"]) in DEPTHS else None


def hot_launch(kernel, label, arguments):
    """-> name in the table, D, length of the reduction; None of a launch that is not looked at."""
    found = looked_at(label)
    if not found:
        return None
    depth, a = int(found["depth"]), arguments
    if found["pair"]:
        whole = a.get("flags_ptr") is None and a.get("ids_ptr") is None
        if not whole or kernel not in ("forward_pair_kernel", "dlogits_pair_kernel"):
            return None
        name = kernel.removesuffix("_kernel").replace("_", " ") + (" mixture" if 0 < a["beta"] < 1 else "")
        return name, depth, a["head"].D + a["teacher"].head.D
    if kernel == "forward_kernel" and a["flags_ptr"] is None:
        return "forward", depth, depth
    if kernel == "forward_kernel" and a["hint_ptr"] is not None:
        deep = a["w_desc"] is not None and depth >= tiles.DEEP  # which has a tile of its own
        return "forward certified deep" if deep else "forward certified", depth, depth
    if kernel in ("masses_kernel", "dlogits_kernel") and a.get("ids_ptr") is None:
        return kernel.removesuffix("_kernel"), depth, depth
    if kernel == "dhidden_kernel" and a["decay_ptr"] is None and a["ids_ptr"] is None:
        return "dhidden", depth, CHUNK
    if kernel == "dweight_kernel" and a["ids_ptr"] is None:
        return "dweight", depth, a["last_row"] - a["first_row"]
    return None


def tile_of(kernel, arguments):
    reduced = {"dhidden_kernel": "BLOCK_V", "dweight_kernel": "BLOCK_N"}.get(kernel, "BLOCK_D")
    rows, cols = (v for k, v in arguments.items() if k in ("BLOCK_N", "BLOCK_V", "BLOCK_D") and k != reduced)
    return Tile(rows, cols, arguments[reduced], arguments["num_warps"])


class Hot(NamedTuple):
    compiled: object
    tile: Tile
    lengths: dict  # {D: length of the reduction}


def collect(hot, label, kernel, arguments, compiled):
    """Into {name: Hot}, if it is a launch to look at."""
    found = hot_launch(kernel.fn.__name__, label, arguments)
    if found:
        name, depth, length = found
        entry = hot.setdefault(name, Hot(compiled, tile_of(kernel.fn.__name__, arguments), {}))
        if entry.compiled.hash != compiled.hash and depth not in entry.lengths:
            raise ValueError(f"{name}: D {depth} has a compilation of its own, the table has room for one")
        entry.lengths.setdefault(depth, length)


def cuobjdump(compiled, option):
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as f:
        f.write(compiled.asm["cubin"])
        f.flush()
        return subprocess.run([tool, option, f.name], capture_output=True, text=True, check=True).stdout


def measure(architecture, hot):
    """-> rows of the table."""
    import triton

    for name, (compiled, tile, lengths) in sorted(hot.items()):
        registers = int(re.search(r"REG:(\d+)", cuobjdump(compiled, "-res-usage"))[1])
        instructions = parse(cuobjdump(compiled, "-sass"))
        row = describe(instructions, tile, DEVICES[architecture], registers, compiled.metadata.shared, lengths)
        yield {"architecture": architecture, "kernel": name, "triton": triton.__version__, **row}


def describe(instructions, tile, device, registers, shared, lengths):
    code = read(instructions, tile)
    resident = ctas(device, registers, shared, tile.warps)
    steps = code.products / (tile.rows * tile.cols * tile.depth)
    busy = pipe_cycles(code.epilogue, tile.warps, device)
    return {
        "tile": f"{tile.rows}x{tile.cols}x{tile.depth}", "loop": code.loop.total(),
        "tensor": count(code.loop, TENSOR), "copies": count(code.loop, COPY), "ahead": code.ahead * steps,
        "buffers": shared // (2 * (tile.rows + tile.cols) * tile.depth), "epilogue": code.epilogue.total(),
        "busiest": max(busy, key=lambda pipe: busy[pipe]), "registers": registers, "ctas": resident,
        **{kind: {str(depth): round(ceiling(code, tile, device, resident, length, kind == "fed"), 3)
                  for depth, length in lengths.items()} for kind in KINDS},
    }  # fmt: skip


def load():
    return json.loads(COMMITTED.read_text()) if COMMITTED.exists() else {}


def save(rows):
    """Into the committed table, one line a kernel; architectures that were not compiled keep theirs."""
    new = {r["architecture"] for r in rows}
    kept = [r for r in load().get("kernels", []) if r["architecture"] not in new]
    lines = sorted(kept + rows, key=lambda r: (list(DEVICES).index(r["architecture"]), r["kernel"]))
    text = ",\n".join(json.dumps(line) for line in lines)
    devices = ",\n".join(f"{json.dumps(k)}: {json.dumps(d._asdict())}" for k, d in DEVICES.items())
    COMMITTED.write_text(f'{{"devices": {{\n{devices}\n}},\n"kernels": [\n{text}\n]}}\n')


def complaints(rows, committed, architectures):
    """What is worse than the committed table, as text."""
    new, old = ({(r["architecture"], r["kernel"]): r for r in some if r["architecture"] in architectures}
                for some in (rows, committed.get("kernels", [])))  # fmt: skip
    found = [f"{' '.join(key)}: committed and found differ, see --update" for key in sorted(new.keys() ^ old.keys())]
    for key in sorted(new.keys() & old.keys()):
        name, now, before = " ".join(key), new[key], old[key]
        if now["triton"] != before["triton"]:
            found.append(f"{name}: the committed ceilings are of Triton {before['triton']}, see --update")
        found += [
            f"{name}: {kind} at D {depth} is {100 * now[kind].get(depth, 0):.1f} %, was {100 * share:.1f} %"
            for kind in KINDS
            for depth, share in before[kind].items()
            if now[kind].get(depth, 0) < (1 - SLACK) * share
        ]
    return found


def table(rows):
    from rich.table import Table

    out = Table(title="Ceilings on tensor-core use in %, with L2 / without; not measured")
    columns = ("architecture", "kernel", "tile", "loop", "tensor", "copies", "ahead", "buffers", "epilogue", "busiest",
               "registers", "ctas")  # fmt: skip
    for name in (*columns, *(f"D {depth}" for depth in DEPTHS)):
        out.add_column(name, justify="left" if name in columns[:3] else "right")
    for row in rows:
        both = [(row["ceiling"].get(d), row["fed"].get(d)) for d in map(str, DEPTHS)]
        shares = ("" if fed is None else f"{100 * share:.0f} / {100 * fed:.0f}" for share, fed in both)
        out.add_row(*(str(row[name]) for name in columns), *shares)
    return out

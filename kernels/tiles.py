"""Tile sizes per kernel, operand width and architecture; every entry here is compiled by ``make kernel-report``.

Where ``python -m bench.tune`` has measured a device, measured/<its name>.json comes first: read once, never written
here, and no training step times anything.
"""

import functools
import json
import re
from pathlib import Path
from typing import NamedTuple

import torch

from fastgrpo.backends import interpreting


class Tile(NamedTuple):
    rows: int  # rows of the output tile
    cols: int  # its columns
    depth: int  # of one step of the reduction
    warps: int
    stages: int
    group: int = 8  # row blocks that run next to each other, so that they share the weight in L2
    registers: int | None = None  # a thread may take; None: as ptxas sees fit

    @property
    def options(self):
        """Of the launch, as Triton names them."""
        named = {"num_warps": self.warps, "num_stages": self.stages, "maxnreg": self.registers}
        return {name: value for name, value in named.items() if value is not None}


# {kernel: {operand bytes: {architecture: Tile}}}; "default" serves architectures without a line of their own, and
# "sm_90 TMA" Hopper where both operands come by tensor descriptors, "sm_90 TMA deep" there from D = DEEP on: measured
# on an H200; "sm_100 TMA" was not.
# sm_86, sm_89 and sm_120 have 99 KB of shared memory; fp32 runs in IEEE fp32, whose register tile is smaller.
FP32 = {"default": Tile(64, 64, 32, 4, 2)}
FP32_SHALLOW = {"default": Tile(64, 64, 16, 8, 2)}
FP32_NARROW = {"default": Tile(64, 32, 16, 4, 1)}  # with LoRA 64 x 64 spills 16-56 bytes on sm_80, 90, 100 and 120
SPILLING = dict.fromkeys(("sm_80", "sm_100", "sm_120"), FP32_NARROW["default"])  # 64 x 64 forwards, on Triton 3.6.0
SQUARE = {
    "default": Tile(128, 128, 32, 8, 3),
    "sm_90": Tile(128, 128, 64, 8, 3),
    "sm_100": Tile(128, 128, 64, 8, 3),
    "gfx942": Tile(128, 128, 32, 8, 2),
}
NARROW = {
    "default": Tile(128, 64, 32, 8, 3),
    "sm_90": Tile(128, 64, 64, 8, 3),
    "sm_100": Tile(128, 64, 64, 8, 3),
    "gfx942": Tile(128, 64, 32, 8, 2),
}
TMA, DEEP_TMA, DEEP = "sm_90 TMA", "sm_90 TMA deep", 2048
WIDE = {TMA: Tile(128, 256, 64, 8, 3)}
SMALL = {"default": Tile(64, 64, 32, 8, 3), "sm_100": Tile(64, 64, 64, 8, 3), "gfx942": Tile(64, 64, 32, 8, 2)}
SMALL_TWICE = {**SMALL, "default": SMALL["default"]._replace(warps=4)}  # two an SM; forwards with options spill
LOGITS = {**SQUARE, "sm_80": Tile(128, 128, 64, 8, 3)}
PAIR = {TMA: Tile(128, 128, 64, 8, 4)}  # by pieces, see pair_cuts
POINTERS = Tile(128, 64, 32, 8, 3)  # where descriptors cannot read one of two models
FP32_PAIR = {"default": Tile(32, 32, 16, 8, 1)}
TWO_AN_SM = {TMA: Tile(128, 128, 64, 4, 3)}  # one computes while the other stores
TILES = {
    "forward": {2: {**LOGITS, **WIDE}, 4: {**FP32, **SPILLING}},
    # bias, softcap, LoRA, per-token temperature or entropy: more values live at once (sm_100 spills at 128 columns)
    "forward_full": {
        2: {**SQUARE, TMA: SQUARE["sm_90"], **dict.fromkeys(("sm_90", "sm_100"), Tile(128, 64, 64, 8, 3))},
        4: {**FP32_NARROW, "sm_100": Tile(64, 32, 16, 8, 2)},  # with four warps it spills
    },
    "forward_certified": {
        2: {
            **LOGITS,
            **TWO_AN_SM,
            DEEP_TMA: WIDE[TMA],  # its epilogue is short beside the products, and L2 what two an SM wait for
            **dict.fromkeys(("sm_80", "sm_90"), Tile(128, 128, 32, 8, 4)),
            "sm_100": Tile(128, 64, 64, 4, 3),  # two an SM; 128 columns spill
        },
        4: {**FP32, **dict.fromkeys(("sm_86", "sm_89", "sm_90"), Tile(64, 64, 32, 4, 1)), **SPILLING},
    },
    "forward_certified_full": {
        2: {**NARROW, "sm_90": Tile(128, 64, 32, 8, 3), TMA: NARROW["sm_90"]},
        4: {**FP32_NARROW, "sm_90": Tile(32, 32, 16, 4, 2)},
    },
    "dlogits": {
        2: {**LOGITS, **TWO_AN_SM, "sm_100": TWO_AN_SM[TMA]},
        4: FP32_SHALLOW,
    },
    "dlogits_full": {
        2: {**NARROW, **dict.fromkeys(("sm_86", "sm_89", "sm_120"), Tile(64, 64, 32, 4, 3))},
        4: FP32_NARROW,
    },
    # of two models: two tiles of logits at once
    "forward_pair": {2: {**NARROW, **PAIR, "sm_90": POINTERS}, 4: FP32_NARROW},
    "forward_pair_full": {2: NARROW, 4: FP32_NARROW},
    "forward_pair_mixture": {2: {**SMALL_TWICE, **PAIR, "sm_80": Tile(64, 128, 32, 4, 2)}, 4: FP32_NARROW},
    "forward_pair_mixture_full": {2: SMALL, 4: FP32_NARROW},
    # a row's sums and moments take registers too
    "forward_pair_certified": {
        2: {
            **SMALL,
            **PAIR,
            "sm_80": SMALL_TWICE["default"],
            "sm_90": POINTERS,
            "sm_100": NARROW["sm_100"],
        },
        4: FP32_PAIR,
    },
    "forward_pair_certified_full": {2: {**SMALL, "gfx942": Tile(64, 32, 32, 4, 2)}, 4: FP32_PAIR},
    "forward_pair_mixture_certified": {
        2: {**SMALL_TWICE, "sm_90": POINTERS._replace(stages=2), TMA: PAIR[TMA]._replace(stages=3)},
        4: FP32_PAIR,
    },
    "forward_pair_mixture_certified_full": {2: SMALL, 4: FP32_PAIR},
    "dlogits_pair": {2: {**NARROW, **PAIR}, 4: FP32_NARROW},
    "dlogits_pair_full": {2: {**NARROW, "sm_100": SMALL["sm_100"]}, 4: FP32_NARROW},
    "dlogits_pair_mixture": {
        2: {**SMALL_TWICE, **PAIR, "sm_80": Tile(64, 128, 32, 4, 3), "sm_100": NARROW["sm_100"]},
        4: FP32_NARROW,
    },
    "dlogits_pair_mixture_full": {2: SMALL_TWICE, 4: FP32_NARROW},
    "masses": {2: {**LOGITS, **TWO_AN_SM}, 4: FP32},
    "masses_full": {2: NARROW, 4: FP32_NARROW},
    "dhidden": {2: {**SQUARE, **WIDE}, 4: FP32_SHALLOW},
    "dweight": {
        2: {**SQUARE, **WIDE, "sm_100 TMA": WIDE[TMA]},
        4: {**FP32, **dict.fromkeys(("sm_80", "sm_120"), FP32_SHALLOW["default"])},  # deeper it spills on Triton 3.9
    },
}
INTERPRETER = Tile(32, 64, 32, 4, 1, group=2)
COPY = Tile(16, 256, 0, 4, 1)  # of rows that are only gathered or scattered
LABELS = Tile(8, 256, 0, 4, 1)  # of the labels' logits
HELD = Tile(8, 128, 0, 4, 1)  # of logits that are held, read again
AUDIT = {2: Tile(128, 128, 32, 8, 3), 4: Tile(64, 64, 16, 4, 2)}  # audited entries, columns; rows at once
AUDIT_INTERPRETER = Tile(128, 128, 64, 4, 1)
LEVEL_ROWS = 32
LANES = 4  # of a warp, that have the columns of a row of the tensor cores' result
WIDTH = 128  # entries of a panel of dlogits; a multiple of every backward tile's sides
ROW_BLOCK = 1024  # of the elementwise kernels over tokens
COMBINE_BLOCK, COMBINE_RUNS = 128, 8
WIDEST_TILE = 128 * 256  # values of the largest tile: 128 a thread of 8 warps
ARCHITECTURES = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942")


def cdiv(a, b):
    """Of the host's numbers; Triton's own takes as long as a tenth of a launch."""
    return -(-a // b)


# {architecture: kernels whose tiles of both operands come by tensor descriptors (TMA)}; of the others on sm_100 no
# ceiling is higher by them for certain, and wider tiles spill
DESCRIBED = {"sm_90": tuple(TILES), "sm_100": ("dweight",)}


def lookup(kernel, bytes_per_value, architecture, described=False, depth=0):
    table = TILES[kernel][bytes_per_value]
    tile = table.get(architecture, table["default"])
    if described:
        tile = table.get(f"{architecture} TMA", tile)
    tile = deep_tile(kernel, bytes_per_value, architecture, described, depth) or tile
    return capped(kernel, bytes_per_value, architecture, tile)


def deep_tile(kernel, bytes_per_value, architecture, described, depth):
    """The one that logits of such a D have instead of the others', or None."""
    return TILES[kernel][bytes_per_value].get(f"{architecture} TMA deep") if described and depth >= DEEP else None


def capped(kernel, bytes_per_value, architecture, tile):
    """The tile with the limit on registers that it needs."""
    stops_early = kernel.startswith(("forward", "dlogits")) or (kernel, bytes_per_value) == ("dhidden", 4)
    if architecture.startswith("sm_") and (stops_early or tile.rows * tile.cols >= WIDEST_TILE):
        # Left alone, ptxas stops at 96, 128 or 168 and spills a few bytes for an occupancy it does not reach.
        tile = tile._replace(registers=255)
    return tile


@functools.cache
def architecture(device):
    """ "sm_90", "gfx942", ... of a device; datacentre Blackwell's variants share sm_100's entry."""
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return properties.gcnArchName.split(":")[0]
    return {(10, 3): "sm_100", (12, 1): "sm_120"}.get(
        (properties.major, properties.minor), f"sm_{properties.major}{properties.minor}"
    )


def for_tensor(kernel, dtype, device, described=False, depth=0):
    """The tile a launcher uses. described: whether both operands come by tensor descriptors. depth: D of logits."""
    if interpreting():
        return INTERPRETER
    size, name = dtype.itemsize, architecture(device)
    deep = deep_tile(kernel, size, name, described, depth)
    tile = measured(device).get((kernel, size, described)) if deep is None else None
    return lookup(kernel, size, name, described, depth) if tile is None else tile


def for_held(device):
    return HELD if interpreting() else capped("forward", 4, architecture(device), HELD)


def for_audit(dtype):
    return AUDIT_INTERPRETER if interpreting() else AUDIT[dtype.itemsize]


def column_parts(tile, bytes_per_value, device):
    """Into how many parts a forward's sums over a tile's columns fall within its loop: those that one thread holds."""
    if interpreting():
        return 4
    return parts_of(tile, bytes_per_value, architecture(device))


def pair_cuts(tile):
    """How many times two models' tiles are halved, so that all that is made of a piece's cells fits the registers."""
    if interpreting():
        return 1
    if tile.rows * tile.cols > 32 * 32 * tile.warps:
        return 3
    return max(tile.cols // PAIR_FLAGS, 1).bit_length() - 1  # a piece's flags are of one group


def flag_columns(kernel, tile):
    """Entries that share their words of a certified forward's flags."""
    return min(tile.cols, PAIR_FLAGS if "pair" in kernel else ONE_FLAGS)


def parts_of(tile, bytes_per_value, architecture):
    if bytes_per_value == 4 or architecture not in ("sm_80", "sm_86", "sm_89", "sm_90", "sm_120"):
        return 1
    if architecture == "sm_90":
        return LANES
    down = across = 1  # as Triton lays warps over tensor cores' pieces of 16 x 8
    while down * across < tile.warps:
        if tile.rows // (16 * down) >= tile.cols // (8 * across):
            down *= 2
        else:
            across *= 2
    return min(LANES * across, tile.cols // 2)


def has_descriptors(device, kernel):
    return not interpreting() and kernel in DESCRIBED.get(architecture(device), ())


MEASURED = Path(__file__).with_name("measured")
# What must divide WIDTH: the sides of dlogits' panels that a kernel writes or reads.
IN_PANELS = {
    **dict.fromkeys(("dlogits", "dlogits_pair", "dlogits_pair_mixture", "masses"), ("rows", "cols")),
    **dict.fromkeys(("dhidden", "dweight"), ("rows", "depth")),
}
PAIR_FLAGS, ONE_FLAGS = 64, 128  # entries that share their words of flags in two models' forward, in one's, at most
FLAGGED = 32, 256  # columns of a forward's tile at least, a word of flags, and at most
NOTES = ("device", "architecture", "torch", "triton", "date")  # of a measured file, beside its tiles
ENTRY = {"kernel": str, "bytes": int, "described": bool, "tile": dict}
SIZES = Tile._fields[:-1]  # registers follow from the rest


class Measured(NamedTuple):
    architecture: str
    table: dict  # {(kernel, operand bytes, described): Tile}


def slug(name):
    """A device's name as a file's: "NVIDIA H200" -> "nvidia-h200"."""
    return re.sub("[^a-z0-9]+", "-", name.lower()).strip("-")


@functools.cache
def measured(device):
    """{(kernel, operand bytes, described): Tile} of a device; empty where it was never measured."""
    if device.type != "cuda":
        return {}
    path = MEASURED / f"{slug(torch.cuda.get_device_name(device))}.json"
    if not path.is_file():
        return {}
    found = read_measured(path)
    if found.architecture != architecture(device):
        raise ValueError(f"{path}: architecture must be {architecture(device)!r}, got {found.architecture!r}")
    return found.table


def read_measured(path):
    """:class:`Measured` of a file that bench/tune.py wrote; ValueError where the kernels could not run its tiles."""
    path = Path(path)
    try:
        content = json.loads(path.read_text())
        for name in NOTES:
            check(isinstance(content, dict) and isinstance(content.get(name), str), f"{name!r} must be a text")
        check(slug(content["device"]) == path.stem, f"the file of {content['device']!r} has another name")
        check(isinstance(content.get("tiles"), list), "'tiles' must be a list")
        table = dict(read_entry(entry, content["architecture"]) for entry in content["tiles"])
        check(len(table) == len(content["tiles"]), "two tiles of one kernel, operand bytes and way to read them")
        check_table(table, content["architecture"])
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return Measured(content["architecture"], table)


def read_entry(entry, architecture):
    """-> key, Tile."""
    for name, kind in ENTRY.items():
        value = entry.get(name) if isinstance(entry, dict) else None
        check(type(value) is kind, f"{name!r} must be of type {kind.__name__}, got {value!r}")
    kernel, size, described, sizes = (entry[name] for name in ENTRY)
    check(set(sizes) == set(SIZES), f"a tile has {', '.join(SIZES)}, got {sorted(sizes)}")
    tile = Tile(**sizes)
    check_tile(kernel, size, tile, architecture)
    return (kernel, size, described), capped(kernel, size, architecture, tile)


def check_tile(kernel, bytes_per_value, tile, architecture):
    """ValueError where a kernel cannot have the tile."""
    check(kernel in TILES, f"kernel must be one of {', '.join(TILES)}, got {kernel!r}")
    check(bytes_per_value in TILES[kernel], f"bytes must be 2 or 4, got {bytes_per_value!r}")
    least = {"rows": 16, "cols": 16, "depth": 16, "warps": 1}
    for name in least:
        size = getattr(tile, name)
        power = type(size) is int and size >= least[name] and size & (size - 1) == 0
        check(power, f"{kernel}: {name} must be a power of two of at least {least[name]}, got {size!r}")
    for name in ("stages", "group"):
        size = getattr(tile, name)
        check(type(size) is int and size >= 1, f"{kernel}: {name} must be a number of at least 1, got {size!r}")
    check(tile.warps <= 8, f"{kernel}: warps must be at most 8, got {tile.warps}")
    # with fewer Triton 3.7.1 gives the second model's sums the tensor memory of the first's, which are still to be read
    overwrites = architecture == "sm_100" and "pair" in kernel and bytes_per_value == 2 and tile.warps < 8
    check(not overwrites, f"{kernel}: warps must be 8 on sm_100, got {tile.warps}")
    for name in IN_PANELS.get(kernel.removesuffix("_full"), ()):
        size = getattr(tile, name)
        check(WIDTH % size == 0, f"{kernel}: {name} must divide {WIDTH}, got {size}")
    if kernel.startswith("forward"):
        first, last = FLAGGED
        last = 2 * PAIR_FLAGS if kernel.startswith("forward_pair") and "certified" in kernel else last
        check(first <= tile.cols <= last, f"{kernel}: cols must be in [{first}, {last}], got {tile.cols}")


def check_table(table, architecture):
    """ValueError where the tiles of a device do not go together: the backward reads the forward's flags, also
    where a saved weight comes back in another layout."""
    for kernel, size, _ in table:
        if "certified" in kernel:
            ways = (False, kernel in DESCRIBED.get(architecture, ()))
            found = [table.get((kernel, size, way)) or lookup(kernel, size, architecture, way) for way in ways]
            shapes = {(tile.rows, flag_columns(kernel, tile)) for tile in found}
            check(len(shapes) == 1, f"{kernel}: rows and cols must not depend on descriptors, got {sorted(shapes)}")


def check(holds, complaint):
    if not holds:
        raise ValueError(complaint)

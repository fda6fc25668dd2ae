"""Tile sizes per kernel, operand width and architecture; every entry here is compiled by ``make kernel-report``."""

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


# {kernel: {operand bytes: {architecture: Tile}}}; "default" serves architectures without a line of their own.
# sm_86, sm_89 and sm_120 have 99 KB of shared memory; fp32 runs in IEEE fp32, whose register tile is smaller.
FP32 = {"default": Tile(64, 64, 32, 4, 2)}
FP32_NARROW = {"default": Tile(64, 32, 16, 4, 1)}  # with LoRA 64 x 64 spills 16-56 bytes on sm_80, 90, 100 and 120
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
LOGITS = {**SQUARE, "sm_80": Tile(128, 128, 64, 8, 3)}
TILES = {
    "forward": {2: LOGITS, 4: FP32},
    # bias, softcap, LoRA, per-token temperature or entropy: more values live at once (sm_100 spills at 128 columns)
    "forward_full": {
        2: {**LOGITS, "sm_100": Tile(128, 64, 64, 8, 3)},
        4: {**FP32_NARROW, "sm_100": Tile(64, 32, 16, 4, 2)},  # without a second buffer Triton 3.6 spills
    },
    "forward_certified": {
        2: {**LOGITS, "sm_100": Tile(128, 64, 64, 8, 3)},
        4: FP32,
    },
    "forward_certified_full": {
        2: NARROW,
        4: {**FP32_NARROW, "sm_90": Tile(32, 32, 16, 4, 2)},
    },
    "dlogits": {2: LOGITS, 4: {**FP32, **dict.fromkeys(("sm_90", "sm_100", "sm_120"), Tile(64, 64, 16, 4, 2))}},
    "dlogits_full": {2: NARROW, 4: FP32_NARROW},
    "masses": {2: LOGITS, 4: FP32},
    "masses_full": {2: NARROW, 4: FP32_NARROW},
    "dhidden": {2: SQUARE, 4: {**FP32, "sm_100": Tile(64, 64, 16, 4, 2)}},
    "dweight": {2: SQUARE, 4: FP32},
}
INTERPRETER = Tile(32, 64, 32, 4, 1, group=2)
COPY = Tile(16, 256, 0, 4, 1)  # of rows that are only gathered or scattered
LEVEL_ROWS = 32
WIDTH = 128  # the dlogits buffer's columns are a multiple of it, and it of every tile's columns
ROW_BLOCK = 1024  # of the elementwise kernels over tokens
COMBINE_BLOCK, COMBINE_RUNS = 128, 8
ARCHITECTURES = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942")


def lookup(kernel, bytes_per_value, architecture):
    table = TILES[kernel][bytes_per_value]
    tile = table.get(architecture, table["default"])
    stops_early = kernel.startswith("forward") or (kernel, bytes_per_value) == ("dhidden", 4)
    if stops_early and architecture.startswith("sm_"):
        # Left alone, ptxas stops at 96, 128 or 168 and spills a few bytes for an occupancy it does not reach.
        tile = tile._replace(registers=255)
    return tile


def architecture(device):
    """ "sm_90", "gfx942", ... of a device; datacentre Blackwell's variants share sm_100's entry."""
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return properties.gcnArchName.split(":")[0]
    return {(10, 3): "sm_100", (12, 1): "sm_120"}.get(
        (properties.major, properties.minor), f"sm_{properties.major}{properties.minor}"
    )


def for_tensor(kernel, dtype, device):
    """The tile a launcher uses."""
    if interpreting():
        return INTERPRETER
    return lookup(kernel, dtype.itemsize, architecture(device))

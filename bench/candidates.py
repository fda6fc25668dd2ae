"""The tiles worth a try, and what each compiles to: for bench.tune and bench.first_contact."""

import contextlib
import itertools
from typing import NamedTuple


class Tuned(NamedTuple):
    """A kernel with operands of one kind."""

    kernel: str
    bytes: int = 2  # of an operand
    padded: bool = False  # operands that descriptors cannot read, on devices where others come by them


ONE = ("forward", "forward_certified", "dlogits", "masses", "dhidden", "dweight")
TWO = (
    "forward_pair", "dlogits_pair", "forward_pair_certified", "forward_pair_mixture", "dlogits_pair_mixture",
    "forward_pair_mixture_certified",
)  # fmt: skip
GROUPS = {  # what matters most comes first
    "one": {kernel: Tuned(kernel) for kernel in ONE},
    "two": {kernel: Tuned(kernel) for kernel in TWO},
    "pointers": {f"{kernel}:pointers": Tuned(kernel, padded=True) for kernel in TWO},
    "fp32": {f"{kernel}:fp32": Tuned(kernel, bytes=4) for kernel in ONE},
}
TUNED = {name: tuned for group in GROUPS.values() for name, tuned in group.items()}
FULL = tuple(f"{kernel}_full" for kernel in ("forward", "forward_certified", "dlogits", "masses", *TWO))
LEFT_OUT = {  # {name: why}
    **dict.fromkeys(
        [f"{kernel}{kind}" for kernel in FULL for kind in ("", ":pointers", ":fp32")],
        "which of the options are on decides what is fast: each would have to be timed",
    ),
    **dict.fromkeys([f"{kernel}:pointers" for kernel in ONE], "rare, and timed on an H200 when there was no other way"),
    **dict.fromkeys([f"{kernel}:fp32" for kernel in TWO], "two fp32 products take the time of all others"),
}
# rows, cols, warps: 64 to 128 sums a thread, of two models together. The first are the likeliest.
SHAPES = (
    (128, 256, 8), (128, 128, 4), (128, 128, 8), (256, 128, 8), (64, 256, 4), (64, 256, 8), (128, 64, 4), (64, 128, 4),
)  # fmt: skip
PAIR_SHAPES = (
    (128, 128, 8), (128, 64, 8), (64, 128, 8), (128, 64, 4), (64, 128, 4), (64, 64, 4), (64, 64, 8), (64, 256, 8),
)  # fmt: skip
FP32_SHAPES = (
    (64, 64, 4), (64, 64, 8), (128, 64, 8), (64, 128, 8), (64, 32, 4), (32, 64, 4), (128, 32, 4), (32, 32, 4),
)  # fmt: skip
STEPS = ((64, 3), (64, 4), (64, 2), (128, 2), (32, 4), (128, 3), (64, 5), (32, 5))  # depth, stages
PAIR_STEPS = ((64, 3), (64, 4), (32, 4), (64, 2), (128, 2), (32, 3))
FP32_STEPS = ((32, 2), (16, 2), (32, 1), (16, 1), (16, 3))
GROUP_SIZES = (4, 16)  # of the tile shipped; 8 of all
UNGROUPED = ("dhidden", "dweight")


def names_on(architecture):
    """What can be tuned there."""
    from fastgrpo.kernels import tiles

    described = tiles.DESCRIBED.get(architecture, ())
    return [name for name, tuned in TUNED.items() if not tuned.padded or tuned.kernel in described]


def key_of(name, architecture):
    """Under which a tile measured is shipped: kernel, operand bytes, whether operands come by descriptors."""
    from fastgrpo.kernels import tiles

    kernel, size, padded = TUNED[name]
    return kernel, size, size == 2 and not padded and kernel in tiles.DESCRIBED.get(architecture, ())


def candidates(name, architecture):
    """-> [Tile], first the one shipped, then by how likely it seems, of those that could run."""
    from fastgrpo.kernels import report, tiles

    kernel, size, described = key_of(name, architecture)
    shipped = tiles.lookup(kernel, size, architecture, described)
    groups = [shipped._replace(group=group) for group in GROUP_SIZES if kernel not in UNGROUPED]
    steps, shapes = (FP32_STEPS, FP32_SHAPES) if size == 4 else (STEPS, SHAPES)
    if "pair" in kernel:
        steps, shapes = PAIR_STEPS, PAIR_SHAPES
    grid = [
        tiles.capped(kernel, size, architecture, tiles.Tile(rows, cols, depth, warps, stages))
        for (depth, stages), (rows, cols, warps) in itertools.product(steps, shapes)
    ]
    room = report.SHARED_LIMIT.get(architecture, min(report.SHARED_LIMIT.values()))
    found = dict.fromkeys([shipped, *groups, *grid])
    return [t for t in found if t == shipped or admissible(kernel, size, architecture, t, shipped, room)]


def admissible(kernel, size, architecture, tile, shipped, room):
    from fastgrpo.kernels import tiles

    try:
        tiles.check_tile(kernel, size, tile, architecture)
    except ValueError:
        return False
    flags = [(t.rows, tiles.flag_columns(kernel, t)) for t in (tile, shipped)]
    if "certified" in kernel and flags[0] != flags[1]:  # the backward reads them, whichever way it takes
        return False
    return tile.stages * (tile.rows + tile.cols) * tile.depth * size <= room


@contextlib.contextmanager
def using(table):
    """Inside, the launchers take these tiles: {(kernel, operand bytes, described): Tile}, of others those shipped."""
    from fastgrpo.kernels import tiles

    plain = tiles.for_tensor

    def for_tensor(kernel, dtype, device, described=False, depth=0):
        tile = table.get((kernel, dtype.itemsize, described))
        return plain(kernel, dtype, device, described, depth) if tile is None else tile

    tiles.for_tensor = for_tensor
    try:
        yield
    finally:
        tiles.for_tensor = plain


def compile_tile(key, tile, architecture, everything=False):
    """Compile a tile ahead of time, without touching the device; -> {"ok", "registers", "shared", "error" if not}.

    Args:
        key: as of :func:`key_of`.
        everything: in each variant of the kernel that would take it, not only in those without options.
    """
    import triton

    from fastgrpo.kernels import report

    triton.runtime.driver.set_active(report.Target(architecture))
    usage = report.amd_usage if architecture.startswith("gfx") else report.nvidia_usage
    rows, seen = [], set()
    with using({key: tile}):
        only = None if everything else plain_operands(key, architecture)
        for label, launched, arguments in report.recorded_launches(architecture, (2048,), only):
            if not takes(launched, arguments, key[0], tile):
                continue
            compiled = launched.warmup(**arguments, grid=(1,))
            if compiled.hash not in seen:
                seen.add(compiled.hash)
                row = {"architecture": architecture, "kernel": launched.fn.__name__, "variant": label}
                rows.append({**row, "shared": compiled.metadata.shared, **usage(compiled)})
    wrong = [f"{row['variant']}: {complaint}" for row in rows for complaint in report.complaints(row)]
    if not rows:
        wrong = ["nothing launches it"]
    result = {"ok": not wrong, "variants": len(rows)} | ({"error": "; ".join(wrong)[:400]} if wrong else {})
    return result | {name: max((row[name] for row in rows), default=0) for name in ("registers", "shared")}


def plain_operands(key, architecture):
    """What kernels/report.py calls a problem without options whose kernels take this tile."""
    from fastgrpo.kernels import tiles

    kernel, size, described = key
    if size == 4:
        return "float32"
    by_pointers = not described and kernel in tiles.DESCRIBED.get(architecture, ())
    return "bfloat16 by pointers" if by_pointers else "bfloat16"


def takes(launched, arguments, kernel, tile):
    """Whether a launch is one of the kernel's with this tile."""
    blocks = [value for key, value in arguments.items() if key.startswith("BLOCK")]
    options = {key: arguments.get(key) for key in tile.options}
    group = arguments.get("GROUP", tile.group)
    found = (name_of(launched, arguments), blocks, group, options)
    return found == (kernel.removesuffix("_full"), list(tile[:3]), tile.group, tile.options)


def name_of(launched, arguments):
    """Whose tile a launch takes, less "_full"."""
    name = launched.fn.__name__.removesuffix("_kernel")
    known = name == "forward_pair" and arguments["stats_ptr"] is not None
    name += "_mixture" if known or arguments.get("KIND") == 2 else ""
    return name + ("_certified" if arguments.get("flags_ptr") is not None else "")

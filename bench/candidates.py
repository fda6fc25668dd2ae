"""The tiles worth a try, and what each compiles to: for bench.tune and bench.first_contact."""

import contextlib
import itertools

TUNED = ("forward", "forward_certified", "dlogits", "masses", "dhidden", "dweight")
BYTES = 2  # of an operand: fp32 has one tile that fits, by what compiles
# rows, cols, warps: 64 to 128 sums a thread. The first are the likeliest.
SHAPES = (
    (128, 256, 8), (128, 128, 4), (128, 128, 8), (256, 128, 8), (64, 256, 4), (64, 256, 8), (128, 64, 4), (64, 128, 4),
)  # fmt: skip
STEPS = ((64, 3), (64, 4), (64, 2), (128, 2), (32, 4), (128, 3), (64, 5), (32, 5))  # depth, stages
GROUPS = (4, 16)  # of the tile shipped; 8 of all
GROUPED = ("forward", "forward_certified", "dlogits", "masses")


def key_of(kernel, architecture):
    """Under which a tile measured is shipped: kernel, operand bytes, whether operands come by descriptors."""
    from fastgrpo.kernels import tiles

    return kernel, BYTES, kernel in tiles.DESCRIBED.get(architecture, ())


def candidates(kernel, architecture):
    """-> [Tile], first the one shipped, then by how likely it seems, of those that could run."""
    from fastgrpo.kernels import report, tiles

    key = key_of(kernel, architecture)
    shipped = tiles.lookup(*key[:2], architecture, key[2])
    groups = [shipped._replace(group=group) for group in GROUPS] if kernel in GROUPED else []
    grid = [
        tiles.capped(kernel, BYTES, architecture, tiles.Tile(rows, cols, depth, warps, stages))
        for (depth, stages), (rows, cols, warps) in itertools.product(STEPS, SHAPES)
    ]
    room = report.SHARED_LIMIT.get(architecture, min(report.SHARED_LIMIT.values()))
    return [t for t in dict.fromkeys([shipped, *groups, *grid]) if t == shipped or admissible(kernel, t, shipped, room)]


def admissible(kernel, tile, shipped, room):
    from fastgrpo.kernels import tiles

    try:
        tiles.check_tile(kernel, BYTES, tile)
    except ValueError:
        return False
    if kernel.startswith("forward_certified") and tile[:2] != shipped[:2]:  # flags are laid out by them
        return False
    return tile.stages * (tile.rows + tile.cols) * tile.depth * BYTES <= room


@contextlib.contextmanager
def using(table):
    """Inside, the launchers take these tiles: {(kernel, operand bytes, described): Tile}, of others those shipped."""
    from fastgrpo.kernels import tiles

    plain = tiles.for_tensor

    def for_tensor(kernel, dtype, device, described=False):
        tile = table.get((kernel, dtype.itemsize, described))
        return plain(kernel, dtype, device, described) if tile is None else tile

    tiles.for_tensor = for_tensor
    try:
        yield
    finally:
        tiles.for_tensor = plain


def compile_tile(key, tile, architecture, everything=False):
    """Compile a tile ahead of time, without touching the device; -> {"ok", "registers", "shared", "error" if not}.

    Args:
        key: as of :func:`key_of`.
        everything: in each variant of the kernel that would take it, not only in those of plain bfloat16 operands.
    """
    import triton

    from fastgrpo.kernels import report

    triton.runtime.driver.set_active(report.Target(architecture))
    usage = report.amd_usage if architecture.startswith("gfx") else report.nvidia_usage
    rows, seen, first = [], set(), None
    with using({key: tile}):
        for label, launched, arguments in report.recorded_launches(architecture, depths=(2048,)):
            first = first or label
            if label != first and not everything:
                break
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


def takes(launched, arguments, kernel, tile):
    """Whether a launch is one of the kernel's with this tile."""
    name = launched.fn.__name__.removesuffix("_kernel")
    kernel = kernel.removesuffix("_full")
    name += "_certified" if arguments.get("flags_ptr") is not None else ""
    blocks = [value for key, value in arguments.items() if key.startswith("BLOCK")]
    options = {key: arguments.get(key) for key in tile.options}
    group = arguments.get("GROUP", tile.group)
    return (name, blocks, group, options) == (kernel, list(tile[:3]), tile.group, tile.options)

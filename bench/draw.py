"""PNG pictures of a suite's rows."""

import itertools

from matplotlib.figure import Figure

COLOURS = (
    "tab:red",
    "tab:orange",
    "gold",
    "black",
    "grey",
    "tab:blue",
    "tab:green",
    "tab:olive",
    "tab:cyan",
    "tab:purple",
    "tab:brown",
    "tab:pink",
    "navy",
    "teal",
)


def colour(entry):
    """An entry has the same colour in every picture."""
    from bench.divergences import NAMES

    return COLOURS[NAMES.index(entry) % len(COLOURS)]


def where(rows):
    days = sorted({row["date"][:10] for row in rows})
    return f"{rows[0]['device']}, torch {rows[0]['torch']}, {' to '.join(dict.fromkeys((days[0], days[-1])))}"


def save(figure, path, rows):
    figure.text(0.995, -0.01, where(rows), ha="right", va="top", fontsize=7, color="dimgrey")
    return write(figure, path)


def write(figure, path, **options):
    """On an opaque ground, which reads on a dark page too, and as large as its longest title: nothing is cut off."""
    figure.savefig(path, bbox_inches="tight", pad_inches=0.1, **{"dpi": 110, "facecolor": "white", **options})
    return path


def stacked_bars(rows, path, label):
    """Forward and backward of every entry, one panel a case."""
    titles = list(dict.fromkeys(r["title"] for r in rows))
    columns = min(3, len(titles))
    lines = -(-len(titles) // columns)
    figure = Figure(figsize=(6.2 * columns, 3.6 * lines), layout="constrained")
    axes = figure.subplots(lines, columns, squeeze=False)
    for axis in axes.flat[len(titles) :]:
        axis.remove()
    for axis, title in zip(axes.flat, titles):
        mine = [r for r in rows if r["title"] == title]
        left = [0.0] * len(mine)
        for phase, shade in (("forward", 1.0), ("backward", 0.5)):
            widths = [r[f"{phase}_seconds"] / r["gemm_seconds"] for r in mine]
            colours = [colour(r["entry"]) for r in mine]
            axis.barh([r["entry"] for r in mine], widths, left=left, color=colours, alpha=shade)
            left = [a + b for a, b in zip(left, widths)]
        spread = [
            [(r["both_seconds"] - r["both_low"]) / r["gemm_seconds"] for r in mine],
            [(r["both_high"] - r["both_seconds"]) / r["gemm_seconds"] for r in mine],
        ]
        axis.errorbar(left, range(len(mine)), xerr=spread, fmt="none", ecolor="black", elinewidth=1, capsize=2)
        axis.axvline(1.0, color="black", linestyle=":", linewidth=1)
        axis.invert_yaxis()
        axis.set_title(title, fontsize=8)
        axis.set_xlabel(f"{label} (dotted: the floor)", fontsize=8)
        axis.tick_params(labelsize=8)
    return save(figure, path, rows)


def lines(rows, x, y, label, path):
    """y over x, a line an entry, bars from the fastest to the slowest repeat."""
    figure = Figure(figsize=(7.5, 4.8), layout="constrained")
    axis = figure.subplots()
    for entry in dict.fromkeys(r["entry"] for r in rows):
        mine = sorted((r for r in rows if r["entry"] == entry), key=lambda r: r[x])
        xs, ys = [r[x] for r in mine], [r[y] for r in mine]
        spread = None
        if y == "both_seconds":
            spread = [[r[y] - r["both_low"] for r in mine], [r["both_high"] - r[y] for r in mine]]
        axis.errorbar(xs, ys, yerr=spread, marker="o", markersize=3, capsize=2, color=colour(entry), label=entry)
    if y == "both_seconds":
        floor = sorted({(r[x], r["gemm_seconds"]) for r in rows})
        axis.plot(*zip(*floor), color="black", linestyle=":", label="one bare logits GEMM")
    fixed = "  ".join(f"{k} {rows[0][k]}" for k in ("N", "V", "D") if k != x)
    axis.set(xlabel={"N": "tokens N", "V": "vocabulary V", "D": "width D"}[x], ylabel=label, title=fixed)
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    axis.grid(alpha=0.3, which="both")
    figure.legend(loc="outside lower center", fontsize=7, ncols=4)
    return save(figure, path, rows)


def grid(rows, x, y, path, label="forward and backward, bare logits GEMMs"):
    """Grouped bars: y for every value of x and every entry."""
    values, names = (list(dict.fromkeys(r[k] for r in rows)) for k in (x, "entry"))
    figure = Figure(figsize=(max(7, 1.1 * len(values)), 4.6), layout="constrained")
    axis = figure.subplots()
    width = 0.85 / len(names)
    for i, name in enumerate(names):
        mine = {r[x]: r[y] for r in rows if r["entry"] == name}
        at = [k + i * width for k, v in enumerate(values) if v in mine]
        axis.bar(at, [mine[v] for v in values if v in mine], width, color=colour(name), label=name)
    axis.set_xticks([k + 0.4 for k in range(len(values))], values, rotation=30, ha="right", fontsize=8)
    axis.set(ylabel=label)
    figure.legend(loc="outside lower center", fontsize=7, ncols=5)
    return save(figure, path, rows)


def bars(rows, y, label, path, log=False):
    """One panel a title, a bar an entry."""
    panels = [(t, list(g)) for t, g in itertools.groupby(sorted(rows, key=lambda r: r["title"]), lambda r: r["title"])]
    figure = Figure(figsize=(6 * len(panels), 3.8), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False)
    for axis, (title, mine) in zip(axes[0], panels):
        axis.barh([r["entry"] for r in mine], [r[y] for r in mine], color=[colour(r["entry"]) for r in mine])
        if log:
            axis.set_xscale("log")
        axis.invert_yaxis()
        axis.set_title(title, fontsize=8)
        axis.set_xlabel(label, fontsize=8)
        axis.tick_params(labelsize=8)
    return save(figure, path, rows)

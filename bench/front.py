"""README's picture, numbers and table, from bench/results/ alone. ``python -m bench.front`` draws the picture again."""

import json
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

from bench import RESULTS, ROOT
from bench.draw import write
from bench.report import load, markdown

PICTURES = ROOT / "docs" / "pictures"
OURS = "fastgrpo auto"
NAMES = {
    OURS: "fastgrpo",
    "full logits, torch.compile": "full logits, compiled",
    "Liger Triton GRPO on logits": "Liger, its fastest",
    "TRL op": "TRL 1.16",
}
HEADLINE = "Qwen2.5-1.5B: N 16384, V 151936, D 1536, rl, bf16"
REAL = "SmolLM2-135M-Instruct: N 512, V 49152, D 576"
CASES = {  # title: (kind of device, what README says)
    HEADLINE: ("cuda", "Qwen2.5-1.5B, 16384 tokens, synthetic"),
    f"{HEADLINE}, frozen head": ("cuda", "the same, frozen head (LoRA)"),
    f"{REAL}, real, fp32": ("cpu", "SmolLM2-135M, 512 tokens, real, temperature 1.0"),
    f"{REAL}, real, fp32, frozen head": ("cpu", "the same, frozen head (LoRA)"),
    f"{REAL}, real-0.6, fp32": ("cpu", "SmolLM2-135M, 512 tokens, real, temperature 0.6"),
    f"{REAL}, real-0.6, fp32, frozen head": ("cpu", "the same, frozen head (LoRA)"),
}
THEMES = {
    "light": {
        "text": "#1f2328",
        "muted": "#59636e",
        "ours": "#0969da",
        "others": "#8c959f",
        "box": "#f6f8fa",
        "no": "#cf222e",
    },
    "dark": {
        "text": "#f0f6fc",
        "muted": "#9198a1",
        "ours": "#58a6ff",
        "others": "#6e7681",
        "box": "#161b22",
        "no": "#ff7b72",
    },
}


def find(title, kind):
    """{entry: row} of a case's rows that have a time and are correct."""
    rows = [r for r in load(RESULTS, "loss", kind) if r["title"] == title]
    return {r["entry"]: r for r in rows if "both_seconds" in r and r["correct"]}


def chosen(title, kind):
    """The rows README names, in its order; "Liger" is whichever of its entries is the fastest here."""
    rows = find(title, kind)
    liger = min((r for name, r in rows.items() if name.startswith("Liger")), key=lambda r: r["both_seconds"])
    return [liger if name.startswith("Liger") else rows[name] for name in NAMES]


def quickest_other():
    """-> (name, row of the frozen head, row of the trained head); of all entries but ours, the same in both cases."""
    trained, frozen = find(HEADLINE, "cuda"), find(f"{HEADLINE}, frozen head", "cuda")
    names = {
        min((n for n in rows if not n.startswith("fastgrpo")), key=lambda n: rows[n]["both_seconds"])
        for rows in (trained, frozen)
    }
    (name,) = names
    return name, frozen[name], trained[name]


def milliseconds(row):
    return f"{row['both_seconds'] * 1e3:.0f} ms"


def memory(row):
    return f"{row['peak_mib']:,.0f} MiB"


def numbers():
    """Three figures, as README has them."""
    ours, compiled, _, trl = chosen(HEADLINE, "cuda")
    frozen = chosen(f"{HEADLINE}, frozen head", "cuda")
    name, theirs_frozen, theirs = quickest_other()
    head = f"{ours['shape']}'s head ({ours['V']} words, {ours['dtype']}), synthetic logits as peaked as in RL"
    lines = (
        f"Measured on one {ours['device']}: {ours['N']} tokens, {head}.\n",
        f"- **{memory(ours)}** of scratch memory. Full logits under torch.compile take {memory(compiled)}, "
        f"TRL's op {memory(trl)}.",
        f"- **{milliseconds(frozen[0])}** forward and backward with a frozen head (LoRA), {milliseconds(ours)} with a "
        f"trained one. The fastest other, {name}, takes {milliseconds(theirs_frozen)} and {milliseconds(theirs)}.",
        f"- **{ours['logp_rms_error']:.1e} nats** of rms error in a log-prob. TRL's op and full logits, which round to "
        f"bf16, have {trl['logp_rms_error']:.1e}.",
    )
    return "\n".join(lines)


def results():
    """The table of the default mode beside the others: time, and scratch memory where it was measured."""
    lines = []
    for title, (kind, text) in CASES.items():
        rows = chosen(title, kind)
        fastest = min(r["both_seconds"] for r in rows)
        times = [f"**{milliseconds(r)}**" if r["both_seconds"] == fastest else milliseconds(r) for r in rows]
        cells = [time + (f", {memory(r)}" if "peak_mib" in r else "") for time, r in zip(times, rows)]
        lines.append((f"{rows[0]['device']}: {text}", *cells))
    return markdown(("loss head, forward and backward", *NAMES.values()), lines)


def passes():
    """docs/gpu.md's table: the "rl" cases of the GPU in units of one bare product."""
    rows = [r for r in load(RESULTS, "loss", "cuda") if r["profile"] == "rl" and not r["zero_share"]]
    titles = list(dict.fromkeys(r["title"] for r in rows))
    lines = []
    for name, label in NAMES.items():
        found = [next(r for r in rows if r["title"] == t and r["entry"] == name) for t in titles]
        lines.append((label if name == OURS else name, *(f"{r['gemms']:.1f}, {memory(r)}" for r in found)))
    return markdown(("loss head", *titles), lines)


def figures():
    """What the picture shows: {panel: {bar: [trained head, frozen head]}}."""
    pairs = list(zip(chosen(HEADLINE, "cuda"), chosen(f"{HEADLINE}, frozen head", "cuda"), strict=True))
    return {
        "time (ms)": {name: [r["both_seconds"] * 1e3 for r in pair] for name, pair in zip(NAMES.values(), pairs)},
        "scratch memory (MiB)": {name: [r["peak_mib"] for r in pair] for name, pair in zip(NAMES.values(), pairs)},
    }


def draw_front(theme, path):
    """Left: what is left out; right: what that costs. The figures are also in the file's description."""
    colours, shown = THEMES[theme], figures()
    figure = Figure(figsize=(12.4, 4.3), layout="constrained", facecolor="none")
    left, *right = figure.subplots(1, 3, width_ratios=(1.15, 1, 0.85))
    row = chosen(HEADLINE, "cuda")[0]
    draw_idea(left, colours, 2 * row["N"] * row["V"] / 1e9)
    for axis, (label, bars), names in zip(right, shown.items(), (True, False)):
        draw_bars(axis, label, bars, colours, names)
    where = f"{row['device']}, {row['shape']}'s head, {row['N']} tokens, {row['dtype']}, synthetic RL logits"
    figure.supxlabel(
        f"Upper bars: trained head, lower bars: frozen head (LoRA).  {where}", fontsize=9.5, color=colours["muted"]
    )
    write(figure, path, dpi=160, facecolor="none", metadata={"Description": json.dumps(shown)})


def draw_idea(axis, colours, gigabytes):
    axis.set(xlim=(0, 10), ylim=(0, 10))
    axis.axis("off")

    def box(x, y, width, height, text, edge, size=11):
        patch = FancyBboxPatch((x, y), width, height, boxstyle="round,pad=0.1", fc=colours["box"], ec=edge, lw=1.6)
        axis.add_patch(patch)
        middle = (x + width / 2, y + height / 2)
        axis.annotate(text, middle, ha="center", va="center", fontsize=size, color=colours["text"])

    def arrow(start, end, colour):
        axis.add_patch(FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=16, color=colour, lw=1.8))

    muted, ours, no = colours["muted"], colours["ours"], colours["no"]
    box(0.2, 6.6, 1.9, 1.5, "hidden\n(N, D)", muted)
    box(3.2, 5.1, 3.6, 4.5, "", muted)
    for y, text in ((8.9, "logits (N, V)"), (5.4, f"{gigabytes:.0f} GB in bf16")):
        axis.annotate(text, (5, y), ha="center", fontsize=11, color=colours["text"])
    box(7.9, 6.6, 1.8, 1.5, "loss", muted)
    arrow((2.25, 7.35), (3.05, 7.35), muted)
    arrow((6.95, 7.35), (7.75, 7.35), muted)
    for xs in ((3.2, 6.8), (6.8, 3.2)):
        axis.plot(xs, (5.1, 9.6), color=no, lw=3, alpha=0.8)
    box(0.2, 1.6, 1.9, 1.5, "hidden\n(N, D)", ours)
    box(7.9, 1.6, 1.8, 1.5, "loss,\ngradients", ours)
    arrow((2.25, 2.35), (7.75, 2.35), ours)
    axis.annotate("tiles in registers", (5, 2.7), ha="center", fontsize=11, color=colours["text"])
    axis.annotate("fixed workspace", (5, 1.6), ha="center", fontsize=11, color=colours["muted"])


def draw_bars(axis, label, bars, colours, names):
    axis.set_facecolor("none")
    largest = max(max(pair) for pair in bars.values())
    for i, (name, pair) in enumerate(bars.items()):
        colour = colours["ours"] if name == NAMES[OURS] else colours["others"]
        for offset, value, alpha in zip((-0.2, 0.2), pair, (1.0, 0.5)):
            axis.barh(i + offset, value, 0.36, color=colour, alpha=alpha)
            axis.annotate(f" {value:,.0f}", (value, i + offset), va="center", fontsize=10.5, color=colours["text"])
    axis.set(xlim=(0, 1.2 * largest), yticks=range(len(bars)), xticks=[])
    axis.set_yticklabels(list(bars) if names else [""] * len(bars), fontsize=11, color=colours["text"])
    axis.set_title(label, fontsize=12, color=colours["text"], loc="left")
    axis.tick_params(length=0)
    axis.invert_yaxis()
    for spine in axis.spines.values():
        spine.set_visible(False)


def main():
    PICTURES.mkdir(parents=True, exist_ok=True)
    for theme in THEMES:
        path = Path(PICTURES / f"front-{theme}.png")
        draw_front(theme, path)
        print(f"written: {path}")


if __name__ == "__main__":
    main()

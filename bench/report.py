"""The tables of figures, made from bench/results/ so that none is typed by hand (bench/pages.py puts them in place)."""

import re

from bench import draw, measure
from bench.suites import accuracy, loss

KINDS = {"cuda": "GPU", "cpu": "CPU"}


def load(folder, suite, kind):
    return measure.read_rows(folder / f"{suite}-{kind}.jsonl")


def markdown(columns, rows):
    lines = [f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}"]
    return "\n".join(lines + [f"| {' | '.join(map(str, row))} |" for row in rows])


def names(rows, key):
    return list(dict.fromkeys(r[key] for r in rows))


def cell(row, value):
    """A figure, or what stands in its place."""
    if row is None:
        return ""
    if "reason" in row:
        return row["reason"]
    return value(row) if row.get("correct", True) else "wrong"


def split(rows):
    """-> the rows of cases in which something ran; a line for each other case, with its reason."""
    silent = [t for t in names(rows, "title") if all("reason" in r for r in rows if r["title"] == t)]
    lines = [f"{t}: {next(r['reason'] for r in rows if r['title'] == t)}." for t in silent]
    return [r for r in rows if r["title"] not in silent], lines


def matrix(rows, value, first):
    """A line an entry, a column a case; an entry with the same reason everywhere says it once."""
    titles = names(rows, "title")
    found = {(r["entry"], r["title"]): r for r in rows}
    lines = []
    for entry in names(rows, "entry"):
        cells = [cell(found.get((entry, title)), value) for title in titles]
        same = len(set(cells)) == 1 and "reason" in found[entry, titles[0]]
        lines.append((entry, cells[0], *[""] * (len(titles) - 1)) if same else (entry, *cells))
    return markdown((first, *titles), lines)


def head_section(rows, what="the loss head", first="loss head"):
    base, notes = split([r for r in rows if r["group"] in ("base", "models")])
    if note := loss.denormals_note(base):
        notes.append(f"{note[0].upper()}{note[1:]}.")
    gemm = "; ".join(f"{r['gemm_seconds'] * 1e3:.0f} ms" for r in first_of_each(base))

    def value(r):
        memory = f", {r['peak_mib']:.0f} MiB" if r.get("peak_mib") is not None else ""
        return f"{r['gemms']:.2f}{memory}"

    return (
        f"Forward and backward of {what} in units of one bare `hidden @ weight.T` of the same run "
        f"({gemm}), and peak memory beyond inputs and gradients:\n\n"
        + "\n\n".join((matrix(base, value, first), *notes))
    )


def divergence_section(rows):
    return head_section(rows, "a divergence from a teacher of the same size", "distillation")


def first_of_each(rows):
    return [next(r for r in rows if r["title"] == t and "gemm_seconds" in r) for t in names(rows, "title")]


def accuracy_section(rows):
    title = names(rows, "title")[0]
    mine = [r for r in rows if r["title"] == title]
    lines = []
    for r in mine:
        figures = [accuracy.text(k, r[k]) if k in r else "" for k in accuracy.FIGURES]
        lines.append((r["entry"], *(figures if "reason" not in r else [r["reason"], *figures[1:]])))
    return f"Errors against float64 on the same inputs ({title}):\n\n" + markdown(
        ("accuracy", *accuracy.FIGURES.values()), lines
    )


def step_section(rows):
    return "A whole learner step, seconds:\n\n" + matrix(rows, lambda r: f"{r['step_seconds']:.2f}", "step")


def fit_section(rows):
    """Measured answers only: computed ones stay in bench/results/."""
    mine = [{**r, "title": f"{r['card']} GiB"} for r in rows if r.get("measured")]
    parts = [
        f"{title}:\n\n" + matrix([r for r in mine if plan(r) == title], lambda r: str(r["tokens"]), "tokens that fit")
        for title in dict.fromkeys(map(plan, mine))
    ]
    return "\n\n".join(parts)


def plan(row):
    return f"{row['shape']}, {row['tuning']}, {row['question']}"


SECTIONS = {
    "loss": head_section,
    "divergence": divergence_section,
    "accuracy": accuracy_section,
    "step": step_section,
    "fit": fit_section,
}


def told(command):
    """Without where the rows went."""
    return re.sub(r" --(output|tag) \S+", "", command)


def figures(folder):
    """Markdown of everything measured; a heading and a line of where for each kind of device."""
    parts = []
    for kind, name in KINDS.items():
        found = {suite: load(folder, suite, kind) for suite in SECTIONS}
        found = {suite: rows for suite, rows in found.items() if rows}
        if not found:
            continue
        some = next(iter(found.values()))
        commands = ", ".join(dict.fromkeys(f"`{told(rows[0]['command'])}`" for rows in found.values()))
        versions = ", ".join(f"{k} {v}" for k, v in some[0]["versions"].items())
        parts.append(f"**{name}**: {draw.where([r for rows in found.values() for r in rows])}, {versions}; {commands}.")
        parts += [text for suite, rows in found.items() if (text := SECTIONS[suite](rows))]
    return "\n\n".join(parts)

"""Rebuild README's table of figures from bench/results/, so that none is typed by hand: ``python bench/report.py``."""

import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
START, END = "<!-- figures: written by bench/report.py -->", "<!-- end of figures -->"


def table(rows):
    """Markdown: a row an entry and case, times in bare logits GEMMs."""
    about = rows[0]
    lines = [
        f"{about['device']}, torch {about['torch']}, {rows[0]['dtype'].removeprefix('torch.')}, {about['date'][:10]}, "
        f"`{about['command'].strip()}`. One GEMM is `hidden @ weight.T` alone. Memory is what a step adds beyond its "
        "inputs and gradients.",
        "",
        "| N, V, D, logits | entry | forward | forward + backward | x TRL | memory | error of dX, dW |",
        "|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        case = f"{r['N']}, {r['V']}, {r['D']}, {r['profile']}"
        if "reason" in r:
            lines.append(f"| {case} | {r['entry']} | {r['reason']} | | | | |")
            continue
        trl = next(x["gemms"] for x in rows if same_case(x, r) and x["entry"] == "TRL 1.16 op")
        figures = (
            f"{r['forward_seconds'] / r['gemm_seconds']:.2f} GEMMs | {r['gemms']:.2f} GEMMs | {trl / r['gemms']:.1f} | "
            f"{r['peak_mib']:.0f} MiB | {r['d_hidden_error']:.0e}, {r['d_weight_error']:.0e}"
        )
        lines.append(f"| {case} | {r['entry']} | {figures if r['correct'] else 'wrong | | | |'} |")
    return "\n".join(lines)


def same_case(a, b):
    return all(a[k] == b[k] for k in ("N", "V", "D", "profile"))


def rebuilt(readme, rows):
    head, rest = readme.split(START)
    return f"{head}{START}\n{table(rows)}\n{END}{rest.split(END)[1]}"


def main():
    rows = [json.loads(x) for x in (ROOT / "bench/results/head-cpu.jsonl").read_text().splitlines()]
    path = ROOT / "README.md"
    text = rebuilt(path.read_text(), rows)
    if "--check" in sys.argv and text != path.read_text():
        sys.exit("README.md is not what bench/report.py writes")
    path.write_text(text)


if __name__ == "__main__":
    main()

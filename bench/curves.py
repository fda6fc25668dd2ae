"""What `make real` showed: ``python -m bench.curves LOG LOG ...`` keeps the log.jsonl of runs with seeds 0, 1 ... as
rows in bench/results/real-cpu.jsonl, and draws them."""

import argparse
import json
from pathlib import Path

from matplotlib.figure import Figure

from bench import RESULTS
from bench.draw import save
from bench.measure import machine

KEPT = ("step", "seconds", "reward", "length", "skipped", "eval/pass@1", "eval/greedy_pass")  # of a log's row


def collect(logs, about):
    """-> a row for each line of the logs"""
    lines = [(seed, json.loads(line)) for seed, log in enumerate(logs) for line in log.read_text().splitlines()]
    return [{**about, "entry": f"seed {seed}", **{k: row[k] for k in KEPT if k in row}} for seed, row in lines]


def plot(rows, path):
    """Each seed's reward, and its held-out problems before and after."""
    figure = Figure(figsize=(6.4, 3.0), layout="constrained")
    axis = figure.subplots()
    for i, seed in enumerate(dict.fromkeys(r["entry"] for r in rows)):
        for field, style in (("reward", {"label": seed}), ("eval/pass@1", {"marker": "o", "linestyle": ":"})):
            points = [(r["step"], r[field]) for r in rows if r["entry"] == seed and field in r]
            axis.plot(*zip(*points), color=f"C{i}", **style)
    title = "SmolLM2-135M adds numbers up to 30; dots: held-out problems"
    axis.set(xlabel="optimiser step", ylabel="right among sampled answers", ylim=(0, 1), title=title)
    axis.legend(fontsize=8)
    return save(figure, path, rows)


def summary(rows):
    """Markdown: held-out problems, sampled, before and after each seed's run."""
    found = {}
    for row in rows:
        if "eval/pass@1" in row:
            found.setdefault(row["entry"], []).append(row["eval/pass@1"])
    changes = [f"{seed} {values[0]:.2f} to {values[-1]:.2f}" for seed, values in found.items()]
    steps = max(row["step"] for row in rows)
    return f"Held-out problems, sampled answers, {steps} steps: {'; '.join(changes)}."


def main(arguments=None):
    parser = argparse.ArgumentParser(prog="python -m bench.curves", description=__doc__)
    parser.add_argument("logs", type=Path, nargs="+")
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    rows, path = collect(options.logs, machine("cpu", "make real")), options.output / "real-cpu.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    plot(rows, path.with_suffix(".png"))
    print(summary(rows))


if __name__ == "__main__":
    main()

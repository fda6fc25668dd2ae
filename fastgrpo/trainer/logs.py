"""What a person sees of a run: progress, a JSON-lines log, trackers, sample answers, a picture of the curves."""

import json
import time
from pathlib import Path

from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TextColumn
from rich.table import Table
from rich.text import Text

SHOWN = ("reward", "kl", "entropy", "clip_fraction", "skipped", "tokens_per_second")
PANELS = {"reward": "reward", "entropy": "entropy (nats a token)", "clip_fraction": "clip fraction", "kl": "KL (nats)"}


class RunLog(Progress):
    """Progress bar with the latest numbers; every row as one line of JSON, and to accelerate's trackers.

    On ranks but the main one it does nothing. ``first``: the steps already done, whose rows are kept.
    """

    def __init__(self, folder, total, accelerator, every=10, first=0, name="GRPO", shown=SHOWN):
        self.accelerator, self.every, self.total, self.main = accelerator, every, total, accelerator.is_main_process
        self.shown = shown
        console = Console(quiet=not self.main)
        columns = *Progress.get_default_columns(), MofNCompleteColumn(), TextColumn("{task.fields[numbers]}")
        super().__init__(*columns, console=console, disable=not console.is_terminal)
        self.task = self.add_task(name, total=total, completed=first, numbers="")
        self.path = Path(folder) / "log.jsonl"
        rows = self.path.read_text().split("\n")[:-1] if first and self.path.is_file() else []  # a cut last one: no row
        self.rows = [row for row in map(json.loads, rows) if row["step"] <= first]
        self.started = time.perf_counter() - (self.rows[-1]["seconds"] if self.rows else 0.0)
        if self.main:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.write_text("".join(json.dumps(row) + "\n" for row in self.rows))

    def write(self, step, numbers):
        """A row of the log: a training step's numbers, or an evaluation's."""
        row = {"step": step, "seconds": round(time.perf_counter() - self.started, 3), **numbers}
        self.rows.append(row)
        if not self.main:
            return
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        shown = "  ".join(f"{k} {row[k]:.3g}" for k in row if k in self.shown or k.startswith("eval/"))
        self.update(self.task, completed=step, numbers=shown)
        if step % self.every == 0 or step == self.total or "loss" not in numbers:  # an evaluation
            self.accelerator.log(numbers, step=step)
            if not self.console.is_terminal:
                self.console.print(f"step {step}/{self.total}  {shown}")

    def answers(self, title, rows, what="reward"):
        """A table of (prompt, answer, number)."""
        table = Table("prompt", "answer", what, title=title)
        for prompt, answer, number in rows:
            table.add_row(Text(prompt), Text(answer), f"{number:.3g}")
        self.console.print(table)


def plot_curves(rows, path, title, shown=PANELS):
    """One panel a metric over the steps, a running mean over the raw values; written as a PNG. ``shown``: {metric:
    label}."""
    rows = [r for r in rows if "loss" in r]  # no evaluations
    panels = {k: v for k, v in shown.items() if any(r.get(k) for r in rows)} or dict([*shown.items()][:1])
    figure = Figure(figsize=(4.2 * len(panels), 3.4), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axis, (name, label) in zip(axes, panels.items()):
        steps, values = [r["step"] for r in rows], [r[name] for r in rows]
        axis.plot(steps, values, color="tab:blue", alpha=0.25, linewidth=1)
        axis.plot(steps, running_mean(values, 10), color="tab:blue", linewidth=2)
        axis.set(title=label, xlabel="step")
        axis.grid(alpha=0.3)
    figure.suptitle(title)
    figure.savefig(path, dpi=120)


def running_mean(values, width):
    return [sum(values[max(0, i - width + 1) : i + 1]) / (i + 1 - max(0, i - width + 1)) for i in range(len(values))]

"""What a person sees of a run: a live progress bar, a JSON-lines log, a picture of the curves."""

import json
import time
from pathlib import Path


def need(package, extra="train"):
    """Import an optional package, or say which extra brings it."""
    import importlib

    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise ImportError(f"{package} is needed here: pip install 'fastgrpo[{extra}]'") from error


class RunLog:
    """Progress bar with the latest numbers, and every step as one line of JSON."""

    def __init__(self, path, total, title, shown):
        need("rich")
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self.console, self.shown, self.total = Console(), shown, total
        self.path = Path(path)
        self.path.write_text("")
        self.started = time.perf_counter()
        self.progress = Progress(
            TextColumn("{task.description}"), BarColumn(bar_width=24), MofNCompleteColumn(), TimeRemainingColumn(),
            TextColumn("{task.fields[numbers]}"), console=self.console, disable=not self.console.is_terminal,
        )  # fmt: skip
        self.task = self.progress.add_task(title, total=total, numbers="")
        self.rows = []

    def __enter__(self):
        self.progress.start()
        return self

    def __exit__(self, *_):
        self.progress.stop()

    def step(self, row):
        row = {"step": len(self.rows) + 1, "seconds": round(time.perf_counter() - self.started, 3), **row}
        self.rows.append(row)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        numbers = "  ".join(f"{k} {row[k]:.3f}" for k in self.shown)
        self.progress.update(self.task, advance=1, numbers=numbers)
        if not self.console.is_terminal and (row["step"] % max(self.total // 10, 1) == 0):
            self.console.print(f"step {row['step']}/{self.total}  {numbers}")


def plot_curves(rows, path, panels, title):
    """One panel a metric over the steps, a running mean over the raw values; written as a PNG."""
    need("matplotlib")
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    steps = [r["step"] for r in rows]
    figure, axes = plt.subplots(1, len(panels), figsize=(4.2 * len(panels), 3.4), layout="constrained")
    for axis, (name, label) in zip(axes, panels.items()):
        values = [r[name] for r in rows]
        axis.plot(steps, values, color="tab:blue", alpha=0.25, linewidth=1)
        axis.plot(steps, running_mean(values, 10), color="tab:blue", linewidth=2)
        axis.set(title=label, xlabel="step")
        axis.grid(alpha=0.3)
    axes[0].set_ylim(0, 1)
    figure.suptitle(title)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def running_mean(values, width):
    return [sum(values[max(0, i - width + 1) : i + 1]) / (i + 1 - max(0, i - width + 1)) for i in range(len(values))]


def answer_table(title, rows):
    """rows of (prompt, expected, before, after)."""
    from rich.table import Table

    table = Table(title=title)
    for name in ("digits", "sorted", "before", "after"):
        table.add_column(name)
    for prompt, expected, before, after in rows:
        marked = [f"[{'green' if x == expected else 'red'}]{x}[/]" for x in (before, after)]
        table.add_row(prompt, expected, *marked)
    return table

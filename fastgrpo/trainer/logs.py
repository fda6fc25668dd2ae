"""What a person sees of a run: progress, a JSON-lines log, trackers, sample answers."""

import json
import time
from pathlib import Path

from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TextColumn

from fastgrpo.trainer.log_file import begin
from fastgrpo.trainer.tables import answer_table

SHOWN = ("reward", "kl", "entropy", "clip_fraction", "skipped", "tokens_per_second")


class RunLog(Progress):
    """Progress bar with the latest numbers; every row as one line of JSON, and to accelerate's trackers.

    On ranks but the main one it does nothing. ``first``: the steps already done, whose rows are kept.
    """

    def __init__(self, folder, total, accelerator, pulse, every=10, first=0, name="GRPO", shown=SHOWN):
        self.accelerator, self.every, self.total, self.main = accelerator, every, total, accelerator.is_main_process
        self.shown, self.name, self.pulse, self.step = shown, name, pulse, first
        console = Console(quiet=not self.main)
        columns = *Progress.get_default_columns(), MofNCompleteColumn(), TextColumn("{task.fields[numbers]}")
        super().__init__(*columns, console=console, disable=not console.is_terminal)
        self.task = self.add_task(name, total=total, completed=first, numbers="")
        self.path = Path(folder) / "log.jsonl"
        rows = self.path.read_text().split("\n")[:-1] if first and self.path.is_file() else []  # a cut last one: no row
        self.rows = [row for row in map(json.loads, rows) if row["step"] <= first]
        self.started = time.perf_counter() - (self.rows[-1]["seconds"] if self.rows else 0.0)
        if self.main:
            begin(self.path, self.rows)

    def write(self, step, numbers):
        """A row of the log: a training step's numbers, or an evaluation's."""
        row = {"step": step, "seconds": round(time.perf_counter() - self.started, 3), **numbers}
        self.rows.append(row)
        self.step, numbers = step, {k: v for k, v in numbers.items() if v is not None}  # None: nothing to measure
        if not self.main:
            return
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        shown = "  ".join(
            f"{k} {v:.3g}"
            for k, v in numbers.items()
            if (k in self.shown and (v or k != "kl")) or k.startswith("eval/")
        )
        self.update(self.task, completed=step, numbers=shown)
        if step % self.every == 0 or step == self.total or "loss" not in numbers:  # an evaluation
            self.accelerator.log(numbers, step=step)
            if not self.console.is_terminal:
                self.pulse.line(f"step {step}/{self.total}  {shown}")

    def answers(self, title, rows, what="reward"):
        """A table of (prompt, answer, number)."""
        self.console.print(answer_table(title, rows, what))

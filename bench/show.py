"""What a person sees while a suite runs: a line of what is being measured, a table when a case is done."""

import time

from rich.console import Console
from rich.table import Table


class Show:
    def __init__(self, quiet=False):
        self.console = Console(width=150, quiet=quiet)
        self.line = self.console.status("starting")
        self.started = time.monotonic()
        self.keep = lambda rows: None  # what a caller does with the rows of each finished case

    def __enter__(self):
        self.line.start()
        return self

    def __exit__(self, *_):
        self.line.stop()

    def status(self, text):
        self.line.update(f"[{time.monotonic() - self.started:4.0f} s] {text}")

    def rows(self, title, rows, table):
        """``table(rows)`` -> (columns, cells); a short line of cells is an entry and why it has no figures."""
        if not rows:
            return
        self.keep(rows)
        columns, cells = table(rows)
        shown = Table(title=f"[{time.monotonic() - self.started:.0f} s] {title}", title_justify="left")
        for i, column in enumerate(columns):
            shown.add_column(column, justify="right" if i else "left", overflow="fold")
        reasons = []
        for row in cells:
            if len(row) == len(columns):
                shown.add_row(*(f"[red]{c}[/]" if c == "wrong" else str(c) for c in row))
            else:
                reasons.append("  ".join(map(str, row)))
        self.console.print(shown)
        for line in reasons:
            self.console.print(f"  {line}", style="red" if line.endswith("wrong") else "dim", highlight=False)

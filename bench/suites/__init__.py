"""The suites. Each module has ``run(options, show) -> rows``, ``table(rows)`` and ``charts(rows, stem)``."""

import argparse
import time
from dataclasses import dataclass, field
from pathlib import Path

from bench.divergences import NAMES, entries_of
from bench.profiles import PROFILES


@dataclass
class Options:
    """What the command line asks for."""

    device: str
    suites: list[str]
    output: Path
    repeats: int | None = None  # None: the suite's own number
    entries: list[str] = field(default_factory=lambda: list(NAMES))
    cases: list = field(default_factory=list)  # Case; empty: the suite's own
    groups: list[str] = field(default_factory=list)  # of the loss suite's own cases; empty: all
    apart: bool = False  # the loss suite's cases run in a process of their own, see bench.worker
    broken: dict = field(default_factory=dict)  # {entry: why it is not tried again}
    time_limit: float = 540.0
    started: float = field(default_factory=time.monotonic)

    @property
    def late(self):
        """Why nothing more is started, or None."""
        spent = time.monotonic() - self.started
        return f"not run: the time limit of {self.time_limit:.0f} s is over" if spent > self.time_limit else None

    def runnable(self, case):
        """-> ({name: Entry}, {name: why not})"""
        nothing, known = self.late or case.why_not(), entries_of(case)
        reasons = {n: nothing or self.broken.get(n) or known[n].why_not(case, self.device) for n in self.names(case)}
        return {n: known[n] for n, r in reasons.items() if r is None}, {n: r for n, r in reasons.items() if r}

    def names(self, case):
        """Of the entries asked for, those that compute what the case is about."""
        return [n for n in self.entries if n in entries_of(case)]


def parse_case(text):
    """``N,V,D[,key=value...]`` -> keyword arguments of a Case."""
    parts = text.split(",")
    try:
        fields = dict(zip("NVD", map(int, parts[:3]), strict=True))
        fields |= dict(x.split("=") for x in parts[3:])
        fields |= {k: float(fields[k]) for k in ("softcap", "zero_share") if k in fields}
    except ValueError:
        raise argparse.ArgumentTypeError(f"a case is N,V,D[,profile=flat,head=frozen,...], got {text!r}") from None
    if fields.get("profile", "rl") not in PROFILES:
        raise argparse.ArgumentTypeError(f"profile must be one of {', '.join(PROFILES)}, got {fields['profile']!r}")
    return fields

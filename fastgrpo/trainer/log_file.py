"""A run's file of rows, and those of earlier runs in its folder."""

import itertools
import json


def begin(path, rows):
    """Write the rows that a resumed run goes on from; a log whose run is not gone on with is set aside before."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if not rows:
        set_aside(path)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def set_aside(path):
    """Rename it ``log-1.jsonl``, or the next number."""
    if path.is_file() and path.stat().st_size:
        others = (path.with_name(f"{path.stem}-{k}{path.suffix}") for k in itertools.count(1))
        path.rename(next(other for other in others if not other.exists()))

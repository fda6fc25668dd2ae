"""``python -m bench``: what the losses of GRPO and of distillation cost with fastgrpo and with everything else, and
what fits on a card.

``python -m bench`` runs all suites, ``python -m bench report`` rebuilds the figures
of README and docs/ from its rows.
"""

import argparse
import functools
import importlib
import json
import os
import sys
from pathlib import Path

from bench import RESULTS

SUITES = ("loss", "divergence", "accuracy", "step", "fit")


def arguments(argv):
    import torch

    from bench.divergences import NAMES
    from bench.suites import loss, parse_case

    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("--suite", nargs="+", choices=(*SUITES, "all"), default=["all"])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--entries", nargs="+", metavar="NAME", default=list(NAMES), help="default: all")
    parser.add_argument(
        "--case",
        type=parse_case,
        action="append",
        default=[],
        metavar="N,V,D[,KEY=VALUE...]",
        help="for loss, divergence and accuracy, repeatable: profile (rl, flat, real, real-0.6), head, objective, "
        "dtype, softcap, zero_share",
    )
    parser.add_argument(
        "--groups", nargs="+", choices=loss.GROUPS, default=[], help="of the loss suite's cases; base: the headline"
    )
    parser.add_argument("--repeats", type=int, help="default: the suite's own")
    parser.add_argument(
        "--output",
        type=Path,
        default=RESULTS,
        help=f"default: {os.path.relpath(RESULTS)}; rows of some --entries, --case or --groups go beside what is there",
    )
    parser.add_argument("--tag", default="", help="added to the names of the files")
    parser.add_argument(
        "--time-limit", type=float, help="seconds; cases not begun by then say so; default: 540 on a GPU, 600 elsewhere"
    )
    options = parser.parse_args(argv)
    if unknown := [e for e in options.entries if e not in NAMES]:
        parser.error(f"--entries: expected some of {', '.join(NAMES)}; got {', '.join(unknown)}")
    options.some = bool(options.case or options.groups or set(options.entries) != set(NAMES))
    if options.time_limit is None:
        options.time_limit = 540.0 if options.device == "cuda" else 600.0
    if options.repeats is not None and options.repeats < 1:
        parser.error(f"--repeats must be >= 1, got {options.repeats}")
    return options


def run_suites(chosen):
    """-> exit status: 1 if one of fastgrpo's own entries was wrong or failed."""
    from bench import measure
    from bench.show import Show
    from bench.suites import Options

    names = SUITES if "all" in chosen.suite else tuple(dict.fromkeys(chosen.suite))
    options = Options(
        chosen.device,
        list(names),
        chosen.output,
        chosen.repeats,
        chosen.entries,
        chosen.case,
        chosen.groups,
        apart=chosen.device == "cuda",
        time_limit=chosen.time_limit,
    )
    about = measure.machine(chosen.device, " ".join(["python -m bench", *sys.argv[1:]]))
    chosen.output.mkdir(parents=True, exist_ok=True)
    failed = []
    with Show() as show:
        show.console.print(f"{about['device']}, torch {about['torch']}, {about['versions']}")
        for name in names:
            suite = importlib.import_module(f"bench.suites.{name}")
            stem = chosen.output / f"{name}-{chosen.device}{'-' + chosen.tag if chosen.tag else ''}"
            path, part = Path(f"{stem}.jsonl"), Path(f"{stem}.part.jsonl")
            part.unlink(missing_ok=True)
            show.keep = functools.partial(append, part, about)
            rows = [{**about, **row} for row in suite.run(options, show)]
            part.unlink(missing_ok=True)
            if path.exists() and all(row.get("reason", "").startswith("not run") for row in rows):
                show.console.print(f"kept: {os.path.relpath(path)}, as the time limit left nothing to put in its place")
                continue
            if not rows:  # of the cases asked for none is this suite's
                continue
            failed += [r for r in rows if r["entry"].startswith("fastgrpo") and not fine(r)]
            if chosen.some:
                rows = beside(path, rows)
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
            written = [path, *map(Path, suite.charts(rows, str(stem)))]
            show.console.print("written:", ", ".join(os.path.relpath(x) for x in written))
        for row in failed:
            why = row.get("reason", "wrong")
            show.console.print(f"{row['suite']}: {row['entry']}: {row['title']}: {why}", style="red")
    return 1 if failed else 0


def beside(path, rows):
    """The rows of some cases or entries, and those of the others that the file has, in its order."""
    from bench import measure

    def key(row):
        return row["title"], row["entry"], row.get("group")

    known, fresh = measure.read_rows(path), {key(row) for row in rows}
    place = {k: i for i, k in enumerate(dict.fromkeys(map(key, known)))}
    rows = [row for row in known if key(row) not in fresh] + rows
    return sorted(rows, key=lambda row: place.get(key(row), len(place)))


def append(path, about, rows):
    """The rows of a finished case, on disk at once: what is there if the suite is stopped."""
    with path.open("a") as file:
        file.write("".join(json.dumps({**about, **row}) + "\n" for row in rows))


def fine(row):
    """Right, or not run for want of time or of the case's data."""
    return row["reason"].startswith("not run") if "reason" in row else row.get("correct", True)


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["report"]:
        from bench import pages

        return pages.main(argv[1:])
    if argv[:1] == ["--child"]:  # a fresh process that a suite started to measure memory in
        from bench import measure

        print(json.dumps(measure.CHILDREN[argv[1]](*argv[2:])))
        return 0
    return run_suites(arguments(argv))


if __name__ == "__main__":
    sys.exit(main())

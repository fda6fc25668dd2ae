"""Does what the certified backward leaves out push training anywhere? Three answers, with a picture of the third.

``python -m bench.bias``: (1) what to do with the mass left out: nothing, spread it evenly, or renormalise the kept
entries; (2) the gradient error's component along the true gradient over 1e5 tokens; (3) policies
trained with AdamW on the exact backward and on what "auto" takes, from the same seeds: paired differences, where both
draw the same answers, and where each draws its own, beside two exact runs that do. Rows go to
bench/results/bias-cpu.jsonl as they are made, the curves beside them; a run that was stopped goes on where it was.
"""

import argparse
import dataclasses
import itertools
import json
import statistics
import sys
import time
from pathlib import Path

import torch
from matplotlib.figure import Figure

from bench import RESULTS, measure, profiles
from bench.bias_tasks import Demo, Partners
from bench.draw import write
from fastgrpo import linear_logprobs


def study_of_the_rest(n=2048, vocab=32768, depth=512, cutoff=2.0**-14, block=128):
    """Error and bias of dX and dW for three ways with the dropped mass; every row drops, none keeps all entries."""
    p = profiles.problem(n, vocab, depth)
    hidden, weight, g = p["hidden"], p["weight"], p["upstream"][:, None]
    z = (hidden @ weight.T).log_softmax(1)
    label = torch.zeros_like(z, dtype=torch.bool).scatter_(1, p["targets"][:, None], True)
    mass = z.exp().masked_fill_(label, 0.0)
    rest = mass.sum(1, keepdim=True)
    order = p["old_logprobs"].argsort()
    kept = torch.empty_like(label)
    kept[order] = (mass[order] >= cutoff).view(-1, block, vocab).any(1).repeat_interleave(block, 0)
    kept |= label
    dropped = (mass * ~kept).sum(1, keepdim=True)
    base = torch.where(label, rest, -mass)
    share = dropped / (~kept).sum(1, keepdim=True).clamp(min=1)
    stretch = (rest / (rest - dropped).clamp(min=1e-30)).clamp(max=10)
    ways = {
        "leave out": base * kept,
        "spread evenly": torch.where(kept, base, -share),
        "renormalise kept": torch.where(label, base, base * kept * stretch),
    }  # fmt: skip
    truth = {"d_hidden": ((base * g) @ weight).double(), "d_weight": ((base * g).T @ hidden).double()}
    for name, matrix in ways.items():
        row = {"study": "the rest", "way": name, "N": n, "V": vocab, "D": depth, "cutoff": cutoff}
        for key, got in (("d_hidden", (matrix * g) @ weight), ("d_weight", (matrix * g).T @ hidden)):
            row[f"{key}_error"], row[f"{key}_bias"] = measure.relative(got, truth[key])
        yield row


def bias_over_tokens(tokens=102400, n=10240, vocab=8192, depth=256):
    """Errors of the certified gradients against the exact ones, summed over at least ``tokens`` tokens."""
    sums = {name: [0.0, 0.0, 0.0] for name in ("d_hidden", "d_weight")}
    for seed in range(tokens // n):
        p = profiles.problem(n, vocab, depth, seed=seed)
        p["hidden"].requires_grad_()
        p["weight"].requires_grad_()
        exact, ours = (gradients(p, backward) for backward in ("exact", "certified"))
        for (_, total), a, b in zip(sums.items(), ours, exact):
            a, b = a.double(), b.double()
            for i, value in enumerate(((a - b).square().sum(), b.square().sum(), ((a - b) * b).sum())):
                total[i] += value.item()
    row = {"study": "bias over tokens", "tokens": tokens, "V": vocab, "D": depth}
    for name, (square, norm, along) in sums.items():
        row |= {f"{name}_error": (square / norm) ** 0.5, f"{name}_bias": along / norm}
    yield row


def gradients(p, backward):
    """-> gradients of hidden and weight"""
    leaves = p["hidden"], p["weight"]
    out = linear_logprobs(*leaves, p["targets"], old_logprobs=p["old_logprobs"], backward=backward)
    return torch.autograd.grad(out.logprobs, leaves, p["upstream"])


ARMS = {
    "exact": {"backward": "exact"},
    "auto": {"backward": "auto"},
    "whole dW alone": {"backward": "auto", "row_tolerance": 1.0},  # bounded as a whole, not row by row
    "exact, own answers": {"backward": "exact", "luck": 0},
    "auto, own answers": {"backward": "auto", "luck": 1},
    "exact again": {"backward": "exact", "luck": 2},
}
BESIDE = {
    "auto": "exact",
    "whole dW alone": "exact",
    "auto, own answers": "exact, own answers",
    "exact again": "exact, own answers",
}  # what an arm is compared with


KINDS = {
    ("partners", "trained"): "trained head",
    ("partners", "lora"): "LoRA on a frozen head",
    ("demo", "trained"): "the demo, 2048 words",
}  # task and head: in words


def settings_of(task):
    return {"study": "training", "task": task.name, **dataclasses.asdict(task)}


def training_runs(task, seeds, done=(), arms=None):
    """A row a run that is not among the rows ``done``, arm by arm within a seed, so that pairs come early."""
    settings, arms = settings_of(task), arms or {name: ARMS[name] for name in task.arms}
    known = {(r["head"], r["arm"], r["seed"]) for r in done if settings.items() <= r.items()}
    runs = itertools.product(range(seeds), task.heads, arms)
    todo = [(seed, head, arm) for seed, head, arm in runs if (head, arm, seed) not in known]
    policy = task.warm_up_policy() if todo else None
    for number, (seed, head, arm) in enumerate(todo):
        start = time.perf_counter()
        reward, entropy, left_out = task.train(policy, seed, head, **arms[arm])
        last = max(task.steps // 5, 1)
        print(f"run {number + 1} of {len(todo)}: {time.perf_counter() - start:.0f} s", flush=True)
        yield {
            **settings, "head": head, "arm": arm, "seed": seed, "cells_left_out": mean(left_out),
            "final_reward": mean(reward[-last:]), "final_entropy": mean(entropy[-last:]), "area": mean(reward),
            "reward": [round(x, 4) for x in reward], "entropy": [round(x, 5) for x in entropy],
            "left_out": [round(x, 3) for x in left_out],
        }  # fmt: skip


def mean(values):
    return sum(values) / len(values)


def pair_runs(rows, arm, head, task="partners"):
    """One row: differences of an arm to the one beside it over the seeds that both have, with standard errors."""
    key, beside = ("training", task, head), BESIDE[arm]
    runs = {(r["arm"], r["seed"]): r for r in rows if (r["study"], r.get("task"), r.get("head")) == key}
    pairs = [(runs[arm, s], runs[beside, s]) for a, s in runs if a == arm and (beside, s) in runs]
    if len(pairs) < 2:
        return None
    row = {"study": "paired differences", "task": task, "head": head, "arm": arm, "beside": beside, "pairs": len(pairs)}
    row["cells_left_out"] = mean([mean(a["left_out"]) for a, _ in pairs])
    row["steps_with_half_left_out"] = mean([x >= 0.5 for a, _ in pairs for x in a["left_out"]])
    for name in ("final_entropy", "final_reward", "area"):
        differences = [a[name] - b[name] for a, b in pairs]
        row[name] = mean(differences)
        row[f"{name}_error"] = statistics.stdev(differences) / len(pairs) ** 0.5
    row["entropy_change"] = sum(mean(a["entropy"]) for a, _ in pairs) / sum(mean(b["entropy"]) for _, b in pairs) - 1
    return row


def plot(rows, path):
    """Mean and standard error over the seeds, a row of panels a task and head."""
    rows = [r for r in rows if r["study"] == "training" and r["arm"] != "exact again"]
    kinds = [kind for kind in KINDS if any((r["task"], r["head"]) == kind for r in rows)]
    names = {"reward": "reward", "entropy": "entropy, nats", "left_out": "cells left out"}
    figure = Figure(figsize=(10, 3.1 * len(kinds)), layout="constrained")
    axes = figure.subplots(len(kinds), len(names), squeeze=False)
    for (kind, (name, label)), axis in zip(itertools.product(kinds, names.items()), axes.flat):
        for k, arm in enumerate(ARMS):
            curves = torch.tensor([r[name] for r in rows if (r["task"], r["head"], r["arm"]) == (*kind, arm)])
            if len(curves) < 2 or (name == "left_out" and ARMS[arm]["backward"] == "exact"):
                continue
            middle, error = curves.mean(0), curves.std(0) / len(curves) ** 0.5
            axis.plot(middle, color=f"C{k}", label=f"{arm}, {len(curves)} seeds", linestyle=("-", "--", ":")[k % 3])
            axis.fill_between(range(len(middle)), middle - error, middle + error, color=f"C{k}", alpha=0.25)
        axis.set(title=f"{KINDS[kind]}: {label}")
        axis.title.set_fontsize(9)
        axis.set_xlabel("step")
        axis.grid(alpha=0.3)
        if axis.lines:
            axis.legend(fontsize=7)
    write(figure, path)


def read(path):
    """The rows of a run before; those of trainings that were there before there were tasks are the first one's."""
    rows = measure.read_rows(path)
    return [{"task": "partners", **row} if row["study"] == "training" else row for row in rows]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, help="of each task; 64 and 16 if not given")
    parser.add_argument("--tokens", type=int, default=102400, help="of the second study")
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--only-training", action="store_true", help="keep the other studies' rows as they are")
    options = parser.parse_args()
    about = measure.machine("cpu", " ".join(["python -m bench.bias", *sys.argv[1:]]))
    options.output.mkdir(parents=True, exist_ok=True)
    path = options.output / "bias-cpu.jsonl"
    tasks = {task: options.seeds or task.seeds for task in (Partners(), Demo())}
    others = ("the rest", "bias over tokens") if options.only_training else ()
    rows = [r for r in read(path) if r["study"] in others or any(is_run(r, *known) for known in tasks.items())]
    studies = [training_runs(task, seeds, rows) for task, seeds in tasks.items()]
    if not options.only_training:
        studies = [study_of_the_rest(), bias_over_tokens(options.tokens), *studies]
    for row in itertools.chain(*studies):
        rows.append({**about, **row})
        print({k: v for k, v in row.items() if not isinstance(v, list)}, flush=True)
        path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    for (task, head), arm in itertools.product(KINDS, BESIDE):
        if row := pair_runs(rows, arm, head, task):
            rows.append({**about, **row})
            print(row)
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    plot(rows, path.with_suffix(".png"))
    print(f"written: {path}, {path.with_suffix('.png')}")


def is_run(row, task, seeds):
    """Whether a row is one of a task's runs, as the task is set."""
    return settings_of(task).items() <= row.items() and row["arm"] in task.arms and row["seed"] < seeds


if __name__ == "__main__":
    main()

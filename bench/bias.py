"""Does what the certified backward leaves out push training anywhere? Three answers, with a picture of the third.

``python -m bench.bias``: (1) what to do with the mass left out: nothing, spread it evenly, or renormalise the kept
columns; (2) the gradient error's component along the true gradient over 1e5 tokens; (3) the demo trained with the exact
and with the certified backward, three seeds each, on a vocabulary of 2048. Rows go to
bench/results/bias-cpu.jsonl, the curves beside them.
"""

import argparse
import dataclasses
import itertools
import json
import sys
import tempfile
from pathlib import Path

import torch
from matplotlib.figure import Figure

from bench import measure, profiles
from bench.__main__ import RESULTS
from fastgrpo import linear_logprobs
from fastgrpo.backends import certified
from fastgrpo.trainer import GRPOTrainer, examples
from fastgrpo.trainer.job import load_config

VOCABULARY = 2048  # of the demo here: with its usual 32 no column could be left out


def study_of_the_rest(n=2048, vocab=32768, depth=512, cutoff=2.0**-14, block=128):
    """Error and bias of dX and dW for three ways with the dropped mass; every row drops, none keeps all columns."""
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


def training_curves(seeds, steps):
    """The demo, exact and certified: reward and entropy per step, and the share of logits the backward left out."""
    for seed in range(seeds):
        for backward in ("exact", "certified"):
            cells = [0, 0]
            plain = certified.plan_groups

            def counted(problem, certificate, active, sparse, plain=plain, cells=cells):
                groups, whole = plain(problem, certificate, active, sparse)
                cells[0] += sum(rows.numel() * columns.numel() for rows, columns, _ in groups)
                cells[0] += int(whole.sum()) * problem.weight.shape[0]
                cells[1] += int(active.sum()) * problem.weight.shape[0]
                return groups, whole

            certified.plan_groups = counted
            try:
                with tempfile.TemporaryDirectory() as folder:
                    options = {"max_steps": steps, "seed": seed, "backward": backward, "tiny_vocabulary": VOCABULARY}
                    options |= {"output_dir": folder, "eval_strategy": "no", "eval_on_start": False}
                    examples.WORLDS["sort"] = dataclasses.replace(examples.WORLDS["sort"], start_steps=150)
                    job, config = load_config("demo", options)
                    rows = [r for r in GRPOTrainer(config=config, **job).train() if "reward" in r]
            finally:
                certified.plan_groups = plain
            last = rows[-20:]
            yield {
                "study": "training", "seed": seed, "backward": backward, "steps": steps,
                "cells_left_out": 1 - cells[0] / cells[1] if cells[1] else 0.0,
                "final_reward": sum(r["reward"] for r in last) / len(last),
                "final_entropy": sum(r["entropy"] for r in last) / len(last),
                "reward": [round(r["reward"], 4) for r in rows], "entropy": [round(r["entropy"], 4) for r in rows],
            }  # fmt: skip


def plot(rows, path):
    from fastgrpo.trainer.logs import running_mean

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    axes = figure.subplots(1, 2)
    for row in rows:
        style = {"color": f"C{row['seed']}", "linestyle": "-" if row["backward"] == "exact" else "--"}
        for axis, name in zip(axes, ("reward", "entropy")):
            axis.plot(running_mean(row[name], 10), **style, label=f"seed {row['seed']}, {row['backward']}")
            axis.set(title=name, xlabel="step")
            axis.grid(alpha=0.3)
    axes[0].legend(fontsize=7)
    figure.savefig(path, dpi=110)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--tokens", type=int, default=102400)
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    about, rows = measure.machine("cpu", " ".join(["python -m bench.bias", *sys.argv[1:]])), []
    studies = study_of_the_rest(), bias_over_tokens(options.tokens), training_curves(options.seeds, options.steps)
    for row in itertools.chain(*studies):
        rows.append({**about, **row})
        print({k: v for k, v in row.items() if not isinstance(v, list)}, flush=True)
    options.output.mkdir(parents=True, exist_ok=True)
    path = options.output / "bias-cpu.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    plot([r for r in rows if r["study"] == "training"], path.with_suffix(".png"))
    print(f"written: {path}, {path.with_suffix('.png')}")


if __name__ == "__main__":
    main()

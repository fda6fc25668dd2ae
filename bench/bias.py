"""Does what the certified backward leaves out push training anywhere? Three answers, with a picture of the third.

``python -m bench.bias``: (1) what to do with the mass left out: nothing, spread it evenly, or renormalise the kept
entries; (2) the gradient error's component along the true gradient over 1e5 tokens; (3) a policy warmed up once, then
trained with AdamW on the exact backward and on what "auto" takes, from the same seeds: paired differences. Rows go to
bench/results/bias-cpu.jsonl as they are made, the curves beside them; a run that was stopped goes on where it was.
"""

import argparse
import contextlib
import copy
import dataclasses
import itertools
import json
import statistics
import sys
import time
import types
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure

from bench import RESULTS, measure, profiles
from bench.draw import write
from fastgrpo import GRPOLossConfig, group_advantages, grpo_loss, linear_logprobs
from fastgrpo.backends import certified_backward, frozen
from fastgrpo.inputs import IGNORE


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


class Policy(torch.nn.Module):
    """A recurrent policy: the answer to a prompt of the same length, token by token."""

    def __init__(self, vocabulary, width=256):
        super().__init__()
        g = torch.Generator().manual_seed(0)
        self.embedding = torch.nn.Parameter(torch.randn(vocabulary, width, generator=g) / 2)
        self.head = torch.nn.Parameter(torch.randn(vocabulary, width, generator=g) / width**0.5)
        self.lora_a = torch.nn.Parameter(torch.randn(8, width, generator=g) / width**0.5)
        self.lora_b = torch.nn.Parameter(torch.zeros(width, 8))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.rnn = torch.nn.GRU(width, width, batch_first=True)

    def states(self, prompt, answer):
        """(B, T), (B, T) -> (B, T, D), the states that predict the answer."""
        previous = F.pad(F.embedding(answer[:, :-1], self.embedding), (0, 0, 1, 0))
        return self.adapt(self.rnn(F.embedding(prompt, self.embedding) + previous)[0])

    def adapt(self, out):
        """The last layer below the head, with LoRA: 4 (1 + 2 B A) out."""
        return 4 * (out + 2 * out @ self.lora_a.T @ self.lora_b.T)

    @torch.no_grad()
    def sample(self, prompt, temperature, generator):
        """-> answers (B, T) and their log-probs (B, T)."""
        state, previous, answer, logp = None, 0.0, [], []
        for t in range(prompt.shape[1]):
            out, state = self.rnn((self.embedding[prompt[:, t]] + previous)[:, None], state)
            logprobs = (self.adapt(out[:, 0]) @ self.head.T / temperature).log_softmax(1)
            answer.append(torch.multinomial(logprobs.exp(), 1, generator=generator))
            logp.append(logprobs.gather(1, answer[-1]))
            previous = self.embedding[answer[-1][:, 0]]
        return torch.cat(answer, 1), torch.cat(logp, 1)


@dataclass(frozen=True)
class Task:
    """Answer each prompt token with its partner.

    Of ten kinds of them six are sure after the warm-up, two are confused with their neighbours, and two leave the
    answer free, as the wording of a text is: one of 64 ids, frequent or rare, now and then any of all, and none is
    wrong. Most of the vocabulary is met in tails alone, nearly all of it in those of the free answers.
    """

    vocabulary: int = 4096
    tokens: int = 40  # of the vocabulary that prompts are made of
    length: int = 8
    groups: int = 16
    group_size: int = 8
    warm_up: int = 120
    steps: int = 40
    learning_rate: float = 1e-4
    temperature: float = 0.7
    free: int = 2  # kinds of ten whose answer is free

    def partners(self):
        """(tokens,) ids that prompts hold, and the right answers to them; (64,) the free answers."""
        g = torch.Generator().manual_seed(0)
        ids, free = torch.randperm(self.vocabulary, generator=g)[: self.tokens + 64].split((self.tokens, 64))
        return ids, ids[torch.randperm(self.tokens, generator=g)], free

    def score(self, kind, answer, right):
        """(B,) share of the answers that are right, of those that can be wrong."""
        decisive = kind % 10 < 10 - self.free
        return ((answer == right[kind]) & decisive).float().sum(1) / decisive.sum(1).clamp(min=1)

    def corpus(self, count, g):
        """-> prompts and answers (count, length) to warm up on"""
        ids, right, free = self.partners()
        kind = torch.randint(self.tokens, (count, self.length), generator=g)
        u = torch.rand(kind.shape, generator=g)
        neighbour = right[(kind + 1 + torch.randint(3, kind.shape, generator=g)) % self.tokens]
        answer = torch.where((kind % 10 >= 6) & (u < 0.45), neighbour, right[kind])
        anything = torch.randint(self.vocabulary, kind.shape, generator=g)
        worded = torch.where(u < 0.98, free[(64 * (u / 0.98).square()).long().clamp(max=63)], anything)
        return ids[kind], torch.where(kind % 10 >= 10 - self.free, worded, answer)

    def warm_up_policy(self):
        policy, g = Policy(self.vocabulary), torch.Generator().manual_seed(1)
        optimizer = torch.optim.AdamW([policy.embedding, policy.head, *policy.rnn.parameters()], lr=3e-3)
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.02, self.warm_up)
        for step in range(self.warm_up):
            prompt, answer = self.corpus(96, g)
            loss = -linear_logprobs(policy.states(prompt, answer), policy.head, answer).logprobs.mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            if step % 25 == 0:
                print(f"warming up: step {step} of {self.warm_up}, loss {loss:.3f}", flush=True)
        return policy

    def train(self, policy, seed, head, **how):
        """-> reward, entropy, share of cells left out, a list each. head: "trained" or "lora" (frozen, LoRA below)."""
        policy, g, (ids, right, _) = copy.deepcopy(policy), torch.Generator().manual_seed(seed), self.partners()
        trained = [policy.head, *policy.rnn.parameters()] if head == "trained" else [policy.lora_a, policy.lora_b]
        for parameter in policy.parameters():
            parameter.requires_grad_(any(parameter is x for x in trained))
        optimizer = torch.optim.AdamW(trained, lr=self.learning_rate)
        rewards, entropies, left_out = [], [], []
        for _ in range(self.steps):
            kind = torch.randint(self.tokens, (self.groups, self.length), generator=g)
            kind = kind.repeat_interleave(self.group_size, 0)
            answer, old = policy.sample(ids[kind], self.temperature, g)
            reward = self.score(kind, answer, right)
            optimizer.zero_grad()
            with visits() as seen:
                result = grpo_loss(
                    policy.states(ids[kind], answer), policy.head, answer, group_advantages(reward, self.group_size),
                    GRPOLossConfig(temperature=self.temperature), old_logprobs=old, **how,
                )  # fmt: skip
                result.loss.backward()
            optimizer.step()
            rewards.append(float(reward.mean()))
            entropies.append(float(result.entropy.mean()))
            left_out.append(seen.left_out)
        return rewards, entropies, left_out


@contextlib.contextmanager
def visits():
    """Counts the cells whose gradient is made inside: an object whose ``left_out`` is the share of the others."""
    seen, plan_of, sum_of = (
        types.SimpleNamespace(left_out=0.0, summed=0.0),
        certified_backward.make_plan,
        frozen.Sums.add,
    )

    def planned(problem, stats, certificate, grad_logp, needs):
        plan = plan_of(problem, stats, certificate, grad_logp, needs)
        rows = int(((grad_logp != 0) & (problem.targets != IGNORE)).sum())
        vocab, visited = problem.weight.shape[0], plan.whole.numel() * problem.weight.shape[0]
        for group in plan.groups:
            kept, tails = group.rows.numel() * group.entries.numel(), int(group.tail.sum())
            visited += kept + tails * (vocab - group.entries.numel())
        seen.left_out = 1 - visited / (rows * vocab) if rows else 0.0
        return plan

    def summed(self, first, weights, entries):
        seen.summed += self.here(first, len(weights)) * weights.shape[1]
        seen.left_out = 1 - seen.summed / (len(self.rows) * len(self.problem.weight)) if len(self.rows) else 0.0
        sum_of(self, first, weights, entries)

    certified_backward.make_plan, frozen.Sums.add = planned, summed
    try:
        yield seen
    finally:
        certified_backward.make_plan, frozen.Sums.add = plan_of, sum_of


ARMS = {
    "exact": {"backward": "exact"},
    "auto": {"backward": "auto"},
    "whole dW alone": {"backward": "auto", "row_tolerance": 1.0},  # bounded as a whole, not row by row
}
HEADS = ("trained", "lora")


def training_runs(task, seeds, done=(), heads=HEADS, arms=ARMS):
    """A row a run that is not among the rows ``done``, arm by arm within a seed, so that pairs come early."""
    settings = {"study": "training", **dataclasses.asdict(task)}
    known = {(r["head"], r["arm"], r["seed"]) for r in done if settings.items() <= r.items()}
    todo = [run for run in itertools.product(range(seeds), heads, arms) if (run[1], run[2], run[0]) not in known]
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


def pair_runs(rows, arm, head):
    """One row: differences of an arm to "exact" over the seeds that both have, each with its standard error."""
    runs = {(r["arm"], r["seed"]): r for r in rows if r["study"] == "training" and r["head"] == head}
    pairs = [(runs[arm, s], runs["exact", s]) for a, s in runs if a == arm and ("exact", s) in runs]
    if len(pairs) < 2:
        return None
    row = {"study": "paired differences", "head": head, "arm": arm, "pairs": len(pairs)}
    row["cells_left_out"] = mean([mean(a["left_out"]) for a, _ in pairs])
    row["steps_with_half_left_out"] = mean([x >= 0.5 for a, _ in pairs for x in a["left_out"]])
    for name in ("final_entropy", "final_reward", "area"):
        differences = [a[name] - b[name] for a, b in pairs]
        row[name] = mean(differences)
        row[f"{name}_error"] = statistics.stdev(differences) / len(pairs) ** 0.5
    row["entropy_change"] = sum(mean(a["entropy"]) for a, _ in pairs) / sum(mean(b["entropy"]) for _, b in pairs) - 1
    return row


def plot(rows, path):
    """Mean and standard error over the seeds, a row of panels a head."""
    rows = [r for r in rows if r["study"] == "training"]
    heads = [h for h in HEADS if any(r["head"] == h for r in rows)]
    names = {"reward": "reward", "entropy": "entropy, nats", "left_out": "cells left out"}
    figure = Figure(figsize=(10, 3.1 * len(heads)), layout="constrained")
    axes = figure.subplots(len(heads), len(names), squeeze=False)
    for (head, (name, label)), axis in zip(itertools.product(heads, names.items()), axes.flat):
        for k, arm in enumerate(ARMS):
            curves = torch.tensor([r[name] for r in rows if (r["head"], r["arm"]) == (head, arm)])
            if len(curves) < 2 or (name == "left_out" and arm == "exact"):
                continue
            middle, error = curves.mean(0), curves.std(0) / len(curves) ** 0.5
            axis.plot(middle, color=f"C{k}", label=f"{arm}, {len(curves)} seeds", linestyle=("-", "--", ":")[k])
            axis.fill_between(range(len(middle)), middle - error, middle + error, color=f"C{k}", alpha=0.25)
        axis.set(title=f"{head} head: {label}" if head == "trained" else f"LoRA on a frozen head: {label}")
        axis.title.set_fontsize(9)
        axis.set_xlabel("step")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7)
    write(figure, path)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=16)
    parser.add_argument("--steps", type=int, default=Task.steps)
    parser.add_argument("--tokens", type=int, default=102400, help="of the second study")
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=["exact", "auto"])
    parser.add_argument("--only-training", action="store_true", help="keep the other studies' rows as they are")
    options = parser.parse_args()
    about = measure.machine("cpu", " ".join(["python -m bench.bias", *sys.argv[1:]]))
    options.output.mkdir(parents=True, exist_ok=True)
    path, task = options.output / "bias-cpu.jsonl", Task(steps=options.steps)
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    settings = {"study": "training", **dataclasses.asdict(task)}
    kept = [r for r in rows if settings.items() <= r.items() and r["seed"] < options.seeds]
    others = ("the rest", "bias over tokens") if options.only_training else ()
    rows = [r for r in rows if r["study"] in others] + kept
    studies = [training_runs(task, options.seeds, kept, arms={name: ARMS[name] for name in options.arms})]
    if not options.only_training:
        studies = [study_of_the_rest(), bias_over_tokens(options.tokens), *studies]
    for row in itertools.chain(*studies):
        rows.append({**about, **row})
        print({k: v for k, v in row.items() if not isinstance(v, list)}, flush=True)
        path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    for head, arm in itertools.product(HEADS, ARMS):
        if arm != "exact" and (row := pair_runs(rows, arm, head)):
            rows.append({**about, **row})
            print(row)
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    plot(rows, path.with_suffix(".png"))
    print(f"written: {path}, {path.with_suffix('.png')}")


if __name__ == "__main__":
    main()

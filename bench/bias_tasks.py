"""What the pairs of :mod:`bench.bias` are trained on: a peaked policy over many words, and the demo."""

import contextlib
import copy
import json
import tempfile
import types
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

from fastgrpo import GRPOLossConfig, group_advantages, grpo_loss, linear_logprobs
from fastgrpo.backends import certified_backward, frozen
from fastgrpo.inputs import IGNORE
from fastgrpo.trainer.job import trainers


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
class Partners:
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
    name = "partners"
    heads = ("trained", "lora")
    arms = ("exact", "auto", "exact, own answers", "auto, own answers", "exact again")
    seeds = 64  # runs that draw their own answers differ by chance: with 16 one of six differences was 2.4 errors off

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

    def entropy(self, states, head, answer):
        """Mean over the tokens, in nats, by the same forward for all arms: the roundings of two differ by 2e-7."""
        how = {"temperature": self.temperature, "return_entropy": True, "backward": "exact"}
        return float(linear_logprobs(states, head, answer, **how).entropy.double().mean())

    def train(self, policy, seed, head, luck=None, **how):
        """-> reward, entropy, share of cells left out, a list each. head: "trained" or "lora" (frozen, LoRA below).

        The seed draws prompts and answers; with ``luck``, a number, answers are drawn from a stream of its own.
        """
        # a frozen head leaves out less where oneDNN multiplies: 39 % of the cells on a Zen 5, 80 % on other CPUs
        with torch.backends.mkldnn.flags(enabled=head == "trained"):
            return self.train_policy(copy.deepcopy(policy), seed, head, luck, how)

    def train_policy(self, policy, seed, head, luck, how):
        g, (ids, right, _) = torch.Generator().manual_seed(seed), self.partners()
        dice = g if luck is None else torch.Generator().manual_seed(1000 * (luck + 1) + seed)
        trained = [policy.head, *policy.rnn.parameters()] if head == "trained" else [policy.lora_a, policy.lora_b]
        for parameter in policy.parameters():
            parameter.requires_grad_(any(parameter is x for x in trained))
        optimizer = torch.optim.AdamW(trained, lr=self.learning_rate)
        rewards, entropies, left_out = [], [], []
        for _ in range(self.steps):
            kind = torch.randint(self.tokens, (self.groups, self.length), generator=g)
            kind = kind.repeat_interleave(self.group_size, 0)
            answer, old = policy.sample(ids[kind], self.temperature, dice)
            reward = self.score(kind, answer, right)
            states = policy.states(ids[kind], answer)
            entropies.append(self.entropy(states.detach(), policy.head.detach(), answer))
            rewards.append(float(reward.mean()))
            optimizer.zero_grad()
            with visits() as seen:
                result = grpo_loss(
                    states, policy.head, answer, group_advantages(reward, self.group_size),
                    GRPOLossConfig(temperature=self.temperature), old_logprobs=old, **how,
                )  # fmt: skip
                result.loss.backward()
            optimizer.step()
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


@dataclass(frozen=True)
class Demo:
    """``fastgrpo demo`` over a padded vocabulary, from random weights: the task on which training showed what a bound
    on dW as a whole lets through. 64 wide, where "auto" is exact, so that its arm here is the certified backward."""

    vocabulary: int = 2048
    supervised_steps: int = 150
    steps: int = 200
    name = "demo"
    heads = ("trained",)
    arms = ("exact", "auto", "whole dW alone")
    seeds = 16

    def warm_up_policy(self):
        return None  # a run begins with its own

    def train(self, policy, seed, head, luck=None, **how):
        """As :meth:`Partners.train`."""
        backward = "exact" if how["backward"] == "exact" else "certified"
        supervised = {"max_steps": self.supervised_steps, "per_device_train_batch_size": 64, "learning_rate": 1e-3,
                      "lr_scheduler_type": "constant", "save_strategy": "no"}  # fmt: skip
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(None), visits() as seen:
            settings = {"output_dir": folder, "seed": seed, "tiny_vocabulary": self.vocabulary, "backward": backward,
                        "max_steps": self.steps, "sft": json.dumps(supervised), "eval_strategy": "no"}  # fmt: skip
            left_out = []
            words = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
            for trainer in trainers("demo", [*words, "--eval_on_start", "false"]):
                trainer.learner.options |= how | {"backward": backward}
                if luck is not None:
                    torch.manual_seed(1000 * (luck + 1) + seed)
                left_out = note_each_step(trainer.learner, seen)
                trainer.train()
            rows = [json.loads(line) for line in (Path(folder) / "log.jsonl").read_text().splitlines()]
        rows = [row for row in rows if "reward" in row]
        return [row["reward"] for row in rows], [row["entropy"] for row in rows], left_out


def note_each_step(learner, seen):
    """A list that grows by the share left out in each step of a learner."""
    shares, plain = [], learner.gradients

    def gradients(*args, **options):
        seen.left_out = 0.0
        known = plain(*args, **options)
        shares.append(seen.left_out)
        return known

    learner.gradients = gradients
    return shares

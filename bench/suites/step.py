"""A whole learner step of a transformers model of a named shape: forward, loss head, backward, optimiser."""

import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median

import torch

from bench import draw, measure, profiles
from bench.cases import DTYPES, SEQUENCES, Case, problem, truth
from bench.entries import ENTRIES
from bench.shapes import SHAPES, build_model
from fastgrpo.integrations.transformers import causal_lm

LORA_RANK = 16


@dataclass(frozen=True)
class Run:
    """One model and batch. ``layers``: fewer than the shape's, where a whole model is too slow."""

    shape: str
    tuning: str  # "lora" or "full"
    prompt: int  # tokens of each prompt
    completion: int  # tokens of each completion
    dtype: str
    layers: int | None = None
    vocab: int | None = None  # likewise

    @property
    def model_shape(self):
        shape = SHAPES[self.shape]
        return replace(shape, layers=self.layers or shape.layers, vocab=self.vocab or shape.vocab)

    @property
    def case(self):
        head = "trained" if self.tuning == "full" else "frozen"
        case = Case.of(self.shape, SEQUENCES * self.completion, dtype=self.dtype, head=head, group="step")
        return replace(case, V=self.model_shape.vocab)

    @property
    def title(self):
        shape = SHAPES[self.shape]
        depth = f"{self.layers} of {shape.layers} layers" if self.layers else f"{shape.layers} layers"
        depth += f", {self.vocab} of {shape.vocab} tokens" if self.vocab else ""
        tokens = f"{SEQUENCES} x ({self.prompt} + {self.completion}) tokens"
        return f"{self.shape}, {depth}, {self.tuning}, {tokens}, {self.dtype}"


def runs(device):
    if device == "cuda":
        both = [Run("Qwen2.5-1.5B", t, 512, 1024, "bf16") for t in ("lora", "full")]
        return [*both, Run("Qwen2.5-0.5B", "full", 512, 1024, "bf16"), Run("Gemma-2-2B", "lora", 512, 512, "bf16")]
    return [Run("Qwen2.5-0.5B", t, 32, 32, "fp32", layers=2, vocab=32768) for t in ("lora", "full")]


class Learner:
    """Model, optimiser and batch; one call is one step with a given entry as its loss head."""

    def __init__(self, run, device, prepared=None):
        torch.manual_seed(0)
        shape = run.model_shape
        rank = LORA_RANK if run.tuning == "lora" else None
        self.run = run
        self.model = build_model(shape, DTYPES[run.dtype], device, lora_rank=rank)
        causal = causal_lm(self.model)
        self.decoder, self.weight = causal.get_decoder(), causal.get_output_embeddings().weight
        trained = [p for p in self.model.parameters() if p.requires_grad]
        # rate 0: every entry sees the same weights, at the cost of a real step
        self.optimizer = torch.optim.AdamW(trained, lr=0.0, weight_decay=0.0, fused=device == "cuda")
        self.ids = torch.randint(0, shape.vocab, (SEQUENCES, run.prompt + run.completion), device=device)
        self.factor, self.offset, self.data = (None, None, None) if prepared is None else prepared
        if prepared is None:
            self.prepare(device)
        self.problem = problem(run.case, {**self.data, "weight": self.weight})
        self.problem.weight = self.weight  # problem() detaches

    def states(self):
        """(B, T, D): what predicts each completion token, brought to the entropies of RL once ``prepare`` has run."""
        hidden = self.decoder(input_ids=self.ids).last_hidden_state[:, self.run.prompt - 1 : -1]
        return hidden if self.factor is None else hidden * self.factor + self.offset

    def prepare(self, device):
        """Random weights give flat logits: fix a factor and an offset a token that give them RL's entropy profile."""
        case, g = self.run.case, torch.Generator(device).manual_seed(0)
        with torch.no_grad():
            hidden = self.states()
            wanted, weight = profiles.rl_entropies(case.N, g), self.weight.detach().float()
            parts = [
                profiles.shape_rows(x, weight, w, g)
                for x, w in zip(hidden.float().flatten(0, 1).split(profiles.CHUNK), wanted.split(profiles.CHUNK))
            ]
            self.factor, self.offset = (
                torch.cat(x).to(hidden.dtype).unflatten(0, hidden.shape[:2]) for x in zip(*parts)
            )
            states = self.states().flatten(0, 1)
            targets, logp = profiles.sample(states.float(), weight, g, case.softcap)
        old = profiles.drift_logprobs(logp, g, 0.05)
        advantages = torch.randn(SEQUENCES, generator=g, device=device)
        self.data = {"hidden": states, "targets": targets, "old_logprobs": old, "ref": old, "advantages": advantages}

    def leaf_problem(self):
        """The loss head alone, on the model's own states, for the correctness gate."""
        weight = self.weight.detach().requires_grad_(self.run.case.head == "trained")
        return replace(self.problem, weight=weight)

    def step(self, entry):
        loss = entry.run_loss(replace(self.problem, hidden=self.states()))
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.detach()


def run(options, show):
    """-> one row a run and entry."""
    rows = []
    for number, what in enumerate(runs(options.device), 1):
        show.status(f"step {number}: {what.title}")
        new = run_one(what, options, show)
        show.rows(what.title, new, table)
        rows += new
    return rows


def run_one(what, options, show):
    case = what.case
    entries, reasons = options.runnable(case)
    common = {
        "suite": "step",
        **case.row(),
        "title": what.title,
        "tuning": what.tuning,
        "layers": what.layers,
        "prompt": what.prompt,
        "completion": what.completion,
        "sequences": SEQUENCES,
    }
    learner, missing = None, None
    if entries:
        learner, missing = measure.attempt(Learner, what, options.device, catch=(ImportError, torch.OutOfMemoryError))
    if missing:  # peft is not installed, or the card is too small for the model
        reasons |= dict.fromkeys(entries, missing)
        entries = {}
    rows, good = {name: {**common, "entry": name, "reason": reason} for name, reason in reasons.items()}, {}
    if entries:
        leaf = learner.leaf_problem()
        want = truth(leaf)
    for name, entry in entries.items():
        show.status(f"step: {what.title}: {name}")
        found, reason = measure.attempt(measure.errors, entry, leaf, want)
        if found and found["correct"]:
            _, reason = measure.attempt(learner.step, entry)
        rows[name] = {**common, "entry": name, **({"reason": reason} if reason else found)}
        if not reason and found["correct"]:
            good[name] = entry
    clock = measure.Clock(options.device)
    samples = {name: [] for name in good}
    gemm, gemms = measure.bare_gemm(leaf) if good else None, []
    for _ in range((options.repeats or (5 if options.device == "cuda" else 2)) if good else 0):
        gemms.append(clock(gemm)[0])
        for name, entry in good.items():
            samples[name].append(clock(lambda entry=entry: learner.step(entry))[0])
    for name, seconds in samples.items():
        rows[name] |= {
            "step_seconds": median(seconds),
            "step_low": min(seconds),
            "step_high": max(seconds),
            "repeats": len(seconds),
            "gemm_seconds": median(gemms),
            "tokens_per_second": learner.ids.numel() / median(seconds),
        }
        if options.device == "cuda":
            rows[name]["peak_mib"] = measure.peak_cuda(lambda name=name: [learner.step(good[name])])
    if good and options.device == "cpu" and what.tuning == "lora":  # full tuning's peak is the optimiser's
        show.status(f"step: {what.title}: peak memory, a process an entry")
        add_memory(list(rows.values()), learner)
    return [rows[name] for name in options.names(case)]


def add_memory(rows, learner):
    """Peak resident memory of a step in a fresh process an entry."""
    good = [r for r in rows if "step_seconds" in r]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "learner.pt"
        torch.save((asdict(learner.run), (learner.factor, learner.offset, learner.data)), path)
        found = measure.children([("suite", "step", path, r["entry"]) for r in good])
    for row, mib in zip(good, found):
        row["peak_mib"] = mib


def child(path, name):
    """In the fresh process: MiB one step adds to a model that has taken one."""
    fields, prepared = torch.load(path)
    learner = Learner(Run(**fields), "cpu", prepared)
    learner.step(ENTRIES[name])
    return measure.peak_cpu(lambda: [learner.step(ENTRIES[name])])


def table(rows):
    """-> (columns, cells) of one run."""
    mine = next((r["step_seconds"] for r in rows if r["entry"] == "fastgrpo certified" and "step_seconds" in r), None)
    cells = []
    for r in rows:
        if "step_seconds" not in r:
            cells.append((r["entry"], r.get("reason", "wrong")))
            continue
        memory = f"{r['peak_mib']:.0f}" if r.get("peak_mib") is not None else "-"
        against = f"{r['step_seconds'] / mine:.2f}" if mine else "-"
        spread = f"{r['step_low']:.3f} - {r['step_high']:.3f}"
        cells.append(
            (r["entry"], f"{r['step_seconds']:.3f} s", spread, f"{r['tokens_per_second']:.0f}", against, memory)
        )
    return ("entry", "step", "spread", "tokens/s", "x ours", "peak MiB"), cells


def charts(rows, stem):
    """-> paths of the pictures written."""
    good = [r for r in rows if "step_seconds" in r]
    if not good:
        return []
    paths = [draw.bars(good, "step_seconds", "seconds a learner step", f"{stem}-time.png")]
    known = [r for r in good if r.get("peak_mib") is not None]
    if known:
        paths.append(draw.bars(known, "peak_mib", "MiB a step adds to weights and optimiser", f"{stem}-memory.png"))
    return paths

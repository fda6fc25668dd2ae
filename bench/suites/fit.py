"""What fits on a card: the longest completion and the largest token batch that train, for each entry.

On a GPU it is measured: the process's memory is capped and the step is tried. Elsewhere it is computed from measured
allocations: the loss head's peak over N, V and D, and the decoder's over tokens and layers, each fitted and solved for
the card. Every row says which. The CUDA context, some 0.5 GB of a card, is not counted.
"""

import functools
import itertools
from dataclasses import dataclass

import numpy
import torch

from bench import draw, measure
from bench.cases import Case, Problem, tensors
from bench.shapes import SHAPES, Shape, build_model
from bench.suites.step import LORA_RANK
from fastgrpo import GRPOLossConfig
from fastgrpo.integrations.transformers import causal_lm

CARDS = (8, 12, 16, 24, 32, 80)  # GiB
GIB = 2**30
PROMPT, COMPLETION = 256, 1024  # tokens of a sequence of the token batch
QUESTIONS = ("longest completion", "token batch")
LIMIT = {"longest completion": 65536, "token batch": 131072}  # tokens; a card that takes more says ">="
# N and V from where every entry's chunks are full, so that the law is the one of larger ones
HEAD_POINTS = ((4096, 32768, 64), (5120, 32768, 64), (4096, 40960, 64), (4096, 32768, 192), (5120, 40960, 128))
DECODER_POINTS = ((512, 1), (1536, 1), (1536, 3))  # tokens, layers


@dataclass(frozen=True)
class Plan:
    """A model and how it is trained: bf16 weights, gradient checkpointing, AdamW on what is trained."""

    shape: str
    tuning: str = "lora"

    @property
    def case(self):
        head = "trained" if self.tuning == "full" else "frozen"
        return Case.of(self.shape, 4096, dtype="bf16", head=head, group="fit")

    def title(self, question):
        return f"{self.shape}, {self.tuning}, bf16: {question}"


def plans(device):
    if device == "cuda":
        return [Plan("Qwen2.5-1.5B"), Plan("Qwen2.5-0.5B", "full"), Plan("Qwen2.5-7B")]
    return [Plan("Qwen2.5-0.5B"), Plan("Qwen2.5-1.5B")]


def run(options, show):
    """-> one row a plan, question, entry and card."""
    rows = []
    answer = measure_cards if options.device == "cuda" else Computed(options, show)
    for plan in plans(options.device):
        show.status(f"fit: {plan.shape}, {plan.tuning}")
        entries, reasons = options.runnable(plan.case)
        new = [row(plan, q, name, reason=reasons[name]) for q, name in itertools.product(QUESTIONS, reasons)]
        new += answer(plan, entries, show, options)
        for question in QUESTIONS:
            title = plan.title(question)
            show.rows(title, [r for r in new if r["title"] == title], table)
        rows += new
    return rows


def row(plan, question, entry, **found):
    return {
        "suite": "fit",
        "shape": plan.shape,
        "tuning": plan.tuning,
        "question": question,
        "entry": entry,
        "title": plan.title(question),
        "prompt": PROMPT,
        "completion": COMPLETION,
        **found,
    }


def layout(question, tokens):
    """-> (sequences, completion tokens of each) that make a batch of ``tokens`` trained tokens."""
    return (1, tokens) if question == QUESTIONS[0] else (max(1, round(tokens / COMPLETION)), COMPLETION)


def static_bytes(plan):
    """Weights, and gradients and optimiser state of what is trained; counted on a model without storage."""
    rank = LORA_RANK if plan.tuning == "lora" else None
    model = build_model(SHAPES[plan.shape], torch.bfloat16, "meta", lora_rank=rank)
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    return weights + sum(3 * p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)


# ---- computed from measured allocations


class Computed:
    """Answers from fits of peaks measured on this CPU; the loss heads' are measured once."""

    def __init__(self, options, show):
        names = list(options.runnable(Plan("Qwen2.5-0.5B").case)[0])
        jobs = [(case, tensors(case, "cpu")) for case in head_cases()]
        show.status(f"fit: peak memory of {len(names)} loss heads at {len(jobs)} shapes")
        self.heads = {n: fit_head(jobs, mib) for n, mib in measure.peaks_cpu(names, jobs).items()}

    def __call__(self, plan, entries, show, options):
        show.status(f"fit: {plan.shape}: peak memory of the decoder")
        found = measure.children([("suite", "fit", plan.shape, *point) for point in DECODER_POINTS])
        decoder, static = fit_decoder(found), static_bytes(plan)
        case, layers = plan.case, SHAPES[plan.shape].layers
        rows = []
        for question, (name, card) in itertools.product(QUESTIONS, itertools.product(entries, CARDS)):
            head, worst = self.heads[name]

            def peak(n, question=question, head=head):
                sequences, completion = layout(question, n)
                total, trained = sequences * (PROMPT + completion), sequences * completion
                kept, transient = decoder[1] * layers * total, decoder[0] * total
                return static + kept + max(transient, head(trained, case.V, case.D))

            tokens = largest(lambda n, p=peak, c=card: p(n) <= c * GIB, LIMIT[question])
            rows.append(
                row(
                    plan,
                    question,
                    name,
                    card=card,
                    tokens=tokens,
                    measured=False,
                    fit_residual=worst,
                    how="computed from allocations measured on a CPU",
                )
            )
        return rows


def head_cases():
    return [Case(n, v, d, profile="flat", dtype="bf16", head="frozen", group="fit") for n, v, d in HEAD_POINTS]


def head_features(n, vocab, depth):
    return (1.0, n, n * vocab, vocab * depth, n * depth)


def fit_head(jobs, mib):
    """Peak bytes as non-negative multiples of 1, N, N V, V D and N D -> (function, worst relative residual)."""
    features = numpy.array([head_features(c.N, c.V, c.D) for c, _ in jobs])
    wanted = numpy.array(mib) * measure.MIB
    weights = non_negative(features / features.max(0), wanted) / features.max(0)
    worst = float(numpy.abs(features @ weights - wanted).max() / wanted.max())
    return lambda n, vocab, depth: float(numpy.dot(head_features(n, vocab, depth), weights)), worst


def non_negative(features, wanted):
    """Least squares with non-negative weights: the best of all subsets of the (few) columns that come out so."""
    best = (numpy.inf, numpy.zeros(features.shape[1]))
    columns = range(features.shape[1])
    for size in range(1, features.shape[1] + 1):
        for chosen in itertools.combinations(columns, size):
            part, *_ = numpy.linalg.lstsq(features[:, chosen], wanted, rcond=None)
            error = float(numpy.square(features[:, chosen] @ part - wanted).sum())
            if (part >= 0).all() and error < best[0] * (1 - 1e-9):
                best = (error, numpy.bincount(chosen, part, minlength=features.shape[1]))
    return best[1]


def fit_decoder(mib):
    """-> (bytes a token while one layer is recomputed, bytes a token and layer kept for it)"""
    (t0, l0), (t1, _), (t2, l2) = DECODER_POINTS
    kept = (mib[2] - mib[1]) / (t2 * (l2 - l0))
    slope = (mib[1] - mib[0]) / (t1 - t0)
    return max(slope - kept * l0, 0.0) * measure.MIB, max(kept, 0.0) * measure.MIB


def child(name, tokens, layers):
    """In the fresh process: peak MiB of a checkpointed forward and backward through the decoder."""
    wide = SHAPES[name]
    shape = Shape(**{**vars(wide), "vocab": 1024})  # the embedding is counted with the weights
    model = build_model(shape, torch.bfloat16, "cpu", int(layers), LORA_RANK)
    decoder = causal_lm(model).get_decoder()

    def step(count):
        states = decoder(input_ids=torch.randint(0, 1024, (1, count))).last_hidden_state
        states.backward(torch.ones_like(states))
        model.zero_grad(set_to_none=True)
        return []

    step(64)
    return measure.peak_cpu(lambda: step(int(tokens)))


def largest(fits, limit):
    """The largest whole number up to ``limit`` that fits (0: not even one), for a test that turns false once."""
    low, high = 0, limit + 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


# ---- measured on a GPU, the process's memory capped


class Trainee:
    """A model on the GPU that takes steps on batches of any size."""

    def __init__(self, plan):
        torch.manual_seed(0)
        self.plan, shape = plan, SHAPES[plan.shape]
        rank = LORA_RANK if plan.tuning == "lora" else None
        self.model = build_model(shape, torch.bfloat16, "cuda", lora_rank=rank)
        causal = causal_lm(self.model)
        self.decoder, self.weight = causal.get_decoder(), causal.get_output_embeddings().weight
        self.optimizer = torch.optim.AdamW((p for p in self.model.parameters() if p.requires_grad), lr=0.0)

    def step(self, entry, sequences, completion):
        ids = torch.randint(0, self.plan.case.V, (sequences, PROMPT + completion), device="cuda")
        targets = ids[:, PROMPT:].contiguous()  # Liger's Triton loss takes no other
        ones = torch.ones(targets.shape, device="cuda")
        hidden = self.decoder(input_ids=ids).last_hidden_state[:, PROMPT - 1 : -1]
        problem = Problem(
            case=self.plan.case,
            hidden=hidden,
            weight=self.weight,
            targets=targets,
            advantages=torch.randn(sequences, device="cuda"),
            mask=ones.long(),
            old=-ones,
            ref=-ones,
            config=GRPOLossConfig(log_entropy=False),
        )
        entry.run_loss(problem).backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


def trains(trainee, entry, question, card, tokens):
    """Whether a step of that size stays within the card."""
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, card * GIB / total))
    try:
        trainee.step(entry, *layout(question, tokens))
        return True
    except torch.OutOfMemoryError:
        trainee.optimizer.zero_grad(set_to_none=True)
        return False
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def too_small(card):
    """Why a card cannot be tried on this GPU, or None; drivers keep up to a tenth of what is printed on one."""
    have = torch.cuda.get_device_properties(0).total_memory / GIB
    return None if have >= 0.9 * card else f"not run: this GPU has {have:.0f} GiB"


def search(fits, guess, limit, step=0.04):
    """Largest size that fits, to within ``step``: brackets it around the guess, then halves the bracket's ratio."""
    low, high = 0, limit + 1  # low fits, high does not
    size, unit = int(max(1, min(guess, limit))), 1 + step
    while high - low > 1 and (low == 0 or high > limit):
        if fits(size):
            low, size = size, min(limit, int(size * unit) + 1)
        else:
            high, size = size, max(1, int(size / unit))
        unit = min(unit * unit, 4.0)
    while high - low > 1 and high > low * (1 + step):
        middle = int((low * high) ** 0.5)
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def measure_cards(plan, entries, show, options):
    """Two uncapped steps give a first guess; each card's answer is then tried under its cap."""
    trainee, reason = measure.attempt(Trainee, plan, catch=(ImportError, torch.OutOfMemoryError))
    rows = []
    for question, (name, entry) in itertools.product(QUESTIONS, entries.items()):
        show.status(f"fit: {plan.title(question)}: {name}")
        why = options.late or reason
        if why is None:
            guess, why = measure.attempt(first_guess, trainee, entry, question)
        if why is not None:
            rows.append(row(plan, question, name, reason=why))
            continue
        for card in CARDS:
            if untried := options.late or too_small(card):
                rows.append(row(plan, question, name, card=card, reason=untried))
                continue
            fits = functools.partial(trains, trainee, entry, question, card)
            tokens, why = measure.attempt(search, fits, guess(card), LIMIT[question])
            found = {"reason": why} if why else {"tokens": tokens, "measured": True, "how": "memory capped"}
            rows.append(row(plan, question, name, card=card, **found))
    return rows


def first_guess(trainee, entry, question):
    """-> function from a card to tokens, from the peaks of two small steps."""
    sizes, peaks = (2048, 8192), []
    trainee.step(entry, *layout(question, sizes[0]))
    for size in sizes:
        torch.cuda.reset_peak_memory_stats()
        trainee.step(entry, *layout(question, size))
        peaks.append(torch.cuda.max_memory_allocated())
    slope = max((peaks[1] - peaks[0]) / (sizes[1] - sizes[0]), 1.0)
    return lambda card: sizes[1] + (card * GIB * 0.97 - peaks[1]) / slope


def table(rows):
    """-> (columns, cells): tokens for each card."""
    cells = []
    for name in dict.fromkeys(r["entry"] for r in rows):
        mine = [r for r in rows if r["entry"] == name]
        if all("tokens" not in r for r in mine):
            cells.append((name, mine[0]["reason"]))
            continue
        found = {r["card"]: describe(r) for r in mine}
        cells.append(
            (name, *(found[c] for c in CARDS), "measured" if any(r.get("measured") for r in mine) else "computed")
        )
    return ("entry", *(f"{c} GiB" for c in CARDS), ""), cells


def describe(r):
    if "tokens" not in r:
        return "-"
    return f">= {r['tokens']}" if r["tokens"] >= LIMIT[r["question"]] else str(r["tokens"])


def charts(rows, stem):
    """-> paths of the pictures written."""
    paths = []
    for (shape, tuning, question), mine in itertools.groupby(rows, lambda r: (r["shape"], r["tuning"], r["question"])):
        good = [{**r, "card": f"{r['card']} GiB"} for r in mine if "tokens" in r]
        if good:
            name = f"{stem}-{shape}-{tuning}-{question.split()[-1]}.png"
            how = "measured" if good[0]["measured"] else "computed from CPU allocations"
            paths.append(draw.grid(good, "card", "tokens", name, f"{question}, tokens ({how})"))
    return paths

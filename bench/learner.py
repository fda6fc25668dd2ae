"""What a learner step costs: ours, saving by saving, against TRL 1.16's own, on the same tiny model and data.

``python -m bench.learner``: groups of 8 answers, 10 % to 100 % of the longest, behind prompts of three lengths, none or
half of the groups at zero advantage; forward, loss and backward of the whole batch. TRL: ``GRPOTrainer._compute_loss``
over padded micro-batches of one group. Ours are of as many tokens as one group of longest answers. Rounds are
interleaved, medians compared, and the gradients must agree before a number is printed. Peak memory is that of a fresh
process an entry, beyond weights and gradients. Rows go to bench/results/learner-cpu.jsonl as they come, those that are
there already are kept (``--again`` measures them anew), and pictures beside them.
"""

import argparse
import copy
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from matplotlib.figure import Figure
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from bench import RESULTS
from bench.draw import save
from bench.measure import RETURN_MEMORY, machine, peak_cpu
from fastgrpo import GRPOLossConfig
from fastgrpo.integrations.transformers import fuse_lm_head
from fastgrpo.trainer.learner import Episode, Learner

GROUP = 8
TRL = "TRL 1.16"
PADDED, SORTED, SKIPPED, SHARED = ENTRIES = (
    "fastgrpo's loss head", "+ sorted by length", "+ zero advantages skipped", "+ shared prompts"
)  # fmt: skip
LONG = 2048  # tokens of a prompt from which a step is timed once


@dataclass(frozen=True)
class Case:
    prompt: int
    longest: int
    zeros: float  # share of the groups without an advantage
    groups: int = 2
    vocabulary: int = 8192
    width: int = 256
    layers: int = 4
    rounds: int = 3
    threads: int = 1

    @property
    def entries(self):
        return [TRL, *(name for name in ENTRIES if self.zeros or name != SKIPPED)]

    @property
    def title(self):
        return f"prompt {self.prompt}, answers to {self.longest}, {self.zeros:.0%} of the groups without advantage"


def make_model(case):
    config = Qwen2Config(
        vocab_size=case.vocabulary,
        hidden_size=case.width,
        intermediate_size=3 * case.width,
        num_hidden_layers=case.layers,
        num_attention_heads=case.width // 64,
        num_key_value_heads=max(case.width // 128, 1),
        max_position_embeddings=4096,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    return Qwen2ForCausalLM(config)


def make_episodes(model, case):
    """Lengths spread evenly over 10 % ... 100 % of the longest; the last groups have no advantage."""
    g, count = torch.Generator().manual_seed(1), case.groups * GROUP
    lengths = torch.linspace(0.1, 1.0, count)[torch.randperm(count, generator=g)] * case.longest
    lengths, episodes = lengths.round().int().tolist(), []
    for group in range(case.groups):
        prompt = torch.randint(0, case.vocabulary, (case.prompt,), generator=g).tolist()
        for n in lengths[group * GROUP : (group + 1) * GROUP]:
            advantage = 0.0 if group >= case.groups * (1 - case.zeros) else float(torch.randn((), generator=g))
            episodes.append(Episode(prompt, torch.randint(0, case.vocabulary, (n,), generator=g).tolist(), advantage))
    fused = fuse_lm_head(copy.deepcopy(model))
    learner = Learner(fused, Accelerator(cpu=True), GRPOLossConfig(), budget=8192, share_prompts=True)
    for e, logp in zip(episodes, learner.score(episodes)):
        e.old = e.sampler = logp + torch.randn(logp.shape, generator=g) * 0.1
    return episodes


class GroupByGroup(Learner):
    """Micro-batches as TRL makes them."""

    def plan(self, episodes):
        self.cut, self.largest = True, 1
        groups = [episodes[i : i + GROUP] for i in range(0, len(episodes), GROUP)]
        return [sorted(group, key=lambda e: -e.length) for group in groups]


def ours(model, episodes, case, name):
    model, kind, options = fuse_lm_head(copy.deepcopy(model)).train(), Learner, {}
    options["budget"] = GROUP * (case.prompt + case.longest)
    options["skip"] = name in (SKIPPED, SHARED)
    if name == PADDED:
        kind = GroupByGroup
    if name == SHARED:
        options |= {"budget": case.prompt + GROUP * case.longest, "share_prompts": True}
    learner = kind(model, Accelerator(cpu=True), GRPOLossConfig(), **options)

    def run():
        learner.gradients(episodes)
        return {n: p.grad for n, p in model.named_parameters()}

    return run


def trl(model, episodes, folder):
    from datasets import Dataset
    from tokenizers import Tokenizer, models
    from trl import GRPOConfig, GRPOTrainer

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"<pad>": 0, "<eos>": 1}, unk_token="<pad>")),
        pad_token="<pad>",
        eos_token="<eos>",
    )
    accumulation, width = len(episodes) // GROUP, max(len(e.completion_ids) for e in episodes)
    arguments = GRPOConfig(
        output_dir=folder,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        report_to="none",
        per_device_train_batch_size=GROUP,
        gradient_accumulation_steps=accumulation,
        num_generations=GROUP,
        max_completion_length=width,
        disable_dropout=True,
    )
    trainer = GRPOTrainer(
        copy.deepcopy(model),
        lambda completions, **_: [0.0] * len(completions),
        arguments,
        Dataset.from_list([{"prompt": "a"}] * 64),
        processing_class=tokenizer,
    )
    trainer.current_gradient_accumulation_steps = accumulation
    model = trainer.model.train()
    batch = {
        name: torch.zeros(len(episodes), width, dtype=torch.long) for name in ("completion_ids", "completion_mask")
    }
    batch["old_per_token_logps"] = torch.zeros(len(episodes), width)
    for i, e in enumerate(episodes):
        n = len(e.completion_ids)
        batch["completion_ids"][i, :n], batch["completion_mask"][i, :n] = torch.tensor(e.completion_ids), 1
        batch["old_per_token_logps"][i, :n] = e.old
    batch["prompt_ids"] = torch.tensor([e.prompt_ids for e in episodes])
    batch["prompt_mask"] = torch.ones_like(batch["prompt_ids"])
    batch["advantages"] = torch.tensor([e.advantage for e in episodes])
    tokens = batch["completion_mask"].sum()

    def run():
        model.zero_grad(set_to_none=True)
        for start in range(0, len(episodes), GROUP):
            part = {k: v[start : start + GROUP] for k, v in batch.items()}
            trainer._compute_loss(model, {**part, "num_items_in_batch": tokens}).backward()
        return {n: p.grad for n, p in model.named_parameters()}

    return run


def make_run(name, model, episodes, case, folder):
    return trl(model, episodes, folder) if name == TRL else ours(model, episodes, case, name)


def difference(grads, want):
    """Relative error of all gradients together."""
    square = sum((grads[n] - w).double().square().sum() for n, w in want.items())
    return (square / sum(w.double().square().sum() for w in want.values())).sqrt().item()


def clock(run):
    """-> seconds, gradients"""
    start = time.perf_counter()
    grads = run()
    return time.perf_counter() - start, grads


def child_time(case):
    """-> {entry: [median seconds, relative difference of the gradients from TRL's, rounds]}"""
    model = make_model(case)
    episodes = make_episodes(model, case)
    with tempfile.TemporaryDirectory() as folder:
        runs = {name: make_run(name, model, episodes, case, folder) for name in case.entries}
        times, errors, want = {}, {}, {}
        for name, run in runs.items():  # the first round is compared, and counts where steps are long
            seconds, grads = clock(run)
            want = want or {n: g.clone() for n, g in grads.items()}
            times[name], errors[name] = [seconds], difference(grads, want)
        if case.prompt < LONG:
            times = {name: [] for name in runs}
            for _, (name, run) in itertools.product(range(case.rounds), runs.items()):
                times[name].append(clock(run)[0])
    return {name: [statistics.median(t), errors[name], len(t)] for name, t in times.items()}


def child_memory(case, name):
    """-> peak MiB beyond weights and gradients of one step, after a small one that loads libraries."""
    model = make_model(case)
    small = make_episodes(model, Case(4, 10, 0.0, 1, case.vocabulary, case.width, case.layers))
    episodes = make_episodes(model, case)
    with tempfile.TemporaryDirectory() as folder:
        make_run(name, model, small, case, folder)()
        run = make_run(name, model, episodes, case, folder)
        return peak_cpu(lambda: run().values())


def child(what, case, *more):
    """One of the functions above in a process of its own."""
    command = [sys.executable, "-m", "bench.learner", "--child", json.dumps([what, asdict(case), *more])]
    environment = {**os.environ, "OMP_NUM_THREADS": str(case.threads)}
    if what == "memory":
        environment |= RETURN_MEMORY
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=environment, cwd=Path(__file__).parents[1])
    if done.returncode:
        raise SystemExit(f"failed: {' '.join(command)}")
    return json.loads(done.stdout.splitlines()[-1])


def answer(text):
    what, fields, *more = json.loads(text)
    torch.set_num_threads(fields["threads"])
    print(json.dumps({"time": child_time, "memory": child_memory}[what](Case(**fields), *more)))


def key(row):
    return tuple(row[name] for name in ("prompt", "longest", "zeros", "entry"))


class Rows:
    """The results' file: a row a case and entry."""

    def __init__(self, path):
        self.path = path
        lines = path.read_text().splitlines() if path.exists() else []
        self.rows = {key(row): row for row in map(json.loads, lines) if "prompt" in row}

    def add(self, case, name, about, **found):
        row = {**about, **asdict(case), "entry": name, "answers": case.groups * GROUP, "dtype": "float32"}
        row = {**self.rows.get(key(row), {}), **row, **found}
        self.rows[key(row)] = row
        text = "".join(json.dumps(self.rows[k]) + "\n" for k in sorted(self.rows, key=place))
        self.path.write_text(text)
        return row

    def missing(self, case, names, field):
        return [
            name
            for name in names
            if self.rows.get((case.prompt, case.longest, case.zeros, name), {}).get(field) is None
        ]


def place(row_key):
    *numbers, entry = row_key
    return (*numbers, [TRL, *ENTRIES].index(entry))


def measure_time(case, rows, about):
    found = child("time", case)
    worst = max(error for _, error, _ in found.values())
    if worst > 1e-4:
        raise SystemExit(f"{case.title}: the gradients differ by {worst:.1e}")
    for name, (seconds, error, rounds) in found.items():
        faster = found[TRL][0] / seconds
        rows.add(
            case, name, about, seconds=seconds, times_faster_than_trl=faster, gradient_difference=error, rounds=rounds
        )
        print(f"  {name:28} {seconds:8.3f} s  {faster:5.1f} x  gradients {error:.0e}", flush=True)


def measure_memory(case, names, rows, about):
    """Of batches without zeros: skipping leaves micro-batches, and so their peak, as large."""
    for name in names:
        row = rows.add(case, name, about, peak_mib=child("memory", case, name))
        print(f"  {name:28} {row['peak_mib']:8.0f} MiB", flush=True)


def bars(rows, field, zeros, label, path):
    """A panel a prompt and answer length, a bar an entry."""
    rows = [r for r in rows if r["zeros"] == zeros and r.get(field) is not None]
    columns, lines = (sorted({r[name] for r in rows}) for name in ("prompt", "longest"))
    figure = Figure(figsize=(4.2 * len(columns), 2.2 * len(lines)), layout="constrained")
    axes = figure.subplots(len(lines), len(columns), squeeze=False, sharey=True)
    for (i, longest), (j, prompt) in itertools.product(enumerate(lines), enumerate(columns)):
        mine, axis = [r for r in rows if (r["prompt"], r["longest"]) == (prompt, longest)], axes[i][j]
        if not mine:  # not measured yet
            axis.set_axis_off()
            continue
        values, names = [r[field] for r in mine], [r["entry"] for r in mine]
        axis.barh(names, values, color=["C1" if name == TRL else "C0" for name in names])
        axis.bar_label(axis.containers[0], [f"{v:.3g} ({values[0] / v:.1f} x)" for v in values], padding=3, fontsize=7)
        axis.set_title(f"prompt {prompt}, answers 10 % ... 100 % of {longest}", fontsize=8)
        axis.set_xlabel(label, fontsize=8)
        axis.tick_params(labelsize=8)
        axis.margins(x=0.35)
    axes[0][0].invert_yaxis()
    return save(figure, path, rows)


def plot(rows, path):
    """Time and memory, a picture each."""
    rows = sorted(rows, key=lambda row: place(key(row)))
    label = "seconds a learner step, half of the groups without advantage"
    bars(rows, "seconds", 0.5, label, path.with_suffix(".png"))
    bars(rows, "peak_mib", 0.0, "peak MiB beyond weights and gradients", path.with_name(f"{path.stem}-memory.png"))


def table(rows):
    """Markdown: a line an entry, a column a case."""
    cases = dict.fromkeys((r["prompt"], r["longest"]) for r in sorted(rows, key=lambda row: place(key(row))))
    found = {key(row): row for row in rows}

    def cell(case, entry):
        parts = []
        for zeros in (0.0, 0.5):
            row = found.get((*case, zeros, entry), {})
            if "seconds" in row:
                parts.append(f"{row['seconds']:.2f} s ({row['times_faster_than_trl']:.1f} x)")
            else:
                parts.append("")
        memory = found.get((*case, 0.0, entry), {}).get("peak_mib")
        return "; ".join(filter(None, [*parts, f"{memory:.0f} MiB" if memory else ""]))

    head = [
        "| | " + " | ".join(f"prompt {p}, answers to {n}" for p, n in cases) + " |",
        "|---" * (len(cases) + 1) + "|",
    ]
    return "\n".join([*head, *(f"| {e} | " + " | ".join(cell(c, e) for c in cases) + " |" for e in (TRL, *ENTRIES))])


def summary(rows):
    """Markdown: the goals' case, and how far each saving carries."""
    found = {key(row): row for row in rows}

    def ratio(field, case, ours, other):
        return found[(*case, other)][field] / found[(*case, ours)][field]

    half, none = (512, 128, 0.5), (512, 128, 0.0)
    ours, trl_row = found[(*half, SHARED)], found[(*half, TRL)]
    times = [
        min(found[(*k[:2], zeros, TRL)]["seconds"] for zeros in (0.0, 0.5) if (*k[:2], zeros, TRL) in found)
        / r["seconds"]
        for k, r in found.items()
        if k[2:] == (0.5, SHARED)
    ]
    return (
        f"Prompt 512, answers 10 % to 100 % of 128, half of the groups without advantage: {ours['seconds']:.2f} s a "
        f"learner step, {trl_row['seconds']:.2f} s for TRL 1.16's own loss on the same model and data, "
        f"{ours['times_faster_than_trl']:.1f} x. Without any zeros, sharing makes our own step "
        f"{ratio('seconds', none, SHARED, SORTED):.1f} x faster and its activations "
        f"{ratio('peak_mib', none, SHARED, SORTED):.1f} x smaller ({ratio('peak_mib', none, SHARED, TRL):.1f} x than "
        f"TRL's). Over all {len(times)} lengths, half zero, {min(times):.1f} x to {max(times):.1f} x TRL's, "
        f"whose zeros cost what the rest does: the faster of its two ({ours['device']}; `python -m bench.learner`)."
    )


def parse(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, nargs="+", default=[64, 512, 2048])
    parser.add_argument("--longest", type=int, nargs="+", default=[128, 512])
    parser.add_argument("--zeros", type=float, nargs="+", default=[0.0, 0.5])
    parser.add_argument("--measure", nargs="+", choices=("time", "memory"), default=["time", "memory"])
    parser.add_argument("--again", action="store_true", help="also what has its row already")
    for name in ("groups", "vocabulary", "width", "layers", "rounds", "threads"):
        parser.add_argument(f"--{name}", type=int, default=getattr(Case, name))
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def main(arguments=None):
    options = parse(arguments)
    if options.child:
        answer(options.child)
    else:
        measure(options)


def measure(options):
    torch.set_num_threads(options.threads)
    about = machine("cpu", "python -m bench.learner")
    rows = Rows(options.output / "learner-cpu.jsonl")
    sizes = {name: getattr(options, name) for name in ("groups", "vocabulary", "width", "layers", "rounds", "threads")}
    cases = [Case(*x, **sizes) for x in itertools.product(options.prompts, options.longest, options.zeros)]
    started = time.monotonic()
    for i, case in enumerate(cases):
        print(f"[{time.monotonic() - started:4.0f} s] {i + 1} of {len(cases)}: {case.title}", flush=True)
        if "time" in options.measure and (options.again or rows.missing(case, case.entries, "seconds")):
            measure_time(case, rows, about)
        if "memory" in options.measure and not case.zeros:
            names = case.entries if options.again else rows.missing(case, case.entries, "peak_mib")
            measure_memory(case, names, rows, about)
    plot(rows.rows.values(), rows.path)
    print(f"written: {rows.path} and pictures")


if __name__ == "__main__":
    main()

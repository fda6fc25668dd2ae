"""What a learner step costs: ours, which skips and packs, against TRL 1.16's own, on the same tiny model and data.

``python -m bench.learner``: a batch with half of its groups at zero advantage and completions from 10 % to 100 % of the
longest; forward, loss and backward. TRL: ``GRPOTrainer._compute_loss`` over the padded batch, in micro-batches. Rounds
are interleaved, medians are compared, and the gradients must agree before a number is printed. Rows go to
bench/results/learner-cpu.jsonl, a picture beside them.
"""

import argparse
import copy
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
from accelerate import Accelerator
from matplotlib.figure import Figure
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from bench import RESULTS
from bench.draw import write
from bench.measure import machine
from fastgrpo import GRPOLossConfig
from fastgrpo.integrations.transformers import fuse_lm_head
from fastgrpo.trainer.learner import Episode, Learner

GROUP, PROMPT = 8, 32


def make_model(vocabulary, width, layers):
    config = Qwen2Config(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        num_key_value_heads=max(width // 128, 1),
        max_position_embeddings=4096,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    return Qwen2ForCausalLM(config)


def make_episodes(model, groups, longest):
    """Every second group without an advantage; lengths spread evenly over 10 % ... 100 % of the longest."""
    g, vocabulary, episodes = torch.Generator().manual_seed(1), model.config.vocab_size, []
    lengths = torch.linspace(0.1, 1.0, groups * GROUP)[torch.randperm(groups * GROUP, generator=g)] * longest
    for i, n in enumerate(lengths.round().int().tolist()):
        ids = torch.randint(0, vocabulary, (PROMPT + n,), generator=g).tolist()
        advantage = 0.0 if i // GROUP % 2 else float(torch.randn((), generator=g))
        episodes.append(Episode(ids[:PROMPT], ids[PROMPT:], advantage))
    learner = Learner(fuse_lm_head(copy.deepcopy(model)), Accelerator(cpu=True), GRPOLossConfig(), budget=4096)
    for e, logp in zip(episodes, learner.score(episodes)):
        e.old = e.sampler = logp + torch.randn(logp.shape, generator=g) * 0.1
    return episodes


def ours(model, episodes, config, **options):
    model = fuse_lm_head(copy.deepcopy(model)).train()
    learner = Learner(model, Accelerator(cpu=True), config, **options)

    def run():
        learner.gradients(episodes)
        return {n: p.grad for n, p in model.named_parameters()}

    return run


def trl(model, episodes, micro, folder):
    from tokenizers import Tokenizer, models
    from trl import GRPOConfig, GRPOTrainer

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"<pad>": 0, "<eos>": 1}, unk_token="<pad>")),
        pad_token="<pad>",
        eos_token="<eos>",
    )
    from datasets import Dataset

    accumulation = len(episodes) // micro
    arguments = GRPOConfig(
        output_dir=folder,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        report_to="none",
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=accumulation,
        num_generations=GROUP,
        max_completion_length=max(len(e.completion_ids) for e in episodes),
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
    width = max(len(e.completion_ids) for e in episodes)
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
        for start in range(0, len(episodes), micro):
            part = {k: v[start : start + micro] for k, v in batch.items()}
            trainer._compute_loss(model, {**part, "num_items_in_batch": tokens}).backward()
        return {n: p.grad for n, p in model.named_parameters()}

    return run


def difference(grads, want):
    """Relative error of all gradients together."""
    square = sum((grads[n] - w).double().square().sum() for n, w in want.items())
    return (square / sum(w.double().square().sum() for w in want.values())).sqrt().item()


def measure(entries, rounds):
    times = {name: [] for name in entries}
    for _ in range(rounds):
        for name, run in entries.items():
            start = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def plot(rows, path):
    figure = Figure(figsize=(6.4, 2.8), layout="constrained")
    axis = figure.subplots()
    axis.barh(
        [r["entry"] for r in rows], [r["seconds"] for r in rows], color=[f"C{'TRL' in r['entry']:d}" for r in rows]
    )
    axis.bar_label(axis.containers[0], [f"{r['times_faster_than_trl']:.1f} x" for r in rows], padding=3)
    axis.invert_yaxis()
    axis.margins(x=0.12)
    axis.set(xlabel="seconds a learner step", title="half of the groups without advantage, lengths 10 % ... 100 %")
    write(figure, path)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--groups", type=int, default=4)
    parser.add_argument("--longest", type=int, default=256)
    parser.add_argument("--vocabulary", type=int, default=8192)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1, help="more wait for each other where cores are shared")
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model = make_model(options.vocabulary, options.width, options.layers)
    episodes = make_episodes(model, options.groups, options.longest)
    config = GRPOLossConfig()
    with tempfile.TemporaryDirectory() as folder:
        entries = {
            f"TRL 1.16, micro-batches of {micro}": trl(model, episodes, micro, folder)
            for micro in sorted({GROUP, len(episodes) // 2})
        }
        entries |= {
            "fastgrpo, sorted by length": ours(model, episodes, config, budget=2048),
            "fastgrpo, packed (SDPA blocks)": ours(model, episodes, config, budget=1024, packed=True),
            "fastgrpo, sorted, nothing skipped": ours(model, episodes, config, budget=2048, skip=False),
        }
        want = {n: g.clone() for n, g in next(iter(entries.values()))().items()}
        errors = {name: difference(run(), want) for name, run in entries.items()}
        if max(errors.values()) > 1e-4:
            sys.exit(f"the gradients differ: {errors}")
        medians = measure(entries, options.rounds)
    best = min(seconds for name, seconds in medians.items() if "TRL" in name)
    about = machine("cpu", " ".join(["python -m bench.learner", *sys.argv[1:]]))
    sizes = {k: getattr(options, k) for k in ("groups", "longest", "vocabulary", "width", "layers", "rounds")}
    rows = [
        {
            **about,
            **sizes,
            "entry": name,
            "seconds": seconds,
            "times_faster_than_trl": best / seconds,
            "gradient_difference": errors[name],
            "answers": len(episodes),
            "dtype": "float32",
            "completion_tokens": sum(len(e.completion_ids) for e in episodes),
        }
        for name, seconds in medians.items()
    ]
    for row in rows:
        faster, error = row["times_faster_than_trl"], row["gradient_difference"]
        print(f"{row['entry']:36} {row['seconds']:.3f} s  {faster:.2f} x  gradients {error:.1e}")
    path = options.output / "learner-cpu.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    plot(rows, path.with_suffix(".png"))
    print(f"written: {path}, {path.with_suffix('.png')}")


if __name__ == "__main__":
    main()

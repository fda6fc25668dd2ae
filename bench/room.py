"""Whether a preset's run fits on a card, computed: ``python -m bench.room [PRESET] [--shape NAME] [--card GIB]``.

No GPU is asked. Each part is a formula with its source; tests compare the stored parts with real tensors. The learner's
part is for micro-batches of the ``token_budget`` that "auto" starts from, which grows only where there is room.
"""

import argparse
import json
from typing import NamedTuple

import torch

from bench import RESULTS
from bench.shapes import SHAPES, build_model
from fastgrpo.trainer.job import read
from fastgrpo.trainer.learner import AUTO_BUDGET

GIB = 2**30
NF4_BITS = 4 + 8 / 64 + 32 / (64 * 256)  # a weight, and its share of the doubly quantised constants
CONTEXT = 0.5 * GIB
PROMPT = 256  # tokens of a GSM8K problem with its instructions, at most
QLORA = "Dettmers et al., arXiv:2305.14314, section 3: NF4, double quantisation"


class Part(NamedTuple):
    name: str
    bytes: float
    source: str


def stored(shape, settings):
    """What is there all the time."""
    model = build_model(shape, torch.bfloat16, "meta", lora_rank=settings.get("lora_r", 16))
    head = model.get_base_model().get_output_embeddings().weight
    layers = [m.base_layer.weight for m in model.modules() if hasattr(m, "base_layer")]
    packed = {id(w) for w in layers if w is not head} if settings.get("load_in_4bit") else set()
    base = [p for p in model.parameters() if not p.requires_grad]
    adapter = sum(p.numel() for p in model.parameters() if p.requires_grad)
    small = sum(p.numel() for p in base if id(p) in packed)
    rest = sum(p.numel() for p in base if id(p) not in packed)
    other = Part("other weights, bf16", rest * 2, "2 bytes each")
    if packed:  # and a copy of the head under autocast
        other = Part("other weights, fp32", rest * 4 + head.numel() * 2, "PEFT's prepare_model_for_kbit_training")
    return [
        Part("linear layers in 4 bits", small * NF4_BITS / 8, QLORA),
        other,
        Part("adapter and its gradients, fp32", adapter * 8, "PEFT keeps adapters in fp32"),
        Part("8-bit Adam", adapter * (2 + 8 / 256), "Dettmers et al., arXiv:2110.02861: blocks of 256"),
        Part("CUDA context", CONTEXT, "as bench/suites/fit.py counts it"),
    ]  # fmt: skip


def learning(shape, tokens):
    """The most that a micro-batch adds."""
    inputs = 4 * shape.width + shape.heads * shape.head_dim + 2 * shape.width + shape.mlp  # of the adapted layers
    inner = 8 * shape.width + 4 * shape.kv_heads * shape.head_dim + 4 * shape.mlp
    scratch, row = loss_scratch()
    return [
        Part(
            f"inputs of {shape.layers} checkpointed layers, {tokens} tokens",
            2 * tokens * shape.width * shape.layers,
            "Chen et al., arXiv:1604.06174: one tensor a layer",
        ),
        Part(
            "one layer computed again, and its gradients",
            tokens * (2 * inner + 8 * shape.width + 4 * inputs) * 1.5,
            "counted as in Korthikanti et al., arXiv:2205.05198, section 4, with a gated MLP and LoRA in fp32",
        ),
        Part("a layer's weights unpacked", 2 * shape.width * shape.mlp, QLORA),
        Part("loss head", scratch, f"measured: bench/results/loss-cuda.jsonl, {row}"),
    ]


def loss_scratch():
    """-> bytes of the largest frozen-head case measured on a GPU, and its title"""
    rows = map(json.loads, (RESULTS / "loss-cuda.jsonl").read_text().splitlines())
    found = [r for r in rows if r["entry"] == "fastgrpo auto" and "frozen" in r["title"] and r.get("peak_mib")]
    row = max(found, key=lambda r: r["peak_mib"])
    return row["peak_mib"] * 2**20, row["title"]


def generating(shape, settings):
    """The most that sampling adds."""
    answers = settings["per_device_train_batch_size"] * settings.get("gradient_accumulation_steps", 1)
    tokens = min(settings.get("max_generation_tokens", 65536), answers * (PROMPT + settings["max_completion_length"]))
    cache = 2 * 2 * tokens * shape.layers * shape.kv_heads * shape.head_dim
    return [
        Part(f"keys and values of {tokens} tokens, twice", 2 * cache, "bf16; transformers copies them to append"),
        Part("a token's logits", 4 * 5 * answers * shape.vocab, "fp32, log-probs, entropies and the draw"),
    ]


def parts(preset, shape):
    """-> what is stored, what learning adds, what generation adds"""
    settings = read(preset)
    budget = settings.get("token_budget", "auto")
    tokens = AUTO_BUDGET if budget == "auto" else budget
    return stored(shape, settings), learning(shape, tokens), generating(shape, settings)


def total(found):
    always, *either = (sum(part.bytes for part in group) for group in found)
    return always + max(either)


def main(arguments=None):
    parser = argparse.ArgumentParser(prog="python -m bench.room", description=__doc__)
    parser.add_argument("preset", nargs="?", default="gsm8k-4bit")
    parser.add_argument("--shape", choices=SHAPES, default="Qwen2.5-1.5B")
    parser.add_argument("--card", type=float, default=16.0, help="GiB")
    options = parser.parse_args(arguments)
    found = parts(options.preset, SHAPES[options.shape])
    for title, group in zip(("always", "while learning", "while generating"), found):
        print(f"{title}: {sum(part.bytes for part in group) / GIB:.2f} GiB")
        for part in group:
            print(f"  {part.bytes / GIB:6.2f}  {part.name}  [{part.source}]")
    whole = total(found) / GIB
    print(f"at most {whole:.1f} GiB of {options.card:g}: {'fits' if whole < options.card else 'too large'}")


if __name__ == "__main__":
    main()

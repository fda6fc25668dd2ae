"""The trainer as a whole: tiny jobs with its default settings, resumed, and a batch of each beside the CPU's."""

import copy
import itertools
import json
import math
import shutil
import statistics
import tempfile
from pathlib import Path

import torch

from bench.contact.device import absent, attempt

PACKAGES = ("transformers", "accelerate", "matplotlib", "rich", "yaml")  # what fastgrpo[train] brings
STEPS, KEPT = 5, 3  # of a job; its checkpoint is in the middle of the second rollout
LORA = {"use_peft": True, "lora_target_modules": ["q_proj", "v_proj", "lm_head"]}
PRESET = {"eval_strategy": "no", "eval_on_start": False, "learning_rate": 1e-2}  # a preset's own takes longer to learn
VOCABULARY = 8192  # on a GPU
EXACT, ROUNDED = 1e-4, 3.0  # relative error of fp32; of bf16 autocast, in that of the CPU's autocast


def trainer(contact, shard=0, shards=1):
    """Each job in a row of its own; ``beside``: how many processes share the device, so that times say little."""
    if row := absent(*PACKAGES):
        yield row
        return
    for what, function, needs, options in CASES[shard::shards]:
        row = absent(*needs) or attempt(in_folder, function, contact, **options)
        yield {"what": what, "beside": shards - 1, **row}


def in_folder(function, contact, **options):
    with tempfile.TemporaryDirectory() as folder:
        return function(contact, Path(folder), **options)


def fresh(contact, **settings):
    """Settings of a job on the device, after which accelerate may be given others than before."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(True)
    return {"use_cpu": not contact.cuda, "report_to": "none", **settings}


def many_rewards(completions, completion_ids, **_):
    """Many distinct rewards, so that every group has advantages; an untrained model answers nothing right."""
    return [sum(token % 7 for token in ids) / (7 * len(ids)) for ids in completion_ids]


def grpo(contact, folder, dropout=0.0, **settings):
    from fastgrpo.trainer import GRPOConfig, GRPOTrainer, examples

    model, tokenizer = examples.tiny_model("tiny:sort", 0, VOCABULARY if contact.cuda else None)
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = dropout
    options = {
        "max_steps": STEPS,
        "save_steps": KEPT,
        "per_device_train_batch_size": 8,
        "steps_per_generation": 2,
        "num_generations": 4,
        "max_completion_length": 12,
        "learning_rate": 1e-3,
    }
    config = GRPOConfig(output_dir=str(folder), **fresh(contact, **options, **settings))
    return GRPOTrainer(model, many_rewards, "tiny:sort", config, processing_class=tokenizer)


def sft(contact, folder, steps=8, **settings):
    from fastgrpo.trainer import SFTTrainer, job

    options = PRESET | {"max_steps": steps, "save_strategy": "no", "output_dir": str(folder)}
    given, config = job.load_config("sft-tiny", fresh(contact, **options, **settings), "sft")
    return SFTTrainer(given["model"], given["train_dataset"], config)


def distill(contact, folder, steps=12, **settings):
    """The teacher is as random as the student, but sure of itself."""
    from fastgrpo.trainer import DistillTrainer, examples, job

    options = PRESET | {"max_steps": steps, "save_strategy": "no", "output_dir": str(folder)}
    given, config = job.load_config("distill-tiny", fresh(contact, **options, **settings), "distill")
    teacher = examples.tiny_model(given["model"], 7)[0]
    with torch.no_grad():
        teacher.lm_head.weight.mul_(20.0)
    return DistillTrainer(given["model"], teacher, given["train_dataset"], config)


def learnt(trainer):
    """Trains -> the log's rows, and what they say of time, memory and numbers."""
    rows = trainer.train()
    ends = [0.0, *(row["seconds"] for row in rows)]
    seconds = [round(b - a, 3) for a, b in itertools.pairwise(ends)]
    found = {"precision": trainer.accelerator.mixed_precision, "optim": trainer.config.optim}
    found |= {"first_s": seconds[0], "step_s": round(statistics.median(seconds[1:]), 4)}
    if trainer.accelerator.device.type == "cuda":
        found["peak_mib"] = round(torch.cuda.max_memory_allocated() / 2**20, 1)  # of the last step's learner
    found |= {
        name: [round(row[name], 5) for row in rows] for name in ("loss", "grad_norm", "reward") if name in rows[0]
    }
    return rows, found


def sound(rows):
    """All numbers finite, and something to learn in each step."""
    finite = all(math.isfinite(value) for row in rows for value in row.values() if isinstance(value, float))
    return finite and all(row["grad_norm"] > 0 for row in rows)


def resumed(contact, folder, **settings):
    """A job, the same again, and the same from its checkpoint on. A device whose own kernels do not repeat themselves
    tells nothing of the checkpoint: what is resumed may then differ as runs do."""
    whole, again, half = (folder / name for name in ("whole", "again", "half"))
    rows, found = learnt(grpo(contact, whole, **settings))
    grpo(contact, again, **settings).train()
    half.mkdir()
    shutil.copytree(whole / f"checkpoint-{KEPT}", half / f"checkpoint-{KEPT}")
    shutil.copy(whole / "log.jsonl", half)
    last = grpo(contact, half, resume_from_checkpoint=True, **settings)
    torch.manual_seed(99)
    last.train()
    repeated, back = distance(whole, again), distance(whole, half)
    found |= {"apart_again": repeated, "apart_resumed": back, "bit_exact": back == 0}
    return {**found, "ok": sound(rows) and back <= 4 * repeated}


def done(contact, folder, **settings):
    """A job, once."""
    rows, found = learnt(grpo(contact, folder, **settings))
    return {**found, "ok": sound(rows)}


def distance(one, other):
    """Of two jobs' weights and losses: relative."""
    a, b = map(numbers_of, (one, other))
    return float((a - b).norm() / a.norm())


def numbers_of(folder):
    from safetensors.torch import load_file

    (path,) = (folder / "model").glob("*.safetensors")
    weights = sorted(load_file(path).items())
    rows = map(json.loads, (folder / "log.jsonl").read_text().splitlines())
    values = [torch.tensor([row["loss"], row["grad_norm"]]) for row in rows]
    return torch.cat([x.double().flatten() for x in (*[weight for _, weight in weights], *values)])


def learns(contact, folder, make, steps):
    """A preset's job: its loss falls."""
    rows, found = learnt(make(contact, folder, steps))
    first, last = (statistics.mean(row["loss"] for row in part) for part in (rows[:3], rows[-3:]))
    return {**found, "ok": sound(rows) and last < 0.9 * first}


def losses_beside_cpu(contact, folder):
    """Every fp32 step of sft-tiny, optimiser and all, on the device and on the CPU: no sampling parts them."""
    losses = []
    for name, use_cpu in (("cpu", True), ("device", not contact.cuda)):
        rows = sft(contact, folder / name, 6, bf16=False, use_cpu=use_cpu).train()
        losses.append([row["loss"] for row in rows])
    errors = [abs(b - a) / abs(a) for a, b in zip(*losses)]
    return {"losses": losses, "errors": errors, "ok": max(errors) < 1e-3}


def gradients_beside_cpu(contact, folder, make, **settings):
    """One batch, the CPU's own: fp32's gradients and log-probs on the device are the CPU's within rounding, those of
    bf16 autocast as near as a CPU's."""
    episodes, *want = batch_of(make(contact, folder, bf16=False, **{**settings, "use_cpu": True}))

    def errors(**precision):
        trainer = make(contact, folder, **settings, **precision)
        _, *got = batch_of(trainer, copy.deepcopy(episodes))
        return {name: float((a - b).norm() / b.norm()) for name, a, b in zip(("gradients", "logprobs"), got, want)}

    kinds = {"fp32": {"bf16": False}, "bf16": {"bf16": True}, "bf16_cpu": {"bf16": True, "use_cpu": True}}
    row = {name: attempt(errors, **precision) for name, precision in kinds.items()}
    if any("error" in found for found in row.values()):
        return {**row, "ok": False}
    near = all(error < EXACT for error in row["fp32"].values())
    rounded = all(0 < error < ROUNDED * row["bf16_cpu"][name] + 1e-3 for name, error in row["bf16"].items())
    return {**row, "ok": near and rounded}


def batch_of(trainer, episodes=None):
    """-> a rollout (None: the trainer's own), its first batch's gradients and log-probs, float64 on the CPU."""
    fill_lora(trainer.model)
    if episodes is None:
        episodes = trainer.collect()
    elif getattr(trainer, "reference", None) is not None:
        trainer.add_reference(episodes)  # its head
    trainer.rollout = episodes
    batch = trainer.batch()
    trainer.learner.gradients(batch)
    grads = [p.grad.double().flatten().cpu() for p in trainer.model.parameters() if p.grad is not None]
    return episodes, torch.cat(grads), torch.cat(trainer.learner.score(batch)).double()


def fill_lora(model):
    """B is zero at the start, and A would have no gradient."""
    g = torch.Generator().manual_seed(5)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            p.data.copy_(0.05 * torch.randn(p.shape, generator=g))


CASES = [  # (what, function, packages that it needs, its options)
    ("GRPO, dropout, resumed", resumed, (), {"dropout": 0.1}),
    ("GRPO with LoRA and a KL, resumed", resumed, ("peft",), {**LORA, "beta": 0.04}),
    ("distill-tiny", learns, (), {"make": distill, "steps": 12}),
    ("sft-tiny", learns, (), {"make": sft, "steps": 8}),
    ("GRPO, certified", done, (), {"backward": "certified"}),
    ("GRPO beside the CPU", gradients_beside_cpu, (), {"make": grpo}),
    ("distill-tiny beside the CPU", gradients_beside_cpu, (), {"make": distill}),
    ("sft-tiny beside the CPU", losses_beside_cpu, (), {}),
    ("LoRA beside the CPU", gradients_beside_cpu, ("peft",), {"make": grpo, **LORA, "lora_dropout": 0.0}),
]

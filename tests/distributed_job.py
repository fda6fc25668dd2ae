"""What each of two gloo processes of test_distributed.py does: ``main(output)``, started by processes.run_ranks.

accelerate offers FSDP2 on accelerators only, so its state is told here that this CPU run is one; everything behind that
switch (fsdp2_prepare_model, the optimiser's parameters, no_sync, clipping, checkpoints) is accelerate's own.
"""

import shutil
from pathlib import Path

import torch
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.state import AcceleratorState, DistributedType, GradientState, PartialState
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from fastgrpo import GRPOLossConfig
from fastgrpo.integrations.transformers import fuse_lm_head
from fastgrpo.trainer import DistillConfig, DistillTrainer, SFTConfig, SFTTrainer, loop
from fastgrpo.trainer.learner import Episode, Learner

import trainer_job

CASES = {
    "dapo": {}, "grpo, kl": {"loss_type": "grpo", "beta": 0.1},
    "bnpo, entropy": {"loss_type": "bnpo", "entropy_coef": 0.05, "top_entropy_quantile": 0.5},
}  # fmt: skip
RUNS = {
    "plain": {}, "moving reference": {"sync_ref_model": True, "ref_model_sync_steps": 2, "kl_estimator": "full"},
    "left out": {"beta": 0.0, "max_resample_times": 1},
    "lora": {"use_peft": True, "lora_target_modules": "all-linear", "lora_dropout": 0.0},
}  # fmt: skip
UNITS = {"fsdp2": ["Qwen2DecoderLayer"], "fsdp2, head alone": ["Qwen2DecoderLayer", "Linear"]}


def episodes(vocabulary=14):
    g = torch.Generator().manual_seed(0)
    result = []
    for i in range(10):
        n = 2 + i
        values = -2.5 + torch.randn(2, n, generator=g) * 0.3
        ids = torch.randint(0, vocabulary, (n + 3,), generator=g).tolist()
        advantage = 0.0 if i in (1, 2, 9) else float(torch.randn((), generator=g))
        result.append(Episode(ids[:3], ids[3:], advantage, sampler=values[0], old=values[0], ref=values[1]))
    return result


def share(everyone, rank, first=8):
    """Unequal work: rank 1 has one long sequence with an advantage, rank 0 needs more micro-batches."""
    return everyone[:first] if rank == 0 else everyone[first:]


def make_accelerator(kind, **options):
    if PartialState._shared_state.get("distributed_type") == DistributedType.FSDP:
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_CPU
    AcceleratorState._reset_state()
    GradientState._reset_state()
    accelerator = Accelerator(cpu=True, **{k: v for k, v in options.items() if k in ("log_with", "project_dir")})
    if kind in UNITS:
        wrap = FullyShardedDataParallelPlugin(
            fsdp_version=2, auto_wrap_policy="transformer_based_wrap", reshard_after_forward=True,
            transformer_cls_names_to_wrap=UNITS[kind],
        )  # fmt: skip
        AcceleratorState._shared_state |= {"distributed_type": DistributedType.FSDP, "fsdp_plugin": wrap}
        PartialState._shared_state["distributed_type"] = DistributedType.FSDP
    return accelerator


def full(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def limit_memory(model, rank):
    """Rank 0 runs out of memory above 13 tokens, but for its very first micro-batch."""
    calls = []

    def full(module, arguments, options):
        calls.append(options["input_ids"].numel())
        if rank == 0 and calls[-1] > 13 and len(calls) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    model.register_forward_pre_hook(full, with_kwargs=True)


def gradients(kind, tied, settings, limited=False, turns=False):
    accelerator = make_accelerator(kind)
    model = fuse_lm_head(trainer_job.make_model(tied, dropout=0.0)[0])
    model, _ = accelerator.prepare(model, torch.optim.AdamW(model.parameters()))
    options = {"budget": 80, "share_prompts": True, "longest": 55} if turns else {"budget": 24}
    learner = Learner(model, accelerator, GRPOLossConfig(max_completion_length=12, **settings), **options)
    if limited:
        limit_memory(learner.inner, accelerator.process_index)
    mine = trainer_job.make_conversations(vocabulary=14) if turns else episodes()
    mine = share(mine, accelerator.process_index, 5 if turns else 8) if accelerator.num_processes > 1 else mine
    numbers = learner.gradients(mine)
    assert accelerator.num_processes == 1 or kind == "ddp" or isinstance(model.model.norm.weight, DTensor)
    assert kind != "fsdp2, head alone" or isinstance(model.lm_head, FSDPModule)
    named = {n.removeprefix("module."): full(p.grad).clone() for n, p in model.named_parameters()}
    scores = learner.score(mine)  # passes without a gradient: as many on each rank
    return {"grads": named, "loss": accelerator.reduce(numbers["loss"]), "scores": scores, "budget": learner.budget}


def dull(completions, **_):
    """Rare rewards: some groups have no spread."""
    return [float(text[:1].isdigit() and int(text[0]) > 4) for text in completions]


def train(kind, output, settings):
    """The whole trainer: three steps, a checkpoint, two more; then the two again from the checkpoint."""
    loop.Accelerator = lambda **options: make_accelerator(kind, **options)
    settings = {"max_steps": 5, "save_steps": 3, "beta": 0.05, "eval_strategy": "steps", "eval_steps": 3, **settings}
    for resume in (False, f"{output}/checkpoint-3"):
        if resume and torch.distributed.get_rank() == 0:
            shutil.rmtree(f"{output}/checkpoint-5")
        torch.distributed.barrier()
        trainer = trainer_job.make_trainer(
            output, model=trainer_job.make_model(dropout=0.0), eval_rows=trainer_job.problems(3),
            rewards=dull if settings["beta"] == 0 else trainer_job.digits,
            resume_from_checkpoint=resume, **settings,
        )  # fmt: skip
        trainer.train()
        weights = {n.removeprefix("module."): full(p).detach().clone() for n, p in trainer.model.named_parameters()}
        yield weights, trainer_job.log_rows(output) if trainer.accelerator.is_main_process else None


def fine_tune(kind, output, ranks=2):
    """Supervised: four steps of four rows, over the ranks or in one process -> its weights, its log."""
    loop.Accelerator = lambda **options: make_accelerator(kind, **options)
    settings = {"max_steps": 4, "per_device_train_batch_size": 4 // ranks, "learning_rate": 1e-3, "eval_steps": 4,
                "eval_strategy": "steps", "save_steps": 2, "use_cpu": True, "optim": "adamw_torch"}  # fmt: skip
    model, tokenizer = trainer_job.make_model(dropout=0.0)
    config = SFTConfig(output_dir=output, **settings)
    trainer = SFTTrainer(model, trainer_job.problems(10), config, trainer_job.problems(3), tokenizer)
    log = trainer.train()
    return {n.removeprefix("module."): full(p).detach().clone() for n, p in trainer.model.named_parameters()}, log


def distil(kind, output, ranks=2):
    """From a wider teacher: three steps of four answers, over the ranks or in one process -> its weights, its log. With
    top_k 1 every number of ranks has the same answers."""
    loop.Accelerator = lambda **options: make_accelerator(kind, **options)
    settings = {"max_steps": 3, "per_device_train_batch_size": 4 // ranks, "learning_rate": 1e-3, "eval_steps": 3,
                "eval_strategy": "steps", "save_strategy": "no", "use_cpu": True, "optim": "adamw_torch", "top_k": 1,
                "max_completion_length": 5}  # fmt: skip
    model, tokenizer = trainer_job.make_model(dropout=0.0)
    teacher = trainer_job.make_model(dropout=0.0, width=48)[0]
    config = DistillConfig(output_dir=output, **settings)
    rows = trainer_job.problems(10)
    trainer = DistillTrainer(model, teacher, rows, config, rows[:3], processing_class=tokenizer)
    log = trainer.train()
    return {n.removeprefix("module."): full(p).detach().clone() for n, p in trainer.model.named_parameters()}, log


def main(output):
    loop.plot_curves = lambda *arguments: None  # of twenty runs, a quarter of their time
    results = {}
    for kind in ("ddp", "fsdp2"):
        for tied in (False, True):
            for name, settings in CASES.items():
                results[kind, tied, name] = gradients(kind, tied, settings)
                if kind == "ddp":
                    results["ddp, little memory", tied, name] = gradients(kind, tied, settings, limited=True)
        results[kind, False, "turns"] = gradients(kind, False, CASES["grpo, kl"], turns=True)
        for name, settings in RUNS.items():
            results[kind, name] = list(train(kind, f"{output}/{kind}-{name}", settings))
        results[kind, "distil"] = distil(kind, f"{output}/{kind}-distil")
        results[kind, "sft"] = fine_tune(kind, f"{output}/{kind}-sft")
    kind, name = "fsdp2, head alone", "dapo"  # a tied head cannot be a unit of its own
    results[kind, False, name] = gradients(kind, False, CASES[name])
    torch.save(results, Path(output) / f"rank{torch.distributed.get_rank()}.pt")

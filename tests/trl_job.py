"""Tiny jobs for TRL's own trainers, stock and ours; also what each of two gloo processes does: ``main(output)``,
started by processes.run_ranks."""

import json
from pathlib import Path

import torch
import transformers
import trl
from datasets import Dataset

from fastgrpo.trainer import examples

VOCABULARY = 61
SIZES = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64,
    "initializer_range": 0.3,  # sharp enough that a wrong temperature, softcap or scale shows
}  # fmt: skip
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "decoder_sparse_step": 1}
FAMILIES = {
    "Qwen2": {}, "Qwen3": {}, "Llama": {}, "Gemma2": {"final_logit_softcapping": 3.0, "query_pre_attn_scalar": 8},
    "Granite": {"logits_scaling": 0.25}, "Qwen3Moe": EXPERTS,
}  # fmt: skip
SETTINGS = {
    "max_steps": 6, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "learning_rate": 2e-3,
    "logging_steps": 1, "report_to": [], "save_strategy": "no", "bf16": False, "use_cpu": True, "disable_tqdm": True,
    "seed": 3,
}  # fmt: skip
GENERATION = {"num_generations": 4, "num_iterations": 2, "max_completion_length": 6, "beta": 0.05}
TIMES = ("time", "runtime", "per_second", "flos")


def tokenizer():
    """With a padding and a beginning of its own, as most models have."""
    tokens = examples.tiny_tokenizer(examples.WORLDS["sort"], VOCABULARY)
    tokens.add_special_tokens({"pad_token": "<pad>", "bos_token": "<bos>"})
    return tokens


def save_model(path, family="Qwen2", tied=False, **options):
    """A model on disk, from where TRL reads its reference."""
    tokens = tokenizer()
    ids = {name: getattr(tokens, name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
    config = getattr(transformers, f"{family}Config")(
        **{**SIZES, **ids, **FAMILIES[family], **options}, tie_word_embeddings=tied
    )
    torch.manual_seed(1)
    getattr(transformers, f"{family}ForCausalLM")(config).save_pretrained(path)
    return str(path)


def digits(completions, **_):
    """Many distinct rewards, so that every group has advantages."""
    return [sum(c.isdigit() for c in text) / 6 + len(text) / 100 for text in completions]


def prompts():
    return Dataset.from_list([{"prompt": row["prompt"]} for row in problems(10)])


def problems(count):
    return examples.problems(examples.WORLDS["sort"], count, 0)


def lora(*targets, **options):
    from peft import LoraConfig

    return LoraConfig(r=4, target_modules=list(targets), task_type="CAUSAL_LM", **options)


def load(path, **options):
    return transformers.AutoModelForCausalLM.from_pretrained(path, **options)


def grpo(kind, output, model, peft_config=None, ours=None, **settings):
    """A GRPO trainer (TRL's or ours) of a saved or given model."""
    config = trl.GRPOConfig(output_dir=str(output), **{**SETTINGS, **GENERATION, **settings})
    model = load(model) if isinstance(model, str) else model
    return kind(model, digits, config, prompts(), prompts(), tokenizer(), peft_config=peft_config, **(ours or {}))


def log_rows(trainer):
    """What was logged, without what depends on the clock."""
    rows = trainer.state.log_history
    return [{k: v for k, v in row.items() if not any(word in k for word in TIMES)} for row in rows]


def as_fsdp2(trainer):
    """accelerate offers FSDP2 on accelerators only, so its state is told that this CPU run is one."""
    from accelerate import FullyShardedDataParallelPlugin
    from accelerate.state import AcceleratorState, DistributedType, PartialState

    wrap = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="transformer_based_wrap", reshard_after_forward=True,
        transformer_cls_names_to_wrap=["Qwen2DecoderLayer"],
    )  # fmt: skip
    AcceleratorState._shared_state |= {"distributed_type": DistributedType.FSDP, "fsdp_plugin": wrap}
    PartialState._shared_state["distributed_type"] = DistributedType.FSDP
    trainer.is_fsdp_enabled = True


def main(output):
    from torch.distributed.tensor import DTensor

    from fastgrpo.integrations.trl import FastGRPOTrainer

    output, results = Path(output), {}
    for parallel in ("ddp", "fsdp2"):
        for kind in (trl.GRPOTrainer, FastGRPOTrainer):
            beta = 0.05 if parallel == "ddp" else 0.0
            trainer = grpo(kind, output / "run", str(output / "model"), ddp_backend="gloo", beta=beta)
            if parallel == "fsdp2":
                as_fsdp2(trainer)
            trainer.train()
            sharded = isinstance(trainer.model.lm_head.weight, DTensor)
            results[f"{parallel} {kind.__name__}"] = [type(trainer.model_wrapped).__name__, sharded, log_rows(trainer)]
    (output / f"{trainer.accelerator.process_index}.json").write_text(json.dumps(results))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()

"""Published shapes of models people train, and models of those shapes with random weights."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Shape:
    """The numbers of one model, as in its published config.json."""

    name: str
    kind: str  # transformers' model_type
    vocab: int
    width: int
    mlp: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    tied: bool
    softcap: float | None = None  # of the final logits


SHAPES = {
    s.name: s
    for s in (
        Shape("Qwen2.5-0.5B", "qwen2", 151936, 896, 4864, 24, 14, 2, 64, True),
        Shape("Qwen2.5-1.5B", "qwen2", 151936, 1536, 8960, 28, 12, 2, 128, True),
        Shape("Qwen2.5-7B", "qwen2", 152064, 3584, 18944, 28, 28, 4, 128, False),
        Shape("Qwen3-0.6B", "qwen3", 151936, 1024, 3072, 28, 16, 8, 128, True),
        Shape("Qwen3-4B", "qwen3", 151936, 2560, 9728, 36, 32, 8, 128, True),
        Shape("Qwen3-8B", "qwen3", 151936, 4096, 12288, 36, 32, 8, 128, False),
        Shape("Llama-3-8B", "llama", 128256, 4096, 14336, 32, 32, 8, 128, False),
        Shape("Gemma-2-2B", "gemma2", 256000, 2304, 9216, 26, 8, 4, 256, True, 30.0),
    )
}


def model_config(shape, layers=None):
    """transformers' config of the shape; ``layers`` fewer than it has make a model that runs on less."""
    from transformers import AutoConfig

    return AutoConfig.for_model(
        shape.kind,
        vocab_size=shape.vocab,
        hidden_size=shape.width,
        intermediate_size=shape.mlp,
        num_hidden_layers=layers or shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        tie_word_embeddings=shape.tied,
        max_position_embeddings=1 << 20,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
        use_cache=False,
        **({"final_logit_softcapping": shape.softcap} if shape.softcap else {}),
    )


def build_model(shape, dtype, device, layers=None, lora_rank=None):
    """A causal LM with random weights, gradient checkpointing on; ``lora_rank``: peft adapters, the rest frozen."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device(device):
        model = AutoModelForCausalLM.from_config(model_config(shape, layers), dtype=dtype, attn_implementation="sdpa")
    if lora_rank:
        from peft import LoraConfig, get_peft_model

        lora = LoraConfig(r=lora_rank, lora_alpha=2 * lora_rank, target_modules="all-linear", task_type="CAUSAL_LM")
        model = get_peft_model(model, lora)
        model.enable_input_require_grads()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model.train()


def parameter_count(shape, layers=None):
    """Parameters of the shape, counted without allocating them."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(model_config(shape, layers))
    return sum(p.numel() for p in model.parameters())

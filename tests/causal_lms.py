"""Tiny random models of transformers' causal LM classes: ``python causal_lms.py`` compares each with its logits."""

import sys
from collections import Counter

import torch
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedConfig
from transformers.utils import logging

from fastgrpo.integrations.transformers import fuse_lm_head

SIZES = {
    "vocab_size": 97, "vocab_size_per_layer_input": 97, "encoder_hash_byte_group_vocab": 97,
    "hidden_size": 32, "d_model": 32, "n_embd": 32, "embed_dim": 32, "hidden_size_global": 32,
    "num_hidden_layers": 2,
    "n_layer": 2, "n_layers": 2, "num_layers": 2, "decoder_layers": 2, "encoder_layers": 1, "num_decoder_layers": 2,
    "num_attention_heads": 4, "n_head": 4, "n_heads": 4, "num_heads": 4, "decoder_attention_heads": 4,
    "encoder_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "intermediate_size": 48, "ffn_dim": 48,
    "decoder_ffn_dim": 48, "encoder_ffn_dim": 48, "n_inner": 48, "d_ff": 48, "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16, "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4,
    "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "num_expert_group": 1,
    "max_position_embeddings": 64, "n_positions": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "is_decoder": True, "use_cache": False,
    # what is done to the logits
    "final_logit_softcapping": 3.0, "logits_soft_cap": 3.0, "output_logit_soft_cap": 3.0, "logits_scaling": 4.0,
    "logit_scale": 0.25, "lm_head_multiplier": 0.25, "logits_mup_width_multiplier": 2.0, "unpadded_vocab_size": 90,
}  # fmt: skip
LATENT = {  # where keys and values are compressed
    "head_dim": 4, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "qk_head_dim": 8, "v_head_dim": 8, "kv_lora_rank": 8,
    "q_lora_rank": 8, "num_key_value_heads": 4, "index_head_dim": 8, "index_n_heads": 2, "index_topk": 4,
}  # fmt: skip
MIXED = {"num_hidden_layers": 4}
BOTH = {"layer_types": ["linear_attention", "full_attention"]}
MAMBA2 = {"mamba_n_heads": 4, "mamba_d_head": 16}
OPTIONS = {
    "BailingHybridForCausalLM": BOTH, "KimiLinearForCausalLM": BOTH, "Lfm3ForCausalLM": MIXED,
    "JambaForCausalLM": {"attn_layer_period": 2, "attn_layer_offset": 1}, "RecurrentGemmaForCausalLM": MIXED,
    "BambaForCausalLM": MAMBA2 | {"attn_layer_indices": [1]}, "GraniteMoeHybridForCausalLM": MAMBA2,
    "Mamba2ForCausalLM": {"head_dim": 16, "n_groups": 1},
    "CodeGenForCausalLM": {"rotary_dim": 4}, "GPTJForCausalLM": {"rotary_dim": 4},
    "CohereCompassForCausalLM": {
        "rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}},
        "layer_types": ["full_attention"] * 2,
    },
    "DbrxForCausalLM": {
        "attn_config": {"rope_theta": 1e4, "kv_n_heads": 2, "clip_qkv": 8}, "ffn_config": {"ffn_hidden_size": 16},
    },
    "Dots1ForCausalLM": {"n_shared_experts": 1, "first_k_dense_replace": 1},
    "FalconH1ForCausalLM": MAMBA2 | {"mamba_d_ssm": 64, "mamba_d_state": 8, "mamba_chunk_size": 8},
    "Gemma3nForCausalLM": {"num_kv_shared_layers": 0, "activation_sparsity_pattern": [0.0] * 2},
    "Gemma4AssistantForCausalLM": {"hidden_size_per_layer_input": 0},
    "GPTNeoForCausalLM": {"attention_types": [[["global", "local"], 1]]},
    "Lfm2MoeForCausalLM": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "Qwen4ExpForCausalLM": {
        "layer_types": ["linear_attention", "indexed_attention"], "indexer_n_heads": 2, "indexer_kv_heads": 1,
        "indexer_head_dim": 8, "indexer_budget": 8, "indexer_compress_ratio": 2, "hc_lowrank": 8,
    },
    "ReformerModelWithLMHead": {
        "axial_pos_embds_dim": (16, 16), "axial_pos_shape": (8, 8), "attention_head_size": 8,
        "attn_layers": ["local"] * 2, "feed_forward_size": 48, "local_attn_chunk_length": 8,
    },
    "XmodForCausalLM": {"default_language": "en_XX", "languages": ["en_XX"]},
    "xLSTMForCausalLM": {"qk_dim_factor": 1.0},
    "ZayaForCausalLM": {"num_experts_per_tok": 1},
    "ZambaForCausalLM": MIXED | {"layer_types": ["mamba", "hybrid"] * 2},
    "Zamba2ForCausalLM": MIXED | {"layer_types": ["mamba", "hybrid"] * 2, "hybrid_layer_ids": [1, 3]},
}  # fmt: skip


def config_of(kind, **options):
    """A tiny config: those of ``SIZES`` that the kind knows, its texts' config included."""
    default = kind()
    known = {name: size for name, size in SIZES.items() if settable(default, name)}
    if settable(default, "kv_lora_rank"):
        known |= {name: size for name, size in LATENT.items() if settable(default, name)}
    known |= options
    for name in default.sub_configs.keys() - options.keys():
        child = getattr(default, name, None)
        if isinstance(child, PreTrainedConfig):
            known[name] = config_of(type(child)).to_dict()
    return kind(**known)


def settable(config, name):
    try:
        value = getattr(config, name)
        setattr(config, name, value)
    except Exception:  # every config has its own way to say no
        return False
    return True


def make(kind, model_class, **options):
    """A random model, sharper than at initialisation, so that a wrong softcap or scale shows."""
    torch.manual_seed(3)
    options = OPTIONS.get(model_class.__name__, {}) | options
    if getattr(model_class, "config_class", kind) is not kind:
        kind = model_class.config_class
    model = model_class(config_of(kind, **options)).eval()
    with torch.no_grad():
        for head in heads(model.get_output_embeddings()):
            head.weight.mul_(30)
    return model


def heads(module):
    return module if isinstance(module, torch.nn.ModuleList) else [module]


def tokens(batch=3, length=11):
    return torch.randint(3, SIZES["unpadded_vocab_size"], (batch, length), generator=torch.Generator().manual_seed(5))


def from_logits(model, ids):
    logp = model(input_ids=ids).logits.float()[:, :-1].log_softmax(-1)
    return logp.gather(-1, ids[:, 1:, None])[..., 0], -(logp.exp() * logp).sum(-1)


def gradients(model, values):
    model.zero_grad(set_to_none=True)
    (values * torch.linspace(-1, 1, values.numel()).view_as(values)).sum().backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_same(model, ids, tolerance=2e-5):
    want, entropy = from_logits(model, ids)
    want_grads = gradients(model, want)
    out = model(input_ids=ids, labels=ids, fastgrpo=True)
    assert out.logprobs.dtype == torch.float32
    grads = gradients(model, out.logprobs)
    torch.testing.assert_close(out.logprobs, want, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(out.entropy, entropy, rtol=tolerance, atol=tolerance)
    assert grads.keys() == want_grads.keys()
    for name, grad in grads.items():
        error = (grad - want_grads[name]).norm() / want_grads[name].norm().clamp(min=1e-3)
        assert error <= tolerance, (name, error)
    return grads


def error(model):
    """Largest difference of log-probs and entropy from those of the model's logits, in units of their spread."""
    ids, model = tokens(), fuse_lm_head(model)
    with torch.no_grad():
        want, entropy = from_logits(model, ids)
        got = model(input_ids=ids, labels=ids, fastgrpo=True)
    assert want.std() > 0.2  # else any scale would do
    return max((got.logprobs - want).abs().max().item(), (got.entropy - entropy).abs().max().item())


def classes():
    """{class: config class}, each once."""
    found = {}
    for kind, entry in MODEL_FOR_CAUSAL_LM_MAPPING.items():
        for model_class in entry if isinstance(entry, tuple) else (entry,):
            found.setdefault(model_class, kind)
    return found


def outcome(model_class, kind):
    """-> "equal", "different", "refused", "failed" or "not built", and why."""
    try:
        model = make(kind, model_class)
    except Exception as e:  # what a config may refuse has no end
        return "not built", repr(e)
    try:
        wrong = error(model)
    except Exception as e:
        return "refused" if isinstance(e, ValueError) and str(e).startswith("model's") else "failed", repr(e)
    return "equal" if wrong < 1e-4 else "different", f"{wrong:.1e}"


def main(only):
    logging.set_verbosity_error()
    counts = Counter()
    for model_class, kind in classes().items():
        if only and model_class.__name__ not in only:
            continue
        name, why = outcome(model_class, kind)
        counts[name] += 1
        print(f"{name:10}", model_class.__name__, why[:300])
    print(dict(counts))


if __name__ == "__main__":
    main(sys.argv[1:])

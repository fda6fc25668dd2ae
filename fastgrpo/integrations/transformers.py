"""Put the op inside a transformers model's LM head: ``fuse_lm_head(model)``.

The head is called as a module, from within the model's own forward, so that the hooks of DDP, FSDP2, ZeRO-3, PEFT and
autocast fire as they do for logits.
"""

import functools
from functools import partial
from types import MethodType

import torch

from fastgrpo.inputs import IGNORE
from fastgrpo.logprobs import LogProbs, linear_logprobs

LOGIT_SCALES = ("logit_scale", "output_multiplier", "lm_head_multiplier", "logits_scaling")


def fuse_lm_head(model):
    """Teach a causal language model the keyword ``fastgrpo=``; without it nothing changes, so generate is untouched.

    ``model(input_ids, ..., fastgrpo=function)`` runs the decoder, then the LM head, which calls
    ``function(hidden, weight, bias=..., softcap=..., logit_scale=...)`` with hidden (B, T, D) and weight (V, D) and
    whose result the forward returns. ``functools.partial(grpo_loss, targets=..., ...)`` and
    ``partial(linear_logprobs, targets=...)`` are such functions. No (tokens, vocab) logits are made.

    ``model(input_ids, labels=ids, fastgrpo=True)`` returns ``LogProbs(logprobs, entropy)``, each (B, T - 1) fp32: of
    the labels shifted by one, 0 where the label is -100.

    Args:
        model: a transformers causal LM or a PEFT wrapper of one, patched in place before or after wrapping. Softcap
            and logit scale are read from its config (Gemma 2, Cohere, Granite, Falcon-H1 ...). LoRA on the head counts
            as ``weight + delta`` without its dropout, which costs a (V, D) sum.

    Returns:
        the same model.

    Raises:
        ValueError: the model has no LM head, or a LoRA variant on its head (DoRA) that is not a sum of matrices.
    """
    base = causal_lm(model)
    if base.get_output_embeddings() is None:
        raise ValueError(f"model must have an LM head, {type(base).__name__} has none")
    if not hasattr(base, "_plain_forward"):
        base._plain_forward = base.forward  # bound methods, so that a deep copy is bound to the copy
        base.forward = MethodType(functools.wraps(type(base).forward)(causal_lm_forward), base)
    fuse_head(base)
    return model


def causal_lm(model):
    """The transformers model under PEFT's wrapper."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def fuse_head(model):
    """-> the LM head as it is now; PEFT may have replaced it since the last call."""
    head = model.get_output_embeddings()
    copies = getattr(head, "modules_to_save", None)  # PEFT's trained copy of a whole module calls the copy
    for module in (head,) if copies is None else (head.original_module, *copies.values()):
        if not hasattr(module, "_plain_forward"):
            module._plain_forward = module.forward
            module.forward = MethodType(head_forward, module)
    return head


def causal_lm_forward(self, *args, fastgrpo=None, **kwargs):
    if fastgrpo is None or fastgrpo is False:
        return self._plain_forward(*args, **kwargs)
    if fastgrpo is True:
        labels = torch.nn.functional.pad(kwargs.pop("labels")[:, 1:], (0, 1), value=IGNORE)
        score = partial(linear_logprobs, targets=labels, return_entropy=True)
        out = causal_lm_forward(self, *args, fastgrpo=score, **kwargs)
        return LogProbs(out.logprobs[:, :-1], out.entropy[:, :-1])
    kwargs.setdefault("use_cache", False)
    hidden = self.base_model(*args, **kwargs).last_hidden_state
    return fuse_head(self)(hidden, fastgrpo=partial(fastgrpo, **logit_options(self.config)))


def head_forward(self, hidden, *args, fastgrpo=None, **kwargs):
    if fastgrpo is None:
        return self._plain_forward(hidden, *args, **kwargs)
    return fastgrpo(hidden, head_weight(self), bias=self.bias)


def head_weight(head):
    """(V, D), with what LoRA adds to it; PEFT's layers lend the weight of the layer they wrap."""
    weight = head.weight
    if not hasattr(head, "lora_A") or head.disable_adapters or head.merged:
        return weight
    if getattr(head, "lora_variant", None):
        raise ValueError(f"LoRA on lm_head must be plain, got {sorted(map(str, head.lora_variant.values()))}")
    for name in head.active_adapters:
        if name in head.lora_A:
            weight = weight + head.get_delta_weight(name).to(weight.dtype)
    return weight


def logit_options(config):
    """Softcap and logit scale under the names that model configs use."""
    config = config.get_text_config()
    name, scale = next(((n, s) for n in LOGIT_SCALES if (s := getattr(config, n, None)) is not None), ("", 1.0))
    if name == "logits_scaling" and config.model_type != "hyperclovax":  # Granite and MiniCPM3 divide
        scale = 1.0 / scale
    return {"softcap": getattr(config, "final_logit_softcapping", None), "logit_scale": float(scale)}

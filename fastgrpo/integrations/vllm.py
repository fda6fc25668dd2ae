"""vLLM as the sampler: its settings, under TRL's names, and the two methods that the trainer calls.

vLLM runs on a GPU alone: here it is tested against its interface, with stand-ins for ``vllm`` and its client.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal
from unittest.mock import patch

import torch
from accelerate import Accelerator
from accelerate.utils import extract_model_from_parallel, gather_object

from fastgrpo.checks import Above1, Below1, Checked, need, require, require_installed
from fastgrpo.integrations.transformers import causal_lm
from fastgrpo.trainer.completions import Completion, completion, end_tokens

MismatchMode = Literal["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"]


@dataclass(frozen=True, kw_only=True)
class VLLMOptions(Checked):
    """Sampling through vLLM, and the correction of its mismatch with the learner: ``exp(old - sampled)`` log-probs.

    Args:
        use_vllm: sample through vLLM instead of transformers' ``generate``.
        vllm_mode: "colocate": in this process; "server": one that runs already.
        vllm_model_impl: "vllm", or "transformers" for a model that vLLM does not know.
        vllm_enable_sleep_mode: free vLLM's memory while the learner works (colocate).
        vllm_server_base_url, vllm_server_host, vllm_server_port: where the server is; a URL goes before host and port.
        vllm_server_timeout: seconds to wait for the server to come up.
        vllm_group_port: of the group that weights are sent in (server).
        vllm_gpu_memory_utilization: vLLM's share of the GPU's memory (colocate).
        vllm_max_model_length: tokens of a prompt and its answer; None: the model's positions.
        vllm_tensor_parallel_size: GPUs that share the model (colocate).
        vllm_importance_sampling_correction: weigh tokens by the ratio of the learner's and the sampler's probability.
        vllm_importance_sampling_mode: the ratio is a token's or a sequence's ("token_*", "sequence_*"); outside
            ``[clip_min, clip_max]`` it is cut ("*_truncate") or its term is dropped ("*_mask").
        vllm_importance_sampling_clip_max, vllm_importance_sampling_clip_min: bounds of that ratio; None: none.
        vllm_geometric_mask_max, vllm_geometric_mask_min: with any mode, drop answers whose geometric mean ratio, the
            exponential of the mean difference of log-probs over their tokens, is outside this band. It does not grow
            with the length; bands are narrow, as 1.001 (verl's rollout correction "geometric"; Liu, Li et al. 2025,
            "When speed kills stability"). min None: 1 / max; max None: no mask.
    """

    use_vllm: bool = False
    vllm_mode: Literal["colocate", "server"] = "colocate"
    vllm_model_impl: str = "vllm"
    vllm_enable_sleep_mode: bool = False
    vllm_server_base_url: str | None = None
    vllm_server_host: str = "0.0.0.0"
    vllm_server_port: int = 8000
    vllm_server_timeout: float = 240.0
    vllm_group_port: int = 51216
    vllm_gpu_memory_utilization: float = 0.3
    vllm_max_model_length: int | None = None
    vllm_tensor_parallel_size: int = 1
    vllm_importance_sampling_correction: bool = True
    vllm_importance_sampling_mode: MismatchMode = "sequence_mask"
    vllm_importance_sampling_clip_max: float | None = 3.0
    vllm_importance_sampling_clip_min: float | None = None
    vllm_geometric_mask_max: Above1 | None = None
    vllm_geometric_mask_min: Below1 | None = None

    def check_combinations(self) -> None:
        super().check_combinations()
        low, high = self.vllm_importance_sampling_clip_min, self.vllm_importance_sampling_clip_max
        require(
            low is None or high is None or low < high,
            f"vllm_importance_sampling_clip_min must be below clip_max {high}, got {low}",
        )
        low, high = self.vllm_geometric_mask_min, self.vllm_geometric_mask_max
        require(
            low is None or high is not None, f"vllm_geometric_mask_min needs vllm_geometric_mask_max, got {low} alone"
        )
        require(
            high is None or self.vllm_importance_sampling_correction,
            "vllm_geometric_mask_max is part of vllm_importance_sampling_correction, which is False",
        )
        if self.use_vllm:
            require_installed("vllm", "'fastgrpo[vllm]'")

    def mismatch_weights(self, old: torch.Tensor, sampled: torch.Tensor) -> torch.Tensor:
        """Importance weights of one answer, (length,) each: log-probs of the learner's policy and of the sampler."""
        mode = self.vllm_importance_sampling_mode
        low, high = self.vllm_importance_sampling_clip_min, self.vllm_importance_sampling_clip_max
        gap = (old - sampled).nan_to_num()
        ratio = (gap if mode.startswith("token") else gap.sum().expand_as(gap)).exp()
        low, high = 0.0 if low is None else low, float("inf") if high is None else high
        inside = (ratio >= low) & (ratio <= high)
        weights = ratio.clamp(low, high) if mode.endswith("truncate") else torch.where(inside, ratio, 0.0)
        return weights * self.near(gap)

    def near(self, gap: torch.Tensor) -> bool:
        """Whether the geometric mean of the ratios ``exp(gap)``, (length,), is inside its band."""
        high = self.vllm_geometric_mask_max
        if high is None or not len(gap):
            return True
        low = 1.0 / high if self.vllm_geometric_mask_min is None else self.vllm_geometric_mask_min
        return low <= gap.mean().exp().item() <= high


@torch.no_grad()
def named_weights(model: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, tensor) of each weight of the bare model, one at a time: shards gathered (every rank must iterate), 4-bit
    weights dequantised, LoRA's update added to a copy: the model itself is never merged, so it cannot drift."""
    model = extract_model_from_parallel(model)
    modules, is_peft = dict(model.named_modules()), hasattr(model, "peft_config")
    tensor: Any  # a parameter, a DTensor, a copy
    for name, tensor in model.named_parameters():
        owner, _, leaf = name.rpartition(".")
        if is_peft and (model.prefix in name or "original_module" in name):
            continue
        if is_peft and leaf == "weight":
            from peft.utils.integrations import dequantize_module_weight

            tensor, layer = dequantize_module_weight(modules[owner]), modules[owner.removesuffix(".base_layer")]
            for adapter in layer.active_adapters if layer is not modules[owner] else ():
                tensor = tensor + layer.get_delta_weight(adapter).to(tensor.dtype)
        tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
        name = name.removeprefix("base_model.model.").replace(".base_layer", "")
        yield name.replace("modules_to_save.default.", "").replace("_checkpoint_wrapped_module.", ""), tensor.detach()


def check_ends(model):
    """vLLM has one weight for tied embeddings and head: what is trained beside it at one end cannot be pushed."""
    base = causal_lm(model)
    ends = base.get_input_embeddings(), base.get_output_embeddings()
    tied = base.config.get_text_config().tie_word_embeddings
    if tied and any(hasattr(end, name) for end in ends for name in ("base_layer", "modules_to_save")):
        raise ValueError(
            "use_vllm needs untied embeddings where an adapter or modules_to_save is on lm_head or the embeddings: "
            "vLLM has one weight for both; take these out of lora_target_modules and lora_modules_to_save"
        )


class VLLMSampler:
    """vLLM as a server or in this process ("colocate"), through TRL's ``VLLMGeneration`` and TRL's names in the config.

    The log-probs are those of the distribution vLLM draws from, truncation included. A server is started by
    ``VLLM_SERVER_DEV_MODE=1 vllm serve MODEL --weight-transfer-config '{"backend": "nccl"}' --logprobs-mode
    processed_logprobs --max-logprobs -1``.
    """

    def __init__(self, config, tokenizer):
        need("vllm", "vllm")
        self.config, self.tokenizer = config, tokenizer
        self.engine: Any = None

    def start(self, model):
        model, trl = extract_model_from_parallel(model), need("trl.generation.vllm_generation", "vllm")
        check_ends(model)
        engine = type("Engine", (trl.VLLMGeneration,), {"_iter_named_params": lambda self: named_weights(self.model)})
        names = ["mode", "server_base_url", "server_host", "server_port", "server_timeout", "group_port", "model_impl"]
        names += ["tensor_parallel_size", "gpu_memory_utilization", "max_model_length", "enable_sleep_mode"]
        options = {name: getattr(self.config, f"vllm_{name}") for name in names}
        with patch.object(trl, "is_bitsandbytes_available", lambda: False):  # or a 4-bit vLLM, which takes no update
            return engine(model, Accelerator(), self.tokenizer, **options)

    def sync(self, model: torch.nn.Module) -> None:
        """Push the weights; every rank calls it."""
        self.engine = self.engine or self.start(model)
        self.engine.sync_weights()

    def generate(self, model, prompts: list[list[int]], sampling, greedy: bool = False) -> list[list[Completion]]:
        """-> for each prompt (a list of ids) its ``sampling.num_generations`` completions; ``greedy``: one."""
        if not self.engine:
            self.sync(model)
        n, ends = 1 if greedy else sampling.num_generations, end_tokens(model, self.tokenizer)
        for name in ("top_p", "top_k", "min_p", "repetition_penalty", "max_completion_length"):
            setattr(self.engine, name, getattr(sampling, name))
        self.engine.temperature = 0.0 if greedy else sampling.temperature
        # TRL takes every rank's share of the answers to be as long as its own: held-out prompts may be fewer on some
        missing = max(gather_object([len(prompts)])) - len(prompts)
        asked = [*prompts, *missing * (prompts[:1] or [ends[:1]])]
        _, ids, logprobs, _ = self.engine.generate([p for p in asked for _ in range(n)], None, n)
        rows = [completion(list(i), list(map(read_logprob, steps)), ends) for i, steps in zip(ids, logprobs)]
        return [rows[i : i + n] for i in range(0, len(prompts) * n, n)]


def read_logprob(step):
    """The drawn token's log-prob; TRL has None for vLLM's NaN."""
    return math.nan if step[0] is None else step[0]

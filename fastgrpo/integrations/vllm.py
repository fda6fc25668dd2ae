"""vLLM's settings, under TRL's names."""

from dataclasses import dataclass
from importlib.util import find_spec

from fastgrpo.inputs import check_choice

MISMATCH_MODES = ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask")


@dataclass(frozen=True, kw_only=True)
class VLLMOptions:
    """Sampling through vLLM, and the correction of its mismatch with the learner: ``exp(old - sampled)`` log-probs.

    The ratio is a token's or a sequence's ("token_*", "sequence_*"); outside ``[clip_min, clip_max]`` it is cut
    ("*_truncate") or its term is dropped ("*_mask").
    """

    use_vllm: bool = False
    vllm_mode: str = "colocate"
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
    vllm_importance_sampling_mode: str = "sequence_mask"
    vllm_importance_sampling_clip_max: float | None = 3.0
    vllm_importance_sampling_clip_min: float | None = None

    def __post_init__(self):
        check_choice("vllm_mode", self.vllm_mode, ("colocate", "server"))
        check_choice("vllm_importance_sampling_mode", self.vllm_importance_sampling_mode, MISMATCH_MODES)
        low, high = self.vllm_importance_sampling_clip_min, self.vllm_importance_sampling_clip_max
        if low is not None and high is not None and low >= high:
            raise ValueError(f"vllm_importance_sampling_clip_min must be below clip_max {high}, got {low}")
        if self.use_vllm and find_spec("vllm") is None:
            raise ValueError("use_vllm needs vllm: pip install 'fastgrpo[vllm]'")

    def mismatch_weights(self, old, sampled):
        """Importance weights of one answer, (length,) each: log-probs of the learner's policy and of the sampler."""
        mode = self.vllm_importance_sampling_mode
        low, high = self.vllm_importance_sampling_clip_min, self.vllm_importance_sampling_clip_max
        gap = (old - sampled).nan_to_num()
        ratio = (gap if mode.startswith("token") else gap.sum().expand_as(gap)).exp()
        low, high = 0.0 if low is None else low, float("inf") if high is None else high
        if mode.endswith("truncate"):
            return ratio.clamp(low, high)
        return ratio * ((ratio >= low) & (ratio <= high))

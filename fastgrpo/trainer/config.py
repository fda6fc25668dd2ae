"""The trainer's config: TRL's names and defaults, every mistake found before a model is loaded."""

import difflib
import math
import types
import typing
from dataclasses import dataclass, fields
from importlib.util import find_spec
from pathlib import Path

import yaml

from fastgrpo.advantages import SCALES
from fastgrpo.config import GRPOLossConfig
from fastgrpo.inputs import BACKENDS, BACKWARDS, check_choice
from fastgrpo.integrations.vllm import VLLMOptions

PRESETS = Path(__file__).parent / "presets"
JOB = ("model", "reward_funcs", "train_dataset", "eval_dataset")  # of a YAML file: GRPOTrainer's other arguments
OPTIMIZERS = ("adamw_torch", "adamw_torch_fused", "adamw_8bit", "paged_adamw_8bit", "paged_adamw_32bit")
TRACKERS = ("none", "tensorboard", "wandb", "trackio")


@dataclass(frozen=True, kw_only=True)
class GRPOConfig(GRPOLossConfig, VLLMOptions):
    """Settings of :class:`fastgrpo.trainer.GRPOTrainer`; those of the loss and of vLLM are inherited.

    Names and defaults are those of TRL 1.16's ``GRPOConfig`` and ``ModelConfig``. As there, sizes count answers:
    an optimiser step takes ``per_device_train_batch_size * gradient_accumulation_steps`` on each rank, a rollout
    ``per_device_train_batch_size * steps_per_generation`` (None: one optimiser step), ``num_generations`` a prompt,
    used for ``num_iterations`` epochs. How they are cut into micro-batches is up to ``token_budget``. Different or new:

    Args:
        token_budget: tokens of a micro-batch; "auto" finds it: 8192 at first, more while a GPU has room, halved when
            memory runs out.
        packing: micro-batches without padding, in blocks of ``position_ids``; "auto": where flash-attn is used.
            Otherwise answers are sorted by length and padded.
        skip_zero_advantages: leave out of the learner what cannot have a gradient.
        recompute_old_logprobs: score a rollout again instead of taking the sampler's log-probs for the policy's; None:
            with vLLM, and in 16 bits where a rollout serves several optimiser steps.
        bf16: autocast; None: on a GPU that has it. dtype: of the weights.
        attn_implementation: None: flash-attn if installed (16 bits, GPU), else SDPA, else eager.
        use_peft, lora_r, lora_alpha, lora_dropout, lora_target_modules, lora_modules_to_save: LoRA, as in ModelConfig.
        load_in_4bit, load_in_8bit: QLoRA, through bitsandbytes.
        ref_model_sync_steps, ref_model_mixup_alpha: with ``sync_ref_model`` every that many steps the reference becomes
            ``alpha * policy + (1 - alpha) * reference``; alpha 1 replaces it.
        max_generation_tokens: prompt and answer tokens generated at once.
        eval_pass_threshold: the weighted reward from which an answer counts as right in pass@k.
        resume_from_checkpoint: True: from the newest complete checkpoint in ``output_dir``, or a folder.
        logging_steps: of trackers and console; log.jsonl has every step.

    Raises:
        ValueError: naming the setting, what was expected and what came.
    """

    output_dir: str = "runs/grpo"
    run_name: str | None = None
    report_to: str | list[str] = "none"
    seed: int = 42
    use_cpu: bool = False
    resume_from_checkpoint: bool | str = False
    max_steps: int = -1
    num_train_epochs: float = 3.0
    shuffle_dataset: bool = True
    chat_template_kwargs: dict | None = None
    per_device_train_batch_size: int = 8
    gradient_accumulation_steps: int = 1
    steps_per_generation: int | None = None
    num_generations: int = 8
    num_iterations: int = 1
    token_budget: int | str = "auto"
    packing: bool | str = "auto"
    skip_zero_advantages: bool = True
    recompute_old_logprobs: bool | None = None
    backend: str = "auto"
    backward: str = "auto"
    max_completion_length: int = 512
    top_p: float = 1.0
    top_k: int = 0
    min_p: float | None = None
    repetition_penalty: float = 1.0
    max_generation_tokens: int = 65536
    reward_weights: list[float] | None = None
    scale_rewards: str | bool = "group"
    mask_truncated_completions: bool = False
    sync_ref_model: bool = False
    ref_model_mixup_alpha: float = 0.6
    ref_model_sync_steps: int = 512
    learning_rate: float = 1e-6
    lr_scheduler_type: str = "linear"
    warmup_steps: int = 0
    optim: str = "adamw_torch"
    weight_decay: float = 0.0
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_epsilon: float = 1e-8
    max_grad_norm: float = 1.0
    model_init_kwargs: dict | None = None
    tiny_vocabulary: int | None = None
    trust_remote_code: bool = False
    dtype: str = "float32"
    disable_dropout: bool = False
    bf16: bool | None = None
    attn_implementation: str | None = None
    gradient_checkpointing: bool = True
    activation_offloading: bool = False
    use_liger_kernel: bool = False
    use_peft: bool = False
    lora_r: int = 16
    lora_alpha: int = 32
    lora_dropout: float = 0.05
    lora_target_modules: str | list[str] | None = None
    lora_modules_to_save: list[str] | None = None
    load_in_4bit: bool = False
    load_in_8bit: bool = False
    eval_strategy: str = "no"
    eval_steps: int = 100
    eval_on_start: bool = False
    num_generations_eval: int = 8
    eval_pass_threshold: float = 1.0
    logging_steps: int = 10
    log_completions: bool = False
    num_completions_to_print: int = 8
    save_strategy: str = "steps"
    save_steps: int = 500
    save_total_limit: int | None = None

    def __post_init__(self):
        hints = typing.get_type_hints(type(self))
        for field in fields(self):
            if not fits(getattr(self, field.name), hints[field.name]):
                kind = getattr(hints[field.name], "__name__", hints[field.name])
                raise ValueError(f"{field.name} must be {kind}, got {getattr(self, field.name)!r}")
        scale = {True: "group", False: "none"}.get(self.scale_rewards, self.scale_rewards)
        object.__setattr__(self, "scale_rewards", scale)
        GRPOLossConfig.__post_init__(self)
        VLLMOptions.__post_init__(self)
        for name, expected, holds in RANGES:
            if (value := getattr(self, name)) is not None and not (isinstance(value, str) or holds(value)):
                raise ValueError(f"{name} must be {expected}, got {value!r}")
        for name, allowed in CHOICES:
            check_choice(name, getattr(self, name), allowed)
        for name in self.trackers:
            check_choice("report_to", name, TRACKERS)
        for ok, message in self.combinations():
            if not ok:
                raise ValueError(message)
        for wanted, package, install in self.packages():
            if wanted and find_spec(package) is None:
                raise ValueError(f"this config needs {package}: pip install {install}")

    def combinations(self):
        """(holds, what is wrong otherwise) of settings that depend on each other."""
        import torch

        answers, accumulate, rollout = self.per_device_train_batch_size, self.gradient_accumulation_steps, self.rollout
        quantised = self.load_in_4bit or self.load_in_8bit
        yield (
            rollout % self.num_generations == 0,
            (
                f"num_generations must divide a rank's rollout of {rollout} answers (per_device_train_batch_size "
                f"{answers} x steps_per_generation), got {self.num_generations}"
            ),
        )
        yield (
            rollout % (answers * accumulate) == 0,
            (
                f"steps_per_generation must be a multiple of gradient_accumulation_steps {accumulate}, got "
                f"{self.steps_per_generation}"
            ),
        )
        yield self.max_steps > 0 or self.max_steps == -1, f"max_steps must be > 0 or -1 (epochs), got {self.max_steps}"
        yield not quantised or self.use_peft, "load_in_4bit and load_in_8bit need use_peft=True, got False"
        sequences = self.vllm_importance_sampling_correction and self.vllm_importance_sampling_mode.startswith(
            "sequence"
        )
        yield (
            not (self.use_vllm and self.loss_type == "vespo" and sequences),
            (
                "loss_type='vespo' weighs sequences itself: vllm_importance_sampling_mode must be 'token_...', got "
                f"{self.vllm_importance_sampling_mode!r}"
            ),
        )
        yield not (self.load_in_4bit and self.load_in_8bit), "load_in_4bit and load_in_8bit cannot both be True"
        yield not self.sync_ref_model or self.beta > 0, "sync_ref_model needs a reference: beta > 0, got 0"
        yield (
            not (self.sync_ref_model and self.use_peft),
            ("sync_ref_model needs a reference of its own, but that of use_peft is the model without its adapter"),
        )
        yield (
            not self.use_liger_kernel or torch.cuda.is_available(),
            ("use_liger_kernel must be False here: Liger's layer kernels need a CUDA GPU, and there is none"),
        )
        yield (
            not (self.optim.startswith("paged") and not torch.cuda.is_available()),
            (f"optim {self.optim!r} pages GPU memory and there is no CUDA GPU: expected adamw_torch or adamw_8bit"),
        )
        yield hasattr(torch, self.dtype) or self.dtype == "auto", f"dtype must be 'auto' or torch's, got {self.dtype!r}"

    def packages(self):
        """(needed, package, what brings it)."""
        yield self.use_peft, "peft", "'fastgrpo[peft]'"
        yield self.load_in_4bit or self.load_in_8bit or "bit" in self.optim, "bitsandbytes", "'fastgrpo[quant]'"
        yield self.use_liger_kernel, "liger_kernel", "'fastgrpo[liger]'"
        yield "flash" in (self.attn_implementation or ""), "flash_attn", "'fastgrpo[flash]'"
        yield from ((True, name, name) for name in self.trackers)

    @property
    def trackers(self):
        names = [self.report_to] if isinstance(self.report_to, str) else self.report_to
        return [name for name in names if name != "none"]

    @property
    def rollout(self):
        """Answers of a rollout on one rank."""
        return self.per_device_train_batch_size * (self.steps_per_generation or self.gradient_accumulation_steps)

    @property
    def steps_per_rollout(self):
        """Optimiser steps of one epoch over a rollout."""
        return self.rollout // (self.per_device_train_batch_size * self.gradient_accumulation_steps)

    def loss_config(self):
        return GRPOLossConfig(**{f.name: getattr(self, f.name) for f in fields(GRPOLossConfig)})


def at_least(low, *names):
    return tuple((name, f">= {low}", lambda x: x >= low) for name in names)


RANGES = (
    *at_least(1, "per_device_train_batch_size", "gradient_accumulation_steps", "steps_per_generation", "num_iterations",
              "token_budget", "max_generation_tokens", "ref_model_sync_steps", "lora_r", "lora_alpha", "eval_steps",
              "num_generations_eval", "logging_steps", "num_completions_to_print", "save_steps", "save_total_limit"),
    *at_least(2, "num_generations"),
    *at_least(0, "seed", "top_k", "warmup_steps", "weight_decay", "learning_rate", "num_train_epochs"),
    *((name, "> 0", lambda x: 0 < x < math.inf) for name in ("repetition_penalty", "adam_epsilon", "max_grad_norm")),
    *((name, "in [0, 1)", lambda x: 0 <= x < 1) for name in ("lora_dropout", "adam_beta1", "adam_beta2")),
    *((name, "in (0, 1]", lambda x: 0 < x <= 1) for name in ("top_p", "ref_model_mixup_alpha")),
    ("min_p", "in [0, 1]", lambda x: 0 <= x <= 1),
)  # fmt: skip
CHOICES = (
    ("optim", OPTIMIZERS), ("scale_rewards", SCALES), ("backend", BACKENDS), ("backward", BACKWARDS),
    ("eval_strategy", ("no", "steps")), ("save_strategy", ("no", "steps")), ("packing", ("auto", True, False)),
)  # fmt: skip


def fits(value, hint):
    """Whether a value is of an annotated type; whole numbers are floats too, booleans are no numbers."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(fits(value, a) for a in arguments)
    if origin is list:
        return isinstance(value, list) and all(fits(x, arguments[0]) for x in value)
    if hint in (int, float):
        return isinstance(value, int if hint is int else (int, float)) and not isinstance(value, bool)
    return isinstance(value, hint)


def load_config(source, overrides=()):
    """A YAML file or a preset's name, and ``--key value`` words -> (GRPOTrainer's other arguments, GRPOConfig).

    Raises:
        ValueError: unknown preset or key, wrong type, impossible combination.
    """
    path = Path(source) if Path(source).is_file() else PRESETS / f"{source}.yaml"
    if not path.is_file():
        presets = ", ".join(sorted(p.stem for p in PRESETS.glob("*.yaml")))
        raise ValueError(f"config must be a YAML file or a preset ({presets}), got {str(source)!r}")
    settings = yaml.safe_load(path.read_text(encoding="utf-8"))
    if not isinstance(settings, dict):
        raise ValueError(f"{path} must hold settings 'name: value', got {settings!r}")
    words = [part for word in overrides for part in word.split("=", 1)] if overrides else []
    while words:
        key = words.pop(0)
        if not key.startswith("--"):
            raise ValueError(f"expected --key value, got {key!r}")
        flag = not words or words[0].startswith("--")
        settings[key[2:].replace("-", "_")] = True if flag else yaml.safe_load(words.pop(0))
    settings["resume_from_checkpoint"] = settings.pop("resume", settings.get("resume_from_checkpoint", False))
    hints = typing.get_type_hints(GRPOConfig)
    for key, value in settings.items():
        if key not in hints and key not in JOB:
            close = difflib.get_close_matches(key, [*hints, *JOB], n=1)
            raise ValueError(f"{key} is not a setting" + (f": did you mean {close[0]}?" if close else ""))
        if key.endswith("_strategy") and value is False:  # YAML's no
            settings[key] = "no"
        if isinstance(value, str) and key in hints and fits(1.5, hints[key]):  # YAML reads 1e-6 as text
            settings[key] = number(key, value)
    job = {key: settings.pop(key) for key in JOB if key in settings}
    return job, GRPOConfig(**settings)


def number(key, text):
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"{key} must be a number, got {text!r}") from None

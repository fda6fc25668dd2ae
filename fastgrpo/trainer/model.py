"""The model and its optimiser: attention, LoRA and QLoRA, Liger's layer kernels, checkpointing, 8-bit states."""

import math
import re
import warnings
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

import torch
from huggingface_hub import constants, try_to_load_from_cache
from torch.distributed.fsdp import FSDPModule
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, get_scheduler

from fastgrpo.checks import Below1, Checked, Count, NonNegative, Positive, mistake, require, require_installed
from fastgrpo.integrations.transformers import causal_lm, fuse_lm_head
from fastgrpo.trainer import examples

Optimizer = Literal["adamw_torch", "adamw_torch_fused", "adamw_8bit", "paged_adamw_8bit", "paged_adamw_32bit"]
DTYPES = ("auto", "bfloat16", "float16", "float32", "float64")
Schedule = Literal[
    "constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial", "inverse_sqrt"
]
EXTRAS = {"peft": "peft", "bitsandbytes": "quant", "liger_kernel": "liger", "flash_attn": "flash"}  # package: ours


@dataclass(frozen=True, kw_only=True)
class ModelOptions(Checked):
    """How the model is loaded, wrapped and optimised, under TRL's names.

    Args:
        model_init_kwargs: further keywords of ``from_pretrained``, as in ``{revision: ...}``.
        tiny_vocabulary: of ``tiny:NAME`` models: pad their vocabulary to this size.
        trust_remote_code: run a model's own code from the hub.
        use_cpu: also where there is a GPU.
        dtype: of the weights: "float32", "bfloat16", "float16", "float64", or "auto", as they are saved.
        bf16: autocast; None: on a GPU that has it.
        fp16: compute in fp16, whose finer rounding keeps sampler and learner closer than bf16's; the trained weights
            stay fp32, and the loss is scaled into fp16's range. So does dtype "float16", of a base below an adapter.
        attn_implementation: as transformers names it; None: flash-attn if installed (16 bits, GPU), else SDPA, else
            eager.
        disable_dropout: of the model.
        gradient_checkpointing: compute a layer's activations again in the backward instead of keeping them.
        gradient_checkpointing_kwargs: of transformers' gradient checkpointing.
        activation_offloading: keep activations in host memory until the backward.
        use_liger_kernel: Liger's kernels in the layers (GPU).
        use_peft: train LoRA adapters (PEFT) instead of the weights; also to train an adapter's folder further.
        lora_r: their rank.
        lora_alpha: their scale, over the rank.
        lora_dropout: of their input.
        lora_target_modules: names of the layers, a pattern, or "all-linear"; None: what PEFT takes for the model.
        lora_modules_to_save: layers that are trained whole.
        use_rslora: divide the scale by the root of the rank.
        use_dora: train magnitudes apart from directions.
        load_in_4bit, load_in_8bit: QLoRA, through bitsandbytes.
        optim: AdamW: "adamw_torch", "adamw_torch_fused", "adamw_8bit", "paged_adamw_8bit" or "paged_adamw_32bit".
        learning_rate: its highest value.
        weight_decay, adam_beta1, adam_beta2, adam_epsilon: of AdamW.
        max_grad_norm: gradients are scaled down to this norm.
        lr_scheduler_type, lr_scheduler_kwargs: how the learning rate changes, as transformers' ``get_scheduler``.
        warmup_steps: of the learning rate; below 1 a share of all steps.
    """

    model_init_kwargs: dict | None = None
    tiny_vocabulary: int | None = None
    trust_remote_code: bool = False
    use_cpu: bool = False
    dtype: str = "float32"
    bf16: bool | None = None
    fp16: bool = False
    attn_implementation: str | None = None
    disable_dropout: bool = False
    gradient_checkpointing: bool = True
    gradient_checkpointing_kwargs: dict | None = None
    activation_offloading: bool = False
    use_liger_kernel: bool = False
    use_peft: bool = False
    lora_r: Count = 16
    lora_alpha: Count = 32
    lora_dropout: Below1 = 0.05
    lora_target_modules: str | list[str] | None = None
    lora_modules_to_save: list[str] | None = None
    use_rslora: bool = False
    use_dora: bool = False
    load_in_4bit: bool = False
    load_in_8bit: bool = False
    optim: Optimizer = "adamw_torch_fused"
    learning_rate: NonNegative = 1e-6
    weight_decay: NonNegative = 0.0
    adam_beta1: Below1 = 0.9
    adam_beta2: Below1 = 0.999
    adam_epsilon: Positive = 1e-8
    max_grad_norm: Positive = 1.0
    lr_scheduler_type: Schedule = "linear"
    lr_scheduler_kwargs: dict | None = None
    warmup_steps: NonNegative = 0

    def check_combinations(self) -> None:
        super().check_combinations()
        quantised, attention = self.load_in_4bit or self.load_in_8bit, self.attn_implementation or ""
        require(self.dtype in DTYPES, f"dtype must be one of {', '.join(map(repr, DTYPES))}, got {self.dtype!r}")
        require(not (self.fp16 and self.bf16), "fp16 and bf16 cannot both be True")
        require(
            not self.fp16 or self.dtype != "bfloat16",
            "fp16 computes in float16: dtype must be 'float32', 'float16' (of a base that use_peft freezes) or 'auto', "
            "got 'bfloat16'",
        )
        require(
            self.dtype != "float16" or self.use_peft,
            "dtype 'float16' needs use_peft=True: trained weights must be fp32, since small steps and Adam's epsilon "
            "round to 0 in fp16; to compute in fp16 say fp16=True",
        )
        if quantised:
            require(self.use_peft, "load_in_4bit and load_in_8bit need use_peft=True, got False")
            require(not (self.load_in_4bit and self.load_in_8bit), "load_in_4bit and load_in_8bit cannot both be True")
        if not self.on_gpu:
            require(not self.use_liger_kernel, "use_liger_kernel: its kernels need a CUDA GPU, and there is none")
            require(
                not self.optim.startswith("paged"),
                f"optim {self.optim!r} pages GPU memory and there is no CUDA GPU: expected adamw_torch or adamw_8bit",
            )
        wanted = {
            "peft": self.use_peft,
            "bitsandbytes": quantised or "bit" in self.optim,
            "liger_kernel": self.use_liger_kernel,
            "flash_attn": "flash" in attention,
        }
        if self.lr_scheduler_kwargs:
            self.check_schedule()
        for package, extra in EXTRAS.items():
            if wanted[package]:
                require_installed(package, f"'fastgrpo[{extra}]'")

    def check_schedule(self) -> None:
        """The schedule takes its keywords: one that is never used is made of them."""
        optimizer = torch.optim.SGD([torch.zeros(1)], lr=self.learning_rate)
        try:
            make_schedule(optimizer, self, 1)
        except (TypeError, ValueError) as error:
            name, given = self.lr_scheduler_type, self.lr_scheduler_kwargs
            mistake(f"lr_scheduler_kwargs must be keywords of the schedule {name!r}, got {given}: {error}")

    @property
    def on_gpu(self) -> bool:
        return torch.cuda.is_available() and not self.use_cpu

    @property
    def mixed_precision(self) -> str:
        """accelerate's name of the autocast: where not said, bf16 on a GPU that has it; fp16's is the learner's own."""
        possible = self.on_gpu and not self.half and torch.cuda.is_bf16_supported(including_emulation=False)
        return "bf16" if self.bf16 or (self.bf16 is None and possible) else "no"

    @property
    def half(self) -> bool:
        """Whether to compute in fp16."""
        return self.fp16 or (self.dtype == "float16" and not self.bf16)


def load_model(source, config, device):
    """A causal LM from a folder, a name or ``tiny:NAME``, an adapter with its base; a module is taken as it is."""
    if not isinstance(source, str):
        return source
    check_source(source)
    if source.startswith("tiny:"):
        return examples.tiny_model(source, config.seed, config.tiny_vocabulary, device)[0]
    if Path(source, "adapter_config.json").is_file():
        return load_adapter(source, config, device)
    options = {"dtype": config.dtype, "trust_remote_code": config.trust_remote_code, **(config.model_init_kwargs or {})}
    if config.load_in_4bit or config.load_in_8bit:
        compute = torch.bfloat16 if device.type == "cuda" else torch.float32
        compute = torch.float16 if config.half else compute
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=config.load_in_4bit,
            load_in_8bit=config.load_in_8bit,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=compute,
        )
        options["device_map"] = {"": device}
    failed: Exception | None = None
    for attention in attentions(config, device):
        try:
            model = AutoModelForCausalLM.from_pretrained(source, attn_implementation=attention, **options)
        except (ValueError, ImportError) as error:
            if config.attn_implementation is not None or ("attn" not in str(error) and "ttention" not in str(error)):
                raise
            failed = error
            continue
        if failed is not None:
            print(f"attention: {attention}, because {failed}")
        return model
    assert failed is not None
    raise failed


def load_adapter(folder, config, device):
    """What an earlier run left, to be trained further."""
    if not config.use_peft:
        raise ValueError(f"model {folder} is an adapter: use_peft must be True to train it further, got False")
    import peft

    base = load_model(peft.PeftConfig.from_pretrained(folder).base_model_name_or_path, config, device)
    if getattr(base, "is_quantized", False):
        base = peft.prepare_model_for_kbit_training(base, use_gradient_checkpointing=False)
    with without_peft_warning():
        return peft.PeftModel.from_pretrained(base, folder, is_trainable=True)


def attentions(config, device):
    """What to try, best first."""
    if config.attn_implementation is not None:
        return [config.attn_implementation]
    half = config.dtype in ("bfloat16", "float16", "auto")
    flash = device.type == "cuda" and half and find_spec("flash_attn") is not None
    return (["flash_attention_2"] if flash else []) + ["sdpa", "eager"]


def load_tokenizer(source, model, config):
    """The one given, or the one that belongs to ``model``, a name or a module: before the model is loaded."""
    name = model if isinstance(model, str) else model.config._name_or_path
    if isinstance(model, str):
        check_source(model)
    if source is None and name.startswith("tiny:"):
        source = examples.tiny_tokenizer(examples.WORLDS[examples.parse(name)[1]], config.tiny_vocabulary)
    if source is None:
        options = {k: v for k, v in (config.model_init_kwargs or {}).items() if k == "revision"}
        source = AutoTokenizer.from_pretrained(name, trust_remote_code=config.trust_remote_code, **options)
    if source.eos_token_id is None:
        raise ValueError("processing_class must have an eos_token: answers end with it")
    return source


def check_source(name, argument="model"):
    """What cannot be a model of the hub is a folder that exists: said at once, not after the hub's retries."""
    if name.startswith("tiny:") or Path(name).exists():
        return
    hub = re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", name) is not None
    if not hub or (constants.HF_HUB_OFFLINE and not isinstance(try_to_load_from_cache(name, "config.json"), str)):
        why = "is not in the hub's cache, and HF_HUB_OFFLINE is set" if hub else "does not exist"
        raise ValueError(
            f"{argument} must be a folder, 'owner/name' on the hub, or 'tiny:NAME' with NAME one of "
            f"{', '.join(examples.WORLDS)}, got {name!r}, which {why}"
        )


def check_room(model, prompt, completion):
    """``prompt`` and ``completion`` tokens have positions in the model."""
    room = positions(model)
    if room is not None and prompt + completion > room:
        raise ValueError(
            f"max_completion_length must leave room for the longest prompt, {prompt} tokens, in the "
            f"model's {room} positions, got {completion}"
        )


def check_positions(model, length):
    """Sequences of ``length`` tokens have positions in the model."""
    room = positions(model)
    if room is not None and length > room:
        raise ValueError(f"max_length must be at most the model's {room} positions: a sequence has {length} tokens")


def positions(model):
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)


def packs(model, config):
    """Whether micro-batches are packed: "auto" is where flash-attn takes their lengths."""
    return "flash" in str(model.config._attn_implementation) if config.packing == "auto" else config.packing


def keep_trainable(model):
    """bitsandbytes repacks the 4-bit weights of a CPU when they are first evaluated, into a form without a backward."""
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def make_trainable(model, config, peft_config=None):
    """Adapter, kernels, checkpointing and our op in the LM head."""
    keep_trainable(model)
    if config.disable_dropout:
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
    if config.use_liger_kernel:
        from liger_kernel.transformers import _apply_liger_kernel_to_instance

        # of a PeftModel, an adapter trained further, Liger would take the wrong module for the decoder
        _apply_liger_kernel_to_instance(causal_lm(model), cross_entropy=False, fused_linear_cross_entropy=False)
    if (peft_config is not None or config.use_peft) and not hasattr(model, "peft_config"):
        import peft

        if getattr(model, "is_quantized", False):
            model = peft.prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
        with without_peft_warning():
            model = peft.get_peft_model(model, peft_config or lora(config))
    for parameter in model.parameters():
        if hasattr(model, "peft_config") and parameter.requires_grad and parameter.dtype == torch.float16:
            parameter.data = parameter.data.float()  # modules_to_save, copied from an fp16 base
    if config.gradient_checkpointing:
        base = causal_lm(model)
        # its new name, where this transformers has it
        enable = getattr(base, "activation_checkpointing_enable", None) or base.gradient_checkpointing_enable
        enable({"use_reentrant": False, **(config.gradient_checkpointing_kwargs or {})})
        base.enable_input_require_grads()
    return fuse_lm_head(model)


@contextmanager
def without_peft_warning():
    """PEFT asks transformers for an attribute by its old name; a user can do nothing about it."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        yield


def freeze(model, accelerator):
    """A reference on the device, sharded where the policy is."""
    model = fuse_lm_head(model).requires_grad_(False).eval()
    if accelerator.is_fsdp2:
        from accelerate.utils.fsdp_utils import fsdp2_prepare_model

        return fsdp2_prepare_model(accelerator, model)
    return model.to(accelerator.device)


@torch.no_grad()
def move(reference, policy, share):
    """The reference becomes ``share * policy + (1 - share) * reference``."""
    reshard(reference)
    for old, new in zip(reference.parameters(), policy.parameters()):
        old.lerp_(new, share)


def reshard(model):
    """After passes without a backward, behind which FSDP2 keeps the root gathered."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def lora(config):
    from peft import LoraConfig

    return LoraConfig(
        task_type="CAUSAL_LM",
        r=config.lora_r,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules=config.lora_target_modules,
        modules_to_save=config.lora_modules_to_save,
        use_rslora=config.use_rslora,
        use_dora=config.use_dora,
    )


def make_optimizer(model, config):
    parameters = [p for p in model.parameters() if p.requires_grad]
    if any(p.dtype == torch.float16 for p in parameters):
        raise ValueError(
            "model must have trained weights of fp32 or bf16, got fp16, where Adam's small steps round to 0"
        )
    options = {
        "lr": config.learning_rate,
        "betas": (config.adam_beta1, config.adam_beta2),
        "eps": config.adam_epsilon,
        "weight_decay": config.weight_decay,
    }
    if config.optim.startswith("adamw_torch"):
        return torch.optim.AdamW(parameters, fused=True if config.optim.endswith("fused") else None, **options)
    import bitsandbytes

    names = {"adamw_8bit": "AdamW8bit", "paged_adamw_8bit": "PagedAdamW8bit", "paged_adamw_32bit": "PagedAdamW"}
    return getattr(bitsandbytes.optim, names[config.optim])(parameters, **options)


def make_schedule(optimizer, config, total):
    warmup = config.warmup_steps
    warmup = math.ceil(warmup * total) if warmup < 1 else int(warmup)
    return get_scheduler(config.lr_scheduler_type, optimizer, warmup, total, config.lr_scheduler_kwargs)

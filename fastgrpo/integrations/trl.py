"""The op inside TRL: ``FastGRPOTrainer`` is TRL's GRPO trainer on it, ``patched()`` puts it under every trainer of TRL.

Both translate arguments alone: options, losses and metrics stay TRL's.
"""

import contextlib
import importlib
import inspect
import os
from collections.abc import Iterator
from functools import partial, reduce
from typing import Any

import torch
import torch.nn.functional as F

from fastgrpo import inputs
from fastgrpo.checks import need
from fastgrpo.diagnostics import NAMES, token_diagnostics
from fastgrpo.divergence import linear_divergence
from fastgrpo.inputs import IGNORE, Backend, Backward
from fastgrpo.integrations.transformers import check_adapter, check_fused, fuse_lm_head
from fastgrpo.logprobs import LogProbs, linear_logprobs

trl = need("trl", "trl")
TESTED = ("1.16.0",)
UNTESTED = "FASTGRPO_TRL_UNTESTED"  # environment variable: 1 lets another version through if its signatures agree
OUTPUTS = ("entropy", *NAMES)
SIGNATURES = {  # what is rebound, overridden or called, and the parameters it must have
    "trainer.utils._ChunkedLogProbFunction.forward": (
        "ctx hidden weight bias targets temperature chunk_size final_logit_softcapping logit_scale outputs"
    ),
    "trainer.distillation_trainer.ChunkedDivergenceFunction.forward": (
        "ctx student_hidden student_weight student_bias teacher_hidden teacher_weight teacher_bias beta temperature "
        "student_logit_scale student_final_logit_softcapping teacher_logit_scale teacher_final_logit_softcapping"
    ),
    "trainer.utils.add_fused_lm_head": "model temperature cast_lm_head_to_fp32 outputs",
    "trainer.grpo_trainer.GRPOTrainer._compute_loss": "self model inputs",
    "trainer.grpo_trainer.GRPOTrainer._get_per_token_logps_and_entropies": (
        "self model input_ids attention_mask logits_to_keep batch_size compute_entropy compute_aux_loss pixel_values "
        "image_grid_thw num_images pixel_attention_mask spatial_shapes num_tiles image_sizes token_type_ids "
        "mm_token_type_ids image_position_ids"
    ),
}


def check_version(*names):
    """Raise ImportError unless the installed TRL is one that was tested, with the signatures it had."""
    differing = [text for name in names if (text := difference(name))]
    allowed = trl.__version__ in TESTED or os.environ.get(UNTESTED, "0") == "1"
    if allowed and not differing:
        return
    what = "; ".join(differing) or f"its signatures agree, so {UNTESTED}=1 lets it through at your own risk"
    raise ImportError(
        f"fastgrpo.integrations.trl is tested with trl {', '.join(TESTED)}, got trl {trl.__version__}: {what}"
    )


def difference(name):
    """How a function of TRL differs from the one that was tested, in words, or None."""
    try:
        found = " ".join(inspect.signature(find(name)).parameters)
    except (ImportError, AttributeError):
        return f"trl.{name} is missing"
    if found == SIGNATURES[name]:
        return None
    return f"trl.{name} takes ({', '.join(found.split())}), expected ({', '.join(SIGNATURES[name].split())})"


def find(name: str) -> Any:
    folder, module, *attributes = name.split(".")
    home: Any = importlib.import_module(f"trl.{folder}.{module}")
    return reduce(getattr, attributes, home)


@contextlib.contextmanager
def rebound(module, name, value):
    """The module with another value under a name it has, until the block ends, however it ends."""
    plain = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, plain)


class Op:
    """What stands in for TRL's autograd function: its ``apply``, on our op."""

    @staticmethod
    def apply(
        hidden,  # (N, D)
        weight,  # (V, D)
        bias,  # (V,)
        targets,  # (N,)
        temperature,
        chunk_size,
        final_logit_softcapping=None,
        logit_scale=1.0,
        outputs=OUTPUTS,
    ):
        """-> log-probs, entropy, log_sum_sq_probs, mean_logits, is_top1, (N,) each, None where not in ``outputs``."""
        if zero3():  # TRL gathers the weight for this call alone; a copy is still whole in the backward
            weight, bias = weight.clone(), whole(bias)
        logits = {"temperature": temperature, "softcap": final_logit_softcapping, "logit_scale": logit_scale}
        out = linear_logprobs(hidden, weight, targets, bias, return_entropy="entropy" in outputs, **logits)
        diagnostics = token_diagnostics(
            hidden,
            weight,
            targets,
            bias,
            **logits,
            outputs=[name for name in NAMES if name in outputs],
            logprobs=out.logprobs,
            entropy=out.entropy,
        )
        return *out, *diagnostics


class DivergenceOp:
    """What stands in for TRL's autograd function of two models' divergence: its ``apply``, on our op."""

    @staticmethod
    def apply(
        student_hidden,  # (N, D)
        student_weight,  # (V, D)
        student_bias,  # (V,)
        teacher_hidden,  # (N, D_t)
        teacher_weight,  # (V, D_t)
        teacher_bias,  # (V,)
        beta,
        temperature=1.0,
        student_logit_scale=1.0,
        student_final_logit_softcapping=None,
        teacher_logit_scale=1.0,
        teacher_final_logit_softcapping=None,
    ):
        """-> divergence, the student's entropy, (N,) each."""
        gather = find("trainer.utils.maybe_gather_lm_head_ctx")
        with gather(student_weight, student_bias), gather(teacher_weight, teacher_bias):
            if zero3():  # gathered for this call alone
                student_weight, student_bias = student_weight.clone(), whole(student_bias)
                teacher_weight, teacher_bias = teacher_weight.clone(), whole(teacher_bias)
            out = linear_divergence(
                student_hidden,
                student_weight,
                teacher_hidden,
                teacher_weight,
                beta=beta,
                bias=student_bias,
                teacher_bias=teacher_bias,
                temperature=temperature,
                softcap=student_final_logit_softcapping,
                teacher_softcap=teacher_final_logit_softcapping,
                logit_scale=student_logit_scale,
                teacher_logit_scale=teacher_logit_scale,
                return_entropy=True,
            )
        return out.divergence, out.entropy


OPS = {  # TRL's autograd functions where its trainers look them up: what stands in for each
    "trainer.utils._ChunkedLogProbFunction": Op,
    "trainer.distillation_trainer.ChunkedDivergenceFunction": DivergenceOp,
}
BLOCKS: list[None] = []  # one for each block of patched() that has not ended; they may end in any order
UNDO = contextlib.ExitStack()  # puts TRL's functions back, with the last of them


def zero3():
    """Whether DeepSpeed shards the weights, so that they are empty outside their gathering."""
    from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

    return is_deepspeed_zero3_enabled()


def whole(bias):
    """A copy that outlives its gathering."""
    return None if bias is None else bias.clone()


@contextlib.contextmanager
def patched() -> Iterator[None]:
    """``with patched(): trainer.train()``: every trainer of TRL that scores tokens (SFT, DPO, KTO, RLOO, GRPO ...) does
    so with :func:`fastgrpo.linear_logprobs`, its optional outputs included, and its ``DistillationTrainer`` compares
    student and teacher with :func:`fastgrpo.linear_divergence`, until the block ends.

    Trainers made before the block count too. Blocks may be nested or overlap, as those of two threads do. What TRL
    itself refuses (LoRA on lm_head) stays refused: for that there is :class:`FastGRPOTrainer`.

    Raises:
        ImportError: a TRL that was not tested, with the tested versions and what differs.
    """
    places = [(*name.rsplit(".", 1), op) for name, op in OPS.items()]
    strange = [(home, place, op) for home, place, op in places if getattr(find(home), place, None) is not op]
    if strange:
        check_version(*(f"{home}.{place}.forward" for home, place, _ in strange))
    BLOCKS.append(None)
    try:
        for home, place, op in strange:
            UNDO.enter_context(rebound(find(home), place, op))
        yield
    finally:
        BLOCKS.pop()
        if not BLOCKS:
            UNDO.close()


class NoTuner:
    """Stands where TRL looks for an adapter on lm_head, in order to refuse it."""


class FastGRPOTrainer(trl.GRPOTrainer):
    """TRL's ``GRPOTrainer``, scoring the policy, the old policy and the reference with our op inside ``lm_head``.

    Every option and metric is TRL's. Beyond it: a LoRA adapter on ``lm_head`` is trained; the head is called as a
    module, so that FSDP2 and ZeRO-3 gather it themselves; prompts and padding cost nothing; the log-probs of the policy
    that sampled, where TRL has them (``num_iterations > 1``, vLLM ...), make the certified backward faster.

    Args:
        *args, **kwargs: of ``trl.GRPOTrainer``.
        backend, backward, tolerance, workspace_mb: of :func:`fastgrpo.linear_logprobs`.

    Raises:
        ImportError: a TRL that was not tested, with the tested versions and what differs.
        TypeError: a config of :mod:`fastgrpo.trainer`, whose classes have the same names.
        ValueError: a bad option of ours, before anything runs; ``cast_lm_head_to_fp32`` with LoRA on ``lm_head``.
    """

    def __init__(
        self,
        *args: Any,
        backend: Backend = "auto",
        backward: Backward = "auto",
        tolerance: float | None = None,
        workspace_mb: float = 128,
        **kwargs: Any,
    ):
        check_version(*(name for name in SIGNATURES if name.removesuffix(".forward") not in OPS))
        for given in (*args, *kwargs.values()):
            if type(given).__module__.startswith("fastgrpo.trainer"):
                raise TypeError(f"args must be a trl.GRPOConfig, got a {type(given).__module__}.{type(given).__name__}")
        inputs.check_choice("backend", backend, inputs.BACKENDS)
        inputs.check_choice("backward", backward, inputs.BACKWARDS)
        for name, value in (("tolerance", tolerance), ("workspace_mb", workspace_mb)):
            if value is not None:
                inputs.check_scalar(name, value)
        self.op_options = {"backend": backend, "tolerance": tolerance, "workspace_mb": workspace_mb}
        self.backward_mode, self.near_logps = backward, None
        with adapters_on_head():
            super().__init__(*args, **kwargs)
        check_head(self.model.get_output_embeddings(), self.args.cast_lm_head_to_fp32)
        for model in (self.model, self.ref_model):
            if model is not None:
                fuse_lm_head(self.accelerator.unwrap_model(model))

    def _compute_loss(self, model, inputs):
        known = inputs.get("old_per_token_logps"), inputs.get("sampling_per_token_logps")
        self.near_logps = next((x for x in known if x is not None), None)
        try:
            return super()._compute_loss(model, inputs)
        finally:
            self.near_logps = None

    def _get_per_token_logps_and_entropies(
        self,
        model,
        input_ids,
        attention_mask,
        logits_to_keep,
        batch_size=None,
        compute_entropy=False,
        compute_aux_loss=False,
        **multimodal,
    ):
        exact = self._entropy_bonus_enabled and self.backward_mode != "certified"  # an entropy gradient is exact anyway
        scorer = Scorer(
            model,
            self.near_logps,
            temperature=self.temperature,
            return_entropy=compute_entropy,
            whole_fp32=self.args.cast_lm_head_to_fp32,
            backward="exact" if exact else self.backward_mode,
            **self.op_options,
        )
        return super()._get_per_token_logps_and_entropies(
            scorer,
            input_ids,
            attention_mask,
            logits_to_keep,
            batch_size,
            compute_entropy,
            compute_aux_loss,
            **multimodal,
        )


@contextlib.contextmanager
def adapters_on_head():
    """TRL refuses an adapter on lm_head because its op reads the weight under it; ours sees both."""
    module = importlib.import_module("trl.trainer.grpo_trainer")
    with rebound(module, "BaseTunerLayer", NoTuner) if hasattr(module, "BaseTunerLayer") else contextlib.nullcontext():
        yield


def check_head(head, whole_fp32):
    """Refuse what TRL's own check would have, other than LoRA as a sum of matrices."""
    check_adapter(head)
    if whole_fp32 and hasattr(head, "base_layer"):
        raise ValueError("cast_lm_head_to_fp32 must be False with a LoRA adapter on lm_head, got True")


class Scorer:
    """What TRL's pass calls in place of the model: the keywords and fields of its fused head, through ours."""

    def __init__(self, model, near_logps, **options):
        check_fused(model)
        self.model, self.near_logps, self.options, self.rows = model, near_logps, options, 0  # near_logps: (B, K), None

    def __call__(self, *, labels, fused_lm_head, **model_inputs):  # labels: (b, S), the next b rows of the batch
        near = None if self.near_logps is None else self.near_logps[self.rows : self.rows + len(labels)]
        self.rows += len(labels)
        targets = F.pad(labels[:, 1:], (0, 1), value=IGNORE)
        score = partial(head_logprobs, targets=targets, near_logps=near, **self.options)
        out, outputs = self.model(**model_inputs, fastgrpo=score, fastgrpo_output=True)
        entropy = None if out.entropy is None else out.entropy[:, :-1]
        return find("trainer.utils.FusedCausalLMOutput")(
            log_probs=out.logprobs[:, :-1],
            entropy=entropy,
            label_mask=labels[:, 1:] != IGNORE,
            aux_loss=getattr(outputs, "aux_loss", None),
        )


def head_logprobs(hidden, weight, *, targets, near_logps, whole_fp32, bias, **options):
    """The op on hidden (b, T, D), T >= S: prompt learning puts virtual tokens before the targets (b, S)."""
    width = hidden.shape[1]
    targets = F.pad(targets.to(hidden.device), (width - targets.shape[1], 0), value=IGNORE)
    if near_logps is not None:
        near_logps = F.pad(near_logps.to(hidden.device), (width - 1 - near_logps.shape[1], 1))
    outside = torch.autocast(hidden.device.type, enabled=False) if whole_fp32 else contextlib.nullcontext()
    with outside:
        out = linear_logprobs(hidden, weight, targets, bias, old_logprobs=near_logps, **options)
    entropy = None if out.entropy is None else out.entropy.clone()
    return LogProbs(out.logprobs.clone(), entropy)  # FSDP2 hooks what leaves a module: no views

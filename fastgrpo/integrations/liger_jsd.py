"""Liger's slots for distillation: :class:`FusedLinearJSDLoss` is called as ``LigerFusedLinearJSDLoss``,
:class:`FusedLinearJSD` as ``LigerFusedLinearJSD``, ``apply()`` puts them there.

Constructors, calls and returns are those of liger-kernel 0.8.5; the divergence is :func:`fastgrpo.linear_divergence`.
"""

from contextlib import ExitStack
from functools import partial
from typing import NamedTuple

import torch

from fastgrpo import inputs
from fastgrpo.checks import Count, Fraction, Positive, check_field
from fastgrpo.divergence import linear_divergence
from fastgrpo.inputs import IGNORE, Backend, Backward
from fastgrpo.integrations.known_gradients import call, with_gradients
from fastgrpo.integrations.slots import Slot, fill, renamed
from fastgrpo.logprobs import linear_logprobs
from fastgrpo.lora import unpack_lora

NAMES = {  # ours, as messages have them: Liger's
    "hidden": "student_input",
    "weight": "student_weight",
    "bias": "student_bias",
    "teacher_hidden": "teacher_input",
}


class Distillation(NamedTuple):
    """0-dim each; ``soft`` and ``hard`` without a gradient, None where they are not wanted."""

    loss: torch.Tensor
    soft: torch.Tensor | None
    hard: torch.Tensor | None


class FusedLinearJSDLoss(torch.nn.Module):
    """Distillation on hidden states and heads with the constructor, call and return of liger-kernel 0.8.5's
    ``LigerFusedLinearJSDLoss``: ``weight_hard_loss`` cross entropy + ``weight_soft_loss`` divergence.

    Equal to Liger's in fp32. Beyond it: 16-bit models' logits are not rounded, NaN in ignored rows stays there, the
    head's gradient costs nothing where it is frozen. A teacher whose vocabulary is padded is refused (Liger gives the
    student logits of 0 there): cut its weight and bias to the student's.

    Args:
        weight_hard_loss: of the cross entropy with ``true_labels``, at temperature 1; 0: not computed.
        weight_soft_loss: of the divergence; neither has a factor temperature^2.
        beta: 0: KL(teacher || student), 1: KL(student || teacher), in [1e-5, 1 - 1e-5]: the generalised Jensen-Shannon
            divergence, see :func:`fastgrpo.linear_divergence`, whose convention is Liger's.
        ignore_index: label of positions that do not count, in both terms.
        temperature: > 0, divides both models' logits in the divergence.
        compiled, chunk_size: of Liger's own loop; accepted, without effect.
        return_soft_hard_loss: the call returns ``(loss, soft, hard)``, the latter two unweighted.
        softcap, logit_scale, teacher_softcap, teacher_logit_scale, backend, backward, tolerance, workspace_mb: see
            :func:`fastgrpo.linear_divergence`.
        grad_in_forward: take the gradients within the call, as Liger does, on which trainers rely that gather a ZeRO-3
            head for it alone; False: in the backward, so that a loss scale reaches fp16 gradients in time.

    The arguments are attributes, read anew by each call.

    Raises:
        ValueError: a bad argument, under Liger's name, with what was expected and what came.
    """

    def __init__(
        self,
        weight_hard_loss: float = 0.5,
        weight_soft_loss: float = 0.5,
        beta: float = 0.5,
        ignore_index: int = -100,
        temperature: float = 1.0,
        compiled: bool = True,
        chunk_size: int = 1024,
        return_soft_hard_loss: bool = False,
        *,
        softcap: float | None = None,
        logit_scale: float = 1.0,
        teacher_softcap: float | None = None,
        teacher_logit_scale: float = 1.0,
        backend: Backend = "auto",
        backward: Backward = "auto",
        tolerance: float | None = None,
        workspace_mb: float = 128,
        grad_in_forward: bool = True,
    ) -> None:
        super().__init__()
        self.weight_hard_loss, self.weight_soft_loss = weight_hard_loss, weight_soft_loss
        self.beta, self.ignore_index, self.temperature = beta, ignore_index, temperature
        self.compiled, self.chunk_size, self.return_soft_hard_loss = compiled, chunk_size, return_soft_hard_loss
        self.softcap, self.logit_scale = softcap, logit_scale
        self.teacher_softcap, self.teacher_logit_scale = teacher_softcap, teacher_logit_scale
        self.backend, self.backward, self.tolerance, self.workspace_mb = backend, backward, tolerance, workspace_mb
        self.grad_in_forward = grad_in_forward
        self.check()

    def check(self):
        for name in ("weight_hard_loss", "weight_soft_loss"):
            inputs.check_finite(name, getattr(self, name))
        if self.weight_hard_loss == self.weight_soft_loss == 0:
            raise ValueError("weight_hard_loss or weight_soft_loss must be other than 0, got 0 and 0")
        for name in ("compiled", "return_soft_hard_loss", "grad_in_forward"):
            check_field(name, getattr(self, name), bool)
        check_field("chunk_size", self.chunk_size, Count)
        check_field("beta", self.beta, Fraction)
        check_settings(self)

    def forward(
        self,
        student_input: torch.Tensor,  # (N, D) or (B, T, D)
        student_weight: torch.Tensor,  # (V, D)
        teacher_input: torch.Tensor,  # (N, D_t) or (B, T, D_t)
        teacher_weight: torch.Tensor,  # (V, D_t)
        true_labels: torch.Tensor,  # (N,) or (B, T)
        student_bias: torch.Tensor | None = None,  # (V,)
        teacher_bias: torch.Tensor | None = None,  # (V,)
        *,
        lora: tuple[torch.Tensor, torch.Tensor, float] | None = None,  # A (r, D), B (V, r), scaling
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Means over the positions whose label is not ``ignore_index``; 0 where there is none.

        Args:
            student_input, teacher_input: states that predict ``true_labels``. The teacher has no gradient.
            true_labels: without a hard loss only whether they are ``ignore_index`` counts.
            lora: an adapter on the student's head, see :func:`fastgrpo.linear_logprobs`; Liger has none.

        Returns:
            loss, 0-dim, float32 (float64 for float64 input), differentiable once in student_input, student_weight,
            student_bias and LoRA's A and B; with ``return_soft_hard_loss`` ``(loss, soft, hard)``.
        """
        self.check()
        counted = check_labels("true_labels", true_labels, student_input, self.ignore_index)
        out = distil(
            self,
            (student_input, student_weight, student_bias),
            (teacher_input, teacher_weight, teacher_bias),
            lora,
            names=NAMES | {"targets": "true_labels"},
            beta=self.beta,
            counted=counted,
            labels=true_labels,
            weights=(self.weight_soft_loss, self.weight_hard_loss),
            wanted=self.return_soft_hard_loss,
        )
        return tuple(out) if self.return_soft_hard_loss else out.loss


class FusedLinearJSD(torch.nn.Module):
    """The divergence alone, with the constructor, call and return of liger-kernel 0.8.5's ``LigerFusedLinearJSD``.

    Args:
        jsd_beta, ignore_index, temperature: see :class:`FusedLinearJSDLoss`.
        accum_dtype: of Liger's weight gradient; accepted, without effect: ours are summed in fp32 at least.
        softcap, logit_scale, teacher_softcap, teacher_logit_scale, backend, backward, tolerance, workspace_mb,
            grad_in_forward: see :class:`FusedLinearJSDLoss`.

    Raises:
        ValueError: a bad argument, under Liger's name, with what was expected and what came.
    """

    def __init__(
        self,
        jsd_beta: float = 0.5,
        ignore_index: int = -100,
        temperature: float = 1.0,
        accum_dtype: torch.dtype | None = None,
        *,
        softcap: float | None = None,
        logit_scale: float = 1.0,
        teacher_softcap: float | None = None,
        teacher_logit_scale: float = 1.0,
        backend: Backend = "auto",
        backward: Backward = "auto",
        tolerance: float | None = None,
        workspace_mb: float = 128,
        grad_in_forward: bool = True,
    ) -> None:
        super().__init__()
        self.jsd_beta, self.ignore_index, self.temperature = jsd_beta, ignore_index, temperature
        self.accum_dtype = accum_dtype
        self.softcap, self.logit_scale = softcap, logit_scale
        self.teacher_softcap, self.teacher_logit_scale = teacher_softcap, teacher_logit_scale
        self.backend, self.backward, self.tolerance, self.workspace_mb = backend, backward, tolerance, workspace_mb
        self.grad_in_forward = grad_in_forward
        self.check()

    def check(self):
        check_field("jsd_beta", self.jsd_beta, Fraction)
        check_field("grad_in_forward", self.grad_in_forward, bool)
        if self.accum_dtype is not None and not isinstance(self.accum_dtype, torch.dtype):
            raise ValueError(f"accum_dtype must be a torch.dtype or None, got {self.accum_dtype!r}")
        check_settings(self)

    def forward(
        self,
        student_input: torch.Tensor,  # (N, D)
        student_weight: torch.Tensor,  # (V, D)
        teacher_input: torch.Tensor,  # (N, D_t)
        teacher_weight: torch.Tensor,  # (V, D_t)
        shift_labels: torch.Tensor | None,  # (N,)
    ) -> torch.Tensor:
        """The mean over the positions whose label is not ``ignore_index`` (all without labels), 0-dim, float32 (float64
        for float64 input), differentiable once in student_input and student_weight."""
        self.check()
        counted = None
        if shift_labels is not None:
            counted = check_labels("shift_labels", shift_labels, student_input, self.ignore_index)
        return distil(
            self,
            (student_input, student_weight, None),
            (teacher_input, teacher_weight, None),
            None,
            names=NAMES | {"beta": "jsd_beta"},
            beta=self.jsd_beta,
            counted=counted,
        ).loss


def check_settings(module):
    """What both classes have."""
    check_field("ignore_index", module.ignore_index, int)
    inputs.check_scalar("temperature", module.temperature)
    for name in ("softcap", "teacher_softcap", "tolerance"):
        check_field(name, getattr(module, name), Positive | None)
    for name in ("logit_scale", "teacher_logit_scale"):
        inputs.check_scalar(name, getattr(module, name), positive=False)
    inputs.check_choice("backend", module.backend, inputs.BACKENDS)
    inputs.check_choice("backward", module.backward, inputs.BACKWARDS)
    check_field("workspace_mb", module.workspace_mb, Positive)


def check_labels(name, labels, hidden, ignore_index):
    """-> where they count, bool."""
    inputs.check_tensor("student_input", hidden)
    inputs.check_tensor(name, labels, hidden.device, floating=False)
    if labels.shape != hidden.shape[:-1]:
        raise ValueError(f"{name} must be {tuple(hidden.shape[:-1])}, as student_input, got {tuple(labels.shape)}")
    return labels.to(torch.int64) != ignore_index


def distil(module, student, teacher, lora, *, names, **arguments):
    """-> :class:`Distillation` under a module's settings. student, teacher: states, weight, bias."""
    a, b, scaling = unpack_lora(lora)
    loss = partial(weighted_loss, scaling=scaling, teacher=teacher, module=module, **arguments)
    with renamed(names):
        return (with_gradients if module.grad_in_forward else call)(loss, *student, a, b)


def weighted_loss(
    hidden,
    weight,
    bias,
    a,
    b,
    *,
    scaling,
    teacher,
    module,
    beta,
    counted=None,
    labels=None,
    weights=(1.0, 0.0),
    wanted=False,
):
    """weights: of the soft and of the hard loss. wanted: both, whatever their weights."""
    names = ("softcap", "logit_scale", "backend", "backward", "tolerance", "workspace_mb")
    head = {name: getattr(module, name) for name in names}
    head |= {"bias": bias, "lora": None if a is None else (a, b, scaling)}
    tokens = hidden[..., 0].numel() if counted is None else counted.sum().clamp(min=1)
    functions = (
        partial(divergences, hidden, weight, teacher, counted, module, beta=beta, **head),
        partial(cross_entropies, hidden, weight, labels, counted, **head),
    )
    terms = [term_of(function, w, wanted) for function, w in zip(functions, weights)]
    soft, hard = (None if x is None else x.sum() / tokens for x in terms)
    weighted = [w * x for w, x in zip(weights, (soft, hard)) if w != 0 and x is not None]
    loss = weighted[0] if len(weighted) == 1 else weighted[0] + weighted[1]
    return Distillation(loss, *(None if x is None else x.detach() for x in (soft, hard)))


def divergences(hidden, weight, teacher, counted, module, **options):
    """Of each token."""
    others, teacher_weight, teacher_bias = teacher
    return linear_divergence(
        hidden,
        weight,
        others,
        teacher_weight,
        counted,
        temperature=module.temperature,
        teacher_bias=teacher_bias,
        teacher_softcap=module.teacher_softcap,
        teacher_logit_scale=module.teacher_logit_scale,
        **options,
    ).divergence


def cross_entropies(hidden, weight, labels, counted, **head):
    """Of each token."""
    ids = labels.to(torch.int64).masked_fill(labels == IGNORE, -1)  # no token's id, unless it is the ignored index
    return -linear_logprobs(hidden, weight, ids.masked_fill(~counted, IGNORE), **head).logprobs


def term_of(function, weight, wanted):
    """A loss of each token, without a graph where its weight is 0; None where nobody wants it."""
    if weight == 0 and not wanted:
        return None
    with torch.set_grad_enabled(torch.is_grad_enabled() and weight != 0):
        return function()


SLOTS = (
    Slot(
        "LigerFusedLinearJSDLoss",
        home="liger_kernel.chunked_loss.jsd_loss",
        package="liger_kernel.chunked_loss",
        ours=FusedLinearJSDLoss,
    ),
    Slot(
        "LigerFusedLinearJSD",
        home="liger_kernel.transformers.fused_linear_jsd",
        package="liger_kernel.transformers",
        ours=FusedLinearJSD,
    ),
)


def apply() -> ExitStack:
    """Put :class:`FusedLinearJSDLoss` and :class:`FusedLinearJSD` in the places of Liger's classes, as
    :func:`fastgrpo.integrations.liger.apply` does with the GRPO loss.

    In ``liger_kernel.chunked_loss`` and ``liger_kernel.transformers`` and in every module that has imported them;
    objects made before and the ``functional`` forms stay as they are. A second call changes nothing.

    Returns:
        an ``ExitStack``: its ``close()``, or the end of a ``with apply():``, puts Liger's classes back.

    Raises:
        ImportError: liger-kernel is missing, or a class has another constructor or call than the one tested.
    """
    return fill(*SLOTS)

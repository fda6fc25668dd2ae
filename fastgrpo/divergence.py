"""linear_divergence: how far two models' distributions are apart, from hidden states and heads, without logits."""

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

from fastgrpo import head_op, inputs, strategies
from fastgrpo.backends import divergence_panels, frozen, products
from fastgrpo.backends.pair import PairParams, PairProblem, PairStats
from fastgrpo.checks import Mixture, check_field
from fastgrpo.config import settings_go_in_config
from fastgrpo.head import HeadOptions, compute_dtype
from fastgrpo.inputs import IGNORE, Backend, Backward
from fastgrpo.lora import check_lora, unpack_lora

NO_LORA = unpack_lora(None)


class Divergence(NamedTuple):
    """Result of :func:`linear_divergence`."""

    divergence: torch.Tensor
    entropy: torch.Tensor | None


@settings_go_in_config
def linear_divergence(
    hidden: torch.Tensor,  # (N, D) or (B, T, D)
    weight: torch.Tensor,  # (V, D)
    teacher_hidden: torch.Tensor,  # (N, D_t) or (B, T, D_t)
    teacher_weight: torch.Tensor,  # (V, D_t)
    mask: torch.Tensor | None = None,  # (N,) or (B, T)
    *,
    beta: float = 1.0,
    bias: torch.Tensor | None = None,  # (V,)
    teacher_bias: torch.Tensor | None = None,  # (V,)
    temperature: float | torch.Tensor = 1.0,
    softcap: float | None = None,
    teacher_softcap: float | None = None,
    logit_scale: float = 1.0,
    teacher_logit_scale: float = 1.0,
    return_entropy: bool = False,
    lora: tuple[torch.Tensor, torch.Tensor, float] | None = None,
    backend: Backend = "auto",
    backward: Backward = "auto",
    tolerance: float | None = None,
    workspace_mb: float = 128,
    row_tolerance: float | None = None,
    targets: torch.Tensor | None = None,  # (N,) or (B, T)
    old_logprobs: torch.Tensor | None = None,  # (N,) or (B, T)
) -> Divergence:
    """Divergence of a student's next-token distribution from a teacher's, of each token, in nats: all of the
    vocabulary counts, and neither model's logits are held.

    ``beta`` 0: KL(teacher || student) = sum p_t log(p_t / p_s); 1: KL(student || teacher); between: the generalised
    Jensen-Shannon divergence ``beta KL(p_t || m) + (1 - beta) KL(p_s || m)``, ``m = (1 - beta) p_s + beta p_t``
    (Agarwal et al. 2024, "On-Policy Distillation of Language Models", in TRL's convention). Logits as
    :func:`fastgrpo.linear_logprobs`'s, both models' over one temperature.

    Args:
        hidden, weight, bias, softcap, logit_scale, lora: the student's, see :func:`fastgrpo.linear_logprobs`.
        teacher_hidden: (N, D_t) or (B, T, D_t), positions as hidden's; its width may differ. No gradient.
        teacher_weight: (V, D_t), the same vocabulary in the same order. No gradient, neither to teacher_bias.
        mask: 0/1 of hidden's shape without D; where it is 0 nothing is computed and the divergence is 0. None: all.
        beta: 0, 1 or in [1e-5, 1 - 1e-5], where fp32 has digits enough of both parts.
        temperature: a number > 0, or a float tensor of mask's shape. Divides both models' logits.
        return_entropy: also return the student's entropy, without a gradient.
        backend, backward, tolerance, workspace_mb, row_tolerance: see :func:`fastgrpo.linear_logprobs`. "auto" is
            exact where the head is trained without a hint or its gradient is made in the forward, of a mixture on the
            Triton backend, and where the head is frozen on AMD's CPUs from Zen 5 on. Where hidden alone wants a
            gradient (a frozen head, no LoRA on it) the torch backend makes it in the forward, in three GEMMs of one
            model's logits or less, mixtures too, and holds it until the backward, 4 N D bytes. So it does, exactly,
            with a trained fp32 head without LoRA where the workspace has 1.7 KB for each entry of the vocabulary (128
            MiB serve 78 000; half of that for a mixture): four GEMMs, and the head's gradient, 4 V D bytes, is there
            from the forward on. That takes a loss in which all tokens weigh alike, as in a sum or a mean; where the
            gradients that come in differ, the backward makes the head's anew, in three GEMMs more. On a CPU 0.7
            of the workspace at most stay allocated for the next call whose gradients are made in the forward. The
            Triton backend holds an exact mixture's logits of some rows between its passes where the workspace has 1.5
            KB for each entry of the vocabulary (128 MiB serve 91 000): two GEMMs of one model's logits fewer in the
            forward, and a frozen head's gradient made there too, three GEMMs in all where they are seven.
        targets, old_logprobs: tokens that the student drew at the positions and the log-probs that it gave them then,
            of mask's shape; both or neither. A hint, which never changes the divergence: a certified backward orders
            its rows by it, and of a KL leaves out several times more, within the tolerance. A trained head's backward
            may be certified under "auto" because of it. Where a target is no id nothing is known.

    Returns:
        ``Divergence(divergence, entropy)``, float32 (float64 for float64 input), of mask's shape, >= 0 up to rounding
        (1e-7), 0 where masked; differentiable in hidden, weight, bias and LoRA's A and B, once. Small divergences keep
        their accuracy: what is summed is small where the models agree. ``entropy`` is None unless asked for.

    Raises:
        ValueError, TypeError: a bad argument, named, with what was expected and what came, before anything runs.
    """
    options = HeadOptions(
        bias=bias,
        temperature=temperature,
        softcap=softcap,
        logit_scale=logit_scale,
        lora=lora,
        backend=backend,
        backward=backward,
        tolerance=tolerance,
        workspace_mb=workspace_mb,
        row_tolerance=row_tolerance,
        old_logprobs=old_logprobs,
        return_entropy=return_entropy,
    )
    teacher = TeacherHead(teacher_hidden, teacher_weight, teacher_bias, teacher_softcap, teacher_logit_scale)
    return head_divergence(hidden, weight, mask, teacher, beta, options, targets)


@dataclass(frozen=True)
class TeacherHead:
    """The distribution that a student's is compared with, as :func:`linear_divergence` takes it."""

    hidden: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None = None
    softcap: float | None = None
    logit_scale: float = 1.0

    def check(self, hidden, weight, prefix="teacher"):
        """Against the student's; raises before anything runs."""
        given = {"hidden": self.hidden, "weight": self.weight}
        for name, value in (given if self.bias is None else given | {"bias": self.bias}).items():
            inputs.check_tensor(f"{prefix}_{name}", value, hidden.device, floating=True)
            inputs.check_dtype(f"{prefix}_{name}", value)
            inputs.check_whole(f"{prefix}_{name}", value)
            if (value.dtype == torch.float64) != (hidden.dtype == torch.float64):
                raise ValueError(
                    f"{prefix}_{name} and hidden must both be float64 or neither, got {value.dtype} and {hidden.dtype}"
                )
        if self.hidden.ndim != hidden.ndim or self.hidden.shape[:-1] != hidden.shape[:-1]:
            raise ValueError(
                f"{prefix}_hidden must have the positions of hidden, {(*hidden.shape[:-1], 'D_t')}, got "
                f"{tuple(self.hidden.shape)}"
            )
        if self.hidden.shape[-1] == 0:
            raise ValueError(f"{prefix}_hidden must have a width of at least 1, got {tuple(self.hidden.shape)}")
        expected = weight.shape[0], self.hidden.shape[-1]
        if self.weight.shape != expected:
            raise ValueError(
                f"{prefix}_weight must be (V, D_t) = {expected}, the student's vocabulary, got "
                f"{tuple(self.weight.shape)}"
            )
        if self.bias is not None and self.bias.shape != expected[:1]:
            raise ValueError(f"{prefix}_bias must be ({expected[0]},), got {tuple(self.bias.shape)}")
        if self.softcap is not None:
            inputs.check_scalar(f"{prefix}_softcap", self.softcap)
        inputs.check_scalar(f"{prefix}_logit_scale", self.logit_scale, positive=False)

    def beside(self, params, beta):
        """:class:`PairParams` of the student's."""
        return PairParams(
            **vars(params),
            teacher_softcap=None if self.softcap is None else float(self.softcap),
            teacher_logit_scale=float(self.logit_scale),
            teacher_compute_dtype=compute_dtype(self.hidden, self.weight),
            beta=float(beta),
        )


class PairTensors(NamedTuple):
    """:class:`fastgrpo.head_op.HeadTensors` and the teacher's."""

    hidden: torch.Tensor  # (B, T, D)
    weight: torch.Tensor  # (V, D)
    bias: torch.Tensor | None  # (V,)
    lora_a: torch.Tensor | None  # (r, D)
    lora_b: torch.Tensor | None  # (V, r)
    targets: torch.Tensor  # (N,) int64: 0 where a row counts, else IGNORE
    temperatures: torch.Tensor | None  # (N,)
    teacher_hidden: torch.Tensor  # (B, T, D_t)
    teacher_weight: torch.Tensor  # (V, D_t)
    teacher_bias: torch.Tensor | None  # (V,)

    PARAMS = PairParams
    STATS = PairStats

    def problem(self, params, low=None):
        return PairProblem(
            self.hidden,
            self.weight,
            self.bias,
            self.targets,
            self.temperatures,
            params,
            low,
            self.lora_b,
            teacher_hidden=self.teacher_hidden,
            teacher_weight=self.teacher_weight,
            teacher_bias=self.teacher_bias,
        )


def head_divergence(hidden, weight, mask, teacher, beta, options, labels=None):
    """:func:`linear_divergence` with its options in :class:`fastgrpo.head.HeadOptions` and :class:`TeacherHead`."""
    targets = check(hidden, weight, mask, teacher, beta, options)
    check_labels(labels, options, targets)
    lora = check_lora(options.lora, hidden, weight)
    params = options.params(
        hidden,
        weight,
        (hidden, weight, options.bias, lora.A, lora.B),
        scaling=lora.scaling,
        lora_dtype=None if lora.A is None else compute_dtype(hidden, weight, lora.A, lora.B),
    )
    params = teacher.beside(params, beta)
    tensors = pair_tensors(hidden, weight, targets, teacher, options, lora)
    head = weight, options.bias, lora.A, lora.B
    trained, in_forward = wants_gradient(head), divergence_panels.applies_to_head(hidden, head, params)
    hinted = options.old_logprobs is not None
    fast = products.makes_memory(hidden.device, inputs.accumulator_dtype(hidden))
    tolerance = tolerance_of(params, beta, options.backward, trained, hinted, fast, in_forward)
    params = replace(params, tolerance=tolerance)
    strategy = choose_strategy(hidden, head, params, in_forward)
    given = NOTHING_GIVEN
    if labels is not None and strategy is strategies.DivergingCertified:
        given = strategies.Given(options.flat_hint(hidden), None, (labels.reshape(-1).to(torch.int64).clone(),))
    divergence, entropy = diverge(tensors, given, params, strategy)
    return Divergence(divergence.view(targets.shape), None if entropy is None else entropy.view(targets.shape))


def choose_strategy(hidden, head, params, in_forward=False):
    """head: weight, bias and LoRA's A and B, or None. params: whose tolerance is None where nothing is left out.
    in_forward: as :func:`tolerance_of`'s."""
    makes_gradients = params.backend == "torch" or params.held_rows(head[0].shape[0])
    if makes_gradients and frozen.applies(hidden, head, params):
        return strategies.DivergingFrozen
    if params.tolerance is None and in_forward:
        return strategies.DivergingTrained
    return strategies.Diverging if params.tolerance is None else strategies.DivergingCertified


def wants_gradient(head):
    """head: as :func:`choose_strategy`'s, whose LoRA's A is hidden's affair."""
    weight, bias, _, lora_b = head
    return any(x is not None and x.requires_grad for x in (weight, bias, lora_b))


def tolerance_of(params, beta, backward, trained, hinted=False, fast=False, in_forward=False):
    """The tolerance, None where leaving entries out does not pay.

    Args:
        fast: whether GEMMs cost less than the passes over the terms. in_forward: whether a trained head's gradient is
            made in the forward where every entry counts.
    """
    # without a hint dW's rows need so many rows whole that nothing is saved, measured; asked for, it is done
    # on a GPU a mixture's flags cost what they save, measured
    flagged = params.backend == "torch" or beta in (0.0, 1.0)
    pays = flagged and (hinted and not in_forward if trained else not fast)
    return params.tolerance if backward == "certified" or pays else None


def check(hidden, weight, mask, teacher, beta, options):
    """-> targets, hidden's shape without D: 0 where a row counts, else IGNORE; raises before anything runs."""
    shape = hidden.shape[:-1] if isinstance(hidden, torch.Tensor) and hidden.ndim > 1 else ()
    targets = torch.zeros(shape, dtype=torch.int64, device=getattr(hidden, "device", None))
    if mask is not None and shape:
        inputs.check_mask(mask, targets)
        targets = torch.where(mask.reshape(shape) != 0, targets, IGNORE)
    targets = options.check(hidden, weight, targets)
    teacher.check(hidden, weight)
    inputs.check_finite("beta", beta)
    check_field("beta", beta, Mixture)
    return targets


def check_labels(labels, options, targets):
    """targets: of hidden's shape; raises before anything runs."""
    if (labels is None) != (options.old_logprobs is None):
        missing, there = ("targets", "old_logprobs") if labels is None else ("old_logprobs", "targets")
        raise ValueError(f"{missing} must be given together with {there}, got None")
    if labels is not None:
        inputs.check_labels(labels, targets)


def pair_tensors(hidden, weight, targets, teacher, options, lora=NO_LORA):
    """:class:`PairTensors` of checked arguments."""
    return PairTensors(
        hidden if hidden.ndim == 3 else hidden[None],
        weight,
        None if options.bias is None else options.bias.contiguous(),
        lora.A,
        lora.B,
        targets.reshape(-1),
        options.flat_temperature(hidden, targets),
        (teacher.hidden if hidden.ndim == 3 else teacher.hidden[None]).detach(),
        teacher.weight.detach(),
        None if teacher.bias is None else teacher.bias.detach().contiguous(),
    )


NOTHING_GIVEN = strategies.Given(None, None, ())
diverge = head_op.HeadOp("linear_divergence", PairTensors)

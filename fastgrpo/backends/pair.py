"""Two heads read at once: a student's problem with its teacher, and what is known of each row of both."""

import functools
from dataclasses import dataclass, fields, replace
from typing import NamedTuple

import torch

from fastgrpo.backends.problem import HeadParams, HeadProblem


class PairStats(NamedTuple):
    """What a divergence's forward knows of each row, (8, N); the first five stand as in :class:`RowStats`."""

    divergence: torch.Tensor
    peak: torch.Tensor  # the student's
    offset: torch.Tensor  # its log-sum-exp minus that peak
    norm: torch.Tensor  # of d divergence / d logits over the entries; 0: not known
    entropy: torch.Tensor  # the student's
    other_peak: torch.Tensor  # the teacher's
    gap: torch.Tensor  # the student's offset minus the teacher's: apart, where both hardly differ
    center: torch.Tensor  # what a row's log-ratios are taken from in its gradient, see :func:`slope_center`


def mixture_stats(own, other):
    """:class:`PairStats` of what :class:`RowStats` of the student and of the teacher tell; the rest 0."""
    return PairStats(
        divergence=torch.zeros_like(own.peak),
        peak=own.peak,
        offset=own.offset,
        norm=torch.zeros_like(own.peak),
        entropy=own.entropy,
        other_peak=other.peak,
        gap=own.offset - other.offset,
        center=torch.zeros_like(own.peak),
    )


@dataclass(frozen=True)
class PairParams(HeadParams):
    """The student's, and what differs of the teacher's."""

    teacher_softcap: float | None = None
    teacher_logit_scale: float = 1.0
    teacher_compute_dtype: torch.dtype = torch.float32
    beta: float = 1.0

    @property
    def teacher(self):
        own = {f.name: getattr(self, f.name) for f in fields(HeadParams)}
        differ = {
            "softcap": self.teacher_softcap,
            "logit_scale": self.teacher_logit_scale,
            "compute_dtype": self.teacher_compute_dtype,
            "tolerance": None,
        }
        return HeadParams(**(own | differ))


@dataclass(frozen=True)
class PairProblem(HeadProblem):
    """The student's; ``targets`` are 0 where a row counts, else IGNORE."""

    teacher: HeadProblem | None = None
    beta: float = 1.0  # 0: KL(teacher || student), 1: KL(student || teacher), between: the generalised JSD

    @property
    def is_mixture(self):
        return 0.0 < self.beta < 1.0

    @property
    def depth(self):
        return super().depth + self.teacher.depth

    @property
    def tiles_alive(self):
        return 7 if self.is_mixture else 6  # both logits, their difference, and what is made of it

    @property
    def of_tolerance(self):
        return 0.1  # norms are certified, where a log-prob's certificate has masses, which are many times theirs

    @property
    def knows_left_out(self):
        return False

    def norms(self, stats):
        return PairStats(*stats).norm

    def within(self, workspace):
        other = super().within(workspace)
        teacher = replace(self.teacher, params=replace(self.teacher.params, workspace=workspace))
        return replace_kept(other, teacher=teacher)

    @functools.cached_property
    def own(self):
        """The student's alone."""
        names = HeadProblem.__dataclass_fields__
        return HeadProblem(**{name: getattr(self, name) for name in names})


def replace_kept(problem, **fields):
    """dataclasses.replace that takes LoRA's operands along."""
    other = replace(problem, **fields)
    if "lora_operands" in problem.__dict__:
        other.__dict__["lora_operands"] = problem.__dict__["lora_operands"]
    return other

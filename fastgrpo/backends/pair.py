"""Two heads read at once: a student's problem with its teacher, and what is known of each row of both."""

import functools
from dataclasses import dataclass, fields
from typing import NamedTuple

import torch

from fastgrpo.backends.problem import HeadParams, HeadProblem
from fastgrpo.pair_math import steepest


class PairStats(NamedTuple):
    """What a divergence's forward knows of each row, (8, N); the first five stand as in :class:`RowStats`."""

    divergence: torch.Tensor
    peak: torch.Tensor  # the student's
    offset: torch.Tensor  # its log-sum-exp minus that peak
    norm: torch.Tensor  # of d divergence / d logits over the entries; 0: not known
    entropy: torch.Tensor  # the student's
    other_peak: torch.Tensor  # the teacher's
    gap: torch.Tensor  # the student's offset minus the teacher's: apart, where both hardly differ
    center: torch.Tensor  # what a row's log-ratios are taken from in its gradient


def mixture_stats(own, other):
    """:class:`PairStats` of what :class:`RowPartials` of the student and of the teacher tell; the rest 0."""
    offset, none = own.total.log(), torch.zeros_like(own.peak)
    return PairStats(
        divergence=none,
        peak=own.peak,
        offset=offset,
        norm=none,
        entropy=offset + own.spread / own.total,
        other_peak=other.peak,
        gap=offset - other.total.log(),
        center=none,
    )


# Part of the workspace for both models' logits of some rows; how many rows, at least and at most; of what their columns
# are multiples. Fewer would read the heads so often that making the logits again costs less: counted, not measured.
HELD_SHARE, HELD_ROWS, HELD_COLUMNS = 0.7, (128, 512), 256


def held_width(vocab):
    """Columns of one model's logits that are held."""
    return -(-vocab // HELD_COLUMNS) * HELD_COLUMNS


@dataclass(frozen=True)
class PairParams(HeadParams):
    """The student's, and what differs of the teacher's."""

    teacher_softcap: float | None = None
    teacher_logit_scale: float = 1.0
    teacher_compute_dtype: torch.dtype = torch.float32
    beta: float = 1.0

    @property
    def is_mixture(self):
        return 0.0 < self.beta < 1.0

    def held_rows(self, vocab):
        """Of how many rows the Triton backend holds both models' logits between a mixture's passes; 0: of none."""
        if self.backend != "triton" or not self.is_mixture or self.shard:
            return 0
        least, most = HELD_ROWS
        fit = int(HELD_SHARE * self.workspace) // (2 * 4 * held_width(vocab))
        return min(fit // least * least, most)

    @property
    def teacher(self):
        own = {f.name: getattr(self, f.name) for f in fields(HeadParams)}
        differ = {
            "softcap": self.teacher_softcap,
            "logit_scale": self.teacher_logit_scale,
            "compute_dtype": self.teacher_compute_dtype,
            "tolerance": None,
            "entropy": False,
        }
        return HeadParams(**(own | differ))


@dataclass(frozen=True)
class PairProblem(HeadProblem):
    """The student's, whose parameters are :class:`PairParams`; ``targets`` are 0 where a row counts, else IGNORE."""

    teacher_hidden: torch.Tensor | None = None  # (B, T, D_t), any strides
    teacher_weight: torch.Tensor | None = None  # (V, D_t)
    teacher_bias: torch.Tensor | None = None  # (V,)

    @property
    def beta(self):
        """0: KL(teacher || student), 1: KL(student || teacher), between: the generalised JSD."""
        return self.params.beta

    @functools.cached_property
    def teacher(self):
        """The teacher's alone."""
        head = self.teacher_hidden, self.teacher_weight, self.teacher_bias
        return HeadProblem(*head, self.targets, self.temperature, self.params.teacher)

    @property
    def heads(self):
        return self, self.teacher

    @property
    def is_mixture(self):
        return self.params.is_mixture

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

    def largest(self, stats):
        rows = PairStats(*stats)
        if self.is_mixture:
            return (steepest(rows.center, 1.0 - self.beta),)
        largest = steepest(rows.divergence, 1.0)
        return (largest if self.beta else largest.clamp(max=1.0),)  # p_s - p_t, of the other p_s times a log

    @functools.cached_property
    def own(self):
        """The student's alone."""
        names = HeadProblem.__dataclass_fields__
        return HeadProblem(**{name: getattr(self, name) for name in names})

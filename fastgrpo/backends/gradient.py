"""d loss / d logits of a tile, whatever the rows' loss is: of a log-prob and an entropy, or of a divergence."""

from fastgrpo.backends import dense, divergence
from fastgrpo.backends.pair import PairProblem
from fastgrpo.backends.pair_tiles import Scratch, Teacher


class Gradient:
    """Of tiles of some rows.

    Args:
        rows: (n,), the parts of them are slices. hold: whether what else of them is read may be held.
    """

    def __init__(self, problem, rows, hold=False):
        self.problem, self.rows, self.teacher = problem, rows, None
        if isinstance(problem, PairProblem):
            self.teacher, self.scratch = Teacher(problem, rows, hold), Scratch()

    def of_tile(self, z, bias, part, entries, local, stats, *grads):
        """d loss / d raw logits, over z's memory.

        Args:
            z: (n, C) raw logits. bias: (C,) or None. part: a slice of the rows. entries: slice or (C,) the entries.
            local: (n,) where among them each label stands. stats: of these rows. grads: [(n,)].
        """
        index = self.rows[part]
        if self.teacher is None:
            return dense.logits_gradient(self.problem, z, bias, index, local, stats, *grads)
        other = self.teacher.logits(part, entries)
        return divergence.logits_gradient(self.problem, z, bias, index, other, stats, *grads, scratch=self.scratch)

"""d loss / d logits of a tile, whatever the rows' loss is: of a log-prob and an entropy, or of a divergence."""

from fastgrpo.backends import dense, divergence
from fastgrpo.backends.pair import PairProblem


def of_tile(problem, z, bias, index, entries, local, stats, *grads):
    """d loss / d raw logits, over z's memory.

    Args:
        z: (n, C) raw logits. bias: (C,) or None. index: (n,) the rows. entries: slice or (C,) the entries.
        local: (n,) where among them each label stands. stats: of these rows. grads: [(n,)].
    """
    if isinstance(problem, PairProblem):
        other = divergence.teacher_of(problem, index, entries)
        return divergence.logits_gradient(problem, z, bias, index, other, stats, *grads)
    return dense.logits_gradient(problem, z, bias, index, local, stats, *grads)

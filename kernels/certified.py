"""The certified backward: the exact one's staircase, as high as the certificate asks; the host never waits."""

from fastgrpo.backends import staircase
from fastgrpo.backends.staircase import Staircase
from fastgrpo.kernels import tiles
from fastgrpo.kernels.arguments import TO_TRITON, Selection, logit_arguments, taken_arguments
from fastgrpo.kernels.audit import Audit, plan_memory
from fastgrpo.kernels.backward import Launcher, climb
from fastgrpo.kernels.plan import place_entries, place_rows, positions_of
from fastgrpo.kernels.row_order import weigh


def certified_backward(problem, stats, certificate, grad, needs, launcher=Launcher, samples=None):
    """As :func:`fastgrpo.kernels.backward.backward`, of the entries that matter: within the tolerances.

    Args:
        grad: (N,) of what the rows' loss is. launcher, samples: of what makes its dlogits, and those of an audit.
    """
    grad = grad.contiguous()
    return climb(problem, stats, [grad], None, needs, lambda: make_plan(
        problem, stats, certificate, grad, needs, samples), launcher)  # fmt: skip


def make_plan(problem, stats, certificate, grad, needs, samples=None):
    """As :func:`fastgrpo.backends.staircase.make`, by kernels."""
    trained = any(needs.of_head) or bool(needs.bias)
    weights, places, kept = weigh(problem, stats, certificate, grad), None, None
    if trained and problem.params.row_tolerance < 1:
        weights, places, kept = audit(problem, stats, certificate, weights, grad, needs, samples)
    placed = place_rows(certificate, weights.kinds, places, kept)
    entries, positions, stops_hidden, stops_head = place_entries(certificate, placed, problem.weight.shape[0], trained)
    return Staircase(placed.rows, placed.count, entries, stops_hidden, stops_head, positions, weights.scale)


def audit(problem, stats, certificate, weights, grad, needs, samples):
    """-> weights, and of an :class:`Audit` the places and how many of them are kept; or None, the kinds being final."""
    memory = plan_memory(problem, needs)
    if min(memory.ranking, memory.audited) > 0:
        made = Audit(problem, stats, certificate, weights, grad, needs, memory, samples or SampleLauncher)
        return weights, *made.places(problem.params.row_tolerance)
    # a workspace too small for all rows of a panel: torch's goes in narrower pieces
    kinds = staircase.sort_out(problem, stats, certificate, grad, needs, trained=True)
    return weights._replace(kinds=kinds), None, None


class SampleLauncher(Launcher):
    """Makes the dlogits of an audit's samples, reading the head by pointers: they are a hundredth of it."""

    def __init__(self, work, problem, stats, grad_logp, scale):
        self.work, self.problem, self.stats, self.grads, self.scale = work, problem, stats, [grad_logp], scale
        samples, order = work.samples, work.order
        self.tile = tiles.for_tensor(self.kernel(problem, self.grads), problem.tile_dtype, order.device)
        head, self.logits, self.low_rank = logit_arguments(problem)
        self.head, self.operands = head._replace(V=samples.ids.numel()), (None, None)
        self.compute = TO_TRITON[str(problem.params.compute_dtype)]
        self.selection = Selection(order, work.panels.stops, positions_of(problem.targets, samples.place))
        taken = problem.taken
        self.taken = taken_arguments(None if taken is None else positions_of(taken, samples.place).sort(1).values)

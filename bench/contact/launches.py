"""Launches of the kernels as the op makes them, to be made again and timed."""

import contextlib
import functools
from typing import NamedTuple

from bench.candidates import name_of, using


class Launch(NamedTuple):
    run: object  # launches it again
    tile: str
    flops: int


def speed(launch, ms):
    return {"tflops": round(1e-9 * launch.flops / ms, 1)} if launch.flops else {}


def plain(hidden, weight, targets, *_):
    """A forward that keeps nothing."""
    from fastgrpo import linear_logprobs

    return linear_logprobs(hidden.detach(), weight.detach(), targets, backend="triton").logprobs


def frozen(hidden, weight, targets, *_):
    """A frozen head's forward."""
    from fastgrpo import linear_logprobs

    hidden = hidden.detach().requires_grad_()
    linear_logprobs(hidden, weight.detach(), targets, backend="triton", backward="exact")


def exact(hidden, weight, targets, *_):
    """An exact forward and backward."""
    import torch

    from fastgrpo import linear_logprobs

    leaves = [x.detach().requires_grad_() for x in (hidden, weight)]
    logp = linear_logprobs(*leaves, targets, backend="triton", backward="exact").logprobs
    torch.autograd.grad(logp.sum(), leaves)


def certified(hidden, weight, targets, *_):
    """A certified forward, with what a plain one found as its hint."""
    from fastgrpo import linear_logprobs

    old = plain(hidden, weight, targets)
    leaves = [x.detach().requires_grad_() for x in (hidden, weight)]
    linear_logprobs(*leaves, targets, old_logprobs=old, backend="triton", backward="certified")


@contextlib.contextmanager
def not_held():
    """Inside, a mixture's logits are made again in each pass, whatever the workspace has room for."""
    from fastgrpo.backends import pair

    shipped, never = pair.HELD_ROWS, 2**40
    pair.HELD_ROWS = never, never
    try:
        yield
    finally:
        pair.HELD_ROWS = shipped


def divergence(hidden, weight, targets, *teacher, beta, backward="exact", to_the_end=False):
    """The forward of a divergence, whose backward is to be of this kind; ``to_the_end``: that too."""
    import torch

    from fastgrpo import linear_divergence

    leaves = [x.detach().requires_grad_() for x in (hidden, weight)]
    with not_held():
        found = linear_divergence(*leaves, *teacher, beta=beta, backend="triton", backward=backward).divergence
    if to_the_end:
        torch.autograd.grad(found.sum(), leaves)


KL, JSD = ({"beta": beta} for beta in (1.0, 0.5))
# The least that launches each kernel, the timed launch among it.
SOURCES = {
    "forward": plain,
    "forward_certified": certified,
    "masses": frozen,
    "dlogits": exact,
    "dhidden": exact,
    "dweight": exact,
    "forward_pair": functools.partial(divergence, **KL),
    "forward_pair_mixture": functools.partial(divergence, **JSD),
    "forward_pair_certified": functools.partial(divergence, **KL, backward="certified"),
    "forward_pair_mixture_certified": functools.partial(divergence, **JSD, backward="certified"),
    "dlogits_pair": functools.partial(divergence, **KL, to_the_end=True),
    "dlogits_pair_mixture": functools.partial(divergence, **JSD, to_the_end=True),
}
LEAST = (  # whose sources launch all; one head's come last, for what both launch
    "forward_pair_certified", "forward_pair_mixture_certified", "dlogits_pair", "dlogits_pair_mixture", "masses",
    "dhidden", "forward_certified",
)  # fmt: skip


def launches(contact, depth):
    """{kernel: its largest launch} of divergences, then of a forward, a certified and a frozen head's one, and an exact
    backward."""
    data = beside_teacher(contact, contact.sizes.tokens, depth)
    return {name: x for kernel in LEAST for name, x in launches_of(SOURCES[kernel], data).items()}


def beside_teacher(contact, *arguments):
    """hidden, weight and targets of :meth:`Contact.head`, and the hidden states and weight of a teacher as wide."""
    return *contact.head(*arguments), *contact.head(*arguments, seed=1)[:2]


def launches_of(source, data):
    """data: hidden, weight, targets; where two models' kernels are launched, a teacher's hidden and weight too."""
    from fastgrpo.kernels import report

    found = {}
    with report.replaced(lambda kernel: Recorder(kernel, found)):
        source(*data)
    return found


def with_tile(kernel, tile, data):
    """The kernel's largest launch under this tile; None: under the one shipped."""
    ways = {(kernel, data[0].element_size(), described): tile for described in (False, True)}
    with using(ways if tile is not None else {}):
        return launches_of(SOURCES[kernel], data)[kernel]


class Recorder:
    """Launches a kernel and keeps how, to do it again: the launch with the largest grid of each kind, or all legs of a
    vocabulary, which no two tiles cut alike."""

    def __init__(self, kernel, found):
        self.kernel, self.found, self.kept = kernel, found, {}

    def __getitem__(self, grid):
        def launch(**arguments):
            self.kernel[grid](**arguments)
            name, one = name_of(self.kernel, arguments), (grid, arguments)
            kept = self.kept.get(name, [])
            if "first_entry" in arguments:
                self.keep(name, [*kept, one])
            elif not kept or grid[0] > kept[0][0][0]:
                self.keep(name, [one])

        return launch

    def keep(self, name, launches):
        def run():
            for grid, arguments in launches:
                self.kernel[grid](**arguments)

        arguments = launches[0][1]
        tile = "x".join(str(arguments[k]) for k in arguments if k.startswith("BLOCK"))
        tile += f", {arguments.get('num_warps')} warps, {arguments.get('num_stages')} stages"
        self.kept[name] = launches
        self.found[name] = Launch(run, tile, sum(flops_of(name, arguments) for _, arguments in launches))


def flops_of(name, arguments):
    """2 x multiply-adds of a GEMM kernel's launch, all rows needing all entries; 0 of the others."""
    head, rows = arguments.get("head"), arguments.get("last_row", 0) - arguments.get("first_row", 0)
    beside = arguments["teacher"].head.D if "pair" in name and "teacher" in arguments else 0
    if name.startswith("forward"):
        entries = min(arguments.get("last_entry", head.V), head.V) - arguments.get("first_entry", 0)
        return 2 * rows * entries * (head.D + beside)
    if name in ("dhidden", "dweight", "masses") or name.startswith("dlogits"):
        first, last = arguments["cuts_ptr"][arguments["chunk"] :][:2].tolist()
        vocab, depth = (head.V, head.D) if head else (arguments["V"], arguments["D"])
        columns = min(last * arguments["PANEL"], vocab) - first * arguments["PANEL"]
        return 2 * rows * columns * (depth + beside)
    return 0

"""Launches of the kernels as the op makes them, to be made again and timed."""

from typing import NamedTuple

from bench.candidates import using


class Launch(NamedTuple):
    run: object  # launches it again
    tile: str
    flops: int


def speed(launch, ms):
    return {"tflops": round(1e-9 * launch.flops / ms, 1)} if launch.flops else {}


def plain(hidden, weight, targets):
    """A forward that keeps nothing."""
    from fastgrpo import linear_logprobs

    return linear_logprobs(hidden.detach(), weight.detach(), targets, backend="triton").logprobs


def frozen(hidden, weight, targets):
    """A frozen head's forward."""
    from fastgrpo import linear_logprobs

    hidden = hidden.detach().requires_grad_()
    linear_logprobs(hidden, weight.detach(), targets, backend="triton", backward="exact")


def exact(hidden, weight, targets):
    """An exact forward and backward."""
    import torch

    from fastgrpo import linear_logprobs

    leaves = [x.detach().requires_grad_() for x in (hidden, weight)]
    logp = linear_logprobs(*leaves, targets, backend="triton", backward="exact").logprobs
    torch.autograd.grad(logp.sum(), leaves)


def certified(hidden, weight, targets):
    """A certified forward, with what a plain one found as its hint."""
    from fastgrpo import linear_logprobs

    old = plain(hidden, weight, targets)
    leaves = [x.detach().requires_grad_() for x in (hidden, weight)]
    linear_logprobs(*leaves, targets, old_logprobs=old, backend="triton", backward="certified")


# The least that launches each kernel, the timed launch among it.
SOURCES = {
    "forward": plain,
    "forward_certified": certified,
    "masses": frozen,
    "dlogits": exact,
    "dhidden": exact,
    "dweight": exact,
}


def launches(contact, depth):
    """{kernel: its largest launch} of a forward, a certified and a frozen head's one, and an exact backward."""
    data = contact.head(contact.sizes.tokens, depth)
    return {name: x for source in (frozen, exact, certified) for name, x in launches_of(source, data).items()}


def launches_of(source, data):
    """data: hidden, weight, targets."""
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
    """Launches a kernel and keeps how, to do it again: the launch with the largest grid of each kind."""

    def __init__(self, kernel, found):
        self.kernel, self.name, self.found, self.grids = kernel, kernel.fn.__name__.removesuffix("_kernel"), found, {}

    def __getitem__(self, grid):
        def launch(**arguments):
            self.kernel[grid](**arguments)
            name = self.name + ("_certified" if arguments.get("flags_ptr") is not None else "")
            if grid[0] > self.grids.get(name, 0):
                self.grids[name] = grid[0]
                tile = "x".join(str(arguments[k]) for k in arguments if k.startswith("BLOCK"))
                tile += f", {arguments.get('num_warps')} warps, {arguments.get('num_stages')} stages"
                again = Launch(lambda: self.kernel[grid](**arguments), tile, flops_of(name, arguments))
                self.found[name] = again

        return launch


def flops_of(name, arguments):
    """2 x multiply-adds of a GEMM kernel's launch, all rows needing all entries; 0 of the others."""
    head, rows = arguments.get("head"), arguments.get("last_row", 0) - arguments.get("first_row", 0)
    if name.startswith("forward"):
        return 2 * rows * head.V * head.D
    if name in ("dlogits", "dhidden", "dweight", "masses"):
        first, last = arguments["cuts_ptr"][arguments["chunk"] :][:2].tolist()
        vocab, depth = (head.V, head.D) if head else (arguments["V"], arguments["D"])
        columns = min(last * arguments["PANEL"], vocab) - first * arguments["PANEL"]
        return 2 * rows * columns * depth
    return 0

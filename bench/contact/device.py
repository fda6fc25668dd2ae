"""What the steps of the first contact share: device, sizes and clock, and how far a result is from the truth."""

import statistics
import time
from importlib.util import find_spec
from typing import NamedTuple

import torch


class Sizes(NamedTuple):
    """How large the steps are; a rehearsal without a GPU takes small ones."""

    tokens: int  # of timings
    large: int  # N, so that N V > 2^31
    vocab: int
    widths: tuple
    square: int  # of the GEMM that tells what the device can do
    repeats: int


REAL = Sizes(8192, 16512, 151936, (896, 1536, 4096), 8192, 5)

REHEARSAL = Sizes(32, 34, 192, (32,), 64, 1)


class Contact:
    """What the steps share: the device, the sizes and the clock."""

    def __init__(self, device, sizes):
        self.device, self.sizes, self.cuda = device, sizes, device == "cuda"

    def milliseconds(self, function, repeats=None):
        """-> median and minimum over a few runs after two that warm up."""
        for _ in range(2):
            function()
        times = [self.once(function) for _ in range(repeats or self.sizes.repeats)]
        return round(statistics.median(times), 4), round(min(times), 4)

    def once(self, function):
        if not self.cuda:
            start = time.perf_counter()
            function()
            return 1e3 * (time.perf_counter() - start)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        function()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end)

    def interleaved(self, functions, rounds):
        """-> the least milliseconds of each; they take turns, and the device waits for no launch."""
        if not self.cuda:
            return [min(times) for times in zip(*[[self.once(f) for f in functions] for _ in range(rounds)])]
        torch.cuda._sleep(2_000_000)  # about a millisecond, while the host fills the queue
        events = []
        for _ in range(rounds):
            for function in functions:
                pair = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
                pair[0].record()
                function()
                pair[1].record()
                events.append(pair)
        torch.cuda.synchronize()
        times = [start.elapsed_time(end) for start, end in events]
        return [min(times[k :: len(functions)]) for k in range(len(functions))]

    def head(self, n, depth, dtype=torch.bfloat16, vocab=None, seed=0):
        """hidden (N, D), weight (V, D), targets (N,): every second label at p near 1."""
        vocab = vocab or self.sizes.vocab
        g = torch.Generator(self.device).manual_seed(seed)
        hidden = torch.randn(n, depth, generator=g, device=self.device).to(dtype)
        weight = (torch.randn(vocab, depth, generator=g, device=self.device) / depth**0.5).to(dtype)
        targets = torch.randint(0, vocab, (n,), generator=g, device=self.device)
        hidden[::2] += (18 * weight[targets[::2]].float()).to(dtype)
        return hidden, weight, targets


def padded(x):
    """The same (n, m) matrix with rows that descriptors cannot read."""
    return torch.nn.functional.pad(x, (0, 1))[:, :-1]


def draw(dtype, generator):
    """-> random(*shape, dtype): normal numbers."""
    return lambda *shape, dtype=dtype: torch.randn(shape, generator=generator, device=generator.device).to(dtype)


def bare(contact, depth):
    hidden, weight, _ = contact.head(contact.sizes.tokens, depth)
    ms, best = contact.milliseconds(lambda: [rows @ weight.T for rows in hidden.split(2048)])
    flops = 2 * hidden.shape[0] * weight.shape[0] * depth
    return {"ms": ms, "tflops": round(1e-9 * flops / best, 1)}


def largest(x, truth):
    return float(((x.double() - truth) / (1 + truth.abs())).detach().abs().max())


def relative(x, truth):
    return float((x.double() - truth).norm() / truth.norm().clamp(min=1e-30))


def attempt(function, *arguments, **keywords):
    """What it returns, or a row that says why not."""
    try:
        return function(*arguments, **keywords)
    except Exception as error:
        return failure(error)


def failure(error):
    return {"error": f"{type(error).__name__}: {str(error)[:400]}", "ok": False}


def absent(*packages):
    """A row that says which packages the rest needs and this machine has not; None: all are there."""
    missing = [name for name in packages if find_spec(name) is None]
    return {"skipped": f"needs {', '.join(missing)}"} if missing else None

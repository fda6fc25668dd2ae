"""Where the certified path's time goes on a CPU, by wrapping the functions that do the work."""

import contextlib
import time

import torch

from bench import entries, measure
from fastgrpo.backends import certified, certified_backward, dense, logits


class Stages:
    """Seconds spent in the named steps of one call."""

    def __init__(self):
        self.seconds = {}

    def wrap(self, name, function):
        def timed(*args, **kwargs):
            start = time.perf_counter()
            result = function(*args, **kwargs)
            label = name(*args) if callable(name) else name
            self.seconds[label] = self.seconds.get(label, 0.0) + time.perf_counter() - start
            return result

        return timed

    @contextlib.contextmanager
    def active(self, phase):
        reader, fold = logits.Reader, certified.Fold

        def product(_, a, b, out):
            return f"{phase}: " + ("dW" if not a.is_contiguous() else "logits GEMM")

        def added(_, total, a, b):
            return f"{phase}: " + ("dX" if a.is_contiguous() else "dW")

        targets = [
            (reader, "mm", product),
            (reader, "add_mm", added),
            (fold, "tile", f"{phase}: exp, sums, flags"),
            (torch, "index_select", f"{phase}: gather entries"),
            (reader, "hidden", f"{phase}: gather rows"),
            (dense, "logits_gradient", f"{phase}: dlogits"),
            (certified_backward, "make_plan", f"{phase}: plan, audit"),
            (certified, "label_logits", f"{phase}: label logits"),
        ]
        saved = [(owner, name, getattr(owner, name)) for owner, name, _ in targets]
        for owner, name, label in targets:
            setattr(owner, name, self.wrap(label, getattr(owner, name)))
        try:
            yield
        finally:
            for owner, name, value in saved:
                setattr(owner, name, value)


def time_certified(p, gemm):
    """-> {stage: time in units of the bare GEMM} of one call on a problem."""
    timer, total, clock = Stages(), {}, measure.Clock("cpu")
    with timer.active("forward"):
        total["forward"], loss = clock(lambda: entries.ENTRIES["fastgrpo certified"].run_loss(p))
    with timer.active("backward"):
        total["backward"], _ = clock(lambda: measure.gradients(loss, p))
    for phase, seconds in total.items():
        timer.seconds[f"{phase}: rest"] = seconds - sum(v for k, v in timer.seconds.items() if k.startswith(phase))
    return {k: round(v / gemm, 4) for k, v in sorted(timer.seconds.items(), reverse=True)}

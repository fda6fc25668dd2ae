"""The ranks of a process group in one process: threads of which one runs at a time, until all wait for a collective."""

import threading
from concurrent.futures import ThreadPoolExecutor

import torch
import torch.distributed as dist


class Ranks:
    """Stands in for ``dist.all_reduce`` while functions run, each as a rank.

    A kernel in Triton's interpreter and torch's global state want one thread; none of them waits for another rank.
    """

    def __init__(self, monkeypatch, count):
        monkeypatch.setattr(dist, "all_reduce", self.all_reduce)
        self.turn, self.here, self.given = threading.Lock(), threading.local(), [None] * count
        self.barrier = threading.Barrier(count, timeout=60)

    def all_reduce(self, x, op=dist.ReduceOp.SUM, group=None):
        self.given[self.here.rank] = x.clone()
        self.turn.release()
        self.barrier.wait()
        every = torch.stack(self.given)
        self.barrier.wait()
        self.turn.acquire()
        x.copy_(every.amax(0) if op == dist.ReduceOp.MAX else every.sum(0))

    def run(self, functions):
        """-> what each of them returns."""
        with ThreadPoolExecutor(len(functions)) as pool:
            return list(pool.map(self.as_rank, range(len(functions)), functions))

    def as_rank(self, rank, function):
        self.here.rank = rank
        with self.turn:
            try:
                return function()
            except BaseException:
                self.barrier.abort()
                raise

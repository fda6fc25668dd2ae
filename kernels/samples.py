"""The sampled entries of an audit as a small vocabulary: the ranking ones, then the audited ones, in whole panels."""

import functools
import itertools
from typing import NamedTuple

import torch

from fastgrpo.backends import row_audit
from fastgrpo.kernels import tiles
from fastgrpo.kernels.copies import gather_rows
from fastgrpo.kernels.panels import Panels
from fastgrpo.kernels.tiles import cdiv


class Samples(NamedTuple):
    """:func:`row_audit.sample_entries` in panels."""

    ids: torch.Tensor  # (columns,) int64; filled up with entry 0
    place: torch.Tensor  # (V,) int64, the column of each entry, or -1
    ranking: int  # entries to rank by, from column 0 on
    first: int  # the first audited column
    audited: int  # entries that are audited


@functools.cache
def samples_on(device, vocab):
    """:class:`Samples`, made once, for the upload makes the host wait. device: its name."""
    ranking, audited = row_audit.sample_entries(vocab)
    first = 0 if ranking is audited else cdiv(len(ranking), tiles.WIDTH) * tiles.WIDTH
    ids = torch.zeros(first + cdiv(len(audited), tiles.WIDTH) * tiles.WIDTH, dtype=torch.int64)
    place = torch.full((vocab,), -1)
    for at, entries in ((0, ranking), (first, audited)):
        ids[at : at + len(entries)] = entries
        place[entries] = torch.arange(at, at + len(entries))
    return Samples(ids.to(device), place.to(device), len(ranking), first, len(audited))


@functools.lru_cache(64)
def bounds_on(device, bounds):
    """int32, made once. bounds: the first panel of each chunk, and the one after the last."""
    return torch.tensor(bounds, dtype=torch.int32, device=device)


class SampleCut(NamedTuple):
    """:class:`fastgrpo.kernels.panels.Cut` of the samples: all rows at once."""

    rows: int
    room: int
    most: int
    chunks: int
    copied: int = 0


class SampleWork:
    """What a launcher of dlogits goes through: all rows in the certificate's order, the samples as the vocabulary.

    Attributes:
        panels: :class:`Panels` of their dlogits. gathered: [(N, D)], hidden's rows.
    """

    spread = False

    def __init__(self, problem, order, samples, rows, bounds):
        self.samples, self.order, n = samples, order, order.numel()
        self.gathered = [problem.hidden.new_empty(n, problem.hidden.shape[2])]
        gather_rows(problem.hidden, order, None, self.gathered[0], 0, n, 0)
        columns, device = samples.ids.numel(), order.device
        most = max(last - first for first, last in itertools.pairwise(bounds))
        cut = SampleCut(rows, rows * most, most, len(bounds) - 1)
        stops = torch.full((columns // tiles.WIDTH,), n, dtype=torch.int32, device=device)
        cuts = bounds_on(str(device), bounds)
        self.panels = Panels(cut, columns, problem.params.compute_dtype, device, stops, ids=samples.ids, cuts=cuts)

    def first_held(self, first_row, buffer):
        return 0

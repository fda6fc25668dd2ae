"""How work is cut into programs: so that the last wave of them is as full as the others. Counted, not measured."""

import functools

import torch

from fastgrpo.kernels.tiles import cdiv

RUNS = 16  # partial results of a row at most, unless fewer leave processors without work
START = 0.5  # of a tile, what a program's beginning and end take
PART = 0.0005  # of an unsplit program's time, what each part of it takes: its sum is stored, and read once more
SPREAD = 0.05  # of a program's time, by which programs differ: what waits at the end for the last one


@functools.cache
def processor_count(device):
    return 4 if device.type != "cuda" else torch.cuda.get_device_properties(device).multi_processor_count


def slots(tile, device):
    """Programs that run at once: tiles of four warps are made for two a processor."""
    return processor_count(device) * max(8 // tile.warps, 1)


def vocabulary_runs(blocks, entries, tile, device):
    """-> how many runs to cut the vocabulary into, and the entries of one: where waves of programs end the earliest."""
    tiles_v = cdiv(entries, tile.cols)
    length = run_length(blocks, tiles_v, slots(tile, device))
    return cdiv(tiles_v, length), length * tile.cols


@functools.lru_cache(1024)  # a search on the host, of each launch
def run_length(blocks, tiles_v, at_once):
    """Tiles of a run."""

    def time(runs):
        length = cdiv(tiles_v, runs)
        return cdiv(blocks * runs, at_once) * (length + START) + SPREAD * length

    most = min(max(RUNS, cdiv(2 * at_once, max(blocks, 1))), tiles_v)
    return cdiv(tiles_v, min(range(1, most + 1), key=time))


def even_ways(programs, most, at_once):
    """Into how many parts, ``most`` at most, to split the sums of so many programs: where they end the earliest."""
    return min(range(1, most + 1), key=lambda ways: cdiv(programs * ways, at_once) / ways + PART * ways)

"""How work is cut into programs and parts: nothing is left out, waves are full, and no number depends on it."""

import pytest
import torch

from fastgrpo import linear_logprobs, reference

pytest.importorskip("triton")

from fastgrpo.kernels import grids, tiles
from fastgrpo.kernels.panels import cut_kernel, whole_waves
from fastgrpo.kernels.tiles import Tile, cdiv

import problems

ALONE, TWO = Tile(128, 256, 64, 8, 3), Tile(128, 128, 64, 4, 3)  # an SM holds one program of the first


def share(programs, length, units, at_once):
    """Of the time until the last program ends that the device works on one of the ``units``."""
    return units / (cdiv(programs, at_once) * length * at_once)


@pytest.mark.quick
@pytest.mark.parametrize("processors", [4, 82, 108, 128, 132, 170])
@pytest.mark.parametrize("tile", [ALONE, TWO])
def test_runs_fill_the_device(monkeypatch, processors, tile):
    monkeypatch.setattr(grids, "processor_count", lambda device: processors)
    at_once = grids.slots(tile, None)
    for rows in (1, 300, 512, 2048, 4096, 8192, 16384, 50_000):
        for vocab in (1000, 32_000, 151_936):
            blocks, tiles_v = cdiv(rows, tile.rows), cdiv(vocab, tile.cols)
            runs, run = grids.vocabulary_runs(blocks, vocab, tile, None)
            assert run % tile.cols == 0
            assert (runs - 1) * run < vocab <= runs * run
            assert runs <= max(grids.RUNS, cdiv(2 * at_once, blocks))
            if vocab > 100_000 and rows > 2000:
                assert share(blocks * runs, run // tile.cols, blocks * tiles_v, at_once) > 0.93


def test_an_h200s_waves(monkeypatch):
    """2048 tokens were 17 runs before: 272 programs, three waves for two waves' work."""
    monkeypatch.setattr(grids, "processor_count", lambda device: 132)
    assert grids.slots(ALONE, None) == 132
    assert grids.slots(TWO, None) == 264
    assert grids.vocabulary_runs(16, 151_936, ALONE, None)[0] == 16
    assert whole_waves.fn(32, 6, 132) == 22  # dweight, 16384 rows of 1536: 192 programs were 1.45 waves
    assert whole_waves.fn(32, 16, 132) == 32  # 3.9 waves
    assert whole_waves.fn(16, 6, 132) == 16  # less than a wave


@pytest.mark.quick
def test_even_ways():
    """As full a device as parts can make it, no more parts than that takes."""
    for programs, most, ways in ((24, 32, 11), (6, 32, 22), (64, 32, 2), (132, 32, 1), (6, 5, 5), (396, 32, 1)):
        assert grids.even_ways(programs, most, 132) == ways, (programs, most)


@pytest.mark.quick
def test_whole_waves_never_fall_back():
    """More room is never fewer units: so the chunks that the host counts for the fullest panels are enough."""
    for each in (1, 4, 6, 7, 12, 16, 32, 300):
        for at_once in (1, 4, 108, 132, 264):
            found = [whole_waves.fn(units, each, at_once) for units in range(1, 200)]
            assert found == sorted(found)
            assert all(1 <= n <= units for units, n in enumerate(found, 1))
            filled = [n * each / cdiv(n * each, at_once) for n in (*found, *range(1, 200))]
            assert all(ours >= plain for ours, plain in zip(filled, filled[len(found) :]))


@pytest.mark.parametrize(("each", "at_once"), [(1, 1), (4, 9), (6, 40)])
def test_the_device_cuts_as_the_host_counts(device, each, at_once):
    panels, rows, room = 39, 512, 9 * 512
    stops = torch.randint(0, rows + 1, (panels,), device=device).sort(descending=True).values.int()
    for heights in (stops, torch.full_like(stops, rows)):
        fit = whole_waves.fn(room // rows, each, at_once)
        chunks = cdiv(panels, fit)
        cuts = torch.full((chunks + 1,), -1, dtype=torch.int32, device=device)
        cut_kernel[(1,)](
            stops_ptr=heights, cuts_ptr=cuts, chunks=chunks, panels=panels, room=room, most=panels, rows=rows,
            copied=0, each=each, at_once=at_once, PANEL=tiles.WIDTH, num_warps=1,
        )  # fmt: skip
        sizes = cuts.diff()
        assert cuts[0] == 0
        assert cuts[-1] == panels
        assert (sizes >= 0).all()
    first, last = sizes.split([int((sizes == fit).cumprod(0).sum()), int((sizes != fit).sum())])
    assert fit == (6 if each == 6 else 9)
    assert last.count_nonzero() <= 1  # what is left, where it fits at once
    assert len(first) * fit + last.sum() == panels


@pytest.mark.parametrize("parts", [1, 4, 16])
@pytest.mark.parametrize("backward", ["exact", "certified"])
def test_parts_change_nothing(device, monkeypatch, parts, backward):
    """Logits of 200, each part of the columns with its own peak: as exact as torch's in fp32, in what is exact."""
    monkeypatch.setattr(tiles, "column_parts", lambda *_: parts)
    p = problems.drawn(70, 300, 32, "rl", device=device)
    p["hidden"] = p["hidden"] * (200 / (p["hidden"][0] @ p["weight"].T).abs().max())
    hint = reference.linear_logprobs(p["hidden"], p["weight"], p["targets"]).logprobs
    keywords = {"temperature": 0.7, "return_entropy": backward == "exact"}

    def run(function, dtype, **more):
        leaf = problems.with_grad({k: p[k].to(dtype) for k in ("hidden", "weight")}, ("hidden", "weight"))
        out = function(leaf["hidden"], leaf["weight"], p["targets"], **keywords, **more)
        out.logprobs.backward(p["upstream"].to(dtype))
        return (out.logprobs, out.entropy, leaf["hidden"].grad) if backward == "exact" else (out.logprobs,)

    more = {"old_logprobs": hint} if backward == "certified" else {}
    ours = run(linear_logprobs, torch.float32, backend="triton", backward=backward, **more)
    plain = run(reference.linear_logprobs, torch.float32)
    truth = run(reference.linear_logprobs, torch.float64)
    for got, same_dtype, want in zip(ours, plain, truth):
        error, allowed = ((x - want).norm() / want.norm() for x in (got, same_dtype))
        assert error <= 2 * allowed + 1e-6, (error, allowed)

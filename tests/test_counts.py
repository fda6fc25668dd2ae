"""What ``python -m bench.counts`` counts: launches at real size, and the work of a staircase."""

import pytest
import torch

pytest.importorskip("triton")

from bench import counts
from fastgrpo.backends import staircase
from fastgrpo.kernels import tiles


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Filling every buffer with NaN would be counted."""


@pytest.mark.parametrize("head", counts.NEEDS)
def test_launches_at_real_size(head):
    """All that is launched, torch's operations too: a constant, and four a chunk (docs/gpu.md)."""
    for workspace, most in ((128, 54 if head == "trained" else 52), (1024, 6)):
        parts = counts.count_launches(16384, 151936, 1536, head, workspace)
        chunks = parts["gradients"]["dlogits_kernel"]
        assert chunks == most
        total = sum(sum(names.values()) for names in parts.values())
        a_chunk = 4 if head == "trained" else 3
        assert total - a_chunk * chunks == (38 if head == "trained" else 25)
        torch_ones = [name for names in parts.values() for name in names if name.startswith("torch: ")]
        assert not {"torch: sort", "torch: cumsum", "torch: index", "torch: nonzero"} & set(torch_ones)


@pytest.mark.quick
def test_counts_of_work():
    """The cells are the staircase's; few programs leave processors idle, split ones do not."""
    assert counts.makespan([3.0, 1.0, 1.0, 1.0], 2) == 3.0
    assert counts.makespan([1.0, 1.0, 3.0], 2) == 4.0
    vocab = 200 * tiles.WIDTH
    stops = (torch.arange(200, 0, -1) * 10).to(torch.int32)
    rows = torch.arange(4096)
    stairs = staircase.Staircase(rows, torch.tensor([2000]), torch.arange(vocab), stops, stops)
    whole, split = (counts.count_work(stairs, vocab, 1024, workspace_mb=32, split=s) for s in (False, True))
    for of, share in zip(("dlogits", "dhidden", "dweight"), staircase.cells(stairs, vocab).tolist()):
        assert split[of].cells == pytest.approx(share * 4096 * vocab)
        assert split[of].padded >= split[of].cells
        assert split[of].longest >= split[of].padded
    assert split["dhidden"].longest < 0.8 * whole["dhidden"].longest
    assert split["dlogits"] == whole["dlogits"]

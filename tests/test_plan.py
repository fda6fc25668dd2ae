"""The plan by kernels is torch's: the same kinds of rows, the same staircase; sums of split products; launches."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")

from test_staircase import BIAS_ALONE, FROZEN, ROW_TOLERANCE, TRAINED, VOCAB, certify, drawn, pack, problem_of

from bench import counts
from fastgrpo.backends import row_audit, staircase
from fastgrpo.backends.certified_backward import within_tolerance
from fastgrpo.backends.problem import Gradients, row_scale
from fastgrpo.inputs import IGNORE
from fastgrpo.kernels import audit, certified, forward, plan, products, tiles
from fastgrpo.kernels.flags import PackedCertificate
from fastgrpo.kernels.panels import Panels

N, BLOCK_TILE = 260, 64


def case_of(device, **options):
    """-> problem, statistics, certificate as kernels leave it, upstream gradient; on the device."""
    p, g = {k: v[:N] if k != "weight" else v for k, v in drawn().items()}, torch.Generator().manual_seed(1)
    if options.pop("bias", False):
        options["bias"] = 0.3 * torch.randn(VOCAB, generator=g)
    if options.pop("temperature", False):
        options["temperature"] = 0.8 + 0.4 * torch.rand(N, generator=g)
    if options.pop("lora", False):
        options["low"] = torch.randn(1, N, 4, generator=g)
        options["up"] = 0.05 * torch.randn(VOCAB, 4, generator=g)
    problem = problem_of(p, **options)
    stats, made = certify(problem, None)
    packed = PackedCertificate(made.order, pack(made.flags, BLOCK_TILE), made.dropped, made.block, BLOCK_TILE)

    def put(x):
        return replace(x, **{k: v.to(device) for k, v in vars(x).items() if isinstance(v, torch.Tensor)})

    return put(problem), stats.float().to(device), put(packed), p["upstream"].to(device)


CASES = {
    "trained": (TRAINED, {}),
    "frozen": (FROZEN, {}),
    "bias alone, softcap, temperature": (BIAS_ALONE, {"bias": True, "softcap": 60.0, "temperature": True}),
    "lora": (Gradients(True, True, low=True, up=True), {"lora": True}),
    "pieces": (TRAINED, {"workspace": 5 * 2**19}),
    "too little memory": (TRAINED, {"workspace": 2**18}),
}


@pytest.mark.parametrize("name", CASES)
def test_the_kernels_plan_as_torch_does(name, device, monkeypatch):
    """Rows are of the same kinds, but for one that rounding puts elsewhere; of the same kinds the same staircase."""
    needs, options = CASES[name]
    case = case_of(device, **options)
    audits, kinds, place = [], [], certified.place_rows
    monkeypatch.setattr(certified, "place_rows", lambda c, k, *rest: kinds.append(k) or place(c, k, *rest))
    monkeypatch.setattr(certified, "Audit", lambda *a: audits.append(audit.Audit(*a)) or audits[-1])
    got = certified.make_plan(*case, needs)
    trained = needs != FROZEN
    want = staircase.sort_out(*case, needs, trained)
    assert (kinds[0] != want).sum() <= 1
    for kind in (staircase.SPARSE, staircase.INACTIVE, *([staircase.HEAD_ONLY] if trained else [])):
        assert (kinds[0] == kind).sum() > 10
    assert len(audits) == (trained and name != "too little memory")
    if audits:
        assert len(audits[0].audited) == (2 if name == "pieces" else 1)
    monkeypatch.setattr(staircase, "sort_out", lambda *a: kinds[0])
    stairs = staircase.make(*case, needs)
    for field in ("rows", "count", "entries", "stops_hidden", "stops_head"):
        assert torch.equal(getattr(got, field), getattr(stairs, field)), field
    assert torch.equal(got.positions, got.entries.argsort())
    problem, _, _, grad = case
    assert got.scale == row_scale(torch.where(problem.targets == IGNORE, 0.0, grad))


@pytest.mark.quick
def test_the_rows_within_the_tolerance(device):
    problem, stats, certificate, grad = case_of(device)
    grad = grad.clone()
    grad[3], grad[5] = torch.nan, torch.inf
    order = certificate.order
    active = (grad != 0)[order] & (problem.targets[order] != IGNORE)
    weights = plan.weigh(problem, stats, certificate, grad)
    want = within_tolerance(problem, problem.norms(stats)[order], grad[order], certificate.dropped, active)
    assert torch.equal(weights.kinds == staircase.SPARSE, want)
    assert torch.equal(weights.kinds == staircase.INACTIVE, ~active)
    assert weights.scale == row_scale(torch.where(active, grad[order], 0.0))
    usable = (weights.states & 2) != 0
    assert torch.equal(usable, active & grad[order].isfinite())


@pytest.mark.quick
@pytest.mark.parametrize("n", [1, 31, 150])
def test_the_order_of_rows(n, device):
    """Ties stay in order, ignored rows come last, and it is a permutation whatever the keys."""
    g = torch.Generator().manual_seed(0)
    keys = -torch.randint(5, (n,), generator=g).float().to(device)
    targets = torch.arange(n, device=device)
    targets[1::4] = IGNORE
    counted = targets != IGNORE
    order, places, count = plan.order_rows(keys, targets, places=True)
    assert torch.equal(order, torch.where(counted, keys, torch.inf).argsort(stable=True))
    assert torch.equal(places.long(), order.argsort())
    assert count == counted.sum()
    keys[n // 2], keys[0] = torch.nan, torch.inf
    order, _, count = plan.order_rows(keys, targets)
    assert torch.equal(order.sort().values, torch.arange(n, device=device))
    assert counted[order[: int(count)]].all()
    order, _, count = plan.order_rows(None, targets)
    assert torch.equal(order, (~counted).long().argsort(stable=True))


@pytest.mark.parametrize("vocab", [300, 40000])
def test_the_fewest_whole_rows(vocab, device):
    g = torch.Generator().manual_seed(2)
    audited = len(row_audit.sample_entries(vocab)[1])
    for growth in (0.5, 1.0, 1.6):
        errors = torch.rand(1 + row_audit.STEPS, audited, generator=g).to(device) * 0.06
        errors *= (torch.arange(1 + row_audit.STEPS, device=device)[:, None] / row_audit.STEPS) ** growth
        errors[:, ::7] = torch.nan
        padded = torch.full((1 + row_audit.STEPS, audited + 28), torch.nan, device=device)
        padded[:, :audited] = errors
        count, kept = (torch.tensor([k], dtype=torch.int32, device=device) for k in (1000, -1))
        audit.choose(padded, count, kept, ROW_TOLERANCE, vocab, audited)
        steps = row_audit.fewest_whole(errors, ROW_TOLERANCE, vocab)
        assert kept == 1000 * steps // row_audit.STEPS
        assert 0 < steps < row_audit.STEPS


@pytest.mark.parametrize("programs", [4, 16])
def test_a_product_that_is_split(programs, device):
    """Over chunks that ever fewer rows need: the sum behind and the slabs together are what one sum was."""
    n, vocab, depth = 256, 9 * tiles.WIDTH, 48
    g = torch.Generator().manual_seed(0)
    stops = torch.tensor([256, 256, 200, 130, 90, 60, 33, 20, 0], dtype=torch.int32, device=device)
    cuts = torch.tensor([0, 2, 5, 8, 9], dtype=torch.int32, device=device)
    cut = SimpleNamespace(rows=n, chunks=4, most=3, room=3 * n)
    entries = torch.randn(vocab, depth, generator=g).to(device)
    panels = Panels(cut, vocab, torch.float32, device, stops, cuts=cuts)
    slabs = products.slabs_for(tiles.for_tensor("dhidden", torch.float32, panels.dlogits.device), depth, programs)
    assert sum(slabs) > 0
    count, sums, ways = stops[:1], [], []
    for split in (None, slabs):
        total = torch.zeros(n + sum(split or ()), depth, device=device)
        g = torch.Generator().manual_seed(1)
        for chunk in range(4):
            panels.dlogits.copy_(torch.randn(panels.dlogits.shape, generator=g))
            products.add_product(panels, entries, total, count, 0, n, chunk, slabs=split,
                                 programs=programs if split else 0)  # fmt: skip
        sums.append(total[:n].clone())
        ways.append(total[n:])
    assert ways[1].count_nonzero() > 0
    first = 0
    for rows in slabs:
        sums[1][: min(rows, n)] += ways[1][first : first + min(rows, n)]
        first += rows
    torch.testing.assert_close(sums[1], sums[0], rtol=1e-5, atol=1e-4)


CHUNKED = ("gather_kernel", "dlogits_kernel", "dhidden_kernel", "dweight_kernel")  # launched once a chunk


@pytest.mark.parametrize("head", counts.NEEDS)
def test_launches_at_real_size(head):
    """All that is launched, torch's operations too: a constant, and four a chunk (docs/gpu.md)."""
    for workspace in (128, 1024):
        parts = counts.count_launches(16384, 151936, 1536, head, workspace)
        chunks = parts["gradients"]["dlogits_kernel"]
        assert chunks == (62 if head == "trained" else 62) if workspace == 128 else 7
        total = sum(sum(names.values()) for names in parts.values())
        a_chunk = 4 if head == "trained" else 3
        assert total - a_chunk * chunks <= (37 if head == "trained" else 25)
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


def test_the_forwards_order_and_certificate(device):
    """Ignored rows last, the hint's order before; rows whose hint was far too low keep everything."""
    p = {k: v[:N] if k != "weight" else v[:500] for k, v in drawn().items()}
    p["targets"] = torch.where(p["targets"] == IGNORE, IGNORE, p["targets"] % 500)
    problem = replace(problem_of(p), params=replace(problem_of(p).params, backend="triton"))
    problem = replace(problem, **{k: getattr(problem, k).to(device) for k in ("hidden", "weight", "targets")})
    hint = p["old_logprobs"].to(device).clone()
    hint[:40] -= 50.0
    stats, certificate = forward.certified_forward(problem, hint)
    counted = problem.targets != IGNORE
    assert torch.equal(certificate.order, torch.where(counted, hint, torch.inf).argsort(stable=True))
    astray = (stats[0] - hint > 1.4)[certificate.order] & counted[certificate.order]
    assert astray.sum() > 20
    dropped = certificate.dropped[astray]
    assert (dropped.isinf() | (dropped == 0)).all()
    assert dropped.isinf().sum() > 20
    assert certificate.dropped[~astray].isfinite().all()

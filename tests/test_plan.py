"""The plan by kernels is torch's: the same kinds of rows, the same staircase; sums of split products."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")

from test_staircase import BIAS_ALONE, FROZEN, ROW_TOLERANCE, TRAINED, VOCAB, certify, drawn, pack, problem_of

from fastgrpo.backends import certified as plain
from fastgrpo.backends import row_audit, staircase
from fastgrpo.backends.certified import Certificate
from fastgrpo.backends.certified_backward import within_tolerance
from fastgrpo.backends.grouping import UNITS
from fastgrpo.backends.problem import Gradients, row_scale
from fastgrpo.inputs import IGNORE
from fastgrpo.kernels import audit, certified, copies, forward, products, row_order, tiles
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
    packed = Certificate(made.order, pack(made.flags, BLOCK_TILE), made.dropped, made.block, BLOCK_TILE)

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
    assert got.scale == row_scale(problem, case[1], slice(None), torch.where(problem.targets == IGNORE, 0.0, grad))


@pytest.mark.quick
def test_the_rows_within_the_tolerance(device):
    problem, stats, certificate, grad = case_of(device)
    grad = grad.clone()
    grad[3], grad[5] = torch.nan, torch.inf
    order = certificate.order
    active = (grad != 0)[order] & (problem.targets[order] != IGNORE)
    weights = row_order.weigh(problem, stats, certificate, grad)
    want = within_tolerance(problem, problem.norms(stats)[order], grad[order], certificate.dropped, active)
    assert torch.equal(weights.kinds == staircase.SPARSE, want)
    assert torch.equal(weights.kinds == staircase.INACTIVE, ~active)
    assert weights.scale == row_scale(problem, stats, order[active], grad)
    usable = (weights.states & 2) != 0
    assert torch.equal(usable, active & grad[order].isfinite())


@pytest.mark.parametrize("n", [1, 256, 700])
def test_the_cheapest_rows_within_the_budget(n, device):
    """Over several programs; of rows that cost the same the first ones."""
    g = torch.Generator().manual_seed(n)
    for most in (0, 2 * UNITS // n, 5 * UNITS // n, 2 * UNITS):
        units = torch.randint(most + 1, (n,), generator=g)
        units[::3] = most // 2
        states = torch.where(torch.rand(n, generator=g) < 0.9, 3, 0).to(torch.uint8)
        units[states == 0] = 0
        ranked, order = units.sort(stable=True)
        within = torch.zeros(n, dtype=torch.bool).scatter_(0, order, ranked.cumsum(0) <= UNITS)
        kinds = torch.where(within, staircase.SPARSE, staircase.WHOLE)
        kinds[states == 0] = staircase.INACTIVE
        assert torch.equal(row_order.sort_out(units.to(device), states.to(device)).cpu(), kinds.to(torch.uint8))
        assert n < 700 or most < 5 * UNITS // n or 0 < within.sum() < n


@pytest.mark.parametrize("depth", [24, 600])
def test_copies_of_rows_and_entries(depth, device, monkeypatch):
    """By fewer programs than there are tiles, some of several sequences; what does not count is 0."""
    monkeypatch.setattr(copies, "PROGRAMS", 1)
    g = torch.Generator().manual_seed(depth)
    source = torch.randn(3, 1000, 2 * depth, generator=g).to(device)[..., ::2]
    rows = torch.randperm(3000, generator=g).to(device)
    count = torch.tensor([850], dtype=torch.int32, device=device)
    want = source.flatten(0, 1)[rows]
    out = torch.full((900, depth), torch.nan, device=device)
    copies.gather_rows(source, rows, None, out, 100, 1000, 100)
    assert torch.equal(out, want[100:1000])
    copies.gather_rows(source, rows, count, out, 200, 900, 150)
    assert torch.equal(out[50:700], want[200:850])
    assert not out[700:750].any()
    assert torch.equal(out[750:], want[850:1000])
    entries, panel = torch.randn(1000, depth, generator=g).to(device), tiles.WIDTH
    ids, cuts = torch.randperm(1000, generator=g).to(device), torch.tensor([0, 3, 8], dtype=torch.int32, device=device)
    for chunk, (first, last) in enumerate(((0, 3), (3, 8))):
        out = torch.full((6 * panel, depth), torch.nan, device=device)
        copies.entries_gatherer(entries, ids, out, cuts, 5 * panel)(chunk=chunk)
        copied = out[(6 - last + first) * panel :]
        wanted = entries[ids[first * panel : last * panel]]
        assert torch.equal(copied[: len(wanted)], wanted)
        assert not copied[len(wanted) :].any()
        assert out[: -len(copied)].isnan().all()


@pytest.mark.quick
@pytest.mark.parametrize("n", [1, 31, 150])
def test_the_order_of_rows(n, device):
    """Ties stay in order, ignored rows come last, and it is a permutation whatever the keys."""
    g = torch.Generator().manual_seed(0)
    keys = -torch.randint(5, (n,), generator=g).float().to(device)  # 0 is -0
    keys[-1] = 0.0
    targets = torch.arange(n, device=device)
    targets[1::4] = IGNORE
    counted = targets != IGNORE
    order, places, count = row_order.order_rows(keys, targets, places=True)
    assert torch.equal(order, torch.where(counted, keys, torch.inf).argsort(stable=True))
    assert torch.equal(places.long(), order.argsort())
    assert count == counted.sum()
    keys[n // 2], keys[0] = torch.nan, torch.inf
    order, _, count = row_order.order_rows(keys, targets)
    assert torch.equal(order.sort().values, torch.arange(n, device=device))
    assert counted[order[: int(count)]].all()
    order, _, count = row_order.order_rows(None, targets)
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


@pytest.mark.parametrize(("ways", "evenly"), [(2, 1), (4, 1), (16, 1), (0, 2), (0, 5)])
def test_a_product_that_is_split(ways, evenly, device):
    """Over chunks that ever fewer rows need: the sum and the slabs behind it together are what one sum was."""
    n, vocab, depth = 512, 26 * tiles.WIDTH, 48
    stops = torch.tensor([512, 500, 250, 250, *[120] * 6, *[64] * 8, *[20] * 7, 0], dtype=torch.int32, device=device)
    cuts = torch.tensor([0, 2, 4, 10, 18, 26], dtype=torch.int32, device=device)
    cut = SimpleNamespace(rows=n, chunks=5, most=8, room=4 * n, copied=0)
    entries = torch.randn(vocab, depth, generator=torch.Generator().manual_seed(0)).to(device)
    panels = Panels(cut, vocab, torch.float32, device, stops, cuts=cuts)
    tile = tiles.for_tensor("dhidden", torch.float32, panels.dlogits.device)
    slabs, out = products.slab_rows(ways, tile) if ways else (evenly - 1) * n, []
    for split in (products.NOT_SPLIT, products.Split(ways, tile.rows, slabs, evenly)):
        total = torch.zeros(n + split.rows, depth, device=device)
        g = torch.Generator().manual_seed(1)
        product = products.Product(panels, entries, total, stops[:1], split=split)
        for chunk in range(5):
            panels.dlogits.copy_(torch.randn(panels.dlogits.shape, generator=g))
            product(0, n, chunk)
        split_up = total[n:].abs().sum(1).count_nonzero()
        made = torch.empty(n, depth, device=device)
        rows, scale = torch.arange(n, device=device), torch.ones(1, device=device)
        products.scatter(total, split, rows, stops[:1], scale, made, 0, n, 0)
        out.append(made)
    assert split_up > ((ways // 2) * 16 if ways else 0.9 * n)  # rows of more than one slab
    assert ((out[1] - out[0]).norm(dim=1) <= 1e-6 * out[0].norm(dim=1)).all()


def small(vocab, device):
    """-> what :func:`drawn` has of N rows and so many entries, the problem of it on the Triton backend."""
    p = {k: v[:N] if k != "weight" else v[:vocab] for k, v in drawn().items()}
    p["targets"] = torch.where(p["targets"] == IGNORE, IGNORE, p["targets"] % vocab)
    problem = replace(problem_of(p), params=replace(problem_of(p).params, backend="triton"))
    return p, replace(problem, **{k: getattr(problem, k).to(device) for k in ("hidden", "weight", "targets")})


def test_the_forwards_order_and_certificate(device):
    """Ignored rows last, the hint's order before; rows whose hint was far too low keep everything."""
    p, problem = small(VOCAB, device)
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


def test_without_a_hint_the_labels_logits_order_the_rows(device):
    """Ignored rows last, as torch has them; from a vocabulary's part too."""
    problem = small(500, device)[1]
    counted = problem.targets != IGNORE
    label = plain.label_logits(problem, torch.arange(N, device=device)).float()
    wanted = torch.where(counted, label, torch.inf).argsort(stable=True)
    parts = plain.partial_forward(problem, label)[1], forward.certified_partial_forward(problem, label, None)[1]
    for found in (plain.forward(problem)[1], forward.certified_forward(problem, None)[1], *parts):
        ordered = found.order[: counted.sum()]
        torch.testing.assert_close(label[ordered], label[wanted[: counted.sum()]], rtol=0, atol=1e-4)
        assert (label[ordered].diff() > -1e-4).all()
        assert len(ordered.unique()) == len(ordered)


@pytest.mark.skipif(not tiles.interpreting(), reason="sets the tile")
@pytest.mark.parametrize("vocab", [500, 257, 31])
@pytest.mark.parametrize("hinted", [True, False])
def test_flags_of_tiles_wider_than_their_groups(monkeypatch, hinted, vocab):
    """256 columns, whose flags stand as 128 would have them: what a row leaves out is all that is not kept."""
    monkeypatch.setattr(tiles, "INTERPRETER", tiles.INTERPRETER._replace(cols=256))
    p, problem = small(vocab, "cpu")
    problem = replace(problem, params=replace(problem.params, tolerance=0.001))
    mass = (p["hidden"].double() @ p["weight"].double().T).softmax(1)
    hint = mass.gather(1, p["targets"].clamp(min=0)[:, None])[:, 0].log().float() if hinted else None
    certificate = forward.certified_forward(problem, hint)[1]
    assert certificate.tile == 128
    order = certificate.order[: (p["targets"] != IGNORE).sum()]
    target, mass = p["targets"][order, None], mass[order]
    kept = certificate.keeps(torch.arange(vocab))[torch.arange(len(order)) // certificate.block]
    assert kept.gather(1, target).all()
    if vocab == 500:
        assert not kept.all()
    left = (mass.scatter(1, target, 0.0) * ~kept).sum(1)
    torch.testing.assert_close(certificate.dropped[: len(order)].double(), left, rtol=1e-3, atol=1e-8)

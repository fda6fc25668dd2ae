"""The staircase: all that the certificate flags is on it, so its guarantees hold; and the host never waits for it."""

import functools
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from stand_in_cuda import CudaTensor, StandInCuda

from bench import profiles
from fastgrpo.backends import certified, grouping, row_audit, staircase
from fastgrpo.backends.problem import Gradients, HeadParams, HeadProblem, RowStats
from fastgrpo.inputs import compact_rows

TRAINED, FROZEN = Gradients(True, True), Gradients(True, False)
HEAD_ALONE, BIAS_ALONE = Gradients(False, True), Gradients(False, False, True)
VOCAB, TOLERANCE, ROW_TOLERANCE = 3000, 0.005, 0.1


def problem_of(p, **fields):
    params = HeadParams(
        temperature=1.0, softcap=None, logit_scale=1.0, compute_dtype=p["hidden"].dtype, entropy=False, backend="torch",
        workspace=2**27, tolerance=TOLERANCE, row_tolerance=ROW_TOLERANCE,
    )  # fmt: skip
    known = {k: fields.pop(k, None) for k in ("bias", "temperature", "low", "up")}
    if known["low"] is not None:
        fields["lora_dtype"] = torch.float32
    return HeadProblem(p["hidden"][None], p["weight"], targets=p["targets"], params=replace(params, **fields), **known)


def certify(problem, hint):
    """Statistics, and the certificate with the ignored rows last, as the kernels leave it."""
    stats, certificate = certified.forward(problem, hint)
    n, counted, block = problem.targets.numel(), certificate.order.numel(), certificate.block
    ignored = (problem.targets == -100).nonzero().squeeze(1)
    return stats, replace(
        certificate,
        order=torch.cat((certificate.order, ignored)),
        flags=F.pad(certificate.flags, (0, 0, 0, -(-n // block) - len(certificate.flags))),
        dropped=F.pad(certificate.dropped, (0, n - counted)),
    )


@functools.cache
def drawn(profile="rl", depth=64, dtype=torch.float32, seed=0):
    """700 rows, no multiple of the block; every ninth ignored, every seventh without a gradient."""
    p = profiles.problem(700, VOCAB, depth, profile, dtype=dtype, seed=seed)
    p["targets"][::9] = -100
    p["upstream"][::7] = 0.0
    return p


@functools.cache
def certified_case(hint=True, profile="rl", seed=0):
    p = drawn(profile, seed=seed)
    problem = problem_of(p)
    return problem, *certify(problem, p["old_logprobs"] if hint else None), p["upstream"]


def kinds_of(problem, stats, certificate, grad, needs):
    """(N,) of the rows in their own order."""
    trained = any(needs.of_head) or bool(needs.bias)
    kind = staircase.sort_out(problem, stats, certificate, grad, needs, trained)
    return torch.empty_like(kind).scatter_(0, certificate.order, kind)


def cells_of(stairs, stops):
    """(N, V) bool: which rows and entries are visited."""
    n, vocab = stairs.rows.numel(), stairs.entries.numel()
    visited = torch.arange(n)[:, None] < stops.repeat_interleave(staircase.TILE)[:vocab]
    back = torch.empty(n, dtype=torch.int64).scatter_(0, stairs.rows, torch.arange(n))
    return visited[back][:, stairs.entries.argsort()]


def flagged_cells(certificate, active):
    """(N, V) bool: what the certificate asks for."""
    order, flags = certificate.order, certificate.flags
    flagged = torch.zeros(order.numel(), flags.shape[1], dtype=torch.bool)
    flagged[order] = flags[torch.arange(order.numel()) // certificate.block]
    return flagged & active[:, None]


def tensors_of(stairs):
    return [x for x in stairs if x is not None]


def check(problem, stats, certificate, grad, needs):
    """That the staircase holds what it must; -> itself."""
    stairs = staircase.make(problem, stats, certificate, grad, needs)
    active = (grad != 0) & (problem.targets != -100)
    kind = kinds_of(problem, stats, certificate, grad, needs)
    assert torch.equal(stairs.rows.sort().values, torch.arange(grad.numel()))
    assert torch.equal(stairs.entries.sort().values, torch.arange(VOCAB))
    assert (kind[stairs.rows].diff() >= 0).all()
    assert stairs.count.tolist() == [int(active.sum())]
    assert torch.equal(kind == staircase.INACTIVE, ~active)
    flagged = flagged_cells(certificate, active)
    whole = {"hidden": kind == staircase.WHOLE, "head": kind <= staircase.HEAD_ONLY}
    for name in ("hidden", "head") if needs.weight or needs.bias else ("hidden",):
        stops = getattr(stairs, f"stops_{name}")
        assert stops.dtype == torch.int32
        assert stops.shape == (-(-VOCAB // staircase.TILE),)
        assert (stops.diff() <= 0).all()
        assert stops[0] <= stairs.count
        visited = cells_of(stairs, stops)
        assert visited[flagged].all(), name
        assert visited[whole[name]].all(), name
    assert (stairs.stops_head >= stairs.stops_hidden).all()
    return stairs


@pytest.mark.quick
@pytest.mark.parametrize("hint", [True, False])
@pytest.mark.parametrize("needs", [TRAINED, FROZEN, HEAD_ALONE, BIAS_ALONE], ids=str)
def test_all_that_is_flagged_is_visited(needs, hint):
    problem, stats, certificate, grad = certified_case(hint)
    if needs.bias:
        problem = replace(problem, bias=torch.zeros(VOCAB))
    stairs = check(problem, stats, certificate, grad, needs)
    of_hidden, of_head = staircase.cells(stairs, VOCAB)[1:].tolist()
    visited = cells_of(stairs, stairs.stops_hidden)
    assert of_hidden == pytest.approx(float(visited.double().mean()))
    assert of_hidden < 0.75
    assert of_head < 0.8
    if needs == FROZEN:
        assert torch.equal(stairs.stops_head, stairs.stops_hidden)
        assert of_hidden < (0.4 if hint else 0.6)


def test_flat_rows_and_no_tolerance():
    """Rows that must be whole make the first step; a tolerance of the rows that is not asked for, no rows of dW."""
    problem, stats, certificate, grad = certified_case(True, "flat")
    for needs in (TRAINED, FROZEN):
        check(problem, stats, certificate, grad, needs)
    problem, stats, certificate, grad = certified_case()
    none = replace(problem, params=replace(problem.params, tolerance=1e-9))
    stairs = check(none, stats, certificate, grad, TRAINED)
    assert (kinds_of(none, stats, certificate, grad, TRAINED) == staircase.WHOLE).sum() > 300
    assert stairs.stops_hidden[-1] > 300
    loose = replace(problem, params=replace(problem.params, row_tolerance=1.0))
    stairs = check(loose, stats, certificate, grad, TRAINED)
    assert torch.equal(stairs.stops_head, stairs.stops_hidden)
    assert (kinds_of(loose, stats, certificate, grad, TRAINED) != staircase.HEAD_ONLY).all()


def test_exact_is_one_step():
    active = torch.arange(9) % 2 == 0
    stairs = staircase.exact(active, *compact_rows(active), vocab=300)
    assert stairs.rows.tolist() == [0, 2, 4, 6, 8, 1, 3, 5, 7]
    assert stairs.entries is None
    assert stairs.stops_hidden.tolist() == stairs.stops_head.tolist() == [5, 5, 5]
    torch.testing.assert_close(staircase.cells(stairs, 300), torch.full((3,), 5 / 9, dtype=torch.float64))


def errors_of(problem, stairs, grad):
    """Of dlogits the relative error as a whole, where dX and where dW is made of them; (V,) that of each row of dW."""
    hidden, weight = problem.hidden[0].double(), problem.weight.double()
    g = torch.where(problem.targets == -100, 0.0, grad).double()[:, None]
    dz = g * (F.one_hot(problem.targets.clamp(min=0), VOCAB) - (hidden @ weight.T).softmax(1))
    left_out = [dz * ~cells_of(stairs, stops) for stops in (stairs.stops_hidden, stairs.stops_head)]
    rows = (left_out[1].T @ hidden).norm(dim=1) / (dz.T @ hidden).norm(dim=1)
    return *(float(x.norm() / dz.norm()) for x in left_out), rows


@pytest.mark.quick
@pytest.mark.parametrize("hint", [True, False])
def test_errors_of_what_is_left_out(hint):
    """On dlogits themselves within the tolerance; rows of dW within theirs, but for what a sample of a twelfth of the
    vocabulary errs by: the audited ones on each problem, all of them over several."""
    quantiles, all_rows = torch.tensor([0.5, 0.95], dtype=torch.float64), []
    limits = torch.tensor([ROW_TOLERANCE / 5, ROW_TOLERANCE])
    for seed in range(3):
        problem, stats, certificate, grad = certified_case(hint, seed=seed)
        stairs = staircase.make(problem, stats, certificate, grad, TRAINED)
        of_hidden, of_head, rows = errors_of(problem, stairs, grad)
        assert 0 < of_head <= of_hidden <= TOLERANCE
        _, audited = row_audit.sample_entries(VOCAB)
        assert (rows[audited].quantile(quantiles) <= limits).all()
        assert rows.max() > 0
        all_rows.append(rows)
    assert (torch.cat(all_rows).quantile(quantiles) <= limits).all()


def plan_per_block(certificate, active, sparse):
    """What the audit on the host takes: each block a group of its own."""
    order, groups, block = certificate.order, [], certificate.block
    for b, flags in enumerate(certificate.flags):
        at = sparse[b * block : (b + 1) * block].nonzero().squeeze(1) + b * block
        if at.numel():
            none = torch.zeros_like(at, dtype=torch.bool)
            groups.append(grouping.RowGroup(order[at], flags.nonzero().squeeze(1), certificate.dropped[at], none))
    return grouping.Plan(groups, order[active & ~sparse].sort().values)


OPTIONS = {
    "plain": {},
    "softcap, temperature, scale": {"softcap": 60.0, "temperature": True, "logit_scale": 0.9},
    "bias": {"bias": True},
    "bias alone": {"bias": True, "needs": BIAS_ALONE},
    "lora": {"lora": True, "needs": Gradients(True, True, low=True, up=True)},
    "lora alone": {"lora": True, "needs": Gradients(True, False, low=True, up=True)},
    "pieces": {"workspace": 2**18},
}


def case_with(lora=False, bias=False, temperature=False, needs=None, **options):
    p, g = drawn(), torch.Generator().manual_seed(1)
    if bias:
        options["bias"] = 0.3 * torch.randn(VOCAB, generator=g)
        needs = needs or Gradients(True, True, True)
    if temperature:
        options |= {"temperature": 0.8 + 0.4 * torch.rand(700, generator=g)}
    if lora:
        options["low"] = torch.randn(1, 700, 4, generator=g)
        options["up"] = 0.05 * torch.randn(VOCAB, 4, generator=g)
    problem = problem_of(p, **options)
    return problem, *certify(problem, None), p["upstream"], needs or TRAINED


@pytest.mark.parametrize("name", OPTIONS)
def test_the_audit_agrees_with_the_one_on_the_host(name):
    problem, stats, certificate, grad, needs = case_with(**OPTIONS[name])
    kind = staircase.sort_out(problem, stats, certificate, grad, needs, trained=True)
    active, sparse = kind != staircase.INACTIVE, (kind == staircase.SPARSE) | (kind == staircase.HEAD_ONLY)
    plan = plan_per_block(certificate, active, sparse)
    want = row_audit.RowAudit(problem, stats, plan, grad, needs).tail(ROW_TOLERANCE)
    got = (kind == staircase.HEAD_ONLY)[sparse]
    assert 0.1 < want.float().mean() < 0.9
    assert (got != want).float().mean() < 0.01
    check(problem, stats, certificate, grad, needs)


def test_a_sketch_of_long_rows(monkeypatch):
    """Of 384 columns 256 numbers are left, or all: about the same rows are whole."""
    p = drawn(depth=384)
    problem = problem_of(p)
    stats, certificate = certify(problem, p["old_logprobs"])
    counts = []
    for sketch in (row_audit.SKETCH, 1000):
        monkeypatch.setattr(row_audit, "SKETCH", sketch)
        kind = kinds_of(problem, stats, certificate, p["upstream"], TRAINED)
        counts.append(int((kind == staircase.HEAD_ONLY).sum()))
    assert 0 < abs(counts[0] - counts[1]) + counts[1] < 600
    assert abs(counts[0] - counts[1]) <= 2 * 700 / row_audit.STEPS


def pack(flags, tile):
    """(blocks, V) bool -> the packed form; what stands beyond V is set, and must not be read."""
    blocks, words = flags.shape[0], tile // 32
    bits = F.pad(flags, (0, -flags.shape[1] % tile), value=True).view(blocks, -1, 32, words).long()
    packed = (bits << torch.arange(32)[:, None]).sum(2).to(torch.int32)
    return packed.view(blocks, -1)


@pytest.mark.quick
@pytest.mark.parametrize("tile", [32, 64, 256])
def test_packed_flags(tile):
    problem, stats, certificate, grad = certified_case()
    packed = replace(certificate, flags=pack(certificate.flags, tile), tile=tile)
    words = tile // 32
    for v in (0, tile - 1, tile + words, VOCAB - 1):  # bit by bit, as the kernels write it
        word = packed.flags[:, v // tile * words + v % tile % words].long()
        assert torch.equal((word >> v % tile // words) & 1, certificate.flags[:, v].long())
    entries = torch.cat((torch.randperm(VOCAB), torch.tensor([VOCAB - 1, 0])))
    assert torch.equal(packed.keeps(entries), certificate.flags[:, entries])
    assert torch.equal(certificate.keeps(entries), certificate.flags[:, entries])
    alive = torch.rand(3, len(certificate.flags)) < 0.5
    last = certificate.last_keeping(alive)
    assert torch.equal(packed.last_keeping(alive)[:, :VOCAB], last)
    numbered = certificate.flags * torch.arange(1, len(certificate.flags) + 1)[:, None]
    assert torch.equal(last.long(), (numbered * alive[:, :, None]).amax(1))
    for needs in (TRAINED, FROZEN):
        for x, y in zip(*(tensors_of(staircase.make(problem, stats, c, grad, needs)) for c in (certificate, packed))):
            assert torch.equal(x, y)


@pytest.fixture
def tables():
    """What is kept of a device that does not last."""
    caches = (row_audit.samples_on, row_audit.signs_on)
    yield
    for cache in caches:
        cache.cache_clear()


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("needs", [Gradients(True, True, True), FROZEN], ids=str)
def test_the_host_never_waits(needs, dtype, packed, tables):
    p = drawn(depth=320, dtype=dtype)
    options = {"bias": torch.zeros(VOCAB), "softcap": 30.0, "workspace": 2**22 if packed else 2**27}
    problem = problem_of(p, **options)
    stats, certificate = certify(problem, p["old_logprobs"])
    want = staircase.make(problem, stats, certificate, p["upstream"], needs)
    if packed:
        certificate = replace(certificate, flags=pack(certificate.flags, 64), tile=64)
    with StandInCuda() as cuda:

        def put(x):
            return cuda.put(x) if isinstance(x, torch.Tensor) else x

        here = [replace(x, **{k: put(v) for k, v in vars(x).items()}) for x in (problem, certificate)]
        stats, grad = cuda.put(stats), cuda.put(p["upstream"])
        for _ in range(2):  # the first uploads tables
            cuda.waits.clear()
            got = staircase.make(here[0], stats, here[1], grad, needs)
        assert cuda.waits == []
        shares = staircase.cells(got, VOCAB)
        assert cuda.waits == []
        assert all(isinstance(x, CudaTensor) for x in (*tensors_of(got), shares))
        torch.testing.assert_close(shares.cpu(), staircase.cells(want, VOCAB), atol=0.03, rtol=0)
        if dtype == torch.float32:
            assert torch.equal(got.count.cpu(), want.count)


@pytest.mark.quick
def test_rows_that_are_not_finite_are_whole_and_leave_the_others_alone():
    problem, stats, certificate, grad = certified_case()
    before = kinds_of(problem, stats, certificate, grad, TRAINED)
    grad, stats, dropped, hidden = grad.clone(), stats.clone(), certificate.dropped.clone(), problem.hidden.clone()
    position = torch.empty_like(certificate.order)
    position[certificate.order] = torch.arange(position.numel())
    bad = (before == staircase.SPARSE).nonzero().squeeze(1)[[0, 50, 99, 120]]
    grad[bad[0]] = torch.nan
    dropped[position[bad[1]]] = torch.inf
    hidden[0, bad[2]] = torch.nan
    stats[:, bad[2]], dropped[position[bad[2]]] = torch.nan, torch.nan
    stats[RowStats._fields.index("other_mass"), bad[3]] = dropped[position[bad[3]]] = torch.nan
    hidden[0, problem.targets == -100] = torch.nan
    problem, certificate = replace(problem, hidden=hidden), replace(certificate, dropped=dropped)
    kind = kinds_of(problem, stats, certificate, grad, TRAINED)
    assert (kind[bad] == staircase.WHOLE).all()
    others = torch.ones_like(kind, dtype=torch.bool)
    others[bad] = False
    assert (kind[others] != before[others]).float().mean() < 0.05
    for needs in (TRAINED, FROZEN):
        check(problem, stats, certificate, grad, needs)


def test_the_same_every_time():
    case = certified_case()
    for x, y in zip(*(tensors_of(staircase.make(*case, TRAINED)) for _ in range(2))):
        assert torch.equal(x, y)


@pytest.mark.quick
def test_nothing_to_do():
    """No row with a gradient, and fewer rows than a block or than the audit's steps."""
    problem, stats, certificate, grad = certified_case()
    stairs = check(problem, stats, certificate, torch.zeros_like(grad), TRAINED)
    assert stairs.stops_head.count_nonzero() == 0
    p = {k: v[:5] if k != "weight" else v for k, v in drawn().items()}
    few = problem_of(p)
    check(few, *certify(few, None), torch.ones(5), TRAINED)

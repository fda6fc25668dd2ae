"""The certified backward of linear_divergence: what a certificate says of a row holds, and so do gradients' bounds."""

import functools
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from ranks import Ranks
from stand_in_cuda import StandInCuda
from test_divergence import BETAS, in_double, near_pair, rl_student, run

from fastgrpo import backends, linear_divergence, reference, strategies
from fastgrpo import vocab_parallel_divergence as sharded
from fastgrpo.backends import row_audit, staircase
from fastgrpo.backends.certified import BLOCK, Certificate
from fastgrpo.backends.pair import PairParams, PairProblem, PairStats
from fastgrpo.backends.problem import Gradients
from fastgrpo.divergence import tolerance_of
from fastgrpo.inputs import IGNORE

import problems
from watchers import NoSync, forbid_lists

TOLERANCE = 0.005
SIZES = {"torch": (300, 2000, 48), "triton": (60, 640, 32)}  # the interpreter takes 20 ms a tile
HEADS = {"plain": {}, "all": {"temperature": True, "logit_scale": 0.9, "bias": True, "softcap": 60.0}}


def problem_of(tensors, beta, temperature=False, bias=False, **params):
    """A :class:`PairProblem`, every seventh row of it ignored."""
    n = len(tensors["hidden"])
    targets = torch.where(torch.arange(n, device=tensors["hidden"].device) % 7 == 3, IGNORE, 0)
    params = PairParams(**{
        "temperature": None if temperature else 1.0, "softcap": None, "logit_scale": 1.0, "entropy": True,
        "compute_dtype": tensors["hidden"].dtype, "backend": "torch", "workspace": 2**27, "tolerance": TOLERANCE,
        "row_tolerance": 0.1, "beta": beta, **params,
    })  # fmt: skip
    params = replace(params, teacher_softcap=params.softcap, teacher_logit_scale=params.logit_scale,
                     teacher_compute_dtype=params.compute_dtype)  # fmt: skip
    temperatures = torch.linspace(0.7, 1.3, n, device=targets.device) if temperature else None
    return PairProblem(
        tensors["hidden"][None], tensors["weight"], tensors["bias"] if bias else None, targets, temperatures, params,
        teacher_hidden=tensors["teacher_hidden"][None], teacher_weight=tensors["teacher_weight"],
        teacher_bias=tensors["teacher_bias"] if bias else None,
    )  # fmt: skip


def slopes(problem):
    """(N, V) fp64: d divergence / d logits, transformed ones, of full logits; 0 in ignored rows."""

    def logits(p):
        z = p.hidden[0].double() @ p.weight.double().T
        z = (z if p.bias is None else z + p.bias.double()) * p.params.logit_scale
        z = z if p.params.softcap is None else p.params.softcap * torch.tanh(z / p.params.softcap)
        return z if p.temperature is None else z / p.temperature.double()[:, None]

    z, one = logits(problem).requires_grad_(), torch.eye(problem.weight.shape[0], dtype=torch.float64)
    value = reference.linear_divergence(z, one, logits(problem.teacher), one, beta=problem.beta).divergence
    (slope,) = torch.autograd.grad((value * (problem.targets != IGNORE)).sum(), z)
    return slope


@functools.cache
def drawn(size, device):
    return near_pair(*size, device)


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("options", HEADS.values(), ids=HEADS)
def test_certificate(backend, device, beta, options):
    """Of each row the norm of what its block does not flag, and of everything, on the safe side and not far off."""
    problem = problem_of(drawn(SIZES[backend], device), beta, **options)
    module = backends.load(backend)
    stats, certificate = module.certified_divergence_forward(problem)
    plain = module.divergence_forward(problem)
    torch.testing.assert_close(PairStats(*stats)._replace(norm=None), PairStats(*plain)._replace(norm=None))
    slope = slopes(problem)
    kept = check_certificate(problem, certificate, slope)
    assert 0 < kept < 0.7
    norm, whole = PairStats(*stats).norm.double(), slope.norm(dim=1)
    assert (norm <= whole * (1 + 1e-4)).all()  # the logits' own rounding
    assert (norm >= 0.99 * whole).all()


def check_certificate(problem, certificate, slope):
    """That it is of the rows that count and says of each what it leaves out of its slope; -> the share that is kept."""
    device, vocab = problem.targets.device, problem.weight.shape[0]
    counted, order = problem.targets != IGNORE, certificate.order
    n = int(counted.sum())
    assert counted[order[:n]].all()
    if problem.params.backend == "triton":
        assert torch.equal(order.sort().values, torch.arange(len(counted), device=device))
        assert (certificate.dropped[n:] == 0).all()
    kept = torch.stack([certificate.unpack(flags)[:vocab] for flags in certificate.flags])
    kept = kept[torch.arange(n, device=device) // certificate.block]
    slope = slope[order[:n]]
    left, whole = (slope * ~kept).norm(dim=1), slope.norm(dim=1)
    dropped = certificate.dropped[:n].double()
    assert (left <= dropped + 1e-12 * whole).all()
    assert (dropped <= 1.01 * left + 1e-3 * whole).all()
    return kept.double().mean()


HINTS = {
    "right": lambda logp: logp * 1.05,
    "too low": lambda logp: logp - 60,
    "too high": torch.zeros_like,
    "not there": lambda logp: torch.full_like(logp, torch.nan),
    "some": lambda logp: torch.where(torch.arange(len(logp)) % 3 > 0, logp, torch.nan),
    "anything": lambda logp: 1e4 * torch.randn_like(logp),
}


@pytest.mark.parametrize("beta", BETAS)
def test_hints(backend, device, beta):
    """They tell what to keep; statistics and the certificate hold whatever they say."""
    n, vocab, depth = SIZES[backend]
    problem = problem_of(drawn((n, vocab, depth), device), beta, bias=True)
    labels = rl_student(n, vocab, depth)["targets"].to(device).clone()
    logp = (problem.hidden[0] @ problem.weight.T + problem.bias).log_softmax(1).gather(1, labels[:, None])[:, 0]
    labels[::9], labels[4::9] = -100, vocab
    module, slope = backends.load(backend), slopes(problem)
    plain = module.divergence_forward(problem)
    kept = {}
    for name in HINTS if not problem.is_mixture else ("right",):
        stats, certificate = module.certified_divergence_forward(problem, HINTS[name](logp), labels)
        got, want = (PairStats(*x)._replace(norm=None) for x in (stats, plain))
        torch.testing.assert_close(got, want, rtol=2e-5, atol=1e-5)
        kept[name] = check_certificate(problem, certificate, slope)
    if not problem.is_mixture:
        assert kept["right"] < 0.85 * kept["not there"]


def cut_entries(problem, cut):
    """Those of a shard."""
    names = ("weight", "bias", "teacher_weight", "teacher_bias")
    found = {name: getattr(problem, name) for name in names}
    return replace(problem, **{name: None if x is None else x[cut] for name, x in found.items()})


def of_tensors(problem, kept):
    if problem.params.backend == "torch":
        return Certificate(*kept, BLOCK)
    from fastgrpo.kernels import flags

    return flags.certificate(problem, backends.load("triton").flagging_kernel(problem), *kept)


@pytest.mark.parametrize("beta", BETAS)
def test_certificate_of_shards(backend, device, beta, monkeypatch):
    """Of each rank's entries, in terms of the whole vocabulary's gradient; the norms are the whole rows'."""
    problem = problem_of(drawn(SIZES[backend], device), beta, bias=True, backend=backend, shard=True)
    module, vocab = backends.load(backend), problem.weight.shape[0]
    cuts = (slice(0, vocab // 3), slice(vocab // 3, vocab))
    shards = [cut_entries(problem, cut) for cut in cuts]
    ranks = Ranks(monkeypatch, len(shards))
    group, strategy = sharded.Ranks(None), strategies.DivergingCertified
    found = ranks.run([functools.partial(sharded.forward, shard, module, group, strategy) for shard in shards])
    plain, slope, counted = module.divergence_forward(problem), slopes(problem), problem.targets != IGNORE
    for (stats, kept), shard, cut in zip(found, shards, cuts):
        stats = torch.where(counted, stats, 0.0)
        torch.testing.assert_close(PairStats(*stats)._replace(norm=None), PairStats(*plain)._replace(norm=None))
        assert check_certificate(shard, of_tensors(shard, kept), slope[:, cut]) < 0.9
        norm, whole = PairStats(*stats).norm.double(), slope.norm(dim=1)
        assert (norm <= whole * (1 + 1e-4)).all()
        assert (norm >= 0.99 * whole).all()


LEAVES = {"plain": {}, "all": {"lora": True, "bias": True, "temperature": "tensor"}}


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("options", LEAVES.values(), ids=LEAVES)
def test_gradients(device, beta, options, visited):
    """Of a trained head, within the tolerance of exact ones in fp64, with cells left out; rows of dW within theirs."""
    tensors = drawn(SIZES["triton"], device)
    upstream = torch.randn(len(tensors["hidden"]), device=device)
    value, _, grads = run(
        linear_divergence, tensors, upstream, beta=beta, backend="triton", backward="certified", **options
    )
    truth = run(reference.linear_divergence, in_double(tensors), upstream.double(), beta=beta, **options)
    torch.testing.assert_close(value.double(), truth[0], rtol=5e-5, atol=1e-6)
    (cells,) = visited
    assert 0 < cells[1] <= cells[2] < 0.9
    assert cells[1] < 0.7
    assert grads.keys() == truth[2].keys()
    for name, want in truth[2].items():
        assert 0 < problems.relative_error(grads[name], want) < TOLERANCE, name
    want = truth[2]["weight"]
    errors = (grads["weight"].double() - want).norm(dim=1) / want.norm(dim=1)
    assert errors.quantile(0.95) < 0.1
    assert errors.median() < 0.02


@pytest.fixture
def visited(monkeypatch):
    """-> the shares of the cells that each certified backward visits, see :func:`staircase.cells`."""
    from fastgrpo.kernels import certified

    seen, plain = [], certified.make_plan

    def make(problem, *arguments):
        plan = plain(problem, *arguments)
        seen.append(staircase.cells(plan, problem.weight.shape[0]).tolist())
        return plan

    monkeypatch.setattr(certified, "make_plan", make)
    return seen


@pytest.mark.quick
@pytest.mark.parametrize("beta", [0.0, 0.3])
def test_frozen_head_in_chunks(device, beta, visited):
    """A small workspace: the backward goes over the vocabulary in chunks; 16-bit values, a teacher of another width."""
    tensors = {k: problems.cast(v, torch.bfloat16) for k, v in drawn(SIZES["triton"], device).items()}
    tensors |= {k: tensors[k][:, :16].contiguous() for k in ("teacher_hidden", "teacher_weight")}
    upstream = torch.randn(len(tensors["hidden"]), device=device)

    def frozen(hidden, weight, *others, **options):
        return linear_divergence(hidden, weight.detach(), *others, **options)

    chosen = {"beta": beta, "softcap": 60.0}
    ours = {"backend": "triton", "backward": "certified", "workspace_mb": 0.06}
    _, _, grads = run(frozen, tensors, upstream, **chosen, **ours)
    truth = run(reference.linear_divergence, in_double(tensors), upstream.double(), **chosen)[2]
    assert grads.keys() == {"hidden"}
    assert problems.relative_error(grads["hidden"], truth["hidden"]) < TOLERANCE
    assert visited.pop()[1] < 0.9


def backward_of(problem, module, needs):
    stats, certificate = module.certified_divergence_forward(problem)
    grad = torch.linspace(-1, 1, problem.targets.numel(), device=stats.device)
    grad[::5] = 0.0
    return module.certified_backward(problem, stats, certificate.tensors, grad, needs)


@pytest.mark.quick
def test_the_host_never_waits_and_results_repeat(device, monkeypatch):
    forbid_lists(monkeypatch)
    module, needs = backends.load("triton"), Gradients(True, True, True)
    tensors = drawn((40, 200, 16), device)
    for beta, workspace in ((0.3, 2**27), (1.0, 2**11)):  # which holds 32 rows: the forward goes over them in chunks
        problem = problem_of(tensors, beta, bias=True, workspace=workspace)
        once = backward_of(problem, module, needs)  # uploads the audit's tables
        with NoSync():
            again = backward_of(problem, module, needs)
        for x, y in zip(once[:3], again[:3]):
            assert ((x == y) & x.isfinite()).all()


@pytest.mark.quick
def test_rows_that_are_not_finite(device):
    """Stay their own: the others keep their gradients, and leave entries out."""
    module, needs = backends.load("triton"), Gradients(True, False)
    tensors = drawn((40, 300, 16), device)
    for beta in (1.0, 0.3):
        problem = problem_of(tensors, beta)
        want = backward_of(problem, module, needs).hidden[0]
        hidden = problem.hidden.clone()
        hidden[0, 8] = torch.nan
        hidden[0, problem.targets == IGNORE] = torch.nan
        got = backward_of(replace(problem, hidden=hidden), module, needs).hidden[0]
        assert got[8].isnan().all()
        others = torch.arange(40, device=device) != 8
        assert problems.relative_error(got[others], want[others]) < TOLERANCE


@pytest.mark.quick
def test_nothing_to_do(device):
    module = backends.load("triton")
    tensors = drawn((5, 70, 8), device)
    for beta in BETAS:
        problem = problem_of(tensors, beta)
        ignored = replace(problem, targets=torch.full_like(problem.targets, IGNORE))
        grads = backward_of(ignored, module, Gradients(True, True))
        assert all((x == 0).all() for x in grads[:2])
        none = {k: v if v is None or "weight" in k else v[:0] for k, v in tensors.items()}
        grads = backward_of(problem_of(none, beta), module, Gradients(True, True))
        assert grads.hidden.shape == (1, 0, 8)
        assert (grads.weight == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_plan_on_a_device(dtype):
    """What is torch's own of it, on CUDA's branches: the same plan, without a wait."""
    problem = problem_of({k: problems.cast(v, dtype) for k, v in drawn(SIZES["torch"], "cpu").items()}, 1.0, bias=True)
    stats, certificate = backends.load("torch").certified_divergence_forward(problem)
    n, counted = problem.targets.numel(), certificate.order.numel()
    ignored = (problem.targets == IGNORE).nonzero().squeeze(1)
    certificate = replace(
        certificate,
        order=torch.cat((certificate.order, ignored)),
        flags=F.pad(certificate.flags, (0, 0, 0, -(-n // certificate.block) - len(certificate.flags))),
        dropped=F.pad(certificate.dropped, (0, n - counted)),
    )
    upstream, needs, vocab = torch.randn(n), Gradients(True, True, True), problem.weight.shape[0]
    want = staircase.cells(staircase.make(problem, stats, certificate, upstream, needs), vocab)
    with StandInCuda() as cuda:

        def put(x):
            return cuda.put(x) if isinstance(x, torch.Tensor) else x

        problem, certificate = (
            replace(x, **{f: put(getattr(x, f)) for f in x.__dataclass_fields__}) for x in (problem, certificate)
        )
        stats, upstream = cuda.put(stats), cuda.put(upstream)
        for _ in range(2):  # the first uploads tables
            cuda.waits.clear()
            got = staircase.make(problem, stats, certificate, upstream, needs)
        assert cuda.waits == []
        torch.testing.assert_close(staircase.cells(got, vocab).cpu(), want, atol=0.03, rtol=0)
    for cache in (row_audit.samples_on, row_audit.signs_on):
        cache.cache_clear()


@pytest.mark.quick
@pytest.mark.parametrize(
    ("trained", "hinted", "fast", "certified"),
    [(False, False, False, True), (False, True, True, False), (True, True, True, True), (True, False, False, False)],
)
def test_what_auto_certifies(trained, hinted, fast, certified):
    """What is asked for always, on either backend; of too few tokens, where there is no tolerance, nothing."""
    for backend in ("torch", "triton"):
        params = replace(problem_of(drawn(SIZES[backend], "cpu"), 1.0).params, tolerance=0.03, backend=backend)
        chosen = tolerance_of(params, 1.0, "auto", trained, hinted, fast)
        assert chosen == (0.03 if certified else None)
        assert tolerance_of(params, 1.0, "certified", trained, hinted, fast) == 0.03
        assert tolerance_of(replace(params, tolerance=None), 1.0, "auto", trained, hinted, fast) is None
    assert tolerance_of(params, 0.5, "auto", trained, hinted, fast) is None  # params: Triton's
    if trained:
        assert tolerance_of(params, 1.0, "auto", trained, hinted, fast, in_forward=True) is None


@pytest.mark.parametrize("beta", BETAS)
def test_tiles_of_several_pieces_and_groups_of_flags(device, monkeypatch, beta):
    """As Hopper's: wide tiles in eight pieces, whose flags are of two groups."""
    tiles = pytest.importorskip("fastgrpo.kernels.tiles")
    monkeypatch.setattr(tiles, "INTERPRETER", tiles.INTERPRETER._replace(cols=128))
    monkeypatch.setattr(tiles, "pair_cuts", lambda tile: 3)
    problem = problem_of(drawn(SIZES["triton"], device), beta, backend="triton")
    module = backends.load("triton")
    stats, certificate = module.certified_divergence_forward(problem)
    torch.testing.assert_close(
        PairStats(*stats)._replace(norm=None), PairStats(*module.divergence_forward(problem))._replace(norm=None)
    )
    assert 0 < check_certificate(problem, certificate, slopes(problem)) < 1


def test_a_teacher_with_the_students_head_is_copied_once(device):
    is_same = pytest.importorskip("fastgrpo.kernels.arguments").is_same
    head = torch.randn(8, 4, device=device)
    assert is_same(head, head.detach())
    assert not is_same(head, head.clone())
    assert not is_same(head, head[:, :2])

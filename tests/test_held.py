"""A mixture on the Triton backend with both models' logits held between its passes: panels of rows, as without them."""

import contextlib

import pytest
import test_divergence as given
import torch
from test_memory_bound import MIB, SLACK

from fastgrpo import linear_divergence, reference, strategies
from fastgrpo.backends import pair
from fastgrpo.backends.pair import HELD_ROWS, PairParams
from fastgrpo.divergence import TeacherHead, choose_strategy

import problems
from watchers import Live, NoSync, Watched, forbid_lists

report = pytest.importorskip("fastgrpo.kernels.report")
held = pytest.importorskip("fastgrpo.kernels.held")
tiles = pytest.importorskip("fastgrpo.kernels.tiles")

N, VOCAB, DEPTH, TEACHER_DEPTH = 270, 400, 40, 24
THREE_PANELS = 0.8  # MiB of which 128 rows are held
ALL = 64.0


@contextlib.contextmanager
def launched():
    """-> the names of all kernels that are launched inside it, in their order."""
    names = []
    with report.replaced(lambda kernel: Watched(kernel, lambda name, arguments: names.append(name))):
        yield names


def run(tensors, upstream, names=given.GRADS, **options):
    """-> divergence, entropy, gradients by name of those that are trained."""
    leaf = problems.with_grad(tensors, names)
    out = given.call(linear_divergence, leaf, backend="triton", **options)
    (out.divergence * upstream).sum().backward()
    grads = {k: leaf[k].grad for k in names if leaf[k] is not None and leaf[k].grad is not None}
    return out.divergence.detach(), out.entropy, grads


def params(**settings):
    defaults = {"temperature": 1.0, "softcap": None, "logit_scale": 1.0, "compute_dtype": torch.bfloat16}
    defaults |= {"entropy": False, "backend": "triton", "workspace": 2**30, "beta": 0.5}
    return PairParams(**defaults | settings)


@pytest.mark.quick
def test_how_many_rows():
    """As many as fit, whole panels of them; none where fewer fit, or nothing is to be held."""
    assert params().held_rows(151936) == HELD_ROWS[1]
    assert params(workspace=2**28).held_rows(151936) == 128
    assert params(workspace=2**27).held_rows(151936) == 0
    assert params(workspace=2**27).held_rows(32768) == 256
    for vocab in (151936, 50257, 300):
        for workspace in (2**20, 2**26, 2**28, 2**32):
            rows = params(workspace=workspace).held_rows(vocab)
            assert rows % 128 == 0
            assert 8 * rows * vocab <= 0.7 * workspace
    for nothing in ({"beta": 0.0}, {"beta": 1.0}, {"backend": "torch"}, {"shard": True}):
        assert params(**nothing).held_rows(151936) == 0


@pytest.mark.parametrize(("head", "frozen"), [*((head, False) for head in given.HEADS), ("plain", True), ("all", True)])
def test_against_fp64_and_what_is_made_again(head, frozen, device, monkeypatch):
    """Panels of rows, the last one not full; masked rows; each row its own weight, some none."""
    options = given.HEADS[head]
    tensors = given.pair(N, VOCAB, DEPTH, TEACHER_DEPTH, device)
    upstream = torch.randn(N, device=device)
    upstream[::7] = 0
    names = ("hidden",) if frozen else given.GRADS
    settings = {"beta": 0.3, "workspace_mb": THREE_PANELS, **options}
    with launched() as kernels:
        kept = run(tensors, upstream, names, **settings)
    assert kernels.count("held_sums_kernel") == 3
    assert kernels.count("levels_kernel") == 3
    assert ("held_dlogits_kernel" in kernels) == frozen
    assert "forward_pair_kernel" not in kernels
    assert ("dlogits_pair_kernel" in kernels) != frozen
    monkeypatch.setattr(pair, "HELD_ROWS", (10**9, 10**9))
    with launched() as kernels:
        anew = run(tensors, upstream, names, **settings)
    assert {"forward_pair_kernel", "dlogits_pair_kernel"} <= set(kernels)
    leaf = problems.with_grad(given.in_double(tensors), names)
    truth = given.call(reference.linear_divergence, leaf, beta=0.3, **options)
    (truth.divergence * upstream.double()).sum().backward()
    for value, entropy, grads in (kept, anew):
        assert ((value - truth.divergence).abs() <= 2e-6 * (0.3 + truth.divergence)).all()
        assert (value[~tensors["mask"]] == 0).all()
        if truth.entropy is not None:
            torch.testing.assert_close(entropy.double(), truth.entropy, rtol=2e-6, atol=1e-6)
        for name, mine in grads.items():
            assert problems.relative_error(mine, leaf[name].grad) < 5e-6, name
    torch.testing.assert_close(kept[0], anew[0], rtol=1e-6, atol=1e-7)


@pytest.mark.quick
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bit(dtype, device):
    """A frozen head's gradient to the dlogits' rounding, the divergence to fp32's."""
    tensors = given.pair(150, 260, 32, 48, device, dtype)
    upstream = torch.randn(150, device=device)
    value, _, grads = run(tensors, upstream, ("hidden",), beta=0.5, workspace_mb=ALL)
    leaf = problems.with_grad(given.in_double(tensors), ("hidden",))
    truth = given.call(reference.linear_divergence, leaf, beta=0.5)
    (truth.divergence * upstream.double()).sum().backward()
    assert ((value - truth.divergence).abs() <= 2e-6 * (0.3 + truth.divergence)).all()
    assert problems.relative_error(grads["hidden"], leaf["hidden"].grad) < 2 * torch.finfo(dtype).eps


@pytest.mark.quick
@pytest.mark.parametrize(("beta", "apart"), [(1e-4, 1.0), (0.9999, 1.0), (0.5, 1e-3)])
def test_fp16_where_dlogits_are_small(beta, apart, device):
    """Of some rows a thousand times smaller than of others: each row has its own scale."""
    part = apart * torch.where(torch.arange(150, device=device) % 2 == 0, 1.0, 1e-3)[:, None]
    tensors = given.draw_near(given.pair(150, 260, 32, 32, device, torch.float16), part)
    upstream = torch.full((150,), 2.0**14, device=device)
    _, _, grads = run(tensors, upstream, ("hidden",), beta=beta, workspace_mb=ALL)
    leaf = problems.with_grad(given.in_double(tensors), ("hidden",))
    (given.call(reference.linear_divergence, leaf, beta=beta).divergence * upstream.double()).sum().backward()
    assert problems.relative_error(grads["hidden"], leaf["hidden"].grad) < 1e-3


@pytest.mark.quick
@pytest.mark.parametrize(("n", "counted"), [(0, 0), (1, 1), (5, 0), (200, 1)])
def test_few_rows(n, counted, device):
    """None, none that count, one."""
    tensors = given.pair(n, 300, 24, 24, device)
    tensors["mask"] = torch.arange(n, device=device) >= n - counted
    value, _, grads = run(tensors, torch.ones(n, device=device), ("hidden",), beta=0.5)
    assert value.shape == (n,)
    assert (value != 0).sum() == counted
    assert (grads["hidden"] != 0).any(1).sum() == counted
    assert grads["hidden"].isfinite().all()


def test_a_tile_taller_than_a_panel(device, monkeypatch):
    """As one that was measured may be: the rows that are held stay the panel's."""
    tensors = given.pair(N, VOCAB, DEPTH, TEACHER_DEPTH, device)
    want = run(tensors, torch.ones(N, device=device), ("hidden",), beta=0.3, workspace_mb=THREE_PANELS)
    own = tiles.for_tensor
    tall = tiles.INTERPRETER._replace(rows=256)
    monkeypatch.setattr(
        tiles, "for_tensor", lambda kernel, *rest, **more: tall if kernel == "forward" else own(kernel, *rest, **more)
    )
    got = run(tensors, torch.ones(N, device=device), ("hidden",), beta=0.3, workspace_mb=THREE_PANELS)
    torch.testing.assert_close(got[0], want[0], rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(got[2]["hidden"], want[2]["hidden"], rtol=1e-4, atol=1e-6)


@pytest.mark.quick
def test_who_makes_the_gradient(device):
    """In the forward where hidden alone wants one and nothing was asked for that a certificate is needed for."""
    hidden, weight = torch.zeros(4, 8, requires_grad=True), torch.zeros(300, 8)
    trained = torch.zeros(300, 8, requires_grad=True)

    def chosen(head, **settings):
        return choose_strategy(hidden, (head, None, None, None), params(**settings))

    assert chosen(weight) is strategies.DivergingFrozen
    assert chosen(trained) is strategies.Diverging
    assert chosen(weight, tolerance=0.05) is strategies.DivergingCertified
    assert chosen(weight, workspace=2**16) is strategies.Diverging
    assert chosen(weight, beta=1.0) is strategies.Diverging
    assert chosen(weight, shard=True) is strategies.Diverging


@pytest.mark.quick
@pytest.mark.parametrize("names", [("hidden",), ("hidden", "weight")], ids=str)
def test_the_host_never_waits_and_results_repeat(names, device, monkeypatch):
    forbid_lists(monkeypatch)
    tensors = given.pair(270, VOCAB, 24, 16, device)
    upstream = torch.linspace(-1, 1, 270, device=device)
    leaf = problems.with_grad(tensors, names)
    leaves, results = [leaf[name] for name in names], []
    for _ in range(2):
        out = given.call(linear_divergence, leaf, beta=0.3, backend="triton", workspace_mb=THREE_PANELS).divergence
        with NoSync():
            results.append((out, *torch.autograd.grad(out, leaves, upstream)))
    problem = pair.PairProblem(
        tensors["hidden"][None], tensors["weight"], None, torch.where(tensors["mask"], 0, -100), None,
        params(workspace=2**20, compute_dtype=torch.float32, beta=0.3), teacher_hidden=tensors["teacher_hidden"][None],
        teacher_weight=tensors["teacher_weight"],
    )  # fmt: skip
    with NoSync():
        stats, directions = held.frozen_forward(problem)
    for x, y in zip(*results):
        assert torch.equal(x, y)
    assert torch.equal(stats[0], results[0][0])
    assert directions.isfinite().all()


def test_a_second_backward_and_its_own_weights(device):
    """The gradient is held, each row's for a weight of 1: any weights come after."""
    tensors = given.pair(140, 300, 24, 24, device)
    leaf = problems.with_grad(tensors, ("hidden",))
    out = given.call(linear_divergence, leaf, beta=0.5, backend="triton").divergence
    for seed in range(2):
        weights = torch.randn(140, generator=torch.Generator().manual_seed(seed)).to(device)
        (mine,) = torch.autograd.grad(out, leaf["hidden"], weights, retain_graph=True)
        _, _, want = run(tensors, weights, ("hidden",), beta=0.5, workspace_mb=0.01)
        torch.testing.assert_close(mine, want["hidden"], rtol=1e-4, atol=1e-6 * float(want["hidden"].abs().max()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(("n", "depth"), [(16384, 1536), (8192, 4096), (300, 896), (1, 1536)], ids=str)
@pytest.mark.parametrize("workspace", [256, 1024])
def test_memory(workspace, n, depth, dtype, monkeypatch):
    """Of real sizes, on the meta device: within the workspace beside the gradient that is held."""

    def empty(*shape, dtype=dtype):
        return torch.empty(shape, dtype=dtype, device="meta")

    vocab, settings = 151936, {"compute_dtype": dtype, "teacher_compute_dtype": dtype, "workspace": workspace * MIB}
    teacher = TeacherHead(empty(1, n, 2 * depth), empty(vocab, 2 * depth))
    problem = pair.PairProblem(
        empty(1, n, depth), empty(vocab, depth), None, empty(n, dtype=torch.int64), None, params(**settings),
        teacher_hidden=teacher.hidden, teacher_weight=teacher.weight,
    )  # fmt: skip
    with report.recording("sm_90", report.Forgetful()):
        with Live() as live:
            made = held.forward(problem)
        assert live.peak <= workspace * MIB + 512 * n + SLACK, live.peak / MIB
        del made
        with Live() as live:
            made = held.frozen_forward(problem)
        assert live.peak <= workspace * MIB + (512 + 4 * depth) * n + SLACK, live.peak / MIB
    assert len(made) == 2

"""The certified backward: close to exact on both backends, with every option, and never a wrong certificate."""

import pytest
import torch

from bench import profiles
from fastgrpo import linear_logprobs
from fastgrpo.backends import certified, torch_backend

import problems

GRADS = ("hidden", "weight", "bias")
SIZES = {"torch": (700, 2100, 32), "triton": (150, 700, 32)}


def peaked(backend, device="cpu", dtype=torch.float32, seed=0):
    n, vocab, depth = SIZES[backend]
    return profiles.problem(n, vocab, depth, dtype=dtype, device=device, seed=seed)


def gradients(p, backend, backward, hint=True, upstream=None, names=("hidden", "weight"), **options):
    leaf = problems.with_grad({"hidden": p["hidden"], "weight": p["weight"], "bias": p.get("bias")}, names)
    out = linear_logprobs(
        leaf["hidden"], leaf["weight"], p["targets"], leaf["bias"], backward=backward, backend=backend,
        old_logprobs=p["old_logprobs"] if hint else None, **options,
    )  # fmt: skip
    out.logprobs.backward(p["upstream"] if upstream is None else upstream)
    return out, {k: leaf[k].grad for k in names if leaf[k] is not None}


def compare(p, backend, limit=1e-4, **options):
    exact, want = gradients(p, backend, "exact", **options)
    ours, got = gradients(p, backend, "certified", **{"tolerance": 0.0008, **options})
    torch.testing.assert_close(ours.logprobs, exact.logprobs, rtol=1e-5, atol=2e-5)
    for name, truth in want.items():
        error = problems.relative_error(got[name], truth)
        assert error < limit, (name, error)
    return got


@pytest.mark.parametrize("hint", [True, False])
@pytest.mark.parametrize(
    "options",
    [
        {}, {"temperature": 0.8}, {"temperature": "tensor"}, {"softcap": 20.0}, {"logit_scale": 0.9}, {"bias": True},
        {"workspace_mb": 0.3}, {"names": ("hidden",)}, {"names": ("weight",)}, {"return_entropy": True},
        {"bias": True, "softcap": 20.0, "temperature": "tensor", "return_entropy": True},
    ],
    ids=str,
)  # fmt: skip
def test_close_to_exact(backend, device, options, hint):
    options = dict(options)
    p = peaked(backend, device)
    n, vocab, _ = SIZES[backend]
    if options.pop("bias", False):
        p["bias"] = 0.3 * torch.randn(vocab, device=device)
        options["names"] = GRADS
    if options.get("temperature") == "tensor":
        options["temperature"] = 0.8 + 0.4 * torch.rand(n, device=device)
    p["targets"][::9] = -100
    p["upstream"][1::5] = 0
    got = compare(p, backend, limit=3e-4 if "softcap" in options else 1.2e-4, hint=hint, **options)
    if "hidden" in got:
        assert got["hidden"][::9].count_nonzero() == 0
        assert got["hidden"][1::5].count_nonzero() == 0


@pytest.mark.parametrize("tolerance", [0.1, 0.01, 1e-3, 1e-6])
def test_error_follows_the_tolerance(backend, device, tolerance):
    """dlogits within the tolerance (a guarantee); dX and dW far within it (the left-out part is put back evenly)."""
    compare(peaked(backend, device), backend, limit=0.3 * tolerance + 4e-6, tolerance=tolerance)


def certificate_of(p, backend, tolerance=0.001, hint=True):
    from fastgrpo import backends
    from fastgrpo.backends.problem import HeadParams, HeadProblem

    params = HeadParams(temperature=1.0, softcap=None, logit_scale=1.0, compute_dtype=p["hidden"].dtype, entropy=False,
                        backend=backend, workspace=2**27, tolerance=tolerance)  # fmt: skip
    problem = HeadProblem(p["hidden"][None], p["weight"], None, p["targets"], None, params)
    return problem, *backends.load(backend).certified_forward(problem, p["old_logprobs"] if hint else None)


@pytest.mark.parametrize("hint", [True, False])
def test_the_certificate_is_the_mass_left_out(backend, device, hint):
    p = peaked(backend, device)
    _, stats, certificate = certificate_of(p, backend, hint=hint)
    order = certificate.order
    assert sorted(order.tolist()) == list(range(order.numel()))
    z = p["hidden"].double() @ p["weight"].double().T
    mass = z.softmax(1)[order]
    mass.scatter_(1, p["targets"][order, None], 0.0)
    blocks = torch.arange(order.numel(), device=device) // certificate.block
    left_out = (mass * ~certificate.flags[blocks]).sum(1)
    torch.testing.assert_close(certificate.dropped.double(), left_out, rtol=1e-3, atol=2e-6)
    assert certificate.flags[blocks, p["targets"][order]].all()  # the label always
    assert certificate.flags.float().mean() < 0.9
    torch.testing.assert_close(stats[0].double(), z.log_softmax(1).gather(1, p["targets"][:, None])[:, 0],
                               rtol=1e-5, atol=2e-5)  # fmt: skip


def test_dlogits_stay_within_the_tolerance():
    """The guarantee, on the matrix itself: identity head, so that dX is dlogits."""
    vocab = 600
    p = profiles.problem(400, vocab, 64, seed=3)
    hidden = p["hidden"] @ p["weight"].T
    q = {**p, "hidden": hidden, "weight": torch.eye(vocab)}
    for tolerance in (0.2, 0.02):
        _, want = gradients(q, "torch", "exact", names=("hidden",))
        _, got = gradients(q, "torch", "certified", names=("hidden",), tolerance=tolerance)
        error = problems.relative_error(got["hidden"], want["hidden"])
        assert 0 < error < tolerance


@pytest.mark.parametrize("hint", [-1e4, 0.0, -50.0, torch.nan, 3.0])
def test_a_bad_hint_costs_time_only(backend, device, hint):
    p = peaked(backend, device)
    p["old_logprobs"] = torch.full_like(p["old_logprobs"], hint)
    compare(p, backend, limit=1.2e-4)
    p["old_logprobs"] = torch.randn_like(p["old_logprobs"]) * 30
    compare(p, backend, limit=1.2e-4)


@pytest.mark.parametrize("hint", [True, False])
def test_ignored_rows_take_no_part(backend, device, hint):
    p = peaked(backend, device)
    p["targets"][1:40:3] = -100
    got = compare(p, backend, hint=hint)
    assert got["hidden"][p["targets"] == -100].count_nonzero() == 0


def test_flat_logits_go_the_exact_way(backend, device, monkeypatch):
    n, vocab, depth = SIZES[backend]
    p = profiles.problem(n, vocab, depth, "flat", device=device)
    monkeypatch.setattr(certified.SparseRows, "add", lambda *a: pytest.fail("a flat row was taken for a sparse one"))
    compare(p, backend, limit=1e-6)


def test_peaked_logits_skip_most_cells(monkeypatch):
    """What makes it fast: the cells that are recomputed, against all of them."""
    p = profiles.problem(2048, 8192, 64)
    cells = []
    plain = torch_backend.logits_gradient

    def counted(problem, z, *rest):
        cells.append(z.numel())
        return plain(problem, z, *rest)

    monkeypatch.setattr(torch_backend, "logits_gradient", counted)
    gradients(p, "torch", "certified", tolerance=0.006)
    assert sum(cells) < 0.25 * 2048 * 8192
    cells.clear()
    gradients(p, "torch", "exact")
    assert sum(cells) == 2048 * 8192


def test_entropy_gradient_is_exact(backend, device):
    p = peaked(backend, device)
    grads = []
    for backward in ("exact", "certified"):
        leaf = problems.with_grad({k: p[k] for k in ("hidden", "weight")}, ("hidden", "weight"))
        out = linear_logprobs(**leaf, targets=p["targets"], return_entropy=True, backend=backend, backward=backward)
        (out.logprobs @ p["upstream"] + out.entropy.mean()).backward()
        grads.append(leaf)
    for name in ("hidden", "weight"):
        assert problems.relative_error(grads[1][name].grad, grads[0][name].grad) < 6e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bit(backend, device, dtype):
    """Adds less than a quarter of what same-dtype GEMMs add anyway, also to dW summed chunk by chunk."""
    p = peaked(backend, device, dtype)
    double = {**p, "hidden": p["hidden"].double(), "weight": p["weight"].double()}
    p["upstream"] = p["upstream"] * 100
    double["upstream"] = p["upstream"].double()
    _, truth = gradients(double, "torch", "exact")
    _, exact = gradients(p, backend, "exact", workspace_mb=0.5)
    _, ours = gradients(p, backend, "certified", workspace_mb=0.5)
    for name in truth:
        floor, mine = (problems.relative_error(g[name], truth[name]) for g in (exact, ours))
        assert mine < 1.25 * floor + 6e-4, (name, floor, mine)
        assert ours[name].dtype == dtype


def test_padded_batch_and_fp64(device):
    p = peaked("torch")
    flat = compare(p, "torch", limit=1.2e-4)
    q = {**p, "hidden": p["hidden"].view(7, 100, -1)}
    for name in ("targets", "old_logprobs", "upstream"):
        q[name] = p[name].view(7, 100)
    _, got = gradients(q, "torch", "certified", tolerance=0.0008)
    torch.testing.assert_close(got["hidden"].view(700, -1), flat["hidden"], rtol=1e-5, atol=1e-9)
    double = {k: problems.cast(v, torch.float64) for k, v in p.items()}
    compare(double, "torch", limit=1.2e-4)


def test_auto_certifies_where_it_pays():
    from fastgrpo.logprobs import certified_tolerance

    def tolerance(
        backward="auto", value=None, compute=torch.float32, sizes=(2048, 32768, 1024), with_grad=True, device="cpu"
    ):
        return certified_tolerance(backward, value, compute, sizes, with_grad, torch.device(device))

    assert tolerance() == 0.0008
    assert tolerance(compute=torch.bfloat16) == 0.005
    assert tolerance(value=0.1) == 0.1
    assert tolerance("exact") is None
    small = [{"sizes": s} for s in ((8, 32768, 1024), (2048, 100, 1024), (2048, 32768, 64))]
    for exact in (*small, {"with_grad": False}, {"compute": torch.float64}, {"device": "cuda"}):
        assert tolerance(**exact) is None
    assert tolerance("certified", sizes=(8, 100, 8)) == 0.005
    assert tolerance("certified", device="cuda") == 0.005


def test_auto_fp32_keeps_both_gradients_under_1e_4():
    """At sizes where "auto" certifies, for upstream gradients of several kinds, entropy profiles and hints."""
    for options in ({}, {"shared": 0.0}, {"drift": 0.3}):
        p = profiles.problem(1024, 8192, 256, **options)
        for upstream in (p["upstream"], p["upstream"].sign(), p["upstream"] * (torch.rand(1024) < 0.3)):
            _, want = gradients(p, "torch", "exact", upstream=upstream)
            _, got = gradients(p, "torch", "auto", upstream=upstream)
            errors = [problems.relative_error(got[k], want[k]) for k in want]
            assert 1e-7 < max(errors) < 1e-4, errors


def test_best_partition_merges_and_gives_up_where_it_pays():
    plan = certified.best_partition
    assert plan([128, 128], [[10, 10], [11]], 48, 1000)[0] == [(0, 2, True)]
    assert plan([128, 128], [[10, 10], [400]], 48, 1000)[0] == [(0, 1, True), (1, 2, True)]
    assert plan([128, 128], [[990, 10], [995]], 48, 1000)[0] == [(0, 1, False), (1, 2, True)]
    assert plan([0, 128, 128], [[0, 10, 10], [10, 10], [11]], 48, 1000)[0] == [(0, 3, True)]


def loss_problem(backend, device="cpu", batch=None, sequences=8):
    """grpo_loss arguments on peaked logits; a third of the sequences have no advantage."""
    p = peaked(backend, device)
    n = p["targets"].numel() // sequences * sequences
    shape = (sequences, n // sequences)
    advantages = torch.randn(sequences, device=device)
    advantages[::3] = 0
    mask = torch.arange(shape[1], device=device) < torch.randint(shape[1] // 2, shape[1], (sequences, 1), device=device)
    return {
        "hidden": p["hidden"][:n].view(*shape, -1), "weight": p["weight"], "targets": p["targets"][:n].view(shape),
        "old_logprobs": p["old_logprobs"][:n].view(shape), "advantages": advantages, "mask": mask,
        "ref_logprobs": p["old_logprobs"][:n].view(shape) * 0.98,
    }  # fmt: skip


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("settings", [{}, {"beta": 0.05}, {"importance_sampling_level": "sequence"}], ids=str)
def test_loss(backend, device, settings, packed):
    from fastgrpo import GRPOLossConfig, grpo_loss

    arguments = loss_problem(backend, device)
    arguments = problems.packed(arguments) if packed else arguments
    results = []
    for backward in ("exact", "certified"):
        leaf = problems.with_grad(arguments, ("hidden", "weight"))
        config = GRPOLossConfig(epsilon=0.3, **settings)
        result = grpo_loss(config=config, backward=backward, backend=backend, tolerance=0.0008, **leaf)
        result.loss.backward()
        results.append((result.loss.detach(), leaf["hidden"].grad, leaf["weight"].grad))
    assert abs(results[0][0] - results[1][0]) < 1e-5
    for a, b in zip(results[0][1:], results[1][1:]):
        assert problems.relative_error(b, a) < 1.2e-4


@pytest.mark.parametrize("loss_type", ["dapo", "grpo", "cispo", "sapo", "vespo", "luspo"])
@pytest.mark.parametrize("level", ["token", "sequence", "sequence_token"])
def test_tokens_without_advantage_skip_the_forward(backend, device, loss_type, level):
    """Loss, every normaliser and the gradients are those of the whole batch; the metrics say what was left out."""
    from fastgrpo import GRPOLossConfig, grpo_loss

    arguments = problems.batch(batch_size=6, seed=3, token_advantages=level == "token")
    arguments["advantages"][1::2] = 0
    if level == "token":
        arguments["advantages"][:, 2] = 0
    arguments = {k: problems.cast(v, torch.float32, device) for k, v in arguments.items()}
    for extra in ({}, {"off_policy_mask_threshold": 0.05}):
        config = GRPOLossConfig(loss_type=loss_type, importance_sampling_level=level, **extra)
        whole, part = problems.with_grad(arguments), problems.with_grad(arguments)
        full = grpo_loss(config=config, backend=backend, **whole)
        short = grpo_loss(config=config, backend=backend, return_logprobs=False, **part)
        full.loss.backward()
        short.loss.backward()
        torch.testing.assert_close(short.loss, full.loss, rtol=1e-5, atol=1e-7)
        for name in GRADS:
            torch.testing.assert_close(part[name].grad, whole[name].grad, rtol=1e-4, atol=1e-6)
        m = short.metrics
        assert full.metrics["measured_tokens"] == full.metrics["tokens"] == m["tokens"]
        assert m["measured_tokens"] < m["tokens"]
        assert m["active_tokens"] == full.metrics["active_tokens"]
        skipped = (short.logprobs == 0) & (full.logprobs != 0)
        assert skipped.sum() == m["tokens"] - m["measured_tokens"]
        seen = (full.logprobs != 0) & ~skipped
        torch.testing.assert_close(m["entropy_sum"], full.entropy[seen].sum(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("settings", [{"beta": 0.1}, {"entropy_coef": 0.1}, {"top_entropy_quantile": 0.5}], ids=str)
def test_nothing_is_skipped_where_every_token_matters(settings):
    from fastgrpo import GRPOLossConfig, grpo_loss

    arguments = problems.batch(seed=3)
    arguments["advantages"][:] = 0
    m = grpo_loss(config=GRPOLossConfig(**settings), return_logprobs=False, **arguments).metrics
    assert m["measured_tokens"] == m["tokens"]


def test_deterministic(backend, device):
    p = peaked(backend, device)
    (first, a), (second, b) = (gradients(p, backend, "certified") for _ in range(2))
    assert torch.equal(first.logprobs, second.logprobs)
    assert all(torch.equal(a[k], b[k]) for k in a)

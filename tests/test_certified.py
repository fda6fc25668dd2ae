"""The certified backward: close to exact on both backends, with every option, and never a wrong certificate."""

import functools

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from bench import profiles
from fastgrpo import linear_logprobs, reference
from fastgrpo.backends import certified_backward, dense, grouping, products, row_audit

import problems

GRADS = ("hidden", "weight", "bias")
SIZES = {"torch": (700, 2100, 32), "triton": (150, 700, 32)}


def draw_peaked(backend, device="cpu", dtype=torch.float32, seed=0):
    n, vocab, depth = SIZES[backend]
    return problems.drawn(n, vocab, depth, dtype=dtype, device=device, seed=seed)


def gradients(p, backend, backward, hint=True, upstream=None, names=("hidden", "weight"), **options):
    leaf = problems.with_grad({"hidden": p["hidden"], "weight": p["weight"], "bias": p.get("bias")}, names)
    out = linear_logprobs(
        leaf["hidden"], leaf["weight"], p["targets"], leaf["bias"], backward=backward, backend=backend,
        old_logprobs=p["old_logprobs"] if hint else None, **options,
    )  # fmt: skip
    out.logprobs.backward(p["upstream"] if upstream is None else upstream)
    return out, {k: leaf[k].grad for k in names if leaf[k] is not None}


def compare(p, backend, limit=1e-4, exact=None, **options):
    """Against ``exact``, torch's unless it is given: it knows no hint, and costs a tenth of the interpreter's."""
    exact, want = exact or gradients(p, "torch", "exact", **options)
    ours, got = gradients(p, backend, "certified", **{"tolerance": 0.0008, **options})
    torch.testing.assert_close(ours.logprobs, exact.logprobs, rtol=1e-5, atol=2e-5)
    for name, truth in want.items():
        error = problems.relative_error(got[name], truth)
        assert error < limit, (name, error)
    return got


@pytest.mark.parametrize(
    "options",
    [
        {}, {"temperature": 0.8}, {"temperature": "tensor"}, {"softcap": 20.0}, {"logit_scale": 0.9}, {"bias": True},
        {"workspace_mb": 0.3}, {"names": ("hidden",)}, {"names": ("weight",)}, {"return_entropy": True},
        {"bias": True, "softcap": 20.0, "temperature": "tensor", "return_entropy": True},
    ],
    ids=str,
)  # fmt: skip
def test_close_to_exact(backend, device, options):
    options = dict(options)
    p = draw_peaked(backend, device)
    n, vocab, _ = SIZES[backend]
    if options.pop("bias", False):
        p["bias"] = 0.3 * torch.randn(vocab, device=device)
        options["names"] = GRADS
    if options.get("temperature") == "tensor":
        options["temperature"] = 0.8 + 0.4 * torch.rand(n, device=device)
    p["targets"][::9] = -100
    p["upstream"][1::5] = 0
    exact = gradients(p, "torch", "exact", **options)
    for hint in (True, False):
        limit = 3e-4 if "softcap" in options else 1.2e-4
        got = compare(p, backend, limit, exact, hint=hint, **options)
        if "hidden" in got:
            assert got["hidden"][::9].count_nonzero() == 0
            assert got["hidden"][1::5].count_nonzero() == 0


@pytest.mark.parametrize("tolerance", [0.1, 0.01, 1e-3, 1e-6])
def test_error_follows_the_tolerance(backend, device, tolerance):
    """dlogits within the tolerance (a guarantee); dX and dW far within it (the left-out part is put back evenly)."""
    compare(draw_peaked(backend, device), backend, limit=0.3 * tolerance + 4e-6, tolerance=tolerance)


def certificate_of(p, backend, tolerance=0.001, hint=True):
    from fastgrpo import backends
    from fastgrpo.backends.problem import HeadParams, HeadProblem

    params = HeadParams(temperature=1.0, softcap=None, logit_scale=1.0, compute_dtype=p["hidden"].dtype, entropy=False,
                        backend=backend, workspace=2**27, tolerance=tolerance)  # fmt: skip
    problem = HeadProblem(p["hidden"][None], p["weight"], None, p["targets"], None, params)
    return problem, *backends.load(backend).certified_forward(problem, p["old_logprobs"] if hint else None)


@pytest.mark.quick
@pytest.mark.parametrize("hint", [True, False])
def test_the_certificate_is_the_mass_left_out(backend, device, hint):
    p = draw_peaked(backend, device)
    _, stats, certificate = certificate_of(p, backend, hint=hint)
    order = certificate.order
    assert sorted(order.tolist()) == list(range(order.numel()))
    z = p["hidden"].double() @ p["weight"].double().T
    mass = z.softmax(1)[order]
    mass.scatter_(1, p["targets"][order, None], 0.0)
    blocks = torch.arange(order.numel(), device=device) // certificate.block
    kept = certificate.keeps(torch.arange(mass.shape[1], device=device))
    left_out = (mass * ~kept[blocks]).sum(1)
    torch.testing.assert_close(certificate.dropped.double(), left_out, rtol=1e-3, atol=2e-6)
    assert kept[blocks, p["targets"][order]].all()  # the label always
    assert kept.float().mean() < 0.9
    torch.testing.assert_close(stats[0].double(), z.log_softmax(1).gather(1, p["targets"][:, None])[:, 0],
                               rtol=1e-5, atol=2e-5)  # fmt: skip


@pytest.mark.quick
def test_dlogits_stay_within_the_tolerance():
    """The guarantee, on the matrix itself: identity head, so that dX is dlogits."""
    vocab = 600
    p = problems.drawn(400, vocab, 64, seed=3)
    hidden = p["hidden"] @ p["weight"].T
    q = {**p, "hidden": hidden, "weight": torch.eye(vocab)}
    for tolerance in (0.2, 0.02):
        _, want = gradients(q, "torch", "exact", names=("hidden",))
        _, got = gradients(q, "torch", "certified", names=("hidden",), tolerance=tolerance)
        error = problems.relative_error(got["hidden"], want["hidden"])
        assert 0 < error < tolerance


@pytest.mark.parametrize("hint", [-1e4, 0.0, -50.0, torch.nan, 3.0, "random"])
def test_a_bad_hint_costs_time_only(backend, device, hint):
    p = draw_peaked(backend, device)
    old = p["old_logprobs"]
    p["old_logprobs"] = 30 * torch.randn_like(old) if hint == "random" else torch.full_like(old, hint)
    compare(p, backend, limit=1.2e-4)


@pytest.mark.quick
@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("hinted", [True, False])
def test_logits_that_rise_late(backend, device, trained, hinted):
    """Far above all before, by steps over the range in which one of a row's sums overflows and the other does not."""
    rises = torch.linspace(60, 110, 101, device=device)
    weight = torch.zeros(64 if backend == "triton" else 5000, 1, device=device)
    weight[-40], weight[-1] = 1.0, 1.02
    leaf = {"hidden": rises[:, None].requires_grad_(), "weight": weight.requires_grad_(trained)}
    targets = torch.ones(101, dtype=torch.int64, device=device)
    truth = reference.linear_logprobs(*(x.double() for x in leaf.values()), targets, return_entropy=True)
    known = {"old_logprobs": truth.logprobs.detach().float() + 30} if hinted else {}
    ours = linear_logprobs(
        **leaf, targets=targets, backend=backend, backward="certified", workspace_mb=0.02, return_entropy=True, **known
    )
    torch.testing.assert_close(ours.logprobs.double(), truth.logprobs, rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(ours.entropy.double(), truth.entropy, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("hint", [True, False])
def test_ignored_rows_take_no_part(backend, device, hint):
    p = draw_peaked(backend, device)
    p["targets"][1:40:3] = -100
    got = compare(p, backend, hint=hint)
    assert got["hidden"][p["targets"] == -100].count_nonzero() == 0


def test_flat_logits_go_the_exact_way(backend, device, monkeypatch):
    n, vocab, depth = SIZES[backend]
    p = problems.drawn(n, vocab, depth, "flat", device=device)
    monkeypatch.setattr(
        certified_backward.SparseRows, "add", lambda *a: pytest.fail("a flat row was taken for a sparse one")
    )
    compare(p, backend, 1e-6, gradients(p, backend, "exact"))


def test_peaked_logits_skip_most_cells(monkeypatch, torch_mm):
    """What makes it fast: the cells that are recomputed, against all of them."""
    p = problems.drawn(2048, 8192, 64)
    cells = []
    plain = dense.logits_gradient

    def counted(problem, z, *rest):
        cells.append(z.numel())
        return plain(problem, z, *rest)

    monkeypatch.setattr(dense, "logits_gradient", counted)
    gradients(p, "torch", "certified", tolerance=0.006, row_tolerance=1)
    assert sum(cells) < 0.25 * 2048 * 8192
    cells.clear()
    gradients(p, "torch", "certified", tolerance=0.006, names=("hidden",))  # a frozen head pays for no rows of dW
    assert sum(cells) < 0.25 * 2048 * 8192
    cells.clear()
    gradients(p, "torch", "certified", tolerance=0.006)
    assert sum(cells) < 0.6 * 2048 * 8192
    cells.clear()
    gradients(p, "torch", "exact")
    assert sum(cells) == 2048 * 8192


def test_entropy_gradient_is_exact(backend, device):
    p = draw_peaked(backend, device)
    grads = []
    for where, backward in (("torch", "exact"), (backend, "certified")):
        leaf = problems.with_grad({k: p[k] for k in ("hidden", "weight")}, ("hidden", "weight"))
        out = linear_logprobs(**leaf, targets=p["targets"], return_entropy=True, backend=where, backward=backward)
        (out.logprobs @ p["upstream"] + out.entropy.mean()).backward()
        grads.append(leaf)
    for name in ("hidden", "weight"):
        assert problems.relative_error(grads[1][name].grad, grads[0][name].grad) < 6e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bit(backend, device, dtype):
    """Adds less than a quarter of what same-dtype GEMMs add anyway, also to dW summed chunk by chunk."""
    p = draw_peaked(backend, device, dtype)
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


@pytest.mark.parametrize("names", [("hidden", "bias"), ("bias",)], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bit_bias_of_a_frozen_head(backend, device, dtype, names):
    """db is summed in fp32 where dW, which would be summed beside it, is not asked for."""
    p = draw_peaked(backend, device, dtype)
    p["bias"] = torch.randn(p["weight"].shape[0], device=device).to(dtype) / 4
    p["upstream"] = p["upstream"] * 100
    double = {k: problems.cast(v, torch.float64, device) for k, v in p.items()}
    _, truth = gradients(double, "torch", "exact", names=names)
    _, exact = gradients(p, backend, "exact", names=names)
    _, ours = gradients(p, backend, "certified", names=names)
    for name in names:
        floor, mine = (problems.relative_error(g[name], truth[name]) for g in (exact, ours))
        assert mine < 1.25 * floor + 6e-4, (name, floor, mine)


def test_padded_batch_and_fp64(device):
    p = draw_peaked("torch")
    flat = compare(p, "torch", limit=1.2e-4)
    q = {**p, "hidden": p["hidden"].view(7, 100, -1)}
    for name in ("targets", "old_logprobs", "upstream"):
        q[name] = p[name].view(7, 100)
    _, got = gradients(q, "torch", "certified", tolerance=0.0008)
    torch.testing.assert_close(got["hidden"].view(700, -1), flat["hidden"], rtol=1e-5, atol=1e-9)
    double = {k: problems.cast(v, torch.float64) for k, v in p.items()}
    compare(double, "torch", limit=1.2e-4)


@pytest.mark.parametrize("fast", [True, False])
def test_auto_certifies_where_it_pays(fast, monkeypatch):
    from fastgrpo.head import certified_tolerance

    monkeypatch.setattr(products, "FASTER_ONEDNN", fast)

    def tolerance(
        backward="auto", value=None, compute=torch.float32, sizes=(2048, 32768, 1024), with_grad=True, device="cpu"
    ):
        return certified_tolerance(backward, value, compute, sizes, with_grad, torch.device(device))

    assert tolerance() == 0.0007
    assert tolerance(compute=torch.bfloat16) == 0.005
    assert tolerance(value=0.1) == 0.1
    assert tolerance("exact") is None
    small = [{"sizes": s} for s in ((8, 32768, 1024), (2048, 100, 1024), (2048, 32768, 64))]
    small += [{"sizes": s, "device": "cuda"} for s in ((1024, 151936, 1536), (8192, 8192, 1536), (8192, 151936, 256))]
    for exact in (*small, {"with_grad": False}, {"compute": torch.float64}):
        assert tolerance(**exact) is None
    assert (tolerance(sizes=(512, 4096, 256)) is None) == fast
    assert tolerance(sizes=(512, 8192, 256)) == tolerance(sizes=(256, 16384, 256)) == 0.0007
    assert tolerance(compute=torch.bfloat16, sizes=(8192, 151936, 1536), device="cuda") == 0.005
    assert tolerance("certified", sizes=(8, 100, 8)) == 0.005
    assert tolerance("certified", device="cuda") == 0.005


def test_auto_fp32_keeps_both_gradients_under_1e_4():
    """At sizes where "auto" certifies, for upstream gradients of several kinds, entropy profiles and hints."""
    for options in ({}, {"shared": 0.0}, {"drift": 0.3}):
        p = problems.drawn(1024, 8192, 256, **options)
        for upstream in (p["upstream"], p["upstream"].sign(), p["upstream"] * (torch.rand(1024) < 0.3)):
            _, want = gradients(p, "torch", "exact", upstream=upstream)
            _, got = gradients(p, "torch", "auto", upstream=upstream)
            errors = [problems.relative_error(got[k], want[k]) for k in want]
            assert 1e-7 < max(errors) < 1e-4, errors


@pytest.mark.quick
def test_best_partition_merges_and_gives_up_where_it_pays():
    plan = grouping.best_partition
    assert plan([128, 128], [[10, 10], [11]], 48, 1000)[0] == [(0, 2, True)]
    assert plan([128, 128], [[10, 10], [400]], 48, 1000)[0] == [(0, 1, True), (1, 2, True)]
    assert plan([128, 128], [[990, 10], [995]], 48, 1000)[0] == [(0, 1, False), (1, 2, True)]
    assert plan([0, 128, 128], [[0, 10, 10], [10, 10], [11]], 48, 1000)[0] == [(0, 3, True)]


def row_errors(got, want):
    """(V,) relative error of each row; 0 where both are 0."""
    got, want = got.double(), want.double()
    return torch.nan_to_num((got - want).norm(dim=1) / want.norm(dim=1), nan=0.0)


def assert_rows(got, want, tolerance=0.1):
    """Half of the rows of dW within a fifth of the tolerance, 95 % within it."""
    nonzero = want.norm(dim=1) > 0
    quantiles = row_errors(got, want)[nonzero].quantile(torch.tensor([0.5, 0.95], dtype=torch.float64))
    assert quantiles[0] <= tolerance / 5, quantiles
    assert quantiles[1] <= tolerance, quantiles


def peaked_rows(p, sharpness=3.0):
    """Every row as peaked as the labels allow: the hidden states scaled up."""
    hidden = p["hidden"] * sharpness
    logp = (hidden @ p["weight"].T).log_softmax(1).gather(1, p["targets"][:, None])[:, 0]
    return {**p, "hidden": hidden, "old_logprobs": logp}


def contextual(n=1024):
    """What :func:`make_contextual` made once, for a test to replace its entries."""
    return dict(make_contextual(n))


@functools.cache
def make_contextual(n, vocab=8192, depth=256, seed=0):
    """Every row has two favourites and a tail far below the cutoff, of a mass that differs by e^16 between rows: no
    row need be whole for the gradients as wholes, and most vocabulary entries are met in tails alone."""
    g = torch.Generator().manual_seed(seed)
    weight = torch.randn(vocab, depth, generator=g) / depth**0.5
    hidden = torch.randn(n, depth, generator=g)
    lift = 19 + 16 * torch.rand(n, generator=g)
    for gap in (0.0, 1 + 3 * torch.rand(n, generator=g)):
        favourite = weight[torch.randint(vocab // 16, (n,), generator=g)]
        hidden += (lift - gap)[:, None] * favourite / favourite.square().sum(1, keepdim=True)
    targets, logp = profiles.sample(hidden, weight, g)
    upstream = torch.randn(n // 64, generator=g).repeat_interleave(64) / n  # one advantage a sequence
    return {"hidden": hidden, "weight": weight, "targets": targets, "old_logprobs": logp, "upstream": upstream}


@functools.cache
def exact_of_contextual():
    """Both gradients of ``contextual()`` in full."""
    return gradients(contextual(), "torch", "exact")[1]


AT_AUTO_SIZE = {
    "rl": lambda: problems.drawn(1024, 8192, 256),
    "flat": lambda: problems.drawn(1024, 8192, 256, "flat"),
    "contextual": contextual,
    "all peaked": lambda: peaked_rows(problems.drawn(512, 8192, 256)),
    "drifted, no shared columns": lambda: problems.drawn(1024, 8192, 256, shared=0.0, drift=0.3),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", AT_AUTO_SIZE)
def test_rows_of_dw(name, dtype):
    """The promise under "auto": every vocabulary entry's own gradient, and both gradients as wholes."""
    p = AT_AUTO_SIZE[name]()
    p = {**p, "hidden": p["hidden"].to(dtype), "weight": p["weight"].to(dtype)}
    wide = {**p, "hidden": p["hidden"].float(), "weight": p["weight"].float()}
    _, want = gradients(wide, "torch", "exact")
    _, got = gradients(p, "torch", "auto")
    assert_rows(got["weight"], want["weight"])
    for name in want:
        assert problems.relative_error(got[name], want[name]) < (1e-4 if dtype == torch.float32 else 3e-3)


def test_the_row_tolerance_is_followed_and_paid_for():
    """Without it whole rows of dW are missing; the tighter, the better and the dearer."""
    p, want = contextual(), exact_of_contextual()
    errors = []
    for row_tolerance in (1, 0.3, 0.1, 0.01):
        _, got = gradients(p, "torch", "auto", row_tolerance=row_tolerance)
        errors.append(float(row_errors(got["weight"], want["weight"]).quantile(0.95)))
        if row_tolerance < 1:
            assert_rows(got["weight"], want["weight"], row_tolerance)
    assert errors[0] > 0.5
    assert errors[0] > errors[1] > errors[2] >= errors[3]


def test_one_row_with_a_huge_advantage():
    """Its tail is then nearly all of dW's rows: it is whole there, though it is the most peaked of all."""
    p = contextual()
    p["upstream"] = p["upstream"].clone()
    p["upstream"][p["old_logprobs"].argmax()] = 1e4
    _, want = gradients(p, "torch", "exact")
    _, got = gradients(p, "torch", "auto")
    assert_rows(got["weight"], want["weight"])


@pytest.mark.quick
def test_one_flat_row_among_peaked_ones():
    p = peaked_rows(problems.drawn(512, 8192, 256))
    p["hidden"][7] *= 0.01
    p["old_logprobs"][7] = (p["hidden"][7] @ p["weight"].T).log_softmax(0)[p["targets"][7]]
    _, want = gradients(p, "torch", "exact")
    _, got = gradients(p, "torch", "auto")
    assert_rows(got["weight"], want["weight"])


def test_entries_that_only_appear_in_tails():
    """No row keeps their columns: their whole gradient is what the tails bring."""
    p = contextual()
    *_, certificate = certificate_of(p, "torch", tolerance=0.0008)
    never = ~certificate.flags.any(0)
    want = exact_of_contextual()
    _, without = gradients(p, "torch", "auto", row_tolerance=1)
    _, got = gradients(p, "torch", "auto")
    assert never.sum() > 500
    assert row_errors(without["weight"], want["weight"])[never].median() > 0.3
    assert row_errors(got["weight"], want["weight"])[never].quantile(0.9) < 0.1


@pytest.mark.parametrize("value", [0, -0.1, 1.5, float("nan"), "much"])
def test_row_tolerance_is_checked(value):
    p = draw_peaked("torch")
    with pytest.raises((ValueError, TypeError), match="row_tolerance"):
        linear_logprobs(p["hidden"], p["weight"], p["targets"], row_tolerance=value)


def test_the_audit_samples_the_vocabulary_once_and_evenly():
    for vocab in (4096, 32768, 151936):
        ranking, audited = row_audit.sample_entries(vocab)
        both = torch.cat((ranking, audited)).sort().values
        assert len(both.unique()) == len(both) == 3 * len(ranking)
        assert both[0] >= 0
        assert both[-1] < vocab
        assert both.diff().max() <= 2 * (vocab // len(both) + 1)
    assert torch.equal(row_audit.sample_entries(300)[1], torch.arange(300))


def test_fewest_whole_stops_at_the_first_step_that_errs():
    """Steps of 100 audited entries: within 0.1 all, too many over 0.02, too many over 0.1, within again."""
    steps = [torch.zeros(100), torch.full((100,), 0.015), torch.full((100,), 0.03), torch.full((100,), 0.2)]
    assert row_audit.fewest_whole(torch.stack(steps), 0.1, vocab=100) == 1
    tail = torch.full((100,), 0.01)
    tail[:4] = 0.5
    assert row_audit.fewest_whole(torch.stack((steps[0], tail)), 0.1, vocab=100) == 1
    assert row_audit.fewest_whole(torch.stack((steps[0], tail)), 0.1, vocab=10000) == 0  # a sample: one error less
    nothing = torch.full((2, 100), torch.nan)
    assert row_audit.fewest_whole(nothing, 0.1, vocab=100) == 1


@pytest.mark.quick
def test_a_plan_with_tails():
    """A group that keeps most columns makes its tail rows whole; the costs are those of the cells."""
    rows, columns = torch.arange(4), torch.arange(100)
    group = grouping.RowGroup(rows, columns, torch.zeros(4), torch.zeros(4, dtype=torch.bool))
    plan = grouping.Plan([group], torch.tensor([9]))
    assert plan.cells(1000, gemms=3) == 3 * (4 * 100 + 1000)
    tail = torch.tensor([True, False, False, True])
    apart = plan.with_tails(tail, vocab=1000, gemms=3)
    assert torch.equal(apart.groups[0].tail, tail)
    assert apart.whole.tolist() == [9]
    assert apart.cells(1000, gemms=3) == 3 * (4 * 100 + 1000) + 2 * 2 * 1000
    whole = plan.with_tails(tail, vocab=200, gemms=3)
    assert whole.whole.tolist() == [0, 3, 9]
    assert whole.groups[0].rows.tolist() == [1, 2]
    assert not plan.with_tails(~tail | tail, vocab=200, gemms=3).groups


@pytest.mark.parametrize("options", [{"softcap": 20.0}, {"temperature": "tensor"}, {"bias": True}], ids=str)
def test_rows_of_dw_with_options(backend, device, options):
    options, p = dict(options), draw_peaked(backend, device)
    n, vocab, _ = SIZES[backend]
    names = ("hidden", "weight")
    if options.pop("bias", False):
        p["bias"], names = 0.3 * torch.randn(vocab, device=device), GRADS
    if options.get("temperature"):
        options["temperature"] = 0.8 + 0.4 * torch.rand(n, device=device)
    _, want = gradients(p, "torch", "exact", names=names, **options)
    _, got = gradients(p, backend, "certified", names=names, tolerance=0.005, **options)
    assert_rows(got["weight"], want["weight"])


@pytest.mark.parametrize("frozen", [False, True])
def test_rows_of_loras_b(frozen):
    p = contextual()
    g = torch.Generator().manual_seed(1)
    a, b = torch.randn(8, 256, generator=g) / 16, 0.01 * torch.randn(8192, 8, generator=g)
    grads = []
    for backward in ("exact", "auto"):
        leaves = [x.clone().requires_grad_() for x in (p["hidden"], a, b)]
        weight = p["weight"].clone().requires_grad_(not frozen)
        out = linear_logprobs(leaves[0], weight, p["targets"], lora=(*leaves[1:], 2.0), backward=backward,
                              old_logprobs=p["old_logprobs"])  # fmt: skip
        out.logprobs.backward(p["upstream"])
        grads.append((leaves[2].grad, leaves[1].grad, leaves[0].grad, weight.grad))
    (want, want_a, want_x, want_w), (got, got_a, got_x, got_w) = grads
    assert_rows(got, want)
    assert problems.relative_error(got_a, want_a) < 3e-4
    assert problems.relative_error(got_x, want_x) < 1e-4
    assert frozen or assert_rows(got_w, want_w) is None


class Scratch(TorchDispatchMode):
    """The largest memory any operation's result stands in, but for tensors as large as hidden or the head."""

    def __init__(self, *known):
        super().__init__()
        self.known, self.bytes = {x.nbytes for x in known}, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else (out,):
            size = x.untyped_storage().nbytes() if isinstance(x, torch.Tensor) else 0
            self.bytes = max(self.bytes, 0 if size in self.known else size)
        return out


@pytest.mark.parametrize("workspace_mb", [1, 4])
def test_the_audit_and_the_tails_stay_within_the_workspace(workspace_mb):
    p = contextual(960)  # whose hidden is no power of two in size, as buffers are
    leaf = problems.with_grad({k: p[k] for k in ("hidden", "weight")}, ("hidden", "weight"))
    out = linear_logprobs(**leaf, targets=p["targets"], old_logprobs=p["old_logprobs"], workspace_mb=workspace_mb)
    with Scratch(p["hidden"], p["weight"]) as seen:
        out.logprobs.backward(p["upstream"])
    assert 2**16 < seen.bytes <= workspace_mb * 2**20
    _, want = gradients(p, "torch", "exact")
    assert_rows(leaf["weight"].grad, want["weight"])


def test_deterministic_tails():
    p = contextual()
    (_, a), (_, b) = (gradients(p, "torch", "auto") for _ in range(2))
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_auto_does_not_leave_out_what_costs_more(monkeypatch, torch_mm):
    """Where dW would need nearly every row, the exact path is taken."""
    p = contextual()
    monkeypatch.setattr(row_audit.RowAudit, "tail", lambda self, _: torch.ones_like(self.rows, dtype=torch.bool))
    monkeypatch.setattr(grouping, "WORTHWHILE", 0.5)
    monkeypatch.setattr(certified_backward.SparseRows, "add", lambda *a: pytest.fail("entries were left out"))
    _, got = gradients(p, "torch", "auto")
    _, want = gradients(p, "torch", "exact")
    assert row_errors(got["weight"], want["weight"]).max() < 1e-5


def loss_problem(backend, device="cpu", batch=None, sequences=8):
    """grpo_loss arguments on peaked logits; a third of the sequences have no advantage."""
    p = draw_peaked(backend, device)
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
    arguments = problems.pack(arguments) if packed else arguments
    results = []
    for where, backward in (("torch", "exact"), (backend, "certified")):
        leaf = problems.with_grad(arguments, ("hidden", "weight"))
        config = GRPOLossConfig(epsilon=0.3, **settings)
        result = grpo_loss(config=config, backward=backward, backend=where, tolerance=0.0008, **leaf)
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
    p = draw_peaked(backend, device)
    (first, a), (second, b) = (gradients(p, backend, "certified") for _ in range(2))
    assert torch.equal(first.logprobs, second.logprobs)
    assert all(torch.equal(a[k], b[k]) for k in a)

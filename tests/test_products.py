"""Matrix products by oneDNN in the place of torch.mm: chosen where they are faster, and as right."""

import io

import pytest
import torch

from bench import profiles
from bench.profiles import problem
from fastgrpo import grpo_loss, linear_divergence, linear_logprobs, reference
from fastgrpo.backends import products
from fastgrpo.backends.logits import LogitTiles
from fastgrpo.backends.problem import NOTHING, HeadParams, HeadProblem

import problems
from watchers import Gemms, Live

CPUS = {
    "AMD, Zen 5": ("vendor_id\t: AuthenticAMD\ncpu family\t: 26\n\nvendor_id\t: AuthenticAMD\n", True),
    "AMD, Zen 4": ("vendor_id\t: AuthenticAMD\ncpu family\t: 25\n", False),
    "Intel": ("vendor_id\t: GenuineIntel\ncpu family\t: 6\n", False),
    "ARM": ("CPU implementer\t: 0x41\n", False),
}

HAS_ONEDNN = torch.backends.mkldnn.is_available() and products.has_operation()
needs_onednn = pytest.mark.skipif(not HAS_ONEDNN, reason="this torch has no oneDNN, or not its products")


@pytest.fixture(params=[False, True], ids=["torch", "oneDNN"])
def library(request, monkeypatch):
    """Small products are oneDNN's too."""
    if request.param and not HAS_ONEDNN:
        pytest.skip("this torch has no oneDNN, or not its products")
    monkeypatch.setattr(products, "FASTER_ONEDNN", request.param)
    monkeypatch.setattr(products, "SMALLEST", 0)
    return request.param


def layouts(n, k):
    """(n, k) of normal numbers, as they lie in memory."""
    yield torch.randn(n, k)
    yield torch.randn(k, n).t()
    yield torch.randn(n + 3, k + 5)[3:, 2 : k + 2]
    yield torch.randn(k + 3, n + 5)[3:, 2 : n + 2].t()


def test_any_layout(library):
    n, k, m = 33, 70, 51
    for a in layouts(n, k):
        for b in layouts(k, m):
            want = a.double() @ b.double()
            total, out = torch.randn(n + 2, m)[1:-1], torch.empty(n, m)
            before = total.double()
            products.add_mm(total, a, b)
            results = products.mm(a, b), products.mm(a, b, out), total.double() - before
            assert results[1] is out
            for got in results:
                assert problems.relative_error(got, want) < 2e-6


@pytest.mark.quick
@needs_onednn
def test_counted_where_it_is_faster(monkeypatch):
    a, b = torch.randn(64, 128), torch.randn(128, 256)
    for faster in (False, True):
        monkeypatch.setattr(products, "FASTER_ONEDNN", faster)
        for x, y, onednn in (
            (a, b, faster), (a[:2, :2], b[:2], False), (a.double(), b.double(), False),
            (a.bfloat16(), b.bfloat16(), False), (a.clone().requires_grad_(), b, False),
            (a, b.t().contiguous().t(), faster), (a.t().contiguous().t(), b, faster), (a[:, ::2], b[::2], False),
            (a, torch.randn(128, 300)[:, :256], False), (a, torch.randn(256, 200)[:, :128].t(), False),
        ):  # fmt: skip
            with Gemms() as gemms:
                product = products.mm(x, y)
            assert gemms.products == product.numel() * x.shape[1]
            assert product.requires_grad == x.requires_grad
            assert products.takes_onednn(x, y) == onednn


@needs_onednn
@pytest.mark.parametrize("cpu", CPUS)
def test_where_it_is_faster(monkeypatch, cpu):
    text, faster = CPUS[cpu]
    monkeypatch.setattr(products.platform, "system", lambda: "Linux")
    monkeypatch.setattr("builtins.open", lambda *_: io.StringIO(text))
    monkeypatch.setattr(torch.cpu, "_is_avx512_supported", lambda: True)
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
    assert products.has_faster_onednn() == faster
    monkeypatch.setattr(torch.cpu, "_is_avx512_supported", lambda: False)
    assert not products.has_faster_onednn()


@pytest.mark.parametrize(
    ("name", "want"),
    [("AMD64 Family 26 Model 2 Stepping 1, AuthenticAMD", ("AuthenticAMD", 26)), ("", ("", 0)), ("ARMv8", ("", 0))],
)
def test_windows(monkeypatch, name, want):
    monkeypatch.setattr(products.platform, "system", lambda: "Windows")
    monkeypatch.setattr(products.platform, "processor", lambda: name)
    assert products.cpu_vendor() == want


@pytest.mark.filterwarnings("ignore:TF32")
def test_not_where_onednn_is_switched_off(monkeypatch):
    monkeypatch.setattr(products, "FASTER_ONEDNN", True)
    assert products.onednn_is_faster()
    with torch.backends.mkldnn.flags(enabled=False):
        assert not products.onednn_is_faster()


@pytest.mark.parametrize("backward", ["exact", "certified"])
@pytest.mark.parametrize("trained", [True, False], ids=["trained", "frozen"])
@pytest.mark.parametrize("options", [{}, {"softcap": 20.0, "temperature": 0.8}, {"workspace_mb": 0.3}], ids=str)
def test_gradients(library, backward, trained, options):
    """Rows that are no multiple of a block, a bias, LoRA where the head is trained."""
    hidden, weight, targets, bias = problems.head(150, 700, 48, torch.float32, bias=True, peak=8.0)
    targets[5] = -100
    leaves = [x.clone().requires_grad_() for x in ((hidden, weight, bias) if trained else (hidden,))]
    head = leaves[1:] if trained else [weight, bias]
    lora = (torch.randn(3, 48) / 9, torch.randn(700, 3) / 9, 0.5) if trained else None
    out = linear_logprobs(leaves[0], head[0], targets, head[1], lora=lora, backward=backward, tolerance=1e-4,
                          row_tolerance=0.01, **options).logprobs  # fmt: skip
    got = torch.autograd.grad(out.sum(), leaves)
    truth = [x.detach().double().requires_grad_() for x in leaves]
    head = truth[1:] if trained else [weight.double(), bias.double()]
    lora = lora and (lora[0].double(), lora[1].double(), lora[2])
    known = {key: x for key, x in options.items() if key != "workspace_mb"}
    logp = reference.linear_logprobs(truth[0], head[0], targets, head[1], lora=lora, **known).logprobs
    torch.testing.assert_close(out.double(), logp, rtol=1e-4, atol=1e-5)
    for mine, want in zip(got, torch.autograd.grad(logp.sum(), truth)):
        assert problems.relative_error(mine, want) < 1e-4


def test_a_loss_with_rows_of_infinity(library):
    """What is not finite stays with its row."""
    p = problems.batch(dtype=torch.float32)
    p["hidden"][0, 2] = torch.inf
    hidden = p.pop("hidden").requires_grad_()
    grpo_loss(hidden, **p).loss.backward()
    assert hidden.grad[1:].isfinite().all()


@needs_onednn
def test_deterministic(library):
    hidden, weight, targets, _ = problems.head(150, 700, 48, torch.float32, peak=8.0)
    runs = []
    for _ in range(2):
        leaves = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
        runs.append(torch.autograd.grad(linear_logprobs(*leaves, targets).logprobs.sum(), leaves))
    assert all(torch.equal(x, y) for x, y in zip(*runs))


@needs_onednn
@pytest.mark.parametrize(("trained", "most"), [(False, 0.75), (True, 0.6)], ids=["frozen", "trained"])
def test_its_plans_leave_entries_out(monkeypatch, trained, most):
    """Products are half as dear, so more is done whole; on logits as peaked as in RL not all."""
    monkeypatch.setattr(products, "FASTER_ONEDNN", True)
    p, counted = problem(1024, 8192, 32), []
    for backward in ("exact", "certified"):
        hidden, weight = p["hidden"].clone().requires_grad_(), p["weight"].clone().requires_grad_(trained)
        hint = {"old_logprobs": p["old_logprobs"], "row_tolerance": 1.0}
        with Gemms() as gemms:
            out = linear_logprobs(hidden, weight, p["targets"], backward=backward, **hint)
            out.logprobs.backward(p["upstream"])
        counted.append(gemms.products)
    assert counted[1] < most * counted[0]


@pytest.mark.parametrize("workspace_mb", [1, 4])
def test_the_workspace_holds_the_copies(library, workspace_mb):
    hidden, weight, targets, _ = problems.head(1000, 3000, 64, torch.float32, peak=8.0)
    weight.requires_grad_()
    out = linear_logprobs(hidden, weight, targets, backward="exact", workspace_mb=workspace_mb).logprobs
    with Live() as live:
        out.sum().backward()
    assert live.peak <= workspace_mb * 2**20 + 4 * weight.numel() + 64 * len(hidden)


def test_tiles_of_whole_blocks(library):
    """Rows that fill the last block up are NOTHING, whoever made the tile."""
    hidden, weight, targets, _ = problems.head(150, 700, 48, torch.float32)
    params = HeadParams(0.5, None, 1.0, torch.float32, False, "torch", 2**22)
    problem = HeadProblem(hidden[None], weight, None, targets, None, params)
    for tile in LogitTiles(problem, torch.arange(150), 2, multiple=128):
        assert tile.z.shape[0] == 256
        assert problems.relative_error(tile.z[:150], 2 * hidden.double() @ weight[tile.chunk.span].double().T) < 1e-6
        assert (tile.z[150:] == NOTHING).all()


def test_a_divergence_is_exact_where_products_are_fast(library):
    """Its passes over the terms would cost more than the products they save."""
    a = profiles.problem(300, 4200, 256)
    teacher = a["hidden"] + torch.randn(300, 256) / 4
    gradients = []
    for backward in ("exact", "auto", "certified"):
        hidden = a["hidden"].clone().requires_grad_()
        value = linear_divergence(hidden, a["weight"], teacher, a["weight"], backward=backward, tolerance=0.005)
        gradients += torch.autograd.grad(value.divergence.sum(), hidden)
    exact, auto, certified = gradients
    assert torch.equal(auto, exact if library else certified)
    assert 0 < problems.relative_error(certified, exact) < 0.005

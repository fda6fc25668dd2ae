"""What trainers log of each token's distribution: against fp64 logits, by definition."""

import pytest
import torch

from fastgrpo import diagnostics, linear_logprobs, reference
from fastgrpo.diagnostics import NAMES, token_diagnostics

import problems
from watchers import Largest

pytestmark = pytest.mark.quick

OPTIONS = {
    "plain": {}, "scale and temperature": {"logit_scale": 0.3, "temperature": 0.7}, "softcap": {"softcap": 2.0},
    "all": {"softcap": 3.0, "logit_scale": 2.0, "temperature": 1.3},
}  # fmt: skip


def by_definition(hidden, weight, targets, bias, options):
    z = reference.logits(hidden.double(), weight.double(), None if bias is None else bias.double(), **options)
    return (2 * z.log_softmax(-1)).logsumexp(-1), z.mean(-1), z.argmax(-1) == targets


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("bias", [False, True])
def test_by_definition(name, dtype, bias):
    """In one tile and in many (a workspace of 16 KiB), for every choice of outputs."""
    hidden, weight, targets, bias = problems.head(37, 211, 16, dtype, bias=bias, peak=4.5)
    targets[::5] = -100
    want = by_definition(hidden, weight, targets, bias, OPTIONS[name])
    counted = targets != -100
    assert 5 < want[2].sum() < counted.sum() - 5
    for workspace in (128, 2**-6):
        for outputs in (NAMES, *((n,) for n in NAMES)):
            found = token_diagnostics(
                hidden, weight, targets, bias, **OPTIONS[name], outputs=outputs, workspace_mb=workspace
            )
            for kind, mine, value in zip(NAMES, found, want):
                if kind not in outputs:
                    assert mine is None
                    continue
                assert not mine[~counted].any()
                if kind == "is_top1":
                    assert mine.equal(value & counted)
                else:
                    tiny = 1e-12 if dtype == torch.float64 else 1e-5
                    torch.testing.assert_close(mine[counted].double(), value[counted], rtol=tiny, atol=tiny)


def test_of_equal_logits_the_first_counts():
    """In one tile and across tiles; whole numbers, so that equal rows give equal logits."""
    weight = torch.zeros(40, 4)
    weight[[3, 5, 33]] = torch.tensor([1.0, 2.0, 0.0, 1.0])
    hidden = torch.tensor([[1.0, 1.0, 0.0, 0.0]]).expand(4, 4)
    targets = torch.tensor([3, 5, 33, 7])
    for workspace in (128, 2**-9):
        found = token_diagnostics(hidden, weight, targets, outputs=["is_top1"], workspace_mb=workspace).is_top1
        assert found.tolist() == [True, False, False, False]
    out = linear_logprobs(hidden, weight, targets, return_entropy=True)
    known = token_diagnostics(hidden, weight, targets, outputs=["is_top1"], logprobs=out.logprobs, entropy=out.entropy)
    assert known.is_top1.equal(found)


@pytest.mark.parametrize("with_entropy", [True, False])
def test_known_log_probs_settle_most_tokens(monkeypatch, with_entropy):
    """Neither a likely token nor a very unlikely one needs a GEMM, and the result is the same."""
    hidden, weight, targets, _ = problems.head(400, 211, 16, torch.float32, peak=4.0)
    targets[200:] = torch.randint(0, 211, (200,))
    want = token_diagnostics(hidden, weight, targets, outputs=["is_top1"]).is_top1
    out = linear_logprobs(hidden, weight, targets, return_entropy=True, temperature=0.5)
    visited, plain = [], diagnostics.scan
    monkeypatch.setattr(diagnostics, "scan", lambda p, rows, *a: visited.append(rows.numel()) or plain(p, rows, *a))
    found = token_diagnostics(
        hidden, weight, targets, temperature=0.5, outputs=["is_top1"], logprobs=out.logprobs,
        entropy=out.entropy if with_entropy else None,
    )  # fmt: skip
    assert found.is_top1.equal(want)
    assert 20 < want.sum() < 380
    assert 0 < sum(visited) < (200 if with_entropy else 370)


def test_shape_and_gradient():
    hidden, weight, targets, _ = problems.head(12, 31, 8, torch.float32)
    flat = token_diagnostics(hidden.requires_grad_(), weight, targets)
    batch = token_diagnostics(hidden.view(3, 4, 8), weight, targets.view(3, 4))
    for a, b in zip(flat, batch):
        assert not a.requires_grad
        assert b.shape == (3, 4)
        assert a.equal(b.view(-1))


def test_a_bad_row_stays_its_own():
    hidden, weight, targets, _ = problems.head(12, 31, 8, torch.float32, peak=5.0)
    want = token_diagnostics(hidden, weight, targets)
    hidden[4] = torch.nan
    found = token_diagnostics(hidden, weight, targets)
    assert not found.is_top1[4]
    assert found.mean_logits[4].isnan()
    others = torch.arange(12) != 4
    for a, b in zip(found, want):
        torch.testing.assert_close(a[others], b[others])


def test_no_tensor_beyond_the_workspace():
    hidden, weight, targets, _ = problems.head(512, 4096, 16, torch.bfloat16)
    with Largest() as seen:
        token_diagnostics(hidden, weight, targets, softcap=5.0, workspace_mb=1)
    assert seen.numel <= max(2**20 // 4, weight.numel(), hidden.numel())


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"outputs": ["top1"]}, "outputs must be among log_sum_sq_probs, mean_logits, is_top1, got top1"),
        ({"temperature": 0.0}, "temperature must be > 0"),
        ({"softcap": -1.0}, "softcap must be > 0"),
        ({"logit_scale": float("nan")}, "logit_scale must be a finite number"),
        ({"workspace_mb": 0}, "workspace_mb must be > 0"),
        ({"logprobs": torch.zeros(3)}, "logprobs must have the shape"),
        ({"targets": torch.full((12,), 31)}, "targets must be in"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_bad_input(options, text):
    hidden, weight, targets, _ = problems.head(12, 31, 8, torch.float32)
    with pytest.raises(ValueError, match=text):
        token_diagnostics(**{"hidden": hidden, "weight": weight, "targets": targets, **options})

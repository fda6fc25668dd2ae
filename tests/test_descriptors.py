"""Tiles that come by tensor descriptors (TMA), and what the device reads back of its flags: in the interpreter."""

import pytest
import torch

from bench import profiles
from fastgrpo import linear_logprobs, reference

pytest.importorskip("triton")

from fastgrpo.kernels import arguments, report, tiles

from watchers import Watched


@pytest.fixture
def described(monkeypatch):
    """As if the device copied tiles; -> the launches that were given descriptors."""
    seen = []

    def look(name, given):
        if any(k.endswith("_desc") and x is not None for k, x in given.items()):
            seen.append(name)

    monkeypatch.setattr(tiles, "has_descriptors", lambda device, kernel: True)
    with report.replaced(lambda kernel: Watched(kernel, look)):
        yield seen


CASES = {
    "plain": {},
    "frozen": {"frozen": True},
    "bias, softcap": {"bias": True, "softcap": 20.0},
    "chunks": {"workspace_mb": 0.2},
    "frozen, chunks": {"frozen": True, "workspace_mb": 0.2},
    "one row": {"n": 1},
}


@pytest.mark.parametrize("backward", ["exact", "certified"])
@pytest.mark.parametrize("case", CASES)
def test_gradients(described, device, case, backward):
    """V is no multiple of a panel, D none of a step: what lies beyond is garbage, or zeros that must not count."""
    options = dict(CASES[case])
    n, vocab, depth = options.pop("n", 150), 1000, 80
    frozen, with_bias = options.pop("frozen", False), options.pop("bias", False)
    p = profiles.problem(n, vocab, depth, "rl", dtype=torch.bfloat16)
    p["targets"][5::7] = -100
    p |= {"bias": torch.randn(vocab).bfloat16() if with_bias else None}

    def run(function, dtype, **keywords):
        hidden, weight = (p[k].to(device, dtype).requires_grad_() for k in ("hidden", "weight"))
        weight.requires_grad_(not frozen)
        bias = None if p["bias"] is None else p["bias"].to(device, dtype).requires_grad_(not frozen)
        leaves = [x for x in (hidden, weight, bias) if x is not None and x.requires_grad]
        softcap = {k: options[k] for k in ("softcap",) if k in options}
        logp = function(hidden, weight, p["targets"].to(device), bias, **softcap, **keywords).logprobs
        return logp.detach(), *torch.autograd.grad(logp, leaves, p["upstream"].to(device, logp.dtype))

    workspace = {k: options[k] for k in ("workspace_mb",) if k in options}
    hint = {"old_logprobs": p["old_logprobs"].to(device)} if backward == "certified" else {}
    ours = run(linear_logprobs, torch.bfloat16, backend="triton", backward=backward, **workspace, **hint)
    truth = run(reference.linear_logprobs, torch.float64)
    assert (ours[0] - truth[0]).abs().max() < 1e-5 * (1 + truth[0].abs().max())
    for got, want in zip(ours[1:], truth[1:]):
        assert (got.double() - want).norm() < 5e-3 * want.norm()
    made_in_forward = frozen and backward == "exact" and not with_bias
    wanted = {"masses_kernel"} if made_in_forward else {"forward_kernel", "dlogits_kernel"}
    assert wanted | {"dhidden_kernel"} <= set(described)
    assert frozen or "dweight_kernel" in described


@pytest.mark.quick
def test_what_descriptors_cannot_read(described, device):
    """Rows of 16-bit numbers that are no multiple of 16 bytes, and other dtypes, come by pointers."""
    p = profiles.problem(20, 300, 36, "rl", dtype=torch.bfloat16)
    for depth, dtype in ((36, torch.bfloat16), (32, torch.float32)):
        hidden, weight = (p[k][:, :depth].to(device, dtype).contiguous().requires_grad_() for k in ("hidden", "weight"))
        linear_logprobs(hidden, weight, p["targets"].to(device), backend="triton").logprobs.sum().backward()
        assert hidden.grad.isfinite().all()
    assert described == []
    x = torch.zeros(8, 64, dtype=torch.bfloat16, device=device)
    assert arguments.describable("dweight", x.device, torch.bfloat16, x)
    for other in (x.t(), x[:, 1:], x[:, ::2], x.float()):
        assert not arguments.describable("dweight", x.device, torch.bfloat16, x, other)


@pytest.mark.quick
def test_flags_are_laid_out_alike_however_operands_are_read():
    wide, narrow = tiles.Tile(128, 256, 64, 8, 3), tiles.Tile(128, 64, 64, 8, 3)
    for architecture in (name for name, kernels in tiles.DESCRIBED.items() if "forward_certified" in kernels):
        tiles.check_table(dict.fromkeys([(f"forward_certified{x}", 2, True) for x in ("", "_full")]), architecture)
        tiles.check_table({("forward_certified", 2, True): wide}, architecture)
        with pytest.raises(ValueError, match="must not depend"):
            tiles.check_table({("forward_certified", 2, True): narrow}, architecture)


@pytest.mark.quick
@pytest.mark.parametrize("n", [33, 130])
def test_rows_beyond_the_last_are_not_read(device, n):
    """A panel holds 128 rows whatever N is; those that are not there are zeros, also through a softcap."""
    p = profiles.problem(n, 300, 32, "rl", dtype=torch.float32)
    hidden, weight = (p[k].to(device).requires_grad_() for k in ("hidden", "weight"))
    for backward in ("exact", "certified"):
        out = linear_logprobs(
            hidden, weight, p["targets"].to(device), softcap=20.0, backend="triton", backward=backward
        ).logprobs
        grads = torch.autograd.grad(out.sum(), (hidden, weight))
        assert all(g.isfinite().all() and g.count_nonzero() for g in grads)

"""Sampling-support replay against full logits with everything else masked out, in fp64."""

import itertools

import pytest
import torch

from fastgrpo import GRPOLossConfig, grpo_loss, linear_logprobs, reference

import problems
from watchers import Largest, NoSync, forbid_lists

NAMES = ("hidden", "weight", "bias")
SHAPES = [(33, 200, 40), (17, 211, 300), (5, 1, 8)]  # dW has a program for each entry of the vocabulary
EVERYTHING = {"temperature": "tensor", "softcap": 5.0, "logit_scale": 0.5, "return_entropy": True}


def kept_sets(targets, vocab, most=9, seed=0):
    """(token_ids, offsets): up to ``most`` random ids and the target; none where the target is ignored."""
    g = torch.Generator().manual_seed(seed)
    sets = []
    for target in targets.flatten().tolist():
        extra = torch.randint(0, vocab, (int(torch.randint(0, most + 1, (), generator=g)),), generator=g)
        sets.append(torch.unique(torch.cat((extra, torch.tensor([target])))) if target >= 0 else extra[:0])
    offsets = torch.tensor([0] + [len(s) for s in sets]).cumsum(0)
    return torch.cat(sets).to(targets.device), offsets.to(targets.device)


def make(n, vocab, depth, dtype=torch.float32, device="cpu"):
    """-> tensors by name, targets, support."""
    hidden, weight, targets, bias = problems.head(n, vocab, depth, dtype, device, bias=True)
    if n > 2:
        targets[1] = -100
    return dict(zip(NAMES, (3 * hidden, weight, bias))), targets, kept_sets(targets, vocab)


def run(op, tensors, targets, support, needs=NAMES, temperature=1.0, **options):
    """-> log-probs, entropy, gradients by name."""
    leaf = problems.with_grad(tensors, needs)
    if temperature == "tensor":
        temperature = torch.linspace(0.5, 1.5, len(targets), device=targets.device)
    out = op(leaf["hidden"], leaf["weight"], targets, leaf["bias"], support=support, temperature=temperature, **options)
    total = (out.logprobs * torch.arange(1, len(targets) + 1, device=targets.device) / len(targets)).sum()
    if out.entropy is not None:
        total = total + (out.entropy * torch.arange(len(targets), 0, -1, device=targets.device) / len(targets)).sum()
    total.backward()
    return out.logprobs.detach(), out.entropy, {k: leaf[k].grad for k in needs}


@pytest.mark.parametrize(("softcap", "entropy"), list(itertools.product((None, 4.0), (False, True))))
def test_gradcheck(backend, device, softcap, entropy):
    n, vocab, depth = (6, 13, 4) if backend == "torch" else (10, 37, 7)  # in full mode every entry is moved, twice
    tensors, targets, support = make(n, vocab, depth, torch.float64, device)
    a, b = (torch.randn(*shape, dtype=torch.float64, device=device) for shape in ((2, depth), (vocab, 2)))

    def op(function, **options):
        def call(h, w, bias, a, b):
            out = function(
                h, w, targets, bias, support=support, lora=(a, b, 0.5), temperature=0.8, softcap=softcap,
                return_entropy=entropy, **options,
            )  # fmt: skip
            return tuple(x for x in out if x is not None)

        return call

    inputs = [*tensors.values(), a, b]
    if backend == "torch":
        assert torch.autograd.gradcheck(op(linear_logprobs), [x.requires_grad_() for x in inputs])
    else:
        fast, truth = op(linear_logprobs, backend=backend), op(reference.linear_logprobs)
        problems.gradcheck(fast, truth, inputs, torch.float32, atol=2e-5, rtol=2e-5, fast_mode=True)


@pytest.mark.parametrize("megabytes", [128, 0.01])
@pytest.mark.parametrize("options", [{}, EVERYTHING], ids=["plain", "everything"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_fp32_against_fp64(backend, device, shape, options, megabytes):
    tensors, targets, support = make(*shape, device=device)
    logp, entropy, grads = run(
        linear_logprobs, tensors, targets, support, backend=backend, workspace_mb=megabytes, **options
    )
    want = run(reference.linear_logprobs, {k: v.double() for k, v in tensors.items()}, targets, support, **options)
    torch.testing.assert_close(logp.double(), want[0], rtol=2e-6, atol=2e-6)
    if entropy is not None:
        torch.testing.assert_close(entropy.double(), want[1], rtol=2e-6, atol=2e-6)
    for name in NAMES:
        error = problems.relative_error(grads[name], want[2][name])
        assert error < 2e-6 or want[2][name].norm() < 1e-9, (name, error)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bit(backend, device, dtype):
    tensors, targets, support = make(60, 500, 64, dtype, device)
    logp, _, grads = run(linear_logprobs, tensors, targets, support, backend=backend)
    want = run(reference.linear_logprobs, {k: v.double() for k, v in tensors.items()}, targets, support)
    naive = run(reference.linear_logprobs, tensors, targets, support)
    assert (logp - want[0]).abs().max() < 1e-5
    for name in NAMES:
        mine, theirs = (problems.relative_error(g[name], want[2][name]) for g in (grads, naive[2]))
        assert mine < 2 * theirs, (name, mine, theirs)


def test_a_narrow_head_does_not_round_a_wide_gradient(backend, device):
    tensors, targets, support = make(20, 90, 16, device=device)
    tensors["weight"] = tensors["weight"].bfloat16()
    got = run(linear_logprobs, tensors, targets, support, backend=backend)[2]
    want = run(linear_logprobs, {**tensors, "weight": tensors["weight"].float()}, targets, support, backend=backend)[2]
    torch.testing.assert_close(got["hidden"], want["hidden"])


@pytest.mark.quick
def test_the_whole_vocabulary_is_the_plain_op(backend, device):
    tensors, targets, _ = make(12, 40, 16, device=device)
    every = torch.arange(40, device=device).repeat(12), torch.arange(13, device=device) * 40
    got = run(linear_logprobs, tensors, targets, every, backend=backend, return_entropy=True)
    want = run(linear_logprobs, tensors, targets, None, backend=backend, return_entropy=True)
    torch.testing.assert_close(got[:2], want[:2])
    for name in NAMES:
        torch.testing.assert_close(got[2][name], want[2][name])


def test_only_the_kept_columns_are_touched(backend, device):
    tensors, targets, support = make(12, 400, 16, device=device)
    want = run(linear_logprobs, tensors, targets, support, backend=backend)
    other = torch.ones(400, dtype=torch.bool, device=device)
    other[support[0]] = False
    tensors["weight"][other] = torch.nan
    tensors["hidden"][1] = torch.nan  # ignored
    got = run(linear_logprobs, tensors, targets, support, backend=backend)
    assert torch.equal(got[0], want[0])
    for name in NAMES:
        assert torch.equal(got[2][name], want[2][name])
    assert got[2]["weight"][other].count_nonzero() == 0


@pytest.mark.quick
def test_an_ignored_position_may_list_anything(backend, device):
    """Its ids are not looked at, and nothing is read for them."""
    tensors, targets, (ids, offsets) = make(12, 400, 16, device=device)
    want = run(linear_logprobs, tensors, targets, (ids, offsets), backend=backend)
    junk = torch.tensor([-1, -1, 999, 7], device=device)
    at = int(offsets[2])
    longer = torch.cat((ids[:at], junk, ids[at:])), offsets + 4 * (torch.arange(13, device=device) > 1)
    tensors["hidden"][1] = torch.nan
    got = run(linear_logprobs, tensors, targets, longer, backend=backend)
    torch.testing.assert_close(got[0], want[0])
    for name in NAMES:
        torch.testing.assert_close(got[2][name], want[2][name])


def test_no_logits(backend, device):
    tensors, targets, support = make(256, 1024, 8, device=device)
    with Largest() as seen:
        run(linear_logprobs, tensors, targets, support, backend=backend)
    assert seen.numel <= 4 * 1024 * 8  # the interpreter counts in bytes


@pytest.mark.parametrize("shape", ["padded", "packed"])
def test_loss(backend, device, shape):
    """Masked and ignored positions need no kept ids; advantages of zero and the mask still work."""
    arguments = problems.batch()
    arguments["targets"] = torch.where(arguments["mask"] == 0, -100, arguments["targets"])
    arguments = problems.pack(arguments) if shape == "packed" else arguments
    support = kept_sets(arguments["targets"], 53)
    config = GRPOLossConfig(beta=0.1, entropy_coef=0.05)
    results = []
    for op, dtype, extra in (
        (grpo_loss, torch.float32, {"backend": backend}),
        (reference.grpo_loss, torch.float64, {}),
    ):
        leaf = problems.with_grad({k: problems.cast(v, dtype, device) for k, v in arguments.items()})
        loss = op(config=config, support=tuple(x.to(device) for x in support), **leaf, **extra).loss
        loss.backward()
        results.append((loss.detach(), leaf["hidden"].grad, leaf["weight"].grad, leaf["bias"].grad))
    for mine, want in zip(*results):
        assert problems.relative_error(mine, want) < 2e-6


def test_skipped_tokens_keep_their_sets(device):
    """Tokens of zero advantage skip the forward; their kept sets are passed over."""
    arguments = {k: problems.cast(v, torch.float32, device) for k, v in problems.batch().items()}
    support = kept_sets(arguments["targets"], 53)
    losses = [grpo_loss(support=support, return_logprobs=r, **arguments).loss for r in (True, False)]
    torch.testing.assert_close(*losses)


def test_deterministic(backend, device):
    tensors, targets, support = make(33, 100, 40, device=device)
    first, second = (run(linear_logprobs, tensors, targets, support, backend=backend) for _ in range(2))
    assert torch.equal(first[0], second[0])
    assert all(torch.equal(first[2][k], second[2][k]) for k in NAMES)


def test_the_host_does_not_wait(device, monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setattr("fastgrpo.inputs.checks_values", lambda device: False)
    tensors, targets, support = make(20, 90, 16, device=device)
    forbid_lists(monkeypatch)
    with NoSync():
        run(linear_logprobs, tensors, targets, support, backend="triton", return_entropy=True)


IDS, OFFSETS = torch.tensor([0, 3, 1, 2, 4]), torch.tensor([0, 2, 3, 5])  # of targets 0, 1, 2
ERRORS = {
    "no tuple": (IDS, r"support must be a tuple \(token_ids, offsets\), got Tensor"),
    "float ids": ((IDS.float(), OFFSETS), "support token_ids must be an integer tensor"),
    "2d ids": ((IDS[None], OFFSETS), r"support token_ids must be flat, \(K,\), got shape \(1, 5\)"),
    "offsets": ((IDS, OFFSETS[1:]), r"support offsets must have shape \(4,\) for 3 targets, got \(3,\)"),
    "falling": ((IDS, torch.tensor([0, 3, 2, 5])), "support offsets must rise from 0 to K = 5"),
    "short": ((IDS, torch.tensor([0, 2, 3, 4])), "support offsets must rise from 0 to K = 5"),
    "high": ((torch.tensor([0, 50, 1, 2, 4]), OFFSETS), r"support token_ids must be in \[0, 50\).*position 0"),
    "twice": ((torch.tensor([0, 3, 1, 2, 2]), OFFSETS), "support token_ids must not repeat.*position 2"),
    "no target": ((torch.tensor([0, 3, 7, 2, 4]), OFFSETS), "support token_ids must hold the target.*position 1"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors(name):
    support, text = ERRORS[name]
    with pytest.raises(ValueError, match=text):
        linear_logprobs(torch.ones(3, 8), torch.ones(50, 8), torch.arange(3), support=support)


def test_what_has_no_meaning_with_support():
    with pytest.raises(ValueError, match="backward must be 'auto' or 'exact' with support"):
        linear_logprobs(
            torch.ones(3, 8), torch.ones(50, 8), torch.arange(3), support=(IDS, OFFSETS), backward="certified"
        )
    with pytest.raises(ValueError, match="support token_ids must be empty without targets, got 5"):
        linear_logprobs(torch.ones(0, 8), torch.ones(50, 8), torch.arange(0), support=(IDS, torch.zeros(1).long()))


@pytest.mark.parametrize(("name", "bad"), [("high", 0), ("twice", 2), ("no target", 1)])
def test_what_only_the_device_sees_is_nan(backend, device, name, bad, monkeypatch):
    monkeypatch.setattr("fastgrpo.inputs.checks_values", lambda device: False)
    support = [x.to(device) for x in ERRORS[name][0]]
    targets = torch.arange(3, device=device)
    logp = linear_logprobs(
        torch.randn(3, 8, device=device), torch.randn(50, 8, device=device), targets, support=support, backend=backend
    ).logprobs
    assert logp.isnan().tolist() == [i == bad for i in range(3)]


@pytest.mark.parametrize("name", ["falling", "short"])
def test_offsets_that_are_none_give_nan_everywhere(backend, device, name, monkeypatch):
    monkeypatch.setattr("fastgrpo.inputs.checks_values", lambda device: False)
    support = [x.to(device) for x in ERRORS[name][0]]
    hidden, weight = torch.randn(3, 8, device=device), torch.randn(50, 8, device=device)
    out = linear_logprobs(hidden, weight, torch.arange(3, device=device), support=support, backend=backend)
    assert out.logprobs.isnan().all()

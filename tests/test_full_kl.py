"""kl_estimator="full": the KL term of whole distributions, in every loss type."""

import pytest
import torch

from fastgrpo import GRPOLossConfig, grpo_loss, reference, strategies
from fastgrpo.config import IMPORTANCE_SAMPLING_LEVELS, LOSS_TYPES

import problems


def arguments(device="cpu", dtype=torch.float64, depth=12, own_head=True):
    given = problems.batch(dtype=dtype, device=device)
    del given["ref_logprobs"]
    g = torch.Generator().manual_seed(5)
    shape = (*given["targets"].shape, depth if own_head else given["hidden"].shape[-1])
    given["ref_hidden"] = torch.randn(*shape, generator=g, dtype=torch.float64).to(device, dtype)
    if own_head:
        given["ref_weight"] = torch.randn(53, depth, generator=g, dtype=torch.float64).to(device, dtype) / 3
    return given


def run(op, config, given, **options):
    leaf = problems.with_grad(given)
    result = op(config=config, **leaf, **options)
    result.loss.backward()
    return result, [leaf[k].grad for k in ("hidden", "weight", "bias")]


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
@pytest.mark.parametrize("level", IMPORTANCE_SAMPLING_LEVELS)
def test_against_full_logits(loss_type, level):
    for own_head, pack, corrected in ((True, False, True), (False, True, False)):
        config = GRPOLossConfig(
            loss_type=loss_type, importance_sampling_level=level, kl_estimator="full", beta=0.3,
            use_bias_correction_kl=corrected, max_completion_length=9, temperature=0.8,
        )  # fmt: skip
        given = arguments(own_head=own_head)
        given = problems.pack(given) if pack else given
        result, grads = run(grpo_loss, config, given)
        expected, truth = run(reference.grpo_loss, config, given)
        torch.testing.assert_close(result.loss, expected.loss, rtol=1e-11, atol=1e-11)
        for mine, want in zip(grads, truth):
            torch.testing.assert_close(mine, want, rtol=1e-9, atol=1e-11)


@pytest.mark.quick
def test_backends_and_metrics(backend, device):
    config = GRPOLossConfig(kl_estimator="full", beta=0.3, entropy_coef=0.01)
    given = arguments(device, torch.float32)
    result, grads = run(grpo_loss, config, given, backend=backend, softcap=8.0)
    _, truth = run(reference.grpo_loss, config, {k: problems.cast(v, torch.float64) for k, v in given.items()},
                   softcap=8.0)  # fmt: skip
    assert all(problems.relative_error(mine, want) < 1e-5 for mine, want in zip(grads, truth))
    plain = reference.linear_divergence(
        given["hidden"], given["weight"], given["ref_hidden"], given["ref_weight"], bias=given["bias"], softcap=8.0,
        teacher_softcap=8.0,
    )  # fmt: skip
    counted = given["mask"] != 0
    assert float(result.metrics["kl_sum"]) == pytest.approx(float(plain.divergence[counted].sum()), rel=1e-5)
    assert result.metrics["active_tokens"] == counted.sum() == result.metrics["measured_tokens"]


def test_no_advantage_still_pulls_to_the_reference():
    """Tokens without an advantage have the KL's gradient, also where their log-probs are not wanted."""
    config = GRPOLossConfig(kl_estimator="full", beta=0.3)
    given = arguments() | {"advantages": torch.zeros(4, dtype=torch.float64)}
    (_, some), (_, all_of_them) = (run(grpo_loss, config, given, return_logprobs=x) for x in (False, True))
    for mine, want in zip(some, all_of_them):
        assert want.norm() > 0
        torch.testing.assert_close(mine, want)


def test_gradient_is_the_sampled_estimators_mean_without_its_variance():
    """k3 with its bias correction, over 20000 draws of the policy at one position: the same mean; "full" is that."""
    draws, vocab, depth = 20000, 31, 6
    hidden, weight, _, _ = problems.head(1, vocab, depth)
    others = hidden + 0.5 * torch.randn(1, depth, dtype=torch.float64)
    policy = (hidden @ weight.T).softmax(-1)
    targets = torch.multinomial(policy[0], draws, replacement=True)[:, None]
    ref = (others @ weight.T).log_softmax(-1)[0, targets]
    rows = hidden.expand(draws, 1, depth)

    def gradient(kl_estimator, **given):
        leaf = rows.clone().requires_grad_()
        config = GRPOLossConfig(kl_estimator=kl_estimator, beta=1.0)
        loss = grpo_loss(leaf, weight, targets, torch.zeros(draws, dtype=torch.float64), config, **given).loss
        return torch.autograd.grad(loss * draws, leaf)[0][:, 0]

    sampled = gradient("k3", ref_logprobs=ref)
    full = gradient("full", ref_hidden=others.expand(draws, 1, depth))
    error = sampled.std(0) / draws**0.5
    assert full.std(0).max() < 1e-12 < error.min()
    assert ((sampled.mean(0) - full[0]).abs() < 4 * error).all()
    assert (sampled.std(0) > 0.5 * full[0].abs()).all()  # what one draw is worth


@pytest.mark.parametrize("bw", ["certified", "exact"])
def test_old_logprobs_are_its_hint(bw, monkeypatch):
    seen, plain = [], strategies.DivergingCertified.forward

    def forward(problem, backend, given):
        seen.append(given)
        return plain(problem, backend, given)

    monkeypatch.setattr(strategies.DivergingCertified, "forward", staticmethod(forward))
    given = arguments()
    given["mask"][0, 1] = 0
    config = GRPOLossConfig(kl_estimator="full", beta=0.3)
    result, grads = run(grpo_loss, config, given, backend="torch", backward=bw)
    expected, truth = run(reference.grpo_loss, config, given)
    torch.testing.assert_close(result.loss, expected.loss, rtol=1e-11, atol=1e-11)
    assert all(problems.relative_error(mine, want) < 0.005 for mine, want in zip(grads, truth))
    if bw == "exact":
        assert not seen
        return
    torch.testing.assert_close(seen[0].hint, given["old_logprobs"].flatten().double())
    assert torch.equal(seen[0].entries[0], given["targets"].flatten())


@pytest.mark.parametrize(
    ("settings", "change", "message"),
    [
        ({"kl_estimator": "full"}, {"ref_hidden": None}, "ref_hidden must be given for beta > 0 with kl_estimator"),
        ({"kl_estimator": "k3"}, {}, "ref_hidden is read with kl_estimator='full' alone, got it with 'k3'"),
        (
            {"kl_estimator": "full"},
            {"ref_hidden": torch.zeros(4, 6, 12).double()},
            "ref_hidden must have the positions",
        ),
        (
            {"kl_estimator": "full"},
            {"ref_weight": torch.zeros(52, 12).double()},
            r"ref_weight must be \(V, D_t\) = \(53, 12\)",
        ),
        ({"kl_estimator": "full"}, {"support": (torch.zeros(1), torch.zeros(2))}, "of the whole vocabulary, got supp"),
    ],
)
def test_refused(settings, change, message):
    with pytest.raises(ValueError, match=message):
        grpo_loss(**(arguments() | change), config=GRPOLossConfig(beta=0.1, **settings))

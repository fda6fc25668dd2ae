"""Every objective against TRL's own ``_compute_loss``, run as it stands on the same log-probs."""

import collections
from types import SimpleNamespace

import pytest
import torch

from fastgrpo import GRPOLossConfig, group_advantages, grpo_loss, reference
from fastgrpo.config import CLIPPED, LOSS_TYPES

import problems

trl = pytest.importorskip("trl", minversion="1.16.0")
GRPOTrainer = pytest.importorskip("trl.trainer.grpo_trainer").GRPOTrainer

STEPS_PER_GENERATION, ACCUMULATION = 4, 2


class Accelerator:
    """One process: gathering and reducing change nothing."""

    num_processes, is_main_process, sync_gradients = 1, True, True

    def gather(self, x):
        return x

    def pad_across_processes(self, x, **_):
        return x

    def reduce(self, x, reduction):
        return x


def trl_loss(config, arguments, logp, entropy):
    """TRL 1.16's loss for these log-probs, and the metrics it logs."""
    args = SimpleNamespace(
        delta=config.delta, use_bias_correction_kl=config.use_bias_correction_kl,
        steps_per_generation=STEPS_PER_GENERATION,
        **{k: getattr(config, k) for k in vars(config) if k.startswith(("sapo_", "vespo_"))},
    )  # fmt: skip
    trainer = SimpleNamespace(
        args=args, loss_type=config.loss_type, beta=config.beta, epsilon_low=config.epsilon,
        epsilon_high=config.upper_epsilon, importance_sampling_level=config.importance_sampling_level,
        top_entropy_quantile=config.top_entropy_quantile, entropy_coef=config.entropy_coef,
        off_policy_mask_threshold=config.off_policy_mask_threshold, max_completion_length=config.max_completion_length,
        _entropy_bonus_enabled=config.entropy_coef != 0, use_adaptive_entropy=False, aux_loss_enabled=False,
        use_vllm="importance_weights" in arguments, vllm_importance_sampling_correction=True,
        current_gradient_accumulation_steps=ACCUMULATION, accelerator=Accelerator(),
        model=SimpleNamespace(training=True),
        _metrics={"train": collections.defaultdict(list)},
        _get_per_token_logps_and_entropies=lambda *a, **k: (logp, entropy, None),
        get_off_policy_mask=GRPOTrainer.get_off_policy_mask, get_gamma_weights=GRPOTrainer.get_gamma_weights,
    )  # fmt: skip
    trainer.get_high_entropy_mask = lambda e, m, q: GRPOTrainer.get_high_entropy_mask(trainer, e, m, q)
    completion = arguments["targets"]
    names = {
        "advantages": "advantages", "old_logprobs": "old_per_token_logps", "ref_logprobs": "ref_per_token_logps",
        "sampling_logprobs": "sampling_per_token_logps", "importance_weights": "importance_sampling_ratio",
    }  # fmt: skip
    inputs = {theirs: arguments[ours] for ours, theirs in names.items() if ours in arguments}
    ids, mask = completion[:, :1], torch.ones_like(completion[:, :1])
    inputs |= {"prompt_ids": ids, "prompt_mask": mask}
    inputs |= {"completion_ids": completion, "completion_mask": arguments["mask"]}
    inputs |= {"num_items_in_batch": torch.tensor(arguments["num_items"])}
    return GRPOTrainer._compute_loss(trainer, None, inputs), trainer._metrics["train"]


def compare(config, seed=0, without=(), token_advantages=False):
    arguments = problems.batch(seed=seed, token_advantages=token_advantages)
    lengths = arguments["mask"].sum(1)
    keep = lengths > 0  # TRL logs a per-sequence mean that an empty sequence turns into NaN
    arguments = {k: v[keep] if isinstance(v, torch.Tensor) and v.shape[:1] == keep.shape else v
                 for k, v in arguments.items() if k not in without}  # fmt: skip
    # Their importance ratios are 1 outside the mask; their normaliser spans the generation batch.
    if "importance_weights" in arguments:
        arguments["importance_weights"] = torch.where(arguments["mask"] > 0, arguments["importance_weights"], 1.0)
    mine, theirs = problems.with_grad(arguments), problems.with_grad(arguments)
    scale = 1 if config.loss_type in ("dapo", "cispo", "vespo") else ACCUMULATION
    window = arguments["num_items"] * ACCUMULATION / STEPS_PER_GENERATION
    ours = grpo_loss(config=config, **{**mine, "num_items": window})
    # The entropy bonus is divided by the accumulation steps whatever the loss type.
    out = reference.linear_logprobs(theirs["hidden"], theirs["weight"], theirs["targets"], theirs["bias"],
                                    temperature=config.temperature, return_entropy=True)  # fmt: skip
    expected, logged = trl_loss(config, arguments, out.logprobs, out.entropy)
    (ours.loss / scale).backward()
    expected.backward()
    rtol = 1e-6 if config.loss_type == "sapo" else 1e-9  # TRL holds SAPO's temperatures in fp32
    torch.testing.assert_close(ours.loss / scale, expected, rtol=rtol, atol=1e-12)
    for name in ("hidden", "weight", "bias"):
        torch.testing.assert_close(mine[name].grad, theirs[name].grad, rtol=10 * rtol, atol=10 * rtol * 1e-2)
    return ours.metrics, logged


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_loss_and_gradients(loss_type, level):
    for beta in (0.0, 0.1):
        for corrected in (True, False):
            config = GRPOLossConfig(
                loss_type=loss_type, importance_sampling_level=level, beta=beta, use_bias_correction_kl=corrected,
                epsilon_high=1.2 if loss_type == "cispo" else 0.28, max_completion_length=9,
            )  # fmt: skip
            compare(config)
            compare(config, seed=3, without=("importance_weights", "sampling_logprobs"))
            compare(config, seed=4, without=("old_logprobs", "sampling_logprobs"))
            compare(config, seed=5, token_advantages=True)


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_options(loss_type):
    for settings in ({"top_entropy_quantile": 0.3}, {"off_policy_mask_threshold": 0.05}, {"temperature": 0.6}):
        for level in ("token", "sequence"):
            compare(GRPOLossConfig(loss_type=loss_type, importance_sampling_level=level, max_completion_length=9,
                                   beta=0.05, **settings), seed=2)  # fmt: skip
    if loss_type in CLIPPED:
        compare(GRPOLossConfig(loss_type=loss_type, delta=1.15, max_completion_length=9))
        compare(GRPOLossConfig(loss_type=loss_type, delta=1.6, max_completion_length=9))


@pytest.mark.quick
@pytest.mark.parametrize("loss_type", ["grpo", "bnpo", "dr_grpo", "sapo", "luspo"])
def test_entropy_bonus(loss_type):
    compare(GRPOLossConfig(loss_type=loss_type, entropy_coef=0.05, max_completion_length=9))
    compare(GRPOLossConfig(loss_type=loss_type, entropy_coef=0.05, top_entropy_quantile=0.45, max_completion_length=9))


@pytest.mark.quick
def test_metrics():
    ours, theirs = compare(GRPOLossConfig(beta=0.1, epsilon=0.1, loss_type="grpo"))
    tokens = ours["tokens"].item()
    names = {"kl_sum": "kl", "entropy_sum": "entropy"}
    names |= {f"clip_{x}_sum": f"clip_ratio/{x}_mean" for x in ("low", "high", "region")}
    for mine, name in names.items():
        assert ours[mine].item() / tokens == pytest.approx(theirs[name][0], rel=1e-7), name
    assert ours["clip_region_sum"] > 0


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_advantages(scale):
    """The lines of ``_generate_and_score_completions`` that scale rewards, through TRL's own nanstd."""
    from trl.trainer.utils import nanstd

    rewards = torch.randn(24, dtype=torch.float64)
    rewards[5] = torch.nan
    rewards[8:16] = 0.7
    groups = rewards.view(-1, 8)
    centred = rewards - groups.nanmean(1).repeat_interleave(8)
    std = nanstd(groups, dim=1).repeat_interleave(8) if scale == "group" else nanstd(rewards)
    want = (centred if scale == "none" else centred / (std + 1e-4)).nan_to_num(nan=0.0)
    torch.testing.assert_close(group_advantages(rewards, 8, scale), want)

"""Advantages of answers over the other answers to their prompt: GRPO's, and those other papers put in their place."""

import math
from typing import Literal, get_args

import torch

from fastgrpo import inputs
from fastgrpo.checks import UserError

Scale = Literal["group", "batch", "none"]
Estimator = Literal["grpo", "rloo", "reinforce_plus_plus_baseline", "maxrl", "pass_at_k"]
Aggregation = Literal["sum_then_normalize", "normalize_then_sum"]
SCALES, ESTIMATORS, AGGREGATIONS = map(get_args, (Scale, Estimator, Aggregation))
OWN_SCALE = {"rloo": "none", "reinforce_plus_plus_baseline": "batch"}  # what a paper divides by, where it has a name
EPSILON = 1e-4  # TRL's, beside a standard deviation


def group_advantages(
    rewards: torch.Tensor,  # (B,) or (B, R)
    group_size: int = 8,
    scale: Scale = "group",
    *,
    estimator: Estimator = "grpo",
    aggregation: Aggregation = "sum_then_normalize",
    weights: torch.Tensor | None = None,  # (R,)
    pass_at_k: int = 4,
) -> torch.Tensor:
    """Advantage of each answer over its group; with the defaults ``(reward - group mean) / (std + 1e-4)``.

    Args:
        rewards: (B,) one reward an answer, or (B, R) one a reward function; answers to one prompt are neighbours. NaN
            means "cannot score": left out of its group's statistics; an answer with no score at all gets advantage 0.
        group_size: answers to a prompt; divides B.
        scale: "group" (sample standard deviation of the group), "batch" (of all rewards) or "none" (not divided). Of
            "grpo" alone: the other estimators, and "normalize_then_sum", bring their own.
        estimator: r is an answer's reward, m its group's mean:

            - "grpo": r - m, scaled (TRL 1.16, ``_generate_and_score_completions``; "none": Dr. GRPO, arXiv:2503.20783).
            - "rloo": r minus the mean of the group's other answers (Ahmadian et al., arXiv:2402.14740).
            - "reinforce_plus_plus_baseline": r - m, over the batch's standard deviation of r - m (Hu et al.,
              arXiv:2501.03262). Over answers: verl takes it over their tokens.
            - "maxrl": (r - m) / m for rewards >= 0, 0 where m is 0 (Tajwar et al., arXiv:2602.02710).
            - "pass_at_k": of all sets of ``pass_at_k`` answers of the group, each rewarded with its best one: the mean
              advantage of those the answer is in, over their standard deviation (Chen et al., arXiv:2508.10751, whose
              closed form for rewards 0 and 1 this is, for any reward).
        aggregation: of several rewards: "sum_then_normalize", or "normalize_then_sum": each normalised in its group,
            their weighted sum once more over the batch (GDPO, Liu et al., arXiv:2601.05242), with "grpo" alone.
        weights: of the reward functions, before they are summed; None: 1 each.
        pass_at_k: answers of a set, from 2 to ``group_size - 1``, read with "pass_at_k" alone.

    Returns:
        (B,) float32 (float64 for float64 rewards). Exactly 0 in a group whose rewards are all the same.

    Raises:
        ValueError, TypeError: naming the argument.
    """
    check_rewards(rewards, group_size, weights)
    check_method(scale, estimator, aggregation, pass_at_k, group_size)
    rewards = rewards.to(torch.promote_types(rewards.dtype, torch.float32))
    rewards = rewards[:, None] if rewards.ndim == 1 else rewards
    weights = rewards.new_ones(rewards.shape[1]) if weights is None else weights.to(rewards)
    if aggregation == "normalize_then_sum":
        return zero_if_unknown(decoupled(rewards, weights, group_size))
    groups = total(rewards, weights).view(-1, group_size)
    if estimator == "grpo":
        advantages = scaled(centre(groups), groups, scale)
    elif estimator == "reinforce_plus_plus_baseline":
        advantages = scaled(centre(groups), centre(groups), "batch")
    elif estimator == "pass_at_k":
        advantages = best_of_k(groups, pass_at_k)
    else:
        advantages = leave_one_out(groups) if estimator == "rloo" else over_mean(groups)
    return zero_if_unknown(advantages)


def has_spread(
    rewards: torch.Tensor,  # (B,) or (B, R)
    group_size: int,
    aggregation: Aggregation = "sum_then_normalize",
    weights: torch.Tensor | None = None,  # (R,)
) -> torch.Tensor:
    """(B / group_size,) bool: whether a group's rewards differ at all, so that something can be learnt from it."""
    rewards = rewards[:, None] if rewards.ndim == 1 else rewards
    weights = torch.ones(rewards.shape[1]) if weights is None else weights
    if aggregation == "sum_then_normalize":
        return differ(total(rewards, weights).view(-1, group_size))
    return differ(rewards.view(-1, group_size, rewards.shape[1])[..., weights != 0].transpose(1, 2)).any(1)


def check_rewards(rewards, group_size, weights):
    inputs.check_tensor("rewards", rewards)
    if rewards.ndim not in (1, 2):
        raise ValueError(f"rewards must be (B,) or (B, R), got shape {tuple(rewards.shape)}")
    if isinstance(group_size, bool) or not isinstance(group_size, int) or group_size < 1:
        raise ValueError(f"group_size must be a whole number >= 1, got {group_size!r}")
    if rewards.shape[0] % group_size:
        raise ValueError(
            f"group_size must divide the number of rewards, {rewards.shape[0]}, got {group_size} for rewards of shape "
            f"{tuple(rewards.shape)}, (B,) or (B, R)"
        )
    if inputs.checks_values(rewards.device) and rewards.isinf().any():
        raise ValueError("rewards must be finite or NaN (cannot score), got an infinite reward")
    if weights is not None:
        inputs.check_tensor("weights", weights)
        functions = rewards.shape[1] if rewards.ndim == 2 else 1
        if weights.shape != (functions,):
            raise ValueError(f"weights must have shape ({functions},), one a reward, got {tuple(weights.shape)}")


def check_method(scale, estimator, aggregation, pass_at_k, group_size, names=("scale", "estimator", "aggregation")):
    """Settings of an advantage, which a config checks too, by its own ``names``, before any reward is known."""
    for name, value, allowed in zip(names, (scale, estimator, aggregation), (SCALES, ESTIMATORS, AGGREGATIONS)):
        inputs.check_choice(name, value, allowed)
    if estimator != "grpo" and scale not in ("group", OWN_SCALE.get(estimator)):
        raise ValueError(f"{names[0]} must be left out with {estimator!r}, which has its paper's own, got {scale!r}")
    if aggregation == "normalize_then_sum" and (estimator, scale) != ("grpo", "group"):
        raise ValueError(
            f"{names[2]} 'normalize_then_sum' needs {names[1]} 'grpo' and {names[0]} 'group', "
            f"got {estimator!r} and {scale!r}"
        )
    if estimator == "pass_at_k" and not (isinstance(pass_at_k, int) and 2 <= pass_at_k < group_size):
        raise ValueError(f"pass_at_k must be from 2 to {group_size - 1}, one less than a group, got {pass_at_k!r}")


def total(rewards, weights):
    """(B,) weighted sums; NaN: no function can score."""
    weighted = rewards * weights.to(rewards)
    return torch.where(weighted.isnan().all(1), torch.nan, weighted.nansum(1))


def differ(x):
    """Over the last dimension: whether two values that are no NaN differ."""
    unknown = x.isnan()
    return x.masked_fill(unknown, -torch.inf).amax(-1) > x.masked_fill(unknown, torch.inf).amin(-1)


def centre(groups):
    """Minus the group's mean; exactly 0 where all are the same, which a rounded mean would not give."""
    centred = groups - groups.nanmean(-1, keepdim=True)
    return torch.where(differ(groups)[..., None] | centred.isnan(), centred, 0.0)


def scaled(centred, groups, scale):
    if scale == "none":
        return centred
    return centred / (nan_std(groups, 1 if scale == "group" else (0, 1)) + EPSILON)


def decoupled(rewards, weights, group_size):
    groups = rewards.view(-1, group_size, rewards.shape[1]).transpose(1, 2)  # (G, R, group_size)
    normalised = centre(groups) / (nan_std(groups, 2) + EPSILON)
    sums = total(normalised.transpose(1, 2).reshape(rewards.shape), weights)
    advantages = (sums - sums.nanmean()) / (nan_std(sums, 0) + EPSILON)
    spread = has_spread(rewards, group_size, "normalize_then_sum", weights)
    return torch.where(spread.repeat_interleave(group_size), advantages, 0.0)


def leave_one_out(groups):
    """r - (sum - r) / (n - 1) = (r - mean) n / (n - 1), which cancels less."""
    others = (~groups.isnan()).sum(1, keepdim=True).to(groups) - 1
    return centre(groups) * torch.where(others > 0, (others + 1) / others, torch.nan)


def over_mean(groups):
    if inputs.checks_values(groups.device) and (groups < 0).any():
        raise UserError(
            f"rewards must be >= 0 with 'maxrl', whose scale is their mean, got {groups.nan_to_num().min()}"
        )
    mean = groups.nanmean(1, keepdim=True)
    return torch.where(mean > 0, centre(groups) / mean, 0.0)


def best_of_k(groups, k):
    """Sorted, the j-th smallest of n rewards (from 0) is the best of C(j, k - 1) of the C(n, k) sets, and of
    C(j - 1, k - 2) of the C(n - 1, k - 1) that hold a given smaller one."""
    size = groups.shape[1]
    table = [[math.comb(j, c) for c in range(k + 1)] for j in range(size + 1)]
    ways = torch.tensor(table, dtype=torch.float64, device=groups.device)
    ordered, order = groups.double().sort(1)  # NaN comes last
    known, n = ordered.nan_to_num(), (~groups.isnan()).sum(1)
    j, all_sets, sets = torch.arange(size, device=groups.device), ways[n, k, None], ways[(n - 1).clamp(min=0), k - 1]
    best = torch.where(j < n[:, None], ways[j, k - 1], 0.0) / all_sets
    mean = (best * known).sum(1, keepdim=True)
    deviation = (best * (known - mean).square()).sum(1, keepdim=True).sqrt()
    beaten = known * torch.where(j < n[:, None], ways[(j - 1).clamp(min=0), k - 2] * (j > 0), 0.0)
    larger = beaten.flip(1).cumsum(1).flip(1) - beaten
    inside = (known * ways[j, k - 1] + larger) / sets[:, None]
    advantages = torch.where(differ(groups)[:, None] & (deviation > 0), (inside - mean) / deviation, 0.0)
    back = torch.empty_like(advantages).scatter_(1, order, advantages)
    return torch.where(groups.isnan(), torch.nan, back).to(groups.dtype)


def zero_if_unknown(advantages):
    return torch.where(advantages.isnan(), 0.0, advantages).reshape(-1)


def nan_std(x, dim):
    """Sample standard deviation without the NaNs; 0 where fewer than two values are left."""
    seen = ~x.isnan()
    count = seen.sum(dim, keepdim=True)
    squares = torch.where(seen, x - x.nanmean(dim, keepdim=True), 0.0).square().sum(dim, keepdim=True)
    return torch.sqrt(squares / (count - 1).clamp(min=1))

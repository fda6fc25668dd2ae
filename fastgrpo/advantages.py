"""Group-relative advantages."""

from typing import Literal, get_args

import torch

from fastgrpo import inputs

Scale = Literal["group", "batch", "none"]
SCALES = get_args(Scale)


def group_advantages(rewards: torch.Tensor, group_size: int = 8, scale: Scale = "group") -> torch.Tensor:
    """Advantage of each answer over its group: ``(reward - group mean) / (std + 1e-4)``.

    Args:
        rewards: (B,) one reward an answer, or (B, R) one a reward function, summed; answers to one prompt are
            neighbours. NaN means "cannot score": left out of its group's statistics; an answer with no score at
            all gets advantage 0.
        group_size: answers to a prompt; divides B.
        scale: "group" (sample standard deviation of the group), "batch" (of all rewards) or "none" (not divided).

    Returns:
        (B,) float32 (float64 for float64 rewards). Source: TRL 1.16, ``_generate_and_score_completions``.

    Raises:
        ValueError, TypeError: naming the argument.
    """
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
    inputs.check_choice("scale", scale, SCALES)
    if inputs.checks_values(rewards.device) and rewards.isinf().any():
        raise ValueError("rewards must be finite or NaN (cannot score), got an infinite reward")
    rewards = rewards.to(torch.promote_types(rewards.dtype, torch.float32))
    if rewards.ndim == 2:
        rewards = torch.where(rewards.isnan().all(1), torch.nan, rewards.nansum(1))
    groups = rewards.view(-1, group_size)
    centred = groups - groups.nanmean(1, keepdim=True)
    if scale != "none":
        deviation = nan_std(groups, 1) if scale == "group" else nan_std(groups, (0, 1))
        centred = centred / (deviation + 1e-4)
    return torch.where(centred.isnan(), 0.0, centred).reshape(-1)


def nan_std(x, dim):
    """Sample standard deviation without the NaNs; 0 where fewer than two values are left."""
    seen = ~x.isnan()
    count = seen.sum(dim, keepdim=True)
    squares = torch.where(seen, x - x.nanmean(dim, keepdim=True), 0.0).square().sum(dim, keepdim=True)
    return torch.sqrt(squares / (count - 1).clamp(min=1))

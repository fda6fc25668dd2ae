"""The numbers of a step, over the answers of all ranks: also those that the learner left out."""

import math
from typing import Any

import torch
from accelerate.utils import gather_object

WITNESSES = 8  # of the answers that the learner leaves out, every so many are scored for the log
COMBINE = {"grad_norm": max, "ratio_min": min, "witness_ratio_min": min, "ratio_max": max, "witness_ratio_max": max}


class Meter:
    """From episodes and the learner's sums to a row of the log.

    Args:
        accelerator: gathers over ranks.
        names, weights: of the reward functions. beta: of the KL term.
    """

    def __init__(self, accelerator: Any, names: list[str], weights: torch.Tensor, beta: float) -> None:
        self.accelerator, self.names, self.weights, self.beta = accelerator, names, weights, beta

    def reward(self, episode) -> float:
        """The weighted sum, without functions that cannot score; NaN: none can."""
        scores = torch.tensor(episode.rewards) * self.weights
        return math.nan if scores.isnan().all() else scores.nansum().item()

    def columns(self, episodes) -> dict[str, torch.Tensor]:
        """{name: (answers of all ranks,)}; NaN where a function cannot score."""
        names = ["reward", *(f"rewards/{name}" for name in self.names), "length", "truncated", "frac_reward_zero_std"]
        rows = [[self.reward(e), *e.rewards, len(e.completion_ids), not e.finished, not e.spread] for e in episodes]
        return dict(zip(names, torch.tensor(gather_object(rows), dtype=torch.float32).T))

    def summary(self, episodes, numbers: dict[str, torch.Tensor]) -> dict[str, Any]:
        """A step's row. Read from the device once.

        Entropy and ratios are means over all tokens of all answers. For those that the learner left out (no advantage,
        or masked) the entropy is that of the distributions they were sampled from, as the sampler told it; their ratio
        is 1 where a rollout serves one step, else that of the witnesses among them. ``clip_fraction`` is over the
        tokens that count, as in TRL; without an advantage nothing is clipped. ``kl`` is over the tokens that count,
        None where none does; 0 with beta 0, where there is no reference.
        """
        gathered: Any = self.accelerator.gather(torch.stack([v.float() for v in numbers.values()])[None])
        n = {name: COMBINE.get(name, sum)(values) for name, values in zip(numbers, gathered.T.tolist())}
        columns = self.columns(episodes)
        tokens = columns["length"].sum().item()
        row: dict[str, Any] = {name: mean(values) for name, values in columns.items()}
        row["kl"] = n["kl_sum"] / n["measured_tokens"] if n["measured_tokens"] else None if self.beta else 0.0
        return row | learner_numbers(n) | {"skipped": 1 - n["tokens"] / tokens, "step_tokens": tokens}


def learner_numbers(n):
    """n: {name: sum or extreme over ranks} -> the row's part that the learner knows."""
    outside, everything = n["outside"], max(n["measured_tokens"] + n["outside"], 1)
    seen = n.get("witness_tokens", 0)
    ratio = n["witness_ratio_sum"] / seen if seen else 1.0
    row = {"loss": n["loss"], "grad_norm": n["grad_norm"], "ratio": (n["ratio_sum"] + ratio * outside) / everything}
    low, high = [n["ratio_min"]] * (n["measured_tokens"] > 0), [n["ratio_max"]] * (n["measured_tokens"] > 0)
    if outside:
        low.append(n["witness_ratio_min"] if seen else 1.0)
        high.append(n["witness_ratio_max"] if seen else 1.0)
    row |= {"ratio_min": min(low, default=1.0), "ratio_max": max(high, default=1.0)}
    if "entropy_sum" in n:
        row["entropy"] = (n["entropy_sum"] + n["outside_entropy"]) / everything
    clipped = {"clip_low": "clip_low_sum", "clip_high": "clip_high_sum", "clip_fraction": "clip_region_sum"}
    return row | {name: n[key] / max(n["counted"], 1) for name, key in clipped.items()}


def mean(values):
    """None where there is no value."""
    return None if values.isnan().all() else values.nanmean().item()

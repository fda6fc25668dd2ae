"""What trainers log beside log-probs and entropy: of each token's distribution, without gradient and without logits."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch

from fastgrpo import inputs
from fastgrpo.backends import dense
from fastgrpo.backends.problem import HeadProblem, column_sum
from fastgrpo.head import HeadOptions

NAMES = ("log_sum_sq_probs", "mean_logits", "is_top1")
MARGIN = 1e-3  # nats: wider than the error of any log-prob or entropy that is_top1 is decided from


class Diagnostics(NamedTuple):
    """Result of :func:`token_diagnostics`."""

    log_sum_sq_probs: torch.Tensor | None
    mean_logits: torch.Tensor | None
    is_top1: torch.Tensor | None


@torch.no_grad()
def token_diagnostics(
    hidden: torch.Tensor,  # (N, D) or (B, T, D)
    weight: torch.Tensor,  # (V, D)
    targets: torch.Tensor,  # (N,) or (B, T)
    bias: torch.Tensor | None = None,  # (V,)
    *,
    temperature: float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    outputs: Sequence[str] = NAMES,
    logprobs: torch.Tensor | None = None,
    entropy: torch.Tensor | None = None,
    workspace_mb: float = 128,
) -> Diagnostics:
    """Statistics of the distributions of :func:`fastgrpo.linear_logprobs`, in bounded memory; never differentiable.

    Args:
        hidden, weight, targets, bias, temperature (a number), softcap, logit_scale, workspace_mb: as there.
        outputs: which of ``NAMES`` to compute.
        logprobs, entropy: shaped like ``targets``, if already known. They settle ``is_top1`` of most tokens without a
            GEMM: p > 1/2 is the largest, and p < exp(-entropy) is not, as max p >= exp(-entropy).

    Returns:
        ``Diagnostics``, each shaped like ``targets`` or None where not asked for; 0 and False where ignored:
        ``log_sum_sq_probs``: fp32, log(sum_v p_v^2). ``mean_logits``: fp32, mean over the vocabulary of the logits
        after scale, softcap and temperature; without a softcap it is linear and costs no GEMM. ``is_top1``: bool,
        whether the target is the argmax; of equal logits the first counts.

    Raises:
        ValueError, TypeError: a bad argument, named, with what was expected and what came, before anything runs.
    """
    options = HeadOptions(
        bias=bias,
        temperature=temperature,
        softcap=softcap,
        logit_scale=logit_scale,
        backend="torch",
        backward="exact",
        workspace_mb=workspace_mb,
    )
    targets = options.check(hidden, weight, targets)
    inputs.check_scalar("temperature", temperature)
    if unknown := set(outputs) - set(NAMES):
        raise ValueError(f"outputs must be among {', '.join(NAMES)}, got {', '.join(sorted(unknown))}")
    inputs.check_targets(targets, weight.shape[0])
    for name, value in (("logprobs", logprobs), ("entropy", entropy)):
        if value is not None:
            inputs.check_per_token(name, value, targets)
    params = options.params(hidden, weight, ())
    view = hidden if hidden.ndim == 3 else hidden[None]
    problem = HeadProblem(view, weight, bias, targets.reshape(-1).contiguous(), None, params)
    with torch.autocast(hidden.device.type, enabled=False):
        return diagnose(problem, outputs, targets.shape, logprobs, entropy)


def diagnose(problem, outputs, shape, logprobs, entropy):
    counted = problem.targets != inputs.IGNORE
    mean = mean_logits(problem) if "mean_logits" in outputs and softcap_is_off(problem) else None
    asked = [name for name in outputs if name != "mean_logits" or mean is None]
    top1, visit = torch.zeros_like(counted), counted
    if asked == ["is_top1"] and logprobs is not None:
        top1, visit = settled_top1(logprobs.reshape(-1), None if entropy is None else entropy.reshape(-1), counted)
    rows = visit.nonzero().squeeze(1)
    log_squares = counted.new_zeros(counted.shape, dtype=inputs.accumulator_dtype(problem.hidden))
    mean = torch.zeros_like(log_squares) if mean is None else mean
    if asked and rows.numel():
        first, squares, total = scan(problem, rows, "log_sum_sq_probs" in asked, "mean_logits" in asked)
        top1[rows] = first == problem.targets[rows]
        log_squares[rows] = squares
        mean = mean if "mean_logits" not in asked else mean.index_copy(0, rows, total / problem.sizes[1])
    values = {"log_sum_sq_probs": log_squares, "mean_logits": torch.where(counted, mean, 0.0), "is_top1": top1}
    return Diagnostics(*(values[name].view(shape) if name in outputs else None for name in NAMES))


def softcap_is_off(problem):
    return problem.params.softcap is None


def mean_logits(problem):
    """(N,): the mean of linear logits is the logit of the mean column."""
    dtype = inputs.accumulator_dtype(problem.hidden)
    column = column_sum(problem.weight, dtype) / problem.weight.shape[0]
    rows = torch.arange(problem.targets.numel(), device=column.device).split(4096)
    mean = torch.cat([inputs.take_rows(problem.hidden, part).to(dtype) @ column for part in rows])
    mean = mean if problem.bias is None else mean + problem.bias.mean(dtype=dtype)
    return mean * (problem.params.logit_scale / problem.params.temperature)


def settled_top1(logprobs, entropy, counted):
    """-> (N,) bool: surely the argmax; (N,) bool: undecided. Values within the margin, and NaNs, stay undecided."""
    surely = counted & (logprobs > MARGIN - math.log(2))
    never = torch.zeros_like(surely) if entropy is None else logprobs < -entropy - MARGIN
    return surely, counted & ~surely & ~never


def scan(problem, rows, with_squares, with_mean):
    """One pass over the logits of some rows, tile by tile.

    Returns:
        (n,) each: the first column of the largest logit (-1 where a logit is NaN), log sum p^2 and the sum of the
        logits (0 where not asked for).
    """
    dtype = inputs.accumulator_dtype(problem.hidden)
    peak = torch.full(rows.shape, -torch.inf, dtype=dtype, device=rows.device)
    first, sums = torch.zeros_like(rows), peak.new_zeros(3, rows.numel())  # sum of exp, of exp^2, of logits
    for z, _, index, r, v, _ in dense.logit_tiles(problem, rows, buffers=1):
        part = slice(r, r + index.numel())
        if with_mean:
            sums[2, part] += z.sum(1)
        fold(z, v, peak[part], first[part], sums[:2, part] if with_squares else None)
        z = None  # the last tile goes before the next one comes
    squares = torch.log(sums[1]) - 2 * torch.log(sums[0]) if with_squares else sums[1]
    return first.masked_fill(peak.isnan(), -1), squares, sums[2]


def fold(z, start, peak, first, sums):
    """Fold one tile of logits into the running maximum, its first column and the sums of exp, exp^2. Overwrites z."""
    largest, column = z.max(1)  # of equal ones torch returns the first
    first.copy_(torch.where(largest > peak, column + start, first))
    decay = torch.exp(peak - torch.maximum(peak, largest))
    peak.copy_(torch.maximum(peak, largest))
    if sums is not None:
        z.sub_(peak[:, None]).exp_()
        sums[0].mul_(decay).add_(z.sum(1))
        sums[1].mul_(decay * decay).add_(z.square_().sum(1))

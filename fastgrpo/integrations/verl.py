"""verl's ``linear_cross_entropy``: the same call, without its limits, also over a tensor-parallel vocabulary.

``apply()`` puts it where verl's own stands. verl's fused path then runs on any device, hidden size and temperature.
"""

import importlib
import inspect
import sys
from collections.abc import Sequence
from contextlib import ExitStack

import torch
import torch.distributed as dist

from fastgrpo import inputs
from fastgrpo.checks import need
from fastgrpo.inputs import IGNORE, Backend, Backward
from fastgrpo.logprobs import LogProbs, linear_logprobs
from fastgrpo.vocab_parallel import check_group, vocab_parallel_logprobs

KERNEL, NAME = "verl.utils.kernel.linear_cross_entropy", "linear_cross_entropy"
ARGUMENTS = ["hidden", "weight", "labels", "temperature", "reduction", "dist_process_group"]  # of verl 0.9.1
REDUCTIONS = ("none", "sum", "mean")


def linear_cross_entropy(
    hidden: torch.Tensor,  # (N, D), (B, T, D) or Megatron's (T, 1, D)
    weight: torch.Tensor,  # (V, D), or the rank's rows (V_r, D)
    labels: torch.Tensor,  # (N,), (B, T) or (1, T)
    temperature: float | torch.Tensor = 1.0,
    reduction: str = "none",
    process_group: dist.ProcessGroup | None = None,
    *,
    bias: torch.Tensor | None = None,  # (V,) or (V_r,)
    softcap: float | None = None,
    logit_scale: float = 1.0,
    old_logprobs: torch.Tensor | None = None,
    backend: Backend = "auto",
    backward: Backward = "auto",
    tolerance: float | None = None,
    workspace_mb: float = 128,
    shard_sizes: Sequence[int] | None = None,
    reduce_hidden_grad: bool = True,
    row_tolerance: float | None = None,
) -> LogProbs:
    """Log-probs of the labels and entropy of the whole distribution, in nats, as verl's function of this name.

    Without a process group, or with one of a single rank, this is :func:`fastgrpo.linear_logprobs`; with one it is
    :func:`fastgrpo.vocab_parallel.vocab_parallel_logprobs`. Where no gradient comes in for the entropy the backward may
    be the certified one; a frozen head costs nothing.

    Args:
        hidden: (N, D) or (B, T, D), float32, bfloat16, float16 or float64, any strides and any D. Whole on every rank:
            a sequence-parallel one is gathered before. A leading shape that differs from the labels' is paired with
            them in order if both have a single side longer than 1, as Megatron's (T, 1, D) and (1, T).
        weight: (V, D); with a process group the rank's rows, in rank order, shards of any size.
        labels: ids of the whole vocabulary; -100 marks a position that is ignored.
        temperature: a number > 0, or a float tensor: shaped like labels or (N,), one a token; (B,) or (B, 1), one a
            sample.
        reduction: of the log-probs, not of the entropy: "none", "sum", or "mean" over the positions not ignored.
        process_group: the tensor-parallel group the vocabulary is cut over, or None.
        bias, softcap, logit_scale, old_logprobs, backend, backward, tolerance, workspace_mb, row_tolerance: as in
            ``linear_logprobs``.
        shard_sizes: V_r of every rank, in rank order; None: the ranks ask each other.
        reduce_hidden_grad: in a group, whether the gradient of hidden is summed over the ranks. verl leaves it to its
            caller: Megatron's gathering of a sequence-parallel hidden sums it in its own backward, and would sum twice.

    Returns:
        ``LogProbs(logprobs, entropy)``, float32 (float64 for float64 input), shaped like labels (a scalar for the
        log-probs where reduced), 0 where ignored; differentiable, once, in hidden, weight and bias. verl's own returns
        them flat; its callers take either, and those that index (B, T) need this one.

    Raises:
        ValueError, TypeError: a bad argument, named, before anything runs.
    """
    hidden = pair_with_labels(hidden, labels)
    inputs.check_choice("reduction", reduction.lower() if isinstance(reduction, str) else reduction, REDUCTIONS)
    options = {
        "bias": bias,
        "temperature": like_labels(temperature, labels),
        "softcap": softcap,
        "logit_scale": logit_scale,
        "return_entropy": True,
        "old_logprobs": old_logprobs,
        "backend": backend,
        "backward": backward,
        "tolerance": tolerance,
        "workspace_mb": workspace_mb,
        "row_tolerance": row_tolerance,
    }
    if process_group is not None:
        check_group(process_group)
    elif shard_sizes is not None:
        raise ValueError(f"shard_sizes must be None without a process_group, got {list(shard_sizes)}")
    if process_group is None or dist.get_world_size(process_group) == 1:
        out = linear_logprobs(hidden, weight, labels, **options)
    else:
        group = {"group": process_group, "shard_sizes": shard_sizes, "reduce_hidden_grad": reduce_hidden_grad}
        out = vocab_parallel_logprobs(hidden, weight, labels, **options, **group)
    return LogProbs(reduce(out.logprobs, labels, reduction.lower()), out.entropy)


def pair_with_labels(hidden, labels):
    """hidden with the labels' leading shape; a pair of shapes that has two orders is not guessed at."""
    inputs.check_tensor("hidden", hidden)
    inputs.check_tensor("labels", labels, hidden.device, floating=False)
    lead = hidden.shape[:-1]
    alike = lead.numel() == labels.numel() and all(sum(s > 1 for s in shape) <= 1 for shape in (lead, labels.shape))
    if hidden.ndim < 2 or labels.ndim not in (1, 2) or not (lead == labels.shape or alike):
        raise ValueError(
            f"labels must be (N,) or (B, T), the leading shape of hidden, or one run of as many ids, got "
            f"{tuple(labels.shape)} for hidden of shape {tuple(hidden.shape)}"
        )
    return hidden.reshape(*labels.shape, hidden.shape[-1])


def like_labels(temperature, labels):
    """A number, or a tensor shaped like the labels, from one value a sample or a token."""
    if not isinstance(temperature, torch.Tensor) or temperature.shape == labels.shape:
        return temperature
    if temperature.numel() == 1:
        return temperature.reshape(())
    if labels.ndim == 2 and temperature.shape in (labels.shape[:1], (labels.shape[0], 1)):
        return temperature.reshape(-1, 1).expand(labels.shape)
    if temperature.ndim <= 2 and temperature.numel() == labels.numel() and 1 in (temperature.ndim, *temperature.shape):
        return temperature.reshape(labels.shape)
    raise ValueError(
        f"temperature must be a number, one a token, {tuple(labels.shape)} or ({labels.numel()},), or one a sample, "
        f"({labels.shape[0]},) or ({labels.shape[0]}, 1), got shape {tuple(temperature.shape)}"
    )


def reduce(logprobs, labels, reduction):
    if reduction == "none":
        return logprobs
    total = logprobs.sum()
    return total if reduction == "sum" else total / (labels != IGNORE).sum().clamp(min=1)


def call_as_verl(hidden, weight, labels, temperature=1.0, reduction="none", dist_process_group=None):
    """What takes the place of verl's: shards are equal, as Megatron cuts them, and summing dX is left to the caller."""
    sizes = None if dist_process_group is None else [weight.shape[0]] * dist.get_world_size(dist_process_group)
    return linear_cross_entropy(
        hidden, weight, labels, temperature, reduction, dist_process_group, shard_sizes=sizes, reduce_hidden_grad=False
    )


def apply() -> ExitStack:
    """Put the op in the place of ``verl.utils.kernel.linear_cross_entropy``, wherever verl has imported it already.

    In every process of a run: ``VERL_USE_EXTERNAL_MODULES=fastgrpo.integrations.verl_patch`` in the environment, or
    ``model.external_lib`` in verl's config. verl calls it with ``use_fused_kernels=True`` and, for FSDP,
    ``fused_kernel_options.impl_backend=triton``.

    A second call changes nothing.

    Returns:
        an ``ExitStack``: its ``close()``, or the end of a ``with apply():``, puts verl's own back.

    Raises:
        ImportError: verl is missing, or calls its function with other arguments than the one tested.
    """
    need("verl", "verl")
    kernel, undo = importlib.import_module(KERNEL), ExitStack()
    found = list(inspect.signature(kernel.LinearCrossEntropy.forward).parameters)[1:]
    if found != ARGUMENTS:
        raise ImportError(f"verl's linear_cross_entropy must take {ARGUMENTS} (as in verl 0.9.1), found {found}")
    theirs = kernel.linear_cross_entropy
    if theirs is not call_as_verl:
        rebind(theirs, call_as_verl)
        undo.callback(rebind, call_as_verl, theirs)
    return undo


def rebind(old, new):
    """Every name ``linear_cross_entropy`` of a loaded verl module that is the old one becomes the new one."""
    for name, module in list(sys.modules.items()):
        if name.startswith("verl.") and vars(module).get(NAME) is old:
            setattr(module, NAME, new)

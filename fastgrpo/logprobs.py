"""linear_logprobs: from hidden states and LM head to log-probs and entropy, without logits."""

from typing import NamedTuple

import torch
from torch.autograd.function import once_differentiable

from fastgrpo import backends, inputs
from fastgrpo.backends.problem import HeadParams, HeadProblem


class LogProbs(NamedTuple):
    """Result of :func:`linear_logprobs`."""

    logprobs: torch.Tensor
    entropy: torch.Tensor | None


class LinearLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, temperature, params):
        ctx.set_materialize_grads(False)
        with torch.autocast(hidden.device.type, enabled=False):
            stats = backends.load(params.backend).forward(
                HeadProblem(hidden, weight, bias, targets, temperature, params)
            )
        ctx.save_for_backward(hidden, weight, bias, targets, temperature, stats)
        ctx.params = params
        return stats[0].clone(), stats[4].clone() if params.entropy else None

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_logp, grad_entropy):
        *tensors, stats = ctx.saved_tensors
        needs = ctx.needs_input_grad[:3]
        if grad_logp is None and grad_entropy is None:
            return None, None, None, None, None, None
        grad_logp = torch.zeros_like(stats[0]) if grad_logp is None else grad_logp
        with torch.autocast(stats.device.type, enabled=False):
            problem = HeadProblem(*tensors, ctx.params)
            grads = backends.load(ctx.params.backend).backward(problem, stats, grad_logp, grad_entropy, needs)
        return *grads, None, None, None


def linear_logprobs(
    hidden,  # (N, D) or (B, T, D)
    weight,  # (V, D)
    targets,  # (N,) or (B, T)
    bias=None,  # (V,)
    *,
    temperature=1.0,
    softcap=None,
    logit_scale=1.0,
    return_entropy=False,
    old_logprobs=None,
    backend="auto",
    backward="auto",
    workspace_mb=128,
):
    """Log-probability of each target under ``softmax(logits)``, with exact gradients and no (N, V) tensor.

    ``logits = cap(logit_scale * (hidden @ weight.T + bias)) / temperature``, ``cap(x) = softcap * tanh(x / softcap)``.

    Args:
        hidden: (N, D) or (B, T, D), float32, bfloat16, float16 or float64 (float64 on the torch backend); any strides.
        weight: (V, D), the LM head; any strides. Not copied in another dtype, also under autocast.
        targets: (N,) or (B, T), integer ids; -100 marks a position that is ignored.
        bias: (V,) or None.
        temperature: a number > 0, or a float tensor shaped like ``targets``. Not differentiated.
        softcap: tanh cap of the logits (Gemma), or None.
        logit_scale: factor on the logits before the cap (Cohere, Granite).
        return_entropy: also return the entropy of the whole distribution, in nats.
        old_logprobs: shaped like ``targets``; a hint for the certified backward, never changes the result.
        backend: "auto" (Triton on a GPU, else torch), "triton" or "torch".
        backward: "auto" or "exact": every column of every row with a gradient.
        workspace_mb: bound on the scratch memory, in MiB.

    Returns:
        ``LogProbs(logprobs, entropy)``: float32 (float64 for float64 input), shaped like ``targets``, 0 where ignored;
        both differentiable in hidden, weight and bias, once. ``entropy`` is None unless asked for. Accurate to the
        accumulator as p -> 1: the label is kept out of the running sum, ``logp = -softplus(lse_others - z_label)``.

    Raises:
        ValueError, TypeError: a bad argument, named, with what was expected and what came, before anything runs.
        A target outside [0, V) raises on a CPU or with FASTGRPO_DEBUG=1, and gives NaN at its position otherwise.
    """
    inputs.check_head(hidden, weight, targets, bias)
    inputs.check_targets(targets, weight.shape[0])
    inputs.check_temperature(temperature, targets)
    if softcap is not None:
        inputs.check_scalar("softcap", softcap)
    inputs.check_scalar("logit_scale", logit_scale, positive=False)
    inputs.check_scalar("workspace_mb", workspace_mb)
    if old_logprobs is not None:
        inputs.check_per_token("old_logprobs", old_logprobs, targets)
    params = HeadParams(
        temperature=None if isinstance(temperature, torch.Tensor) else float(temperature),
        softcap=None if softcap is None else float(softcap),
        logit_scale=float(logit_scale),
        compute_dtype=compute_dtype(hidden, weight),
        entropy=bool(return_entropy),
        backend=backends.choose(backend, hidden),
        backward=check_backward(backward),
        workspace=int(workspace_mb * 2**20),
    )
    if isinstance(temperature, torch.Tensor):
        temperature = temperature.detach().to(inputs.accumulator_dtype(hidden)).expand(targets.shape).reshape(-1)
    else:
        temperature = None
    view = hidden if hidden.ndim == 3 else hidden[None]
    flat = targets.reshape(-1).to(torch.int64)
    logprobs, entropy = LinearLogProbs.apply(view, weight, bias, flat, temperature, params)
    return LogProbs(logprobs.view(targets.shape), None if entropy is None else entropy.view(targets.shape))


def compute_dtype(hidden, weight):
    """What tiles are cast to: autocast's dtype inside autocast, else the wider of the two."""
    device = hidden.device.type
    if hidden.dtype != torch.float64 and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return torch.promote_types(hidden.dtype, weight.dtype)


def check_backward(backward):
    inputs.check_choice("backward", backward, inputs.BACKWARDS)
    if backward == "certified":
        raise ValueError("backward must be 'auto' or 'exact' in this version, got 'certified'")
    return "exact"

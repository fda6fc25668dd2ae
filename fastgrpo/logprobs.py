"""linear_logprobs: from hidden states and LM head to log-probs and entropy, without logits."""

from dataclasses import replace
from typing import Any, NamedTuple

import torch

from fastgrpo import head_op, inputs, strategies, topk
from fastgrpo.config import settings_go_in_config
from fastgrpo.head import HeadOptions, compute_dtype
from fastgrpo.inputs import Backend, Backward
from fastgrpo.lora import check_lora
from fastgrpo.support import check_support


class LogProbs(NamedTuple):
    """Result of :func:`linear_logprobs`."""

    logprobs: torch.Tensor
    entropy: torch.Tensor | None

    @property
    def rest(self) -> torch.Tensor | None:
        """A third field of :class:`TopKLogProbs`; not one here, where callers unpack two."""
        return None


class TopKLogProbs(NamedTuple):
    """Result of :func:`linear_logprobs` for top-k targets."""

    logprobs: torch.Tensor
    entropy: torch.Tensor | None
    rest: torch.Tensor


@settings_go_in_config
def linear_logprobs(
    hidden: torch.Tensor,  # (N, D) or (B, T, D)
    weight: torch.Tensor,  # (V, D)
    targets: torch.Tensor,  # (N,) or (B, T); (N, K) or (B, T, K)
    bias: torch.Tensor | None = None,  # (V,)
    *,
    temperature: float | torch.Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    return_entropy: bool = False,
    lora: tuple[torch.Tensor, torch.Tensor, float] | None = None,
    support: tuple[torch.Tensor, torch.Tensor] | None = None,
    old_logprobs: torch.Tensor | None = None,
    backend: Backend = "auto",
    backward: Backward = "auto",
    tolerance: float | None = None,
    workspace_mb: float = 128,
    row_tolerance: float | None = None,
) -> LogProbs:  # of top-k targets TopKLogProbs: a union would forbid everybody to unpack two
    """Log-probability of each target under ``softmax(logits)``, with gradients (see ``backward``), no (N, V) tensor.

    ``logits = cap(logit_scale * (hidden @ weight.T + bias)) / temperature``, ``cap(x) = softcap * tanh(x / softcap)``.

    Args:
        hidden: (N, D) or (B, T, D), float32, bfloat16, float16 or float64 (float64 on the torch backend); any strides.
        weight: (V, D), the LM head; any strides. Not copied in another dtype, also under autocast.
        targets: (N,) or (B, T), integer ids; -100 marks a position that is ignored. Or (N, K), (B, T, K): top-k
            targets, K different ids a position, whose log-probs are those under the whole vocabulary, as a sparse
            teacher's are (see ``rest``); -100 marks a slot without one, and a position of such slots alone is ignored.
        bias: (V,) or None.
        temperature: a number > 0, or a float tensor, one a position. Not differentiated.
        softcap: tanh cap of the logits (Gemma), or None.
        logit_scale: factor on the logits before the cap (Cohere, Granite).
        return_entropy: also return the entropy of the whole distribution, in nats.
        lora: ``(A, B, scaling)``, A (r, D) and B (V, r): the logits gain ``scaling * (hidden @ A.T) @ B.T`` before the
            bias, in the same accumulator, with gradients to A and B. W is never merged or copied; A and B may be wider
            than it.
        support: ``(token_ids, offsets)``, the ids each position's sampler kept (top-p, top-k), CSR: integer (K,) and
            (N + 1,), positions in the order of the flattened targets. Log-probs and entropy are then those of the
            distribution renormalised over the kept ids, and only these entries of the head are touched. A counted
            target must be among its ids; a set that is not one is an error on a CPU and NaN on a GPU. The backward is
            exact: nothing kept is left out. Not with top-k targets.
        old_logprobs: shaped like ``targets``, log-probs near the current ones (the sampler's): a hint that makes the
            certified backward faster; the result does not depend on it beyond the tolerance.
        backend: "auto" (Triton on a GPU, else torch), "triton" or "torch".
        backward: "exact": every entry of every row with a gradient. "certified": the entries that matter; every row
            carries the exact probability mass it leaves out, and rows over the tolerance keep all entries. "auto":
            exact for float64 and small input, certified otherwise. An entropy gradient is exact. Where
            hidden alone wants a gradient (a frozen head, no entropy returned, no LoRA on the head) it is made in the
            forward, in two GEMMs or less, and held until the backward, 4 N D bytes; not by the Triton backend's
            certified backward, which makes it from the kept entries, and not of top-k targets, whose exact backward
            makes the logits again. A certified one of top-k targets bounds what the other entries leave out by the
            gradient at the targets.
        tolerance: of the certified backward: bound on the relative error of d loss / d logits (Frobenius norm). None:
            0.005, which adds less than a quarter of what bf16 GEMMs add anyway; 0.0007 for fp32 under "auto". The
            gradients' own errors are about ten times smaller.
        workspace_mb: bound on the tiles and tables of a call, in MiB. Beside it stand at most the sum of dX (4 N D
            bytes) and the certified backward's flags (N V / 1024 on a GPU, N V / 128 on a CPU) and order (20 V).
        row_tolerance: of the certified backward where the head (or its bias or LoRA's B) is trained: how far one
            vocabulary entry's gradient may be from the exact one, relative to its own size, in (0, 1]. 95 % of the
            entries stay within it and half of them within a fifth; optimisers such as Adam, which divide each weight's
            gradient by its own size, need that. Measured at every backward on a fixed sample of 256 to 1024 entries; as
            many rows keep all entries in the head's gradient as it takes. None: 0.1. 1: no such promise, cheaper.

    Returns:
        ``LogProbs(logprobs, entropy)``: float32 (float64 for float64 input), shaped like ``targets``, 0 where ignored;
        both differentiable in hidden, weight, bias and LoRA's A and B, once. ``entropy``, one value a position, is None
        unless asked for. Accurate to the accumulator as p -> 1: the label is kept out of the running sum, ``logp =
        -softplus(lse_others - z_label)``.

        For top-k targets ``TopKLogProbs(logprobs, entropy, rest)``: ``rest``, (N,) or (B, T), is the log of the mass
        outside them, ``log(1 - sum_k p_k)``, differentiable too (of a ``LogProbs`` it is None, and no field). All K are
        kept out of the running sum, so that it is right however small, in the one pass over the vocabulary that
        log-probs take anyway. Beside that a target costs a row of the head, read in the forward and again for each
        gradient, and about 80 bytes; nothing of size N K D is held. A gradient of ``rest`` reaches every entry: a
        certified backward then does most rows exactly.

    Raises:
        ValueError, TypeError: a bad argument, named, with what was expected and what came, before anything runs.
        A target outside [0, V), or an id that stands twice among a position's top-k targets, raises on a CPU or with
        FASTGRPO_DEBUG=1, and gives NaN at its position otherwise.
    """
    options = HeadOptions(
        bias=bias,
        temperature=temperature,
        softcap=softcap,
        logit_scale=logit_scale,
        lora=lora,
        support=support,
        backend=backend,
        backward=backward,
        tolerance=tolerance,
        workspace_mb=workspace_mb,
        row_tolerance=row_tolerance,
        old_logprobs=old_logprobs,
        return_entropy=return_entropy,
    )
    return head_logprobs(hidden, weight, targets, options)


def head_logprobs(hidden, weight, targets, options):
    """:func:`linear_logprobs` with its options in one object, :class:`fastgrpo.head.HeadOptions`."""
    if topk.is_meant(hidden, targets):
        return topk_logprobs(hidden, weight, targets, options)
    targets = options.check(hidden, weight, targets)
    inputs.check_targets(targets, weight.shape[0])
    support = options.support
    if support is not None:
        options = replace(options, backward="exact")
        support = check_support(support, targets, weight.shape[0])
    strategy = None if support is None else strategies.Supported
    logprobs, entropy = run(hidden, weight, targets, options, strategy, () if support is None else support)
    return LogProbs(logprobs.view(targets.shape), None if entropy is None else entropy.view(targets.shape))


def topk_logprobs(hidden, weight, targets, options) -> Any:
    """Of targets (N, K) or (B, T, K)."""
    ids, some, options = topk.check(hidden, weight, targets, options)
    some = options.check(hidden, weight, some)
    topk.check_ids(ids, weight.shape[0])
    entries = (ids.flatten(0, -2).contiguous(),)
    logprobs, entropy = run(hidden, weight, some, options, strategies.TopK, entries)
    return several(logprobs, entropy, some.shape)


def several(logprobs, entropy, shape):
    """:class:`TopKLogProbs` of (N, K + 1) log-probs and (N,) entropy or None, for positions of this shape."""
    entropy = None if entropy is None else entropy.view(shape)
    of_targets = logprobs[:, :-1].reshape(*shape, logprobs.shape[1] - 1)
    return TopKLogProbs(of_targets, entropy, logprobs[:, -1].reshape(shape))


def run(hidden, weight, targets, options, strategy, entries):
    """-> (N,) log-probs, or (N, K + 1) as :mod:`fastgrpo.topk` returns them; (N,) entropy or None. All is checked.

    Args:
        strategy: None: as hidden, head and options have it. entries: see :class:`fastgrpo.strategies.Given`.
    """
    bias = options.bias
    lora = check_lora(options.lora, hidden, weight)
    head = weight, bias, lora.A, lora.B
    params = options.params(
        hidden,
        weight,
        (hidden, *head),
        scaling=lora.scaling,
        lora_dtype=None if lora.A is None else compute_dtype(hidden, weight, lora.A, lora.B),
    )
    entropy_grad = options.return_entropy if options.entropy_grad is None else options.entropy_grad
    if strategy is None:
        strategy = strategies.choose(hidden, head, params, entropy_grad)
    hint = None if params.tolerance is None else options.flat_hint(hidden)
    moving = None if options.moving is None else options.moving.reshape(-1)
    tensors = head_op.HeadTensors(
        hidden if hidden.ndim == 3 else hidden[None],
        weight,
        None if bias is None else bias.contiguous(),
        lora.A,
        lora.B,
        targets.reshape(-1).contiguous(),
        options.flat_temperature(hidden, targets),
    )
    return head_op.log_probs(tensors, strategies.Given(hint, moving, entries), params, strategy)

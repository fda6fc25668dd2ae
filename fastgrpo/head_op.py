"""The op on an LM head between the checked call and a strategy: what is saved, what autograd is told."""

from typing import NamedTuple

import torch
from torch.autograd.function import once_differentiable

from fastgrpo import backends, inputs, lora, ops, strategies
from fastgrpo.backends.problem import Gradients, HeadParams, HeadProblem, RowStats


class HeadTensors(NamedTuple):
    """The tensors of a checked call; the first five may want a gradient."""

    hidden: torch.Tensor  # (B, T, D)
    weight: torch.Tensor  # (V, D)
    bias: torch.Tensor | None  # (V,)
    lora_a: torch.Tensor | None  # (r, D)
    lora_b: torch.Tensor | None  # (V, r)
    targets: torch.Tensor  # (N,) int64
    temperatures: torch.Tensor | None  # (N,) in the accumulator's dtype

    def problem(self, params, low=None):
        return HeadProblem(
            self.hidden, self.weight, self.bias, self.targets, self.temperatures, params, low, self.lora_b
        )


DIFFERENTIABLE = 5


def run_forward(tensors, given, params, strategy):
    """-> (5, N) :class:`RowStats`, and what the backward wants beside them: LoRA's low or None, the strategy's own."""
    backend, low = backends.load(params.backend), None
    with torch.autocast(tensors.hidden.device.type, enabled=False):
        if tensors.lora_a is not None:
            low = lora.project(tensors.hidden, tensors.lora_a, params, backend.counted_rows(tensors.targets))
        stats, kept = strategy.forward(tensors.problem(params, low), backend, given)
    return stats, (low, *kept)


def run_backward(tensors, support, params, strategy, stats, kept, grad_logp, grad_entropy, needs):
    """-> gradients of the differentiable tensors, None where ``needs`` (5 bools) is False. One incoming may be None."""
    (low, *kept), (*needs, needs_a, needs_b) = kept, needs
    needs = Gradients(*needs, low=low is not None and (needs[0] or needs_a), up=needs_b)
    backend, d_a = backends.load(params.backend), None
    grad_logp = torch.zeros_like(strategy.logprobs(stats, kept)) if grad_logp is None else grad_logp
    with torch.autocast(stats.device.type, enabled=False):
        problem = tensors.problem(params, low)
        grads = strategy.backward(problem, backend, support, stats, kept, grad_logp, grad_entropy, needs)
        if grads.low is not None:
            counted = backend.counted_rows(tensors.targets)
            d_a = lora.gradients(tensors.hidden, tensors.lora_a, params, grads.low, grads.hidden, needs_a, counted)
    return grads.hidden, grads.weight, grads.bias, d_a, grads.up


class LinearLogProbs(torch.autograd.Function):
    """In eager torch."""

    @staticmethod
    def forward(ctx, *arguments):
        *tensors, given, params, strategy = arguments
        ctx.set_materialize_grads(False)
        ctx.params, ctx.strategy = params, strategy
        stats, kept = run_forward(HeadTensors(*tensors), given, params, strategy)
        ctx.save_for_backward(stats, *tensors, *given.entries, *kept)
        ctx.entries = len(given.entries)
        logp = strategy.logprobs(stats, kept[1:])
        return logp.clone(), RowStats(*stats).entropy.clone() if params.entropy else None

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_logp, grad_entropy):
        grads = (None,) * DIFFERENTIABLE
        if grad_logp is not None or grad_entropy is not None:
            stats, tensors, support, kept = unpack_saved(ctx)
            needs = ctx.needs_input_grad[:DIFFERENTIABLE]
            grads = run_backward(
                tensors, support, ctx.params, ctx.strategy, stats, kept, grad_logp, grad_entropy, needs
            )
        return *grads, *[None] * 5


def unpack_saved(ctx):
    """-> stats, tensors, support, kept."""
    stats, *rest = ctx.saved_tensors
    first = len(HeadTensors._fields)
    last = first + ctx.entries
    return stats, HeadTensors(*rest[:first]), rest[first:last], rest[last:]


TENSORS = ops.schema(HeadTensors)
CALL = f"Tensor[] support, str strategy, {ops.schema(HeadParams)}"


@ops.op(
    "linear_logprobs",
    f"{TENSORS}, Tensor? hint, Tensor? moving, {CALL}",
    "(Tensor logprobs, Tensor entropy, Tensor stats, Tensor[] kept)",
)
def forward_op(*arguments):
    tensors, (hint, moving, support, name, *params) = split(arguments)
    params, strategy = HeadParams(*params), strategies.find(name)
    inputs.check_targets(tensors.targets, tensors.weight.shape[0])  # tracing saw none
    given = strategies.Given(hint, moving, support)
    stats, kept = run_forward(tensors, given, params, strategy)
    like = kept_like(tensors, support, params, strategy)
    padded = [ops.pad(x, most[0]) for x, most in zip(kept, like) if most is not None]
    counts = [torch.tensor([len(x) for x in kept if x is not None], dtype=torch.int64)] if is_ragged(params) else []
    logp = strategy.logprobs(stats, kept[1:]).clone()
    return logp, RowStats(*stats).entropy.clone() if params.entropy else stats.new_empty(0), stats, padded + counts


def split(arguments):
    """-> :class:`HeadTensors`, the other arguments."""
    first = len(HeadTensors._fields)
    return HeadTensors(*arguments[:first]), arguments[first:]


def is_ragged(params):
    """Whether what is kept may have fewer rows than in a graph, where shapes must be known: their numbers are kept."""
    return params.backend == "torch"


def kept_like(tensors, support, params, strategy):
    """((shape, dtype) or None) of each thing that :func:`run_forward` keeps, at its largest."""
    low = None
    if tensors.lora_a is not None:
        shape = (*tensors.hidden.shape[:-1], tensors.lora_a.shape[0])
        low = (shape, inputs.accumulator_dtype(tensors.hidden))
    return low, *strategy.kept_like(tensors.problem(params), backends.load(params.backend), support)


@forward_op.register_fake
def fake_forward(*arguments):
    tensors, (_, _, support, name, *params) = split(arguments)
    params, hidden, n = HeadParams(*params), tensors.hidden, tensors.targets.shape[0]
    strategy = strategies.find(name)
    like = kept_like(tensors, support, params, strategy)
    row = hidden.new_empty(n, dtype=inputs.accumulator_dtype(hidden))
    kept = [hidden.new_empty(x[0], dtype=x[1]) for x in like if x is not None]
    counts = [torch.empty(len(kept), dtype=torch.int64, device="cpu")] if is_ragged(params) else []
    entropy = torch.empty_like(row) if params.entropy else row.new_empty(0)
    return row.new_empty(strategy.shape(n, support)), entropy, row.new_empty(len(RowStats._fields), n), kept + counts


@ops.op(
    "linear_logprobs_backward",
    f"Tensor? grad_logprobs, Tensor? grad_entropy, Tensor stats, Tensor[] kept, bool[] needs, {TENSORS}, {CALL}",
    "Tensor[]",
)
def backward_op(grad_logp, grad_entropy, stats, kept, needs, *arguments):
    """The gradients that are needed."""
    tensors, (support, name, *params) = split(arguments)
    params, strategy = HeadParams(*params), strategies.find(name)
    if is_ragged(params):
        kept = [x[:count] for x, count in zip(kept, kept[-1].tolist())]
    if grad_entropy is not None and inputs.checks_values(stats.device) and not grad_entropy.any():
        grad_entropy = None  # AOT autograd makes zeros of what nobody differentiated
    kept = iter(kept)
    kept = [None if x is None else next(kept) for x in kept_like(tensors, support, params, strategy)]
    grads = run_backward(tensors, support, params, strategy, stats, kept, grad_logp, grad_entropy, needs)
    return [x for x, need in zip(grads, needs) if need]


@backward_op.register_fake
def fake_backward(grad_logp, grad_entropy, stats, kept, needs, *arguments):
    tensors, _ = split(arguments)
    wanted = [x for x, need in zip(tensors, needs) if x is not None and need]
    return [x.new_empty(x.shape) for x in wanted]


def setup_context(ctx, inputs, output):
    tensors, (_, _, support, strategy, *params) = split(inputs)
    _, _, stats, kept = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(stats, *kept)
    ctx.save_for_backward(stats, *tensors, *support, *kept)
    ctx.entries, ctx.strategy, ctx.params = len(support), strategy, params


def backward(ctx, grad_logp, grad_entropy, *_):
    stats, tensors, support, kept = unpack_saved(ctx)
    needs = [bool(need) for need in ctx.needs_input_grad[:DIFFERENTIABLE]]
    grads = [None] * DIFFERENTIABLE
    if grad_logp is not None or (grad_entropy is not None and grad_entropy.numel()):
        own = backward_op(grad_logp, grad_entropy, stats, kept, needs, *tensors, support, ctx.strategy, *ctx.params)
        own = iter(own)
        grads = [next(own) if need else None for need in needs]
    return *grads, *[None] * 4, [None] * len(support), None, *[None] * len(ctx.params)


forward_op.register_autograd(backward, setup_context=setup_context)


def log_probs(tensors, given, params, strategy):
    """-> (N,) log-probs, (N,) entropy or None; differentiable in the first five of :class:`HeadTensors`."""
    if not torch.compiler.is_compiling():
        return LinearLogProbs.apply(*tensors, given, params, strategy)
    hint, moving, support = given
    logp, entropy, _, _ = forward_op(*tensors, hint, moving, list(support), strategy.__name__, *ops.values(params))
    return logp, entropy if params.entropy else None

"""The op on an LM head between the checked call and a strategy: what is saved, what autograd is told."""

from typing import NamedTuple

import torch

from fastgrpo import backends, inputs, lora, ops, strategies
from fastgrpo.backends.problem import Gradients, HeadParams, HeadProblem, RowStats


class HeadTensors(NamedTuple):
    """The tensors of a checked call; the first five may want a gradient.

    A kind of tensors of its own has these fields first, a ``problem`` and the two constants.
    """

    hidden: torch.Tensor  # (B, T, D)
    weight: torch.Tensor  # (V, D)
    bias: torch.Tensor | None  # (V,)
    lora_a: torch.Tensor | None  # (r, D)
    lora_b: torch.Tensor | None  # (V, r)
    targets: torch.Tensor  # (N,) int64
    temperatures: torch.Tensor | None  # (N,) in the accumulator's dtype

    PARAMS = HeadParams
    STATS = RowStats

    def problem(self, params, low=None):
        return HeadProblem(
            self.hidden, self.weight, self.bias, self.targets, self.temperatures, params, low, self.lora_b
        )


DIFFERENTIABLE = 5


def run_forward(tensors, given, params, strategy):
    """-> (rows of ``tensors.STATS``, N), and what the backward wants beside: LoRA's low or None, the strategy's own."""
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


class OnHead(torch.autograd.Function):
    """In eager torch."""

    @staticmethod
    def forward(ctx, *arguments):
        kind, given, params, strategy, *tensors = arguments
        tensors = kind(*tensors)
        ctx.set_materialize_grads(False)
        ctx.kind, ctx.params, ctx.strategy = kind, params, strategy
        stats, kept = run_forward(tensors, given, params, strategy)
        saved = len(kept) - strategy.hands_over
        ctx.save_for_backward(stats, *tensors, *given.entries, *kept[:saved])
        ctx.entries, ctx.handed = len(given.entries), kept[saved:]
        entropy = entropy_of(kind, params, stats)
        if not strategy.entropy_grad and entropy is not None:
            ctx.mark_non_differentiable(entropy)
        return strategy.logprobs(stats, kept[1:]).clone(), entropy

    @staticmethod
    @ops.once_differentiable
    def backward(ctx, grad_logp, grad_entropy):
        grads = (None,) * DIFFERENTIABLE
        if grad_logp is not None or grad_entropy is not None:
            stats, tensors, support, kept = unpack_saved(ctx)
            kept, ctx.handed = (*kept, *ctx.handed), (None,) * len(ctx.handed)
            needs = ctx.needs_input_grad[4 : 4 + DIFFERENTIABLE]
            grads = run_backward(
                tensors, support, ctx.params, ctx.strategy, stats, kept, grad_logp, grad_entropy, needs
            )
        return *[None] * 4, *grads, *[None] * (len(ctx.kind._fields) - DIFFERENTIABLE)


def entropy_of(kind, params, stats):
    return kind.STATS(*stats).entropy.clone() if params.entropy else None


def unpack_saved(ctx):
    """-> stats, tensors, support, kept."""
    stats, *rest = ctx.saved_tensors
    first = len(ctx.kind._fields)
    last = first + ctx.entries
    return stats, ctx.kind(*rest[:first]), rest[first:last], rest[last:]


class HeadOp:
    """Called with a kind of tensors: :class:`OnHead` in eager torch, in a graph the custom op of this name.

    Attributes:
        forward, backward: ``fastgrpo::name`` and ``fastgrpo::name_backward``.
    """

    def __init__(self, name, kind):
        self.kind = kind
        tensors, call = ops.schema(kind), f"Tensor[] support, str strategy, {ops.schema(kind.PARAMS)}"
        self.forward = ops.op(
            name,
            f"{tensors}, Tensor? hint, Tensor? moving, {call}",
            "(Tensor logprobs, Tensor entropy, Tensor stats, Tensor[] kept)",
        )(self.run_forward)
        self.backward = ops.op(
            f"{name}_backward",
            f"Tensor? grad, Tensor? grad_entropy, Tensor stats, Tensor[] kept, bool[] needs, {tensors}, {call}",
            "Tensor[]",
        )(self.run_backward)
        self.forward.register_fake(self.fake_forward)
        self.backward.register_fake(self.fake_backward)
        self.forward.register_autograd(self.gradients, setup_context=self.setup_context)

    def split(self, arguments):
        """-> the tensors, the other arguments."""
        first = len(self.kind._fields)
        return self.kind(*arguments[:first]), arguments[first:]

    def run_forward(self, *arguments):
        tensors, (hint, moving, support, name, *params) = self.split(arguments)
        params, strategy = self.kind.PARAMS(*params), strategies.find(name)
        inputs.check_targets(tensors.targets, tensors.weight.shape[0])  # tracing saw none
        given = strategies.Given(hint, moving, support)
        stats, kept = run_forward(tensors, given, params, strategy)
        like = kept_like(tensors, support, params, strategy)
        padded = [ops.pad(x, most[0]) for x, most in zip(kept, like) if most is not None]
        counts = [torch.tensor([len(x) for x in kept if x is not None], dtype=torch.int64)] if is_ragged(params) else []
        logp, entropy = strategy.logprobs(stats, kept[1:]).clone(), entropy_of(self.kind, params, stats)
        return logp, stats.new_empty(0) if entropy is None else entropy, stats, padded + counts

    def fake_forward(self, *arguments):
        tensors, (_, _, support, name, *params) = self.split(arguments)
        params, hidden, n = self.kind.PARAMS(*params), tensors.hidden, tensors.targets.shape[0]
        strategy = strategies.find(name)
        like = kept_like(tensors, support, params, strategy)
        row = hidden.new_empty(n, dtype=inputs.accumulator_dtype(hidden))
        kept = [hidden.new_empty(x[0], dtype=x[1]) for x in like if x is not None]
        counts = [torch.empty(len(kept), dtype=torch.int64, device="cpu")] if is_ragged(params) else []
        entropy = torch.empty_like(row) if params.entropy else row.new_empty(0)
        stats = row.new_empty(len(self.kind.STATS._fields), n)
        return row.new_empty(strategy.shape(n, support)), entropy, stats, kept + counts

    def run_backward(self, grad_logp, grad_entropy, stats, kept, needs, *arguments):
        """The gradients that are needed."""
        tensors, (support, name, *params) = self.split(arguments)
        params, strategy = self.kind.PARAMS(*params), strategies.find(name)
        if is_ragged(params):
            kept = [x[:count] for x, count in zip(kept, kept[-1].tolist())]
        if grad_entropy is not None and inputs.checks_values(stats.device) and not grad_entropy.any():
            grad_entropy = None  # AOT autograd makes zeros of what nobody differentiated
        kept = iter(kept)
        kept = [None if x is None else next(kept) for x in kept_like(tensors, support, params, strategy)]
        for k in range(len(kept) - strategy.hands_over, len(kept)):  # a graph's tensors are not to be overwritten
            kept[k] = None if kept[k] is None else kept[k].clone()
        grads = run_backward(tensors, support, params, strategy, stats, kept, grad_logp, grad_entropy, needs)
        return [x for x, need in zip(grads, needs) if need]

    def fake_backward(self, grad_logp, grad_entropy, stats, kept, needs, *arguments):
        tensors, _ = self.split(arguments)
        wanted = [x for x, need in zip(tensors, needs) if x is not None and need]
        return [x.new_empty(x.shape) for x in wanted]

    def setup_context(self, ctx, inputs, output):
        tensors, (_, _, support, strategy, *params) = self.split(inputs)
        _, entropy, stats, kept = output
        fixed = [] if strategies.find(strategy).entropy_grad else [entropy]
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*fixed, stats, *kept)
        ctx.save_for_backward(stats, *tensors, *support, *kept)
        ctx.kind, ctx.entries, ctx.strategy, ctx.params = self.kind, len(support), strategy, params

    def gradients(self, ctx, grad_logp, grad_entropy, *_):
        stats, tensors, support, kept = unpack_saved(ctx)
        needs = [bool(need) for need in ctx.needs_input_grad[:DIFFERENTIABLE]]
        grads = [None] * DIFFERENTIABLE
        if grad_logp is not None or (grad_entropy is not None and grad_entropy.numel()):
            own = self.backward(
                grad_logp, grad_entropy, stats, kept, needs, *tensors, support, ctx.strategy, *ctx.params
            )
            own = iter(own)
            grads = [next(own) if need else None for need in needs]
        others = len(self.kind._fields) - DIFFERENTIABLE + 2  # tensors, hint, moving
        return *grads, *[None] * others, [None] * len(support), None, *[None] * len(ctx.params)

    def __call__(self, tensors, given, params, strategy):
        """-> (N,) log-probs, (N,) entropy or None; differentiable in the first five of the tensors."""
        if not torch.compiler.is_compiling():
            return OnHead.apply(self.kind, given, params, strategy, *tensors)
        hint, moving, support = given
        logp, entropy, _, _ = self.forward(
            *tensors, hint, moving, list(support), strategy.__name__, *ops.values(params)
        )
        return logp, entropy if params.entropy else None


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


log_probs = HeadOp("linear_logprobs", HeadTensors)

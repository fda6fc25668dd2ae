"""Put the op inside a transformers model's LM head: ``fuse_lm_head(model)``.

The model's own forward runs, up to and including the call of its head, so that whatever it does before the head stays
as it is, and the hooks of DDP, FSDP2, ZeRO-3, PEFT and autocast fire as they do for logits.
"""

import inspect
from contextlib import contextmanager
from functools import partial
from types import MethodType
from typing import Any, NamedTuple, TypeVar

import torch

from fastgrpo.inputs import IGNORE
from fastgrpo.integrations.heads import logit_options
from fastgrpo.logprobs import LogProbs, linear_logprobs

Model = TypeVar("Model", bound=torch.nn.Module)


class FusedOutput(NamedTuple):
    """What ``model(..., fastgrpo=..., fastgrpo_output=True)`` returns."""

    result: Any  # of the function: GRPOLoss, LogProbs ...
    outputs: Any  # the model's own output without its logits: aux_loss, router_logits, hidden_states ...


def fuse_lm_head(model: Model) -> Model:
    """Teach a causal language model the keyword ``fastgrpo=``; without it nothing changes, so generate is untouched.

    ``model(input_ids, ..., fastgrpo=function)`` runs the model, whose LM head calls
    ``function(hidden, weight, bias=..., softcap=..., logit_scale=...)`` with hidden (B, T, D) and weight (V, D), and
    ``lora=(A, B, scaling)`` where LoRA is active on the head; the forward returns its result.
    ``functools.partial(grpo_loss, targets=..., ...)`` and ``partial(linear_logprobs, targets=...)`` are such functions.
    No (tokens, vocab) logits are made.

    ``model(input_ids, labels=ids, fastgrpo=True)`` returns ``LogProbs(logprobs, entropy)``, each (B, T - 1) fp32: of
    the labels shifted by one, 0 where the label is -100; with ``logits_to_keep=K`` (B, K - 1), the last ones.

    ``fastgrpo_output=True`` beside it returns ``FusedOutput(result, outputs)``: ``outputs`` is what the model returns
    otherwise, but for the logits, so that ``outputs.aux_loss`` of a mixture of experts can join the loss.

    A deep copy of the model, and what pickle or ``torch.load`` makes of it, is fused too. What ``from_pretrained``
    loads is not: most models that are not fused ignore ``fastgrpo=`` without a word.

    Args:
        model: a transformers causal LM, bare or inside PEFT, DDP, FSDP2 or torch.compile, patched in place; also on the
            meta device or sharded. Softcap, logit scale and unpadded vocabulary (Gemma 2, Cohere, Granite, Falcon-H1,
            Inkling ...) are those of its forward, see :mod:`fastgrpo.integrations.heads`; fuse it again after changing
            them. LoRA on the head takes part without its dropout; a function that stands in the place of the head's own
            forward, as TRL's cast to fp32 does, is not called.

    Returns:
        the same model.

    Raises:
        TypeError: what is given is no model.
        ValueError: the model has no LM head, its head is not a linear layer, its forward does more with the head's
            output than scale, softcap or cut it, or the adapter on the head is another than plain LoRA (DoRA, IA3 ...).
    """
    base = causal_lm(model)
    if not hasattr(base, "get_output_embeddings"):
        raise TypeError(f"model must be a transformers causal LM, as from_pretrained returns it, got {base!r:.80}")
    if base.get_output_embeddings() is None:
        raise ValueError(f"model must have an LM head, {type(base).__name__} has none")
    fuse_head(base)
    base._fastgrpo_logits = logit_options(base)
    if not is_fused(base):
        base.forward = FusedCausalLM(base, base.forward)
    return model


def is_fused(model: torch.nn.Module) -> bool:
    """Whether a model, or one inside its wrappers, knows the keyword ``fastgrpo=``."""
    return isinstance(find_fused(causal_lm(model).forward), FusedCausalLM)


def check_fused(model: torch.nn.Module) -> None:
    """Raises ValueError for a model that would ignore the keyword ``fastgrpo=``."""
    if not is_fused(model):
        kind = type(causal_lm(model)).__name__
        raise ValueError(f"model must be one that fuse_lm_head has fused, got a plain {kind}")


def causal_lm(model: Any) -> Any:
    """The transformers model under the wrappers of torch.compile, DDP and PEFT."""
    for name in ("_orig_mod", "module", "_orig_mod"):
        model = getattr(model, name, model)
    return model.get_base_model() if hasattr(model, "get_base_model") else model


class FusedForward:
    """In the place of a module's ``forward``.

    An object that knows its module, so that each copy has its own. A bound method would be unpickled by its name, from
    the class of a module that is still empty. Its signature is that of the forward whose place it takes.
    """

    def __init__(self, module, forward):
        self.module = module
        own = getattr(forward, "__func__", None) is type(module).forward
        self.replaced = None if own else forward  # None: the class's own, found anew in an unpickled module

    def of(self, module):
        """The same for a copy of the module."""
        return self if module is self.module else type(self)(module, self.replaced or own_forward(module))

    def plain(self, *args, **kwargs):
        if self.replaced is None:  # called as a function: torch.compile traces no bound method that is made here
            return type(self.module).forward(self.module, *args, **kwargs)
        return self.replaced(*args, **kwargs)

    @property
    def __signature__(self):
        return inspect.signature(self.replaced or own_forward(self.module))


def own_forward(module):
    """The bound ``forward`` of a module's class, whatever stands in its place."""
    return MethodType(type(module).forward, module)


def find_fused(forward):
    """The :class:`FusedForward` at the core of a forward and the decorators around it, or None."""
    while not isinstance(core := getattr(forward, "__func__", forward), FusedForward):
        if (forward := getattr(forward, "__wrapped__", None)) is None:
            return None
    return core


def fuse_head(model):
    """-> the LM head as it is now; PEFT may have replaced it since the last call."""
    for module in head_modules(model):
        slot = "_old_forward" if hasattr(module, "_hf_hook") else "forward"  # accelerate moves devices around it
        if find_fused(getattr(module, slot)) is None:
            check_linear(module)
            module._fastgrpo = None
            setattr(module, slot, FusedHead(module, getattr(module, slot)))
        check_adapter(module)
    return model.get_output_embeddings()


def head_modules(model):
    """The modules that one call of the head may reach: PEFT's trained copies of a whole module are called instead."""
    head = model.get_output_embeddings()
    copies = getattr(head, "modules_to_save", None)
    return (head,) if copies is None else (head.original_module, *copies.values())


def check_linear(module):
    layer = getattr(module, "base_layer", module)
    if type(layer).forward is not torch.nn.Linear.forward:
        raise ValueError(f"model's LM head must be a torch.nn.Linear, got {type(layer).__name__}")


def check_adapter(head):
    """ValueError where what is active on a head is not LoRA as a sum of matrices."""
    if not is_adapted(head):
        return
    variants = sorted({type(x).__name__ for x in getattr(head, "lora_variant", {}).values()})
    if variants or not isinstance(getattr(head, "lora_A", None), torch.nn.ModuleDict):
        kinds = ", ".join(variants) or f"{type(head).__module__}.{type(head).__name__}"
        raise ValueError(f"the adapter on lm_head must be plain LoRA, got {kinds}")


def is_adapted(head):
    """Whether one of PEFT's layers around a head does something."""
    return hasattr(head, "base_layer") and not (head.disable_adapters or head.merged)


class FusedCausalLM(FusedForward):
    """A causal LM's forward, with the keyword ``fastgrpo=``."""

    def __call__(self, *args, fastgrpo=None, fastgrpo_output=False, **kwargs):
        if args and isinstance(args[0], torch.nn.Module):  # accelerate's unwrap_model binds it, to a model or its copy
            self, args = self.of(args[0]), args[1:]
        if fastgrpo is None or fastgrpo is False:
            return self.plain(*args, **kwargs)
        if fastgrpo is not True and not callable(fastgrpo):
            raise TypeError(f"fastgrpo must be True (with labels) or a function such as grpo_loss, got {fastgrpo!r}")
        run = run_labelled if fastgrpo is True else run_function
        if torch.compiler.is_compiling() and not is_traceable(self.module):
            run = torch.compiler.disable(run, recursive=False)
        out = run(self, fastgrpo, *args, **kwargs)  # pyright: ignore[reportCallIssue] - of torch.compiler.disable
        return out if fastgrpo_output else out.result


def is_traceable(model):
    """Whether a graph may hold the head's call: no hook of FSDP2, ZeRO-3 or accelerate is to see what it returns."""
    return all(not (m._forward_hooks or m._forward_pre_hooks) and find_fused(m.forward) for m in head_modules(model))


def run_function(forward, function, *args, **kwargs):
    model = forward.module
    if kwargs.get("labels") is not None:
        raise ValueError("labels must be None where fastgrpo is a function, which has targets of its own")
    kwargs.setdefault("use_cache", False)
    options, entries = model._fastgrpo_logits
    inside = scoring_in_graph if torch.compiler.is_compiling() else scoring
    with inside(model, partial(function, **options), entries) as results:
        outputs = forward.plain(*args, **kwargs)
    if len(results) != 1:
        raise ValueError(
            f"model's forward must call its LM head once, {type(model).__name__} called it {len(results)} times"
        )
    return FusedOutput(results[0], without_logits(outputs))


def run_labelled(forward, _, *args, labels=None, **kwargs):
    kind = type(forward.module)
    if not isinstance(labels, torch.Tensor) or labels.ndim != 2:
        got = tuple(labels.shape) if isinstance(labels, torch.Tensor) else repr(labels)
        raise ValueError(f"labels must be a tensor (B, T) with fastgrpo=True, got {got}")
    targets = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORE)
    keep = kwargs.get("logits_to_keep", 0)
    if not isinstance(keep, int) or (keep and "logits_to_keep" not in inspect.signature(kind.forward).parameters):
        raise ValueError(f"logits_to_keep must be a number that {kind.__name__} accepts, got {keep!r}")
    out = run_function(forward, partial(label_scores, targets=targets[:, -keep:]), *args, **kwargs)
    logprobs, entropy = out.result
    return out._replace(result=LogProbs(logprobs[:, :-1], entropy[:, :-1]))


def label_scores(hidden, weight, *, targets, **options):
    return linear_logprobs(hidden, weight, targets.to(hidden.device), return_entropy=True, **options)


@contextmanager
def scoring(model, function, entries):
    """Inside, one call of the head is a call of ``function`` whose result enters the list that is yielded.

    The caller of the head gets logits of no rows. They take the result's place in the last hook of the head, so that
    FSDP2's and ZeRO-3's hooks before it see the tensors whose backward needs the weight.
    """
    results = []

    def take(module, args, result):
        results.append(result)
        return no_logits(module, args[0])

    hook = fuse_head(model).register_forward_hook(torch.compiler.disable(take))
    try:
        with stand_in(model, Scorer(function, entries, None)):
            yield results
    finally:
        hook.remove()


@contextmanager
def scoring_in_graph(model, function, entries):
    """The same for a head without hooks: torch.compile traces neither their coming nor their going."""
    results = []
    with stand_in(model, Scorer(function, entries, results)):
        yield results


class Scorer(NamedTuple):
    """What stands in for the head's product."""

    function: Any
    entries: int | None  # of the vocabulary that the model keeps
    results: list | None  # where to put what the function returns; None: return it


@contextmanager
def stand_in(model, scorer):
    for module in head_modules(model):
        module._fastgrpo = scorer
    try:
        yield
    finally:
        for module in head_modules(model):
            module._fastgrpo = None


class FusedHead(FusedForward):
    """An LM head's forward, or inside :func:`scoring` the function in its place."""

    def __call__(self, hidden, *args, **kwargs):
        module, scorer = self.module, self.module._fastgrpo
        if scorer is None:
            return self.plain(hidden, *args, **kwargs)
        if args or kwargs:
            names = ", ".join(kwargs) or f"{len(args)} more"
            raise ValueError(f"the LM head must be called with hidden states alone, got {names} beside them")
        if scorer.results is None:
            return untraced_score(module, scorer, hidden)  # pyright: ignore[reportCallIssue]
        scorer.results.append(score(module, scorer, hidden))
        return no_logits(module, hidden)


def no_logits(head, hidden):
    return hidden.new_empty(0, *hidden.shape[1:-1], head.out_features)


def score(head, scorer, hidden):
    entries, options = scorer.entries, {"bias": head.bias, **lora_options(head)}
    # PEFT's layers lend the weight of the layer they wrap; entries cuts the vocabulary's padding, as the model does
    return scorer.function(hidden, head.weight[:entries], **{name: cut(x, entries) for name, x in options.items()})


untraced_score = torch.compiler.disable(score)


def cut(option, entries):
    """Bias (V,) or LoRA (A, B, scaling) of the first entries alone."""
    if isinstance(option, tuple):
        return option[0], option[1][:entries], option[2]
    return None if option is None else option[:entries]


def without_logits(outputs):
    if not hasattr(outputs, "logits"):
        return outputs
    return type(outputs)(**{name: value for name, value in outputs.items() if name != "logits"})


def lora_options(head):
    """``lora=`` of the adapters that are active on the head, side by side, and the bias that they change."""
    if not is_adapted(head):
        return {}
    active = [name for name in head.active_adapters if name in head.lora_A]
    if not active:
        return {}
    pairs = [(head.lora_A[name], head.lora_B[name], head.scaling[name]) for name in active]
    biases = [scaling * b.bias for _, b, scaling in pairs if b.bias is not None]
    bias = {"bias": sum(biases, 0.0 if head.bias is None else head.bias)} if biases else {}
    if len(pairs) == 1:
        ((a, b, scaling),) = pairs
        return {"lora": (a.weight, b.weight, scaling), **bias}
    down = torch.cat([scaling * a.weight for a, _, scaling in pairs])
    return {"lora": (down, torch.cat([b.weight for _, b, _ in pairs], 1), 1.0), **bias}

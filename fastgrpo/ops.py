"""What torch.compile, export and AOT autograd see: custom ops, opaque, with shapes and gradients registered.

In eager torch the same steps run in an autograd function, without the dispatcher's detour.
"""

import dataclasses
import functools
import types
import typing

import torch

SCHEMA_TYPES = {
    bool: "bool",
    int: "int",
    float: "float",
    str: "str",
    torch.dtype: "ScalarType",
    torch.Tensor: "Tensor",
}


class Once(torch.autograd.Function):
    """The first ``count`` of some tensors, as they are; whoever differentiates them by any of all gets an error."""

    @staticmethod
    def forward(ctx, count, *tensors):
        return tensors[:count]

    @staticmethod
    def backward(ctx, *grads):
        raise RuntimeError("gradients of fastgrpo's losses cannot be differentiated again (once_differentiable)")


def once_differentiable(backward):
    """Decorator of an autograd function's backward: whoever differentiates its results gets an error.

    torch's own lets them pass as constants where what comes in has no graph, as the 1 that a loss's backward begins
    with, and as independent of what was saved: a penalty on a gradient's norm would have no effect, a Hessian be 0.
    """

    @functools.wraps(backward)
    def call(ctx, *grads):
        with torch.no_grad():
            out = backward(ctx, *grads)
        made = [x for x in out if x is not None]
        if not made or not torch.is_grad_enabled():  # it is with create_graph
            return out
        known = [x for x in (*grads, *ctx.saved_tensors) if isinstance(x, torch.Tensor) and x.requires_grad]
        made = iter(Once.apply(len(made), *made, *(known or [made[0].new_empty(0).requires_grad_()])))
        return tuple(None if x is None else next(made) for x in out)

    return call


def schema(cls) -> str:
    """The fields of a dataclass or named tuple as arguments of an op, in their order."""
    return ", ".join(f"{schema_type(hint)} {name}" for name, hint in typing.get_type_hints(cls).items())


def schema_type(hint) -> str:
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        (some,) = (x for x in typing.get_args(hint) if x is not types.NoneType)
        return schema_type(some) + "?"
    return "str" if typing.get_origin(hint) is typing.Literal else SCHEMA_TYPES[hint]


def values(instance) -> list:
    """Such arguments of a dataclass."""
    return [getattr(instance, f.name) for f in dataclasses.fields(instance)]


@functools.lru_cache(maxsize=64)
def rebuild(cls, *arguments):
    """The dataclass of such arguments."""
    return cls(**dict(zip((f.name for f in dataclasses.fields(cls)), arguments)))


def op(name, arguments, returns):
    """Decorator: ``fastgrpo::name``, which writes to none of its arguments."""
    return torch.library.custom_op(f"fastgrpo::{name}", mutates_args=(), schema=f"({arguments}) -> {returns}")


def pad(x, shape):
    """x with rows of zeros until it has the shape."""
    if len(x) == shape[0]:
        return x
    out = x.new_zeros(shape)
    out[: len(x)] = x
    return out

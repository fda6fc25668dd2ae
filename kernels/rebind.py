"""Mathematics that is written once, over ``fastgrpo.torch_tl``, for Triton."""

import types

import triton
import triton.language as tl


def rebind(source, **own):
    """{name: value} of a module's functions, jitted from the same code with ``tl`` meaning Triton's language, and of
    its floats; ``own``: what the code is to find under other names."""
    names = {"tl": tl, **own}
    for name, value in vars(source).items():
        if isinstance(value, float):
            names[name] = tl.constexpr(value)
        elif isinstance(value, types.FunctionType) and value.__module__ == source.__name__:
            clone = types.FunctionType(value.__code__, names, name, value.__defaults__)
            clone.__annotations__ = dict(value.__annotations__)
            clone.__module__ = __name__
            names[name] = triton.jit(clone)
    return names

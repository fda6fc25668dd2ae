"""Triton's interpreter mended for tests: bf16, which it holds as uint16 and multiplies as bit patterns, and speed."""

import dataclasses
from types import SimpleNamespace

import numpy as np
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import GridExecutor, InterpreterBuilder, TensorHandle


def widen(bits):
    """bf16 bit patterns (uint16) -> float32."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def narrow(values):
    """float32 -> bf16 bit patterns, round to nearest even, NaN -> 0x7FC0."""
    values = np.ascontiguousarray(values, dtype=np.float32)
    bits = values.view(np.uint32)
    with np.errstate(over="ignore"):
        rounded = ((bits + ((bits >> 16) & 1) + np.uint32(0x7FFF)) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded)


def is_bf16(dtype):
    return dtype.scalar == tl.bfloat16


def patch_language_once():
    """It replaces all of triton.language anew at each call of a device function, a third of its time: once a launch."""
    plain_patch, plain_launch, patched = interpreter._patch_lang, GridExecutor.__call__, set()

    def patch_lang(function):
        languages = frozenset(id(x) for x in function.__globals__.values() if x is tl or x is tl.core)
        if languages in patched:
            return SimpleNamespace(restore=lambda: None)
        patched.add(languages)
        return plain_patch(function)

    def launch(self, *args, **kwargs):
        patched.clear()
        return plain_launch(self, *args, **kwargs)

    interpreter._patch_lang, GridExecutor.__call__ = patch_lang, launch


def skip_overflow_checks():
    """Of every sum and product of 32-bit integers, whose offsets are small here: another third."""
    builder = interpreter.interpreter_builder
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)


def patch():
    patch_language_once()
    skip_overflow_checks()
    plain_dot, plain_cast, plain_fp_to_fp = (
        InterpreterBuilder.create_dot, InterpreterBuilder.cast_impl, InterpreterBuilder.create_fp_to_fp
    )  # fmt: skip

    def as_fp32(handle):
        return TensorHandle(widen(handle.data), tl.float32) if is_bf16(handle.dtype) else handle

    def create_dot(self, a, b, d, *rest):
        return plain_dot(self, as_fp32(a), as_fp32(b), d, *rest)

    def convert(self, source, target, plain):
        if is_bf16(source.dtype) == is_bf16(target):
            return plain(source)
        if is_bf16(source.dtype):
            wide = as_fp32(source)
            return wide if target.scalar == tl.float32 else plain_cast(self, wide, target)
        wide = source if source.dtype.scalar == tl.float32 else plain_cast(self, source, tl.float32)
        return TensorHandle(narrow(wide.data), tl.bfloat16)

    def cast_impl(self, source, target):
        return convert(self, source, target, lambda x: plain_cast(self, x, target))

    def create_fp_to_fp(self, source, target, rounding):
        return convert(self, source, target, lambda x: plain_fp_to_fp(self, x, target, rounding))

    InterpreterBuilder.create_dot = create_dot
    InterpreterBuilder.cast_impl = cast_impl
    InterpreterBuilder.create_fp_to_fp = create_fp_to_fp

"""The arithmetic of PTX on numpy arrays, where numpy's own differs."""

import numpy as np


def widen(kind, bits):
    """float32 of bf16, fp16 or tf32 bits."""
    bits = bits.astype(np.uint32)
    if kind == "tf32":
        return (bits & np.uint32(0xFFFFE000)).view(np.float32)
    if kind == "bf16":
        return (bits << np.uint32(16)).view(np.float32)
    return bits.astype(np.uint16).view(np.float16).astype(np.float32)


def narrow(kind, x):
    """Bits of float32 numbers rounded to bf16 or fp16."""
    if kind == "f16":
        return x.astype(np.float16).view(np.uint16)
    bits = x.view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(x), np.uint32(0x7FFF), rounded).astype(np.uint16)


def pairs(x, dtype):
    """Two numbers of each thread, side by side."""
    return x.view(dtype).reshape(-1, 2)


def as_one(x, dtype):
    return np.ascontiguousarray(x).view(dtype).reshape(-1)


def pack(low, high):
    return low.astype(np.uint32) | high.astype(np.uint32) << np.uint32(16)


def flush(x):
    """Denormals to 0, their sign kept."""
    return np.where(np.abs(x) < np.float32(2**-126), np.copysign(np.float32(0), x), x)


def fma(a, b, c):
    return (a.astype(np.float64) * b + c).astype(np.float32)


APPROXIMATE = 0.0  # relative error of ex2 and division; a GPU's may have 2^-22


def about(result, *operands):
    """What an approximate instruction may give: the same for the same operands."""
    if not APPROXIMATE:
        return result.astype(np.float32)
    mixed = sum(x.view(np.uint32) * np.uint32(k) for x, k in zip(operands, (0x9E3779B1, 0x85EBCA77)))
    error = ((mixed ^ mixed >> np.uint32(15)) * np.uint32(0x2C1B3C6D)).view(np.int32)
    return (result * (1 + error * 2.0**-31 * APPROXIMATE)).astype(np.float32)


def exp2(x):
    """ex2.approx, exact where x is an integer."""
    wide = np.exp2(x.astype(np.float64))
    return np.where(x == np.floor(x), wide.astype(np.float32), about(wide, x))


def ratio(a, b):
    """div.full, div.approx"""
    wide = a.astype(np.float64) / b
    return np.where(wide == 1, np.float32(1), about(wide, a, b))


def rough_ratio(a, b):
    """div.approx: nothing is left of a finite number where b is 2^126 and more."""
    return np.where(
        np.isfinite(a) & (np.abs(b) > 2.0**126) & np.isfinite(b),
        np.copysign(np.float32(0), a * np.sign(b)),
        ratio(a, b),
    )


def truncated(x, dtype, wide):
    low, high = ends(dtype)
    nan = (low if low else high / 2 + 1) if wide else 0.0
    return np.where(np.isnan(x), nan, np.clip(np.trunc(x.astype(np.float64)), low, high))


def ends(dtype):
    """The least and the largest of an integer type that a float64 can hold."""
    return float(np.iinfo(dtype).min), np.nextafter(float(np.iinfo(dtype).max) + 1, 0)


def divide(a, b):
    """Of integers, toward 0."""
    return np.where((a < 0) ^ (b < 0), -(np.abs(a) // np.abs(b)), np.abs(a) // np.abs(b)).astype(a.dtype)


def remainder(a, b):
    return (a - divide(a, b) * b).astype(a.dtype)


def shift(function, x, by):
    """By the width or more: nothing is left, or the sign."""
    bits = 8 * x.itemsize
    whole = by >= bits
    moved = function(x, np.where(whole, 0, by).astype(x.dtype))
    rest = np.where(x < 0, x.dtype.type(-1), x.dtype.type(0)) if x.dtype.kind == "i" else x.dtype.type(0)
    return np.where(whole, rest, moved)


def extract(x, position, length):
    """bfe: bits of a field, with its sign where x is signed."""
    bits = 8 * x.itemsize
    assert ((length > 0) & (position + length <= bits)).all(), "bfe beyond the register"
    return (x << (bits - position - length).astype(x.dtype)) >> (bits - length).astype(x.dtype)


def permute(a, b, selector):
    """prmt: four bytes picked from eight."""
    whole = a.astype(np.uint64) | b.astype(np.uint64) << np.uint64(32)
    out = np.zeros(1, np.uint32)
    for k in range(4):
        pick = (selector >> np.uint32(4 * k)) & np.uint32(15)
        byte = (whole >> (8 * (pick & 7)).astype(np.uint64) & np.uint64(255)).astype(np.uint32)
        byte = np.where(pick & 8, np.where(byte & 128, 255, 0), byte).astype(np.uint32)
        out = out | byte << np.uint32(8 * k)
    return out


def count_bits(x):
    return np.bitwise_count(x).astype(np.uint32)

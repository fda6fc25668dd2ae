"""What Triton's interpreter does differently from a device, put right, and its speed. For tests only.

It holds bf16 as uint16 and multiplies the bit patterns; its fma rounds twice; its exp2 has denormal results; and a
reduction by a function of the kernel's own goes an element at a time, milliseconds a tile.
"""

import builtins
import contextlib
import dataclasses
import functools
import math
from types import SimpleNamespace

import numpy as np
import triton.language as tl
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter
from triton.runtime.interpreter import GridExecutor, InterpreterBuilder, ReduceOps, TensorHandle

PLAIN = {
    name: getattr(TritonSemantic, name) for name in ("binary_op_type_checking_impl", "broadcast_impl_value", "where")
}


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

    @functools.cache
    def languages_of(function):
        return frozenset(id(x) for x in function.__globals__.values() if x is tl or x is tl.core)

    def patch_lang(function):
        languages = languages_of(function)
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


def remember_types():
    """Tensors' constants, their types and NumPy's, which are made anew for each operation: a third of what is left."""
    plain, plain_type, plain_dtype = tl.tensor.__init__, tl.block_type.__init__, interpreter._get_np_dtype
    shapes, types, dtypes = {}, {}, {}

    def init(self, handle, type):
        shape = builtins.tuple(type.shape) if type.is_block() else ()
        if shape not in shapes:
            plain(self, handle, type)
            shapes[shape] = self.numel, self.shape
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.numel, self.shape = shapes[shape]

    def init_type(self, element_ty, shape):
        key = (element_ty.name, *(getattr(x, "value", x) for x in shape))
        if key not in types:
            plain_type(self, element_ty, shape)
            types[key] = dict(vars(self))
        vars(self).update(types[key], element_ty=element_ty)

    def np_dtype(type):
        if type.name not in dtypes:
            dtypes[type.name] = plain_dtype(type)
        return dtypes[type.name]

    tl.tensor.__init__, tl.block_type.__init__, interpreter._get_np_dtype = init, init_type, np_dtype


def call_directly():
    """Triton's functions, without the wrappers around each; what needs no unwrapping is handed on."""
    plain_unwrap, plain_fits = tl.core._unwrap_if_constexpr, TensorHandle.__post_init__
    leaves = {tl.tensor, int, float, bool, str, type(None)}

    def patch_attr(target, name, member, builder, *scope):
        inner = getattr(member, "__wrapped__", member) if tl.core.is_builtin(member) else member

        def call(*args, **kwargs):
            kwargs["_semantic"] = interpreter.interpreter_semantic
            return inner(*args, **kwargs)

        if target is tl.tensor and name in SHORT:
            call = SHORT[name](call)
        if scope:
            scope[0].set_attr(target, name, call)
        else:
            setattr(target, name, call)

    def unwrap(x):
        kind = type(x)
        return x if kind in leaves else x.value if kind is tl.constexpr else plain_unwrap(x)

    def fits(self):
        if self.data.itemsize * 8 > getattr(self.dtype, "primitive_bitwidth", 64):  # or it is a boolean
            plain_fits(self)

    interpreter._patch_attr, tl.core._unwrap_if_constexpr, TensorHandle.__post_init__ = patch_attr, unwrap, fits


def pass_equals():
    """Operands of one type and one shape, which most are, are checked and broadcast for nothing; a number beside a
    tensor is made once."""
    plain, plain_broadcast = PLAIN["binary_op_type_checking_impl"], PLAIN["broadcast_impl_value"]

    def check(self, lhs, rhs, left_pointer=False, right_pointer=False, arithmetic_check=True, div_or_mod=False):
        first, second = type(lhs) is tl.tensor, type(rhs) is tl.tensor
        if first and second and lhs.dtype.name == rhs.dtype.name and lhs.dtype.name in NUMBERS:
            return self.broadcast_impl_value(lhs, rhs)
        if first != second and arithmetic_check:
            x, made = (lhs, beside(rhs, lhs.dtype)) if first else (rhs, beside(lhs, rhs.dtype))
            if made is not None:
                return self.broadcast_impl_value(*((x, made) if first else (made, x)))
        return plain(self, lhs, rhs, left_pointer, right_pointer, arithmetic_check, div_or_mod)

    def broadcast(self, lhs, rhs):
        blocks = lhs.type.is_block(), rhs.type.is_block()
        if blocks[0] == blocks[1]:
            alike = lhs.handle.data.shape == rhs.handle.data.shape
            return (lhs, rhs) if alike else plain_broadcast(self, lhs, rhs)
        return (lhs, spread(self, rhs, lhs)) if blocks[0] else (spread(self, lhs, rhs), rhs)

    def spread(self, x, like):
        data = np.broadcast_to(x.handle.data.reshape(()), like.handle.data.shape)
        return self.tensor(TensorHandle(data, x.handle.dtype), like.type.with_element_ty(x.dtype))

    TritonSemantic.binary_op_type_checking_impl, TritonSemantic.broadcast_impl_value = check, broadcast


BLOCKS = {}  # {(name, shape): type}
NUMBERS = {"fp32": (float, int), "int32": (int,), "int64": (int,)}


@functools.lru_cache(maxsize=4096, typed=True)
def constant(dtype, number, sign):
    """A scalar of a type that operators with such a number keep, else None. sign: the number's, for -0.0 is 0.0."""
    if type(number) not in NUMBERS[dtype.name] or abs(number) >= 2**31:
        return None
    return interpreter.interpreter_semantic.scalar_constant(number, dtype)


def beside(x, dtype):
    """A tensor, or a number as one of that type; None where Triton would give both another."""
    if type(x) in (int, float) and dtype.name in NUMBERS:
        x = constant(dtype, x, math.copysign(1.0, x))
    if type(x) is not tl.tensor:
        return None
    if x.dtype.name == "int32" and dtype.name == "int64":
        return tl.tensor(TensorHandle(x.handle.data.astype(np.int64), dtype), x.type.with_element_ty(dtype))
    return x if x.dtype.name == dtype.name else None


def block_type(dtype, shape):
    key = dtype.name, shape
    if key not in BLOCKS:
        BLOCKS[key] = tl.block_type(dtype, list(shape))
    return BLOCKS[key]


def wrap(handle, dtype, *operands):
    """A tensor of what NumPy made of the operands' data, whose shapes it broadcasts as Triton does."""
    blocks = any(type(x.type) is tl.block_type for x in operands)
    return tl.tensor(handle, block_type(dtype, handle.data.shape) if blocks else dtype)


def operator(reverse=False, compares=False, **makers):
    """An operator of two tensors of one type, or of one and a number; Triton's own for all others.

    Args:
        makers: the builder's methods for floats, integers, booleans and pointers.
    """
    named = {"fp32": "floats", "int32": "integers", "int64": "integers", "int1": "booleans"}
    makers = {name: makers[key] for name, key in named.items() if key in makers} | {None: makers.get("pointers")}
    builder = interpreter.interpreter_builder

    def shorten(plain):
        def operate(self, other):
            first, second, dtype = self, other, self.dtype
            if type(dtype) is tl.pointer_type:
                maker, second = makers[None], beside(other, tl.int64)
            else:
                maker = makers.get(dtype.name)
                if dtype.name == "int32" and type(other) is tl.tensor and other.dtype.name == "int64":
                    first, dtype = beside(self, tl.int64), tl.int64
                second = beside(other, dtype)
            if maker is None or second is None:
                return plain(self, other)
            handles = (second.handle, first.handle) if reverse else (first.handle, second.handle)
            return wrap(getattr(builder, maker)(*handles), tl.int1 if compares else dtype, first, second)

        return operate

    return shorten


def is_axis(x):
    return x is None or (type(x) is slice and x == slice(None))


def index(plain):
    """New axes of a block."""

    def getitem(self, slices):
        if type(self.type) is tl.block_type and type(slices) is builtins.tuple and all(map(is_axis, slices)):
            handle = TensorHandle(self.handle.data[slices], self.handle.dtype)
            return tl.tensor(handle, block_type(self.dtype, handle.data.shape))
        return plain(self, slices)

    return getitem


def compare(of_floats, of_integers):
    return operator(compares=True, floats=f"create_fcmp{of_floats}", integers=f"create_icmp{of_integers}")


SHORT = {
    "__add__": operator(floats="create_fadd", integers="create_add", pointers="create_addptr"),
    "__radd__": operator(reverse=True, floats="create_fadd", integers="create_add"),
    "__sub__": operator(floats="create_fsub", integers="create_sub"),
    "__rsub__": operator(reverse=True, floats="create_fsub", integers="create_sub"),
    "__mul__": operator(floats="create_fmul", integers="create_mul"),
    "__rmul__": operator(reverse=True, floats="create_fmul", integers="create_mul"),
    "__truediv__": operator(floats="create_fdiv"),
    "__rtruediv__": operator(reverse=True, floats="create_fdiv"),
    "__floordiv__": operator(integers="create_sdiv"),
    "__rfloordiv__": operator(reverse=True, integers="create_sdiv"),
    "__mod__": operator(integers="create_srem"),
    "__rmod__": operator(reverse=True, integers="create_srem"),
    "__and__": operator(integers="create_and", booleans="create_and"),
    "__or__": operator(integers="create_or", booleans="create_or"),
    "__lt__": compare("OLT", "SLT"),
    "__le__": compare("OLE", "SLE"),
    "__gt__": compare("OGT", "SGT"),
    "__ge__": compare("OGE", "SGE"),
    "__eq__": compare("OEQ", "EQ"),
    "__ne__": compare("UNE", "NE"),
    "__getitem__": index,
}


def choose_directly():
    """tl.where of two values of one type."""

    def where(self, condition, x, y):
        like = x if type(x) is tl.tensor else y
        if type(like) is tl.tensor and condition.dtype.name == "int1":
            first, second = beside(x, like.dtype), beside(y, like.dtype)
            if first is not None and second is not None:
                handle = self.builder.create_select(condition.handle, first.handle, second.handle)
                return wrap(handle, like.dtype, condition, first, second)
        return PLAIN["where"](self, condition, x, y)

    TritonSemantic.where = where


def create_fma(self, x, y, z):
    """fp32 in fp64, where the product is exact; other dtypes as they are."""
    exact = np.float64 if x.dtype.scalar == tl.float32 else x.data.dtype
    with np.errstate(over="ignore", invalid="ignore"):
        value = x.data.astype(exact) * y.data.astype(exact) + z.data.astype(exact)
        return TensorHandle(value.astype(x.data.dtype), z.dtype.scalar)


def create_exp2(self, x):
    """As devices do, which flush a denormal result to 0."""
    with np.errstate(over="ignore"):
        value = np.exp2(x.data)
    return TensorHandle(np.where(value < np.finfo(value.dtype).tiny, value.dtype.type(0), value), x.dtype.scalar)


def generic_reduce(self, input):
    """The two halves of the axis, which is a power of two long, at once, until one slice is left."""
    done = tuple(self.to_tensor(np.moveaxis(x.handle.data, self.axis, 0), x.dtype) for x in input)
    while (half := done[0].handle.data.shape[0] // 2) > 0:
        parts = (x.handle.data[part] for part in (slice(half), slice(half, None)) for x in done)
        done = self.combine_fn.fn(*map(self.to_tensor, parts, [x.dtype for x in done] * 2))
        done = done if isinstance(done, tuple) else (done,)
    slices = [x.handle.data[0] for x in done]
    if self.keep_dims:
        slices = [np.expand_dims(x, self.axis) for x in slices]
    return list(map(self.to_tensor, slices, [x.dtype for x in done]))


def patch():
    patch_language_once()
    skip_overflow_checks()
    remember_types()
    call_directly()
    pass_equals()
    choose_directly()
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

    plain_reduce = ReduceOps.generic_reduce
    ReduceOps.generic_reduce = lambda self, x: (plain_reduce if self.axis is None else generic_reduce)(self, x)
    InterpreterBuilder.create_fma = create_fma
    InterpreterBuilder.create_exp2 = create_exp2
    InterpreterBuilder.create_dot = create_dot
    InterpreterBuilder.cast_impl = cast_impl
    InterpreterBuilder.create_fp_to_fp = create_fp_to_fp


@contextlib.contextmanager
def fused():
    """As compilers may: a product that a sum or a difference takes at once is not rounded first. fp32 only."""
    names = ("create_fmul", "create_fadd", "create_fsub")
    plain = {name: getattr(InterpreterBuilder, name) for name in names}

    def multiply(self, x, y):
        out = plain["create_fmul"](self, x, y)
        if x.dtype.scalar == tl.float32:
            out.attr = {**out.attr, "product": (x, y)}
        return out

    def add(self, x, y, name, sign):
        if "product" in x.attr:
            negated = TensorHandle(sign * y.data, y.dtype)
            return create_fma(self, *x.attr["product"], negated)
        if "product" in y.attr:
            a, b = y.attr["product"]
            return create_fma(self, TensorHandle(sign * a.data, a.dtype), b, x)
        return plain[name](self, x, y)

    InterpreterBuilder.create_fmul = multiply
    InterpreterBuilder.create_fadd = lambda self, x, y: add(self, x, y, "create_fadd", np.float32(1))
    InterpreterBuilder.create_fsub = lambda self, x, y: add(self, x, y, "create_fsub", np.float32(-1))
    try:
        yield
    finally:
        for name in names:
            setattr(InterpreterBuilder, name, plain[name])

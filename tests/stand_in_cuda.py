"""A CUDA device made of CPU memory: tensors say ``cuda:0``, numbers are real, and devices must not be mixed.

What a GPU would refuse raises here too, and what would make the host wait is written down. Autocast, streams and Triton
kernels are beyond it. Inside C++ the tensors are on the meta device, which has all the machinery that autograd wants.
"""

from types import SimpleNamespace

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only

DEVICE = torch.device("cuda", 0)
BY_VALUE = {"nonzero", "masked_select", "_unique2", "unique_consecutive", "unique_dim", "_local_scalar_dense", "equal"}
COPIES = {"copy_", "_to_copy"}
INDEXED = {"index", "index_put", "index_put_", "_index_put_impl_"}  # take indices on the CPU, which they copy over
NO_SCALARS = {"cat", "stack", "mm", "addmm", "bmm", "index_select", "gather", "scatter", "scatter_"}


class CudaTensor(torch.Tensor):
    """A tensor over ``inner``, on the CPU, that claims to be on the GPU."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, inner):
        self = torch.Tensor._make_wrapper_subclass(
            cls, inner.size(), strides=inner.stride(), storage_offset=inner.storage_offset(), dtype=inner.dtype,
            device="meta",
        )  # fmt: skip
        self.inner = inner
        return self

    device = property(lambda self: DEVICE)
    is_cuda = property(lambda self: True)
    is_meta = is_cpu = property(lambda self: False)

    def data_ptr(self):
        return self.inner.data_ptr()

    def tolist(self):
        return self.cpu().tolist()

    def numpy(self):
        raise TypeError("can't convert cuda:0 device type tensor to numpy")

    __array__ = numpy

    def __repr__(self, **_):
        return f"cuda {self.inner!r}"

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise AssertionError(f"{func} outside of the stand-in's mode")


class Names(TorchFunctionMode):
    """Calls that name the device cuda reach the dispatcher as meta, which only stands in for it."""

    def __init__(self, device):
        super().__init__()
        self.stand_in = device

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func in (torch.tensor, torch.as_tensor) and is_cuda(kwargs.get("device")):
            self.stand_in.waits.append("tensor")
            return self.stand_in.put(func(*args, **{**kwargs, "device": "cpu"}))
        if func is torch.Tensor.cuda:
            func, args = torch.Tensor.to, (args[0], "cuda")
        args = tuple("meta" if is_cuda(a) else a for a in args)
        return func(*args, **{k: "meta" if is_cuda(v) else v for k, v in kwargs.items()})


def is_cuda(x):
    return isinstance(x, torch.device | str) and str(x).startswith("cuda")


class StandInCuda(TorchDispatchMode):
    """``with StandInCuda() as cuda``: ``cuda.put(x)`` copies a tensor over; ``cuda.waits`` names the ops that wait."""

    def __enter__(self):
        self.waits, self.names, self.engine = [], Names(self), torch.autograd._engine_run_backward
        torch.autograd._engine_run_backward = self.run_backward
        # what a checkpointed layer asks for the device's random numbers, of which there are none
        torch.meta = SimpleNamespace(_initialized=False, device_count=lambda: 0)
        self.names.__enter__()
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        self.names.__exit__(*error)
        torch.autograd._engine_run_backward = self.engine
        del torch.meta

    def run_backward(self, *args, **kwargs):
        with Names(self):  # a call that is itself intercepted, as Tensor.backward, runs without
            return self.engine(*args, **kwargs)

    def put(self, x, requires_grad=None):
        wanted = x.requires_grad if requires_grad is None else requires_grad
        return CudaTensor(x.detach().clone()).requires_grad_(wanted)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs, name = dict(kwargs or {}), func.overloadpacket.__name__
        tensors = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, torch.Tensor)]
        here = [x for x in tensors if isinstance(x, CudaTensor)]
        asked = kwargs.get("device")
        if not here and (asked is None or asked.type != "meta"):
            return func(*args, **kwargs)
        if name not in COPIES:
            self.check(name, args, tensors)
        elif len(here) < len(tensors) or asked is not None:
            self.waits.append(f"copy to {'cuda' if asked is None or asked.type == 'meta' else 'cpu'}")
        if name in BY_VALUE or (name == "repeat_interleave" and kwargs.get("output_size") is None):
            self.waits.append(name)
        leaves = asked is not None and asked.type == "cpu"
        if asked is not None:
            kwargs["device"] = torch.device("cpu")
        inner = tree_map_only(CudaTensor, lambda x: x.inner, (args, kwargs))
        out = mm_widened(*inner[0]) if func is torch.ops.aten.mm.dtype else func(*inner[0], **inner[1])
        if leaves or (name == "copy_" and not isinstance(args[0], CudaTensor)):
            return out
        owners = {id(x.inner): x for x in here}
        return tree_map_only(torch.Tensor, lambda x: owners.get(id(x)) if id(x) in owners else CudaTensor(x), out)

    def check(self, name, args, tensors):
        """Every tensor is here, but for numbers and indices on the CPU; the latter are copied over."""
        if name in INDEXED and isinstance(args[0], CudaTensor):
            indices = [x for x in args[1] if x is not None]
            if any(x.dtype in (torch.bool, torch.uint8) or not isinstance(x, CudaTensor) for x in indices):
                self.waits.append(name)
            tensors = [x for x in tensors if all(x is not i for i in indices)]
        for x in tensors:
            if not isinstance(x, CudaTensor) and (x.ndim or name in NO_SCALARS):
                raise RuntimeError(f"{name}: expected all tensors on cuda:0, got one of shape {tuple(x.shape)} on cpu")


def mm_widened(a, b, out_dtype):
    """CUDA's ``torch.mm(..., out_dtype=)``: 16-bit operands of one dtype, summed in fp32."""
    assert a.dtype == b.dtype in (torch.bfloat16, torch.float16), (a.dtype, b.dtype)
    assert out_dtype == torch.float32
    return a.float() @ b.float()

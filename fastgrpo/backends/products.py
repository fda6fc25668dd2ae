"""Matrix products of the torch backend, of whichever library multiplies fp32 faster on this CPU.

torch.mm goes to MKL, which leaves AVX-512 unused on AMD's CPUs: oneDNN, which torch brings along, takes less than half
the time on a Zen 5. Both multiply in fp32.
"""

import contextlib
import itertools
import platform

import torch

SMALLEST = 2**20  # multiplications below which what a call of oneDNN costs beside them is felt
OPERATION = (
    "mkldnn::_linear_pointwise(Tensor X, Tensor W, Tensor? B, str attr, Scalar?[] scalars, str? algorithm) -> Tensor Y"
)
ZEN_5 = 26  # family of AMD's first CPUs whose AVX-512 does twice as much at once as AVX2


def mm(a, b, out=None):
    """(n, k) @ (k, m); oneDNN makes memory of its own, from which ``out`` is copied."""
    if not takes_onednn(a, b):
        return torch.mm(a, b) if out is None else torch.mm(a, b, out=out)
    product = linear(a, b.t())
    return product if out is None else out.copy_(product)


def add_mm(total, a, b):
    """total += a @ b"""
    if takes_onednn(a, b):
        total += linear(a, b.t())
    else:
        total.addmm_(a, b)


def linear(x, weight):
    """x @ weight.T: the product of oneDNN's that torch lets one call, without autograd."""
    return torch.ops.mkldnn._linear_pointwise.default(x, weight, None, "none", [], "")


def takes_onednn(a, b):
    return (
        makes_memory(a.device, a.dtype)
        and b.dtype == a.dtype
        and a.shape[0] * a.shape[1] * b.shape[1] >= SMALLEST
        and (b.is_contiguous() or b.t().is_contiguous())  # of others oneDNN's plain reference is 1000 times slower
        and not (torch.is_grad_enabled() and (a.requires_grad or b.requires_grad))
    )


def makes_memory(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether products of such tensors come in memory of their own, and take a copy of a left factor that is
    transposed."""
    return device.type == "cpu" and dtype == torch.float32 and onednn_is_faster()


def onednn_is_faster():
    return FASTER_ONEDNN and bool(torch.backends.mkldnn.enabled)


def has_faster_onednn():
    """Told from what the CPU is, never by a clock: the choice, and so the last digits, are the same on every run."""
    vendor, family = cpu_vendor()
    return (
        vendor == "AuthenticAMD"
        and family >= ZEN_5
        and torch.backends.mkl.is_available()
        and torch.backends.mkldnn.is_available()
        and getattr(torch.cpu, "_is_avx512_supported", lambda: False)()
        and has_operation()
    )


def cpu_vendor():
    """-> (vendor, family) of an x86 CPU; ("", 0) where that is not known."""
    if platform.system() == "Windows":
        words = platform.processor().split()  # AMD64 Family 26 Model 2 Stepping 1, AuthenticAMD
        known = {"vendor_id": words[-1], "cpu family": words[2]} if len(words) > 3 and words[1] == "Family" else {}
    else:
        known = {}
        with contextlib.suppress(OSError), open("/proc/cpuinfo") as file:
            for name, _, value in (line.partition(":") for line in itertools.takewhile(str.strip, file)):  # the first's
                known[name.strip()] = value.strip()
    return known.get("vendor_id", ""), int(known.get("cpu family", 0))


def has_operation():
    """Whether this torch's private operation is the one that 2.8 to 2.14 have."""
    known = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
    return known is not None and "default" in known.overloads() and str(known.default._schema) == OPERATION


FASTER_ONEDNN = has_faster_onednn()

"""``python -m fastgrpo.env``: what is installed, on which device the op runs, and whether it is right here."""

import importlib.metadata
import os
import platform
import sys
import time

import torch

from fastgrpo import GRPOLossConfig, __version__, backends, grpo_loss, reference
from fastgrpo.backends import products
from fastgrpo.inputs import IGNORE

PACKAGES = ("triton", "transformers", "accelerate", "peft", "datasets", "trl", "liger-kernel", "verl", "vllm",
            "bitsandbytes", "flash-attn", "deepspeed")  # fmt: skip
VARIABLES = ("TRITON_INTERPRET", "FASTGRPO_DEBUG", "FASTGRPO_TRL_UNTESTED", "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS")
SIZES = (4, 37, 64, 1031)  # B, T, D, V: nothing divides a tile
LIMITS = {torch.float32: 1e-5, torch.bfloat16: 1e-2}  # of the relative errors, in the hidden states' dtype


def version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def device() -> torch.device:
    """The one that a user's tensors are likely to be on."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def name_of(where: torch.device) -> str:
    if where.type == "cpu":
        return f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"
    about = torch.cuda.get_device_properties(where)
    return f"{about.name}, capability {about.major}.{about.minor}, {about.total_memory / 2**30:.0f} GiB"


def report() -> dict[str, str]:
    """What a person who looks for a mistake asks first, {name: text}."""
    where = device()
    lines = {
        "fastgrpo": f"{__version__} in {os.path.dirname(__file__)}",
        "python": f"{platform.python_version()}, {platform.platform()}",
        "torch": f"{torch.__version__}, CUDA {torch.version.cuda}, HIP {torch.version.hip}",
        **{package: version(package) for package in PACKAGES},
        **{variable: os.environ[variable] for variable in VARIABLES if variable in os.environ},
        "device": f"{where.type}: {name_of(where)}",
    }
    if where.type == "cpu":
        lines["fp32 products"] = "oneDNN, faster here" if products.onednn_is_faster() else "torch.mm"
    return lines | {"backend": backends.choose("auto", torch.empty(0, device=where))}


def self_test(dtype: torch.dtype = torch.float32) -> dict[str, float]:
    """Relative errors of loss and gradients against the reference in float64 on the same numbers, {name: error}.

    Args:
        dtype: of hidden states and head.
    """
    where, generator = device(), torch.Generator().manual_seed(0)
    B, T, D, V = SIZES
    hidden = torch.randn(B, T, D, generator=generator).to(where, dtype)
    weight = (torch.randn(V, D, generator=generator) / 4).to(where, dtype)
    targets = torch.randint(0, V, (B, T), generator=generator)
    targets[0, :5] = IGNORE
    known = {name: -7 * torch.rand(B, T, generator=generator) for name in ("old_logprobs", "ref_logprobs")}
    given = {"targets": targets, "advantages": torch.tensor([1.5, -0.5, 0.0, -1.0]), **known}
    given = {name: x.to(where) for name, x in given.items()}
    config = GRPOLossConfig(beta=0.04, entropy_coef=0.01)
    ours, theirs = (
        loss_and_gradients(function, hidden.to(kind), weight.to(kind), given, config)
        for function, kind in ((grpo_loss, dtype), (reference.grpo_loss, torch.float64))
    )
    names = ("loss", "gradient of hidden", "gradient of weight")
    return {name: float((a - b).norm() / b.norm()) for name, a, b in zip(names, ours, theirs)}


def loss_and_gradients(function, hidden, weight, given, config):
    hidden, weight = hidden.detach().requires_grad_(), weight.detach().requires_grad_()
    loss = function(hidden, weight, **given, config=config).loss
    loss.backward()
    return [x.detach().double() for x in (loss, hidden.grad, weight.grad)]


def main() -> int:
    """Prints the report and the self-test; 1 if the op is off."""
    for name, text in report().items():
        print(f"{name:22} {text}")
    right = True
    for dtype, limit in LIMITS.items():
        started, errors = time.perf_counter(), self_test(dtype)
        fine = all(error <= limit for error in errors.values())  # a NaN is not
        right &= fine
        shown = ", ".join(f"{name} {error:.1e}" for name, error in errors.items())
        kind, took = str(dtype).removeprefix("torch."), time.perf_counter() - started
        print(f"self-test {kind:12} {'passed' if fine else 'FAILED'} in {took:.1f} s: {shown}; limit {limit:.0e}")
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())

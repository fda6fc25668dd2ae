"""Everything that computes a GRPO loss head, each the peer's own installed code, called as its users call it.

An entry gives per-token log-probs (and entropy), or a whole loss, or both. Where it gives log-probs only, as most do,
the objective around them is the same O(N) torch code for all (fastgrpo's own, outside the op). What computes a
divergence from a teacher is in :mod:`bench.divergences`.
"""

import functools
import importlib.metadata
import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

from bench.cases import OBJECTIVES, Problem
from fastgrpo import grpo_loss, linear_logprobs, terms
from fastgrpo.batch import LossInputs, flatten


@dataclass(frozen=True)
class Entry:
    """One alternative, what it can do, and a model of what it costs."""

    name: str
    package: str
    logprobs: Callable | None  # (Problem, entropy: bool) -> (logprobs, entropy or None), each of N values
    loss: Callable | None = None  # (Problem) -> 0-dim; None: the common objective on the log-probs
    cuda_only: bool = False
    softcap: bool = False
    entropy: bool = False
    any_objective: bool = True
    slow_on_cpu: bool = False  # dozens of GEMMs there: its figure is taken in the first case only
    needs_function: str = ""  # of torch.nn.functional, which older versions lack
    # GEMMs of 2 N V D in the forward, in the backward with a trained head, with a frozen one
    passes: tuple[float, float, float] = (1, 2, 1)
    mixture: float = 0  # GEMMs more in the forward of a JSD
    on_cpu: tuple[float, float, float] | None = None  # in the place of both, there
    trips: float = 0  # times an (N, V) array crosses memory in forward and backward, in the inputs' dtype

    def why_not(self, case, device):
        """Why this entry cannot run a case here, or None."""
        if self.package not in ("torch", "fastgrpo") and not is_installed(self.package):
            return f"{self.package} is not installed"
        if self.needs_function and not hasattr(F, self.needs_function):
            return f"torch {torch.__version__} has no {self.needs_function}"
        if self.cuda_only and device != "cuda":
            return "needs a CUDA device"
        plain = case.group == "base" and case.profile == "rl" and case.head == "trained" and not case.zero_share
        if self.slow_on_cpu and device == "cpu" and not plain:
            return "too slow here for more than the first case"
        if case.softcap and not self.softcap:
            return "no softcap"
        if needs_entropy(case) and not self.entropy:
            return "no entropy"
        if not self.any_objective and (reason := liger_lacks(case)):
            return reason
        return None

    def run_loss(self, p: Problem):
        if self.loss is not None:
            return self.loss(p)
        return objective(p, *self.logprobs(p, needs_entropy(p.case)))

    def model(self, case, device):
        """-> (FLOPs, bytes) of forward and backward, by design: GEMMs; operands once a GEMM plus logits' trips."""
        there = self.on_cpu is not None and device == "cpu"
        forward, *backward = self.on_cpu if there else self.passes
        gemms = forward + backward[0 if case.head == "trained" else 1]
        gemms += self.mixture if case.is_divergence and 0 < case.beta < 1 and not there else 0
        return gemms * case.gemm_flops, gemms * case.input_bytes + self.trips * case.N * case.V * case.itemsize


@functools.cache
def is_installed(package):
    return importlib.util.find_spec(package) is not None


def version(package):
    names = {"liger_kernel": "liger-kernel", "cut_cross_entropy": "cut-cross-entropy"}
    try:
        return importlib.metadata.version(names.get(package, package))
    except importlib.metadata.PackageNotFoundError:
        return None


def needs_entropy(case):
    return "entropy" in case.objective


def objective(p, logprobs, entropy):
    """The case's loss on given log-probs: O(N) torch, differentiable in them."""
    logprobs = logprobs.reshape(-1).float()
    entropy = None if entropy is None else entropy.reshape(-1).float()
    given = LossInputs(p.targets, p.advantages, p.mask, old_logprobs=p.old, ref_logprobs=p.ref)
    batch = flatten(given, p.config, given.check(p.config), logprobs.dtype, skip=False)
    return terms.objective(p.config, batch, logprobs, entropy, "torch").loss


def full_logits(p, entropy):
    hidden, weight, targets = p.flat
    logits = F.linear(hidden, weight).float()
    if p.case.softcap:
        logits = p.case.softcap * torch.tanh(logits / p.case.softcap)
    if not entropy:
        return -F.cross_entropy(logits, targets, reduction="none"), None
    logp = logits.log_softmax(-1)
    return logp.gather(-1, targets[:, None])[:, 0], -(logp.exp() * logp).sum(-1)


@functools.cache
def compile_logits():
    torch._dynamo.config.recompile_limit = 64  # beyond it, a suite's many cases would silently be eager's
    return torch.compile(full_logits, dynamic=True)


def trl(p, entropy):
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction

    hidden, weight, targets = p.flat
    out = ChunkedLogProbFunction.apply(
        hidden,
        weight,
        None,
        targets,
        1.0,
        min(32768, len(weight)),
        p.case.softcap,
        1.0,
        ("entropy",) if entropy else (),
    )
    return out[0], out[1]


def liger_lacks(case):
    """Why Liger's two GRPO losses cannot express the objective of a case."""
    options = OBJECTIVES[case.objective]
    lacking = {"dual_clip", "divergence_mask", "entropy_coef", "top_entropy_quantile"} & set(options)
    level = options.get("importance_sampling_level", "token")
    if level == "sequence_token":
        lacking.add("sequence_token")
    return f"no {', '.join(sorted(lacking))}" if lacking else None


def liger_options(config):
    """GRPOLossConfig -> the arguments both of Liger's losses share."""
    return {
        "beta": config.beta,
        "loss_type": config.loss_type,
        "temperature": config.temperature,
        "delta": config.delta,
        "max_completion_length": config.max_completion_length,
        "importance_sampling_level": config.importance_sampling_level,
        "use_bias_correction_kl": config.use_bias_correction_kl,
        "sapo_temperature_pos": config.sapo_temperature_pos,
        "sapo_temperature_neg": config.sapo_temperature_neg,
    }


def liger_fused(p):
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    head = LigerFusedLinearGRPOLoss(
        epsilon_low=p.config.epsilon,
        epsilon_high=p.config.upper_epsilon,
        use_ref_model=p.config.beta != 0,
        **liger_options(p.config),
    )
    loss, _ = head(
        p.hidden,
        p.weight,
        p.targets,
        p.mask,
        p.advantages,
        old_per_token_logps=p.old,
        ref_per_token_logps=p.ref if p.config.beta else None,
    )
    return loss


def liger_triton(p):
    from liger_kernel.transformers.grpo_loss import triton_grpo_loss

    logits = F.linear(F.pad(p.hidden, (0, 0, 0, 1)), p.weight)  # it drops the last position, as TRL's models give it
    loss, _ = triton_grpo_loss(
        logits,
        p.old,
        p.ref if p.config.beta else None,
        p.targets,
        p.advantages,
        p.mask,
        eps_low=p.config.epsilon,
        eps_high=p.config.upper_epsilon,
        reduce=True,
        **liger_options(p.config),
    )
    return loss


def cce(p, entropy):
    from cut_cross_entropy import linear_cross_entropy

    return -linear_cross_entropy(*p.flat, softcap=p.case.softcap, reduction="none"), None


def liger_scaled(p, entropy):
    from liger_kernel.ops.fused_linear_scaled_cross_entropy import LigerFusedLinearScaledCrossEntropyFunction

    out = LigerFusedLinearScaledCrossEntropyFunction.apply(*p.flat, 1.0, -100, 1, entropy)
    return (-out[0], out[1]) if entropy else (-out, None)


def torch_fused(p, entropy, options=None):
    hidden, weight, targets = p.flat
    return -F.linear_cross_entropy(hidden, weight, targets, reduction="none", options=options), None


def torch_chunked(p, entropy):
    return torch_fused(p, entropy, torch.nn.LinearCrossEntropyOptions())


def verl(p, entropy):
    from verl.utils.kernel.linear_cross_entropy import linear_cross_entropy

    return linear_cross_entropy(*p.flat, 1.0, "none", None)


@functools.cache
def unsloth_module():
    """unsloth_zoo's file of fused losses, loaded by itself: the package wants unsloth and a GPU, and patches others."""
    folder = importlib.util.find_spec("unsloth_zoo").submodule_search_locations[0]
    name = "unsloth_zoo_fused_linear"
    spec = importlib.util.spec_from_file_location(name, Path(folder) / "fused_losses" / "fused_linear.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # its custom operators look their annotations up there
    spec.loader.exec_module(module)
    return module


def unsloth(p, entropy):
    out = unsloth_module().fused_linear_logprobs(
        p.hidden, p.weight, p.targets, logit_softcapping=p.case.softcap or 0.0, return_entropy=entropy
    )
    return out if entropy else (out, None)


def ours_logprobs(backward):
    def run(p, entropy):
        out = linear_logprobs(
            p.hidden,
            p.weight,
            p.targets,
            softcap=p.case.softcap,
            return_entropy=entropy,
            old_logprobs=p.old,
            backward=backward,
        )
        return out.logprobs, out.entropy

    return run


def ours_loss(backward):
    def run(p):
        return grpo_loss(
            p.hidden,
            p.weight,
            p.targets,
            p.advantages,
            p.config,
            mask=p.mask,
            old_logprobs=p.old,
            ref_logprobs=p.ref,
            softcap=p.case.softcap,
            backward=backward,
        ).loss

    return run


def ours(backward, passes):
    return Entry(
        f"fastgrpo {backward}",
        "fastgrpo",
        ours_logprobs(backward),
        ours_loss(backward),
        softcap=True,
        entropy=True,
        passes=passes,
    )


ENTRIES = {
    e.name: e
    for e in (
        ours("certified", (1, 1.0, 0.2)),  # counted on the RL profile: N 1024, V 32768, D 512
        ours("auto", (1, 1.1, 0.3)),
        ours("exact", (1, 3, 1)),
        Entry("full logits", "torch", full_logits, softcap=True, entropy=True, trips=8),
        Entry(
            "full logits, torch.compile",
            "torch",
            lambda p, e: compile_logits()(p, e),
            softcap=True,
            entropy=True,
            trips=5,
        ),
        Entry("TRL op", "trl", trl, softcap=True, entropy=True, passes=(1, 3, 2), trips=6),
        Entry("Liger fused GRPO", "liger_kernel", None, liger_fused, any_objective=False, passes=(4, 0, 0), trips=8),
        Entry(
            "Liger Triton GRPO on logits",
            "liger_kernel",
            None,
            liger_triton,
            cuda_only=True,
            any_objective=False,
            trips=5,
        ),
        Entry("Liger scaled CE", "liger_kernel", liger_scaled, entropy=True, passes=(1, 3, 3), trips=6),
        Entry("CCE", "cut_cross_entropy", cce, cuda_only=True, softcap=True, passes=(1, 1.5, 1.25)),
        Entry("torch linear_cross_entropy", "torch", torch_fused, needs_function="linear_cross_entropy", trips=8),
        Entry(
            "torch linear_cross_entropy, chunked",
            "torch",
            torch_chunked,
            needs_function="linear_cross_entropy",
            slow_on_cpu=True,
            passes=(3, 0, 0),
            trips=6,
        ),
        Entry("verl", "verl", verl, cuda_only=True, entropy=True, passes=(1, 3, 3), trips=2),
        Entry("unsloth_zoo", "unsloth_zoo", unsloth, softcap=True, entropy=True, passes=(1, 3, 1), trips=6),
    )
}

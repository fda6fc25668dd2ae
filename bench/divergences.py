"""Everything that computes a distillation's divergence from hidden states and heads, beside :mod:`bench.entries`."""

import functools
import math

import torch
import torch.nn.functional as F

from bench.entries import ENTRIES, Entry, unsloth_module
from fastgrpo import linear_divergence


def ours(backward, **options):
    def run(p):
        return linear_divergence(
            p.hidden,
            p.weight,
            p.teacher_hidden,
            p.teacher_weight,
            beta=p.case.beta,
            softcap=p.case.softcap,
            teacher_softcap=p.case.softcap,
            backward=backward,
            **options,
        ).divergence.mean()

    return run


def our_entry(backward, passes, on_cpu=None):
    name = f"fastgrpo {backward}"
    return Entry(name, "fastgrpo", None, ours(backward), softcap=True, passes=passes, mixture=2, on_cpu=on_cpu)


def full_logits(hidden, weight, teacher_hidden, teacher_weight, beta, softcap):
    log_s, log_t = log_probs(hidden, weight, softcap), log_probs(teacher_hidden, teacher_weight, softcap)

    def kl(first, second):
        return F.kl_div(second, first, reduction="none", log_target=True).sum(-1)

    if beta == 0.0:
        return kl(log_t, log_s).mean()
    if beta == 1.0:
        return kl(log_s, log_t).mean()
    mixture = torch.logaddexp(log_s + math.log(1 - beta), log_t + math.log(beta))
    return (beta * kl(log_t, mixture) + (1 - beta) * kl(log_s, mixture)).mean()


def log_probs(hidden, weight, softcap):
    logits = F.linear(hidden, weight).float()
    return (logits if softcap is None else softcap * torch.tanh(logits / softcap)).log_softmax(-1)


@functools.cache
def compile_logits():
    torch._dynamo.config.recompile_limit = 64  # beyond it, a suite's many cases would silently be eager's
    return torch.compile(full_logits, dynamic=True)


def of_logits(function):
    return lambda p: function()(*heads(p), p.case.beta, p.case.softcap)


def heads(p):
    """Rows and weight of the student, then the teacher's, as most peers take them."""
    return p.hidden.flatten(0, 1), p.weight, p.teacher_hidden.flatten(0, 1), p.teacher_weight


def trl(p):
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    hidden, weight, teacher_hidden, teacher_weight = heads(p)
    cap = p.case.softcap
    return ChunkedDivergenceFunction.apply(
        hidden, weight, None, teacher_hidden, teacher_weight, None, p.case.beta, 1.0, 1.0, cap, 1.0, cap
    )[0].mean()


def liger_fused(p):
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    labels = torch.zeros_like(p.targets.flatten())  # none is ignored
    return LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=p.case.beta)(*heads(p), labels)


def liger_triton(p):
    from liger_kernel.transformers import LigerFusedLinearJSD

    return LigerFusedLinearJSD(jsd_beta=p.case.beta)(*heads(p), None)


def unsloth(p):
    cap = p.case.softcap or 0.0
    return unsloth_module().fused_linear_jsd(
        *heads(p), beta=p.case.beta, student_logit_softcapping=cap, teacher_logit_softcapping=cap
    )


# passes: both models' logits, in the backward once more; then dX and dW. Panels make these in the forward.
PANELS = (4, 0, -1)  # a frozen head has no dW
DIVERGENCES = {
    e.name: e
    for e in (
        our_entry("certified", (2, 4, 1)),  # counted on the RL profile: N 1024, V 16384, D 512, a trained head exact
        our_entry("auto", (2, 4, 2), on_cpu=PANELS),
        our_entry("exact", (2, 4, 3), on_cpu=PANELS),
        Entry("full logits", "torch", None, of_logits(lambda: full_logits), softcap=True, passes=(2, 2, 1), trips=16),
        Entry(
            "full logits, torch.compile",
            "torch",
            None,
            of_logits(compile_logits),
            softcap=True,
            passes=(2, 2, 1),
            trips=10,
        ),
        Entry("TRL op", "trl", None, trl, softcap=True, passes=(2, 4, 3), mixture=2, trips=10),
        Entry("Liger fused JSD", "liger_kernel", None, liger_fused, passes=(4, 0, 0), trips=16),
        Entry("Liger Triton JSD", "liger_kernel", None, liger_triton, cuda_only=True, passes=(4, 0, 0), trips=14),
        Entry("unsloth_zoo", "unsloth_zoo", None, unsloth, softcap=True, passes=(3, 1, 0), trips=14),
        # a JSD's logits are held there, whatever V, see fastgrpo.kernels.held
        Entry(
            "fastgrpo auto, 1 GiB",
            "fastgrpo",
            None,
            ours("auto", workspace_mb=1024),
            cuda_only=True,
            softcap=True,
            passes=(2, 4, 1),
            trips=9,
        ),
    )
}
NAMES = tuple(dict.fromkeys((*ENTRIES, *DIVERGENCES)))


def entries_of(case):
    """{name: Entry} of what computes what a case is about."""
    return DIVERGENCES if case.is_divergence else ENTRIES

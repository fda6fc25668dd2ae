"""The objective's kernel: ratio, clip, surrogate, KL and dloss/dlogp in one launch.

The mathematics is ``fastgrpo.objective``'s: its functions are rebound here to ``triton.language`` and jitted.
"""

import torch
import triton
import triton.language as tl

from fastgrpo import objective as source
from fastgrpo.kernels import tiles
from fastgrpo.kernels.common import store_rows
from fastgrpo.kernels.rebind import rebind
from fastgrpo.kernels.tiles import cdiv

OUTPUTS = 7  # loss, d_logp, d_log_w, kl, ratio, low, high

token_objective = rebind(source)["token_objective"]


@triton.jit(do_not_specialize=["N"])
def objective_kernel(
    logp_ptr,  # (N,)
    old_ptr,  # (N,)
    ref_ptr,  # (N,) or None
    log_w_ptr,  # (N,)
    log_w_seq_ptr,  # (N,) or None
    adv_ptr,  # (N,)
    gate_ptr,  # (N,) or None
    out_ptr,  # (7, N)
    N,
    hp,  # HyperParameters
    KIND: tl.constexpr,
    DIVERGENCE: tl.constexpr,
    ESTIMATOR: tl.constexpr,
    CORRECTION: tl.constexpr,
    BLOCK: tl.constexpr,
):
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < N
    ref = None  # Triton 3.6 compiles no helper that returns None on one of its paths
    if ref_ptr is not None:
        ref = tl.load(ref_ptr + offs, mask=mask, other=0.0)
    log_w_seq = None
    if log_w_seq_ptr is not None:
        log_w_seq = tl.load(log_w_seq_ptr + offs, mask=mask, other=0.0)
    gate = None
    if gate_ptr is not None:
        gate = tl.load(gate_ptr + offs, mask=mask, other=0.0)
    loss, d_logp, d_log_w, kl, ratio, low, high = token_objective(
        tl.load(logp_ptr + offs, mask=mask, other=0.0),
        tl.load(old_ptr + offs, mask=mask, other=0.0),
        ref,
        tl.load(log_w_ptr + offs, mask=mask, other=0.0),
        log_w_seq,
        tl.load(adv_ptr + offs, mask=mask, other=0.0),
        gate,
        hp,
        KIND,
        DIVERGENCE,
        ESTIMATOR,
        CORRECTION,
    )
    values = (loss, d_logp, d_log_w, kl, ratio, low.to(tl.float32), high.to(tl.float32))
    store_rows(out_ptr + offs, values, N, mask)


def objective(config, logp, old_logp, ref_logp, log_w, log_w_seq, adv, gate):
    """The per-token terms of :func:`fastgrpo.objective.token_objective`, (N,) each."""
    n = logp.numel()
    out = torch.empty(OUTPUTS, n, dtype=torch.float32, device=logp.device)

    def flat(x):
        return None if x is None else x.contiguous()

    if n:
        objective_kernel[(cdiv(n, tiles.ROW_BLOCK),)](
            logp_ptr=flat(logp),
            old_ptr=flat(old_logp),
            ref_ptr=flat(ref_logp),
            log_w_ptr=flat(log_w),
            log_w_seq_ptr=flat(log_w_seq),
            adv_ptr=flat(adv),
            gate_ptr=flat(gate),
            out_ptr=out,
            N=n,
            hp=config.hyper_parameters,
            KIND=config.surrogate,
            DIVERGENCE=config.divergence_mask,
            ESTIMATOR=config.kl_estimator,
            CORRECTION=config.kl_correction,
            BLOCK=tiles.ROW_BLOCK,
        )
    loss, d_logp, d_log_w, kl, ratio, low, high = out
    return loss, d_logp, d_log_w, kl, ratio, low != 0, high != 0

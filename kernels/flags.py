"""What a certified forward flagged, read back for the plan of its backward."""

import torch
import triton
import triton.language as tl

from fastgrpo.backends.certified import Certificate
from fastgrpo.kernels.tiles import cdiv

WORDS = 64  # of a program


@triton.jit(do_not_specialize=["blocks"])
def last_keeping_kernel(
    flags_ptr,  # (blocks, words) int32
    alive_ptr,  # (K, blocks) bool
    last_ptr,  # (K, 32 * words) int32 out
    blocks,
    words,
    K: tl.constexpr,
    TILE: tl.constexpr,  # entries that share their words
    BLOCK_W: tl.constexpr,
):
    """1 + the last block that is alive and keeps each entry; columns as in forward.pack_flags."""
    W: tl.constexpr = TILE // 32
    offs = tl.program_id(0) * BLOCK_W + tl.arange(0, BLOCK_W)
    inside = offs < words
    bits = tl.arange(0, 32)
    entries = (offs // W * TILE + offs % W)[:, None] + bits[None, :] * W
    for k in tl.static_range(K):
        last = tl.zeros((BLOCK_W, 32), tl.int32)
        for block in range(blocks):
            word = tl.load(flags_ptr + tl.cast(block, tl.int64) * words + offs, mask=inside, other=0)
            alive = tl.load(alive_ptr + k * blocks + block) != 0
            kept = ((word[:, None] >> bits[None, :]) & 1) != 0
            last = tl.where(kept & alive, block + 1, last)
        tl.store(last_ptr + tl.cast(k, tl.int64) * words * 32 + entries, last, mask=inside[:, None])


class PackedCertificate(Certificate):
    """One that a Triton forward made, read by a kernel."""

    def last_keeping(self, alive):
        blocks, words = self.flags.shape
        last = torch.zeros(len(alive), 32 * words, dtype=torch.int32, device=alive.device)
        last_keeping_kernel[(cdiv(words, WORDS),)](
            flags_ptr=self.flags,
            alive_ptr=alive,
            last_ptr=last,
            blocks=blocks,
            words=words,
            K=len(alive),
            TILE=self.tile,
            BLOCK_W=WORDS,
            num_warps=8,
        )
        return last

"""One of several gloo processes of test_verl.py: ``python vocab_parallel_job.py OUTPUT``, RANK and WORLD_SIZE set."""

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from fastgrpo.integrations.verl import fused, linear_cross_entropy

import interpreter
import problems

VOCABULARY, DEPTH = 138, 24
SHARDS = {2: (120, 18), 3: (5, 132, 1)}  # columns of each rank; the last one of three holds no label of the batch
CASES = {
    "plain": {"dtype": torch.float64},
    "all options, fp64": {"dtype": torch.float64, "bias": True, "softcap": 3.0, "logit_scale": 1.3, "by": "token"},
    "all options, fp32": {"dtype": torch.float32, "bias": True, "softcap": 3.0, "logit_scale": 1.3, "by": "token"},
    "per sample": {"dtype": torch.float64, "by": "sample"},
    "peaked, fp32": {"dtype": torch.float32, "peak": 14.0},
    "bf16": {"dtype": torch.bfloat16},
    "no entropy gradient": {"dtype": torch.float64, "entropy": False},
    "frozen head": {"dtype": torch.float64, "names": ("hidden",)},
    "only the head": {"dtype": torch.float64, "names": ("weight", "bias"), "bias": True},
    "sizes given": {"dtype": torch.float64, "sizes": True},
    "mean": {"dtype": torch.float64, "reduction": "mean"},
    "triton": {"dtype": torch.float32, "backend": "triton", "bias": True, "softcap": 3.0, "by": "token"},
    "triton, bf16": {"dtype": torch.bfloat16, "backend": "triton"},
}


def inputs(dtype, bias=False, peak=0.0, by=None, **_):
    """(3, 5, D) hidden and the rest, whole; two labels ignored, one in the first column, none in the last."""
    hidden, weight, labels, b = problems.head(15, VOCABULARY, DEPTH, dtype, bias=bias, peak=peak)
    labels[labels == VOCABULARY - 1] = 7
    labels[0], labels[1], labels[2] = 0, 20, 37  # columns -100 of the second and of the third rank
    labels[4] = labels[9] = -100
    spread = torch.linspace(0.5, 2.0, 15, dtype=torch.float64).view(3, 5)
    temperature = {"token": spread, "sample": spread[:, :1].clone(), None: 0.7}[by]
    return hidden.view(3, 5, DEPTH), weight, labels.view(3, 5), b, temperature


def outcome(case, shard=slice(None), group=None, sizes=None):
    """Log-probs, entropy and the gradients, of one process or of one rank's columns."""
    hidden, weight, labels, bias, temperature = inputs(**case)
    leaves = {"hidden": hidden, "weight": weight[shard], "bias": None if bias is None else bias[shard]}
    leaves = problems.with_grad(leaves, case.get("names", ("hidden", "weight", "bias")))
    options = {"bias": leaves["bias"], **{k: case[k] for k in ("softcap", "logit_scale", "backend") if k in case}}
    if sizes and case.get("sizes"):
        options["shard_sizes"] = sizes
    logprobs, entropy = linear_cross_entropy(
        leaves["hidden"], leaves["weight"], labels, temperature, case.get("reduction", "none"), group,
        backward="exact", **options,
    )  # fmt: skip
    g = torch.Generator().manual_seed(1)
    up, up_entropy = torch.randn(2, *labels.shape, generator=g, dtype=torch.float64).to(logprobs.dtype)
    total = (logprobs * up).sum()
    if case.get("entropy", True):
        total = total + (entropy * up_entropy).sum()
    total.backward()
    grads = {k: v.grad for k, v in leaves.items() if v is not None}
    return {"logprobs": logprobs.detach(), "entropy": entropy.detach(), **grads}


class Gathered(torch.autograd.Function):
    """A hidden that every rank has; the gradient is summed over the ranks, as Megatron's gathering does."""

    @staticmethod
    def forward(ctx, hidden):
        return hidden.clone()

    @staticmethod
    def backward(ctx, grad):
        dist.all_reduce(grad)
        return grad


def as_megatron_calls(rank=0, ranks=1):
    """verl's call in model_forward_fused.py: (T, 1, D) hidden, (1, T) labels, equal shards, positional arguments."""
    hidden, weight, labels, _ = problems.head(15, VOCABULARY, DEPTH)
    columns = VOCABULARY // ranks
    leaves = problems.with_grad({"hidden": hidden, "weight": weight[rank * columns : (rank + 1) * columns]})
    gathered, group = (Gathered.apply(leaves["hidden"]), dist.group.WORLD) if ranks > 1 else (leaves["hidden"], None)
    logprobs, entropy = fused(gathered[:, None], leaves["weight"], labels[None], 0.7, "none", group)
    (logprobs.sum() - 0.3 * entropy.square().sum()).backward()
    return {"logprobs": logprobs.detach(), "entropy": entropy.detach(), **{k: v.grad for k, v in leaves.items()}}


def main(output):
    os.environ["TRITON_INTERPRET"] = "1"  # read as the kernels are imported, on first use
    interpreter.patch()
    dist.init_process_group("gloo", init_method="env://")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    sizes = SHARDS[ranks]
    shard = slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
    results = {name: outcome(case, shard, dist.group.WORLD, sizes) for name, case in CASES.items()}
    results["megatron"] = as_megatron_calls(rank, ranks)
    torch.save(results, Path(output) / f"rank{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])

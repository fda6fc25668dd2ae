"""What each gloo process of test_verl.py does: ``main(output)``, started by processes.run_ranks."""

from pathlib import Path

import torch
import torch.distributed as dist

from fastgrpo import linear_logprobs
from fastgrpo.backends import grouping
from fastgrpo.integrations.verl import call_as_verl, linear_cross_entropy
from fastgrpo.vocab_parallel import vocab_parallel_logprobs

import interpreter
import problems

grouping.OVERHEAD_ROWS.update(cpu=(48, 48), oneDNN=(48, 48))  # so few rows are exact at once otherwise
RANKS, VOCABULARY, DEPTH = (2, 3), 138, 24
PASSED = ("softcap", "logit_scale", "backend", "backward", "tolerance", "row_tolerance")
CERTIFIED = {
    "backward": "certified", "tolerance": 0.05, "row_tolerance": 1.0, "size": (4, 128), "vocabulary": 1500,
    "peak": 12.0, "entropy": False,
}  # fmt: skip
BY_TRITON = {"backend": "triton", "size": (2, 128)}
ROWS = {**CERTIFIED, "row_tolerance": 0.3, "spread": True, "hint": 0.1}
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
    "certified": {"dtype": torch.float32, **CERTIFIED, "bias": True, "by": "sample", "logit_scale": 1.3},
    "certified, softcap": {"dtype": torch.float32, **CERTIFIED, "softcap": 30.0},
    "certified, hinted": {"dtype": torch.float32, **CERTIFIED, "hint": 0.1},
    "certified, misled": {"dtype": torch.float32, **CERTIFIED, "hint": 60.0},
    "certified, bf16": {"dtype": torch.bfloat16, **CERTIFIED, "hint": 0.1},
    "certified, triton": {"dtype": torch.float32, **CERTIFIED, "bias": True, **BY_TRITON},
    "certified, triton, hinted": {"dtype": torch.float32, **CERTIFIED, "hint": 0.1, **BY_TRITON},
    "certified, rows": {"dtype": torch.float32, **ROWS},
    "certified, rows, bias": {"dtype": torch.float32, **ROWS, "bias": True, "names": ("hidden", "weight")},
    "certified, rows, triton": {"dtype": torch.float32, **ROWS, **BY_TRITON},
    "certified, entropy gradient": {"dtype": torch.float32, **CERTIFIED, "entropy": True},
    "triton": {"dtype": torch.float32, "backend": "triton", "bias": True, "softcap": 3.0, "by": "token"},
    "triton, bf16": {"dtype": torch.bfloat16, "backend": "triton"},
}


SEVERAL = {
    "plain": {"dtype": torch.float64},
    "all options": {"dtype": torch.float64, "bias": True, "softcap": 3.0, "logit_scale": 1.3, "by": "token"},
    "head alone": {"dtype": torch.float64, "names": ("weight",)},
    "certified": {"dtype": torch.float32, **CERTIFIED, "tolerance": 0.1, "bias": True},
    "certified, hinted": {"dtype": torch.float32, **CERTIFIED, "hint": 0.1},
    "triton": {"dtype": torch.float32, "backend": "triton", "bias": True, "softcap": 3.0},
    "certified, triton": {"dtype": torch.float32, **CERTIFIED, **BY_TRITON, "hint": 0.1},
}  # of top-k targets


def shards(ranks, vocabulary=VOCABULARY, **_):
    """Columns of each rank; the last one of three small ones holds no label of the batch."""
    if ranks == 2:
        return vocabulary * 7 // 8, vocabulary - vocabulary * 7 // 8
    return (5, vocabulary - 6, 1) if vocabulary == VOCABULARY else (400, vocabulary - 700, 300)


def inputs(dtype, bias=False, peak=0.0, by=None, size=(3, 5), vocabulary=VOCABULARY, spread=False, **_):
    """(B, T, D) hidden and the rest, whole; two labels ignored, one in the first column, none in the last."""
    n = size[0] * size[1]
    hidden, weight, labels, b = problems.head(n, vocabulary, DEPTH, dtype, bias=bias, peak=peak)
    if spread:  # tails of very different mass: dW needs the heavy ones alone
        hidden *= torch.linspace(0.8, 2.5, n, dtype=dtype)[:, None]
    labels[labels == vocabulary - 1] = 7
    labels[0], labels[1], labels[2] = 0, 20, 37  # columns -100 of the second and of the third rank
    labels[4] = labels[9] = -100
    spread = torch.linspace(0.5, 2.0, n, dtype=torch.float64).view(size)
    temperature = {"token": spread, "sample": spread[:, :1].clone(), None: 0.7}[by]
    return hidden.view(*size, DEPTH), weight, labels.view(size), b, temperature


def hint(case, hidden, weight, labels, bias, temperature):
    """Old log-probs: the current ones, off by ``case["hint"]`` nats."""
    whole = {"bias": bias, **{k: case[k] for k in ("softcap", "logit_scale") if k in case}}
    logprobs, _ = linear_cross_entropy(hidden, weight, labels, temperature, backend="torch", **whole)
    return logprobs - case["hint"]


def leaves_of(case, shard, hidden, weight, bias):
    leaves = {"hidden": hidden, "weight": weight[shard], "bias": None if bias is None else bias[shard]}
    return problems.with_grad(leaves, case.get("names", ("hidden", "weight", "bias")))


def outcome(case, shard=slice(None), group=None, sizes=None):
    """Log-probs, entropy and the gradients, of one process or of one rank's columns."""
    hidden, weight, labels, bias, temperature = whole = inputs(**case)
    leaves = leaves_of(case, shard, hidden, weight, bias)
    options = {"bias": leaves["bias"], **{k: case[k] for k in PASSED if k in case}}
    if "hint" in case:
        options["old_logprobs"] = hint(case, *whole)
    if sizes and case.get("sizes"):
        options["shard_sizes"] = sizes
    logprobs, entropy = linear_cross_entropy(
        leaves["hidden"], leaves["weight"], labels, temperature, case.get("reduction", "none"), group,
        **{"backward": "exact", **options},
    )  # fmt: skip
    g = torch.Generator().manual_seed(1)
    up, up_entropy = torch.randn(2, *labels.shape, generator=g, dtype=torch.float64).to(logprobs.dtype)
    total = (logprobs * up).sum()
    if case.get("entropy", True):
        total = total + (entropy * up_entropy).sum()
    total.backward()
    grads = {k: v.grad for k, v in leaves.items() if v is not None}
    return {"logprobs": logprobs.detach(), "entropy": entropy.detach(), **grads}


def several(case, shard=slice(None), group=None, sizes=None):
    """As :func:`outcome`, of three targets a position, some of them on each rank."""
    hidden, weight, labels, bias, temperature = whole = inputs(**case)
    ids = (labels[..., None] + torch.tensor([0, 5, 60])) % weight.shape[0]
    ids = ids.where(labels[..., None] != -100, -100)
    ids[0, 1, 1] = -100
    leaves = leaves_of(case, shard, hidden, weight, bias)
    options = {"temperature": temperature, "return_entropy": case.get("entropy", True), "backward": "exact"}
    options |= {k: case[k] for k in PASSED if k in case}
    if "hint" in case:
        options["old_logprobs"] = hint(case, *whole)[..., None].expand(ids.shape).contiguous()
    call, share = linear_logprobs, {}
    if group is not None:
        call, share = vocab_parallel_logprobs, {"group": group, "shard_sizes": sizes}
    out = call(leaves["hidden"], leaves["weight"], ids, leaves["bias"], **options, **share)
    values = {k: v for k, v in out._asdict().items() if v is not None}
    g = torch.Generator().manual_seed(1)
    sum((x * torch.randn(x.shape, generator=g, dtype=x.dtype)).sum() for x in values.values()).backward()
    return {k: v.detach() for k, v in values.items()} | {k: v.grad for k, v in leaves.items() if v is not None}


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
    logprobs, entropy = call_as_verl(gathered[:, None], leaves["weight"], labels[None], 0.7, "none", group)
    (logprobs.sum() - 0.3 * entropy.square().sum()).backward()
    return {"logprobs": logprobs.detach(), "entropy": entropy.detach(), **{k: v.grad for k, v in leaves.items()}}


def main(output):
    interpreter.patch()
    dist.init_process_group("gloo", init_method="env://")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    results = {}
    for cases, run in ((CASES, outcome), (SEVERAL, several)):
        for name, case in cases.items():
            sizes = shards(ranks, **case)
            own = slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
            results[run.__name__, name] = run(case, own, dist.group.WORLD, sizes)
    results["megatron"] = as_megatron_calls(rank, ranks)
    torch.save(results, Path(output) / f"rank{rank}.pt")
    dist.destroy_process_group()

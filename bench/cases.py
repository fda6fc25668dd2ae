"""What is measured: a case (shape, logits, head, objective), and the tensors of one."""

from dataclasses import asdict, dataclass, field, replace

import torch

from bench import profiles, real
from bench.shapes import SHAPES
from fastgrpo import GRPOLossConfig, reference

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
SEQUENCES = 8  # B of a case: its N tokens are 8 completions of one prompt
OBJECTIVES = {  # every loss type, level and extra term, by the name it has in charts
    "dapo": {},
    "grpo + kl": {"loss_type": "grpo", "beta": 0.04},
    "bnpo": {"loss_type": "bnpo"},
    "dr_grpo": {"loss_type": "dr_grpo", "max_completion_length": 1024},
    "gspo": {"loss_type": "grpo", "importance_sampling_level": "sequence"},
    "gspo-token": {"loss_type": "grpo", "importance_sampling_level": "sequence_token"},
    "cispo": {"loss_type": "cispo", "epsilon_high": 5.0},
    "sapo": {"loss_type": "sapo"},
    "luspo": {"loss_type": "luspo", "importance_sampling_level": "sequence"},
    "vespo": {"loss_type": "vespo"},
    "dapo two-sided": {"delta": 4.0},
    "dapo dual clip": {"dual_clip": 3.0},
    "dppo tv": {"divergence_mask": "tv"},
    "dapo + entropy bonus": {"entropy_coef": 0.01},
    "dapo top entropy": {"top_entropy_quantile": 0.2},
}
DIVERGENCES = {"forward KL": 0.0, "reverse KL": 1.0, "JSD": 0.5}  # from a teacher; beta
TEACHER_NOISE = 1.5  # nats by which a teacher's logits are off the student's at random


@dataclass(frozen=True)
class Case:
    """One point of a suite. ``zero_share``: share of the sequences with advantage 0."""

    N: int
    V: int
    D: int
    profile: str = "rl"
    head: str = "trained"  # or "frozen"
    objective: str = "dapo"
    dtype: str = "fp32"
    softcap: float | None = None
    zero_share: float = 0.0
    shape: str = ""  # the model it is the head of
    group: str = "base"  # which table and chart of the suite it belongs to
    memory: bool = True  # whether peak memory is taken (a fresh process an entry on a CPU)

    @classmethod
    def of(cls, name, n, **options):
        s = SHAPES[name]
        return cls(n, s.vocab, s.width, softcap=s.softcap, shape=name, **options)

    @classmethod
    def real(cls, profile, n, **options):
        """Of a real model's own logits, see :mod:`bench.real`."""
        return cls(n, *real.SIZES, profile=profile, shape=real.MODEL, **options)

    def why_not(self):
        """Why nothing can run this case here, or None."""
        return real.why_not(self)

    @property
    def is_divergence(self):
        """Of a student from a teacher, in place of a loss of chosen tokens."""
        return self.objective in DIVERGENCES

    @property
    def beta(self):
        return DIVERGENCES[self.objective]

    @property
    def suite(self):
        """Where its rows belong."""
        return "divergence" if self.is_divergence else "loss"

    @property
    def title(self):
        extras = [self.profile, self.dtype]
        extras += [f"{self.head} head"] if self.head != "trained" else []
        extras += [self.objective] if self.objective != "dapo" else []
        extras += [f"softcap {self.softcap:g}"] if self.softcap else []
        extras += [f"{self.zero_share:.0%} of advantages 0"] if self.zero_share else []
        name = f"{self.shape}: " if self.shape else ""
        return f"{name}N {self.N}, V {self.V}, D {self.D}, {', '.join(extras)}"

    @property
    def data_key(self):
        """Cases with the same key share their tensors."""
        return (self.N, self.V, self.D, self.profile, self.dtype, self.softcap, self.is_divergence)

    @property
    def gemm_flops(self):
        return 2 * self.N * self.V * self.D

    @property
    def itemsize(self):
        return DTYPES[self.dtype].itemsize

    @property
    def input_bytes(self):
        """Hidden states and head, read once."""
        return (self.N + self.V) * self.D * self.itemsize

    @property
    def memory_bound_mib(self):
        """DESIGN's bound of our op beyond inputs and gradients: workspace + 4 N D + 64 N + N V / 128."""
        return 128 + (4 * self.N * self.D + 64 * self.N + self.N * self.V / 128) / 2**20

    def row(self):
        return asdict(self)


@dataclass
class Problem:
    """The tensors of a case: B sequences of T = N / B completion tokens, none masked."""

    case: Case
    hidden: torch.Tensor  # (B, T, D)
    weight: torch.Tensor  # (V, D)
    targets: torch.Tensor  # (B, T)
    advantages: torch.Tensor  # (B,)
    mask: torch.Tensor  # (B, T), ones
    old: torch.Tensor  # (B, T)
    ref: torch.Tensor  # (B, T)
    config: GRPOLossConfig = field(repr=False)
    teacher_hidden: torch.Tensor | None = None  # (B, T, D), of a divergence
    teacher_weight: torch.Tensor | None = None  # (V, D)

    @property
    def flat(self):
        """hidden (N, D), weight, targets (N,): what most peers take."""
        return self.hidden.flatten(0, 1), self.weight, self.targets.flatten()

    @property
    def leaves(self):
        """What gradients are taken of."""
        return tuple(x for x in (self.hidden, self.weight) if x.requires_grad)

    @property
    def device(self):
        return self.hidden.device.type

    def part(self, sequences):
        """The first few sequences, for a warm-up that costs little."""
        names = ("targets", "advantages", "mask", "old", "ref", "teacher_hidden")
        cut = {k: x[:sequences].detach() for k in names if (x := getattr(self, k)) is not None}
        return replace(self, hidden=self.hidden[:sequences].detach().requires_grad_(), **cut)


def tensors(case, device, seed=0):
    """The data of a case as a plain dict, which travels to other processes; same seed, same numbers."""
    data = profiles.problem(
        case.N, case.V, case.D, case.profile, dtype=DTYPES[case.dtype], device=device, seed=seed, softcap=case.softcap
    )
    g = torch.Generator(device).manual_seed(seed + 1)
    data["ref"] = profiles.drift_logprobs(data["old_logprobs"], g, 0.1)
    data.setdefault("advantages", torch.randn(SEQUENCES, generator=g, device=device))
    return data | teacher(data, g) if case.is_divergence else data


def teacher(data, generator):
    """A model near the student: its head, and hidden states moved so that logits move by TEACHER_NOISE at random."""
    hidden, weight = data["hidden"], data["weight"]
    noise = torch.randn(hidden.shape, generator=generator, device=hidden.device)
    noise *= TEACHER_NOISE / weight.float().square().sum(1).mean().sqrt()
    return {"teacher_hidden": (hidden + noise).to(hidden.dtype), "teacher_weight": weight.clone()}


def problem(case, data):
    """-> Problem; hidden and, unless the head is frozen, weight require gradients."""
    tokens = (SEQUENCES, case.N // SEQUENCES)
    advantages = data["advantages"].clone()
    advantages[: round(case.zero_share * SEQUENCES)] = 0.0
    return Problem(
        case=case,
        hidden=data["hidden"].detach().view(*tokens, case.D).requires_grad_(),
        weight=data["weight"].detach().requires_grad_(case.head == "trained"),
        targets=data["targets"].view(tokens),
        advantages=advantages,
        mask=torch.ones(tokens, dtype=torch.int64, device=advantages.device),
        old=data["old_logprobs"].view(tokens),
        ref=data["ref"].view(tokens),
        config=GRPOLossConfig(**({} if case.is_divergence else OBJECTIVES[case.objective]), log_entropy=False),
        teacher_hidden=data["teacher_hidden"].view(*tokens, case.D) if case.is_divergence else None,
        teacher_weight=data.get("teacher_weight"),
    )


@dataclass
class Truth:
    """What the same inputs give in float64."""

    logprobs: torch.Tensor | None  # (N,), of a loss of chosen tokens
    entropy: torch.Tensor | None  # (N,)
    loss: torch.Tensor  # 0-dim
    d_hidden: torch.Tensor  # (N, D)
    d_weight: torch.Tensor | None  # (V, D), None for a frozen head
    denormals: float  # share of the (N, V) dlogits that the case's dtype can only hold as denormal numbers
    far_from_clip: tuple | None = None  # see measure.far_from_clip


def truth(p, chunk=256):
    """Log-probs, then the reference's loss on them, then dlogits by hand, a chunk of rows at a time."""
    if p.case.is_divergence:
        return divergence_truth(p, chunk)
    hidden, weight, targets = p.flat
    hidden, weight, n, cap = hidden.detach(), weight.detach().double(), p.case.N, p.case.softcap
    logp, entropy = (torch.empty(n, dtype=torch.float64, device=targets.device) for _ in range(2))
    chunks = torch.arange(n, device=targets.device).split(chunk)
    for rows in chunks:
        z = reference.logits(hidden[rows].double(), weight, softcap=cap).log_softmax(1)
        logp[rows] = z.gather(1, targets[rows, None])[:, 0]
        entropy[rows] = -(z.exp() * z).sum(1)
    logp.requires_grad_()
    entropy.requires_grad_()
    loss = reference.loss_of_logprobs(
        logp.view(p.targets.shape),
        entropy.view(p.targets.shape),
        p.mask.bool(),
        p.advantages.double(),
        p.config,
        old_logprobs=p.old.double(),
        ref_logprobs=p.ref.double(),
    )
    g_logp, g_entropy = torch.autograd.grad(loss, (logp, entropy), allow_unused=True)
    d_hidden = torch.empty(n, p.case.D, dtype=torch.float64, device=targets.device)
    d_weight = torch.zeros_like(weight) if p.weight.requires_grad else None
    denormals = 0
    for rows in chunks:
        z = reference.logits(hidden[rows].double(), weight, softcap=cap)
        slope = None if cap is None else 1 - (z / cap).square()
        z = z.log_softmax(1)
        prob = z.exp()
        dz = (-g_logp[rows, None] * prob).scatter_add_(1, targets[rows, None], g_logp[rows, None])
        if g_entropy is not None:
            dz -= g_entropy[rows, None] * prob * (z + entropy[rows, None].detach())
        dz = dz if slope is None else dz * slope
        denormals += count_denormals(dz, p.weight.dtype)
        d_hidden[rows] = dz @ weight
        if d_weight is not None:
            d_weight.addmm_(dz.T, hidden[rows].double())
    share = denormals / (n * len(weight))
    return Truth(logp.detach(), entropy.detach(), loss.detach(), d_hidden, d_weight, share)


def divergence_truth(p, chunk):
    """The reference's mean divergence and autograd, a chunk of rows at a time."""
    hidden, teacher_hidden = (x.detach().flatten(0, 1) for x in (p.hidden, p.teacher_hidden))
    weight = p.weight.detach().double().requires_grad_(p.weight.requires_grad)
    teacher_weight, loss, gradients, denormals = p.teacher_weight.double(), 0.0, [], 0
    for rows, others in zip(hidden.split(chunk), teacher_hidden.split(chunk)):
        rows = rows.double().requires_grad_()
        caps = {"softcap": p.case.softcap, "teacher_softcap": p.case.softcap}
        moved = torch.zeros(len(rows), len(weight), dtype=torch.float64, device=rows.device, requires_grad=True)
        out = reference.linear_divergence(
            rows, weight, others.double(), teacher_weight, beta=p.case.beta, bias=moved, **caps
        )
        part = out.divergence.sum() / p.case.N
        part.backward()
        loss += part.detach()
        gradients.append(rows.grad)
        denormals += count_denormals(moved.grad, p.weight.dtype)
    share = denormals / (p.case.N * len(weight))
    return Truth(None, None, loss, torch.cat(gradients), weight.grad, share)


def count_denormals(x, dtype):
    """Values that are denormal numbers in a narrower dtype."""
    limits, size = torch.finfo(dtype), x.abs()
    return int(((size < limits.smallest_normal) & (size >= limits.smallest_normal * limits.eps)).sum())

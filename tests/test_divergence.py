"""linear_divergence: values and gradients on both backends against plain autograd over full logits in fp64."""

import functools
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import divergence_job
import pytest
import torch
from ranks import Ranks

from fastgrpo import linear_divergence, reference, strategies, vocab_parallel_divergence
from fastgrpo.backends import certified_backward, dense_backward, divergence_panels, torch_backend
from fastgrpo.divergence import TeacherHead, check, pair_tensors
from fastgrpo.head import HeadOptions

import problems
from processes import run_ranks
from watchers import Gemms

BETAS = (0.0, 1.0, 0.3)
GRADS = ("hidden", "weight", "bias", "A", "B")
HEADS = {
    "plain": {},
    "all": {
        "bias": True,
        "softcap": 6.0,
        "teacher_softcap": 9.0,
        "logit_scale": 0.8,
        "teacher_logit_scale": 1.2,
        "temperature": "tensor",
        "return_entropy": True,
    },
    "lora": {"lora": True, "temperature": 0.7},
}


def pair(n, vocab, depth, teacher_depth, device="cpu", dtype=torch.float32, peak=6.0, seed=0):
    """Tensors of a student and a teacher of their own, whose peaks half of the rows share; the mask, ragged."""
    hidden, weight, targets, bias = problems.head(n, vocab, depth, dtype, device, seed, bias=True, peak=peak)
    others, teacher_weight, _, teacher_bias = problems.head(n, vocab, teacher_depth, dtype, device, seed + 1, bias=True)
    shared = teacher_weight[targets]
    others[::2] += (peak * shared / shared.square().sum(1, keepdim=True))[::2]
    mask = torch.arange(n, device=device) % 5 != 3
    g = torch.Generator().manual_seed(seed)
    a, b = (torch.randn(*shape, generator=g).to(device, dtype) / 4 for shape in ((3, depth), (vocab, 3)))
    return {
        "hidden": hidden,
        "weight": weight,
        "bias": bias,
        "A": a,
        "B": b,
        "teacher_hidden": others,
        "teacher_weight": teacher_weight,
        "teacher_bias": teacher_bias,
        "mask": mask,
    }


def draw_near(tensors, apart):
    """The student's head for the teacher, whose states go so far towards its own; apart: a number, or one a row."""
    hidden, other = tensors["hidden"], tensors["teacher_hidden"]
    near = torch.lerp(hidden.float(), other.float(), apart).to(hidden.dtype)
    return tensors | {"teacher_weight": tensors["weight"], "teacher_hidden": near}


def call(op, tensors, **options):
    """The op's result; options: its own, or words for what the tensors have."""
    hidden = tensors["hidden"]
    if options.pop("bias", False):
        options |= {"bias": tensors["bias"], "teacher_bias": tensors["teacher_bias"]}
    if options.pop("lora", False):
        options["lora"] = tensors["A"], tensors["B"], 0.5
    if options.get("temperature") == "tensor":
        options["temperature"] = torch.linspace(0.6, 1.4, len(hidden), device=hidden.device, dtype=hidden.dtype)
    return op(hidden, *(tensors[k] for k in ("weight", "teacher_hidden", "teacher_weight", "mask")), **options)


def run(op, tensors, upstream, **options):
    """-> divergence, entropy, gradients by name."""
    leaf = problems.with_grad(tensors, GRADS)
    out = call(op, leaf, **options)
    (out.divergence * upstream).sum().backward()
    grads = {k: leaf[k].grad for k in GRADS if leaf[k] is not None and leaf[k].grad is not None}
    return out.divergence.detach(), out.entropy, grads


def in_double(tensors):
    return {k: problems.cast(v, torch.float64) for k, v in tensors.items()}


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("options", HEADS.values(), ids=HEADS)
@pytest.mark.parametrize("shape", [(1, 1, 3, 5), (33, 300, 40, 24), (17, 130, 33, 64)], ids=str)
def test_fp32_against_fp64(backend, device, shape, beta, options):
    tensors = pair(*shape, device)
    upstream = torch.randn(shape[0], device=device)
    value, entropy, grads = run(linear_divergence, tensors, upstream, beta=beta, backend=backend, **options)
    truth = run(reference.linear_divergence, in_double(tensors), upstream.double(), beta=beta, **options)
    naive = run(reference.linear_divergence, tensors, upstream, beta=beta, **options)
    allowed = 2 * (naive[0] - truth[0]).abs() + 2e-6 * (0.3 + truth[0])
    assert ((value - truth[0]).abs() <= allowed).all(), ((value - truth[0]).abs() / allowed).max()
    assert (value[~tensors["mask"]] == 0).all()
    assert (value >= -1e-7).all()
    if entropy is not None:
        assert not entropy.requires_grad
        torch.testing.assert_close(entropy.double(), truth[1], rtol=2e-6, atol=1e-6)
    assert grads.keys() == truth[2].keys()
    for name, want in truth[2].items():
        mine, theirs = (problems.relative_error(g[name], want) for g in (grads, naive[2]))
        assert mine <= 2 * theirs + 5e-6 or want.norm() < 1e-7, (name, mine, theirs)


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("distance", [1e-2, 1e-4])
@pytest.mark.parametrize("scale", [1.0, 8.0], ids=["flat", "peaked"])
def test_small_divergences_are_not_noise(backend, device, beta, distance, scale):
    """Of models that hardly differ: down to 1e-10 nats, where a difference of log-probs is all rounding."""
    hidden, weight, _, _ = problems.head(24, 500, 32, torch.float32, device)
    weight = weight * scale
    others = hidden + distance * torch.randn_like(hidden)
    tensors = {"hidden": hidden, "weight": weight, "teacher_hidden": others, "teacher_weight": weight, "mask": None}
    tensors |= dict.fromkeys(("bias", "A", "B", "teacher_bias"))
    upstream = torch.ones(24, device=device)
    value, _, grads = run(linear_divergence, tensors, upstream, beta=beta, backend=backend)
    truth = run(reference.linear_divergence, in_double(tensors), upstream.double(), beta=beta)
    assert truth[0].min() < distance
    error = (value - truth[0]).abs()
    assert (error <= 1e-6 * scale * truth[0].sqrt() + 1e-12).all()
    assert (value > -1e-12).all()
    assert problems.relative_error(grads["hidden"], truth[2]["hidden"]) < 4e-7 * scale / distance


@pytest.mark.quick
@pytest.mark.parametrize("beta", BETAS)
def test_certain_of_the_same_token(backend, device, beta):
    """p -> 1 in both: the divergence is of the tails, 1e-5 to 1e-26, relative to themselves."""
    hidden, weight, _ = problems.near_certain(device)
    others = hidden.clone()
    others[:, :6] *= 0.9
    truth = reference.linear_divergence(hidden.double(), weight.double(), others.double(), weight.double(), beta=beta)
    exact = tail_divergence(hidden.double(), weight.double(), others.double(), beta)
    value = linear_divergence(hidden, weight, others, weight, beta=beta, backend=backend).divergence.double()
    torch.testing.assert_close(truth.divergence[:2], exact[:2], rtol=1e-6, atol=0)
    seen = exact > 1e-30
    torch.testing.assert_close(value[seen], exact[seen], rtol=2e-4, atol=0)


def tail_divergence(hidden, weight, others, beta):
    """In fp64 with each row's likeliest token by way of the others' mass, so that nothing is 1 - tiny."""
    z, t = hidden @ weight.T, others @ weight.T
    top = z.argmax(1, keepdim=True)
    own, teacher = (x - x.gather(1, top) for x in (z, t))

    def parts(x):
        rest = x.exp().scatter(1, top, 0.0).sum(1, keepdim=True)
        return x - torch.log1p(rest)

    log_s, log_t = parts(own), parts(teacher)

    def kl(first, second):
        delta = second - first
        return (first.exp() * (torch.expm1(delta) - delta)).sum(1)

    if beta in (0.0, 1.0):
        return kl(log_s, log_t) if beta else kl(log_t, log_s)
    mixture = log_t + torch.log1p((1 - beta) * torch.expm1(log_s - log_t))
    return beta * kl(log_t, mixture) + (1 - beta) * kl(log_s, mixture)


@pytest.mark.parametrize("beta", BETAS)
def test_gradcheck(backend, device, beta):
    tensors = in_double(pair(3, 17, 4, 3, device))
    names = ("hidden", "weight", "bias", "A", "B")
    dtype = torch.float64 if backend == "torch" else torch.float32
    loose = {} if backend == "torch" else {"rtol": 1e-3, "atol": 1e-4}

    def call(op, cast, **options):
        def values(hidden, weight, bias, a, b):
            others = [problems.cast(tensors[k], cast, device) for k in ("teacher_hidden", "teacher_weight")]
            out = op(hidden, weight, *others, tensors["mask"], beta=beta, bias=bias, softcap=4.0,
                     teacher_bias=tensors["teacher_bias"].to(cast), lora=(a, b, 0.5), **options)  # fmt: skip
            return (out.divergence,)

        return values

    fast, truth = call(linear_divergence, dtype, backend=backend), call(reference.linear_divergence, torch.float64)
    problems.gradcheck(fast, truth, [tensors[k] for k in names], dtype, **loose)


@pytest.mark.quick
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("beta", BETAS)
def test_16_bit(backend, device, dtype, beta):
    """fp32-exact of the 16-bit values; gradients at most twice as far off as torch's own in that dtype."""
    tensors = {k: problems.cast(v, dtype, device) for k, v in pair(40, 300, 48, 32, device).items()}
    upstream = torch.rand(40, device=device)
    value, _, grads = run(linear_divergence, tensors, upstream, beta=beta, backend=backend)
    truth = run(reference.linear_divergence, in_double(tensors), upstream.double(), beta=beta)
    naive = run(reference.linear_divergence, tensors, upstream, beta=beta)
    torch.testing.assert_close(value.double(), truth[0], rtol=1e-4, atol=1e-5)
    for name, want in truth[2].items():
        mine, theirs = (problems.relative_error(g[name], want) for g in (grads, naive[2]))
        assert mine <= 2 * theirs + 1e-4, (name, mine, theirs)


@pytest.mark.quick
@pytest.mark.parametrize("backward", ["exact", "certified"])
@pytest.mark.parametrize(("beta", "apart"), [(1e-4, 1.0), (0.9999, 1.0), (0.5, 1e-3), (0.0, 1e-3), (1.0, 1e-3)])
def test_fp16_where_all_dlogits_are_small(backend, device, beta, apart, backward):
    """Mixtures of one model almost alone, models that hardly differ; the loss scaled, as fp16 training does."""
    tensors = draw_near(pair(40, 300, 48, 48, device, torch.float16), apart)
    upstream = torch.full((40,), 2.0**14, device=device)
    truth = run(reference.linear_divergence, in_double(tensors), upstream.double(), beta=beta)[2]
    _, _, grads = run(linear_divergence, tensors, upstream, beta=beta, backend=backend, backward=backward)
    for name in ("hidden", "weight"):
        assert problems.relative_error(grads[name], truth[name]) < 1e-3, name


@pytest.mark.parametrize("backward", ["exact", "certified"])
def test_fp16_where_a_mask_makes_dlogits_large(backend, device, backward):
    """Of a reverse KL p_s times a log-ratio: the teacher rules out what the student likes, by fp16's least number."""
    tensors = pair(24, 200, 32, 32, device, torch.float16)
    likely = (tensors["hidden"].float() @ tensors["weight"].float().T).argmax(1)
    tensors["bias"] = torch.zeros_like(tensors["bias"])
    tensors["teacher_bias"] = tensors["bias"].index_fill(0, likely, torch.finfo(torch.float16).min)
    upstream, options = torch.full((24,), 2.0**-12, device=device), {"bias": True, "beta": 1.0}
    truth = run(reference.linear_divergence, in_double(tensors), upstream.double(), **options)[2]
    _, _, grads = run(linear_divergence, tensors, upstream, backend=backend, backward=backward, **options)
    for name, want in truth.items():
        assert problems.relative_error(grads[name], want) < 2e-3, name


@pytest.mark.parametrize("beta", [0.0, 1.0, 0.3, 1e-4, 0.9999])
def test_the_largest_dlogits_are_told_by_the_statistics(beta):
    """Flat and peaked rows, models near and far: never too small; of flat ones at most twentyfold."""
    n, vocab = 400, 60
    g = torch.Generator().manual_seed(0)
    peak, apart = (10 ** (low + 3 * torch.rand(n, 1, generator=g).double()) for low in (-1.5, -3.0))
    z = peak * torch.randn(n, vocab, generator=g).double()
    eye, teacher = torch.eye(vocab, dtype=torch.float64), z + apart * peak * torch.randn(n, vocab, generator=g).double()
    options, hidden, teacher = HeadOptions(backend="torch"), z.clone().requires_grad_(), TeacherHead(teacher, eye)
    params = teacher.beside(options.params(hidden, eye, (hidden,)), beta)
    targets = check(hidden, eye, None, teacher, beta, options)
    problem = pair_tensors(hidden.detach(), eye, targets, teacher, options).problem(params)
    (largest,) = problem.largest(torch_backend.divergence_forward(problem))
    reference.linear_divergence(hidden, eye, teacher.hidden, eye, beta=beta).divergence.sum().backward()
    truth = hidden.grad.abs().amax(1)
    assert (truth <= largest + 1e-15).all()
    assert (truth > 0.9 * largest).any()  # no factor could be left out
    assert (largest <= 20 * truth)[peak[:, 0] < 1].all(), (largest / truth).max()


@pytest.mark.parametrize("beta", BETAS)
def test_teachers_that_rule_tokens_out(backend, device, beta):
    """-inf in both biases: finite, as if the entries were not there."""
    tensors = pair(9, 60, 8, 8, device)
    for name in ("bias", "teacher_bias"):
        tensors[name][::7] = -torch.inf
    upstream = torch.ones(9, device=device)
    value, _, grads = run(linear_divergence, tensors, upstream, beta=beta, backend=backend, bias=True)
    truth = run(reference.linear_divergence, in_double(tensors), upstream.double(), beta=beta, bias=True)
    torch.testing.assert_close(value.double(), truth[0], rtol=1e-5, atol=1e-6)
    assert (grads["weight"][::7] == 0).all()
    assert all(problems.relative_error(grads[name], want) < 1e-5 for name, want in truth[2].items())
    kept = torch.arange(60, device=device) % 7 != 0
    short = {k: v[kept] if v is not None and len(v) == 60 else v for k, v in tensors.items()}
    truth = run(reference.linear_divergence, in_double(short), upstream.double(), beta=beta, bias=True)
    torch.testing.assert_close(value.double(), truth[0], rtol=1e-5, atol=1e-6)
    assert problems.relative_error(grads["weight"][kept], truth[2]["weight"]) < 1e-5


@functools.cache
def rl_student(n, vocab, depth):
    return problems.drawn(n, vocab, depth, "rl")


def near_pair(n, vocab, depth, device):
    """A student as peaked as RL makes them, and a teacher near it."""
    student = rl_student(n, vocab, depth)
    g = torch.Generator().manual_seed(0)
    noise = 0.2 * student["hidden"].norm(dim=1, keepdim=True) / depth**0.5 * torch.randn(n, depth, generator=g)
    tensors = pair(n, vocab, depth, depth, device) | {k: student[k].to(device) for k in ("hidden", "weight")}
    tensors |= {"teacher_hidden": tensors["hidden"] + noise.to(device), "teacher_weight": tensors["weight"]}
    return tensors | {"bias": 0.1 * tensors["bias"], "teacher_bias": 0.1 * tensors["bias"]}


@pytest.fixture
def plans(monkeypatch):
    """Those of the certified backwards."""
    made, plain = [], certified_backward.make_plan
    monkeypatch.setattr(certified_backward, "make_plan", lambda *a: made.append(plain(*a)) or made[-1])
    return made


CERTIFIED = {"plain": {}, "lora": {"lora": True, "bias": True, "temperature": "tensor"}, "softcap": {"softcap": 80.0}}


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("options", CERTIFIED.values(), ids=CERTIFIED)
def test_certified(torch_mm, device, beta, options, plans):
    """Within the tolerance, and with entries left out; a second backward path, not the exact one's."""
    tensors = near_pair(768, 8192, 64, device)
    upstream = torch.randn(768, device=device)
    chosen = {"beta": beta, "backend": "torch", "workspace_mb": 4, **options}
    exact = run(linear_divergence, tensors, upstream, **chosen)
    certified = run(linear_divergence, tensors, upstream, backward="certified", row_tolerance=1.0, **chosen)
    torch.testing.assert_close(certified[0], exact[0], rtol=1e-5, atol=1e-6)
    visited = sum(g.rows.numel() * g.entries.numel() for g in plans[0].groups) + plans[0].whole.numel() * 8192
    assert 0 < visited < 0.9 * 768 * 8192
    for name, want in exact[2].items():
        assert 0 < problems.relative_error(certified[2][name], want) < 0.005, name


@pytest.mark.parametrize("beta", [0.0, 1.0])
def test_hinted(device, beta, plans, torch_mm):
    """What the student drew and how likely: the same divergence, gradients within the tolerance, much more left out."""
    tensors, student = near_pair(768, 8192, 64, device), rl_student(768, 8192, 64)
    hint = {k: student[k].to(device) for k in ("targets", "old_logprobs")}
    hint["old_logprobs"][::50] = torch.nan
    chosen = {"beta": beta, "backend": "torch", "row_tolerance": 1.0, "workspace_mb": 4}
    upstream, visited = torch.randn(768, device=device), []
    exact = run(linear_divergence, tensors, upstream, backward="exact", **chosen, **hint)
    assert not plans
    for known in ({}, hint):
        value, _, grads = run(linear_divergence, tensors, upstream, backward="certified", **chosen, **known)
        plan = plans.pop()
        visited.append(sum(g.rows.numel() * g.entries.numel() for g in plan.groups) + plan.whole.numel() * 8192)
        torch.testing.assert_close(value, exact[0], rtol=1e-5, atol=1e-6)
        for name, want in exact[2].items():
            assert 0 < problems.relative_error(grads[name], want) < 0.005, name
    assert visited[1] < 0.6 * visited[0]


@pytest.mark.quick
@pytest.mark.parametrize("beta", BETAS)
def test_groups_that_keep_nothing(device, beta, plans):
    """The teacher agrees with the rows of whole blocks, which then leave out every entry."""
    tensors, same = near_pair(1024, 16384, 16, device), torch.arange(1024, device=device) < 512
    tensors["teacher_hidden"] = torch.where(same[:, None], tensors["hidden"], tensors["teacher_hidden"])
    known = {"targets": torch.zeros_like(same, dtype=torch.int64), "old_logprobs": torch.where(same, -0.1, -3.0)}
    chosen = {"beta": beta, "backend": "torch", "row_tolerance": 1.0}
    upstream = torch.randn(1024, device=device)
    exact = run(linear_divergence, tensors, upstream, backward="exact", **chosen, **known)
    ours = run(linear_divergence, tensors, upstream, backward="certified", **chosen, **known)
    assert any(group.entries.numel() == 0 for group in plans[0].groups)
    torch.testing.assert_close(ours[0], exact[0], rtol=1e-5, atol=1e-6)
    for name, want in exact[2].items():
        assert problems.relative_error(ours[2][name], want) < 0.005, name


@pytest.mark.parametrize("beta", BETAS)
def test_certified_rows_of_a_trained_head(device, beta):
    """95 % of the rows of dW within 10 %, half within 2 %, as linear_logprobs promises."""
    tensors = near_pair(768, 8192, 64, device)
    upstream = torch.randn(768, device=device)
    exact = run(linear_divergence, tensors, upstream, beta=beta, backend="torch")[2]["weight"]
    rough = run(linear_divergence, tensors, upstream, beta=beta, backend="torch", backward="certified")[2]["weight"]
    errors = (rough - exact).norm(dim=1) / exact.norm(dim=1)
    assert errors.quantile(0.95) < 0.12
    assert errors.median() < 0.024


@pytest.mark.parametrize("bw", ["exact", "certified"])
def test_a_student_that_rules_out_what_the_teacher_does_not(backend, device, bw):
    """-inf in the student's bias alone: the mixture stays finite, and p_s - p_t is -p_t there."""
    tensors = pair(9, 60, 8, 8, device)
    tensors["bias"][-3:], tensors["teacher_bias"][-3:] = -torch.inf, 2.0
    upstream = torch.ones(9, device=device)
    value, _, grads = run(linear_divergence, tensors, upstream, beta=0.5, backend=backend, backward=bw, bias=True)
    truth = run(reference.linear_divergence, in_double(tensors), upstream.double(), beta=0.5, bias=True)
    torch.testing.assert_close(value.double(), truth[0], rtol=1e-5, atol=1e-6)
    names = ("teacher_hidden", "teacher_weight", "teacher_bias")
    others, head, bias = (tensors[k].double() for k in names)
    z = (tensors["hidden"].double() @ tensors["weight"].double().T + tensors["bias"].double()).softmax(1)
    dz = (z - (others @ head.T + bias).softmax(1)) * tensors["mask"][:, None]
    _, _, grads = run(linear_divergence, tensors, upstream, beta=0.0, backend=backend, backward=bw, bias=True)
    assert problems.relative_error(grads["hidden"], dz @ tensors["weight"].double()) < 1e-5


FROZEN = {
    "plain": {},
    "all": {"bias": True, "softcap": 6.0, "teacher_softcap": 9.0, "logit_scale": 0.8, "temperature": "tensor",
            "return_entropy": True},
}  # fmt: skip


def freeze(tensors, op=linear_divergence, **options):
    """:func:`run` with a gradient of hidden alone -> divergence, entropy, d hidden."""
    hidden, upstream = tensors["hidden"].clone().requires_grad_(), options.pop("upstream")
    out = call(op, tensors | {"hidden": hidden}, **options)
    (grad,) = torch.autograd.grad((out.divergence * upstream).sum(), hidden)
    return out.divergence.detach(), out.entropy, grad


@pytest.fixture
def in_forward(monkeypatch):
    """Fails where the backward goes over the vocabulary again."""

    def refuse(*arguments):
        raise AssertionError("the gradient was made in the backward")

    return lambda: monkeypatch.setattr("fastgrpo.backends.dense_backward.add_exact_rows", refuse)


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("options", FROZEN.values(), ids=FROZEN)
@pytest.mark.parametrize(("shape", "workspace"), [((1, 1, 3, 5), 128), ((300, 700, 24, 16), 0.6)], ids=str)
def test_frozen_head(device, beta, options, shape, workspace, in_forward):
    """In several panels of several tiles each: as exact as a trained head's gradient."""
    tensors = pair(*shape, device)
    tensors["hidden"][::7] *= 5  # flat and peaked rows
    upstream = torch.randn(shape[0], device=device)
    truth = freeze(in_double(tensors), reference.linear_divergence, upstream=upstream.double(), beta=beta, **options)
    naive = freeze(tensors, reference.linear_divergence, upstream=upstream, beta=beta, **options)
    in_forward()
    got = freeze(tensors, upstream=upstream, beta=beta, backend="torch", workspace_mb=workspace, **options)
    torch.testing.assert_close(got[0].double(), truth[0], rtol=1e-5, atol=1e-5)
    if got[1] is not None:
        torch.testing.assert_close(got[1].double(), truth[1], rtol=1e-5, atol=1e-5)
    mine, theirs = (problems.relative_error(x[2], truth[2]) for x in (got, naive))
    assert mine <= 2 * theirs + 5e-6, (mine, theirs)
    assert (got[2][~tensors["mask"]] == 0).all()


TRAINED = FROZEN | {"temperature": {"temperature": 0.7, "logit_scale": -1.1}}


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("options", TRAINED.values(), ids=TRAINED)
def test_trained_head_in_the_forward(device, beta, options, in_forward):
    """Of a sum, over several panels; a second backward, and rows that weigh differently, make the head's anew."""
    tensors = pair(300, 700, 24, 16, device)
    tensors["hidden"][::7] *= 5
    chosen = {"beta": beta, "backend": "torch", "workspace_mb": 1.3, **options}
    leaf = problems.with_grad(tensors, ("hidden", "weight", "bias"))

    def found(upstream, *seen):
        truth = run(reference.linear_divergence, in_double(tensors), upstream.double(), beta=beta, **options)
        naive = run(reference.linear_divergence, tensors, upstream, beta=beta, **options)
        for got in seen:
            torch.testing.assert_close(got[0].double(), truth[0], rtol=1e-5, atol=1e-5)
            for name, want in truth[2].items():
                error = problems.relative_error(naive[2][name], want)
                assert problems.relative_error(got[2][name], want) < 2 * error + 1e-6, name

    alike, random = torch.full((300,), 1 / 7, device=device), torch.randn(300, device=device)
    found(random, run(linear_divergence, tensors, random, **chosen))
    out = call(linear_divergence, leaf, **chosen)
    wanted = {k: leaf[k] for k in ("hidden", "weight", *(("bias",) if "bias" in options else ()))}
    loss = (out.divergence * alike).sum()
    again = [dict(zip(wanted, torch.autograd.grad(loss, list(wanted.values()), retain_graph=True))) for _ in range(2)]
    (alone,) = torch.autograd.grad(loss, leaf["hidden"], retain_graph=True)
    torch.testing.assert_close(alone, again[0]["hidden"], rtol=0, atol=0)
    found(alike, *((out.divergence.detach(), None, grads) for grads in again))
    in_forward()
    found(alike, run(linear_divergence, tensors, alike, **chosen))


@pytest.mark.quick
@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("op", [run, freeze], ids=["trained", "frozen"])
def test_no_denormal_reaches_a_product(device, beta, op):
    """Peaked rows and a teacher that hardly differs: their terms are products of two small numbers."""
    tensors, drawn = pair(256, 2048, 64, 64, device), problems.drawn(256, 2048, 64)
    tensors |= {k: drawn[k].to(device) for k in ("hidden", "weight")}
    near = tensors["hidden"] + 1e-5 * torch.randn(256, 64, device=device)
    tensors |= {"teacher_hidden": near, "teacher_weight": tensors["weight"], "mask": None}
    alike = torch.full((256,), 1 / 256, device=device)
    with Gemms() as gemms:
        op(op=linear_divergence, tensors=tensors, upstream=alike, beta=beta, backend="torch", backward="exact")
    assert gemms.products > 0
    assert gemms.denormals == 0


@pytest.mark.parametrize("beta", BETAS)
def test_memory_kept_between_calls_changes_nothing(device, beta):
    """Whatever the call before was, and where two go at once."""
    upstream, settings = torch.ones(300, device=device), {"beta": beta, "backend": "torch", "backward": "exact"}
    made = [pair(300, 700, 24, 16, device, seed=k) for k in range(4)]
    pool = divergence_panels.Pool

    def gradients(tensors):
        found = freeze(tensors, upstream=upstream, workspace_mb=1.3, **settings)
        return found[0], found[2]

    pool.kept.clear()
    alone = []
    for tensors in made:
        alone.append(gradients(tensors))
        freeze(made[0], upstream=upstream, workspace_mb=1.8, **settings)  # leaves more
        assert len(pool.kept) == (device == "cpu")
    with ThreadPoolExecutor(4) as threads:
        together = list(threads.map(gradients, made * 3))
    for want, got in zip(alone * 3, together):
        assert torch.equal(want[0], got[0])
        assert torch.equal(want[1], got[1])
    assert sum(memory.nbytes for memory in pool.kept) <= 1.8 * 2**20


def test_a_trained_heads_sums_go_before_others_are_made(device, monkeypatch):
    held, makers = [], (divergence_panels.trained_forward, dense_backward.backward)

    def forward(problem):
        stats, slopes, sums = makers[0](problem)
        held.append(sums.weight)
        return stats, slopes, sums

    def backward(*arguments):
        held.append(held[0].untyped_storage().nbytes())
        return makers[1](*arguments)

    monkeypatch.setattr(torch_backend, "trained_divergence_forward", forward)
    monkeypatch.setattr(dense_backward, "backward", backward)
    tensors = pair(40, 60, 8, 8, device)
    run(linear_divergence, tensors, torch.randn(40, device=device), backend="torch")
    assert held[1:] == [0]


@pytest.mark.parametrize("beta", [0.3, 1.0])
def test_a_trained_head_whose_panel_is_given_up(device, beta, monkeypatch):
    monkeypatch.setattr(divergence_panels.PanelMaker, "fit", lambda self, share: 300)
    tensors, upstream = pair(300, 700, 24, 16, device), torch.ones(300, device=device)
    _, _, grads = run(linear_divergence, tensors, upstream, beta=beta, backend="torch", workspace_mb=1.3)
    truth = run(reference.linear_divergence, in_double(tensors), upstream.double(), beta=beta)[2]
    for name, want in truth.items():
        assert problems.relative_error(grads[name], want) < 1e-5, name


@pytest.mark.parametrize("beta", BETAS)
def test_frozen_head_gradcheck(device, beta, in_forward):
    tensors = in_double(pair(5, 23, 4, 3, device))
    rest = [tensors[k] for k in ("weight", "teacher_hidden", "teacher_weight", "mask")]
    options = {"beta": beta, "bias": tensors["bias"], "teacher_bias": tensors["teacher_bias"], "softcap": 4.0}

    def call(op, **others):
        return lambda hidden: (op(hidden, *rest, **options, **others).divergence,)

    in_forward()
    fast = call(linear_divergence, backend="torch", workspace_mb=0.02)
    problems.gradcheck(fast, call(reference.linear_divergence), [tensors["hidden"]], torch.float64)


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("distance", [1e-2, 1e-4])
def test_frozen_head_beside_the_teacher(device, beta, distance):
    hidden, weight, _, _ = problems.head(24, 500, 32, torch.float32, device)
    tensors = {"hidden": hidden, "weight": weight, "teacher_weight": weight, "mask": None}
    tensors["teacher_hidden"] = hidden + distance * torch.randn_like(hidden)
    upstream = torch.ones(24, device=device)
    got = freeze(tensors, upstream=upstream, beta=beta, backend="torch")
    truth = freeze(in_double(tensors), reference.linear_divergence, upstream=upstream.double(), beta=beta)
    assert problems.relative_error(got[2], truth[2]) < 4e-7 / distance


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("options", [{}, {"bias": True, "temperature": "tensor"}, {"softcap": 80.0}], ids=str)
@pytest.mark.parametrize("workspace", [4, 64])
def test_frozen_head_certified(device, beta, options, workspace):
    """Within the tolerance, what each row leaves out under its certificate; unequal gradients come in."""
    tensors = near_pair(768, 8192, 64, device)
    tensors["hidden"][700:] *= 0.1  # flat rows, which keep everything
    tensors["teacher_hidden"][700:] *= 0.1
    upstream = torch.randn(768, device=device).exp()
    chosen = {"beta": beta, "backend": "torch", "upstream": upstream, **options}
    exact = freeze(tensors, **chosen)
    made = freeze(tensors, backward="certified", workspace_mb=workspace, **chosen)
    torch.testing.assert_close(made[0], exact[0], rtol=1e-5, atol=1e-6)
    assert 1e-6 < problems.relative_error(made[2], exact[2]) < 0.005


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("cuts", [(1500,), (1000, 500)], ids=["whole", "shards"])
def test_frozen_head_certificate_bounds_dlogits(device, beta, cuts, monkeypatch):
    """Each row's ``dropped`` is at least the norm of what its gradient lacks: read off with a head of unit vectors."""
    n, vocab = 300, 1500
    g = torch.Generator().manual_seed(0)
    z = 4 * torch.randn(1, vocab, generator=g) + 2 * torch.randn(n, vocab, generator=g)
    others = z + torch.randn(n, vocab, generator=g)
    z, others, eye = z.double(), others.double(), torch.eye(vocab, dtype=torch.float64)
    options = HeadOptions(backward="certified", tolerance=0.05, workspace_mb=8, backend="torch")
    hidden, teacher = z.clone().requires_grad_(), TeacherHead(others, eye)
    targets = check(hidden, eye, None, teacher, beta, options)
    params = options.params(hidden, eye, (hidden,), shard=True)  # nothing put back as if spread evenly
    params = teacher.beside(replace(params, tolerance=params.tolerance / len(cuts) ** 0.5), beta)
    tensors = {"hidden": z, "weight": eye, "teacher_hidden": others, "teacher_weight": eye, "mask": None}
    truth = freeze(tensors, reference.linear_divergence, upstream=torch.ones(n).double(), beta=beta)[2]

    shards, served = eye.split(cuts), 0.0
    parts = [pair_tensors(hidden.detach(), own, targets, replace(teacher, weight=own), options) for own in shards]
    found = on_ranks(monkeypatch, [part.problem(params) for part in parts])
    for (stats, (_, values, dropped)), own in zip(found, shards):
        lacks, norm = (values - truth @ own.T @ own).norm(dim=1), stats[3]
        assert (lacks <= dropped + 1e-12).all()
        assert (dropped <= 5 * lacks + (1e-12 if len(cuts) == 1 else 1e-4 * norm)).all()  # a shard may lack nothing
        assert dropped.max() > 0
        assert (norm <= truth.norm(dim=1) * 1.00001).all()
        assert (norm > 0.98 * truth.norm(dim=1)).all()
        served += dropped.square().sum() / norm.square().sum()
    assert served.sqrt() < 0.05 * 0.1


def on_ranks(monkeypatch, shards):
    """-> statistics and slopes of each rank, which has one of the problems."""
    group, strategy = vocab_parallel_divergence.Ranks(None), strategies.DivergingFrozen
    forward = vocab_parallel_divergence.forward
    ranks = Ranks(monkeypatch, len(shards))
    return ranks.run([functools.partial(forward, shard, torch_backend, group, strategy) for shard in shards])


def frozen_shards(tensors, beta, workspaces, bw):
    """The problems of two ranks of unequal shards."""
    hidden, shards = tensors["hidden"], []
    for own, others, room in zip(*(tensors[k].split((650, 50)) for k in ("weight", "teacher_weight")), workspaces):
        options = HeadOptions(backend="torch", workspace_mb=room, softcap=6.0, logit_scale=0.8, backward=bw)
        teacher = TeacherHead(tensors["teacher_hidden"], others, softcap=9.0)
        targets = check(hidden, own, tensors["mask"], teacher, beta, options)
        params = options.params(hidden, own, (hidden.clone().requires_grad_(),), shard=True)
        shards.append(pair_tensors(hidden, own, targets, teacher, options).problem(teacher.beside(params, beta)))
    return shards


@pytest.mark.parametrize("beta", BETAS)
def test_a_rank_that_gives_up_its_panels(device, beta, monkeypatch):
    """Leaves the others theirs: the same collectives on every rank."""
    tensors = in_double(pair(40, 700, 24, 16, device))
    (stats, kept), (others, given_up) = on_ranks(monkeypatch, frozen_shards(tensors, beta, (4, 0.005), "certified"))
    assert torch.equal(stats, others)
    assert kept.dropped.isfinite().all()
    assert given_up.dropped.isinf().all()


@pytest.mark.parametrize("beta", BETAS)
def test_frozen_shards_in_panels(device, beta, monkeypatch):
    """Of different height, were it for the ranks alone: their parts of dX add up to all of it."""
    tensors = in_double(pair(300, 700, 24, 16, device))
    upstream, shards = torch.rand(300, device=device).double(), frozen_shards(tensors, beta, (0.9, 0.9), "exact")
    panels, plain = [], divergence_panels.PanelMaker.make
    monkeypatch.setattr(
        divergence_panels.PanelMaker, "make", lambda self, *a: panels.append(self.height) or plain(self, *a)
    )
    found = on_ranks(monkeypatch, shards)
    assert len(panels) >= 4
    assert len(set(panels)) > 1
    settings = {"softcap": 6.0, "teacher_softcap": 9.0, "logit_scale": 0.8}
    value, _, want = freeze(tensors, reference.linear_divergence, upstream=upstream, beta=beta, **settings)
    whole = torch.zeros_like(want)
    for stats, (rows, values, dropped) in found:
        torch.testing.assert_close(stats[0], value, rtol=1e-9, atol=1e-11)
        assert (dropped == 0).all()
        whole[rows] += values * upstream[rows, None]
    torch.testing.assert_close(whole, want, rtol=1e-9, atol=1e-11)


def test_a_panel_that_does_not_fit_is_given_up(device, monkeypatch):
    """Its rows are done by the backward."""
    monkeypatch.setattr(divergence_panels.PanelMaker, "fit", lambda self, share: 256)
    tensors, upstream = near_pair(768, 8192, 64, device), torch.rand(768, device=device)
    exact = freeze(tensors, backend="torch", backward="exact", workspace_mb=128, upstream=upstream)
    for bw in ("exact", "certified"):
        made = freeze(tensors, backend="torch", backward=bw, workspace_mb=2, upstream=upstream)
        assert problems.relative_error(made[2], exact[2]) < (1e-5 if bw == "exact" else 0.005)


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("bw", ["exact", "certified"])
def test_a_bad_row_of_a_frozen_head_stays_alone(device, beta, bw):
    tensors, upstream = near_pair(300, 4100, 32, device), torch.ones(300, device=device)
    clean = freeze(tensors, backend="torch", backward=bw, beta=beta, upstream=upstream)
    tensors["hidden"][4, 2], tensors["teacher_hidden"][9, 1] = torch.nan, torch.inf
    dirty = freeze(tensors, backend="torch", backward=bw, beta=beta, upstream=upstream)
    good = torch.ones(300, dtype=torch.bool, device=device)
    good[[4, 9]] = False
    assert dirty[0][[4, 9]].isnan().all()
    torch.testing.assert_close(dirty[0][good], clean[0][good], rtol=1e-5, atol=1e-6)
    assert problems.relative_error(dirty[2][good], clean[2][good]) < (1e-5 if bw == "exact" else 0.01)


@pytest.mark.parametrize("beta", [0.3, 0.5])
@pytest.mark.parametrize("who", [("bias",), ("teacher_bias",), ("bias", "teacher_bias")], ids="+".join)
def test_whole_tiles_may_be_ruled_out(device, who, beta):
    """A mixture's first ones, whose peaks in its first pass are no model's."""
    tensors, upstream = pair(64, 5000, 16, 16, device), torch.ones(64, device=device)
    for name in who:
        tensors[name][:3000] = -torch.inf
    options = {"bias": True, "beta": beta}
    got = freeze(tensors, upstream=upstream, backend="torch", workspace_mb=16, **options)
    want = freeze(in_double(tensors), reference.linear_divergence, upstream=upstream.double(), **options)
    torch.testing.assert_close(got[0].double(), want[0], rtol=1e-5, atol=1e-5)
    assert problems.relative_error(got[2], want[2]) < 5e-6


@pytest.mark.parametrize("who", ["bias", "teacher_bias"])
def test_entry_0_may_be_a_models_only_one(backend, device, who):
    """All other logits -inf: its log-sum-exp is that logit, the JSD finite."""
    tensors = pair(9, 60, 8, 8, device)
    tensors[who][1:] = -torch.inf
    upstream = torch.ones(9, device=device)
    value, _, grads = run(linear_divergence, tensors, upstream, beta=0.5, backend=backend, bias=True)
    hidden, weight, others, head = (
        tensors[k].double() for k in ("hidden", "weight", "teacher_hidden", "teacher_weight")
    )
    s, t = hidden @ weight.T + tensors["bias"].double(), others @ head.T + tensors["teacher_bias"].double()
    s, t = s.softmax(1), t.softmax(1)
    m = (s + t) / 2
    want = (torch.xlogy(s, s) + torch.xlogy(t, t) - 2 * torch.xlogy(m, m)).sum(1) / 2
    torch.testing.assert_close(value.double(), torch.where(tensors["mask"], want, 0.0), rtol=1e-5, atol=1e-6)
    truth = run(reference.linear_divergence, in_double(tensors), upstream.double(), beta=0.5, bias=True)
    for name, want in truth[2].items():
        torch.testing.assert_close(grads[name].double(), want, rtol=1e-5, atol=1e-5)


@pytest.mark.quick
def test_shapes_and_masked_rows_cost_nothing(backend, device):
    tensors = pair(12, 50, 8, 8, device)
    tensors["teacher_hidden"][~tensors["mask"]] = torch.nan
    tensors["hidden"][~tensors["mask"]] = torch.nan
    flat = run(linear_divergence, tensors, torch.ones(12, device=device), backend=backend)
    assert all(x.isfinite().all() for x in (flat[0], *flat[2].values()))
    cut = {
        k: v.view(3, 4, *v.shape[1:]) if k in ("hidden", "teacher_hidden", "mask") else v for k, v in tensors.items()
    }
    out = linear_divergence(*(cut[k] for k in ("hidden", "weight", "teacher_hidden", "teacher_weight", "mask")))
    assert out.divergence.shape == (3, 4)
    assert out.entropy is None
    torch.testing.assert_close(out.divergence.flatten(), flat[0], rtol=1e-5, atol=1e-6)
    none = tensors | {"mask": torch.zeros(12, device=device)}
    value, _, grads = run(linear_divergence, none, torch.ones(12, device=device), backend=backend)
    assert (value == 0).all()
    assert all((g == 0).all() for g in grads.values())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"beta": 1.5}, r"beta must be 0, 1 or in \[1e-5, 1 - 1e-5\], got 1.5"),
        ({"beta": 1e-6}, r"beta must be 0, 1 or in .* got 1e-06"),
        ({"beta": None}, "beta must be a finite number"),
        ({"teacher_hidden": torch.zeros(3, 8)}, r"teacher_hidden must have the positions of hidden, \(4, 'D_t'\)"),
        ({"teacher_weight": torch.zeros(9, 8)}, r"teacher_weight must be \(V, D_t\) = \(10, 8\)"),
        ({"teacher_weight": torch.zeros(10, 7)}, r"teacher_weight must be \(V, D_t\) = \(10, 8\)"),
        ({"teacher_weight": torch.zeros(10, 8).double()}, "teacher_weight and hidden must both be float64 or neither"),
        ({"teacher_hidden": None}, "teacher_hidden must be a torch.Tensor, got NoneType"),
        ({"teacher_weight": None}, "teacher_weight must be a torch.Tensor, got NoneType"),
        ({"teacher_hidden": torch.zeros(4, 0)}, r"teacher_hidden must have a width of at least 1, got \(4, 0\)"),
        ({"teacher_bias": torch.zeros(9)}, r"teacher_bias must be \(10,\)"),
        ({"teacher_softcap": -1.0}, "teacher_softcap must be > 0"),
        ({"teacher_logit_scale": 0.0}, "teacher_logit_scale must be other than 0"),
        ({"mask": torch.ones(5)}, r"mask must have the shape of targets, \(4,\)"),
        ({"hidden": torch.zeros(4)}, r"hidden must be \(N, D\)"),
        ({"temperature": 0.0}, "temperature must be > 0"),
        ({"targets": torch.zeros(4).long()}, "old_logprobs must be given together with targets, got None"),
        ({"old_logprobs": torch.zeros(4)}, "targets must be given together with old_logprobs, got None"),
        ({"old_logprobs": torch.zeros(4), "targets": torch.zeros(4)}, "targets must be an integer tensor"),
        ({"old_logprobs": torch.zeros(4), "targets": torch.zeros(5).long()}, r"targets must have the shape \(4,\)"),
    ],
)
def test_refused(change, message):
    given = {"hidden": torch.zeros(4, 6), "weight": torch.zeros(10, 6), "teacher_hidden": torch.zeros(4, 8)}
    with pytest.raises((ValueError, TypeError), match=message):
        linear_divergence(**(given | {"teacher_weight": torch.zeros(10, 8)} | change))


@pytest.mark.parametrize("beta", BETAS)
def test_full_blocks_at_the_vocabularys_edge(device, beta):
    """No row is masked, and the last tile has entries that are not there: they are left out of the sums of rows."""
    tensors = pair(64, 300, 48, 32, device)
    upstream = torch.ones(64, device=device)
    _, _, grads = run(
        linear_divergence, tensors, upstream, beta=beta, backend="triton", backward="certified", tolerance=1e-6
    )
    truth = run(reference.linear_divergence, in_double(tensors), upstream.double(), beta=beta)[2]
    for name, want in truth.items():
        assert problems.relative_error(grads[name], want) < 1e-4, name


def test_vocabulary_shards(tmp_path):
    """Two ranks with unequal parts of both heads are one process with all of them."""
    run_ranks(divergence_job.__file__, 2, tmp_path)
    ranks = [torch.load(tmp_path / f"rank{r}.pt") for r in range(2)]
    for name, case in (divergence_job.CASES | divergence_job.FROZEN).items():
        check_shards(
            name,
            divergence_job.outcome(linear_divergence, case),
            [results[name] for results in ranks],
            {"rtol": 1e-10, "atol": 1e-11} if case["backend"] == "torch" else {"rtol": 2e-4, "atol": 2e-5},
        )
    for name, case in divergence_job.CERTIFIED.items():
        given = in_double(divergence_job.peaked_tensors(case))
        exact = divergence_job.outcome(linear_divergence, case | {"backward": "exact", "backend": "torch"}, given=given)
        parts = [results[name] for results in ranks]
        close = {"rtol": 1e-9, "atol": 1e-11} if case["backend"] == "torch" else {"rtol": 2e-4, "atol": 2e-5}
        for part in parts:
            torch.testing.assert_close(part["divergence"].double(), exact["divergence"], **close)
        assert torch.equal(parts[0]["hidden"], parts[1]["hidden"])
        pairs = [(parts[0]["hidden"], exact["hidden"])]
        if exact["weight"] is not None:
            pairs.append((torch.cat([p["weight"] for p in parts]), exact["weight"]))
        for got, want in pairs:
            assert 3e-6 < problems.relative_error(got, want) < case["tolerance"], name


def check_shards(name, whole, parts, close):
    for key, want in whole.items():
        if key in ("weight", "bias") and want is not None:
            torch.testing.assert_close(torch.cat([p[key] for p in parts]), want, **close)
        elif want is not None:
            for part in parts:
                torch.testing.assert_close(part[key], want, **close, msg=lambda m, k=key: f"{name} {k}: {m}")

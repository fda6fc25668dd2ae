"""torch.compile, export and opcheck: the ops in a graph give what eager gives."""

import functools
from unittest import mock

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import Gemma2Config, Gemma2ForCausalLM, LlamaConfig, LlamaForCausalLM

from fastgrpo import GRPOLossConfig, divergence, grpo_loss, head_op, linear_divergence, linear_logprobs, terms
from fastgrpo.integrations.transformers import fuse_lm_head

import problems

VOCAB, DEPTH = 311, 32


@pytest.fixture(autouse=True)
def fresh_graphs():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def in_one_graph(function, dynamic=True, numbers_open=True):
    """-> the function compiled whole, and the counter of its compilations.

    Args:
        numbers_open: as ``dynamic`` has them at first; where nothing needs them it traces again, twice the time.
    """
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(function, fullgraph=True, backend=counter, dynamic=dynamic)
    return torch._dynamo.config.patch(specialize_float=not numbers_open)(compiled), counter


def head(tokens, vocab=VOCAB):
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(tokens, DEPTH, generator=g)
    weight, bias = torch.randn(vocab, DEPTH, generator=g), torch.randn(vocab, generator=g)
    targets = torch.randint(0, vocab, (tokens,), generator=g)
    targets[::7] = -100
    return hidden, weight, bias, targets


def kept_ids(targets, vocab):
    """support= of three ids a position, the target among them."""
    ids = (targets.clamp(min=0)[:, None] + torch.tensor([0, 5, 9])) % vocab
    return ids.flatten(), torch.arange(len(targets) + 1) * 3


def adapter(vocab):
    g = torch.Generator().manual_seed(1)
    a, b = torch.randn(4, DEPTH, generator=g), torch.randn(vocab, 4, generator=g)
    return a.requires_grad_(), b.requires_grad_(), 0.1


STRATEGIES = {
    "exact": {"backward": "exact"},
    "certified": {"backward": "certified", "tolerance": 0.1},
    "frozen": {"frozen": True, "backward": "exact"},
    "frozen, certified": {"frozen": True, "backward": "certified", "tolerance": 0.1},
    "entropy": {"return_entropy": True, "softcap": 20.0},
    "lora": {"lora": True},
    "support": {"support": True},
    "top-k": {"topk": True, "return_entropy": True, "lora": True},
    "top-k, certified": {"topk": True, "backward": "certified", "tolerance": 0.1, "row_tolerance": 1.0},
}


def scores(frozen, hidden, weight, bias, targets, lora=None, support=None, **options):
    """-> a loss of a call, and its results."""
    if frozen:
        weight, bias = weight.detach(), bias.detach()
    out = linear_logprobs(hidden, weight, targets, bias, lora=lora, support=support, **options)
    weights = torch.cos(torch.arange(len(targets)))
    loss = (out.logprobs * (weights if targets.ndim == 1 else weights[:, None])).sum()
    found = [x for x in out if x is not None]
    return loss + 0.3 * sum(x.sum() for x in found[1:]), *found


DIVERGENCES = {
    "reverse KL": {"backward": "exact", "lora": True, "return_entropy": True, "teacher_softcap": 20.0},
    "forward KL, certified": {"beta": 0.0, "backward": "certified", "tolerance": 0.1, "row_tolerance": 1.0},
    "reverse KL, hinted": {"hinted": True, "backward": "certified", "tolerance": 0.1, "row_tolerance": 1.0},
    "JSD, frozen": {"beta": 0.3, "frozen": True, "softcap": 20.0, "temperature": 0.7},
    "reverse KL, frozen, certified": {"frozen": True, "backward": "certified", "tolerance": 0.1},
}


def diverge(frozen, hidden, weight, bias, targets, lora=None, hinted=False, **options):
    """As :func:`scores`, of a divergence from a narrower teacher."""
    if hinted:
        options |= {"targets": targets, "old_logprobs": torch.full(targets.shape, -0.1)}
    if frozen:
        weight, bias = weight.detach(), bias.detach()
    teacher = 0.5 * hidden[:, : DEPTH // 2], 0.5 * weight[:, DEPTH // 2 :]
    out = linear_divergence(hidden, weight, *teacher, targets != -100, bias=bias, lora=lora, **options)
    loss = (out.divergence * torch.cos(torch.arange(len(targets)))).sum()
    return loss, *(x for x in out if x is not None)


def make_call(name, tokens, backend="torch", vocab=VOCAB):
    """-> a function of no argument, and the tensors that want a gradient."""
    options = dict((STRATEGIES | DIVERGENCES)[name], backend=backend)
    frozen, lora, support, topk = (options.pop(key, False) for key in ("frozen", "lora", "support", "topk"))
    hidden, weight, bias, targets = head(tokens, vocab)
    if topk:
        targets = kept_ids(targets, vocab)[0].view(-1, 3).where(targets[:, None] != -100, -100)
    leaves = [x.requires_grad_() for x in ((hidden,) if frozen else (hidden, weight, bias))]
    if lora:
        options["lora"] = adapter(vocab)
        leaves += options["lora"][:2]
    if support:
        options["support"] = kept_ids(targets, vocab)
    return functools.partial(called(name), frozen, hidden, weight, bias, targets, **options), leaves


def called(name):
    return diverge if name in DIVERGENCES else scores


def results(call, leaves):
    loss, *others = call()
    return [loss.detach(), *(x.detach() for x in others), *torch.autograd.grad(loss, leaves)]


@pytest.mark.parametrize("name", [*STRATEGIES, *DIVERGENCES])
def test_a_strategy_in_one_graph(name):
    """Values and gradients are eager's to the bit, whatever the length."""
    compiled, counter = in_one_graph(called(name))
    compilations = None
    for tokens in (140, 161, 300):  # more than a block of flags: a size of 1 would be a constant
        call, leaves = make_call(name, tokens)
        got = results(functools.partial(compiled, *call.args, **call.keywords), leaves)
        compilations = compilations or counter.frame_count
        for mine, want in zip(got, results(call, leaves), strict=True):
            assert torch.equal(mine, want)
    assert counter.frame_count == compilations


def test_a_length_that_changes_is_compiled_for_once():
    compiled, counter = in_one_graph(scores, dynamic=None)
    for tokens in (140, 153, 161, 300):
        call, leaves = make_call("exact", tokens)
        results(functools.partial(compiled, *call.args, **call.keywords), leaves)
    assert counter.frame_count == 2  # for the first length, and for any


def test_a_target_outside_the_vocabulary_is_refused_in_a_graph():
    hidden, weight, _, targets = head(10)
    targets[3] = VOCAB
    compiled, _ = in_one_graph(lambda *tensors: linear_logprobs(*tensors).logprobs)
    with pytest.raises(ValueError, match="targets must be in"):
        compiled(hidden, weight, targets)


# In a graph the loss types differ inside the op alone, which is eager's: these cover what is traced around it.
OBJECTIVES = {
    "full KL": ({"beta": 0.05, "kl_estimator": "full"}, {"reference": True}),
    "dapo, KL": ({"beta": 0.05, "importance_sampling_level": "sequence"}, {"num_items": 31.0}),
    "bnpo, entropy": ({"loss_type": "bnpo", "entropy_coef": 0.02, "top_entropy_quantile": 0.5}, {}),
    "sapo, skip": ({"loss_type": "sapo", "log_entropy": False}, {"return_logprobs": False}),
    "vespo, packed": ({"loss_type": "vespo"}, {"packed": True, "num_items": torch.tensor(40)}),
}


def make_batch(sequences, length, packed=False, reference=False, **options):
    g = torch.Generator().manual_seed(2)
    hidden, weight, _, targets = head(sequences * length)
    old, ref, sampling = -8 * torch.rand(3, sequences * length, generator=g)
    mask = (torch.rand(sequences * length, generator=g) > 0.2).int()
    advantages = torch.randn(sequences, generator=g)
    advantages[0] = 0.0
    tensors = {"old_logprobs": old, "ref_logprobs": ref, "sampling_logprobs": sampling, "mask": mask}
    if packed:
        return (hidden, weight, targets, advantages[:, None]), {
            **tensors,
            "cu_seqlens": torch.arange(sequences + 1) * length,
            **options,
        }
    shape = sequences, length
    tensors = {name: x.view(shape) for name, x in tensors.items()}
    if reference:
        del tensors["ref_logprobs"]
        options |= {"ref_hidden": hidden.detach().flip(0).view(*shape, -1), "ref_weight": 0.5 * weight.detach()}
    weights = torch.rand(sequences, generator=g)
    return (hidden.view(*shape, -1), weight, targets.view(shape), advantages), {
        **tensors,
        "importance_weights": weights,
        **options,
    }


@pytest.mark.parametrize("name", OBJECTIVES)
def test_grpo_loss_in_one_graph(name):
    settings, options = OBJECTIVES[name]
    config = GRPOLossConfig(**settings)
    compiled, counter = in_one_graph(functools.partial(grpo_loss, config=config), numbers_open=name == "full KL")
    compilations = None
    for sequences, length in ((4, 9), (6, 15)):
        tensors, keywords = make_batch(sequences, length, **options)
        leaves = [x.requires_grad_() for x in tensors[:2]]
        got, want = compiled(*tensors, **keywords), grpo_loss(*tensors, config=config, **keywords)
        compilations = compilations or counter.frame_count
        assert got.metrics.keys() == want.metrics.keys()
        for mine, theirs in zip(flat(got, leaves), flat(want, leaves), strict=True):
            torch.testing.assert_close(mine, theirs, rtol=2e-6, atol=1e-9)
    assert counter.frame_count == compilations


def flat(out, leaves):
    entropy = [] if out.entropy is None else [out.entropy]
    return [out.loss.detach(), out.logprobs, *entropy, *out.metrics.values(), *torch.autograd.grad(out.loss, leaves)]


def test_values_are_looked_at_in_a_graph():
    tensors, keywords = make_batch(2, 5)
    keywords["old_logprobs"] = -keywords["old_logprobs"]
    with pytest.raises(ValueError, match="old_logprobs must be log-probs"):
        in_one_graph(grpo_loss)[0](*tensors, **keywords)


def test_inductor():
    """torch.compile as most people call it."""
    tensors, keywords = make_batch(3, 8)
    leaves = [x.requires_grad_() for x in tensors[:2]]
    compiled = torch.compile(grpo_loss, fullgraph=True)
    for mine, theirs in zip(
        flat(compiled(*tensors, **keywords), leaves), flat(grpo_loss(*tensors, **keywords), leaves), strict=True
    ):
        torch.testing.assert_close(mine, theirs)


@pytest.fixture
def calls(monkeypatch):
    """The ops' calls, of code that believes to be traced."""
    found = []

    def spied(op):
        def call(*arguments):
            found.append((op, torch.utils._pytree.tree_map_only(torch.Tensor, leaf, arguments)))
            return op(*arguments)

        return call

    graph_ops = [(x, name) for x in (head_op.log_probs, divergence.diverge) for name in ("forward", "backward")]
    for module, name in (*graph_ops, (terms, "objective_op")):
        monkeypatch.setattr(module, name, spied(getattr(module, name)))
    with mock.patch("torch.compiler.is_compiling", return_value=True):
        yield found


def leaf(x):
    return x.detach().requires_grad_(x.requires_grad and torch.is_grad_enabled())  # a backward's inputs want none


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("name", [*STRATEGIES, *DIVERGENCES])
def test_opcheck(name, backend, calls):
    call, leaves = make_call(name, 9, backend, vocab=40)
    results(call, leaves)
    own = "fastgrpo::linear_divergence" if name in DIVERGENCES else "fastgrpo::linear_logprobs"
    assert [op._qualname for op, _ in calls] == [own, f"{own}_backward"]
    with mock.patch("torch.compiler.is_compiling", return_value=False):
        for op, arguments in calls[:2]:
            torch.library.opcheck(op, arguments)


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("name", ["bnpo, entropy", "vespo, packed"])
def test_opcheck_of_the_objective(name, backend, calls):
    settings, options = OBJECTIVES[name]
    tensors, keywords = make_batch(3, 4, **options)
    grpo_loss(*tensors, config=GRPOLossConfig(**settings), backend=backend, **keywords)
    with mock.patch("torch.compiler.is_compiling", return_value=False):
        torch.library.opcheck(*calls[-1])


@torch.no_grad()
@pytest.mark.parametrize("strict", [False, True])
def test_export(strict):
    class Model(torch.nn.Module):
        def forward(self, hidden, weight, targets, advantages):
            out = grpo_loss(hidden, weight, targets, advantages)
            return out.loss, out.logprobs, out.metrics["entropy_sum"]

    batch, length = torch.export.Dim("batch", min=2), torch.export.Dim("length", min=2)
    (hidden, weight, targets, advantages), _ = make_batch(3, 7)
    rows = {0: batch, 1: length}
    graph = torch.export.export(
        Model(), (hidden, weight, targets, advantages), dynamic_shapes=(rows, None, rows, {0: batch}), strict=strict
    )
    (hidden, weight, targets, advantages), _ = make_batch(5, 9)
    mine = graph.module()(hidden, weight, targets, advantages)
    for got, want in zip(mine, Model()(hidden, weight, targets, advantages), strict=True):
        torch.testing.assert_close(got, want)


SMALL = {
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def make_model(name):
    torch.manual_seed(0)
    if name == "Gemma2":  # a softcap
        return fuse_lm_head(Gemma2ForCausalLM(Gemma2Config(**SMALL, head_dim=8)))
    model = LlamaForCausalLM(LlamaConfig(**SMALL))
    if name == "LoRA":
        peft = pytest.importorskip("peft")
        adapters = peft.LoraConfig(r=4, target_modules=["q_proj", "lm_head"], init_lora_weights=False)
        model = peft.get_peft_model(model, adapters)
    return fuse_lm_head(model)


traceable = pytest.mark.skipif(problems.OLDEST_TORCH, reason="torch 2.8 cannot trace what transformers' models return")


@traceable
@pytest.mark.parametrize("name", ["Gemma2", "LoRA"])
def test_a_fused_model_in_one_graph(name):
    model = make_model(name)
    compiled, counter = in_one_graph(model, numbers_open=name == "Gemma2")
    compilations = None
    parameters = [p for p in model.parameters() if p.requires_grad]

    def step(call, ids, advantages):
        score = functools.partial(grpo_loss, targets=ids.roll(-1, 1), advantages=advantages)
        out = call(ids, fastgrpo=score)
        grads = torch.autograd.grad(out.loss, parameters, allow_unused=True)
        return [out.loss.detach(), out.logprobs, *(g for g in grads if g is not None)]

    for batch, length in ((2, 9), (3, 12)):
        ids, advantages = torch.randint(0, 128, (batch, length)), torch.randn(batch)
        for mine, want in zip(step(compiled, ids, advantages), step(model, ids, advantages), strict=True):
            torch.testing.assert_close(mine, want, rtol=1e-4, atol=1e-6)
        compilations = compilations or counter.frame_count
    assert counter.frame_count == compilations
    assert model(ids).logits.shape == (*ids.shape, 128)  # the head is itself again


@traceable
def test_labels_in_one_graph():
    model, ids = make_model("Llama"), torch.randint(0, 128, (2, 9))
    compiled, _ = in_one_graph(lambda ids: model(ids, labels=ids, fastgrpo=True).logprobs, numbers_open=False)
    torch.testing.assert_close(compiled(ids), model(ids, labels=ids, fastgrpo=True).logprobs)

"""Skipping, packing and shared prompts change the cost of a learner step, never its gradients."""

import copy
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
import transformers
from transformers import Qwen2Config, Qwen2ForCausalLM

pytest.importorskip("accelerate")
from accelerate import Accelerator

from fastgrpo import GRPOLossConfig, reference
from fastgrpo.config import LOSS_TYPES
from fastgrpo.inputs import IGNORE
from fastgrpo.integrations.transformers import fuse_lm_head
from fastgrpo.trainer.learner import AUTO_BUDGET, Episode, Learner, collate, micro_batches, needs_learning

import causal_lms
import trainer_job

VOCABULARY = 61


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Real memory: transformers fills what it allocates."""


def make_model(tied=False):
    config = Qwen2Config(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=tied,
    )  # fmt: skip
    torch.manual_seed(1)
    model = Qwen2ForCausalLM(config)
    with torch.no_grad():
        model.lm_head.weight.mul_(20)
    return fuse_lm_head(model)


def make_episodes(seed=0, groups=3, size=4, old=True, ref=True, importance=False, longest=20):
    """Lengths from 10 % to 100 % of the longest, one group and one more answer without an advantage, one truncated."""
    g = torch.Generator().manual_seed(seed)
    episodes = []
    for group in range(groups):
        prompt = torch.randint(0, VOCABULARY, (3 + group,), generator=g).tolist()
        for _ in range(size):
            n = int(torch.randint(longest // 10, longest + 1, (1,), generator=g))
            near = -2 + torch.randn(4, n, generator=g) * 0.3
            episodes.append(
                Episode(
                    prompt, torch.randint(0, VOCABULARY, (n,), generator=g).tolist(),
                    advantage=0.0 if group == 1 else float(torch.randn((), generator=g)),
                    sampler=near[0], old=near[1] if old else None, ref=near[2] if ref else None,
                    importance=near[3].exp().clamp(max=2) if importance else None,
                )
            )  # fmt: skip
    episodes[0].advantage = 0.0
    episodes[2].counts = False
    return episodes


def set_old(model, episodes, config, shift=0.2):
    """Log-probs near the model's own, so that ratios straddle the clip range."""
    learner = Learner(model, Accelerator(cpu=True), config)
    for i, (episode, logp) in enumerate(zip(episodes, learner.score(episodes))):
        g = torch.Generator().manual_seed(i)
        for name in ("sampler", "old", "ref"):
            noise = torch.randn(logp.shape, generator=g) * shift
            if getattr(episode, name) is not None:
                setattr(episode, name, logp + noise)


def padded_gradients(model, episodes, config, num_items=None):
    """The plain way: the whole batch padded to its longest, nothing skipped, full logits, autograd."""
    model = copy.deepcopy(model)
    longest = max(e.length for e in episodes)
    rows = range(len(episodes))
    ids = torch.zeros(len(episodes), longest, dtype=torch.long)
    attention, mask = torch.zeros_like(ids), torch.zeros_like(ids)
    values = {n: torch.zeros(ids.shape) for n in ("old", "ref", "sampler", "importance")}
    for i, e in zip(rows, episodes):
        ids[i, : e.length], attention[i, : e.length] = torch.tensor(e.prompt_ids + e.completion_ids), 1
        span = slice(len(e.prompt_ids) - 1, e.length - 1)
        mask[i, span] = (e.targets != IGNORE).long()
        for name, value in values.items():
            if getattr(e, name) is not None:
                value[i, span] = getattr(e, name)
    hidden = model.model(input_ids=ids, attention_mask=attention).last_hidden_state
    given = {n for n in values if getattr(episodes[0], n) is not None}
    names = {"old": "old_logprobs", "ref": "ref_logprobs", "sampler": "sampling_logprobs",
             "importance": "importance_weights"}  # fmt: skip
    result = reference.grpo_loss(
        hidden, model.lm_head.weight, ids.roll(-1, 1), torch.tensor([e.advantage for e in episodes]), config,
        mask=mask, num_items=num_items, **{names[n]: values[n] for n in given},
    )  # fmt: skip
    result.loss.backward()
    return result.loss.item(), {n: p.grad for n, p in model.named_parameters()}


def learner_gradients(model, episodes, config, num_items=None, **options):
    learner = Learner(model, Accelerator(cpu=True), config, **options)
    numbers = learner.gradients(episodes, num_items)
    return numbers["loss"].item(), {n: p.grad.clone() for n, p in model.named_parameters()}, numbers


def assert_close(grads, want, tolerance=1e-5):
    top = max(w.norm() for w in want.values())
    for name, w in want.items():
        error = (grads[name] - w).norm() / w.norm().clamp(min=1e-3 * top)
        assert error <= tolerance, (name, error.item())


WAYS = {
    "packed": {"packed": True, "budget": 64}, "sorted": {"budget": 64}, "one": {"budget": 10**6},
    "one packed": {"packed": True, "budget": 10**6}, "all single": {"budget": 1},
    "shared": {"share_prompts": True, "budget": 64}, "one shared": {"share_prompts": True, "budget": 10**6},
}  # fmt: skip


@pytest.mark.quick
@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_skipping_and_packing_keep_the_gradients(loss_type, level):
    for settings in ({}, {"off_policy_mask_threshold": 0.02}, {"top_entropy_quantile": 0.4}):
        config = GRPOLossConfig(
            loss_type=loss_type, importance_sampling_level=level, max_completion_length=20, temperature=0.9,
            epsilon_high=1.2 if loss_type == "cispo" else 0.28, **settings,
        )  # fmt: skip
        model, episodes = make_model(), make_episodes(importance=not settings)
        set_old(model, episodes, config)
        num_items = 100 if settings else None
        loss, want = padded_gradients(model, episodes, config, num_items)
        for way in WAYS.values() if not settings else [WAYS["packed"], WAYS["sorted"], WAYS["shared"]]:
            ours, grads, numbers = learner_gradients(model, episodes, config, num_items, **way)
            assert ours == pytest.approx(loss, rel=1e-5, abs=1e-6), way
            assert_close(grads, want)
            learned = sum(e.tokens for e in episodes if needs_learning(e, config))
            assert numbers["tokens"] == learned < sum(e.tokens for e in episodes)


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_what_needs_every_sequence_skips_none(loss_type):
    """KL and entropy bonus: sequences without an advantage have a gradient, masked ones have none."""
    for settings in ({"beta": 0.1}, {"entropy_coef": 0.05}, {"entropy_coef": 0.05, "top_entropy_quantile": 0.4}):
        config = GRPOLossConfig(loss_type=loss_type, max_completion_length=20, **settings)
        model, episodes = make_model(), make_episodes()
        set_old(model, episodes, config)
        loss, want = padded_gradients(model, episodes, config)
        for way in (WAYS["packed"], WAYS["sorted"], WAYS["shared"]):
            ours, grads, numbers = learner_gradients(model, episodes, config, **way)
            assert ours == pytest.approx(loss, rel=2e-5, abs=1e-6)
            assert_close(grads, want, 2e-5 if "entropy_coef" in settings else 1e-5)
            assert numbers["tokens"] == sum(e.tokens for e in episodes)


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_conversations(loss_type, level):
    """Tokens of others' turns do not count; turns in common are targets of every answer that holds them."""
    config = GRPOLossConfig(loss_type=loss_type, importance_sampling_level=level, max_completion_length=40, beta=0.1)
    model, episodes = make_model(), trainer_job.make_conversations(vocabulary=VOCABULARY)
    set_old(model, episodes, config)
    loss, want = padded_gradients(model, episodes, config)
    for way in (WAYS["packed"], WAYS["sorted"], WAYS["shared"], WAYS["one shared"]):
        ours, grads, numbers = learner_gradients(model, episodes, config, **way)
        assert ours == pytest.approx(loss, rel=2e-5, abs=1e-6), way
        assert_close(grads, want)
        assert numbers["tokens"] == sum(e.tokens for e in episodes) < sum(len(e.completion_ids) for e in episodes)


def test_a_batch_without_any_advantage_gives_zero_gradients():
    """Not missing ones: Adam's step must be that of the unskipped batch."""
    config, model, episodes = GRPOLossConfig(), make_model(), make_episodes()
    for e in episodes:
        e.advantage = 0.0
    loss, grads, numbers = learner_gradients(model, episodes, config)
    assert loss == 0
    assert numbers["tokens"] == 0
    assert all(g.eq(0).all() for g in grads.values())


def test_without_old_logprobs_the_ratio_is_one():
    config, model, episodes = GRPOLossConfig(loss_type="grpo"), make_model(), make_episodes(old=False, ref=False)
    loss, want = padded_gradients(model, episodes, config)
    ours, grads, numbers = learner_gradients(model, episodes, config, packed=True, budget=64)
    assert ours == pytest.approx(loss, rel=1e-5)
    assert_close(grads, want)
    assert numbers["ratio_min"] == numbers["ratio_max"] == 1


@pytest.mark.parametrize("way", [{}, {"packed": True}, {"share_prompts": True}])
def test_scores_are_the_model_s_logprobs(way):
    model, episodes = make_model(), make_episodes()
    config = GRPOLossConfig(temperature=0.7)
    learner = Learner(model, Accelerator(cpu=True), config, budget=50, **way)
    model.train()
    scores, entropies = learner.score(episodes), learner.score(episodes, entropy=True)
    assert model.training
    for e, logp, entropy in zip(episodes, scores, entropies):
        z = model(input_ids=torch.tensor([e.prompt_ids + e.completion_ids])).logits[0] / 0.7
        full = z[len(e.prompt_ids) - 1 : -1].log_softmax(-1)
        torch.testing.assert_close(logp, full.gather(1, torch.tensor(e.completion_ids)[:, None])[:, 0].detach(),
                                   rtol=1e-5, atol=2e-5)  # fmt: skip
        torch.testing.assert_close(entropy, -(full.exp() * full).sum(1).detach(), rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("packed", [False, True])
def test_micro_batches_fit_the_budget(packed):
    episodes = make_episodes(groups=9, size=8)
    batches = micro_batches(episodes, 70, packed)
    assert sorted(id(e) for b in batches for e in b) == sorted(map(id, episodes))
    for batch in batches:
        inputs, known = collate(batch, packed, torch.device("cpu"))
        assert inputs["input_ids"].numel() <= 70
        assert known["targets"].ne(-100).sum() == sum(e.tokens for e in batch)
    filled = sum(e.length for e in episodes) / sum(collate(b, packed, None)[0]["input_ids"].numel() for b in batches)
    assert filled == 1 if packed else filled > 0.9
    if packed:
        assert sum(e.length for e in episodes) / (70 * len(batches)) > 0.9
    assert len(micro_batches(episodes, 1, packed)) == len(episodes)  # too long for the budget: alone
    assert micro_batches([], 70, packed) == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("family", "packs"),
    [("Qwen2", True), ("Gemma2", True), ("Phi3", True), ("OPT", False), ("Mamba", False), ("Qwen3Next", False)],
)
def test_models_whose_packed_sequences_see_each_other_do_not_pack(family, packs, dtype, capsys):
    """States, convolutions and masks of a model's own run over the end of a sequence: gradients would be wrong."""
    config, model_class = (getattr(transformers, family + end) for end in ("Config", "ForCausalLM"))
    model = fuse_lm_head(causal_lms.make(config, model_class).to(dtype))
    learner = Learner(model, Accelerator(cpu=True), GRPOLossConfig(), packed=True)
    assert learner.packed is packs
    assert ("packing: off, because hidden states of a sequence" in capsys.readouterr().out) is not packs
    if dtype == torch.float32:
        alone = Learner(model, Accelerator(cpu=True), GRPOLossConfig(), budget=1)
        for ours, truth in zip(learner.score(make_episodes()), alone.score(make_episodes())):
            torch.testing.assert_close(ours, truth, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("fails_after", [0, 1, 2])
def test_out_of_memory_starts_over_with_half_the_budget(fails_after):
    """A model that runs out of memory above 40 tokens, in any micro-batch, ends with the whole batch's gradients."""
    config, model, episodes = GRPOLossConfig(), make_model(), make_episodes(groups=12)
    set_old(model, episodes, config)
    _, want = padded_gradients(model, episodes, config)
    calls = []

    def limited(module, args, kwargs):
        calls.append(kwargs["input_ids"].numel())
        if len(calls) > fails_after and calls[-1] > 40:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    hook = model.register_forward_pre_hook(limited, with_kwargs=True)
    learner = Learner(model, Accelerator(cpu=True), config, budget=128, packed=True)
    learner.gradients(episodes)
    assert_close({n: p.grad for n, p in model.named_parameters()}, want)
    assert learner.budget == 32
    assert max(calls) > 40 >= calls[-1]
    learner.score(episodes)  # and its passes without a gradient go on with what was found
    hook.remove()

    def always(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    model.register_forward_pre_hook(always, with_kwargs=True)
    with pytest.raises(torch.OutOfMemoryError):  # one sequence alone does not fit
        learner.gradients(episodes)


def test_the_automatic_budget_starts_somewhere():
    learner = Learner(make_model(), Accelerator(cpu=True), GRPOLossConfig())
    assert learner.budget == AUTO_BUDGET
    learner.grow()
    assert learner.budget == AUTO_BUDGET or torch.cuda.is_available()


def on_a_gpu(learner, monkeypatch, peak):
    """A made-up GPU of 100 bytes."""
    learner.accelerator = SimpleNamespace(**{**vars(learner.accelerator), "device": torch.device("cuda")})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: peak[0])
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=100))


def test_the_automatic_budget_grows_into_a_gpu(monkeypatch):
    """A made-up GPU of 100 bytes: doubled while the peak is below 40 of them, never back to what did not fit."""
    learner, peak = Learner(make_model(), Accelerator(cpu=True), GRPOLossConfig()), [10]
    on_a_gpu(learner, monkeypatch, peak)
    learner.grow()
    assert learner.budget == AUTO_BUDGET  # no step yet
    learner.plan(make_episodes())
    learner.grow()
    assert learner.budget == AUTO_BUDGET  # all in one micro-batch: that more would fit is not known
    learner.plan(make_episodes(groups=200, size=8))
    seen = []
    for peak[0] in (10, 39, 41):
        learner.grow()
        seen.append(learner.budget // AUTO_BUDGET)
    assert seen == [2, 4, 4]
    learner.limit = learner.budget = 2 * AUTO_BUDGET  # as after running out of memory
    peak[0] = 10
    learner.grow()
    assert learner.budget == 2 * AUTO_BUDGET
    fixed = Learner(make_model(), Accelerator(cpu=True), GRPOLossConfig(), budget=64)
    on_a_gpu(fixed, monkeypatch, peak)
    fixed.plan(make_episodes())
    fixed.grow()
    assert fixed.budget == 64


def test_a_cpu_run_beside_a_gpu_asks_nothing_of_it(monkeypatch):
    """use_cpu: torch sees the GPU, the learner is not on it."""
    learner = Learner(make_model(), Accelerator(cpu=True), GRPOLossConfig(), budget="auto")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    learner.plan(make_episodes(groups=200, size=8))
    learner.grow()
    assert learner.budget == AUTO_BUDGET


def test_the_peak_is_the_step_s_own(monkeypatch):
    """Generation's and evaluation's, which came before, would keep the budget small for ever."""
    calls, model, episodes = [], make_model(), make_episodes(old=False, ref=False)
    learner = Learner(model, Accelerator(cpu=True), GRPOLossConfig())
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: calls.append(device))
    monkeypatch.setattr(Learner, "on_gpu", True)
    model.register_forward_pre_hook(lambda *_: calls.append("pass"))
    learner.gradients(episodes)
    assert calls == [torch.device("cpu"), "pass"]


@pytest.mark.parametrize(
    "message",
    [
        "CUDA out of memory. Tried to allocate 2.00 GiB", "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cu`",
        "CUDA error: out of memory\nCUDA kernel errors might be", "Triton Error [CUDA]: out of memory", "a bug",
    ],
)  # fmt: skip
def test_memory_runs_out_under_several_names(message):
    """A budget far beyond the batch is not halved from there: the second attempt is smaller than the first."""
    model, episodes, seen = make_model(), make_episodes(groups=12), []
    error = torch.OutOfMemoryError if message.startswith("CUDA out") else RuntimeError

    def limited(module, args, kwargs):
        seen.append(kwargs["input_ids"].numel())
        if seen[-1] > 150:
            raise error(message)

    learner = Learner(model, Accelerator(cpu=True), GRPOLossConfig(), budget=10**9, packed=True)
    model.register_forward_pre_hook(limited, with_kwargs=True)
    if message == "a bug":
        with pytest.raises(RuntimeError, match="a bug"):
            learner.gradients(episodes)
        return
    learner.gradients(episodes)
    failed = [n for n in seen if n > 150]
    assert len(failed) == 3
    assert all(b <= a // 2 for a, b in pairwise(failed))
    assert max(seen[3:]) <= learner.budget == learner.limit == failed[0] // 8


def test_activation_offload_keeps_the_gradients_and_leaves_the_weights(monkeypatch):
    config, model, episodes = GRPOLossConfig(), make_model(), make_episodes()
    set_old(model, episodes, config)
    _, want, _ = learner_gradients(model, episodes, config)
    copied = []
    plain = torch.autograd.graph.save_on_cpu

    class Counted(plain):
        def __init__(self, **options):
            super().__init__(**options)
            pack = self.pack_hook
            self.pack_hook = lambda x: (copied.append(x.shape), pack(x))[1]

    monkeypatch.setattr(torch.autograd.graph, "save_on_cpu", Counted)
    _, grads, _ = learner_gradients(model, episodes, config, offload=True)
    for name, grad in grads.items():
        assert grad.equal(want[name]), name
    weights = {p.shape for p in model.parameters() if p.ndim == 2}
    assert copied
    assert not weights & set(copied)
    assert not {tuple(reversed(w)) for w in weights} & set(map(tuple, copied))


def test_a_model_that_would_ignore_the_op_is_refused():
    """transformers' models swallow unknown keywords: a learner would take their logits for its result."""
    plain, learner = (
        Qwen2ForCausalLM(make_model().config),
        Learner(make_model(), Accelerator(cpu=True), GRPOLossConfig()),
    )
    with pytest.raises(ValueError, match="fuse_lm_head has fused, got a plain Qwen2ForCausalLM"):
        Learner(plain, Accelerator(cpu=True), GRPOLossConfig())
    with pytest.raises(ValueError, match="fuse_lm_head has fused, got a plain Qwen2ForCausalLM"):
        learner.score(make_episodes(), plain)

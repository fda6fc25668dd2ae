"""A group's answers behind one copy of their prompt: the gradients and log-probs of whole rows, or a reason why not."""

import sys
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
import transformers

pytest.importorskip("accelerate")
from accelerate import Accelerator

from fastgrpo import GRPOLossConfig
from fastgrpo.config import LOSS_TYPES
from fastgrpo.integrations.transformers import fuse_lm_head
from fastgrpo.trainer import shared_prompts
from fastgrpo.trainer.learner import Episode, Learner, collate
from fastgrpo.trainer.model import make_trainable

import causal_lms
import trainer_job

FAMILIES = [
    "Cohere", "DeepseekV3", "GPT2:GPT2LMHeadModel", "GPTNeoX", "Gemma", "Gemma3Text:Gemma3ForCausalLM", "Glm4",
    "Granite", "Helium", "Llama", "Mistral", "OPT", "Olmo2", "Phi3", "Qwen2", "Qwen3", "Qwen3Moe", "SmolLM3",
    "Starcoder2",
]  # fmt: skip
GROUPS = [(12, (3, 7, 14)), (1, (2, 9)), (6, (5,))]  # tokens of a prompt, of its answers
LONGEST = 26
TURNS = 55  # of a conversation


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Real memory: transformers fills what it allocates."""


def make(family, **options):
    config, _, name = family.partition(":")
    kind = getattr(transformers, f"{config}Config")
    return fuse_lm_head(causal_lms.make(kind, getattr(transformers, name or f"{config}ForCausalLM"), **options))


def make_episodes(groups=GROUPS):
    g, episodes = torch.Generator().manual_seed(0), []
    for length, answers in groups:
        prompt = torch.randint(3, 90, (length,), generator=g).tolist()
        for n in answers:
            ids, advantage = torch.randint(3, 90, (n,), generator=g).tolist(), torch.randn((), generator=g)
            episodes.append(Episode(prompt, ids, advantage=advantage.item()))
    return episodes


def learn(model, episodes, share, config=None, **options):
    """-> gradients, log-probs"""
    if not share:
        options["budget"] = 1  # a row for each answer
    options = {"share_prompts": share, "longest": LONGEST, **options}
    learner = Learner(model, Accelerator(cpu=True), config or GRPOLossConfig(), **options)
    learner.gradients(episodes)
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return gradients, learner.score(episodes)


def fill_lora(model):
    """B is zero at the start."""
    for name, p in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.1)


def assert_same(got, want):
    (gradients, scores), (want_gradients, want_scores) = got, want
    torch.testing.assert_close(scores, want_scores, rtol=1e-4, atol=1e-4)
    assert gradients.keys() == want_gradients.keys()
    top = max(w.norm() for w in want_gradients.values())
    assert top > 0
    for name, w in want_gradients.items():
        assert (gradients[name] - w).norm() <= 1e-5 * w.norm().clamp(min=1e-3 * top), name


@pytest.mark.parametrize("family", FAMILIES)
def test_whole_rows_gradients(family):
    model, episodes = make(family), make_episodes()
    want = learn(model, episodes, False)
    assert_same(learn(model, episodes, True), want)
    assert_same(learn(model, episodes, True, budget=30), want)  # the first group is cut
    episodes = trainer_job.make_conversations()
    want = learn(model, episodes, False, longest=TURNS)
    assert_same(learn(model, episodes, True, budget=60, longest=TURNS), want)


def test_a_wrong_layout_is_seen(monkeypatch):
    """The comparison above can fail: answers that see one another, or the wrong positions."""
    model, episodes = make("Qwen2"), make_episodes()
    want = learn(model, episodes, False)
    see = shared_prompts.see
    monkeypatch.setattr(shared_prompts, "see", lambda visible, length: see(visible, length).roll(1, 2))
    assert "hidden states behind a shared prompt differ" in str(shared_prompts.why_not(model, LONGEST))
    monkeypatch.setattr(shared_prompts, "why_not", lambda *_: None)
    with pytest.raises(AssertionError):
        assert_same(learn(model, episodes, True), want)


@pytest.mark.parametrize(
    "settings",
    [
        {"gradient_checkpointing": True}, {"gradient_checkpointing": False, "use_peft": True},
        {"gradient_checkpointing": True, "use_peft": True, "offload": True},
    ],
)  # fmt: skip
def test_lora_checkpointing_and_offload(settings):
    from fastgrpo.trainer import GRPOConfig

    if "use_peft" in settings:
        pytest.importorskip("peft")
    offload = settings.pop("offload", False)
    config = GRPOConfig(use_cpu=True, lora_target_modules="all-linear", lora_dropout=0.0, **settings)
    model, episodes = make_trainable(make("Llama"), config).train(), make_episodes()
    fill_lora(model)
    assert_same(learn(model, episodes, True, offload=offload), learn(model, episodes, False))
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.works("transformers", "shared prompts over a base in 4 bits (QLoRA): gradients of whole rows")
def test_a_base_in_4_bits(tmp_path):
    for package in ("bitsandbytes", "peft"):
        pytest.importorskip(package)
    from fastgrpo.trainer import GRPOConfig
    from fastgrpo.trainer.model import load_model

    config = GRPOConfig(
        use_cpu=True, use_peft=True, load_in_4bit=True, bf16=False, gradient_checkpointing=False, lora_dropout=0.0
    )
    causal_lms.make(transformers.LlamaConfig, transformers.LlamaForCausalLM).save_pretrained(tmp_path)
    base = load_model(str(tmp_path), config, torch.device("cpu"))
    assert any(p.dtype == torch.uint8 for p in base.parameters())
    model, episodes = make_trainable(fuse_lm_head(base), config).train(), make_episodes()
    fill_lora(model)
    assert_same(learn(model, episodes, True), learn(model, episodes, False))


REFUSALS = [
    ("Gemma2", {"attn_implementation": "eager"}, "attn_implementation is 'eager', not 'sdpa' or"),
    ("Falcon", {}, "does not use transformers' attention interface"),
    ("FalconH1", {}, "it has layers of hybrid"),
    ("Jamba", {}, "it has layers of linear_attention"),
    ("Mistral", {"sliding_window": 25}, "sliding window of 25 tokens is shorter than 26"),
    ("Nemotron", {}, "NemotronAttention is not given the keywords of its model's call"),
    ("PLBart", {}, "hidden states behind a shared prompt differ"),  # positions of its own
    ("Roberta", {}, "hidden states behind a shared prompt differ"),
]


@pytest.mark.parametrize(("family", "options", "reason"), REFUSALS)
def test_what_cannot_share(family, options, reason, capsys):
    model = make(family, **options)
    before = model.config._attn_implementation
    assert shared_prompts.decide("auto", model, LONGEST) is False
    said = capsys.readouterr().out
    assert said.startswith("share_prompts: off, because ")
    assert reason in said
    with pytest.raises(ValueError, match=r"share_prompts must be False or 'auto', got True: .*" + reason[:20]):
        Learner(model, Accelerator(cpu=True), GRPOLossConfig(), share_prompts=True, longest=LONGEST)
    assert shared_prompts.decide(False, model, LONGEST) is False
    assert capsys.readouterr().out == ""
    assert model.config._attn_implementation == before


def test_a_window_longer_than_the_sequence_is_none():
    assert shared_prompts.why_not(make("Mistral", sliding_window=26), 26) is None


def test_16_bits_are_no_difference():
    assert shared_prompts.why_not(make("Qwen2").bfloat16(), LONGEST) is None


@pytest.mark.parametrize("budget", [40, 64, 1000])
def test_micro_batches_hold_the_budget_and_share(budget):
    episodes = make_episodes([(20, (4,) * 8), (5, range(1, 9)), (3, (30, 50))])
    batches = shared_prompts.micro_batches(episodes, budget)
    assert sorted(id(e) for b in batches for e in b) == sorted(map(id, episodes))
    for batch in batches:
        inputs, known = collate(batch, True, torch.device("cpu"), True)
        prompts = {tuple(e.prompt_ids) for e in batch}
        tokens = sum(map(len, prompts)) + sum(len(e.completion_ids) - 1 for e in batch)
        assert inputs["input_ids"].numel() == shared_prompts.count_tokens(batch) == tokens
        assert tokens <= budget or len(batch) == 1
        assert known["targets"].ne(-100).sum() == sum(e.tokens for e in batch)
    whole = shared_prompts.count_tokens([e for b in shared_prompts.micro_batches(episodes, 10**6) for e in b])
    assert whole == 20 + 8 * 3 + 5 + sum(range(8)) + 3 + 29 + 49
    assert shared_prompts.micro_batches([], budget) == []


@pytest.mark.quick
def test_a_row_is_a_tree():
    """Each distinct beginning stands once, in whole steps; every answer's states are those of its own tokens."""
    episodes = trainer_job.make_conversations()
    alone = [e.length - 1 for e in episodes]
    shared = 6 * 16 + 4 * 3 + 4 * 13 + 16  # to 16: all but the last row; to 19 and to 32: five; to 48: two
    assert sum(alone) - shared_prompts.count_tokens(episodes) == shared
    for seed in range(20):
        g = torch.Generator().manual_seed(seed)
        rows = [trainer_job.make_conversations(s)[i] for s in (0, 1) for i in torch.randperm(8, generator=g)[:6]]
        for budget in (40, 100, 150, 1000):
            batches = shared_prompts.micro_batches(rows, budget)
            assert sorted(id(e) for b in batches for e in b) == sorted(map(id, rows))
            for batch in batches:
                assert shared_prompts.count_tokens(batch) <= max(budget, batch[0].length - 1)
                check_row(batch)


def check_row(episodes):
    inputs = shared_prompts.lay_out(episodes, torch.device("cpu"))
    layout, (ids,), (positions,) = inputs["shared_prompts"], inputs["input_ids"], inputs["position_ids"]
    assert len(ids) == shared_prompts.count_tokens(episodes)
    for e, path in zip(episodes, layout.predicts.split([len(e.completion_ids) for e in episodes])):
        first = len(e.prompt_ids) - 1
        assert ids[path].tolist() == (e.prompt_ids + e.completion_ids)[first:-1]
        assert positions[path].tolist() == [*range(first, e.length - 1)]
    blocks, place = layout.calls
    seen = torch.cat([count_keys(block) for block in blocks])[place]
    assert torch.equal(seen, positions + 1)


def count_keys(block):
    """(B * L,) how many tokens each query sees."""
    rows, length = block.queries.shape
    if block.mask is None:
        return torch.arange(1, length + 1).repeat(rows)
    return block.mask.sum(-1).expand(rows, 1, length).flatten()


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_turns_in_common_have_each_answer_s_gradient(loss_type, level):
    """Tokens that stand once are targets of each answer that holds them, by its advantage, old log-probs and mask."""
    model, episodes = make("Qwen2"), trainer_job.make_conversations()
    for settings in ({}, {"beta": 0.1, "entropy_coef": 0.05, "top_entropy_quantile": 0.4}):
        options = {
            "loss_type": loss_type,
            "importance_sampling_level": level,
            "max_completion_length": TURNS,
            **settings,
        }
        config = GRPOLossConfig(**options, epsilon_high=1.2 if loss_type == "cispo" else 0.28)
        want = learn(model, episodes, False, config, longest=TURNS)
        assert_same(learn(model, episodes, True, config, longest=TURNS, budget=60), want)


def varlen(q, k, v, cu_q, cu_k, max_q, max_k, dropout_p, softmax_scale, softcap, causal):
    """What flash-attn 2.1 and later documents: (T, H, d), causal from each sequence's last key backwards."""
    assert (cu_q.dtype, cu_k.dtype, causal, dropout_p, softcap) == (torch.int32, torch.int32, True, 0.0, 0.0)
    assert (max_q, max_k) == (cu_q.diff().max(), cu_k.diff().max())
    rows = []
    for (a, b), (c, d) in zip(pairwise(cu_q.tolist()), pairwise(cu_k.tolist())):
        mask = torch.ones(b - a, d - c, dtype=torch.bool).tril(d - c - (b - a))
        heads = (x.transpose(0, 1)[None] for x in (q[a:b], k[c:d], v[c:d]))
        options = {"attn_mask": mask, "scale": softmax_scale, "enable_gqa": True}
        rows.append(torch.nn.functional.scaled_dot_product_attention(*heads, **options)[0].transpose(0, 1))
    return torch.cat(rows)


def test_flash_attn_s_lengths(monkeypatch):
    """By a stand-in for its function; on a GPU this has not been run."""
    monkeypatch.setitem(sys.modules, "flash_attn", SimpleNamespace(flash_attn_varlen_func=varlen))
    model, episodes = make("Qwen2"), trainer_job.make_conversations()
    want = learn(model, episodes, False)
    model.config._attn_implementation_internal = "flash_attention_2"
    inputs = shared_prompts.lay_out(episodes, torch.device("cpu"))
    refusal = pytest.raises(shared_prompts.CannotShare, match=r"in torch\.float32, and flash-attn in 16 bits")
    with shared_prompts.sharing(model), refusal:
        model(**inputs)
    monkeypatch.setattr(shared_prompts, "HALF", (torch.float32,))
    monkeypatch.setattr(shared_prompts, "why_not", lambda *_: None)  # which asks flash-attn itself
    assert_same(learn(model, episodes, True), want)
    assert_same(learn(model, episodes, True, budget=60), want)
    assert model.config._attn_implementation == "flash_attention_2"


def test_no_mask_of_the_whole_row():
    """Masks are of one answer's length times what it sees, and all groups' prompts together have none."""
    episodes = make_episodes([(60, (8,) * 8), (60, (8,) * 8)])
    layout = shared_prompts.lay_out(episodes, torch.device("cpu"))["shared_prompts"]
    assert {b.mask if b.mask is None else b.mask.shape for b in layout.calls[0]} == {None, (1, 1, 7, 60 + 7)}


@pytest.mark.parametrize("fails_after", [0, 2])
def test_out_of_memory_starts_over(fails_after):
    model, episodes, calls = make("Qwen2"), make_episodes([(12, (3, 7, 14)), (9, (5, 5, 5, 5, 5))]), []
    want = learn(model, episodes, False)

    def limited(module, args, kwargs):
        calls.append(kwargs["input_ids"].numel())
        if len(calls) > fails_after and calls[-1] > 30:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    learner = Learner(model, Accelerator(cpu=True), GRPOLossConfig(), budget=60, share_prompts=True, longest=LONGEST)
    hook = model.register_forward_pre_hook(limited, with_kwargs=True)
    learner.gradients(episodes)
    gradients = {n: p.grad.clone() for n, p in model.named_parameters()}
    assert_same((gradients, learner.score(episodes)), want)
    assert learner.budget == 30
    hook.remove()

    def fails(*_):
        assert model.config._attn_implementation == shared_prompts.NAME
        raise RuntimeError("a bug")

    model.register_forward_pre_hook(fails)
    with pytest.raises(RuntimeError, match="a bug"):
        learner.gradients(episodes)
    assert model.config._attn_implementation == "sdpa"  # generation's own


@pytest.mark.parametrize("settings", [{"beta": 0.05}, {"beta": 0.05, "use_peft": True, "token_budget": 40}])
def test_the_trainer_learns_the_same(settings, tmp_path):
    """By default it shares: gradient passes, old and reference log-probs."""
    runs, lora = [], {"lora_target_modules": "all-linear", "lora_dropout": 0.0}
    for name, more in (("shared", {}), ("whole", {"share_prompts": False})):
        trainer = trainer_job.make_trainer(
            tmp_path / name, model=trainer_job.make_model(dropout=0.0), max_steps=3, save_strategy="no",
            recompute_old_logprobs=True, **settings, **lora, **more,
        )  # fmt: skip
        assert trainer.learner.share is (name == "shared")
        runs.append(trainer.train())
    for ours, theirs in zip(*runs):
        for key in ("loss", "kl", "grad_norm", "reward", "entropy", "ratio_max"):
            assert ours[key] == pytest.approx(theirs[key], rel=1e-3, abs=1e-5), key


def test_the_trainer_refuses_what_it_cannot(tmp_path):
    model, tokenizer = trainer_job.make_model()
    model.config._attn_implementation = "eager"
    with pytest.raises(ValueError, match="got True: attn_implementation is 'eager'"):
        trainer_job.make_trainer(tmp_path, model=(model, tokenizer), share_prompts=True)

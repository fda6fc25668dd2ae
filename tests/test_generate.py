"""The samplers: their log-probs, stops, batches, and that a model comes back as it went in."""

import sys
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("accelerate")
transformers = pytest.importorskip("transformers")

from fastgrpo.integrations.vllm import named_weights  # noqa: E402
from fastgrpo.trainer import generate  # noqa: E402
from fastgrpo.trainer.completions import completion  # noqa: E402
from fastgrpo.trainer.generate import Recorder, Sampling, TransformersSampler, end_tokens  # noqa: E402

import causal_lms  # noqa: E402

PAD, EOS, V = 0, 2, 48
TOKENIZER = SimpleNamespace(pad_token_id=PAD, eos_token_id=EOS)
PROMPTS = [[5, 6, 7, 8, 9, 10, 11], [5], [12, 13, 14], [40, 41, 42, 43], [5, 6]]


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Real memory: transformers fills what it allocates."""


@pytest.fixture
def model():
    torch.manual_seed(0)
    config = transformers.Qwen2Config(
        vocab_size=V, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, eos_token_id=EOS, pad_token_id=PAD, tie_word_embeddings=False,
        initializer_range=0.3,
    )  # fmt: skip
    return transformers.Qwen2ForCausalLM(config)


def lora(model, **options):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj", "lm_head"], **options)
    wrapped = peft.get_peft_model(model, config)
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return wrapped


@torch.no_grad()
def score_forced(model, prompt, ids, temperature=1.0):
    """Log-probs of ``ids`` behind ``prompt`` by one forward pass."""
    logits = model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1].float()
    return (logits / temperature).log_softmax(-1).gather(-1, torch.tensor(ids)[:, None])[:, 0]


@pytest.mark.quick
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.6},
        {"temperature": 1.7, "top_p": 0.8, "top_k": 9, "min_p": 0.02},
        {"repetition_penalty": 1.4},
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("peft", [False, True])
def test_logprobs_are_those_of_the_model(model, options, peft):
    """Whatever truncates or penalises the draw, the log-probs are the whole distribution's at the temperature."""
    model = lora(model) if peft else model
    sampling = Sampling(num_generations=3, max_completion_length=12, **options)
    groups = TransformersSampler(TOKENIZER).generate(model, PROMPTS, sampling)
    assert [len(g) for g in groups] == [3] * len(PROMPTS)
    model.eval()
    for prompt, group in zip(PROMPTS, groups):
        for answer in group:
            assert len(answer.ids) == len(answer.logprobs)
            expected = score_forced(model, prompt, answer.ids, sampling.temperature)
            torch.testing.assert_close(torch.tensor(answer.logprobs), expected, atol=1e-5, rtol=0)


def test_entropies_are_those_of_the_model(model):
    """Of the whole distribution at the temperature; up to the end token. Without them -log p of what was drawn."""
    sampling = Sampling(num_generations=2, max_completion_length=9, temperature=0.7, top_k=5)
    for prompt, group in zip(PROMPTS, TransformersSampler(TOKENIZER).generate(model, PROMPTS, sampling)):
        for answer in group:
            logits = model(torch.tensor([prompt + answer.ids])).logits[0, len(prompt) - 1 : -1] / 0.7
            logp = logits.log_softmax(-1)
            assert answer.entropy == pytest.approx(-(logp.exp() * logp).sum().item(), rel=1e-4)
    cut = completion([7, EOS, 8], [-0.5, float("nan"), -3.0], [EOS])
    assert (cut.ids, cut.entropy) == ([7, EOS], 0.5)


def test_top_k_one_is_greedy(model):
    sampler = TransformersSampler(TOKENIZER)
    one = sampler.generate(model, PROMPTS, Sampling(max_completion_length=8, top_k=1))
    greedy = sampler.generate(model, PROMPTS, Sampling(num_generations=4, max_completion_length=8), greedy=True)
    assert [g[0].ids for g in one] == [g[0].ids for g in greedy]


def test_greedy_is_the_argmax_loop(model):
    groups = TransformersSampler(TOKENIZER).generate(
        model, PROMPTS, Sampling(num_generations=4, max_completion_length=10), greedy=True
    )
    model.eval()
    for prompt, (answer,) in zip(PROMPTS, groups):
        ids = []
        while len(ids) < 10 and EOS not in ids:
            ids.append(model(torch.tensor([prompt + ids])).logits[0, -1].argmax().item())
        assert answer.ids == ids


@pytest.mark.quick
def test_stops(model):
    """Every end token stops, the cut answer holds it, and only its last position."""
    model.generation_config.eos_token_id = [7, 9]
    assert end_tokens(model, TOKENIZER) == [EOS, 7, 9]
    groups = TransformersSampler(TOKENIZER).generate(
        model, PROMPTS, Sampling(num_generations=20, max_completion_length=15)
    )
    answers = [a for g in groups for a in g]
    assert {a.ids[-1] for a in answers if a.finished} == {EOS, 7, 9}
    assert any(not a.finished for a in answers)
    for answer in answers:
        assert answer.finished == (answer.ids[-1] in (EOS, 7, 9))
        assert answer.finished or len(answer.ids) == 15
        assert not {EOS, 7, 9} & set(answer.ids[:-1])


FAMILIES = {  # and whether a prompt goes through the model once
    "Cohere": True, "GPT2:GPT2LMHeadModel": True, "Gemma3Text:Gemma3ForCausalLM": True, "Llama": True, "Mistral": True,
    "Qwen3Moe": True, "OPT": True, "Mamba": False, "FalconH1": False, "Jamba": False,
}  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_a_prompt_is_computed_once(family, monkeypatch):
    """The same tokens and log-probs as from a cache that every row fills itself."""
    config, _, name = family.partition(":")
    kinds = getattr(transformers, f"{config}Config"), getattr(transformers, name or f"{config}ForCausalLM")
    window = {"sliding_window": 4} if family in ("Mistral", "Gemma3Text:Gemma3ForCausalLM") else {}
    model = causal_lms.make(*kinds, **window).eval()
    seen, calls = [], []
    real, generation = generate.prefill, model.generate
    monkeypatch.setattr(generate, "prefill", lambda *a: seen.append(real(*a)) or seen[-1])
    monkeypatch.setattr(model, "generate", lambda ids, **o: calls.append(ids.shape) or generation(ids, **o))
    sampling = Sampling(num_generations=4, max_completion_length=6)
    torch.manual_seed(0)
    once = TransformersSampler(TOKENIZER).generate(model, PROMPTS, sampling)
    assert calls == [(len(PROMPTS), 6), (4 * len(PROMPTS), 7)]
    assert [bool(found) for found in seen] == [FAMILIES[family]]
    monkeypatch.setattr(generate, "prefill", lambda *_: {})
    torch.manual_seed(0)
    for group, other in zip(once, TransformersSampler(TOKENIZER).generate(model, PROMPTS, sampling)):
        for a, b in zip(group, other):
            assert a.ids == b.ids
            torch.testing.assert_close(torch.tensor(a.logprobs), torch.tensor(b.logprobs), atol=1e-5, rtol=0)


def test_a_tokenizer_without_padding(model):
    tokenizer = SimpleNamespace(pad_token_id=None, eos_token_id=EOS)
    torch.manual_seed(0)
    bare = TransformersSampler(tokenizer).generate(model, PROMPTS, Sampling(max_completion_length=8))
    torch.manual_seed(0)
    assert bare == TransformersSampler(TOKENIZER).generate(model, PROMPTS, Sampling(max_completion_length=8))


def test_uneven_prompts_equal_one_by_one(model):
    """Left padding changes nothing; neither does the token budget, nor the order of the batches."""
    sampling = Sampling(max_completion_length=9)
    together = TransformersSampler(TOKENIZER).generate(model, PROMPTS, sampling, greedy=True)
    for budget in (1, 30, 40):
        split = TransformersSampler(TOKENIZER, budget).generate(model, PROMPTS, sampling, greedy=True)
        for (a,), (b,) in zip(together, split):
            assert a.ids == b.ids
            torch.testing.assert_close(torch.tensor(a.logprobs), torch.tensor(b.logprobs), atol=1e-5, rtol=0)


def test_a_batch_stays_within_its_tokens(model, monkeypatch):
    sizes = []
    inner = model.generate
    monkeypatch.setattr(generate, "prefill", lambda *_: {})  # calls of its own
    monkeypatch.setattr(model, "generate", lambda ids, **k: sizes.append(ids.shape) or inner(ids, **k))
    TransformersSampler(TOKENIZER, 64).generate(model, PROMPTS, Sampling(num_generations=5, max_completion_length=8))
    assert sum(rows for rows, _ in sizes) == 5 * len(PROMPTS)
    assert all(rows * (width + 8) <= 64 for rows, width in sizes)
    assert [width for _, width in sizes] == sorted((width for _, width in sizes), reverse=True)


def test_torch_seed_decides(model):
    sampler, draws = TransformersSampler(TOKENIZER), []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        draws.append(sampler.generate(model, PROMPTS, Sampling(num_generations=2, max_completion_length=8)))
    assert draws[0] == draws[1] != draws[2]


def test_no_logits_are_kept():
    """One step's distribution is alive at a time, however many steps."""
    import weakref

    recorder, alive = Recorder(1.0), []
    ids = torch.zeros(2, 1, dtype=torch.long)
    for _ in range(5):
        recorder(ids, torch.randn(2, V))
        alive.append(weakref.ref(recorder.step))
        ids = torch.cat((ids, torch.randint(V, (2, 1))), 1)
        assert sum(ref() is not None for ref in alive) == 1
    recorder.take(ids)
    assert [x.shape for x in recorder.logprobs] == [(2, 1)] * 5


@pytest.mark.parametrize("peft", [False, True])
@pytest.mark.parametrize("fails", [False, True])
def test_the_model_comes_back_as_it_was(model, peft, fails, monkeypatch):
    model = lora(model) if peft else model
    model.gradient_checkpointing_enable()
    model.train()
    model.config.use_cache = False
    frozen = next(m for n, m in model.named_modules() if n.endswith("layers.0.mlp"))
    frozen.eval()
    defaults = model.generation_config
    state = {n: x.clone() for n, x in model.state_dict().items()}
    if fails:
        monkeypatch.setattr(Recorder, "take", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            TransformersSampler(TOKENIZER).generate(model, PROMPTS, Sampling(max_completion_length=4))
    else:
        TransformersSampler(TOKENIZER).generate(model, PROMPTS, Sampling(max_completion_length=4))
    assert model.training
    assert not frozen.training
    assert all(m.training for n, m in model.named_modules() if "mlp" not in n)
    assert model.is_gradient_checkpointing
    assert model.config.use_cache is False
    assert model.generation_config is defaults
    assert all(torch.equal(x, state[n]) for n, x in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_the_checkpoints_own_defaults_do_not_leak(model):
    """A checkpoint's top_k, temperature or penalty would sample from another distribution than the one trained on."""
    model.generation_config.update(top_k=1, temperature=0.01, repetition_penalty=3.0, do_sample=True)
    torch.manual_seed(0)
    a = TransformersSampler(TOKENIZER).generate(model, PROMPTS, Sampling(num_generations=4, max_completion_length=8))
    assert len({tuple(x.ids) for x in a[0]}) > 1
    assert model.generation_config.top_k == 1


def test_a_wrapped_model_and_dropout(model):
    """Behind DDP the bare model generates; with LoRA dropout the log-probs are still those of evaluation mode."""
    wrapped = lora(model, lora_dropout=0.5)
    wrapped.train()
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        parallel = torch.nn.parallel.DistributedDataParallel(wrapped)
        groups = TransformersSampler(TOKENIZER).generate(
            parallel, PROMPTS, Sampling(num_generations=2, max_completion_length=8)
        )
    finally:
        torch.distributed.destroy_process_group()
    wrapped.eval()
    for prompt, group in zip(PROMPTS, groups):
        for a in group:
            expected = score_forced(wrapped, prompt, a.ids)
            torch.testing.assert_close(torch.tensor(a.logprobs), expected, atol=1e-5, rtol=0)


def test_sharded_model(model):
    """FSDP2: generation before the first training step, then a step, then generation again; shards come back."""
    fsdp = pytest.importorskip("torch.distributed.fsdp")
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        wrapped = lora(model)
        whole = {name: x.clone() for name, x in named_weights(wrapped)}
        expected = TransformersSampler(TOKENIZER).generate(
            wrapped, PROMPTS, Sampling(max_completion_length=8), greedy=True
        )
        mesh = torch.distributed.init_device_mesh("cpu", (1,))
        for layer in wrapped.get_base_model().model.layers:
            fsdp.fully_shard(layer, mesh=mesh)
        fsdp.fully_shard(wrapped, mesh=mesh)
        for _ in range(2):
            got = TransformersSampler(TOKENIZER).generate(
                wrapped, PROMPTS, Sampling(max_completion_length=8), greedy=True
            )
            assert [[a.ids for a in g] for g in got] == [[a.ids for a in g] for g in expected]
            assert all(hasattr(p, "full_tensor") for p in wrapped.parameters())
            gathered = dict(named_weights(wrapped))
            assert all(type(x) is torch.Tensor or not hasattr(x, "full_tensor") for x in gathered.values())
            assert gathered.keys() == whole.keys()
            assert all(torch.equal(gathered[name], whole[name]) for name in whole)
            wrapped(input_ids=torch.tensor([[5, 6, 7]])).logits.sum().backward()
    finally:
        torch.distributed.destroy_process_group()


def test_pushed_weights(model):
    """LoRA's update is in what is pushed, under the bare model's names; the model's own weights are never touched."""
    names = [n for n, _ in model.named_parameters()]
    base = {n: x.detach().clone() for n, x in model.named_parameters()}
    assert [n for n, _ in named_weights(model)] == names
    wrapped = lora(model)
    state = {n: x.clone() for n, x in wrapped.state_dict().items()}
    pushed = dict(named_weights(wrapped))
    assert set(pushed) == set(names)
    assert all(torch.equal(x, state[n]) for n, x in wrapped.state_dict().items())
    changed = {n for n in names if not torch.equal(pushed[n], base[n])}
    assert changed == {n for n in names if any(x in n for x in ("q_proj.weight", "v_proj.weight", "lm_head"))}
    merged = wrapped.merge_and_unload()
    for name, parameter in merged.named_parameters():
        torch.testing.assert_close(pushed[name], parameter.detach(), atol=1e-6, rtol=0)


def test_fully_trained_modules_are_pushed_once(model):
    wrapped = lora(model, modules_to_save=["norm"])
    pushed = dict(named_weights(wrapped))
    assert "model.norm.weight" in pushed
    assert not any("original_module" in n or "modules_to_save" in n or "lora" in n for n in pushed)


def test_vllm_missing_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(ImportError, match=r"pip install 'fastgrpo\[vllm\]'"):
        generate.make_sampler(vllm_config(), TOKENIZER)


def vllm_config(**changes):
    values = {
        "use_vllm": True, "mode": "colocate", "server_base_url": None, "server_host": "0.0.0.0", "server_port": 8000,
        "server_timeout": 1.0, "group_port": 51216, "tensor_parallel_size": 1, "gpu_memory_utilization": 0.3,
        "max_model_length": 64, "enable_sleep_mode": False, "model_impl": "vllm", **changes,
    }  # fmt: skip
    return SimpleNamespace(**{k if k == "use_vllm" else f"vllm_{k}": v for k, v in values.items()})


class Output(SimpleNamespace):
    """vLLM's objects: attributes are all we read."""


class FakeEngine:
    """Answers as vLLM's LLM does: tokens 20, 21, ... and then the end token, with made-up log-probs."""

    def __init__(self, **options):
        self.options, self.calls, self.weights, self.state = options, [], {}, "awake"
        loaded = SimpleNamespace(load_weights=lambda pairs: self.weights.update({n: x.clone() for n, x in pairs}))
        runner = SimpleNamespace(model_runner=SimpleNamespace(model=loaded))
        self.llm_engine = SimpleNamespace(model_executor=SimpleNamespace(driver_worker=runner))

    def generate(self, prompts, sampling_params, use_tqdm):
        self.calls.append((prompts, sampling_params))
        outputs = []
        for i, prompt in enumerate(prompts):
            ids = [20 + i, 21 + i, EOS][: sampling_params.max_tokens]
            steps = [{t: Output(logprob=-0.1 * (j + 1), rank=1)} for j, t in enumerate(ids)]
            answer = Output(token_ids=tuple(ids), logprobs=steps)
            outputs.append(Output(prompt_token_ids=prompt["prompt_token_ids"], outputs=[answer]))
        return outputs

    def reset_prefix_cache(self):
        self.calls.append("reset")

    def sleep(self, level):
        self.state = "asleep"

    def wake_up(self, tags):
        self.state = "awake"


class FakeClient:
    """TRL's VLLMClient as far as it is used."""

    def __init__(self, **options):
        self.options, self.calls, self.weights, self.device = options, [], {}, None

    def init_communicator(self, device):
        self.device = device

    def update_named_params(self, metadata, pairs):
        pairs = [(n, x.clone()) for n, x in pairs]
        assert metadata == [(n, str(x.dtype).removeprefix("torch."), list(x.shape)) for n, x in pairs]
        self.weights.update(pairs)

    def reset_prefix_cache(self):
        self.calls.append("reset")

    def generate(self, prompts, n, features=None, **params):
        self.calls.append((prompts, {"n": n, **params}))
        ids = [[20 + i, 21 + i, EOS] for i in range(len(prompts) * n)]
        return {"prompt_ids": prompts, "completion_ids": ids, "logprobs": [[[-0.1], [-0.2], [-0.3]]] * len(ids)}


@pytest.fixture
def fake_vllm(monkeypatch):
    """TRL's own code on stand-ins for vllm's engine, its parameters and TRL's client."""
    generation = pytest.importorskip("trl.generation.vllm_generation")
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace())
    monkeypatch.setattr(generation, "is_vllm_available", lambda *_, **__: True)
    monkeypatch.setattr(generation, "LLM", FakeEngine, raising=False)
    monkeypatch.setattr(generation, "SamplingParams", SimpleNamespace, raising=False)
    monkeypatch.setattr(generation, "VLLMClient", FakeClient)
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "0")  # so that what TRL sets is taken back
        monkeypatch.delenv(name)


@pytest.mark.parametrize("mode", ["colocate", "server"])
def test_vllm_pushes_and_samples(model, fake_vllm, mode):
    model.name_or_path = "a/model"
    wrapped = lora(model)
    sampler = generate.make_sampler(vllm_config(mode=mode), TOKENIZER)
    sampling = Sampling(
        num_generations=2, max_completion_length=5, temperature=0.7, top_p=0.9, top_k=3, repetition_penalty=1.1
    )
    state = {n: x.clone() for n, x in wrapped.state_dict().items()}
    groups = sampler.generate(wrapped, PROMPTS, sampling)
    back = sampler.engine.llm if mode == "colocate" else sampler.engine.vllm_client
    assert [len(g) for g in groups] == [2] * len(PROMPTS)
    assert [a.ids[0] for g in groups for a in g] == list(range(20, 20 + 2 * len(PROMPTS)))
    assert all(a.finished and a.logprobs == pytest.approx([-0.1, -0.2, -0.3]) for g in groups for a in g)
    prompts, params = back.calls[-1]
    if mode == "colocate":
        assert [p["prompt_token_ids"] for p in prompts] == [p for p in PROMPTS for _ in range(2)]
        assert back.options["model"] == "a/model"
        params = vars(params)
    else:
        assert prompts == PROMPTS
        assert back.options["base_url"] == "http://0.0.0.0:8000"
        assert back.device == wrapped.device
    expected = {"temperature": 0.7, "top_p": 0.9, "top_k": 3, "repetition_penalty": 1.1, "max_tokens": 5, "min_p": 0.0}
    assert expected.items() <= params.items()
    greedy = sampler.generate(wrapped, PROMPTS, sampling, greedy=True)
    assert [len(g) for g in greedy] == [1] * len(PROMPTS)
    params = back.calls[-1][1]
    assert (vars(params) if mode == "colocate" else params)["temperature"] == 0.0
    # the weights: pushed whole once, and again when asked; the model's own stay as they are
    assert set(back.weights) == {n for n, _ in named_weights(wrapped)}
    with torch.no_grad():
        wrapped.get_base_model().lm_head.lora_B["default"].weight.add_(1)
    sampler.sync(wrapped)
    pushed = dict(named_weights(wrapped))
    assert all(torch.equal(x, pushed[n]) for n, x in back.weights.items())
    assert all(
        torch.equal(x, state[n])
        for n, x in wrapped.state_dict().items()
        if n != "base_model.model.lm_head.lora_B.default.weight"
    )
    assert not any(getattr(m, "merged", False) for m in wrapped.modules())


@pytest.mark.parametrize("mine", [0, 2])
def test_vllm_with_fewer_prompts_than_another_rank(model, fake_vllm, monkeypatch, mine):
    """TRL cuts the gathered answers into shares as long as the rank's own: every rank asks for as many."""
    from fastgrpo.integrations import vllm

    model.name_or_path = "a/model"
    sampler = generate.make_sampler(vllm_config(), TOKENIZER)
    sampler.sync(model)
    monkeypatch.setattr(vllm, "gather_object", lambda numbers: [*numbers, 3])
    groups = sampler.generate(model, PROMPTS[:mine], Sampling(num_generations=2, max_completion_length=5))
    assert [[a.ids[0] for a in group] for group in groups] == [[20, 21], [22, 23]][:mine]
    prompts, _ = sampler.engine.llm.calls[-1]
    assert len(prompts) == 6
    assert [p["prompt_token_ids"] for p in prompts[: 2 * mine]] == [p for p in PROMPTS[:mine] for _ in range(2)]


@pytest.mark.parametrize("where", [{"target_modules": ["lm_head"]}, {"target_modules": ["embed_tokens"]},
                                   {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}])  # fmt: skip
def test_vllm_s_tied_weight_cannot_take_an_adapter(model, fake_vllm, where):
    """Its update would be left out of what is pushed, and vLLM would sample from another model."""
    peft = pytest.importorskip("peft")
    config = transformers.Qwen2Config(**{**model.config.to_dict(), "tie_word_embeddings": True})
    wrapped = peft.get_peft_model(transformers.Qwen2ForCausalLM(config), peft.LoraConfig(**where))
    with pytest.raises(ValueError, match="use_vllm needs untied embeddings"):
        generate.make_sampler(vllm_config(), TOKENIZER).sync(wrapped)


def test_vllm_is_not_quantised_with_the_learner(model, fake_vllm):
    """What is pushed is dequantised, and a 4-bit vLLM has no room for it."""
    bitsandbytes = pytest.importorskip("bitsandbytes")
    model.name_or_path = "a/model"
    model.model.layers[0].mlp.up_proj = bitsandbytes.nn.Linear4bit(32, 64, bias=False).to("cpu")
    sampler = generate.make_sampler(vllm_config(), TOKENIZER)
    sampler.sync(lora(model))
    assert sampler.engine.llm.options["quantization"] is None
    assert sampler.engine.llm.weights["model.layers.0.mlp.up_proj.weight"].shape == (64, 32)


def test_vllm_without_a_score(model, fake_vllm, monkeypatch):
    """vLLM's NaN, which TRL makes None, is NaN again: unknown."""
    model.name_or_path = "a/model"
    sampler = generate.make_sampler(vllm_config(mode="server"), TOKENIZER)
    sampler.sync(model)
    plain = sampler.engine.vllm_client.generate

    def generated(**options):
        out = plain(**options)
        return out | {"logprobs": [[[-0.1], [None], [-0.3]]] * len(out["completion_ids"])}

    monkeypatch.setattr(sampler.engine.vllm_client, "generate", generated)
    ((answer,), *_) = sampler.generate(model, PROMPTS, Sampling(max_completion_length=5))
    assert torch.tensor(answer.logprobs).isnan().tolist() == [False, True, False]


def test_vllm_sleeps_between_rollouts(model, fake_vllm):
    model.name_or_path = "a/model"
    sampler = generate.make_sampler(vllm_config(enable_sleep_mode=True), TOKENIZER)
    sampler.generate(model, PROMPTS, Sampling(max_completion_length=5))
    assert sampler.engine.llm.state == "asleep"
    sampler.sync(model)
    assert sampler.engine.llm.state == "awake"

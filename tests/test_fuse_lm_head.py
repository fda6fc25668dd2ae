"""The op inside a model's lm_head: the same numbers as its logits give, through every wrapper."""

import copy
from functools import partial

import pytest
import torch
import transformers

from fastgrpo import grpo_loss
from fastgrpo.integrations.transformers import fuse_lm_head

from causal_lms import assert_same, from_logits, gradients

SIZES = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip
FAMILIES = {
    "Qwen2": {}, "Llama": {}, "Gemma2": {"final_logit_softcapping": 3.0, "query_pre_attn_scalar": 8},
    "Granite": {"logits_scaling": 4.0}, "Cohere": {"logit_scale": 0.25}, "GPT2": {},
}  # fmt: skip


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Real memory: transformers fills what it allocates."""


def make(family="Qwen2", tied=False, **options):
    config = getattr(transformers, f"{family}Config")(**SIZES, **FAMILIES[family], tie_word_embeddings=tied, **options)
    torch.manual_seed(3)
    model = getattr(transformers, f"{family}LMHeadModel" if family == "GPT2" else f"{family}ForCausalLM")(config)
    with torch.no_grad():  # sharper than at initialisation, so that a wrong softcap or scale shows
        model.get_output_embeddings().weight.mul_(30)
    return model.eval()


def tokens(batch=3, length=11):
    return torch.randint(3, SIZES["vocab_size"], (batch, length), generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_logprobs_entropy_and_gradients(family, tied):
    model = fuse_lm_head(make(family, tied))
    assert_same(model, tokens())


def test_ignored_labels_and_generate():
    model, ids = make(), tokens()
    before = model.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert fuse_lm_head(fuse_lm_head(model)) is model  # twice is once
    assert model.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0).equal(before)
    labels = ids.masked_fill(torch.arange(ids.shape[1]) < 4, -100)
    out, whole = (model(input_ids=ids, labels=x, fastgrpo=True) for x in (labels, ids))
    assert out.logprobs[:, :3].eq(0).all()
    torch.testing.assert_close(out.logprobs[:, 3:], whole.logprobs[:, 3:])
    plain = model(input_ids=ids, labels=ids)
    torch.testing.assert_close(plain.loss, -whole.logprobs.mean(), rtol=1e-5, atol=1e-6)


def test_grpo_loss_in_the_head():
    model, ids = fuse_lm_head(make()), tokens()
    targets = torch.nn.functional.pad(ids[:, 1:], (0, 1), value=-100)
    advantages = torch.tensor([1.0, -0.5, 0.25])
    result = model(input_ids=ids, fastgrpo=partial(grpo_loss, targets=targets, advantages=advantages))
    grads = gradients(model, result.loss)
    hidden = model.model(input_ids=ids).last_hidden_state
    want = grpo_loss(hidden, model.lm_head.weight, targets, advantages)
    assert result.loss.item() == pytest.approx(want.loss.item(), abs=1e-7)
    for name, grad in gradients(model, want.loss).items():
        torch.testing.assert_close(grads[name], grad)


def test_gradient_checkpointing():
    model = fuse_lm_head(make()).train()
    plain = assert_same(model, tokens())
    model.gradient_checkpointing_enable({"use_reentrant": False})
    calls = []
    model.model.layers[0].mlp.register_forward_pre_hook(lambda *a: calls.append(1))
    again = gradients(model, model(input_ids=tokens(), labels=tokens(), fastgrpo=True).logprobs)
    assert len(calls) == 2  # forward, and once more in the backward
    for name, grad in again.items():
        torch.testing.assert_close(grad, plain[name], msg=name)


def test_autocast():
    """Inside autocast the head computes in bf16 from fp32 weights; its result stays fp32."""
    model, ids = fuse_lm_head(make()), tokens()
    exact = model(input_ids=ids, labels=ids, fastgrpo=True).logprobs
    with torch.autocast("cpu", torch.bfloat16):
        ours = model(input_ids=ids, labels=ids, fastgrpo=True).logprobs
        theirs = from_logits(model, ids)[0]
    assert ours.dtype == torch.float32
    assert not ours.equal(exact)
    assert (ours - exact).abs().max() <= 1.2 * (theirs - exact).abs().max()
    assert all(torch.isfinite(g).all() for g in gradients(model, ours).values())


def test_deep_copy_is_independent():
    """A frozen reference is a copy: it must not run the policy's weights."""
    model, ids = fuse_lm_head(make()), tokens()
    before = model(input_ids=ids, labels=ids, fastgrpo=True).logprobs.detach()
    reference = copy.deepcopy(model)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.1)
    torch.testing.assert_close(reference(input_ids=ids, labels=ids, fastgrpo=True).logprobs, before)
    torch.testing.assert_close(from_logits(reference, ids)[0], before, rtol=2e-5, atol=2e-5)
    assert (model(input_ids=ids, labels=ids, fastgrpo=True).logprobs - before).abs().max() > 1e-2


def lora(model, **options):
    peft = pytest.importorskip("peft")
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=4, task_type="CAUSAL_LM", **options))
    with torch.no_grad():
        for name, p in wrapped.named_parameters():
            if "lora_B" in name:  # zero at the start
                p.normal_(std=0.1)
    return wrapped.eval()


@pytest.mark.parametrize("fuse_first", [False, True])
@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], ["q_proj", "lm_head"]])
def test_peft(fuse_first, targets):
    model = make()
    model = lora(fuse_lm_head(model) if fuse_first else model, target_modules=targets)
    model = model if fuse_first else fuse_lm_head(model)
    grads = assert_same(model, tokens())
    assert all("lora" in name for name in grads)
    assert any("lm_head" in name for name in grads) == ("lm_head" in targets)
    with_adapter = model(input_ids=tokens(), labels=tokens(), fastgrpo=True).logprobs
    with model.disable_adapter(), torch.no_grad():
        without = model(input_ids=tokens(), labels=tokens(), fastgrpo=True).logprobs
        torch.testing.assert_close(without, from_logits(model, tokens())[0], rtol=2e-5, atol=2e-5)
    assert (without - with_adapter).abs().max() > 1e-2


@pytest.mark.parametrize("fuse_first", [False, True])
def test_peft_trains_a_copy_of_the_head(fuse_first):
    model = make()
    model = fuse_lm_head(model) if fuse_first else model
    model = fuse_lm_head(lora(model, target_modules=["q_proj"], modules_to_save=["lm_head"]))
    grads = assert_same(model, tokens())
    assert any("lm_head" in name for name in grads)


def test_dora_on_the_head_is_refused():
    model = fuse_lm_head(lora(make(), target_modules=["lm_head"], use_dora=True))
    with pytest.raises(ValueError, match="LoRA on lm_head must be plain"):
        model(input_ids=tokens(), labels=tokens(), fastgrpo=True)


def test_a_model_without_a_head_is_refused():
    with pytest.raises(ValueError, match="must have an LM head"):
        fuse_lm_head(make().model)


def test_an_empty_weight_is_refused():
    """As ZeRO-3 leaves a parameter outside its module."""
    model = fuse_lm_head(make())
    model.lm_head.weight = torch.nn.Parameter(torch.empty(0, SIZES["hidden_size"]))
    with pytest.raises(ValueError, match="weight must not be empty"):
        model(input_ids=tokens(), labels=tokens(), fastgrpo=True)

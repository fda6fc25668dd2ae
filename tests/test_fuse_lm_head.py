"""The op inside a model's lm_head: the same numbers as its logits give, through every wrapper."""

import copy
import inspect
import io
import pickle
from functools import partial

import pytest
import torch
import transformers
from torch.utils._pytree import tree_map_only

from fastgrpo import grpo_loss, linear_logprobs
from fastgrpo.integrations.transformers import causal_lm, check_fused, fuse_lm_head, is_fused

import causal_lms
from causal_lms import assert_same, from_logits, gradients, tokens


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Real memory: transformers fills what it allocates."""


def make(tied=False, family="Qwen2", **options):
    family, _, head = family.partition(":")
    kind = getattr(transformers, f"{family}Config")
    model_class = getattr(transformers, f"{family}{f'{head}Model' if head else 'ForCausalLM'}")
    return causal_lms.make(kind, model_class, tie_word_embeddings=tied, **options)


@pytest.mark.quick
@pytest.mark.parametrize("tied", [False, True])
def test_logprobs_entropy_and_gradients(tied):
    assert_same(fuse_lm_head(make(tied)), tokens())


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


@pytest.mark.quick
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


@pytest.mark.works("transformers", "fuse_lm_head: gradient checkpointing, both kinds")
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant):
    model = fuse_lm_head(make()).train()
    plain = assert_same(model, tokens())
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()
    calls = []
    model.model.layers[0].mlp.register_forward_pre_hook(lambda *a: calls.append(1))
    again = gradients(model, model(input_ids=tokens(), labels=tokens(), fastgrpo=True).logprobs)
    assert len(calls) == 2  # forward, and once more in the backward
    assert again.keys() == plain.keys()
    for name, grad in again.items():
        torch.testing.assert_close(grad, plain[name], msg=name)


@pytest.mark.works("transformers", "fuse_lm_head: bf16 autocast")
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


@pytest.mark.quick
@pytest.mark.works("transformers", "fuse_lm_head: PEFT's LoRA on the layers and on the head, modules_to_save")
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


@pytest.mark.works("transformers", "fuse_lm_head: PEFT's LoRA on the layers and on the head, modules_to_save")
@pytest.mark.parametrize("fuse_first", [False, True])
def test_peft_trains_a_copy_of_the_head(fuse_first):
    model = make()
    model = fuse_lm_head(model) if fuse_first else model
    model = fuse_lm_head(lora(model, target_modules=["q_proj"], modules_to_save=["lm_head"]))
    grads = assert_same(model, tokens())
    assert any("lm_head" in name for name in grads)


def test_peft_prompt_tuning():
    """Virtual tokens come before the others, with labels that are ignored."""
    peft = pytest.importorskip("peft")
    settings = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    model, ids = peft.get_peft_model(fuse_lm_head(make()), settings).eval(), tokens()
    out = model(input_ids=ids, labels=ids, fastgrpo=True)
    logp = model(input_ids=ids).logits[:, 3:-1].log_softmax(-1)
    assert out.logprobs[:, :3].eq(0).all()
    torch.testing.assert_close(out.logprobs[:, 3:], logp.gather(-1, ids[..., None])[..., 0], rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("options", [{}, {"lora_bias": True}, {"use_rslora": True, "lora_alpha": 3}], ids=str)
def test_every_adapter_on_the_head_takes_part(options):
    """Two of them at once, of different ranks."""
    peft = pytest.importorskip("peft")
    model = fuse_lm_head(lora(make(), target_modules=["lm_head"], **options))
    model.add_adapter("second", peft.LoraConfig(r=2, target_modules=["lm_head"], task_type="CAUSAL_LM", **options))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B.second" in name or "lora_B.default.bias" in name:
                p.normal_(std=0.1)
    model.base_model.set_adapter(["default", "second"])
    grads = assert_same(model, tokens())
    assert {"default" in name for name in grads} == {True, False}
    seen = []
    with torch.no_grad():
        model(input_ids=tokens(), fastgrpo=lambda hidden, weight, **options: seen.append((weight, options)))
    assert seen[0][0].data_ptr() == model.get_output_embeddings().weight.data_ptr()  # never merged
    assert seen[0][1]["lora"][0].shape[0] == 6


ADAPTERS = {
    "DoraLinearVariant": ("LoraConfig", {"use_dora": True}),
    "peft.tuners.ia3.layer.Linear": ("IA3Config", {"feedforward_modules": ["lm_head"]}),
    "peft.tuners.loha.layer.Linear": ("LoHaConfig", {}),
    "peft.tuners.adalora.layer.SVDLinear": ("AdaLoraConfig", {"total_step": 9}),
}


@pytest.mark.parametrize(("name", "config"), ADAPTERS.items(), ids=ADAPTERS)
def test_an_adapter_that_is_not_plain_lora_is_refused(name, config):
    peft = pytest.importorskip("peft")
    config = getattr(peft, config[0])(target_modules=["lm_head"], **config[1])
    refusal = pytest.raises(ValueError, match=f"adapter on lm_head must be plain LoRA, got {name}")
    with refusal:
        fuse_lm_head(peft.get_peft_model(make(), config))
    later = peft.get_peft_model(fuse_lm_head(make()), config)
    with refusal:
        later(input_ids=tokens(), labels=tokens(), fastgrpo=True)
    with later.disable_adapter():
        assert later(input_ids=tokens(), labels=tokens(), fastgrpo=True).logprobs.isfinite().all()


def test_a_head_called_with_more_than_hidden_states_is_refused():
    model = lora(make(), target_modules=["lm_head"]).eval()
    model.add_adapter("other", model.peft_config["default"])
    fuse_lm_head(model)
    with pytest.raises(ValueError, match="must be called with hidden states alone, got adapter_names"):
        model(input_ids=tokens(), labels=tokens(), fastgrpo=True, adapter_names=["default", "other"])


def test_labels_of_one_dimension_are_refused():
    with pytest.raises(ValueError, match=r"labels must be a tensor \(B, T\) with fastgrpo=True, got \(5,\)"):
        fuse_lm_head(make())(input_ids=tokens(), labels=torch.arange(5), fastgrpo=True)


def test_what_is_no_model_and_no_function_is_refused():
    with pytest.raises(TypeError, match=r"model must be a transformers causal LM, .* got 'path/to/model'"):
        fuse_lm_head("path/to/model")
    model = fuse_lm_head(make())
    for wrong in (1, "loss"):
        with pytest.raises(TypeError, match=f"fastgrpo must be True .* or a function such as grpo_loss, got {wrong!r}"):
            model(torch.zeros(1, 3, dtype=torch.long), fastgrpo=wrong)


def test_a_model_without_a_head_is_refused():
    with pytest.raises(ValueError, match="must have an LM head"):
        fuse_lm_head(make().model)


def test_more_tokens_after_fusing():
    """A resized vocabulary is scored whole."""
    model = fuse_lm_head(make())
    model.resize_token_embeddings(120)
    assert_same(model, torch.randint(3, 120, (2, 9), generator=torch.Generator().manual_seed(5)))


def test_wrappers_are_looked_through():
    model = make()
    for wrapped in (torch.nn.DataParallel(torch.compile(model)), torch.compile(torch.nn.DataParallel(model))):
        assert causal_lm(wrapped) is model


def test_an_empty_weight_is_refused():
    """As ZeRO-3 leaves a parameter outside its module."""
    model = fuse_lm_head(make())
    model.lm_head.weight = torch.nn.Parameter(torch.empty(0, 32))
    with pytest.raises(ValueError, match="weight must not be empty"):
        model(input_ids=tokens(), labels=tokens(), fastgrpo=True)


def shifted(ids):
    return torch.nn.functional.pad(ids[:, 1:], (0, 1), value=-100)


@pytest.mark.works("transformers", "fuse_lm_head: logits_to_keep scores the last positions alone")
@pytest.mark.parametrize("keep", [1, 4, 11, 20])
def test_logits_to_keep(keep):
    model, ids = fuse_lm_head(make()), tokens()
    rows = []
    model.lm_head.register_forward_pre_hook(lambda module, args: rows.append(args[0].shape[1]))
    out = model(input_ids=ids, labels=ids, fastgrpo=True, logits_to_keep=keep)
    whole = model(input_ids=ids, labels=ids, fastgrpo=True)
    assert rows == [min(keep, 11), 11]
    assert out.logprobs.shape == (3, min(keep, 11) - 1)
    for part, all_of_it in zip(out, whole):
        torch.testing.assert_close(part, all_of_it[:, -(keep - 1) :] if keep > 1 else all_of_it[:, :0])


@pytest.mark.works("transformers", "fuse_lm_head: the auxiliary loss of a mixture of experts beside the result")
@pytest.mark.parametrize("family", ["Qwen3Moe", "Mixtral", "GptOss"])
def test_auxiliary_loss(family):
    model, ids = fuse_lm_head(make(family=family)), tokens()
    plain = model(input_ids=ids, output_router_logits=True)
    want = gradients(model, from_logits(model, ids)[0].sum() + 3 * plain.aux_loss)
    score = partial(linear_logprobs, targets=shifted(ids))
    result, outputs = model(input_ids=ids, fastgrpo=score, fastgrpo_output=True, output_router_logits=True)
    assert type(outputs) is type(plain)
    assert outputs.logits is None
    assert outputs.aux_loss.equal(plain.aux_loss)
    assert outputs.aux_loss > 0
    grads = gradients(model, result.logprobs.sum() + 3 * outputs.aux_loss)
    top = max(g.norm() for g in want.values())
    assert grads.keys() == want.keys()
    for name, grad in grads.items():
        assert (grad - want[name]).norm() <= 1e-5 * max(want[name].norm(), 1e-3 * top), name
    labelled = model(input_ids=ids, labels=ids, fastgrpo=True, fastgrpo_output=True, output_router_logits=True)
    torch.testing.assert_close(labelled.result.logprobs, result.logprobs[:, :-1])
    assert labelled.outputs.aux_loss.equal(plain.aux_loss)


def compiled(model, whole, **options):
    if whole:
        return torch.compile(model, backend="aot_eager", **options)
    model.model.compile(backend="aot_eager", **options)
    return model


@pytest.mark.works("transformers", "fuse_lm_head: torch.compile of the model or its decoder, no recompile per length")
@pytest.mark.parametrize(("whole", "fuse_first"), [(False, False), (True, False), (True, True)])
def test_compile(whole, fuse_first):
    """Lengths 5 to 9: one graph for the first, one with a dynamic length for all others."""
    torch._dynamo.reset()
    eager, model = fuse_lm_head(make(num_hidden_layers=1)), make(num_hidden_layers=1)  # a layer takes 5 s to trace
    model = compiled(fuse_lm_head(model), whole) if fuse_first else fuse_lm_head(compiled(model, whole))
    counts = []
    for length in range(5, 10):
        ids = tokens(length=length)
        ours, want = (m(input_ids=ids, labels=ids, fastgrpo=True) for m in (model, eager))
        torch.testing.assert_close(ours.logprobs, want.logprobs, rtol=1e-5, atol=1e-5)
        grads, expected = gradients(model, ours.logprobs), gradients(eager, want.logprobs)
        for (name, grad), other in zip(grads.items(), expected.values()):
            torch.testing.assert_close(grad, other, rtol=1e-4, atol=1e-5, msg=name)
        counts.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert counts[0] >= 1
    assert counts[1:] == [counts[1]] * 4
    torch.testing.assert_close(model(input_ids=ids).logits, eager(input_ids=ids).logits, rtol=1e-5, atol=1e-5)
    again = model(input_ids=ids, labels=ids, fastgrpo=True)  # the graph of the plain call must not answer this one
    torch.testing.assert_close(again.logprobs, want.logprobs, rtol=1e-5, atol=1e-5)


def test_compiled_plain_calls_are_whole_graphs():
    torch._dynamo.reset()
    model, ids = fuse_lm_head(make()), tokens()
    whole = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(whole(input_ids=ids).logits, make()(input_ids=ids).logits)


class Regather(torch.autograd.Function):
    """ZeRO-3's hook on a module's outputs: its backward gathers the weights again before the module's own runs."""

    @staticmethod
    def forward(ctx, gather, output):
        ctx.gather = gather
        return output.view_as(output)

    @staticmethod
    def backward(ctx, grad):
        ctx.gather()
        return None, grad


def partition(model):
    """As ZeRO-3: a parameter is empty but between the forward hooks of its module, and from its outputs' backward."""
    full = {p: p.data for p in model.parameters()}

    def gather(module, *_):
        for p in module.parameters(recurse=False):
            p.data = full[p]

    def release(module, *_):
        for p in module.parameters(recurse=False):
            p.data = p.data.new_empty(0)

    def after(module, args, output):
        release(module)
        again = partial(gather, module)
        return tree_map_only(torch.Tensor, lambda x: Regather.apply(again, x) if x.requires_grad else x, output)

    for module in model.modules():
        if any(True for _ in module.parameters(recurse=False)):
            module.register_forward_pre_hook(gather)
            module.register_forward_hook(after)
            release(module)
    return model, lambda: [gather(m) for m in model.modules()]


@pytest.mark.works("transformers", "fuse_lm_head: weights that exist inside their hooks alone, as in ZeRO-3")
@pytest.mark.parametrize("tied", [False, True])
def test_partitioned_weights(tied):
    want = assert_same(fuse_lm_head(make(tied)), tokens())
    model, restore = partition(make(tied))
    assert model.lm_head.weight.shape == (0,)
    out = fuse_lm_head(model)(input_ids=tokens(), labels=tokens(), fastgrpo=True)
    assert model.lm_head.weight.shape == (0,)
    (out.logprobs * torch.linspace(-1, 1, out.logprobs.numel()).view_as(out.logprobs)).sum().backward()
    restore()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, want[name], msg=name)


def test_under_accelerates_device_hooks():
    """They wrap the forward of model and head, and move what comes in."""
    hooks = pytest.importorskip("accelerate.hooks")
    model, ids, moved = make(), tokens(), []

    class Hook(hooks.ModelHook):
        def pre_forward(self, module, *args, **kwargs):
            moved.append(type(module).__name__)
            return args, kwargs

    want = fuse_lm_head(make())(input_ids=ids, labels=ids, fastgrpo=True)
    for module in (model, model.lm_head):
        hooks.add_hook_to_module(module, Hook())
    got = fuse_lm_head(model)(input_ids=ids, labels=ids, fastgrpo=True)
    assert got.logprobs.equal(want.logprobs)
    assert moved == ["Qwen2ForCausalLM", "Linear"]


def test_a_failing_function_leaves_the_model_as_it_was():
    model, ids = fuse_lm_head(make()), tokens()
    hooks = len(model.lm_head._forward_hooks)
    with pytest.raises(ValueError, match="targets must have shape"):
        model(input_ids=ids, fastgrpo=partial(linear_logprobs, targets=ids[:, 1:]))
    assert len(model.lm_head._forward_hooks) == hooks
    assert model(input_ids=ids).logits.equal(make()(input_ids=ids).logits)


def test_arguments_are_checked():
    model, ids = fuse_lm_head(make()), tokens()
    with pytest.raises(ValueError, match=r"labels must be a tensor \(B, T\)"):
        model(input_ids=ids, fastgrpo=True)
    with pytest.raises(ValueError, match="labels must be None where fastgrpo is a function"):
        model(input_ids=ids, labels=ids, fastgrpo=partial(linear_logprobs, targets=ids))
    with pytest.raises(ValueError, match="logits_to_keep must be a number"):
        model(input_ids=ids, labels=ids, fastgrpo=True, logits_to_keep=torch.tensor([3]))


def pickled(model):
    return pickle.loads(pickle.dumps(model))


def saved(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = [copy.deepcopy, pickled, saved]


def assert_independent(original, twin):
    """The copy is fused, answers as the original did, and goes on so when the original's weights change."""
    ids = tokens()
    before = original(input_ids=ids, labels=ids, fastgrpo=True).logprobs.detach()
    with torch.no_grad():
        for p in original.parameters():
            p.mul_(1.1)
    assert is_fused(twin)
    torch.testing.assert_close(twin(input_ids=ids, labels=ids, fastgrpo=True).logprobs, before)
    assert (original(input_ids=ids, labels=ids, fastgrpo=True).logprobs - before).abs().max() > 1e-3
    assert_same(twin, ids)


@pytest.mark.quick
@pytest.mark.works("transformers", "fuse_lm_head: deepcopy, pickle and torch.save of a fused model")
@pytest.mark.parametrize("copied", COPIES)
@pytest.mark.parametrize("tied", [False, True])
def test_copies_are_fused_and_independent(copied, tied):
    model = fuse_lm_head(make(tied))
    assert_independent(model, copied(model))
    assert_independent(twice := copied(copied(model)), copied(twice))


@pytest.mark.parametrize("copied", COPIES)
@pytest.mark.parametrize(("targets", "whole"), [(["lm_head"], None), (["q_proj"], None), (["q_proj"], ["lm_head"])])
def test_copies_of_an_adapted_model(copied, targets, whole):
    model = fuse_lm_head(lora(make(), target_modules=targets, modules_to_save=whole))
    assert_independent(model, copied(model))


def test_a_pickled_forward_brings_its_model():
    """Pickling may begin at any object that holds the forward."""
    model, ids = fuse_lm_head(make()), tokens()
    forward = pickle.loads(pickle.dumps(model.forward))
    want = model(input_ids=ids, labels=ids, fastgrpo=True)
    assert forward(input_ids=ids, labels=ids, fastgrpo=True).logprobs.equal(want.logprobs)
    assert forward.module.forward is forward


def test_fusing_leaves_every_signature_alone():
    """Trainers drop the columns of a dataset that a model's forward does not name."""
    models = [make(family=family) for family in ("Qwen2", "GPT2:LMHead", "Mamba")]
    before = [inspect.signature(model.forward) for model in models]
    assert len({str(signature) for signature in before}) == 3
    for model in models:
        fuse_lm_head(model)
    assert [inspect.signature(model.forward) for model in models] == before
    assert "position_ids" in inspect.signature(models[0].forward).parameters
    assert [inspect.signature(copy.deepcopy(model).forward) for model in models] == before


@pytest.fixture
def accelerate():
    """accelerate, whose settings are the process's: those of one test must not reach the next."""
    module = pytest.importorskip("accelerate")
    module.state.AcceleratorState._reset_state(True)
    yield module
    module.state.AcceleratorState._reset_state(True)


@pytest.mark.parametrize("keep", [True, False])
def test_accelerates_mixed_precision_comes_off(keep, accelerate):
    model, ids = fuse_lm_head(make()), tokens()
    want = model(input_ids=ids, labels=ids, fastgrpo=True).logprobs
    accelerator = accelerate.Accelerator(cpu=True, mixed_precision="bf16")
    bare = accelerator.unwrap_model(accelerator.prepare(model), keep_fp32_wrapper=keep)
    assert is_fused(bare)
    assert fuse_lm_head(bare) is bare
    got = bare(input_ids=ids, labels=ids, fastgrpo=True).logprobs
    assert got.equal(want) is not keep
    assert bare(ids).logits.shape == (3, 11, 97)
    if not keep:  # else accelerate forbids copies
        assert_independent(bare, copy.deepcopy(bare))


def test_a_plain_model_is_told_from_a_fused_one():
    model = make()
    assert not is_fused(model)
    with pytest.raises(ValueError, match="must be one that fuse_lm_head has fused, got a plain Qwen2ForCausalLM"):
        check_fused(model)
    fuse_lm_head(model)
    for wrapped in (model, torch.compile(model), torch.nn.DataParallel(model), lora(model, target_modules=["q_proj"])):
        check_fused(wrapped)

"""Real runs of TRL's trainers: ours against stock, step by step, from the same seed."""

import contextlib
import itertools
import json
import os
import sys

import pytest
import torch

from fastgrpo import head, reference
from fastgrpo.config import LOSS_TYPES

from processes import run_ranks

trl = pytest.importorskip("trl", minversion="1.16.0")
pytest.importorskip("peft")

utils = pytest.importorskip("trl.trainer.utils")
integration = pytest.importorskip("fastgrpo.integrations.trl")
trl_job = pytest.importorskip("trl_job")
FastGRPOTrainer, patched = integration.FastGRPOTrainer, integration.patched
grpo, load, log_rows, lora = trl_job.grpo, trl_job.load, trl_job.log_rows, trl_job.lora
FAMILIES = ("Qwen2", "Qwen3", "Llama", "Gemma2")


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Real memory: transformers fills what it allocates."""


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """(family, tied) -> the path of a saved tiny model, made once."""
    folder = tmp_path_factory.mktemp("models")

    def path(family="Qwen2", tied=False, **options):
        place = folder / "-".join(map(str, (family, tied, *options.values())))
        return str(place) if place.exists() else trl_job.save_model(place, family, tied, **options)

    return path


class Refused:
    @staticmethod
    def apply(*_):
        raise AssertionError("TRL's own op was called")


@contextlib.contextmanager
def counted_calls(monkeypatch):
    """Every call of our ops, its keywords."""
    calls = []

    def counted(plain):
        def count(*args, **options):
            calls.append(options)
            return plain(*args, **options)

        return count

    with monkeypatch.context() as m:
        for name in ("linear_logprobs", "linear_divergence"):
            m.setattr(integration, name, counted(getattr(integration, name)))
        yield calls


def train_both(tmp_path, monkeypatch, path, model_options=None, ours=None, **options):
    """-> TRL's trainer and ours after the same training, in which TRL's op was never called."""
    stock = grpo(trl.GRPOTrainer, tmp_path / "stock", load(path, **(model_options or {})), **options)
    stock.train()
    with monkeypatch.context() as m:
        m.setattr(utils, "_ChunkedLogProbFunction", Refused)
        fast = grpo(FastGRPOTrainer, tmp_path / "ours", load(path, **(model_options or {})), ours=ours, **options)
        fast.train()
    return stock, fast


def assert_same_rows(theirs, ours, tolerance=1e-4, small=1e-5):
    assert [row.keys() for row in ours] == [row.keys() for row in theirs]
    for step, (mine, row) in enumerate(zip(ours, theirs)):
        for name, value in row.items():
            assert mine[name] == pytest.approx(value, rel=tolerance, abs=small), (step, name)


def assert_learnt(rows, beta=True):
    """The runs were worth comparing: something moved."""
    steps = [row for row in rows if "grad_norm" in row]
    assert len(steps) >= 6
    assert min(row["grad_norm"] for row in steps) > 1e-3
    assert len({row["loss"] for row in steps}) == len(steps)
    assert not beta or max(row["kl"] for row in steps) > 1e-3


KINDS = list(itertools.product(FAMILIES, (False, True), (False, True)))  # model, tied, LoRA
# every kind once, every loss type on two models: tied and untied, full and LoRA
COVER = [(loss, *KINDS[place]) for i, loss in enumerate(LOSS_TYPES) for place in (i, 15 - i)]
CLIPS = {"cispo": {"epsilon_high": 1.05}, "luspo": {"importance_sampling_level": "sequence"}}


def test_the_cover_is_one():
    assert sorted(case[1:] for case in COVER) == sorted(KINDS)
    for axis in (2, 3):
        assert {(case[0], case[axis]) for case in COVER} == set(itertools.product(LOSS_TYPES, (False, True)))


@pytest.mark.works("TRL", "FastGRPOTrainer: every loss type equals stock TRL over 6 optimiser steps")
@pytest.mark.parametrize(("loss_type", "family", "tied", "adapter"), COVER)
def test_equals_stock(tmp_path, monkeypatch, models, loss_type, family, tied, adapter):
    options = {"loss_type": loss_type, **CLIPS.get(loss_type, {})}
    if adapter:
        options |= {"peft_config": lora("q_proj", "v_proj", "up_proj"), "learning_rate": 1e-2}
    stock, fast = train_both(tmp_path, monkeypatch, models(family, tied), **options)
    assert_same_rows(log_rows(stock), log_rows(fast))
    assert_learnt(log_rows(fast))
    for mine, row in zip(log_rows(fast)[:6], log_rows(stock)):
        assert max(abs(mine[name] - row[name]) for name in ("loss", "grad_norm", "kl", "entropy")) < 2e-4


OPTIONS = {
    "on-policy, no KL": {"num_iterations": 1, "beta": 0.0},
    "entropy bonus on high-entropy tokens": {"entropy_coef": 0.05, "top_entropy_quantile": 0.37, "loss_type": "grpo"},
    "adaptive entropy": {"use_adaptive_entropy": True, "entropy_target": 5.0, "entropy_coef": 0.01},
    "off-policy mask, two-sided clip": {"off_policy_mask_threshold": 0.01, "delta": 1.2, "loss_type": "bnpo"},
    "sequence level, temperature": {"importance_sampling_level": "sequence", "temperature": 0.7, "loss_type": "grpo"},
    "steps per generation": {"steps_per_generation": 4, "num_iterations": 1},
    "without checkpointing": {"gradient_checkpointing": False},
    "reentrant checkpointing": {"gradient_checkpointing_kwargs": {"use_reentrant": True}},
    "moving reference": {"sync_ref_model": True, "ref_model_sync_steps": 2, "ref_model_mixup_alpha": 0.5},
    "evaluation": {"eval_strategy": "steps", "eval_steps": 2, "per_device_eval_batch_size": 4},
    "fp32 head, bf16 model": {"cast_lm_head_to_fp32": True},
    "fp32 head, autocast": {"cast_lm_head_to_fp32": True, "bf16": True},
}


@pytest.mark.works("TRL", "FastGRPOTrainer: entropy bonus, off-policy mask, evaluation and others equal stock TRL")
@pytest.mark.parametrize("name", OPTIONS)
def test_options_equal_stock(tmp_path, monkeypatch, models, name):
    stock, fast = train_both(
        tmp_path, monkeypatch, models("Granite" if name == "evaluation" else "Qwen2"), **OPTIONS[name]
    )
    assert_same_rows(log_rows(stock), log_rows(fast))
    assert_learnt(log_rows(fast), beta="KL" not in name)


@pytest.mark.works("TRL", "FastGRPOTrainer: a mixture of experts with its router loss equals stock TRL")
def test_router_loss(tmp_path, monkeypatch, models):
    path = models("Qwen3Moe", router_aux_loss_coef=0.1)
    stock, fast = train_both(tmp_path, monkeypatch, path)
    assert_same_rows(log_rows(stock), log_rows(fast))
    assert all(row["aux_loss"] > 0.5 for row in log_rows(fast) if "aux_loss" in row)
    assert "aux_loss" in log_rows(fast)[0]


@pytest.mark.works("TRL", "FastGRPOTrainer: a pretrained adapter with its own reference, prompt tuning equal stock TRL")
@pytest.mark.parametrize("kind", ["pretrained", "prompt", "copied head"])
def test_kinds_of_adapters(tmp_path, monkeypatch, models, kind):
    import peft

    path, options = models(), {"gradient_checkpointing": False}
    if kind == "pretrained":  # TRL adds a frozen copy of the adapter, "ref"
        wrapped = peft.get_peft_model(load(path), lora("q_proj", "v_proj"))
        with torch.no_grad():
            for name, p in wrapped.named_parameters():
                if "lora_B" in name:
                    p.normal_(std=0.05)
        wrapped.save_pretrained(tmp_path / "adapter")
        real = trl_job.load
        monkeypatch.setattr(
            sys.modules[__name__], "load",
            lambda p: peft.PeftModel.from_pretrained(real(p), tmp_path / "adapter", is_trainable=True),
        )  # fmt: skip
    elif kind == "prompt":
        options["peft_config"] = peft.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")
    else:
        options["peft_config"] = lora("q_proj", modules_to_save=["lm_head"])
    stock, fast = train_both(tmp_path, monkeypatch, path, **options)
    assert_same_rows(log_rows(stock), log_rows(fast))


@pytest.mark.works("TRL", "FastGRPOTrainer: bf16 with accumulation and checkpointing is within rounding of stock TRL")
@pytest.mark.parametrize("mixed", [True, False])
def test_bf16(tmp_path, monkeypatch, models, mixed):
    """Autocast over fp32 weights, and 16-bit weights. The losses differ by what TRL's bf16 logits lose."""
    dtype = {} if mixed else {"dtype": torch.bfloat16}
    options = {"bf16": mixed, "learning_rate": 1e-6 if mixed else 1e-3, "num_iterations": 1, "max_steps": 2}
    stock, fast = train_both(tmp_path, monkeypatch, models(), dtype, **options)
    assert fast.model.dtype == (torch.float32 if mixed else torch.bfloat16)
    for mine, row in zip(log_rows(fast)[:1], log_rows(stock)):
        assert mine["reward"] == row["reward"]  # the same answers
        for name in ("loss", "grad_norm", "entropy", "kl"):
            assert mine[name] == pytest.approx(row[name], rel=2e-2, abs=2e-3), name


def scored(trainer, ids, keep=5):
    mask = torch.ones_like(ids)
    return trainer._get_per_token_logps_and_entropies(
        trainer.model, ids, mask, keep, batch_size=2, compute_entropy=True
    )


def test_bf16_is_closer_to_the_truth_than_stock(tmp_path, models):
    ids = torch.randint(3, trl_job.VOCABULARY, (5, 11))
    errors = []
    for kind in (trl.GRPOTrainer, FastGRPOTrainer):
        trainer = grpo(kind, tmp_path, load(models("Gemma2"), dtype=torch.bfloat16), temperature=0.8, beta=0.0)
        trainer.model.eval()
        with torch.no_grad():
            mine, entropy, _ = scored(trainer, ids)
            hidden = trainer.model.model(ids).last_hidden_state[:, -6:-1].double()
        want = reference.linear_logprobs(
            hidden,
            trainer.model.lm_head.weight.double(),
            ids[:, -5:],
            temperature=0.8,
            softcap=3.0,
            return_entropy=True,
        )
        errors.append([(mine - want.logprobs).abs().max(), (entropy - want.entropy).abs().max()])
    (stock, stock_entropy), (ours, ours_entropy) = errors
    assert ours < 1e-5 < 1e-3 < stock
    assert ours_entropy < 1e-5 < 1e-3 < stock_entropy


@pytest.mark.works("TRL", "FastGRPOTrainer: images of a vision-language model (Qwen2-VL), the pass equals stock TRL")
def test_images(tmp_path, models):
    """One and two images a prompt, two chunks: TRL's own slicing of what the images bring, our op."""
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

    image, grid = 60, torch.tensor([[1, 2, 4], [1, 4, 2], [1, 2, 2]])
    text = {**trl_job.SIZES, "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2]}}
    vision = {"depth": 1, "embed_dim": 16, "num_heads": 2, "hidden_size": 32, "patch_size": 4}
    config = Qwen2VLConfig(text_config=text, vision_config=vision, image_token_id=image, vision_start_token_id=59)
    torch.manual_seed(0)
    ids = torch.randint(3, 50, (2, 12))
    ids[0, 1:3], ids[1, 1:3], ids[1, 4] = image, image, image
    images = {
        "pixel_values": torch.randn(20, 3 * 2 * 4 * 4), "image_grid_thw": grid, "num_images": [1, 2],
        "mm_token_type_ids": (ids == image).long(),
    }  # fmt: skip
    results = []
    for kind in (trl.GRPOTrainer, FastGRPOTrainer):
        torch.manual_seed(1)
        model = Qwen2VLForConditionalGeneration(config).eval()
        trainer = grpo(kind, tmp_path, models(), beta=0.0, temperature=0.8)
        if kind is FastGRPOTrainer:
            integration.fuse_lm_head(model)
        else:
            utils.add_fused_lm_head(model, 0.8, outputs=("log_probs", "entropy"))
        mask = torch.ones_like(ids)
        mask[0, :1] = 0
        logps, entropy, _ = trainer._get_per_token_logps_and_entropies(
            model, ids, mask, 6, batch_size=1, compute_entropy=True, **images
        )
        logps.square().sum().backward()
        results.append((logps, entropy, {n: p.grad for n, p in model.named_parameters() if p.grad is not None}))
    (theirs, their_entropy, want), (ours, entropy, found) = results
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(entropy, their_entropy, rtol=1e-5, atol=1e-5)
    assert any("visual" in name for name in found)
    assert found.keys() == want.keys()
    for name, grad in found.items():
        assert (grad - want[name]).norm() <= 1e-4 * want[name].norm().clamp(min=1e-3), name


class FullLogits(FastGRPOTrainer):
    """The model's own logits, through every adapter, and autograd."""

    def _get_per_token_logps_and_entropies(self, model, input_ids, attention_mask, logits_to_keep, *_, **__):
        logits = model(input_ids=input_ids, attention_mask=attention_mask).logits[:, -logits_to_keep - 1 : -1].float()
        logp = (logits / self.temperature).log_softmax(-1)
        picked = logp.gather(-1, input_ids[:, -logits_to_keep:, None])[..., 0]
        return picked, -(logp.exp() * logp).sum(-1), None


@pytest.mark.works("TRL", "FastGRPOTrainer: LoRA on lm_head, which TRL refuses, equals autograd over full logits")
@pytest.mark.parametrize(("family", "tied"), [("Qwen2", False), ("Qwen3", True), ("Gemma2", False)])
def test_lora_on_the_head(tmp_path, models, family, tied):
    adapter = lora("q_proj", "lm_head", init_lora_weights="gaussian")
    options = {"peft_config": adapter, "temperature": 0.9, "learning_rate": 1e-2}
    with pytest.raises(ValueError, match="adapter to `lm_head` is not supported"):
        grpo(trl.GRPOTrainer, tmp_path, models(family, tied), **options)
    runs = []
    for kind in (FullLogits, FastGRPOTrainer):
        trainer = grpo(kind, tmp_path, models(family, tied), **options)
        trainer.train()
        runs.append(trainer)
    full, fast = runs
    padded = ("clip_ratio", "entropy", "kl", "loss", "grad_norm", "reward")
    for mine, row in zip(log_rows(fast), log_rows(full)):
        for name in (n for n in row if n.startswith(padded)):
            assert mine[name] == pytest.approx(row[name], rel=1e-4, abs=1e-5), name
    assert_learnt(log_rows(fast))
    weights = {n: p for n, p in fast.model.named_parameters() if "lm_head.lora_B" in n}
    assert len(weights) == 1
    theirs = dict(full.model.named_parameters())
    for name, p in weights.items():
        assert p.abs().max() > 1e-3
        torch.testing.assert_close(p, theirs[name], rtol=1e-3, atol=1e-5)


def test_adapters_that_would_not_be_trained_are_refused(tmp_path, models):
    import peft

    ia3 = peft.IA3Config(target_modules=["k_proj", "lm_head"], feedforward_modules=["lm_head"], task_type="CAUSAL_LM")
    for adapter, name in ((ia3, "peft.tuners.ia3"), (lora("lm_head", use_dora=True), "DoraLinearVariant")):
        with pytest.raises(ValueError, match=f"adapter on lm_head must be plain LoRA, got {name}"):
            grpo(FastGRPOTrainer, tmp_path, models(), peft_config=adapter)
    with pytest.raises(ValueError, match="cast_lm_head_to_fp32 must be False with a LoRA adapter on lm_head"):
        grpo(FastGRPOTrainer, tmp_path, models(), peft_config=lora("lm_head"), cast_lm_head_to_fp32=True)
    from trl.trainer import grpo_trainer

    assert grpo_trainer.BaseTunerLayer is peft.tuners.tuners_utils.BaseTunerLayer  # back after an error


@pytest.mark.parametrize(
    "ours", [{"backend": "cuda"}, {"backward": "fast"}, {"tolerance": -1.0}, {"workspace_mb": 0}], ids=str
)
def test_bad_options_are_refused_first(ours):
    with pytest.raises(ValueError, match=f"{next(iter(ours))} must be"):
        FastGRPOTrainer(None, **ours)


def test_the_other_grpo_config_is_refused_by_name():
    from fastgrpo.trainer import GRPOConfig

    for given in ({"args": GRPOConfig()}, {"train_dataset": GRPOConfig()}):
        with pytest.raises(
            TypeError, match=r"args must be a trl.GRPOConfig, got a fastgrpo\.trainer\.config\.GRPOConfig"
        ):
            FastGRPOTrainer(None, **given)


@pytest.mark.works("TRL", "FastGRPOTrainer: training on the certified backward equals stock TRL over 6 optimiser steps")
def test_certified_backward_and_its_hint(tmp_path, monkeypatch, models):
    """Where the policy that sampled is known its log-probs reach the op, on the positions they belong to."""
    monkeypatch.setattr(head, "CERTIFIED_FROM", {"cpu": (1, 1, 1), "cuda": (1, 1, 1)})
    with counted_calls(monkeypatch) as calls:
        stock, fast = train_both(tmp_path, monkeypatch, models(), temperature=0.8)
    assert_same_rows(log_rows(stock), log_rows(fast), tolerance=2e-4, small=2e-5)
    hints = [c["old_logprobs"] for c in calls if c["old_logprobs"] is not None]
    passes = [c for c in calls if c["return_entropy"]]
    assert len(hints) == len(passes) == 12  # the policy's, 6 steps of 2
    assert fast.near_logps is None
    with counted_calls(monkeypatch) as calls:
        batch = fast._buffered_inputs[0]
        fast._compute_loss(fast.model, batch)
    hint, want = calls[0]["old_logprobs"], batch["old_per_token_logps"]
    assert hint.shape[1] == batch["prompt_ids"].shape[1] + batch["completion_ids"].shape[1]
    torch.testing.assert_close(hint[:, -want.shape[1] - 1 : -1], want)
    sampled = {**batch, "sampling_per_token_logps": want - 1}
    for known, near in ((sampled, want), ({**sampled, "old_per_token_logps": None}, want - 1)):
        with counted_calls(monkeypatch) as calls:
            fast._compute_loss(fast.model, known)
        torch.testing.assert_close(calls[0]["old_logprobs"][:, -want.shape[1] - 1 : -1], near)


@pytest.mark.quick
def test_hint_is_near_the_log_probs_it_stands_for(tmp_path, monkeypatch, models):
    """In chunks of a batch too: each chunk gets its own rows."""
    trainer = grpo(FastGRPOTrainer, tmp_path, models(), beta=0.0)
    ids = torch.randint(3, trl_job.VOCABULARY, (5, 11))
    want = scored(trainer, ids)[0].detach()
    trainer.near_logps = want
    results, plain = [], integration.linear_logprobs

    def watch(hidden, weight, targets, bias, **options):
        out = plain(hidden, weight, targets, bias, **options)
        results.append((out.logprobs.detach(), options["old_logprobs"], targets != -100))
        return out

    monkeypatch.setattr(integration, "linear_logprobs", watch)
    scored(trainer, ids)
    assert [len(x) for x, _, _ in results] == [2, 2, 1]
    for found, hint, counted in results:
        torch.testing.assert_close(hint[counted], found[counted])
        assert counted.sum() == 5 * len(found)


# patched(): TRL's other trainers


def load_if_named(model):
    return load(model) if isinstance(model, str) else model


def sft(output, path, **settings):
    rows = [{"prompt": row["prompt"], "completion": row["completion"]} for row in trl_job.problems(24)]
    config = trl.SFTConfig(output_dir=str(output), **{**trl_job.SETTINGS, "max_steps": 3, **settings})
    return trl.SFTTrainer(load_if_named(path), config, train_dataset=trl_job.Dataset.from_list(rows),
                          processing_class=trl_job.tokenizer())  # fmt: skip


def dpo(output, path, **settings):
    rows = [{"prompt": row["prompt"], "chosen": row["completion"], "rejected": row["completion"][::-1]}
            for row in trl_job.problems(24)]  # fmt: skip
    config = trl.DPOConfig(output_dir=str(output), **{**trl_job.SETTINGS, "max_steps": 3, **settings})
    return trl.DPOTrainer(load_if_named(path), None, config, train_dataset=trl_job.Dataset.from_list(rows),
                          processing_class=trl_job.tokenizer())  # fmt: skip


def kto(output, path, **settings):
    rows = [{"prompt": row["prompt"], "completion": row["completion"], "label": i % 3 > 0}
            for i, row in enumerate(trl_job.problems(24))]  # fmt: skip
    config = trl.KTOConfig(output_dir=str(output), **{**trl_job.SETTINGS, "max_steps": 3, **settings})
    return trl.KTOTrainer(load_if_named(path), None, config, train_dataset=trl_job.Dataset.from_list(rows),
                          processing_class=trl_job.tokenizer())  # fmt: skip


def rloo(output, path, **settings):
    config = trl.RLOOConfig(
        output_dir=str(output), num_generations=4, max_completion_length=6, **{**trl_job.SETTINGS, "max_steps": 3},
        **settings,
    )  # fmt: skip
    return trl.RLOOTrainer(load(path), trl_job.digits, config, trl_job.prompts(), processing_class=trl_job.tokenizer())


def distillation(output, path, **settings):
    """Of a teacher with another width, softcap and scale."""
    teacher = trl_job.save_model(output / "teacher", "Gemma2", hidden_size=48, final_logit_softcapping=5.0)
    config = trl.DistillationConfig(
        output_dir=str(output), max_completion_length=6, **{**trl_job.SETTINGS, "max_steps": 3}, **settings
    )
    return trl.DistillationTrainer(
        load(path), teacher_model=load(teacher), args=config, train_dataset=trl_job.prompts(),
        processing_class=trl_job.tokenizer(),
    )  # fmt: skip


def plain_grpo(output, path, **settings):
    return grpo(trl.GRPOTrainer, output, path, **{"max_steps": 3, **settings})


OTHERS = {
    "SFT": (sft, {}), "SFT, DFT": (sft, {"loss_type": "dft"}), "SFT, again": (sft, {"learning_rate": 1e-2}),
    "DPO": (dpo, {}), "DPO, weighted": (dpo, {"use_weighting": True}), "KTO": (kto, {}), "RLOO": (rloo, {"beta": 0.05}),
    "GRPO": (plain_grpo, {}), "Distillation": (distillation, {"beta": 1.0, "temperature": 0.8}),
    "Distillation, forward": (distillation, {"beta": 0.0}), "Distillation, JSD": (distillation, {"beta": 0.3}),
}  # fmt: skip


@pytest.mark.works(
    "TRL", "patched(): SFT, DPO, KTO, RLOO, GRPO and Distillation trainers equal stock TRL, metrics included"
)
@pytest.mark.parametrize(("name", "family"), list(zip(OTHERS, itertools.cycle(("Qwen2", "Gemma2")))))
def test_patched_trainers_equal_stock(tmp_path, monkeypatch, models, name, family):
    make, settings = OTHERS[name]
    stock = make(tmp_path / "stock", models(family), **settings)
    stock.train()
    ours = make(tmp_path / "ours", models(family), **settings)  # made outside the block: it counts from its train on
    with counted_calls(monkeypatch) as calls, patched():
        ours.train()
    assert calls
    rows = log_rows(ours)
    assert_same_rows(log_rows(stock), rows)
    assert len(rows) == 4
    assert min(row["grad_norm"] for row in rows[:-1]) > 1e-3
    if name.startswith(("SFT", "DPO")):
        assert 0 < rows[0]["mean_token_accuracy"] < 1
    if name.startswith("Distillation"):
        assert rows[0]["entropy"] > 0.1
        assert {call["beta"] for call in calls} == {settings["beta"]}


@pytest.mark.works("TRL", "patched(): SFT and DPO trainers in bf16, within rounding of stock TRL")
@pytest.mark.parametrize("make", [sft, dpo])
@pytest.mark.parametrize("mixed", [True, False])
def test_patched_bf16(tmp_path, models, make, mixed):
    """Autocast over fp32 weights, and 16-bit weights; accumulation and checkpointing as TRL has them by default."""
    rows = []
    for context in (contextlib.nullcontext(), patched()):
        model = load(models(), dtype=torch.float32 if mixed else torch.bfloat16)
        with context:
            trainer = make(tmp_path, model, bf16=mixed, learning_rate=1e-3)
            trainer.train()
        assert trainer.args.gradient_checkpointing
        rows.append(log_rows(trainer))
    for theirs, ours in zip(*rows):
        for name in {"loss", "grad_norm", "entropy", "logps/chosen"} & theirs.keys():
            assert ours[name] == pytest.approx(theirs[name], rel=2e-2, abs=5e-3), name


@pytest.mark.quick
def test_patched_is_undone():
    def found():
        return [integration.find(name) for name in integration.OPS]

    plain, ours = found(), list(integration.OPS.values())

    def fail():
        with patched():
            assert found() == ours
            with patched():  # nested
                assert found() == ours
            assert found() == ours
            raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        fail()
    assert found() == plain
    first, second = patched(), patched()  # overlapping
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert found() == ours
    second.__exit__(None, None, None)
    assert found() == plain


@pytest.mark.quick
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("outputs", [(), ("is_top1",), ("entropy", "is_top1"), integration.OUTPUTS], ids=str)
def test_the_op_in_their_place(outputs, dtype):
    """TRL's function and ours, all outputs and gradients, with bias, softcap, scale and temperature."""
    g = torch.Generator().manual_seed(7)
    hidden, weight, bias = (
        torch.randn(37, 16, generator=g),
        torch.randn(53, 16, generator=g),
        torch.randn(53, generator=g),
    )
    targets = torch.randint(0, 53, (37,), generator=g)
    results = []
    for op, kind in ((utils._ChunkedLogProbFunction, torch.float32), (integration.Op, dtype)):
        leaves = [x.to(dtype).to(kind).requires_grad_() for x in (hidden, weight, bias)]
        out = op.apply(*leaves, targets, 0.7, 32768, 4.0, 0.5, outputs)
        loss = (out[0] * torch.linspace(-1, 1, 37)).sum()
        loss = loss if out[1] is None else loss + (out[1] * torch.linspace(0, 1, 37)).sum()
        grads = torch.autograd.grad(loss, leaves)
        results.append((out, [x.float() for x in grads]))
    (theirs, want), (ours, found) = results
    assert [x is None for x in ours] == [x is None for x in theirs]
    for mine, value in zip(ours, theirs):
        if value is not None:
            assert mine.dtype == value.dtype
            assert mine.requires_grad == value.requires_grad
            torch.testing.assert_close(mine, value, rtol=1e-5, atol=1e-5)
    for mine, value in zip(found, want):
        close = 1e-5 if dtype == torch.float32 else 1e-2
        torch.testing.assert_close(mine, value, rtol=close, atol=close)


def divergence_arguments(dtype=torch.float32, bias=True):
    """Of TRL's function: a student, a teacher of another width."""
    g = torch.Generator().manual_seed(7)
    shapes = {"student": (16, "hidden weight bias"), "teacher": (9, "hidden weight bias")}
    given = {}
    for who, (width, names) in shapes.items():
        for name, shape in zip(names.split(), ((37, width), (53, width), (53,))):
            given[f"{who}_{name}"] = torch.randn(*shape, generator=g).to(dtype) if bias or name != "bias" else None
    return given


@pytest.mark.quick
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("logits", [(), (0.7, 0.5, 4.0, 1.5, 6.0)], ids=["plain", "transformed"])
def test_the_divergence_in_their_place(beta, logits, dtype):
    """TRL's function and ours: divergence, entropy and gradients, with ragged rows out of the loss."""
    theirs_op = integration.find("trainer.distillation_trainer.ChunkedDivergenceFunction")
    upstream = torch.linspace(-1, 1, 37) * (torch.arange(37) % 4 > 0)
    results = []
    for op, kind in ((theirs_op, torch.float32), (integration.DivergenceOp, dtype)):
        given = {k: x if x is None else x.to(kind) for k, x in divergence_arguments(dtype, bool(logits)).items()}
        leaves = [x.requires_grad_() for k, x in given.items() if k.startswith("student") and x is not None]
        divergence, entropy = op.apply(*given.values(), beta, *logits)
        grads = torch.autograd.grad((divergence * upstream).sum(), leaves)
        results.append(((divergence, entropy), [x.float() for x in grads]))
    (theirs, want), (ours, found) = results
    for mine, value in zip(ours, theirs):
        assert (mine.dtype, mine.requires_grad) == (value.dtype, value.requires_grad)
        torch.testing.assert_close(mine, value, rtol=1e-5, atol=1e-5)
    for mine, value in zip(found, want, strict=True):
        close = 1e-5 if dtype == torch.float32 else 1e-2
        torch.testing.assert_close(mine, value, rtol=close, atol=close)


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_divergences_where_student_and_teacher_hardly_differ(beta):
    """Where a distillation ends: TRL's KL is the rounding of its sums there, ours is right to its digits."""
    given = divergence_arguments(bias=False)
    given |= {"teacher_weight": given["student_weight"]}
    given["teacher_hidden"] = given["student_hidden"] + 1e-3 * torch.randn(37, 16)
    heads = [given[f"{who}_{name}"].double() for who in ("student", "teacher") for name in ("hidden", "weight")]
    want = reference.linear_divergence(*heads, beta=beta).divergence
    theirs_op = integration.find("trainer.distillation_trainer.ChunkedDivergenceFunction")
    theirs, ours = (op.apply(*given.values(), beta)[0].double() for op in (theirs_op, integration.DivergenceOp))
    assert ((ours - want).abs() < 1e-3 * want + 1e-12).all()
    assert (theirs - want).abs().max() > (2 if 0 < beta < 1 else 100) * (ours - want).abs().max()


def test_zero3_heads_of_a_divergence(monkeypatch):
    """Both are gathered for the call alone; what the backward needs is still there."""
    given, gathered = divergence_arguments(), []

    @contextlib.contextmanager
    def gather(*head):
        gathered.append(head)
        yield
        for x in head:
            x.data.zero_()

    def gradients(values):
        leaves = {k: x.clone().requires_grad_(k.startswith("student")) for k, x in values.items()}
        integration.DivergenceOp.apply(*leaves.values(), 0.3)[0].sum().backward()
        return [x.grad for x in leaves.values() if x.requires_grad]

    want = gradients(given)
    monkeypatch.setattr(integration, "zero3", lambda: True)
    monkeypatch.setattr(utils, "maybe_gather_lm_head_ctx", gather)
    for mine, value in zip(gradients(given), want, strict=True):
        torch.testing.assert_close(mine, value)
    assert [x.shape for head in gathered for x in head] == [(53, 16), (53,), (53, 9), (53,)]


def test_no_rows_of_a_divergence():
    given = divergence_arguments()
    given |= {k: x[:0] for k, x in given.items() if k.endswith("hidden")}
    weight = given["student_weight"].requires_grad_()
    divergence, entropy = integration.DivergenceOp.apply(*given.values(), 0.3)
    assert divergence.shape == entropy.shape == (0,)
    divergence.sum().backward()
    assert weight.grad.eq(0).all()


def test_no_rows():
    """A micro-batch without a counted token, as TRL compacts it on a GPU."""
    hidden, weight = torch.randn(0, 8, requires_grad=True), torch.randn(11, 8, requires_grad=True)
    out = integration.Op.apply(hidden, weight, None, torch.zeros(0, dtype=torch.long), 1.0, 32768)
    assert [x.shape for x in out] == [(0,)] * 5
    (out[0].sum() + out[1].sum()).backward()
    assert weight.grad.eq(0).all()


def test_zero3_weights_survive_until_the_backward(monkeypatch):
    """DeepSpeed leaves a parameter empty outside its gathering, which TRL ends before the backward."""
    hidden, whole = torch.randn(9, 8, requires_grad=True), torch.randn(11, 8)
    targets = torch.randint(0, 11, (9,))
    weight = torch.nn.Parameter(whole.clone())
    monkeypatch.setattr(integration, "zero3", lambda: True)
    out = integration.Op.apply(hidden, weight, None, targets, 1.0, 32768, outputs=())
    weight.data.zero_()  # the memory goes elsewhere
    out[0].sum().backward()
    want = torch.nn.Parameter(whole.clone())
    reference.linear_logprobs(hidden.detach(), want, targets).logprobs.sum().backward()
    torch.testing.assert_close(weight.grad, want.grad, rtol=1e-5, atol=1e-5)


# versions


def test_another_version_is_refused(monkeypatch):
    monkeypatch.setattr(trl, "__version__", "1.17.0")
    for use in (lambda: patched().__enter__(), lambda: FastGRPOTrainer(None)):
        with pytest.raises(
            ImportError, match=r"tested with trl 1\.16\.0, got trl 1\.17\.0: its signatures agree, so F"
        ):
            use()
    monkeypatch.setenv(integration.UNTESTED, "1")
    with patched():
        pass


@pytest.mark.quick
def test_another_signature_is_refused(monkeypatch):
    class Other:
        @staticmethod
        def forward(ctx, hidden, weight, targets):
            pass

    monkeypatch.setenv(integration.UNTESTED, "1")
    with monkeypatch.context() as m:
        m.setattr(utils, "_ChunkedLogProbFunction", Other)
        expected = (
            r"trl\.trainer\.utils\.\w+\.forward takes \(ctx, hidden, weight, targets\), expected \(ctx, hidden, w"
        )
        with pytest.raises(ImportError, match=expected):
            patched().__enter__()
        m.delattr(utils, "_ChunkedLogProbFunction")
        with pytest.raises(ImportError, match=r"_ChunkedLogProbFunction\.forward is missing"):
            patched().__enter__()
    monkeypatch.setattr(trl.GRPOTrainer, "_compute_loss", lambda self, batch: None)
    with pytest.raises(ImportError, match=r"_compute_loss takes \(self, batch\), expected \(self, model, inputs\)"):
        FastGRPOTrainer(None)


# two processes


@pytest.fixture(scope="module")
def ranks(tmp_path_factory, models):
    """What two processes logged."""
    output = tmp_path_factory.mktemp("ranks")
    os.symlink(models(), output / "model")
    run_ranks(trl_job.__file__, 2, output, ACCELERATE_USE_CPU="true")
    return [json.loads((output / f"{r}.json").read_text()) for r in range(2)]


@pytest.mark.works("TRL", "FastGRPOTrainer: two processes under DDP and FSDP2 equal stock TRL over 6 optimiser steps")
@pytest.mark.parametrize("parallel", ["ddp", "fsdp2"])
def test_two_processes(ranks, parallel):
    (wrapper, sharded, theirs), (_, _, ours) = (ranks[0][f"{parallel} {x}GRPOTrainer"] for x in ("", "Fast"))
    assert sharded == (parallel == "fsdp2")
    assert sharded or wrapper == "DistributedDataParallel"
    assert_same_rows(theirs, ours)
    assert_learnt(ours, beta=parallel == "ddp")

"""fp16: fp32 weights, a scaled loss, overflows that cost a pass and no step; closer to the sampler than bf16."""

import copy

import pytest
import torch

pytest.importorskip("accelerate")

from accelerate import Accelerator
from test_learner import assert_close, learner_gradients, make_episodes, make_model

from fastgrpo import GRPOLossConfig
from fastgrpo.integrations.transformers import fuse_lm_head
from fastgrpo.trainer import SFTConfig, SFTTrainer
from fastgrpo.trainer.generate import Sampling, TransformersSampler
from fastgrpo.trainer.learner import LOSS_SCALE, SCALE_GROWTH, Episode, Learner

import problems
import trainer_job

NUMBER = {"save_strategy": "no", "max_steps": 4, "fp16": True}


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Real memory: transformers fills what it allocates."""


def small_loss(loss_scale):
    """Relative error of all gradients at a loss so small that fp16 needs the scale: num_items is millions of tokens."""
    config, episodes = GRPOLossConfig(), make_episodes(old=False, ref=False)
    model = make_model()
    _, want, _ = learner_gradients(copy.deepcopy(model), episodes, config, num_items=1e7)
    learner = Learner(model, Accelerator(cpu=True), config, half=True)
    learner.loss_scale = loss_scale
    learner.gradients(episodes, 1e7)
    grads = {n: p.grad for n, p in model.named_parameters()}
    assert all(p.dtype == g.dtype == torch.float32 for p, g in zip(model.parameters(), grads.values()))
    error = sum((grads[n] - w).square().sum() for n, w in want.items()) / sum(w.square().sum() for w in want.values())
    return error.sqrt().item()


def test_gradients_and_why_the_loss_is_scaled():
    assert small_loss(LOSS_SCALE) < 0.02
    assert small_loss(1.0) > 0.3


def test_packing_and_shared_prompts_keep_the_gradients():
    config, episodes = GRPOLossConfig(), make_episodes(old=False, ref=False)
    _, want, _ = learner_gradients(make_model(), episodes, config)
    for way in ({"packed": True, "budget": 64}, {"share_prompts": True, "budget": 64}):
        _, grads, _ = learner_gradients(make_model(), episodes, config, half=True, **way)
        assert_close(grads, want, 0.03)


def test_an_overflow_costs_a_pass_and_no_step(tmp_path):
    """From a loss scale beyond fp16's range: the same batch again until it fits; then as if it had always been so."""
    rows, weights = [], []
    for scale in (LOSS_SCALE, 2.0**40):
        trainer = trainer_job.make_trainer(tmp_path / str(scale), trainer_job.make_model(dropout=0.0), **NUMBER)
        trainer.learner.loss_scale = scale
        rows.append(trainer.train())
        weights.append(dict(trainer.model.named_parameters()))
        assert trainer.optimizer.optimizer.state[next(trainer.model.parameters())]["step"] == 4
        assert all(p.dtype == torch.float32 for p in trainer.model.parameters())
    assert 1 < trainer.learner.loss_scale < 2.0**40
    assert trainer.learner.fitted == 4
    for a, b in zip(*rows):
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-2)
        assert a["reward"] == b["reward"]
    for name, p in weights[0].items():
        torch.testing.assert_close(weights[1][name], p, rtol=0, atol=2e-3)


def test_a_nan_of_the_forward_is_no_overflow(tmp_path):
    model, tokenizer = trainer_job.make_model(dropout=0.0)
    trainer = trainer_job.make_trainer(tmp_path, (model, tokenizer), **NUMBER)
    with torch.no_grad():
        model.lm_head.weight[0, 0] = torch.nan
    with pytest.raises((FloatingPointError, ValueError, RuntimeError), match=r"nan|NaN|inf"):
        trainer.train()
    assert trainer.learner.loss_scale == LOSS_SCALE


def test_the_scale_grows_after_many_steps_and_is_resumed():
    learner = Learner(make_model(), Accelerator(cpu=True), GRPOLossConfig(), half=True)
    for _ in range(SCALE_GROWTH):
        assert learner.loss_scale == LOSS_SCALE
        learner.grow()
    assert learner.loss_scale == 2 * LOSS_SCALE
    other = Learner(make_model(), Accelerator(cpu=True), GRPOLossConfig(), half=True)
    other.restore({"budget": 7, "limit": 8, **learner.state()})
    assert other.state() == learner.state()
    other.restore({"budget": 7, "limit": 8})  # a checkpoint without them
    assert (other.budget, other.limit, other.loss_scale) == (7, 8, 2 * LOSS_SCALE)


def test_fp16_weights_are_not_trained(tmp_path):
    model, tokenizer = trainer_job.make_model()
    with pytest.raises(ValueError, match="model must have trained weights of fp32 or bf16, got fp16"):
        trainer_job.make_trainer(tmp_path, (model.half(), tokenizer))


def test_an_adapter_on_an_fp16_base(tmp_path):
    pytest.importorskip("peft")
    model, tokenizer = trainer_job.make_model(dropout=0.0)
    trainer = trainer_job.make_trainer(
        tmp_path, (model.half(), tokenizer), use_peft=True, lora_target_modules="all-linear", dtype="float16",
        lora_modules_to_save=["embed_tokens"], **{**NUMBER, "fp16": False},
    )  # fmt: skip
    assert trainer.learner.half
    assert {p.dtype for p in trainer.model.parameters() if p.requires_grad} == {torch.float32}
    assert torch.float16 in {p.dtype for p in trainer.model.parameters()}
    rows = trainer.train()
    assert all(row["grad_norm"] > 0 for row in rows)
    assert any(p.abs().max() > 0 for n, p in trainer.model.named_parameters() if "lora_B" in n)


def test_supervised_steps(tmp_path):
    """The same loop, learner and loss scale."""
    rows = [{"prompt": "31=", "completion": "13"}, {"prompt": "2=", "completion": "2"}] * 4
    losses = []
    for half in (False, True):
        model, tokenizer = trainer_job.make_model(dropout=0.0)
        config = SFTConfig(
            output_dir=str(tmp_path / str(half)), fp16=half, max_steps=4, save_strategy="no", learning_rate=1e-2,
            use_cpu=True, gradient_checkpointing=False, shuffle_dataset=False,
        )  # fmt: skip
        trainer = SFTTrainer(model, rows, config, processing_class=tokenizer)
        assert trainer.learner.half == half
        losses.append([row["loss"] for row in trainer.train()])
    assert losses[1] == pytest.approx(losses[0], rel=5e-3)
    assert losses[1] != losses[0]


def out_of_band(dtype):
    """Share of the tokens whose ratio of learner and sampler is outside [0.99, 1.01]."""
    model, tokenizer = trainer_job.make_model(dropout=0.0, width=64)
    with torch.no_grad():
        model.lm_head.weight.mul_(20)
    sampler, learner = (
        TransformersSampler(tokenizer),
        Learner(fuse_lm_head(model), Accelerator(cpu=True), GRPOLossConfig()),
    )
    prompts = tokenizer([row["prompt"] for row in trainer_job.problems(16)]).input_ids
    learner.precision = lambda: torch.autocast("cpu", dtype)
    torch.manual_seed(0)
    with learner.precision():
        groups = sampler.generate(model, prompts, Sampling(num_generations=4, max_completion_length=12))
    drawn = [(p, c) for p, group in zip(prompts, groups) for c in group]
    scores = learner.score([Episode(p, c.ids) for p, c in drawn])
    gaps = torch.cat([s - torch.tensor(c.logprobs) for s, (_, c) in zip(scores, drawn)])
    return ((gaps.exp() - 1).abs() > 0.01).float().mean().item()


@pytest.mark.skipif(problems.OLDEST_TORCH, reason="torch 2.8 draws other answers: 8 % are out of band in bf16")
def test_sampler_and_learner_are_closer_than_in_bf16():
    half, brain = out_of_band(torch.float16), out_of_band(torch.bfloat16)
    assert brain > 0.1
    assert half < brain / 4

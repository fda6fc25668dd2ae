"""Distillation in the trainer: loss and gradients against full logits, what a run brings, resuming, teachers of every
kind, and GRPO's exact KL term."""

import copy
import shutil

import pytest
import torch
import transformers

pytest.importorskip("accelerate")

from accelerate import Accelerator
from safetensors.torch import load_file

from fastgrpo import GRPOLossConfig
from fastgrpo.integrations.transformers import fuse_lm_head
from fastgrpo.trainer import DistillConfig, DistillTrainer, GRPOConfig, cli, examples
from fastgrpo.trainer.distill import DistillLearner
from fastgrpo.trainer.job import load_config
from fastgrpo.trainer.job_file import preset_names
from fastgrpo.trainer.learner import Episode, Learner

import causal_lms
import problems
import trainer_job

SETTINGS = {
    "max_steps": 5, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "use_cpu": True, "save_steps": 1,
    "gradient_checkpointing": False, "seed": 3, "max_completion_length": 6,
}  # fmt: skip


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Real memory: transformers fills what it allocates."""


def make_teacher(width=48, padding=0, dtype=torch.float32, std=0.3):
    """Of decided opinions; its head may be padded further than the student's."""
    model = trainer_job.make_model(dropout=0.0, width=width)[0]
    if padding:
        model.resize_token_embeddings(model.config.vocab_size + padding, mean_resizing=False)
    torch.manual_seed(7)
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim > 1:
                p.normal_(0, std)
    return model.to(dtype)


def make_trainer(output, teacher, model=None, rewards=(), data=None, eval_rows=None, peft_config=None, **settings):
    model, tokenizer = trainer_job.make_model(dropout=0.0) if model is None else model
    config = DistillConfig(output_dir=str(output), **{**SETTINGS, **settings})
    rows = trainer_job.problems(10) if data is None else data
    return DistillTrainer(model, teacher, rows, config, eval_rows, rewards, tokenizer, peft_config)


def make_episodes(vocabulary=14):
    """Of unequal lengths, two to a prompt, one masked."""
    g = torch.Generator().manual_seed(0)
    episodes = []
    for i in range(8):
        prompt = torch.randint(0, vocabulary, (3 + i // 2,), generator=torch.Generator().manual_seed(i // 2)).tolist()
        ids = torch.randint(0, vocabulary, (2 + i,), generator=g).tolist()
        advantage = float(torch.randn((), generator=g))
        episodes.append(Episode(prompt, ids, advantage, spread=True, counts=i != 5))
    return episodes


def logits(model, episode, prompt=None):
    """(length, V) of an answer's tokens, behind another prompt if given."""
    prompt = episode.prompt_ids if prompt is None else prompt
    ids = torch.tensor([prompt + episode.completion_ids])
    return model(input_ids=ids).logits[0, len(prompt) - 1 : -1]


def divergence(student, teacher, beta):
    """(N,) of logits, by the definition."""
    s, t = student.log_softmax(-1), teacher.log_softmax(-1)
    if beta == 0:
        return (t.exp() * (t - s)).sum(-1)
    if beta == 1:
        return (s.exp() * (s - t)).sum(-1)
    m = ((1 - beta) * s.exp() + beta * t.exp()).log()
    return beta * (t.exp() * (t - m)).sum(-1) + (1 - beta) * (s.exp() * (s - m)).sum(-1)


WAYS = [
    {}, {"budget": 24}, {"packed": True, "budget": 30}, {"share_prompts": True, "budget": 40},
]  # fmt: skip


@pytest.mark.quick
@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_loss_and_gradients_are_those_of_full_logits(beta):
    """A wider teacher, whose head has padding that the student's has not; padded, cut by the budget, packed, shared."""
    student, teacher = trainer_job.make_model(dropout=0.0)[0].double(), make_teacher(padding=3, dtype=torch.float64)
    plain, episodes, size = copy.deepcopy(student), make_episodes(), student.config.vocab_size
    counted = [e for e in episodes if e.counts]
    values = [divergence(logits(plain, e) / 0.7, logits(teacher, e)[:, :size].detach() / 0.7, beta) for e in counted]
    want = torch.cat(values).mean()
    want.backward()
    expected = {name: p.grad for name, p in plain.named_parameters()}
    fuse_lm_head(teacher).requires_grad_(False).eval()
    for way in WAYS:
        learner = DistillLearner(
            fuse_lm_head(student), Accelerator(cpu=True), GRPOLossConfig(temperature=0.7), skip=False,
            backward="exact", **way,
        )  # fmt: skip
        learner.beta = beta
        for e, states in zip(episodes, learner.states(episodes, teacher)):
            assert states.shape == (len(e.completion_ids), 48)
            e.ref_hidden = states
        for ours, theirs in zip(learner.divergences(counted), values):
            torch.testing.assert_close(ours, theirs.detach(), rtol=1e-9, atol=1e-12)
        numbers = learner.gradients(episodes)
        assert numbers["loss"].item() == pytest.approx(want.item(), rel=1e-9)
        assert numbers["divergence_sum"].item() == pytest.approx(want.item() * numbers["counted"].item(), rel=1e-6)
        for name, p in student.named_parameters():
            assert problems.relative_error(p.grad, expected[name]) < 1e-6, name  # RMSNorm computes in fp32


def test_a_reward_s_loss_is_added():
    """The weighted GRPO loss of the same batch, which one learner takes alone, and the divergence's gradient."""
    found = {}
    for coef, beta in ((0.0, 1.0), (0.6, 1.0), (None, None)):
        student, episodes = trainer_job.make_model(dropout=0.0)[0].double(), make_episodes()
        make = Learner if coef is None else DistillLearner
        learner = make(
            fuse_lm_head(student), Accelerator(cpu=True), GRPOLossConfig(loss_type="grpo"), budget=24, skip=False,
            backward="exact",
        )  # fmt: skip
        if coef is not None:
            learner.beta, learner.coef = beta, coef
            teacher = fuse_lm_head(make_teacher(dtype=torch.float64)).eval()
            for e, states in zip(episodes, learner.states(episodes, teacher)):
                e.ref_hidden = states
        numbers = learner.gradients(episodes)
        found[coef] = numbers["loss"], {n: p.grad for n, p in student.named_parameters()}
    (alone, grads), (both, mixed), (policy, rewarded) = found.values()
    assert both.item() == pytest.approx((alone + 0.6 * policy).item(), rel=1e-9)
    for n, g in mixed.items():
        assert problems.relative_error(g, grads[n] + 0.6 * rewarded[n]) < 1e-6, n
    assert any((0.6 * rewarded[n]).norm() > 1e-3 * grads[n].norm() for n in mixed)


@pytest.mark.parametrize("beta", [0.0, 1.0])
def test_the_divergence_falls(tmp_path, beta, capsys):
    held_out = examples.load_rows("tiny:sort:test")[:16]
    trainer = make_trainer(
        tmp_path, make_teacher(std=0.1), eval_rows=held_out, eval_strategy="steps", eval_steps=30, eval_on_start=True,
        max_steps=60, save_strategy="no", logging_steps=30, per_device_train_batch_size=32, beta=beta,
        lr_scheduler_type="constant", data=trainer_job.problems(200),
    )  # fmt: skip
    log = trainer.train()
    evaluations, steps = [r for r in log if "eval/divergence" in r], [r for r in log if "loss" in r]
    assert [r["step"] for r in evaluations] == [0, 30, 60]
    assert evaluations[-1]["eval/divergence"] < evaluations[0]["eval/divergence"] / 2
    for row in steps:
        assert row["divergence"] == pytest.approx(row["loss"], rel=1e-5)  # one rank, one rollout a step
    assert sum(r["divergence"] for r in steps[-5:]) < sum(r["divergence"] for r in steps[:5]) / 2
    out = capsys.readouterr().out
    assert "step 60/60  divergence " in out
    assert "tokens" in out
    assert (tmp_path / "curves.png").read_bytes()[:4] == b"\x89PNG"


RUNS = {
    "plain": {"num_generations": 2, "steps_per_generation": 3},
    "lora, a reward": {
        "use_peft": True, "lora_target_modules": "all-linear", "num_generations": 2, "num_iterations": 2,
        "reward_coef": 0.5, "rewards": trainer_job.digits,
    },
}  # fmt: skip


@pytest.mark.parametrize("name", RUNS)
def test_resume_is_bit_exact(tmp_path, name):
    """From a step in the middle of a rollout, whose teacher's states are then those of the checkpoint."""
    teacher = make_teacher() if name == "plain" else "self"
    whole, half = tmp_path / "whole", tmp_path / "half"
    make_trainer(whole, copy.deepcopy(teacher), **RUNS[name]).train()
    half.mkdir()
    shutil.copytree(whole / "checkpoint-1", half / "checkpoint-1")
    shutil.copy(whole / "log.jsonl", half)
    torch.manual_seed(99)
    make_trainer(half, teacher, resume_from_checkpoint=True, **RUNS[name]).train()
    assert trainer_job.log_rows(half) == trainer_job.log_rows(whole)
    weights = "model.safetensors" if name == "plain" else "adapter_model.safetensors"
    a, b = (load_file(x / "model" / weights) for x in (whole, half))
    assert all(a[k].equal(b[k]) for k in a)


def test_self_distillation_with_lora(tmp_path):
    """The adapter-free base sees a hint that the student does not; the head has an adapter too."""
    data = [{"prompt": row["prompt"], "hint": f"{row['answer']}={row['prompt']}"} for row in trainer_job.problems(10)]
    settings = {"use_peft": True, "lora_target_modules": ["q_proj", "v_proj", "lm_head"], "lora_dropout": 0.0}
    model = make_teacher(), trainer_job.make_model()[1]
    base = copy.deepcopy(model[0])
    trainer = make_trainer(
        tmp_path, "self", model, data=data, teacher_prompt_column="hint", save_strategy="no", max_steps=40,
        per_device_train_batch_size=16, lr_scheduler_type="constant", **settings,
    )  # fmt: skip
    assert trainer.reference is None
    episodes = trainer.collect()
    encode = trainer.tokenizer
    hints = {tuple(encode(r["prompt"])["input_ids"]): encode(r["hint"])["input_ids"] for r in data}
    numbers = trainer.learner.gradients(episodes)
    want = [
        divergence(logits(base, e), logits(base, e, hints[tuple(e.prompt_ids)]), 1.0).detach() for e in episodes
    ]  # fmt: skip
    assert numbers["loss"].item() == pytest.approx(torch.cat(want).mean().item(), rel=1e-4)
    assert numbers["loss"].item() > 0.01
    log = trainer.train()
    assert sum(r["divergence"] for r in log[-5:]) < 0.8 * sum(r["divergence"] for r in log[:5])
    states = trainer.model.state_dict()
    for name, p in base.state_dict().items():  # untouched
        held = next(v for n, v in states.items() if n.replace(".base_layer", "").endswith(f"model.{name}"))
        assert held.equal(p), name


@pytest.mark.parametrize("kind", ["frozen copy", "folder", "adapter"])
def test_teachers(tmp_path, kind):
    """A frozen copy of the start beside a reward; a folder; an adapter's folder with LoRA on its head."""
    model, tokenizer = trainer_job.make_model(dropout=0.0)
    teacher, plain, options = "self", copy.deepcopy(model), {"rewards": trainer_job.digits, "num_generations": 2}
    if kind != "frozen copy":
        plain, options = make_teacher(), {}
        plain.save_pretrained(tmp_path / "teacher")
        tokenizer.save_pretrained(tmp_path / "teacher")
        teacher = str(tmp_path / "teacher")
    if kind == "adapter":
        peft = pytest.importorskip("peft")
        config = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["v_proj", "lm_head"], init_lora_weights=False)
        adapted = peft.get_peft_model(plain, config)
        adapted.peft_config["default"].base_model_name_or_path = teacher
        adapted.save_pretrained(tmp_path / "adapter")
        tokenizer.save_pretrained(tmp_path / "adapter")
        teacher, plain = str(tmp_path / "adapter"), adapted.eval()
    trainer = make_trainer(tmp_path / "out", teacher, (model, tokenizer), max_steps=2, save_strategy="no", **options)
    before = copy.deepcopy(model)
    log = trainer.train()
    assert all(not p.requires_grad and p.grad is None for p in trainer.reference.parameters())
    assert log[0]["divergence"] == pytest.approx(0, abs=1e-6) if kind == "frozen copy" else log[0]["divergence"] > 0.1
    assert log[1]["divergence"] > 0
    assert ("reward" in log[0]) == (kind == "frozen copy")
    e = make_episodes()[2]
    (e.ref_hidden,) = trainer.learner.states([e], trainer.reference)
    want = divergence(logits(model.eval(), e), logits(plain, e), 1.0)
    torch.testing.assert_close(trainer.learner.divergences([e])[0], want.detach(), rtol=1e-4, atol=1e-5)
    assert any(not p.equal(q) for p, q in zip(model.parameters(), before.parameters()))


def test_a_teacher_that_cannot_share_prompts_turns_it_off(tmp_path, capsys):
    teacher = make_teacher()
    teacher.config._attn_implementation = "eager"
    trainer = make_trainer(tmp_path, teacher)
    assert not trainer.learner.share
    assert "share_prompts: off, because of the teacher: attn_implementation is 'eager'" in capsys.readouterr().out
    assert trainer.learner.packed is False
    with pytest.raises(ValueError, match="got True: the teacher cannot"):
        make_trainer(tmp_path, teacher, share_prompts=True)


# ---- GRPO's exact KL


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_full_kl_in_the_learner_is_that_of_full_logits(way):
    config = GRPOLossConfig(beta=0.3, kl_estimator="full", loss_type="grpo", temperature=0.7)
    student, other = trainer_job.make_model(dropout=0.0)[0].double(), make_teacher(dtype=torch.float64)
    plain, episodes, kl = copy.deepcopy(student), make_episodes(), []
    total = 0.0
    for e in episodes:  # one sequence at a time; masked ones count as sequences
        if not e.counts:
            continue
        z, t = logits(plain, e) / 0.7, logits(other, e).detach() / 0.7
        kl.append(divergence(z, t, 1.0))
        logp = z.log_softmax(-1).gather(1, torch.tensor(e.completion_ids)[:, None])[:, 0]
        loss = -(logp - logp.detach()).exp() * e.advantage + 0.3 * kl[-1]
        total = total + loss.mean() / len(episodes)
    total.backward()
    learner = Learner(fuse_lm_head(student), Accelerator(cpu=True), config, backward="exact", **way)
    learner.add_reference(episodes, fuse_lm_head(other).eval())
    numbers = learner.gradients(episodes)
    assert all(e.ref is None and e.ref_hidden.dtype == torch.float64 for e in episodes)
    assert numbers["loss"].item() == pytest.approx(total.item(), rel=1e-9)
    assert numbers["kl_sum"].item() == pytest.approx(torch.cat(kl).sum().item(), rel=1e-9)
    for (name, p), q in zip(student.named_parameters(), plain.parameters()):
        assert problems.relative_error(p.grad, q.grad) < 1e-6, name


FULL = {
    "frozen": {},
    "moving": {"sync_ref_model": True, "ref_model_sync_steps": 2},
    "lora": {"use_peft": True, "lora_target_modules": ["q_proj", "v_proj", "lm_head"], "lora_dropout": 0.0},
}  # fmt: skip


@pytest.mark.parametrize("name", FULL)
def test_full_kl_in_the_trainer(tmp_path, name):
    """The logged KL is that of full logits of policy and reference as they were; a resumed run goes on bit for bit."""
    whole, half = tmp_path / "whole", tmp_path / "half"
    seen = []

    def make(output, **more):
        settings = {"beta": 0.05, "kl_estimator": "full", "max_steps": 4, **FULL[name], **more}
        return trainer_job.make_trainer(output, model=trainer_job.make_model(dropout=0.0), **settings)

    trainer = make(whole)
    gradients = trainer.learner.gradients

    def watched(episodes, num_items):
        model = copy.deepcopy(trainer.model).eval()
        other = copy.deepcopy(trainer.model).eval().unload() if name == "lora" else trainer.reference
        with torch.no_grad():
            values = [divergence(logits(model, e), logits(other, e), 1.0) for e in episodes]
        seen.append(torch.cat(values).mean().item())
        return gradients(episodes, num_items=num_items)

    trainer.learner.gradients = watched
    log = trainer.train()
    for row, want in zip(log, seen):
        assert row["kl"] == pytest.approx(want, rel=1e-3, abs=1e-8), row["step"]
    assert log[-1]["kl"] > 1e-5
    half.mkdir()
    shutil.copytree(whole / "checkpoint-3", half / "checkpoint-3")
    shutil.copy(whole / "log.jsonl", half)
    make(half, resume_from_checkpoint=True).train()
    assert trainer_job.log_rows(half) == trainer_job.log_rows(whole)


# ---- what is refused


WRONG = [
    ({"beta": 1.5}, r"beta must be 0, 1 or in .*, got 1.5"),
    ({"lmbda": 0.5}, "lmbda is not a setting: every answer is the student's own"),
    ({"teacher_model_name_or_path": "x"}, "the teacher is an argument of DistillTrainer"),
    ({"kl_estimator": "full"}, "kl_estimator must be left out: there is no KL term"),
    ({"skip_zero_advantages": True}, "skip_zero_advantages must be False"),
    ({"sync_ref_model": True, "beta": 0.5}, "sync_ref_model must be False"),
]


@pytest.mark.quick
@pytest.mark.parametrize(("settings", "message"), WRONG, ids=str)
def test_wrong_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        DistillConfig(**settings)


ARGUMENTS = [
    ("self", {}, (), "teacher_model must be another model than the one that begins, got 'self'"),
    (None, {}, (), "unless it sees another prompt"),
    (3, {}, (), "teacher_model must be a folder, a name, a causal LM or 'self', got int"),
    ("no/such/place", {}, (), "teacher_model must be a folder, 'owner/name' on the hub"),
    ("tiny:sort", {"epsilon": 0.1, "reward_coef": 2.0}, (), "epsilon, reward_coef must be left out: there are no r"),
    ("tiny:sort", {}, "exact_answer", "num_generations must be >= 2 with reward_funcs, got 1"),
    ("tiny:sort", {"teacher_prompt_column": "hint"}, (), "teacher_prompt_column must be a column of train_dataset"),
]  # fmt: skip


@pytest.mark.quick
@pytest.mark.parametrize(("teacher", "settings", "rewards", "message"), ARGUMENTS, ids=str)
def test_wrong_arguments(tmp_path, monkeypatch, teacher, settings, rewards, message):
    """All before a model is loaded."""
    monkeypatch.setattr("fastgrpo.trainer.model.load_model", None)
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, teacher, rewards=rewards, **settings)


def test_rewards_without_a_weight_are_logged(tmp_path):
    """The gradient is the divergence's alone; reward, ratio and the rest of the row are there."""
    settings = {"num_generations": 2, "reward_coef": 0.0}
    trainer = make_trainer(tmp_path, make_teacher(), rewards=trainer_job.digits, **settings)
    row = trainer.train()[0]
    assert row["loss"] == pytest.approx(row["divergence"], rel=1e-5)
    assert row["reward"] > 0
    assert row["ratio"] == pytest.approx(1.0, abs=1e-5)


def test_a_teacher_whose_packed_sequences_see_each_other_turns_packing_off(tmp_path, capsys):
    teacher = causal_lms.make(transformers.OPTConfig, transformers.OPTForCausalLM, vocab_size=14)
    trainer = make_trainer(tmp_path, teacher, packing=True, share_prompts=False)
    assert trainer.learner.packed is False
    assert capsys.readouterr().out.count("packing: off, because hidden states of a sequence depend on the one bef") == 1


@pytest.mark.quick
@pytest.mark.parametrize("hint", [None, "", 5])
def test_a_teacher_s_prompts_are_looked_at_before_a_model_is_loaded(tmp_path, monkeypatch, hint):
    monkeypatch.setattr("fastgrpo.trainer.model.load_model", None)
    rows = [{"prompt": "12=", "hint": h} for h in ["123456="] * 9 + [hint]]
    with pytest.raises(ValueError, match=f"train_dataset's 'hint' must have a 'prompt', .* got {hint!r} at row 9"):
        make_trainer(tmp_path, "tiny:sort", data=rows, teacher_prompt_column="hint")


@pytest.mark.quick
def test_another_vocabulary_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("fastgrpo.trainer.model.load_model", None)
    with pytest.raises(ValueError, match=r"teacher_model must have the student's vocabulary, .* of 14 and \d+"):
        make_trainer(tmp_path, "tiny:countdown")
    monkeypatch.undo()
    small = trainer_job.make_model()[0]
    small.resize_token_embeddings(12)
    with pytest.raises(ValueError, match="teacher_model must have a row of its head for each of the 14 tokens, got 12"):
        make_trainer(tmp_path, small)


def test_the_command(tmp_path, capsys):
    """A job with an ``sft`` section and rewards; its mistakes told together."""
    (tmp_path / "job.yaml").write_text(
        f"model: tiny:sort\nteacher_model: self\ntrain_dataset: tiny:sort\nreward_funcs: exact_answer\n"
        f"sft: {{max_steps: 2, save_strategy: 'no'}}\noutput_dir: {tmp_path}/out\nmax_steps: 2\nnum_generations: 2\n"
        "max_completion_length: 5\nuse_cpu: true\n"
    )
    assert cli.main(["distill", str(tmp_path / "job.yaml"), "--save_strategy=no"]) == 0
    assert len(trainer_job.log_rows(tmp_path / "out")) == 2
    assert (tmp_path / "out/sft/model/model.safetensors").is_file()
    assert (tmp_path / "out/model/model.safetensors").is_file()
    capsys.readouterr()
    with pytest.raises(SystemExit):
        cli.main(["distill", str(tmp_path / "job.yaml"), "--beta=2", "--seq_kd", "--teacher_model", "nowhere/at/all"])
    said = capsys.readouterr().err
    assert "beta must be 0, 1 or in [1e-5, 1 - 1e-5], got 2" in said
    assert "seq_kd is not a setting" in said
    (tmp_path / "job.yaml").write_text("model: tiny:sort\ntrain_dataset: tiny:sort\n")
    with pytest.raises(SystemExit):
        cli.main(["distill", str(tmp_path / "job.yaml")])
    assert "the config must also give teacher_model" in capsys.readouterr().err


@pytest.mark.quick
def test_presets():
    job, config = load_config("distill-tiny", command="distill")
    assert job["teacher_model"]
    assert config.beta == 1.0
    assert preset_names("distill") == ["distill-tiny"]
    assert "distill-tiny" not in preset_names("sft") + preset_names("train")


def test_names_and_defaults_are_trl_s():
    trl = pytest.importorskip("trl", minversion="1.16.0")
    import dataclasses

    theirs = {f.name: f.default for cls in (trl.ModelConfig, trl.DistillationConfig) for f in dataclasses.fields(cls)}
    ours = {f.name: f.default for f in dataclasses.fields(DistillConfig)}
    shared = ours.keys() & theirs.keys()
    assert {"beta", "temperature", "max_completion_length", "learning_rate", "teacher_model_init_kwargs"} <= shared
    differ = {name: ours[name] for name in shared if ours[name] != theirs[name]}
    grpo = {f.name: f.default for f in dataclasses.fields(GRPOConfig)}
    assert {name: value for name, value in differ.items() if grpo.get(name) != value} == {}  # those of GRPOConfig aside
    own = {f.name for f in dataclasses.fields(trl.DistillationConfig)}
    own -= {f.name for cls in (trl.GRPOConfig, trl.SFTConfig) for f in dataclasses.fields(cls)}
    assert own - ours.keys() <= DistillConfig.advice.keys()  # what only TRL's has is never just unknown

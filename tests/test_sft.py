"""Supervised fine-tuning: what is learnt of each kind of row, its loss and gradients against plain logits, resuming,
memory options, and going to and fro between it and GRPO."""

import json
import math
import shutil

import pytest
import torch

pytest.importorskip("accelerate")

from safetensors.torch import load_file

from fastgrpo.trainer import GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer, cli, examples
from fastgrpo.trainer.job import load_config
from fastgrpo.trainer.job_file import preset_names
from fastgrpo.trainer.supervised import encode_examples, load_examples

import trainer_job

CHATML = (
    "{% for m in messages %}[{{ m.role[0] }}]{{ m.content }}<eos>\n{% endfor %}"
    "{% if add_generation_prompt %}[a]{% endif %}"
)
# earlier answers lose what stands before their "="
FORGETFUL = (
    "{% for m in messages %}[{{ m.role[0] }}]{% if m.role == 'assistant' and not loop.last %}"
    "{{ m.content.split('=')[-1] }}{% else %}{{ m.content }}{% endif %}<eos>\n{% endfor %}"
    "{% if add_generation_prompt %}[a]{% endif %}"
)
SETTINGS = {
    "max_steps": 5, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "use_cpu": True, "save_steps": 1,
    "gradient_checkpointing": False, "seed": 3,
}  # fmt: skip


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Real memory: transformers fills what it allocates."""


def chat_tokenizer(template=CHATML):
    from transformers import Qwen2Tokenizer

    words = ["<pad>", "<eos>", *"[]abcdefghijklmnopqrstuvwxyz0123456789=?.", "Ċ", "Ġ"]
    special = {"pad_token": "<pad>", "eos_token": "<eos>", "bos_token": None, "unk_token": None}
    tokenizer = Qwen2Tokenizer(vocab={word: i for i, word in enumerate(words)}, merges=[], **special)
    tokenizer.chat_template = template
    return tokenizer


def say(*texts, system=None):
    roles = ["user", "assistant"] * len(texts)
    first = [] if system is None else [{"role": "system", "content": system}]
    return first + [{"role": role, "content": text} for role, text in zip(roles, texts)]


def learnt(row, chat_template=CHATML, **options):
    """[(a sequence with what is learnt in braces)]"""
    tokenizer = chat_tokenizer(chat_template)
    texts = []
    for e in encode_examples(tokenizer, row, **options):
        marks = [False] * len(e.prompt_ids) + e.importance.bool().tolist()
        ids, text = e.prompt_ids + e.completion_ids, ""
        for i, token in enumerate(ids):
            text += "{" * (marks[i] and not marks[i - 1]) + tokenizer.decode([token])
            text += "}" * (marks[i] and (i + 1 == len(ids) or not marks[i + 1]))
        assert e.tokens == sum(marks)
        texts.append(text)
    return texts


ROWS = [
    ({"prompt": "ab", "completion": "cd"}, ["ab{cd<eos>}"]),
    ({"prompt": "ab", "completion": "cd<eos>"}, ["ab{cd<eos>}"]),
    ({"text": "abc"}, ["a{bc<eos>}"]),
    ({"prompt": say("hi"), "completion": "yo"}, ["[u]hi<eos>\n[a]{yo<eos>}"]),
    ({"prompt": say("hi"), "completion": [{"role": "assistant", "content": "yo"}]}, ["[u]hi<eos>\n[a]{yo<eos>}"]),
    ({"messages": say("hi", "yo", system="be")}, ["[s]be<eos>\n[u]hi<eos>\n[a]{yo<eos>}"]),
    ({"messages": say("hi", "yo", "so", "no")}, ["[u]hi<eos>\n[a]{yo<eos>}\n[u]so<eos>\n[a]{no<eos>}"]),
    ({"messages": say("hi", "yo", "so")}, ["[u]hi<eos>\n[a]{yo<eos>}"]),  # what follows teaches nothing
    (
        {"prompt": say("hi", "yo", "so"), "completion": [{"role": "assistant", "content": "no"}]},
        ["[u]hi<eos>\n[a]yo<eos>\n[u]so<eos>\n[a]{no<eos>}"],  # the prompt's own answers are not learnt
    ),
    ({"messages": say("hi", "yo"), "prompt": None, "completion": None}, ["[u]hi<eos>\n[a]{yo<eos>}"]),
]  # fmt: skip


@pytest.mark.quick
@pytest.mark.parametrize(("row", "texts"), ROWS, ids=[str(i) for i in range(len(ROWS))])
def test_what_is_learnt_of_a_row(row, texts):
    assert load_examples([row]) == [row]
    assert learnt(row) == texts


@pytest.mark.quick
def test_a_template_that_rewrites_earlier_answers_gives_a_sequence_each():
    row = {"messages": say("hi", "x=yo", "so", "z=no")}
    assert learnt(row, FORGETFUL) == [
        "[u]hi<eos>\n[a]{x=yo<eos>}",
        "[u]hi<eos>\n[a]yo<eos>\n[u]so<eos>\n[a]{z=no<eos>}",
    ]
    assert learnt({"messages": say("hi", "yo", "so", "no")}, FORGETFUL) == [
        "[u]hi<eos>\n[a]{yo<eos>}\n[u]so<eos>\n[a]{no<eos>}"
    ]


@pytest.mark.quick
def test_a_template_without_ends_gets_one_and_one_that_hides_the_prompt_is_refused():
    plain = "{% for m in messages %}{{ m.content }}{% endfor %}{% if add_generation_prompt %}={% endif %}"
    with pytest.raises(ValueError, match="writes a prompt and its answer otherwise than the prompt alone"):
        learnt({"messages": say("hi", "yo")}, plain)
    assert learnt({"messages": say("hi", "=yo")}, plain) == ["hi={yo<eos>}"]
    assert learnt({"prompt": say("hi"), "completion": "yo"}, plain) == ["hi={yo<eos>}"]


@pytest.mark.quick
def test_long_rows_are_cut_and_what_then_teaches_nothing_is_dropped():
    row = {"prompt": "abc", "completion": "de"}
    (e,) = encode_examples(chat_tokenizer(), row, max_length=5)
    assert (e.length, e.tokens, e.truncated) == (5, 2, True)
    assert encode_examples(chat_tokenizer(), row, max_length=3) == []
    (e,) = encode_examples(chat_tokenizer(), row, max_length=6)
    assert not e.truncated


def test_rows_that_teach_nothing_are_told_of_once(tmp_path):
    rows = [{"prompt": "12" * 9, "completion": "=3"}, {"prompt": "12", "completion": "=3"}]
    model, tokenizer = trainer_job.make_model()
    config = SFTConfig(output_dir=str(tmp_path), max_length=8, **SETTINGS | {"max_steps": 2})
    with pytest.warns(UserWarning, match="rows that teach nothing, and count as used: .* max_length = 8") as said:
        log = SFTTrainer(model, rows, config, processing_class=tokenizer).train()
    assert len({str(w.message) for w in said if "teach nothing" in str(w.message)}) == 1
    assert log[0]["learnt_tokens"] > 0


@pytest.mark.quick
def test_a_template_gets_tools_and_keywords():
    template = "{{ tools[0].name if tools else '' }}{{ hint | default('') }}" + CHATML
    row = {"messages": say("hi", "yo"), "tools": [{"name": "t"}]}
    assert learnt(row, template, template={"hint": "h"}) == ["th[u]hi<eos>\n[a]{yo<eos>}"]


WRONG = [
    ({"prompt": "a", "answer": "b"}, r"got the keys \['answer', 'prompt'\] at row 0"),
    ({"prompt": "a", "completion": ""}, "got the keys"),
    ({"prompt": "a", "completion": say("a", "b")}, "completion must be text as the prompt is"),
    ({"messages": say("a")}, "messages has no assistant message"),
    ({"messages": "a"}, "messages must be chat messages, got 'a'"),
    ({"prompt": say("a"), "completion": say("a")}, "completion has no assistant message"),
    ({"text": 3}, "text is 3"),
    ("a", "expected a dict, got 'a'"),
]


@pytest.mark.quick
@pytest.mark.parametrize(("row", "message"), WRONG, ids=str)
def test_rows_that_cannot_be_learnt_from(row, message):
    with pytest.raises(ValueError, match=f"train_dataset must have 'prompt' and 'completion', .*{message}"):
        load_examples([row])


def rows(count=10):
    return examples.problems(examples.WORLDS["sort"], count, 0)


def make_trainer(output, model=None, data=None, eval_rows=None, **settings):
    model, tokenizer = trainer_job.make_model() if model is None else model
    config = SFTConfig(output_dir=str(output), **{**SETTINGS, **settings})
    return SFTTrainer(model, rows() if data is None else data, config, eval_rows, tokenizer)


def plain_loss(model, trainer, data):
    """The mean over all learnt tokens, from full logits, a sequence at a time."""
    total, count = 0.0, 0
    for e in trainer.encode(data):
        ids = torch.tensor([e.prompt_ids + e.completion_ids])
        logp = model(input_ids=ids).logits[0, :-1].log_softmax(-1)
        taken = logp[range(e.length - 1), ids[0, 1:]][len(e.prompt_ids) - 1 :]
        total, count = total - (taken * e.importance).sum(), count + e.tokens
    return total / count


@pytest.mark.parametrize(
    "settings", [{}, {"packing": True}, {"token_budget": 16}, {"packing": True, "token_budget": 24}], ids=str
)
def test_loss_and_gradients_are_those_of_full_logits(tmp_path, settings):
    """Several rows of messages too, whose questions between answers are not learnt."""
    tokenizer = chat_tokenizer()
    torch.manual_seed(1)
    from transformers import Qwen2Config, Qwen2ForCausalLM

    model = Qwen2ForCausalLM(Qwen2Config(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64,
    )).double()  # fmt: skip
    data = [
        {"messages": say("hi", "yo", "so", "no")},
        {"messages": say("a", "bcdefg")},
        {"messages": say("abc", "d", "e", "f")},
    ]
    trainer = make_trainer(tmp_path, (model, tokenizer), data, backward="exact", **settings)
    want = plain_loss(model, trainer, data)
    want.backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    episodes = trainer.encode(data)
    numbers = trainer.learner.gradients(episodes, num_items=sum(e.tokens for e in episodes))
    assert numbers["loss"].item() == pytest.approx(want.item(), rel=1e-9)
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, expected[name], rtol=1e-7, atol=1e-10)


def test_it_learns_and_says_so(tmp_path, capsys):
    held_out = examples.load_rows("tiny:sort:test")[:20]
    trainer = make_trainer(
        tmp_path, trainer_job.make_model(dropout=0.0), eval_rows=held_out, eval_strategy="steps", eval_steps=20,
        eval_on_start=True, max_steps=40, save_strategy="no", logging_steps=20, per_device_train_batch_size=16,
    )  # fmt: skip
    before = plain_loss(trainer.model.eval(), trainer, held_out).item()
    trainer.model.train()
    log = trainer.train()
    evaluations, steps = [r for r in log if "eval/loss" in r], [r for r in log if "loss" in r]
    assert [r["step"] for r in evaluations] == [0, 20, 40]
    assert evaluations[0]["eval/loss"] == pytest.approx(before, rel=1e-5)
    after = plain_loss(trainer.model.eval(), trainer, held_out).item()
    assert evaluations[-1]["eval/loss"] == pytest.approx(after, rel=1e-5)
    assert evaluations[-1]["eval/perplexity"] == pytest.approx(math.exp(after), rel=1e-5)
    assert steps[-1]["loss"] < steps[0]["loss"] / 2
    assert steps[0]["learnt_tokens"] == 16 * 5
    assert steps[0]["length"] == 10
    assert steps[-1]["epoch"] == 40 * 16 / 10
    out = capsys.readouterr().out
    assert "step 20/40  loss " in out
    assert "tokens learnt" in out
    assert (tmp_path / "curves.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize(
    "settings", [{}, {"use_peft": True, "lora_target_modules": "all-linear"}], ids=["full", "lora"]
)
def test_resume_is_bit_exact(tmp_path, settings):
    whole, half = tmp_path / "whole", tmp_path / "half"
    make_trainer(whole, **settings).train()
    half.mkdir()
    shutil.copytree(whole / "checkpoint-3", half / "checkpoint-3")
    shutil.copy(whole / "log.jsonl", half)
    torch.manual_seed(99)
    make_trainer(half, resume_from_checkpoint=True, **settings).train()
    assert trainer_job.log_rows(half) == trainer_job.log_rows(whole)
    name = "adapter_model.safetensors" if settings else "model.safetensors"
    a, b = (load_file(x / "model" / name) for x in (whole, half))
    assert a.keys() == b.keys()
    assert all(a[k].equal(b[k]) for k in a)


@pytest.mark.parametrize(
    "settings",
    [
        {"gradient_checkpointing": True}, {"activation_offloading": True}, {"gradient_accumulation_steps": 2},
        {"bf16": True}, {"optim": "adamw_torch", "num_train_epochs": 1, "max_steps": -1},
        {"use_peft": True, "load_in_4bit": True, "lora_target_modules": "all-linear"},
    ],
    ids=str,
)  # fmt: skip
def test_options_train(tmp_path, settings):
    if "load_in_4bit" in settings:
        pytest.importorskip("bitsandbytes")
    model, tokenizer = trainer_job.make_model(dropout=0.0, width=64)
    model.save_pretrained(tmp_path / "base")
    config = SFTConfig(output_dir=str(tmp_path), **{**SETTINGS, "save_strategy": "no", **settings})
    trainer = SFTTrainer(str(tmp_path / "base"), rows(), args=config, processing_class=tokenizer)
    before = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
    log = trainer.train()
    assert len(log) == (3 if "num_train_epochs" in settings else 5)
    assert log[-1]["loss"] < log[0]["loss"]
    moved = {n for n, p in trainer.model.named_parameters() if not p.equal(before[n])}
    assert moved == {n for n in before if "lora" in n or "use_peft" not in settings}


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_to_and_fro_between_sft_and_grpo(tmp_path, lora):
    """Each starts from the model folder that the other left, tokenizer and adapter included, in one output as well."""
    model, tokenizer = trainer_job.make_model(dropout=0.0)
    model.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    options = {"use_peft": lora, "lora_target_modules": "all-linear"} if lora else {}
    options |= {"save_strategy": "no", "max_steps": 2}
    folder, weights = str(tmp_path / "base"), None
    for stage in ("sft", "grpo", "sft", "grpo"):
        output = str(tmp_path / "out")
        if stage == "sft":
            trainer = SFTTrainer(folder, rows(), SFTConfig(output_dir=output, **{**SETTINGS, **options}))
        else:
            config = GRPOConfig(output_dir=output, **{**trainer_job.SETTINGS, **options})
            trainer = GRPOTrainer(folder, trainer_job.digits, rows(), config)
        started = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
        if weights is not None:
            assert started.keys() == weights.keys()
            assert all(started[n].equal(weights[n]) for n in weights), stage
        trainer.train()
        weights = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
        assert any(not weights[n].equal(started[n]) for n in weights)
        folder = f"{output}/model"
        assert (tmp_path / "out/model/adapter_model.safetensors").is_file() == lora
        assert not list((tmp_path / "out").glob("*.part"))
    if lora:  # the base is the first one's still
        config = json.loads((tmp_path / "out/model/adapter_config.json").read_text())
        assert config["base_model_name_or_path"] == str(tmp_path / "base")


def test_the_command(tmp_path, capsys):
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows(30)))
    (tmp_path / "job.yaml").write_text(
        f"model: tiny:sort\ntrain_dataset: {tmp_path}/rows.jsonl\noutput_dir: {tmp_path}/out\nmax_steps: 2\n"
    )
    assert cli.main(["sft", str(tmp_path / "job.yaml"), "--use_cpu", "--save_strategy=no"]) == 0
    assert len(trainer_job.log_rows(tmp_path / "out")) == 2
    assert (tmp_path / "out/model/model.safetensors").is_file()
    capsys.readouterr()
    wrong = (tmp_path / "job.yaml").read_text() + "reward_funcs: exact_answer\ncompletion_only_loss: true\nbeta: 0.1\n"
    (tmp_path / "job.yaml").write_text(wrong)
    with pytest.raises(SystemExit):
        cli.main(["sft", str(tmp_path / "job.yaml")])
    said = capsys.readouterr().err
    assert "reward_funcs is not a setting: sft needs no rewards" in said
    assert "completion_only_loss is not a setting: completions alone are learnt" in said
    assert "beta is not a setting: a setting of fastgrpo train alone" in said


def test_a_job_with_an_sft_section(tmp_path):
    """SFT runs first, GRPO starts from its model; a resumed job does not run it again."""
    job = {"model": "tiny:sort", "train_dataset": "tiny:sort", "reward_funcs": "exact_answer",
           "output_dir": str(tmp_path), "use_cpu": True, "gradient_checkpointing": False, "max_steps": 2,
           "num_generations": 4, "max_completion_length": 5, "save_steps": 1,
           "sft": {"max_steps": 3, "learning_rate": 1e-3, "save_strategy": "no"}}  # fmt: skip
    (tmp_path / "job.json").write_text(json.dumps(job))  # JSON is YAML
    cli.main(["train", str(tmp_path / "job.json")])
    assert [row["step"] for row in trainer_job.log_rows(tmp_path / "sft")] == [1, 2, 3]
    assert all("reward" in row for row in trainer_job.log_rows(tmp_path))
    first = (tmp_path / "sft/log.jsonl").stat().st_mtime_ns
    shutil.rmtree(tmp_path / "checkpoint-2")
    cli.main(["train", str(tmp_path / "job.json"), "--resume"])
    assert (tmp_path / "sft/log.jsonl").stat().st_mtime_ns == first
    assert [row["step"] for row in trainer_job.log_rows(tmp_path)] == [1, 2]


def test_a_job_stopped_in_its_sft_section_goes_on_there(tmp_path, monkeypatch):
    section = {"max_steps": 3, "save_steps": 1, "learning_rate": 1e-3}
    job = {"model": "tiny:sort", "train_dataset": "tiny:sort", "reward_funcs": "exact_answer", "use_cpu": True,
           "output_dir": str(tmp_path), "max_steps": 1, "max_completion_length": 5, "save_strategy": "no",
           "sft": section}  # fmt: skip
    (tmp_path / "job.json").write_text(json.dumps(job))
    plain = SFTTrainer.after_step

    def stop(trainer):
        plain(trainer)
        if trainer.step == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(SFTTrainer, "after_step", stop)
    with pytest.raises(KeyboardInterrupt):
        cli.main(["train", str(tmp_path / "job.json")])
    monkeypatch.setattr(SFTTrainer, "after_step", plain)
    seen = []
    monkeypatch.setattr(
        SFTTrainer, "learn", lambda trainer, e: (seen.append(trainer.step), GRPOTrainer.learn(trainer, e))[1]
    )
    assert cli.main(["train", str(tmp_path / "job.json"), "--resume"]) == 0
    assert seen == [2]
    assert [row["step"] for row in trainer_job.log_rows(tmp_path)] == [1]


@pytest.mark.quick
def test_a_section_takes_the_model_s_settings_and_not_the_speed():
    from fastgrpo.trainer.sft import make_config

    config = GRPOConfig(
        use_peft=True, lora_r=4, learning_rate=1e-6, adam_beta2=0.95, max_steps=9, output_dir="o", seed=7
    )
    section = make_config({"max_steps": 3, "train_dataset": "x"}, config)
    assert (section.use_peft, section.lora_r, section.adam_beta2, section.seed) == (True, 4, 0.95, 7)
    assert (section.learning_rate, section.max_steps, section.output_dir) == (2e-5, 3, "o/sft")


def test_chat_template_and_end_token_of_a_base_model(tmp_path):
    (tmp_path / "t.jinja").write_text(
        "{% for m in messages %}{{ m.content }}{% endfor %}{% if add_generation_prompt %}={% endif %}"
    )
    model, tokenizer = trainer_job.make_model()
    data = [{"prompt": say("12"), "completion": "12"}]
    with pytest.raises(ValueError, match="eos_token must be a token of the tokenizer, got '<end>'"):
        make_trainer(tmp_path, (model, tokenizer), data, eos_token="<end>")
    trainer = make_trainer(
        tmp_path, (model, tokenizer), data, chat_template_path=str(tmp_path / "t.jinja"), eos_token="<bos>", max_steps=1
    )
    (e,) = trainer.encode(data)
    assert tokenizer.convert_ids_to_tokens(e.prompt_ids + e.completion_ids) == [*"12=12", "<bos>"]
    trainer.train()
    from transformers import AutoTokenizer

    saved = AutoTokenizer.from_pretrained(tmp_path / "model")
    assert (saved.eos_token, saved.chat_template) == ("<bos>", tokenizer.chat_template)


def test_a_sequence_without_room_is_found_before_the_first_step(tmp_path):
    data = [{"prompt": "1" * 60, "completion": "23456"}]
    with pytest.raises(ValueError, match="max_length must be at most the model's 64 positions: a sequence has 66"):
        make_trainer(tmp_path, data=data)
    make_trainer(tmp_path, data=data, max_length=64)


def test_names_and_defaults_are_trl_s():
    trl = pytest.importorskip("trl", minversion="1.16.0")
    import dataclasses

    theirs = {f.name: f.default for cls in (trl.ModelConfig, trl.SFTConfig) for f in dataclasses.fields(cls)}
    ours = {f.name: f.default for f in dataclasses.fields(SFTConfig)}
    shared = ours.keys() & theirs.keys()
    assert len(shared) > 45
    differ = {name: ours[name] for name in shared if ours[name] != theirs[name]}
    # TRL's Trainer draws rows at random whatever shuffle_dataset says, which shuffles them once before
    assert differ == {"output_dir": "trainer_output", "packing": "auto", "shuffle_dataset": True}
    assert not SFTConfig.advice.keys() & ours.keys()
    own = {f.name for f in dataclasses.fields(trl.SFTConfig)} - {f.name for f in dataclasses.fields(trl.GRPOConfig)}
    assert own - ours.keys() <= SFTConfig.advice.keys()  # what only TRL's SFTTrainer has is never just unknown


@pytest.mark.quick
def test_presets():
    """Their settings are legal (8-bit paging aside, which needs a GPU), and each command names its own."""
    pytest.importorskip("peft")
    job, config = load_config("sft", {"optim": "adamw_torch"}, "sft")
    assert job == {}
    assert (config.use_peft, config.max_length) == (True, 2048)
    assert preset_names("sft") == ["sft", "sft-tiny"]
    assert "sft" not in preset_names("train")

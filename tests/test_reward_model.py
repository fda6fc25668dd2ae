"""A sequence classifier as a reward, against the classifier itself, one sequence at a time."""

import pytest
import torch
import transformers

from fastgrpo.trainer import rewards
from fastgrpo.trainer.rewards import resolve

pytestmark = pytest.mark.quick

TEMPLATE = (
    "{% for m in messages %}{{ m['content'] }}{{ '<eos>' if m['role'] == 'assistant' else ' ' }}{% endfor %}"
    "{{ hint | default('') }}"
)


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Real memory: transformers fills what it allocates."""
    torch.manual_seed(0)


def tiny_classifier(path, labels=1, pad="<pad>"):
    words = ["<pad>", "<eos>", *"abcdefgh "]
    tokenizer = transformers.Qwen2Tokenizer(
        vocab={w.replace(" ", "Ġ"): i for i, w in enumerate(words)}, merges=[], pad_token=pad, eos_token="<eos>",
        unk_token=None,
    )  # fmt: skip
    tokenizer.pad_token = pad
    tokenizer.chat_template = TEMPLATE
    config = transformers.Qwen2Config(
        vocab_size=16, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1,
        num_key_value_heads=1, num_labels=labels, pad_token_id=None, eos_token_id=1,
    )  # fmt: skip
    transformers.Qwen2ForSequenceClassification(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


def plain(path, text):
    """The classifier's output at a text's last token, from its hidden states and its head."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(path).eval()
    ids = tokenizer(text, return_tensors="pt").input_ids
    return model.score(model.model(input_ids=ids).last_hidden_state)[0, -1, 0].item()


PROMPTS, COMPLETIONS = ["ab", "a", "abc", "hh"], ["cd", "h", "defgh", "gfedcba"]


@pytest.mark.parametrize("pad", ["<pad>", None])
@pytest.mark.parametrize("size", [1, 3, 8])
def test_texts(tmp_path, size, pad):
    path = tiny_classifier(tmp_path, pad=pad)
    model = resolve({"name": "reward_model", "path": path, "batch_size": size, "device": "cpu"})
    values = model(prompts=PROMPTS, completions=COMPLETIONS, completion_ids=None)
    assert values == pytest.approx([plain(path, p + c) for p, c in zip(PROMPTS, COMPLETIONS)], abs=1e-6)
    assert len(set(values)) == 4


@pytest.mark.parametrize("pad", ["<pad>", None])
def test_chats_go_through_its_own_template(tmp_path, pad):
    """Whose last token ends a turn: without a padding token that must not be taken for padding."""
    path = tiny_classifier(tmp_path, pad=pad)
    prompts = [[{"role": "user", "content": text}] for text in PROMPTS]
    completions = [[{"role": "assistant", "content": text}] for text in COMPLETIONS]
    model = resolve({"name": "reward_model", "path": path, "device": "cpu"})
    want = [plain(path, f"{p} {c}<eos>") for p, c in zip(PROMPTS, COMPLETIONS)]
    assert model(prompts, completions) == pytest.approx(want, abs=1e-6)
    hinted = resolve({"name": "reward_model", "path": path, "device": "cpu", "chat_template_kwargs": {"hint": "g"}})
    assert hinted(prompts[:1], completions[:1]) == pytest.approx([plain(path, "ab cd<eos>g")], abs=1e-6)


def test_long_sequences_are_cut(tmp_path):
    path = tiny_classifier(tmp_path)
    model = resolve({"name": "reward_model", "path": path, "device": "cpu", "max_length": 4})
    assert model(["abc", "a"], ["defgh", "b"]) == pytest.approx([plain(path, "abcd"), plain(path, "ab")], abs=1e-6)


def test_options_of_the_model(tmp_path):
    path = tiny_classifier(tmp_path)
    model = resolve({"name": "reward_model", "path": path, "device": "cpu", "dtype": "bfloat16"})
    (value,) = model(["ab"], ["cd"])
    want = plain(path, "abcd")
    assert value != want
    assert value == pytest.approx(want, rel=0.05, abs=0.01)


def test_it_goes_to_the_gpu_of_its_rank(tmp_path, monkeypatch):
    """Rewards are made before the rank's GPU becomes the current one: placed then, all would share the first."""
    model, places = resolve({"name": "reward_model", "path": tiny_classifier(tmp_path)}), []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.nn.Module, "to", lambda module, device: places.append(device))
    model(prompts=["ab"], completions=["cd"], completion_ids=None)
    assert places == ["cuda"]
    monkeypatch.undo()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    resolve({"name": "reward_model", "path": str(tmp_path)})  # without a call nothing is placed


def test_a_classifier_with_two_labels_is_no_reward_model(tmp_path):
    with pytest.raises(ValueError, match="must have one label to be a reward model, got 2"):
        rewards.reward_model(tiny_classifier(tmp_path, labels=2))

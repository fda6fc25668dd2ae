"""The memory model of a preset's run: its stored parts are those of real tensors, and a preset for 16 GB fits there."""

import pytest
import torch

for package in ("accelerate", "peft", "matplotlib"):
    pytest.importorskip(package)

from bench import room  # noqa: E402
from bench.shapes import SHAPES, Shape, build_model  # noqa: E402
from fastgrpo.trainer import model as models  # noqa: E402

SMALL = Shape("small", "qwen2", 512, 128, 256, 2, 4, 2, 32, True)
CARD = 16 * room.GIB


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Real memory: transformers fills what it allocates."""


@pytest.mark.quick
def test_the_preset_for_16_gb_fits():
    small, large = (room.total(room.parts("gsm8k-4bit", SHAPES[name])) for name in ("Qwen2.5-1.5B", "Qwen2.5-7B"))
    assert 3 * room.GIB < small < CARD / 2  # "auto" lets the budget grow from here
    assert small < large
    assert room.total(room.parts("gsm8k", SHAPES["Qwen2.5-1.5B"])) < CARD
    assert all(part.source for group in room.parts("gsm8k-4bit", SMALL) for part in group)


def test_what_is_stored(tmp_path):
    """Of a model in 4 bits as the trainer prepares it."""
    bitsandbytes = pytest.importorskip("bitsandbytes")
    from fastgrpo.trainer import GRPOConfig

    build_model(SMALL, torch.bfloat16, "cpu").save_pretrained(tmp_path)
    config = GRPOConfig(
        dtype="bfloat16", use_peft=True, lora_target_modules="all-linear", load_in_4bit=True, use_cpu=True
    )
    model = models.make_trainable(models.load_model(str(tmp_path), config, torch.device("cpu")), config)
    packed = [m for m in model.modules() if isinstance(m, bitsandbytes.nn.Linear4bit)]
    bytes_packed = sum(sum(x.numel() * x.element_size() for x in tensors_of(m.weight)) for m in packed)
    want = {part.name: part.bytes for part in room.stored(SMALL, {"load_in_4bit": True})}
    # blocks of 64 weights a scale, of 256 scales another: here their ends are not full, and a table each
    assert want["linear layers in 4 bits"] == pytest.approx(bytes_packed, rel=0.15)
    trained = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    assert want["adapter and its gradients, fp32"] == 2 * trained
    skipped = {id(m.weight) for m in packed}
    rest = sum(p.numel() * p.element_size() for p in model.parameters() if not p.requires_grad and id(p) not in skipped)
    head = SMALL.vocab * SMALL.width * 2
    assert want["other weights, fp32"] == rest + head


def tensors_of(weight):
    state = weight.quant_state
    return weight.data, state.absmax, state.state2.absmax


def test_the_command(capsys):
    room.main(["gsm8k-4bit", "--card", "2"])
    said = capsys.readouterr().out
    assert "arXiv:2305.14314" in said
    assert "GiB of 2: too large" in said

"""Every causal LM of transformers answers with the numbers of its own logits, or is refused when it is fused."""

import inspect
import pickle
import re
from pathlib import Path

import pytest
import torch
import transformers
from transformers import Qwen2Config, Qwen2ForCausalLM
from transformers.modeling_outputs import CausalLMOutput

from fastgrpo.integrations.heads import logit_options
from fastgrpo.integrations.transformers import fuse_lm_head, is_fused

import causal_lms

FAMILIES = [
    "Bamba", "Beam", "Bert:BertLMHeadModel", "Cohere", "Cohere2", "FalconH1", "GPT2:GPT2LMHeadModel", "GPTNeoX",
    "Gemma2", "Gemma3Text:Gemma3ForCausalLM", "Gemma4Text:Gemma4ForCausalLM", "Granite", "GraniteMoe", "HyperCLOVAX",
    "InklingText:InklingForCausalLM", "Inkling2Text:Inkling2ForCausalLM", "Llama", "Llama4Text:Llama4ForCausalLM",
    "Mamba", "MiniCPM3", "NanoChat", "OPT", "Phi", "Qwen3Moe", "RecurrentGemma", "Whisper", "xLSTM",
]  # fmt: skip
PINNED = re.search(r"^transformers==(\S+)", (Path(__file__).parents[1] / "requirements.txt").read_text(), re.M)[1]
REFUSED = {
    "DoryForCausalLM", "Gemma4UnifiedAssistantForCausalLM", "MusicgenForCausalLM", "MusicgenMelodyForCausalLM",
    "ProphetNetForCausalLM",
}  # fmt: skip
# timm is not installed; a drafter that runs on another model's cache
NOT_BUILT = {"Gemma3nForConditionalGeneration", "Gemma4AssistantForCausalLM"}


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Real memory: transformers fills what it allocates."""


def make(family):
    config, _, name = family.partition(":")
    names = f"{config}Config", name or f"{config}ForCausalLM"
    if not all(hasattr(transformers, x) for x in names):
        pytest.skip(f"transformers {transformers.__version__} has no {names[1]}")
    return causal_lms.make(*(getattr(transformers, x) for x in names))


@pytest.mark.works("transformers", "fuse_lm_head: log-probs, entropy and gradients of 27 model families' own logits")
@pytest.mark.parametrize("family", FAMILIES)
def test_gradients(family):
    causal_lms.assert_same(fuse_lm_head(make(family)), causal_lms.tokens())


@pytest.mark.quick
@pytest.mark.parametrize("family", FAMILIES)
def test_pickle(family):
    """What comes back is fused, answers alike, and neither has another signature than the class."""
    model, ids = make(family), causal_lms.tokens()
    signature = inspect.signature(model.forward)
    twin = pickle.loads(pickle.dumps(fuse_lm_head(model)))
    assert is_fused(twin)
    assert inspect.signature(model.forward) == inspect.signature(twin.forward) == signature
    with torch.no_grad():
        ours, theirs = (m(input_ids=ids, labels=ids, fastgrpo=True) for m in (twin, model))
        model.get_output_embeddings().weight.zero_()
        again = twin(input_ids=ids, labels=ids, fastgrpo=True)
    assert ours.logprobs.equal(theirs.logprobs)
    assert again.logprobs.equal(ours.logprobs)


@pytest.mark.works("transformers", "fuse_lm_head: all causal LM classes but 7 of 185; 5 of them are refused")
def test_every_class():
    """Log-probs and entropy against the logits' own, on a tiny random model of each class."""
    outcomes = {c.__name__: causal_lms.outcome(c, kind) for c, kind in causal_lms.classes().items()}
    odd = {name: why for name, why in outcomes.items() if why[0] != "equal"}
    refused, not_built = ({n for n, (what, _) in odd.items() if what == why} for why in ("refused", "not built"))
    assert {n: why for n, why in odd.items() if n not in refused | not_built} == {}
    if transformers.__version__ == PINNED:
        assert (len(outcomes), refused, not_built) == (185, REFUSED, NOT_BUILT)
    else:
        assert refused | not_built >= REFUSED & outcomes.keys()


class Changed(Qwen2ForCausalLM):
    """A model from outside transformers, which does ``change`` to its head's output."""

    def __init__(self, config, change):
        super().__init__(config)
        self.change, self.norm = change, torch.nn.LayerNorm(config.vocab_size)

    def forward(self, input_ids, **_):
        hidden = self.model(input_ids=input_ids).last_hidden_state
        return CausalLMOutput(logits=self.change(self, hidden))


def build_changed(change):
    torch.manual_seed(3)
    model = Changed(causal_lms.config_of(Qwen2Config), change).eval()
    model.lm_head.weight.data.mul_(30)
    return model


@pytest.mark.quick
@pytest.mark.parametrize(
    "change",
    [
        lambda m, h: m.lm_head(h).relu(),
        lambda m, h: m.lm_head(h) + 1,
        lambda m, h: m.lm_head(h).clamp(max=50),
        lambda m, h: m.lm_head(h).masked_fill(torch.arange(97) == 5, -1e9),
        lambda m, h: m.lm_head(h) * torch.linspace(1, 2, 97),
        lambda m, h: m.norm(m.lm_head(h)),
        lambda m, h: m.lm_head(h) + m.lm_head(h),
        lambda m, h: torch.nn.functional.linear(h, m.lm_head.weight),
        lambda m, h: m.lm_head(h.flatten(0, 1)),
        lambda m, h: m.lm_head(h)[:, -1:],
        lambda m, h: 0 * m.lm_head(h),
        lambda m, h: m.lm_head(h)[..., 7:],
        lambda m, h: m.lm_head(h).flip(-1),
        lambda m, h: m.lm_head(h) * h.mean(-1, keepdim=True),
        lambda m, h: m.lm_head(h).log_softmax(-1),
    ],
)
def test_what_the_op_would_not_reproduce_is_refused(change):
    with pytest.raises(ValueError, match=r"model's forward must call its LM head once.*asked Changed"):
        fuse_lm_head(build_changed(change))


@pytest.mark.quick
@pytest.mark.parametrize(
    ("change", "softcap", "scale", "columns"),
    [
        (lambda m, h: m.lm_head(2 * h).float(), None, 1.0, None),
        (lambda m, h: m.lm_head(h)[..., :90] / 7, None, 1 / 7, 90),
        (lambda m, h: torch.tanh(m.lm_head(h) * 0.3 / 5) * 5, 5.0, 0.3, None),
        (lambda m, h: m.lm_head(torch.nn.functional.layer_norm(h, (32,))) * -2, None, -2.0, None),
    ],
)
def test_a_model_from_outside(change, softcap, scale, columns):
    model = build_changed(change)
    options, kept = logit_options(model)
    assert options == {"softcap": softcap, "logit_scale": pytest.approx(scale, rel=2e-7)}
    assert kept == columns
    assert causal_lms.error(model) < 1e-4


def test_a_head_that_is_not_linear_is_refused():
    class NormHead(torch.nn.Linear):
        def forward(self, x):
            return torch.nn.functional.linear(x, torch.nn.functional.normalize(self.weight))

    model = make("Qwen2")
    model.lm_head = NormHead(32, 97, bias=False)
    with pytest.raises(ValueError, match=r"LM head must be a torch.nn.Linear, got NormHead"):
        fuse_lm_head(model)


def test_numbers_come_from_the_config_without_rounding():
    model = make("FalconH1")
    for scale in (0.0390625, 0.1234567890123, 1 / 3):
        model.model.lm_head_multiplier = model.config.lm_head_multiplier = scale
        assert logit_options(model)[0]["logit_scale"] == scale


@pytest.mark.quick
def test_on_the_meta_device():
    """Fused before its weights exist, as a launcher that shards them at once does."""
    with torch.device("meta"):
        model = Qwen2ForCausalLM(causal_lms.config_of(Qwen2Config))
    fuse_lm_head(model)
    model.load_state_dict(make("Qwen2").state_dict(), assign=True)
    model.model.rotary_emb = make("Qwen2").model.rotary_emb
    assert causal_lms.error(model) < 1e-4

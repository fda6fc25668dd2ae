"""How a causal LM makes logits of its head's output, found when it is fused: scale, softcap, vocabulary.

Configs name these numbers in a dozen ways, and what divides in one family multiplies in the next. So the class's own
forward is asked: it runs on a shadow of the model whose decoder and head are stubs, without a parameter being read,
which serves code outside transformers, the meta device and shards too. What it finds, in transformers 5.24:

    softcap * tanh(x / softcap)   Gemma 2, 3, 3n, 4, VaultGemma, RecurrentGemma, NanoChat, Beam, Inkling 2, its loop,
                                  xLSTM, Mistral Large 4; of a scaled x: Muse Spark, Muse Glimmer
    scale * x                     Cohere, Cohere 2, HyperCLOVAX, Falcon-H1
    x / scale                     Granite, its MoE, hybrid and SWA kin
    x[..., :vocabulary]           Inkling, Inkling 2
    x                             all others, among them those that scale before the head (MiniCPM3, Inkling)
    refused                       ProphetNet (n-gram streams), Musicgen (several heads), Chameleon (masked columns),
                                  Dory (a learned scale of each token's logit)
"""

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from fastgrpo.inputs import check_scalar

PROBES = (0.0, 2.0**-10, -(2.0**-10), 1.0, -1.0, 30.0, -30.0, 1e3, -1e3, 2.0**24)  # exact in fp32


class Decoded(dict):
    """A decoder's output: the last hidden state, and None for everything else."""

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return self.get(name)

    def __getitem__(self, key):
        return self.get(key) if isinstance(key, str) else (self.last_hidden_state, None)[key]


class Stub(nn.Module):
    """In place of a layer: a decoder gives hidden states, any other its input; attributes are the layer's own."""

    original: Any
    asked: Any  # the Question

    def __init__(self, original, asked):
        super().__init__()
        self.__dict__["original"], self.__dict__["asked"] = original, asked

    def forward(self, *args, **kwargs):
        if self.asked.calls:
            raise ValueError(f"{type(self.original).__name__}, a layer with weights, follows the LM head")
        tensors = [x for x in args if isinstance(x, torch.Tensor) and x.is_floating_point()]
        if tensors and not isinstance(self.original, PreTrainedModel):
            return tensors[0]
        return Decoded(last_hidden_state=self.asked.hidden)

    def __getattr__(self, name) -> Any:
        value = getattr(self.original, name)
        return Stub(value, self.asked) if isinstance(value, nn.Module) else value


class ProbeHead(Stub):
    """In place of the head: whatever it gets, it gives the probes."""

    def forward(self, hidden, *args, **kwargs):
        self.asked.calls += 1
        if hidden.shape[:-1] != self.asked.hidden.shape[:-1]:
            expected = tuple(self.asked.hidden.shape)
            raise ValueError(f"the LM head must get (B, T, D), got {tuple(hidden.shape)} for {expected}")
        return self.asked.x[None].clone()


class Question:
    """A model asked for the logits that it makes where its head gives x: a row each of the probes and a ramp."""

    def __init__(self, model):
        self.model, self.head, self.calls = model, model.get_output_embeddings(), 0
        rows, columns, width = len(PROBES) + 1, self.head.out_features, self.head.in_features
        ramp = torch.linspace(-1, 1, columns)  # a column that moves shows
        self.x = torch.cat([torch.tensor(PROBES)[:, None].expand(-1, columns), ramp[None]])
        self.hidden = torch.linspace(-1, 1, rows * width).view(1, rows, width)  # what depends on it differs by row

    def shadow(self, module):
        """A copy whose head is a probe and whose layers with weights are stubs; modules around the head stay."""
        if module is self.head:
            return ProbeHead(module, self)
        if all(m is not self.head for m in module.modules()):
            return Stub(module, self) if any(True for _ in module.parameters()) else module
        copy = object.__new__(type(module))
        children = {name: child if child is None else self.shadow(child) for name, child in module._modules.items()}
        bare = {"_modules": children, "_parameters": {}, "_forward_hooks": {}, "_forward_pre_hooks": {}}
        copy.__dict__ |= {k: v for k, v in module.__dict__.items() if k != "forward"} | bare
        return copy

    @torch.no_grad()
    def logits(self):
        """(P + 1, V) float64."""
        ids = torch.zeros(self.hidden.shape[:-1], dtype=torch.int64)
        with torch.autocast("cpu", enabled=False), torch.device("cpu"):
            logits = self.shadow(self.model)(input_ids=ids, use_cache=False, return_dict=True).logits
        if self.calls != 1:
            raise ValueError(f"its forward must call the LM head once, got {self.calls} calls")
        if logits.shape[:-1] != ids.shape:
            raise ValueError(f"its logits must be (B, T, V), got {tuple(logits.shape)} for B, T = {tuple(ids.shape)}")
        return logits[0].double()


def fit(x, logits, numbers):
    """-> {"softcap", "logit_scale"} with ``logits = cap(scale * x)``, or ValueError where they are not that."""
    small, large = PROBES.index(2.0**-10), PROBES.index(2.0**24)
    scale = exact(logits[small, 0] / x[small, 0], numbers)
    top = exact(logits[large, 0], numbers)
    softcap = top if abs(top) < 0.9 * abs(scale * x[large, 0]) else None
    check_scalar("logit_scale", scale, positive=False)
    z = scale * x
    expected = z if softcap is None else softcap * (z / softcap).tanh()
    wrong = ~torch.isclose(logits, expected, rtol=1e-5, atol=1e-7)
    if wrong.any():
        was, got, fitted = (t[wrong][0].item() for t in (x, logits, expected))
        raise ValueError(f"the head's output {was} became logit {got}, not {fitted} (scale {scale}, softcap {softcap})")
    return {"softcap": softcap, "logit_scale": scale}


def exact(found, numbers):
    """What was found in fp32, without its rounding: the config's number that it stands for, if there is one."""
    found = found.item()
    near = [n for n in numbers if abs(n - found) <= 1e-6 * abs(n)]
    return min(near, key=lambda n: abs(n - found), default=found)


def numbers(config):
    """The numbers of a config, and their reciprocals."""
    values = [float(v) for v in config.get_text_config().to_dict().values() if isinstance(v, (int, float)) and v]
    return values + [1 / v for v in values]


def logit_options(model: Any) -> tuple[dict[str, Any], int | None]:
    """How a model's forward turns its LM head's output x into logits.

    Returns:
        {"softcap": float or None, "logit_scale": float}, keywords of the op, and how many columns are kept, None for
        all: ``logits = softcap * tanh(logit_scale * x / softcap)[..., :columns]``.

    Raises:
        ValueError: it does something else, which the op would not reproduce.
    """
    try:
        question = Question(model)
        logits = question.logits()
        columns = logits.shape[-1]
        options = fit(question.x[:, :columns].double(), logits, numbers(model.config))
        return options, None if columns == question.x.shape[1] else columns
    except Exception as error:
        raise ValueError(
            f"model's forward must call its LM head once, on (B, T, D), and then only scale, softcap or cut its "
            f"output; asked {type(model).__name__}, which ended in {type(error).__name__}: {error}"
        ) from error

"""How a causal LM makes logits of its head's output, found when it is fused: scale, softcap, vocabulary.

Configs name these numbers in a dozen ways, and what divides in one family multiplies in the next. So the class's own
forward is asked: it runs on a shadow of the model whose decoder and head are stubs, without a parameter being read,
which serves code outside transformers, the meta device and shards too. What it finds, in transformers 5.23:

    softcap * tanh(x / softcap)   Gemma 2, 3, 3n, 4, VaultGemma, RecurrentGemma, NanoChat, Beam, Inkling 2, xLSTM
    scale * x                     Cohere, Cohere 2, HyperCLOVAX, Falcon-H1
    x / scale                     Granite, its MoE, hybrid and SWA kin
    x[..., :vocabulary]           Inkling, Inkling 2
    x                             all others, among them those that scale before the head (MiniCPM3, Inkling)
    refused                       ProphetNet (n-gram streams), Musicgen (several heads), Chameleon (masked columns)
"""

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

    def __init__(self, original, asked):
        super().__init__()
        self.__dict__["original"], self.__dict__["asked"] = original, asked

    def forward(self, *args, **kwargs):
        if self.asked.calls:
            raise ValueError(f"{type(self.original).__name__}, a layer with weights, follows the LM head")
        tensors = [x for x in args if isinstance(x, torch.Tensor) and x.is_floating_point()]
        if tensors and not isinstance(self.original, PreTrainedModel):
            return tensors[0]
        return Decoded(last_hidden_state=torch.zeros(1, len(PROBES), self.asked.width))

    def __getattr__(self, name):
        value = getattr(self.original, name)
        return Stub(value, self.asked) if isinstance(value, nn.Module) else value


class ProbeHead(Stub):
    """In place of the head: row p of its output holds ``PROBES[p]`` in every column."""

    def forward(self, hidden, *args, **kwargs):
        self.asked.calls += 1
        if hidden.shape[:-1] != (1, len(PROBES)):
            raise ValueError(f"the LM head must get (B, T, D), got {tuple(hidden.shape)} for T = {len(PROBES)}")
        return torch.tensor(PROBES)[None, :, None].repeat(1, 1, self.asked.vocabulary)


class Question:
    """A model asked for the logits that it makes where its head gives ``PROBES``."""

    def __init__(self, model):
        self.model, self.head, self.calls = model, model.get_output_embeddings(), 0
        self.vocabulary, self.width = self.head.out_features, self.head.in_features

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
        """(P, V) float64."""
        ids = torch.zeros(1, len(PROBES), dtype=torch.int64)
        with torch.autocast("cpu", enabled=False), torch.device("cpu"):
            logits = self.shadow(self.model)(input_ids=ids, use_cache=False, return_dict=True).logits
        if self.calls != 1:
            raise ValueError(f"its forward must call the LM head once, got {self.calls} calls")
        if logits.shape[:-1] != ids.shape:
            raise ValueError(f"its logits must be (B, T, V), got {tuple(logits.shape)} for B, T = {tuple(ids.shape)}")
        return logits[0].double()


def fit(logits, numbers):
    """-> {"softcap", "logit_scale"} with ``logits = cap(scale * PROBES)``, or ValueError where they are not that."""
    x = torch.tensor(PROBES, dtype=torch.float64)
    if not (logits == logits[:, :1]).all():
        raise ValueError("single columns of its logits are changed")
    y = logits[:, 0]
    scale, top = exact(y[1] / x[1], numbers), exact(y[-1], numbers)
    softcap = top if abs(top) < 0.9 * abs(scale * x[-1]) else None
    check_scalar("logit_scale", scale, positive=False)
    z = scale * x
    expected = z if softcap is None else softcap * (z / softcap).tanh()
    if not torch.allclose(y, expected, rtol=1e-5, atol=1e-9):
        raise ValueError(f"the head's outputs {x.tolist()} became logits {y.tolist()}")
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


def logit_options(model):
    """How a model's forward turns its LM head's output x into logits.

    Returns:
        {"softcap": float or None, "logit_scale": float}, keywords of the op, and the number of columns that are kept:
        ``logits = softcap * tanh(logit_scale * x / softcap)[..., :columns]``.

    Raises:
        ValueError: it does something else, which the op would not reproduce.
    """
    try:
        logits = Question(model).logits()
        return fit(logits, numbers(model.config)), logits.shape[-1]
    except Exception as error:
        raise ValueError(
            f"model's forward must call its LM head once, on (B, T, D), and then only scale, softcap or cut its "
            f"output; asked {type(model).__name__}, which ended in {type(error).__name__}: {error}"
        ) from error

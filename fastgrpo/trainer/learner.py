"""The learner: from scored answers to gradients, skipping what cannot have one, in micro-batches of a token budget."""

import math
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import compress
from operator import not_
from typing import Any, Literal

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils.rnn import pad_sequence

from fastgrpo import GRPOLossConfig, grpo_loss, linear_logprobs
from fastgrpo.divergence import TeacherHead
from fastgrpo.head import compute_dtype
from fastgrpo.inputs import IGNORE, Backend, Backward
from fastgrpo.integrations.transformers import check_fused
from fastgrpo.trainer import shared_prompts
from fastgrpo.trainer.model import reshard
from fastgrpo.weights import Totals, share_of_batch

AUTO_BUDGET = 8192  # tokens of a micro-batch that "auto" starts from
LOSS_SCALE, SCALE_GROWTH = 2.0**16, 2000  # of fp16, and after how many steps without an overflow it doubles: torch's
EXTREMES = ("ratio_min", "ratio_max")
STATE = ("budget", "limit", "loss_scale", "fitted")
KNOWN = {  # grpo_loss's name of what an episode knows of its tokens
    "old_logprobs": "old",
    "ref_logprobs": "ref",
    "ref_hidden": "ref_hidden",
    "sampling_logprobs": "sampler",
    "importance_weights": "importance",
}
# out of memory as cuBLAS, Triton and the driver say it, which allocate beside torch
NO_MEMORY = ("CUBLAS_STATUS_ALLOC_FAILED", "CUDA error: out of memory", "[CUDA]: out of memory")


@dataclass
class Episode:
    """One answer and what is known of it. Tensors are on the CPU, (completion length,) float32 but where said."""

    prompt_ids: list[int]
    completion_ids: list[int]
    advantage: float = 0.0
    spread: bool = True  # the rewards of its group differ
    counts: bool = True  # False: masked, a truncated answer
    mask: torch.Tensor | None = None  # bool, the tokens that count; None: all. A conversation's other turns do not
    finished: bool = True
    rewards: list[float] = field(default_factory=list)  # one a reward function, NaN: cannot score
    entropy: float = 0.0  # of the distributions it was sampled from, summed over its tokens (nats)
    sampler: torch.Tensor | None = None  # log-probs of the sampler
    old: torch.Tensor | None = None  # of the policy that sampled; None: the current one
    ref: torch.Tensor | None = None
    teacher_prompt_ids: list[int] | None = None  # where a teacher sees another prompt
    ref_hidden: torch.Tensor | None = None  # (completion length, D), the dtype they are computed in
    importance: torch.Tensor | None = None

    @property
    def length(self) -> int:
        return len(self.prompt_ids) + len(self.completion_ids)

    @property
    def tokens(self) -> int:
        if self.mask is not None and self.counts:
            return int(self.mask.sum())
        return len(self.completion_ids) if self.counts else 0

    @property
    def targets(self) -> torch.Tensor:
        """(completion length,) int64"""
        ids = torch.tensor(self.completion_ids)
        counts = torch.full(ids.shape, self.counts) if self.mask is None else self.mask.bool() & self.counts
        return ids.where(counts, IGNORE)


def needs_learning(episode: Episode, config: GRPOLossConfig) -> bool:
    """Whether a gradient can come from an episode: no advantage, no KL, no bonus is no gradient, exactly."""
    return episode.tokens > 0 and (episode.advantage != 0 or config.beta > 0 or config.entropy_coef != 0)


def micro_batches(episodes: list[Episode], budget: int, packed: bool) -> list[list[Episode]]:
    """Episodes, longest first, in lists of at most ``budget`` tokens: packed first-fit, or padded to their longest."""
    batches, room = [], []
    for episode in sorted(episodes, key=lambda e: -e.length):
        slots = range(len(batches)) if packed else range(len(batches))[-1:]
        size = episode.length if packed or not batches else batches[-1][0].length
        index = next((i for i in slots if room[i] >= size), None)
        if index is None:
            batches.append([])
            room.append(budget)
            index, size = len(batches) - 1, episode.length
        batches[index].append(episode)
        room[index] -= size
    return batches


def tokens(batch, packed):
    """What a micro-batch takes of the budget: the first is the longest."""
    return sum(e.length for e in batch) if packed else batch[0].length * len(batch)


def collate(
    episodes: list[Episode], packed: bool, device: torch.device, share: bool = False
) -> tuple[dict[str, Any], dict[str, Any]]:
    """-> inputs of the model, and keyword arguments of ``grpo_loss``: position t predicts the token at t + 1.

    Padded (B, T): padding is on the right, where a causal model needs no mask. Packed (1, N): ``position_ids`` start
    again at every episode, from which transformers makes block-diagonal attention (or flash-attn's lengths). Packed and
    ``share``: the row of :mod:`fastgrpo.trainer.shared_prompts`, and (1, N) of the answers' tokens alone.
    """

    def join(rows, fill=0):
        rows = [torch.as_tensor(row) for row in rows]
        joined = torch.cat(rows)[None] if packed else pad_sequence(rows, batch_first=True, padding_value=fill)
        return joined.to(device, non_blocking=True)

    def align(values, fill=0):
        if any(v is None for v in values):
            return None
        edges = [(0, 0) if share else (len(e.prompt_ids) - 1, 1) for e in episodes]
        return join([torch.cat((rows(v, a, fill), v, rows(v, b, fill))) for v, (a, b) in zip(values, edges)], fill)

    known = {
        "targets": align([e.targets for e in episodes], IGNORE),
        **{name: align([getattr(e, field) for e in episodes]) for name, field in KNOWN.items()},
        "advantages": torch.tensor([[e.advantage] for e in episodes], device=device),
    }
    if packed:
        lengths = torch.tensor([0] + [len(e.completion_ids) if share else e.length for e in episodes], device=device)
        known["cu_seqlens"] = lengths.cumsum(0).to(torch.int32)
    if share:
        return shared_prompts.lay_out(episodes, device), known
    inputs: dict[str, Any] = {"input_ids": join([e.prompt_ids + e.completion_ids for e in episodes])}
    if packed:
        inputs["position_ids"] = join([torch.arange(e.length) for e in episodes])
    return inputs, known


def rows(like, count, fill):
    return like.new_full((count, *like.shape[1:]), fill)


class Learner:
    """Forward and backward passes of a model patched by ``fuse_lm_head``.

    Args:
        model: prepared by ``accelerator``.
        config: the :class:`fastgrpo.GRPOLossConfig`.
        budget: tokens of a micro-batch, or "auto": grows on a GPU while its memory allows.
        packed: see :func:`collate`. skip: leave out what cannot have a gradient.
        offload: keep activations in host memory until the backward.
        share_prompts: answers behind one copy of what they begin with, packed; "auto": where the model can.
        longest: tokens of a prompt and its answer.
        half: compute in fp16; always where weights are. Its numbers end at 6e-8 and 65504, so the loss is scaled up and
            the gradients, of fp32 weights, down again; see :meth:`overflowed`.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        accelerator: Accelerator,
        config: GRPOLossConfig,
        budget: int | Literal["auto"] = "auto",
        packed: bool = False,
        skip: bool = True,
        offload: bool = False,
        backend: Backend = "auto",
        backward: Backward = "auto",
        share_prompts: shared_prompts.Share = False,
        longest: int = 0,
        half: bool = False,
    ) -> None:
        self.model, self.accelerator, self.config = model, accelerator, config
        self.half = half or any(p.dtype == torch.float16 for p in model.parameters())
        self.loss_scale, self.fitted = LOSS_SCALE if self.half else 1.0, 0
        self.skip, self.offload, self.auto, self.limit = skip, offload, budget == "auto", math.inf
        self.budget: int = AUTO_BUDGET if budget == "auto" else budget
        self.largest, self.cut = 0, False
        self.teacher: TeacherHead | None = None  # of the model whose states the episodes have, and (1, D) zeros
        self.options: dict[str, Any] = {"backend": backend, "backward": backward}
        self.ddp = isinstance(model, DistributedDataParallel)
        self.inner: Any = model.module if self.ddp else model  # passes through it wait for no other rank
        check_fused(self.inner)
        with self.precision():
            self.share = shared_prompts.decide(share_prompts, self.inner, longest, accelerator.print)
        self.packed = self.share or self.packs(packed)

    def packs(self, packed: bool, model: torch.nn.Module | None = None) -> bool:
        """Whether to pack: not where sequences of the model would see each other, which is said."""
        with self.accelerator.autocast(), self.precision():
            why = shared_prompts.why_not_packed(self.inner if model is None else model) if packed else None
        if why is not None:
            self.accelerator.print(f"packing: off, because {why}")
        return packed and why is None

    def plan(self, episodes):
        """Micro-batches, as many on every rank (at least one): the missing ones hold a token that does not count."""
        if self.share:
            batches = shared_prompts.micro_batches(episodes, self.budget)
            sizes = [shared_prompts.count_tokens(batch) for batch in batches]
        else:
            batches = micro_batches(episodes, self.budget, self.packed)
            sizes = [tokens(batch, self.packed) for batch in batches]
        self.cut, self.largest = len(batches) > 1, max(sizes, default=1)
        most = max(gather_object([len(batches), 1]))
        return batches + [self.uncounted_batch()] * (most - len(batches))

    def uncounted_batch(self):
        """A micro-batch that does not count."""
        states = None if self.teacher is None else self.teacher.hidden
        return [Episode([0], [0], counts=False, ref=torch.zeros(1), ref_hidden=states)]

    def within_memory(self, work, episodes):
        """``work(plan)``, again with half the token budget when memory runs out: it starts over, so nothing is lost.

        Under DDP ``work`` waits for no other rank, and all start over together. Under FSDP2 every pass gathers weights:
        a rank that fails stops the run.
        """
        while True:
            plan, full = self.plan(episodes), False
            try:
                result = work(plan)
            except RuntimeError as error:
                if not ran_out(error) or (self.accelerator.num_processes > 1 and not self.ddp):
                    raise
                full = True
            longest = max(len(batch) for batch in plan)
            outcomes = gather_object([(full, longest)]) if self.ddp else [(full, longest)]
            if not any(failed for failed, _ in outcomes):
                return result
            if (True, 1) in outcomes:
                raise torch.OutOfMemoryError(
                    "out of memory with micro-batches of one answer: shorten them, or see docs/troubleshooting.md"
                )
            if full:
                tried = self.budget if 2 * self.largest > self.budget else self.largest  # it may far exceed the batch
                self.limit = self.budget = max(tried // 2, 1)
                print(f"out of memory: again with micro-batches of {self.budget} tokens")
                if self.on_gpu:
                    torch.cuda.empty_cache()

    def score(
        self, episodes: list[Episode], model: torch.nn.Module | None = None, entropy: bool = False
    ) -> list[torch.Tensor]:
        """Log-probs (or entropies) of every answer's tokens, without a gradient: a list of (length,) CPU tensors."""
        fixed = {"temperature": self.config.temperature, "backend": self.options["backend"], "return_entropy": entropy}

        def measure(hidden, weight, known, **options):
            out = linear_logprobs(hidden, weight, known["targets"], **fixed, **options)
            return out.entropy if entropy else out.logprobs

        return self.read(episodes, measure, model)

    def states(self, episodes: list[Episode], model: torch.nn.Module | None = None) -> list[torch.Tensor]:
        """The states that predict every answer's tokens, (length, D) CPU tensors, and :attr:`teacher`, their head."""
        found: list[TeacherHead] = []

        def take(hidden, weight, known, **options):
            hidden = hidden.to(compute_dtype(hidden)) if torch.is_autocast_enabled(hidden.device.type) else hidden
            if not found:
                whole = self.accelerator.is_fsdp2  # gathered for this call alone
                found.append(keep_head(hidden.new_zeros(1, hidden.shape[-1]).cpu(), weight, copy=whole, **options))
            return hidden

        states = self.read(episodes, take, model)
        self.teacher = found[0]
        return states

    @torch.no_grad()
    def read(self, episodes: list[Episode], measure, model: torch.nn.Module | None = None) -> list[torch.Tensor]:
        """What ``measure(hidden, weight, known, **options of the head)``, called in the place of a model's head, gives
        of the positions that predict every answer's tokens: a list of (length, ...) CPU tensors."""
        scorer: Any = self.inner if model is None else model
        check_fused(scorer)

        def work(plan):
            values = {}
            for batch in plan:
                inputs, known = self.collate([replace(e, counts=True, mask=None) for e in batch])
                with self.accelerator.autocast(), self.precision():
                    out = self.call(scorer, inputs, partial(measure, known=known))
                flat = out[known["targets"] != IGNORE].cpu()
                pieces = flat.split([len(e.completion_ids) for e in batch])
                values.update((id(e), piece.clone()) for e, piece in zip(batch, pieces))
            return [values[id(e)] for e in episodes]

        mode = scorer.training
        scorer.eval()
        try:
            with self.attention(scorer):
                return self.within_memory(work, episodes)
        finally:
            scorer.train(mode)

    def add_reference(self, episodes: list[Episode], model: torch.nn.Module | None) -> None:
        """What the KL term needs of the reference: its log-probs of the answers, or its states."""
        name, look = ("ref_hidden", self.states) if self.config.takes_full_kl else ("ref", self.score)
        for episode, value in zip(episodes, look(episodes, model)):
            setattr(episode, name, value)

    def gradients(self, episodes: list[Episode], num_items: float | None = None) -> dict[str, torch.Tensor]:
        """Adds the batch's gradient to the parameters.

        Args:
            episodes: this rank's share of the optimiser step's batch, including those without an advantage.
            num_items: normaliser of dapo, cispo and vespo; None: the tokens of the batch.

        Returns:
            dict of 0-dim tensors of this rank: "loss", grpo_loss's sums, counts and extremes; "counted", the tokens
            that the loss's mask counts; and of the answers left out "outside", their tokens, and "outside_entropy",
            the sum of what the sampler knew.
        """
        threshold, bonus = self.entropy_threshold(episodes)
        counts = gather_object([(len(episodes), sum(e.tokens for e in episodes), sum(bonus.values()))])
        whole = Totals(*map(sum, zip(*counts)))
        num_items = whole.tokens if num_items is None else num_items
        active, left_out = self.split(episodes)
        if self.on_gpu:
            torch.cuda.reset_peak_memory_stats(self.accelerator.device)  # generation had one of its own

        def work(plan):
            self.model.zero_grad(set_to_none=True)
            total = {}
            for i, batch in enumerate(plan):
                last = i == len(plan) - 1
                with nullcontext() if last or self.ddp else self.accelerator.no_sync(self.model):
                    part = Totals(len(batch), sum(e.tokens for e in batch), sum(bonus.get(id(e), 0) for e in batch))
                    result = self.backward(self.inner, batch, part, whole, num_items, threshold)
                    accumulate(total, result)
            return total

        with self.attention(self.inner):
            total = self.within_memory(work, active)
            if self.ddp:  # only now do ranks wait for each other: a token that adds nothing, and DDP reduces gradients
                self.backward(self.model, self.uncounted_batch(), Totals(1, 0, 0), whole, num_items, threshold)
        if self.loss_scale != 1.0:
            for parameter in self.model.parameters():
                if parameter.grad is not None:
                    parameter.grad.mul_(1.0 / self.loss_scale)
        known = {
            "counted": sum(e.tokens for e in episodes),
            "outside": sum(len(e.completion_ids) for e in left_out),
            "outside_entropy": sum(e.entropy for e in left_out),
        }
        values = torch.tensor([*known.values()], dtype=torch.float32, device=self.accelerator.device)
        return total | dict(zip(known, values.unbind()))

    def split(self, episodes: list[Episode]) -> tuple[list[Episode], list[Episode]]:
        """-> those that :meth:`gradients` measures, those of which its sums know nothing: skipped or masked."""
        measured = [bool(e.tokens) and (not self.skip or needs_learning(e, self.config)) for e in episodes]
        return list(compress(episodes, measured)), list(compress(episodes, map(not_, measured)))

    @torch.no_grad()
    def witness(self, episodes: list[Episode]) -> dict[str, torch.Tensor]:
        """Ratios of the left out answers whose ``old`` is known: "witness_" and a sum, a count or an extreme."""
        known = [replace(e, counts=True, importance=None) for e in self.split(episodes)[1] if e.old is not None]
        if not any(gather_object([len(known)])):
            return {}
        config = replace(self.config, beta=0.0, entropy_coef=0.0, top_entropy_quantile=1.0, log_entropy=False)

        def work(plan):
            total = {}
            for batch in plan:
                inputs, known = self.collate(batch)
                loss = partial(grpo_loss, **known, config=config, backend=self.options["backend"])
                with self.precision():
                    result = self.call(self.inner, inputs, loss)
                accumulate(total, result.metrics)
            return total

        with self.attention(self.inner):
            numbers = self.within_memory(work, known)
        reshard(self.model)
        return {f"witness_{name}": numbers[name] for name in ("tokens", "ratio_sum", *EXTREMES)}

    def precision(self):
        """fp16's own autocast: accelerate's exists on accelerators only, and skips the steps that overflow."""
        return torch.autocast(self.accelerator.device.type, torch.float16) if self.half else nullcontext()

    def overflowed(self, row: dict[str, Any]) -> bool:
        """Whether gradients left fp16's range, and half the loss scale, set here, may help."""
        if self.loss_scale <= 1.0 or math.isfinite(row["grad_norm"]) or not math.isfinite(row["loss"]):
            return False
        self.loss_scale, self.fitted = self.loss_scale / 2, 0
        return True

    def state(self) -> dict[str, float]:
        """What a resumed run needs: :meth:`restore` takes it."""
        return {name: getattr(self, name) for name in STATE}

    def restore(self, state: dict[str, Any]) -> None:
        for name in STATE:
            setattr(self, name, state.get(name, getattr(self, name)))

    def attention(self, model):
        return shared_prompts.sharing(model) if self.share else nullcontext()

    def collate(self, batch):
        return collate(batch, self.packed, self.accelerator.device, self.share)

    def call(self, model, inputs, function):
        """A pass of the model, whose head calls ``function``."""
        if self.share:
            function = shared_prompts.at_targets(function, inputs["shared_prompts"])
        return model(**inputs, fastgrpo=function)

    def backward(self, model, batch, part, whole, num_items, threshold):
        inputs, known = self.collate(batch)
        loss, scale = self.objective(known, part, whole, num_items, threshold)
        with self.precision(), offload_activations(self.accelerator.device) if self.offload else nullcontext():
            result = self.call(model, inputs, loss)
        # ranks' gradients are averaged: times their number
        self.accelerator.backward(result.loss * (scale * self.accelerator.num_processes * self.loss_scale))
        return {"loss": result.loss.detach() * scale, **result.metrics}

    def objective(self, known, part, whole, num_items, threshold):
        """-> (the function that the LM head calls, what its loss is multiplied with)"""
        scale, coefficient = share_of_batch(self.config, part, whole)
        head = self.teacher if self.config.takes_full_kl else None
        reference = {} if head is None else {"ref_weight": head.weight, "ref_bias": head.bias}
        loss = partial(
            grpo_loss,
            **known,
            config=replace(self.config, entropy_coef=coefficient),
            num_items=num_items,
            entropy_threshold=threshold,
            **reference,
            **self.options,
        )
        return loss, scale

    def entropy_threshold(self, episodes):
        """The quantile over all ranks' tokens, and how many tokens of each episode earn the entropy bonus.

        None, and all of them, where the config asks for no quantile.
        """
        counted = [e for e in episodes if e.tokens]
        if self.config.top_entropy_quantile == 1.0:
            return None, {id(e): e.tokens for e in counted}
        found = zip(counted, self.score(counted, entropy=True))
        entropies = [h if e.mask is None else h[e.mask.bool()] for e, h in found]
        everyone = gather_object(torch.cat([torch.zeros(0), *entropies]).tolist())
        threshold = np.quantile(everyone, 1 - self.config.top_entropy_quantile) if everyone else 0.0
        threshold = float(threshold) * (1 - 1e-5)  # the token at the quantile keeps its place in another micro-batch
        return threshold, {id(e): int((h >= threshold).sum()) for e, h in zip(counted, entropies)}

    def grow(self) -> None:
        """After a step that fitted, and was cut by the budget: "auto" doubles it while the step's peak stays under 40 %
        of a GPU's memory. So does fp16's loss scale, after many steps."""
        self.fitted += 1
        if self.half and self.fitted % SCALE_GROWTH == 0:
            self.loss_scale *= 2
        if self.auto and self.on_gpu and self.cut and 2 * self.budget < self.limit:
            device = self.accelerator.device
            total = torch.cuda.get_device_properties(device).total_memory
            if torch.cuda.max_memory_allocated(device) < 0.4 * total:
                self.budget *= 2

    @property
    def on_gpu(self) -> bool:
        return self.accelerator.device.type == "cuda"  # is_available is also true where the config says use_cpu


def keep_head(states, weight, bias=None, softcap=None, logit_scale=1.0, lora=None, copy=False):
    """A head as it is now, for later: LoRA merged, and a ``copy`` where its weight is only lent."""
    if lora is not None:
        weight = torch.addmm(weight, lora[1].to(weight.dtype), lora[0].to(weight.dtype), alpha=lora[2])
    if copy:
        weight, bias = weight.clone(), None if bias is None else bias.clone()
    return TeacherHead(states, weight.detach(), bias, softcap, logit_scale)


def ran_out(error):
    """Whether an exception says that a GPU's memory is full."""
    return isinstance(error, torch.OutOfMemoryError) or any(text in str(error) for text in NO_MEMORY)


def accumulate(total, result):
    """Adds sums and counts, compares extremes."""
    for name, value in result.items():
        if name not in total:
            total[name] = value
        elif name in EXTREMES:
            total[name] = (torch.minimum if name == "ratio_min" else torch.maximum)(total[name], value)
        else:
            total[name] = total[name] + value


def offload_activations(device):
    """``save_on_cpu`` for activations: weights, which stay on the device anyway, are not copied."""
    hooks = torch.autograd.graph.save_on_cpu(pin_memory=device.type == "cuda")
    pack, unpack = hooks.pack_hook, hooks.unpack_hook

    def is_weight(x):
        return isinstance(x if x._base is None else x._base, torch.nn.Parameter)

    hooks.pack_hook = lambda x: x if is_weight(x) else pack(x)
    hooks.unpack_hook = lambda x: x if isinstance(x, torch.Tensor) else unpack(x)
    return hooks

"""On-policy distillation: the trainer's loop, whose answers a teacher scores, token by token, over the whole
vocabulary."""

import copy
from contextlib import nullcontext
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from accelerate.utils import gather_object

from fastgrpo import GRPOLossConfig, linear_divergence
from fastgrpo.checks import Count, Mixture, NonNegative, annotations, mistake, require, together
from fastgrpo.divergence import TeacherHead
from fastgrpo.inputs import IGNORE
from fastgrpo.trainer import arguments, evaluation, shared_prompts
from fastgrpo.trainer import model as models
from fastgrpo.trainer.config import GRPOConfig, Part
from fastgrpo.trainer.data import encode, load_rows, longest_prompt
from fastgrpo.trainer.generate import Sampling
from fastgrpo.trainer.learner import Learner
from fastgrpo.trainer.loop import GRPOTrainer
from fastgrpo.trainer.metrics import mean
from fastgrpo.trainer.rewards import Rewards

# of a YAML file: DistillTrainer's other arguments, and what is trained before it
DISTILL_JOB = ("model", "teacher_model", "reward_funcs", "train_dataset", "eval_dataset", "sft")
ELSEWHERE = {  # TRL's names and others', and what is meant
    "teacher_model_name_or_path": "the teacher is an argument of DistillTrainer, 'teacher_model' in a YAML file",
    "teacher_model_revision": "say teacher_model_init_kwargs={'revision': ...}",
    "lmbda": "every answer is the student's own, which is lmbda=1; for given answers see fastgrpo sft",
    "alpha": "say beta",
    "seq_kd": "for a teacher's answers see fastgrpo sft",
    "max_tool_calling_iterations": "not supported",
    "log_unique_prompts": "log_completions shows several prompts: leave it out",
}


@dataclass(frozen=True, kw_only=True)
class DistillConfig(GRPOConfig):
    """Settings of :class:`fastgrpo.trainer.DistillTrainer`; all others are inherited from GRPO's.

    Names and defaults are those of TRL 1.16's ``DistillationConfig``. Settings of the GRPO loss and of advantages count
    where there are ``reward_funcs``.

    Args:
        beta: which divergence of ``fastgrpo.linear_divergence``: 0: KL(teacher || student), 1: KL(student ||
            teacher), between: the generalised Jensen-Shannon divergence.
        num_generations: answers a prompt; with ``reward_funcs`` at least 2.
        teacher_model_init_kwargs: further keywords of the teacher's ``from_pretrained``, as in ``{dtype: bfloat16}``.
        teacher_prompt_column: of the dataset: prompts, text or chat, that the teacher sees in the place of the
            student's, as with a hint or a worked solution; None: the same.
        reward_coef: with ``reward_funcs``: the weight of the GRPO loss beside the divergence.
        skip_zero_advantages: False: every token has a divergence.

    Raises:
        ValueError: naming the setting, what was expected and what came; several mistakes are listed together.
    """

    also = DISTILL_JOB
    advice = GRPOConfig.advice | ELSEWHERE

    beta: Mixture = 1.0
    num_generations: Count = 1
    teacher_model_init_kwargs: dict | None = None
    teacher_prompt_column: str | None = None
    reward_coef: NonNegative = 1.0
    skip_zero_advantages: bool = False

    def check_combinations(self) -> None:
        super().check_combinations()
        require(not self.skip_zero_advantages, "skip_zero_advantages must be False: every token has a divergence")
        require(not self.sync_ref_model, "sync_ref_model must be False: the teacher stays as it is")
        for name in ("kl_estimator", "use_bias_correction_kl"):
            require(not changed(self, name), f"{name} must be left out: there is no KL term beside the divergence")

    def part(self, cls: type[Part], **changes: Any) -> Part:
        """The settings of one of the classes it is made of; the GRPO loss's own KL term is off."""
        return super().part(cls, **({"beta": 0.0} | changes if cls is GRPOLossConfig else changes))


def changed(config: Any, name: str) -> bool:
    """Whether a setting is not its default."""
    return next(field.default for field in fields(config) if field.name == name) != getattr(config, name)


REWARD_ONLY = {  # settings of what rewards alone bring
    *(annotations(GRPOLossConfig).keys() - annotations(Sampling).keys() - {"beta", "log_entropy"}),
    *("reward_weights", "scale_rewards", "advantage_estimator", "multi_objective_aggregation", "max_resample_times"),
    *("reward_coef", "num_generations_eval", "recompute_old_logprobs"),
}


def is_self(teacher: Any) -> bool:
    return teacher is None or (isinstance(teacher, str) and teacher == "self")


def is_adapter(model: Any) -> bool:
    return Path(model, "adapter_config.json").is_file() if isinstance(model, str) else hasattr(model, "peft_config")


def check(config: DistillConfig, model: Any, teacher: Any, given: arguments.Given) -> None:
    """What distillation asks of a config and the trainer's other arguments.

    Raises:
        ValueError, TypeError: all that is wrong.
    """
    with together() as attempt:
        if not given.rewards and (idle := sorted(name for name in REWARD_ONLY if changed(config, name))):
            mistake(f"{', '.join(idle)} must be left out: there are no reward_funcs")
        if given.rewards and config.num_generations < 2:
            mistake(f"num_generations must be >= 2 with reward_funcs, got {config.num_generations}")
        column = config.teacher_prompt_column
        if is_self(teacher) and column is None and not given.rewards and not is_adapter(model):
            mistake(
                f"teacher_model must be another model than the one that begins, got {teacher!r}, unless it sees "
                "another prompt (teacher_prompt_column) or holds the student where reward_funcs pull"
            )
        elif isinstance(teacher, str) and not is_self(teacher):
            attempt(models.check_source, teacher, "teacher_model")
        elif not is_self(teacher) and not isinstance(teacher, torch.nn.Module):
            mistake(f"teacher_model must be a folder, a name, a causal LM or 'self', got {type(teacher).__name__}")
        for name, rows in (("train_dataset", given.rows), ("eval_dataset", given.eval_rows)):
            if column is not None and rows is not None and column not in rows[0]:
                mistake(f"teacher_prompt_column must be a column of {name}, {sorted(rows[0])}, got {column!r}")
            elif column is not None and rows is not None:
                attempt(load_rows, [{"prompt": row[column]} for row in rows], f"{name}'s {column!r}")


def check_vocabulary(tokenizer: Any, teacher: Any, config: DistillConfig) -> None:
    """The teacher's tokenizer, where it has one, is the student's.

    Raises:
        ValueError: it has other tokens, or other numbers for them.
    """
    if not isinstance(teacher, str) or is_self(teacher):
        return
    other = models.load_tokenizer(None, teacher, of_teacher(config)).get_vocab()
    own = tokenizer.get_vocab()
    if own != other:
        differ = sorted(dict(own.items() ^ other.items()))
        raise ValueError(
            f"teacher_model must have the student's vocabulary, token by token: {len(differ)} tokens differ, as in "
            f"{', '.join(map(repr, differ[:3]))}, of {len(own)} and {len(other)}"
        )


def of_teacher(config):
    """The settings that a teacher is loaded with: its own keywords, whole weights, adapters too."""
    settings = {name: getattr(config, name) for name in annotations(type(config))} | {"half": config.half}
    settings |= {"load_in_4bit": False, "load_in_8bit": False, "use_peft": True}
    return SimpleNamespace(**settings | {"model_init_kwargs": config.teacher_model_init_kwargs})


class DistillLoss(NamedTuple):
    """What :func:`distill_loss` returns, as a learner takes it."""

    loss: torch.Tensor
    metrics: dict[str, torch.Tensor]


def token_divergence(
    hidden: torch.Tensor,  # (B, T, D)
    weight: torch.Tensor,  # (V, D)
    *,
    known: dict[str, Any],
    teacher: TeacherHead,
    lora: tuple[torch.Tensor, torch.Tensor, float] | None = None,
    bias: torch.Tensor | None = None,
    **options: Any,
):
    """:func:`fastgrpo.linear_divergence` of a micro-batch. Where one head is padded further than the other, to the rows
    that both have; its padding is no token."""
    size = min(len(weight), len(teacher.weight))
    old = known.get("old_logprobs")
    hint = known.get("sampling_logprobs") if old is None else old  # as grpo_loss takes it
    return linear_divergence(
        hidden,
        weight[:size],
        known["ref_hidden"],
        teacher.weight[:size],
        known["targets"] != IGNORE,
        bias=None if bias is None else bias[:size],
        lora=None if lora is None else (lora[0], lora[1][:size], lora[2]),
        teacher_bias=None if teacher.bias is None else teacher.bias[:size],
        teacher_softcap=teacher.softcap,
        teacher_logit_scale=teacher.logit_scale,
        return_entropy=True,
        targets=None if hint is None else known["targets"],
        old_logprobs=hint,
        **options,
    )


def distill_loss(hidden, weight, *, num_items, fixed, policy=None, policy_scale=0.0, **head) -> DistillLoss:
    """``sum(divergence) / num_items`` over the tokens that count, in nats, plus ``policy_scale`` times what ``policy``,
    a GRPO loss, makes of the same states.

    Args:
        num_items: the tokens that count in the whole batch, all ranks together.
        fixed: keywords of :func:`token_divergence`. head: the head's bias, softcap, logit scale and LoRA.
    """
    found = token_divergence(hidden, weight, **fixed, **head)
    assert found.entropy is not None  # it was asked for
    total, entropy = found.divergence.sum(), found.entropy.sum()
    own = {"divergence_sum": total.detach()}
    if policy is None:
        tokens = (fixed["known"]["targets"] != IGNORE).sum()
        return DistillLoss(total / max(num_items, 1), {**own, "entropy_sum": entropy, "tokens": tokens})
    other = policy(hidden, weight, **head)
    return DistillLoss(total / max(num_items, 1) + policy_scale * other.loss, {**own, **other.metrics})


class DistillLearner(Learner):
    """Its gradient is that of the mean divergence of the tokens that count, and of a GRPO loss times ``coef``."""

    beta: float = 1.0
    coef: float | None = None  # None: no rewards

    @property
    def fixed(self):
        """What all divergences have in common."""
        return {"teacher": self.teacher, "beta": self.beta, "temperature": self.config.temperature, **self.options}

    def objective(self, known, part, whole, num_items, threshold):
        policy, policy_scale = None, 0.0
        if self.coef is not None:  # at 0 too: the log has its numbers
            policy, scale = super().objective({**known, "ref_hidden": None}, part, whole, num_items, threshold)
            policy_scale = self.coef * scale
        loss = partial(
            distill_loss,
            num_items=whole.tokens,
            fixed={**self.fixed, "known": known},
            policy=policy,
            policy_scale=policy_scale,
        )
        return loss, 1.0

    def divergences(self, episodes):
        """Of every answer's tokens, without a gradient: a list of (length,) CPU tensors."""

        def measure(hidden, weight, known, **head):
            return token_divergence(hidden, weight, known=known, **self.fixed, **head).divergence

        return self.read(episodes, measure)


class DistillTrainer(GRPOTrainer):
    """On-policy distillation (Agarwal et al., arXiv:2306.13649): a transformers causal LM learns
    the next-token distributions of a teacher at every token of its own answers, neither model's logits held.

    Args:
        model: the student: a folder, hub name or causal LM.
        teacher_model: likewise, of the same vocabulary, checked; "self" or None: the student without its adapter, or
            without LoRA a copy of what it is at the start. It teaches by ``teacher_prompt_column``, or holds the
            student where rewards pull.
        train_dataset, eval_dataset: as :class:`GRPOTrainer`'s.
        config: a :class:`DistillConfig`, or by TRL's name ``args``. reward_funcs: as :class:`GRPOTrainer`'s: their
            GRPO loss is added, times ``reward_coef``; (): none. processing_class: the tokenizer; None: the student's.
            peft_config: of PEFT; None: LoRA by the config's ``lora_*`` if ``use_peft``.

    Raises:
        ValueError, TypeError: a bad setting, teacher or dataset, before a model is loaded; several are listed together.
    """

    name, shown = "distillation", ("divergence", "reward", "entropy", "tokens_per_second")
    panels = {"divergence": "divergence (nats a token)", "entropy": "entropy (nats a token)", "reward": "reward"}  # noqa: RUF012
    learner_class: Any = DistillLearner

    def __init__(
        self,
        model: str | torch.nn.Module,
        teacher_model: str | torch.nn.Module | None,
        train_dataset: Any,
        config: DistillConfig | None = None,
        eval_dataset: Any = None,
        reward_funcs: Rewards = (),
        processing_class: Any = None,
        peft_config: Any = None,
        *,
        args: Any = None,
    ) -> None:
        call = "DistillTrainer(model, teacher_model, train_dataset, config)"
        self.config = config = arguments.choose(DistillConfig, config, args, call)
        if peft_config is not None or hasattr(model, "peft_config"):
            self.config = config = replace(config, use_peft=True)
        given = arguments.check(config, model, train_dataset, eval_dataset, reward_funcs)
        teacher_model = None if teacher_model is model else teacher_model
        check(config, model, teacher_model, given)
        self.teacher = None if is_self(teacher_model) else teacher_model
        self.weights = torch.tensor(config.reward_weights or [1.0] * len(given.rewards))
        tokenizer = models.load_tokenizer(processing_class, model, config)
        check_vocabulary(tokenizer, self.teacher, config)
        self.open(given, model, tokenizer, peft_config)

    def longest(self, rows):
        """Of both prompts, where the teacher has its own."""
        column, template = self.config.teacher_prompt_column, self.config.chat_template_kwargs
        own = super().longest(rows)
        if column is None:
            return own
        return max(own, longest_prompt(self.tokenizer, [{"prompt": row[column]} for row in rows], template))

    def make_reference(self, model):
        """The teacher; None: the student without its adapter."""
        if self.teacher is not None:
            teacher = models.load_model(self.teacher, of_teacher(self.config), self.accelerator.device)
            check_heads(model, teacher, len(self.tokenizer))
            return teacher
        return None if self.config.use_peft else copy.deepcopy(model)

    def setup(self, model, peft_config, longest):
        super().setup(model, peft_config, longest)
        self.learner.beta, self.learner.coef = self.config.beta, self.config.reward_coef if self.rewards else None
        if self.reference is not None:
            share_with(self.learner, self.reference, self.config, longest + self.config.max_completion_length)

    def collect(self):
        if self.rewards:
            return super().collect()
        self.sampler.sync(self.model)
        episodes = self.sample_groups()
        self.add_reference(self.learner.split(episodes)[0])
        return episodes

    def sample_groups(self):
        if self.rewards:
            return super().sample_groups()
        count = self.config.num_generations
        return self.answer(self.next_rows(self.config.rollout // count), count)

    def answer(self, rows, n, greedy=False):
        episodes, column = super().answer(rows, n, greedy), self.config.teacher_prompt_column
        if column is not None:
            hinted = [encode(self.tokenizer, row[column], self.config.chat_template_kwargs) for row in rows]
            for i, episode in enumerate(episodes):
                episode.teacher_prompt_ids = hinted[i // n]
        return episodes

    def add_reference(self, episodes):
        """The teacher's states, behind its own prompts where it has them."""
        asked = [replace(e, prompt_ids=e.teacher_prompt_ids or e.prompt_ids) for e in episodes]
        own = self.reference is not None
        with nullcontext() if own else self.accelerator.unwrap_model(self.model).disable_adapter():
            for episode, states in zip(episodes, self.learner.states(asked, self.reference)):
                episode.ref_hidden = states

    def show(self, episodes):
        """As GRPO's; without rewards the number beside an answer is its length."""
        if self.rewards:
            super().show(episodes)
        elif self.config.log_completions or self.total - self.step <= self.uses:
            text, count = self.tokenizer.decode, self.config.num_completions_to_print or 8
            rows = [(text(e.prompt_ids), text(e.completion_ids), len(e.completion_ids)) for e in episodes[:count]]
            self.log.answers(f"answers of the rollout at step {self.step + 1}", rows, "tokens")

    def summary(self, episodes, numbers):
        """The numbers of a step over all ranks."""
        gathered: Any = self.accelerator.gather(torch.stack([v.float() for v in numbers.values()])[None])
        n = dict(zip(numbers, gathered.sum(0).tolist()))
        count = max(n["counted"], 1)
        divergence = {"divergence": n["divergence_sum"] / count}
        if self.rewards:
            return {k: v for k, v in super().summary(episodes, numbers).items() if k not in UNUSED} | divergence
        columns = self.meter.columns(episodes)
        row = {"loss": n["loss"], "grad_norm": numbers["grad_norm"].item(), **divergence}
        row |= {name: mean(columns[name]) for name in ("length", "truncated")}
        return row | {"entropy": n["entropy_sum"] / count, "step_tokens": columns["length"].sum().item()}

    def evaluate(self):
        """The mean divergence of sampled answers to the held-out prompts, and with rewards what GRPO evaluates."""
        numbers = evaluation.evaluate(self) if self.rewards else {}
        with evaluation.apart(self) as rows:
            episodes = self.answer(rows, 1)
        self.add_reference(episodes)
        sums = gather_object([(d.double().sum().item(), len(d)) for d in self.learner.divergences(episodes)])
        total, count = map(sum, zip((0.0, 0), *sums))
        return {**numbers, "eval/divergence": total / max(count, 1)}


UNUSED = ("kl", "skipped")  # of GRPO's row: there is no KL term beside the divergence, and nothing is skipped


def check_heads(student, teacher, tokens):
    """Both models' heads have a row for each token."""
    for name, model in (("model", student), ("teacher_model", teacher)):
        rows = models.causal_lm(model).get_output_embeddings().weight.shape[0]
        if rows < tokens:
            raise ValueError(f"{name} must have a row of its head for each of the {tokens} tokens, got {rows}")


def share_with(learner, teacher, config, longest):
    """Prompts are shared, and sequences packed, where the teacher can do it too."""
    why = shared_prompts.why_not(teacher, longest) if learner.share else None
    if why is not None and config.share_prompts is True:
        raise ValueError(f"share_prompts must be False or 'auto', got True: the teacher cannot: {why}")
    if why is not None:
        learner.accelerator.print(f"share_prompts: off, because of the teacher: {why}")
        learner.share, learner.packed = False, learner.packs(models.packs(learner.inner, config))
    learner.packed = learner.share or learner.packs(learner.packed, teacher)

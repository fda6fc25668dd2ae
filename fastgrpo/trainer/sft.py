"""Supervised fine-tuning: the trainer's loop, whose sequences are given and not sampled, and a loss that wants them
likely."""

import math
import warnings
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from accelerate.utils import gather_object

from fastgrpo import GRPOLossConfig, linear_logprobs
from fastgrpo.checks import Count, NonNegative, annotations
from fastgrpo.inputs import IGNORE
from fastgrpo.trainer import arguments, checkpoint
from fastgrpo.trainer import model as models
from fastgrpo.trainer.config import GRPOConfig
from fastgrpo.trainer.data import draw
from fastgrpo.trainer.learner import Learner
from fastgrpo.trainer.loop import GRPOTrainer
from fastgrpo.trainer.model import ModelOptions
from fastgrpo.trainer.options import RunOptions
from fastgrpo.trainer.supervised import encode_examples, load_examples, longest_example, prepare_tokenizer

SFT_JOB = ("model", "train_dataset", "eval_dataset")  # of a YAML file: SFTTrainer's other arguments


def names_from_elsewhere():
    """{a name that is no setting: what to say of it}: GRPO's own settings, TRL's of any trainer, of its SFTTrainer."""
    grpo = annotations(GRPOConfig).keys() - annotations(ModelOptions).keys() - annotations(RunOptions).keys()
    files = (Path(__file__).with_name(f"{name}_names.yaml").read_text(encoding="utf-8") for name in ("trl", "sft"))
    general, own = map(yaml.safe_load, files)
    return {**dict.fromkeys(grpo, "a setting of fastgrpo train alone"), **general, **own}


@dataclass(frozen=True, kw_only=True)
class SFTConfig(ModelOptions, RunOptions):
    """Settings of :class:`fastgrpo.trainer.SFTTrainer`; those of the model and of any run are inherited.

    Names and defaults are those of TRL 1.16's ``SFTConfig`` and ``ModelConfig``, but that ``packing`` may be "auto" and
    rows are shuffled. Sizes count rows.

    Args:
        max_length: longer sequences are cut at their end; None: never.
        eos_token: the token that ends an answer, where it is not the tokenizer's: a chat template's end of a turn, for
            a base model.
        chat_template_path: a file, or a folder or name of a model with a tokenizer, whose chat template is taken.
        learning_rate: its highest value.

    Raises:
        ValueError: naming the setting, what was expected and what came; several mistakes are listed together.
    """

    also = SFT_JOB
    advice = names_from_elsewhere()

    learning_rate: NonNegative = 2e-5
    max_length: Count | None = 1024
    eos_token: str | None = None
    chat_template_path: str | None = None

    @property
    def rollout(self) -> int:
        """Rows of an optimiser step on one rank."""
        return self.per_device_train_batch_size * self.gradient_accumulation_steps

    @property
    def steps_per_rollout(self) -> int:
        return 1


class SFTLoss(NamedTuple):
    """What :func:`sft_loss` returns, as a learner takes it."""

    loss: torch.Tensor
    metrics: dict[str, torch.Tensor]


def sft_loss(
    hidden: torch.Tensor,  # (B, T, D)
    weight: torch.Tensor,  # (V, D)
    *,
    targets: torch.Tensor,  # (B, T)
    weights: torch.Tensor | None,  # (B, T)
    num_items: float,
    **options: Any,
) -> SFTLoss:
    """``-sum(logprob) / num_items`` over the tokens that are learnt, in nats, from the op's log-probs.

    Args:
        targets: integer ids, -100: not learnt.
        weights: 0: not learnt either; None: all are.
        num_items: the tokens learnt in the whole batch, all ranks together.
        options: of :func:`fastgrpo.linear_logprobs`.
    """
    targets = targets if weights is None else targets.masked_fill(weights == 0, IGNORE)
    logprobs = linear_logprobs(hidden, weight, targets, **options).logprobs
    return SFTLoss(-logprobs.sum() / max(num_items, 1.0), {})


class SFTLearner(Learner):
    """Its gradient is that of the mean negative log-prob of the tokens that are learnt."""

    def objective(self, known, part, whole, num_items, threshold):
        chosen = {"targets": known["targets"], "weights": known["importance_weights"], "num_items": num_items}
        return partial(sft_loss, **chosen, **self.options), 1.0


class SFTTrainer(GRPOTrainer):
    """Supervised fine-tuning of a transformers causal LM; :class:`GRPOTrainer` trains the ``model/`` it leaves further,
    and the other way round, adapters included.

    Args:
        model: a folder, hub name or causal LM.
        train_dataset, eval_dataset: a list of dicts, a .jsonl or .json file or a ``datasets`` object with text or chat
            "prompt" and "completion", "messages" (of which the assistant's are learnt) or "text".
        config: a :class:`SFTConfig`, or by TRL's name ``args``. processing_class: the tokenizer; None: the model's.
            peft_config: of PEFT; None: LoRA by the config's ``lora_*`` if ``use_peft``.

    Raises:
        ValueError, TypeError: a bad setting or dataset, before the model is loaded; several are listed together.
    """

    name, shown = "SFT", ("loss", "tokens_per_second")
    panels = {"loss": "loss (nats a token)", "grad_norm": "gradient norm"}  # noqa: RUF012

    def __init__(
        self,
        model: str | torch.nn.Module,
        train_dataset: Any,
        config: SFTConfig | None = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        peft_config: Any = None,
        *,
        args: Any = None,
    ) -> None:
        self.config = config = arguments.choose(SFTConfig, config, args, "SFTTrainer(model, train_dataset, config)")
        if peft_config is not None or hasattr(model, "peft_config"):
            self.config = config = replace(config, use_peft=True)
        given = arguments.check(config, model, train_dataset, eval_dataset, load=load_examples)
        tokenizer = prepare_tokenizer(models.load_tokenizer(processing_class, model, config), config)
        self.open(given, model, tokenizer, peft_config)

    def longest(self, rows):
        config = self.config
        return longest_example(self.tokenizer, rows, config.chat_template_kwargs, config.max_length)

    def setup(self, model, peft_config, longest):
        """Model, optimiser, schedule and learner, on this rank's device."""
        config = self.config
        models.check_positions(model, longest)
        model = self.prepare(model, peft_config)
        self.plan(config.rollout, 1)
        self.learner = SFTLearner(
            self.model,
            self.accelerator,
            GRPOLossConfig(),
            budget=config.token_budget,
            packed=models.packs(model, config),
            skip=False,
            offload=config.activation_offloading,
            backend=config.backend,
            backward=config.backward,
            half=config.half,
        )

    def encode(self, rows):
        config = self.config
        options = config.chat_template_kwargs, config.max_length
        found = [encode_examples(self.tokenizer, row, *options) for row in rows]
        if [] in found:  # warnings say it once
            warnings.warn(
                "the dataset has rows that teach nothing, and count as used: no token of an answer stands within "
                f"max_length = {config.max_length}. Raise it, or leave them out",
                stacklevel=2,
            )
        return [example for examples in found for example in examples]

    def collect(self):
        """This rank's sequences of an optimiser step."""
        config, rank = self.config, self.accelerator.process_index
        numbers = draw(len(self.rows), self.position, self.prompts, config.seed, config.shuffle_dataset)
        self.position += self.prompts
        return self.encode(self.rows[i] for i in numbers[rank * config.rollout : (rank + 1) * config.rollout])

    def show(self, episodes):
        """A table of what is learnt in some sequences: of the first step always."""
        if self.step and not self.config.log_completions:
            return
        text, count = self.tokenizer.decode, self.config.num_completions_to_print or 8
        rows = [(text(e.prompt_ids), text(e.completion_ids), e.tokens) for e in episodes[:count]]
        self.log.answers(f"sequences of step {self.step + 1}", rows, "tokens learnt")

    def summary(self, episodes, numbers):
        """The numbers of a step over all ranks."""
        gathered: Any = self.accelerator.gather(torch.stack([v.float() for v in numbers.values()])[None])
        n = dict(zip(numbers, gathered.T.tolist()))
        rows = gather_object([(e.length, e.tokens, e.truncated) for e in episodes])
        length, learnt, truncated = map(sum, zip(*rows)) if rows else (0, 0, 0)
        row = {"loss": sum(n["loss"]), "grad_norm": max(n["grad_norm"]), "epoch": self.position / len(self.rows)}
        row |= {"length": length / max(len(rows), 1), "truncated": truncated / max(len(rows), 1)}
        return row | {"learnt_tokens": learnt, "step_tokens": length}

    def evaluate(self):
        """Loss and perplexity of the held-out rows."""
        rank, world = self.accelerator.process_index, self.accelerator.num_processes
        examples = self.encode(self.eval_rows[i] for i in range(rank, len(self.eval_rows), world))
        scores = zip(self.learner.score(examples), examples)
        sums = gather_object([((logp * e.importance).sum().item(), e.tokens) for logp, e in scores])
        total, count = map(sum, zip((0.0, 0), *sums))
        loss = -total / max(count, 1)
        return {"eval/loss": loss, "eval/perplexity": math.exp(min(loss, 700.0))}


CARRIED = ("seed", "report_to", "chat_template_kwargs", "token_budget", "packing", "backend", "backward")
LEFT = ("learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps")  # how fast is the section's own


def make_config(section: dict[str, Any], config: Any) -> SFTConfig:
    """The config of a job's ``sft`` section: what it does not say of the model is the job's, and so are seed and
    backend; it writes to ``output_dir/sft``."""
    carried = {*annotations(ModelOptions), *CARRIED} - {*LEFT}
    settings = {name: getattr(config, name) for name in carried} | {"output_dir": f"{config.output_dir}/sft"}
    return SFTConfig(**{**settings, **{k: v for k, v in section.items() if k not in SFT_JOB}})


def hand_on_resume(section: dict[str, Any], config: Any) -> tuple[dict[str, Any], Any]:
    """A resumed job that was stopped in its ``sft`` section goes on there, from its newest checkpoint, if any, and then
    starts GRPO. -> (section, the job's config)"""
    output = Path(make_config(section, config).output_dir)
    if not config.resume_from_checkpoint or (output / "model").is_dir():
        return section, config
    there = bool(checkpoint.find_checkpoints(output)) or None
    return {**section, "resume_from_checkpoint": there}, replace(config, resume_from_checkpoint=None)


def before(section: dict[str, Any], job: dict[str, Any], config: Any) -> tuple[SFTTrainer | None, str]:
    """What a GRPO job's ``sft`` section asks for, on the job's model and rows but where it has others.

    Returns:
        (the trainer, the folder of the model it will leave); None: the job is resumed, and the model is there.
    """
    settings = make_config(section, config)
    folder = Path(settings.output_dir) / "model"
    if config.resume_from_checkpoint and folder.is_dir():
        return None, str(folder)
    model, rows = (section.get(name, job[name]) for name in ("model", "train_dataset"))
    return SFTTrainer(model, rows, settings, section.get("eval_dataset")), str(folder)

"""What every run asks: where it writes, how long it is, how its batches are cut, what it says and keeps."""

from dataclasses import dataclass
from typing import Literal

from fastgrpo.checks import Checked, Count, NonNegative, Seed, require, require_installed
from fastgrpo.inputs import Backend, Backward

Tracker = Literal["none", "tensorboard", "wandb", "trackio"]
Strategy = Literal["no", "steps", False]  # False: YAML's no


@dataclass(frozen=True, kw_only=True)
class RunOptions(Checked):
    """Settings that every trainer has, under TRL's names.

    Args:
        output_dir: where log.jsonl, curves.png, model/ and checkpoints go.
        run_name: of the trackers' run, and the picture's title.
        report_to: trackers: "tensorboard", "wandb", "trackio", a list of them, or "none".
        seed: of the order of rows, of sampling and of new weights.
        resume_from_checkpoint: True: from the newest complete checkpoint in ``output_dir``, or a folder. On the command
            line also ``--resume``.
        max_steps: optimiser steps; -1: as many as ``num_train_epochs`` takes.
        num_train_epochs: passes over the rows, where ``max_steps`` is -1.
        shuffle_dataset: a new order of the rows every epoch; False: their own.
        chat_template_kwargs: keywords of the tokenizer's chat template, as in ``{enable_thinking: false}``; its own
            ``chat_template`` goes before the tokenizer's.
        per_device_train_batch_size: sequences of a rank, answers or rows, times ``gradient_accumulation_steps`` those
            of an optimiser step. How they are cut into micro-batches is up to ``token_budget``.
        gradient_accumulation_steps: see ``per_device_train_batch_size``.
        token_budget: tokens of a micro-batch; "auto" finds it: 8192 at first, more while a GPU has room, halved when
            memory runs out.
        packing: micro-batches without padding, in blocks of ``position_ids``; "auto": where flash-attn is used.
            Otherwise, and where a model's sequences would see each other, they are sorted by length and padded.
        backend: of the op: "triton", "torch", or "auto": Triton on a GPU.
        backward: of the op: "exact", "certified", or "auto", see :func:`fastgrpo.linear_logprobs`.
        eval_strategy: "steps": evaluate on ``eval_dataset`` every ``eval_steps`` and at the end; "no".
        eval_steps: steps between evaluations; None: ``logging_steps``.
        eval_on_start: also evaluate before the first step.
        logging_steps: steps between rows of trackers and console, and the last step; log.jsonl has every step.
        log_completions: print a table of sequences at every rollout, not at the end alone.
        num_completions_to_print: rows of a table of sequences; None: 8.
        save_strategy: "steps": a checkpoint every ``save_steps`` and at the end; "no".
        save_steps: steps between checkpoints.
        save_total_limit: checkpoints to keep, the newest; None: all.
    """

    output_dir: str = "trainer_output"
    run_name: str | None = None
    report_to: Tracker | list[Tracker] = "none"
    seed: Seed = 42
    resume_from_checkpoint: bool | str | None = None
    max_steps: int = -1
    num_train_epochs: NonNegative = 3.0
    shuffle_dataset: bool = True
    chat_template_kwargs: dict | None = None
    per_device_train_batch_size: Count = 8
    gradient_accumulation_steps: Count = 1
    token_budget: Count | Literal["auto"] = "auto"
    packing: Literal["auto", True, False] = "auto"
    backend: Backend = "auto"
    backward: Backward = "auto"
    eval_strategy: Strategy = "no"
    eval_steps: Count | None = None
    eval_on_start: bool = False
    logging_steps: Count = 10
    log_completions: bool = False
    num_completions_to_print: Count | None = None
    save_strategy: Strategy = "steps"
    save_steps: Count = 500
    save_total_limit: Count | None = None

    def check_combinations(self) -> None:
        super().check_combinations()
        require(
            self.max_steps > 0 or self.max_steps == -1, f"max_steps must be > 0 or -1 (epochs), got {self.max_steps}"
        )
        for tracker in self.trackers:
            require_installed(tracker, tracker)

    @property
    def trackers(self) -> list[str]:
        return [n for n in ([self.report_to] if isinstance(self.report_to, str) else self.report_to) if n != "none"]

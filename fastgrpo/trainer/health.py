"""What a person must be told while a run goes on: signs of life, and that something is wrong with the numbers."""

import math
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import torch

SILENCE = 30.0  # seconds without a line, where there is no terminal, before one says what goes on
PATIENCE = 10  # steps in a row whose groups have all the same reward, before that is said


class Pulse:
    """What is being done, for people who wait: on a terminal beside the bar, elsewhere a line now and then."""

    def __init__(self) -> None:
        self.console: Any = None
        self.stage = ""  # what is said before everything else
        self.spoke = time.monotonic()
        self.doing("starting")

    def doing(self, what: str) -> None:
        """Something new begins."""
        self.what, self.detail, self.since = what, "", time.monotonic()

    def tell(self, detail: str) -> None:
        """How far it is."""
        self.detail = detail

    def __str__(self) -> str:
        seconds = round(time.monotonic() - self.since)
        return ", ".join(filter(None, (self.stage, self.what, self.detail, f"{seconds // 60} min {seconds % 60} s")))

    def line(self, text: str) -> None:
        self.spoke = time.monotonic()
        self.console.print(text, soft_wrap=True)  # a terminal's width is nobody's where there is none

    def show(self, log: Any) -> None:
        """log: a :class:`fastgrpo.trainer.logs.RunLog`."""
        if log.console.is_terminal:
            log.update(log.task, description=f"{log.name}, {self}")
        elif time.monotonic() - self.spoke >= SILENCE:
            self.line(f"{self}; {log.step} of {log.total} steps done")

    @contextmanager
    def beating(self, log: Any, every: float = 1.0) -> Iterator[None]:
        """Inside, a thread looks every so many seconds whether there is something to show."""
        self.console, self.spoke, stop = log.console, time.monotonic(), threading.Event()

        def beat():
            while not stop.wait(every):
                self.show(log)

        thread = threading.Thread(target=beat, daemon=True, name="fastgrpo-pulse")
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()


class Health:
    """Looks at every step's row, and says each thing once.

    Args:
        say: prints a line on the main rank. quiet: no warnings, on the other ranks.
        longest: ``max_completion_length``, to be named.
    """

    def __init__(self, say: Callable[[str], None], quiet: bool, longest: int) -> None:
        self.say, self.quiet, self.longest = say, quiet, longest
        self.said: set[str] = set()
        self.flat = 0  # steps in a row without spread

    def look(self, row: dict) -> None:
        """Warn of what the numbers of a step mean; ``row`` is the log's."""
        if not math.isfinite(row["grad_norm"]):
            return  # it comes again, or ends the run
        self.flat = self.flat + 1 if row["frac_reward_zero_std"] == 1 else 0
        if row["truncated"] > 0.5:
            self.warn(
                f"{row['truncated']:.0%} of the answers reached max_completion_length = {self.longest} unfinished: "
                "their rewards are those of cut texts. Raise it, or see whether the model ever ends its answers"
            )
        if self.flat == PATIENCE:
            level = "no reward at all" if row["reward"] is None else f"the mean reward is {row['reward']:.3g}"
            self.warn(
                f"for {PATIENCE} steps every group's answers had the same reward ({level}): nothing is learnt. The "
                "prompts are too hard or too easy, or the rewards cannot tell answers apart; max_resample_times draws "
                "such groups again"
            )
        if row.get("skipped"):
            self.once(
                "skipped: the share of tokens in answers without an advantage, mostly of groups that earned the same "
                "throughout. They have no gradient, so the learner leaves them out"
            )

    def warn(self, text):
        self.once(text, lambda said: warnings.warn(said, stacklevel=5))

    def once(self, text, how=None):
        """Numbers aside, each text is said once."""
        key = text.partition(" ")[2][:40]
        if key not in self.said and not self.quiet:
            self.said.add(key)
            (how or self.say)(text)


def save_bad_batch(folder: str, rank: int, step: int, row: dict, episodes: list) -> NoReturn:
    """Stops a run whose next weights would be NaN, and leaves what led there."""
    path = Path(folder) / f"bad-batch-{step}-rank{rank}.pt"
    torch.save({"row": row, "episodes": [vars(e) for e in episodes]}, path)
    raise FloatingPointError(
        f"step {step}: loss {row['loss']}, gradient norm {row['grad_norm']}; the weights are as they were, the batch "
        f"is in {path}"
    )

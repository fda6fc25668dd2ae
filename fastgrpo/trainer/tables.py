"""Sample answers as a table."""

from itertools import takewhile

from rich.table import Table
from rich.text import Text

LONG = 20  # characters that prompts may share before they are said once


def answer_table(title: str, rows: list[tuple[str, str, float]], what: str) -> Table:
    """``rows``: (prompt, answer, number). A prompt stands beside its first answer; what all prompts begin and end with,
    as a chat template, beside the first alone."""
    table = Table("prompt", "answer", what, title=title)
    prompts = shortened([prompt for prompt, *_ in rows])
    for prompt, before, (_, answer, number) in zip(prompts, [None, *prompts], rows):
        table.add_section()
        table.add_row(Text(prompt if prompt != before else ""), Text(answer), f"{number:.3g}")
    return table


def shortened(prompts: list[str]) -> list[str]:
    """Each but those equal to the first with an ellipsis for what all share, where that is much."""
    head = shared(prompts)
    tail = shared([prompt[head:][::-1] for prompt in prompts])

    def short(prompt):
        middle = prompt[head if head > LONG else 0 : len(prompt) - (tail if tail > LONG else 0)]
        return "…" * (head > LONG) + middle + "…" * (tail > LONG)

    return [prompt if prompt == prompts[0] else short(prompt) for prompt in prompts]


def shared(texts):
    """How many characters all begin with."""
    return sum(1 for _ in takewhile(lambda column: len(set(column)) == 1, zip(*texts)))

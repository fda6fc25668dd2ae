"""Worlds to train in: sort, addition, countdown, arithmetic, gsm8k. Each gives rows: a prompt, what its rewards need.

A dataset is named ``KIND:NAME[:PART]``. KIND ``world``: chat prompts with instructions, for a real model; ``tiny``:
terse prompts for the tiny model of the same name, which is made offline in seconds. PART is ``train`` (the default) or
``test``, whose prompts are never in ``train``; for gsm8k it is a file, ``world:gsm8k:path/train.jsonl`` (``tiny:gsm8k``
without one draws stories in GSM8K's format).
"""

import json
import random
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

HELD_OUT = 11  # about every eleventh problem is kept from training
TRAIN_ROWS, TEST_ROWS = 4096, 256
THINK = "Think step by step inside <think> </think>, then give {what} alone inside <answer> </answer>."


def sort_problem(draw, tiny):
    digits = "".join(draw.choices("0123456789", k=4 if tiny else 12))
    answer = "".join(sorted(digits))
    text = f"Sort the digits {digits} in ascending order. " + THINK.format(what="the sorted digits")
    return {"prompt": f"{digits}=" if tiny else text, "answer": answer, "completion": answer}


def addition_problem(draw, tiny):
    a, b = draw.randint(0, 30), draw.randint(0, 30)
    prompt = f"{a}+{b}=" if tiny else f"What is {a} + {b}? Answer with the number only."
    return {"prompt": prompt, "answer": str(a + b), "completion": str(a + b)}


def calculate(a, sign, b):
    return {"+": a + b, "-": a - b, "*": a * b}[sign]


def countdown_problem(draw, tiny):
    """Numbers and a target that an expression of them reaches."""
    while True:
        numbers = [draw.randint(1, 9 if tiny else 99) for _ in range(3 if tiny else draw.choice((3, 4)))]
        terms = draw.sample(numbers, draw.randint(2, len(numbers)))
        text, value = str(terms[0]), terms[0]
        for term in terms[1:]:
            sign = draw.choice("+-" if tiny else "+-*")
            text = f"({text})*{term}" if sign == "*" else f"{text}{sign}{term}"
            value = calculate(value, sign, term)
        if 1 <= value <= (27 if tiny else 999) and value not in numbers:
            break
    given = ",".join(map(str, numbers))
    prompt = (
        f"Use the numbers {given} to write an expression that equals {value}. Allowed are + - * / and parentheses, and "
        f"each number at most once. {THINK.format(what='the expression')}"
    )
    columns = {"numbers": numbers, "target": value, "answer": str(value), "completion": text}
    return {"prompt": f"{given}:{value}=" if tiny else prompt, **columns}


NAMES = ("Ann", "Ben", "Cleo", "Dan", "Eva", "Finn")
THINGS = ("pens", "eggs", "books", "coins", "cards", "shells")
STORIES = [  # (text, sign)
    ("{name} has {a} {thing} and buys {b} more. How many {thing} does {name} have?", "+"),
    ("{name} finds {a} {thing} and then {b} others. How many {thing} are found?", "+"),
    ("{name} has {a} {thing} and gives away {b}. How many {thing} are left?", "-"),
    ("{name} fills {a} bags with {b} {thing} each. How many {thing} are there?", "*"),
]


def story(draw, largest):
    """-> (text, "a+b", its value)."""
    text, sign = draw.choice(STORIES)
    a, b = draw.randint(1, largest), draw.randint(1, largest)
    if sign == "*":
        a, b = draw.randint(2, min(largest, 99)), draw.randint(2, min(largest, 99))
    if sign == "-":
        a, b = max(a, b), min(a, b)
    text = text.format(name=draw.choice(NAMES), thing=draw.choice(THINGS), a=a, b=b)
    return text, f"{a}{sign}{b}", calculate(a, sign, b)


def arithmetic_problem(draw, tiny):
    text, _, value = story(draw, 6 if tiny else 999)
    prompt = text if tiny else f"{text} {THINK.format(what='the number')}"
    return {"prompt": prompt, "answer": str(value), "completion": f" {value}"}


def gsm8k_problem(draw, tiny):
    """What the tiny model of gsm8k starts from: stories solved in GSM8K's format."""
    text, expression, value = story(draw, 6)
    return {
        "prompt": f"{text}\n",
        "answer": str(value),
        "completion": f"{expression}=<<{expression}={value}>>{value}\n#### {value}",
    }


def read_json(path, name="dataset"):
    """What a .json file holds, or the rows of a JSON-lines file.

    Raises:
        ValueError: naming the dataset, or the file and the line.
    """
    if not path.is_file() or path.suffix not in (".jsonl", ".json"):
        got = f"{str(path)!r}{'' if path.exists() else ', which does not exist'}"
        raise ValueError(f"{name} must be a .jsonl or .json file, a list, a datasets object or 'world:NAME', got {got}")
    text = path.read_text(encoding="utf-8-sig")
    if path.suffix == ".json":
        return parse_json(text, path)
    lines = enumerate(text.split("\n"), 1)  # not splitlines: U+2028 and its like may stand inside a string
    return [parse_json(line, f"{path}, line {i}") for i, line in lines if line.strip()]


def parse_json(text, place):
    try:
        return json.loads(text)
    except ValueError as error:
        raise ValueError(f"{place}: expected JSON, got {text[:80]!r}: {error}") from error


def read_gsm8k(path, tiny):
    """Rows of a JSON-lines file with GSM8K's ``question`` and ``answer`` ("... #### 42")."""
    rows = []
    for number, row in enumerate(read_json(Path(path)), 1):
        if not isinstance(row, dict) or not {"question", "answer"} <= row.keys():
            raise ValueError(f"{path}, row {number}: expected {{'question': ..., 'answer': ...}}, got {row!r:.80}")
        question, solution = row["question"], row["answer"]
        prompt = f"{question}\n" if tiny else f"{question}\n{THINK.format(what='the final number')}"
        rows.append({"prompt": prompt, "answer": solution.rpartition("####")[2].strip(), "completion": solution})
    return rows


@dataclass(frozen=True)
class World:
    """A way to draw problems, and the tiny model that can learn them."""

    problem: Callable  # (random.Random, tiny) -> row; its "completion" is a right answer, for supervised fine-tuning
    words: bool = False  # the tiny tokenizer has words, not characters alone
    hidden_size: int = 64
    layers: int = 2


WORLDS = {
    "sort": World(sort_problem),
    "addition": World(addition_problem),
    "countdown": World(countdown_problem),
    "arithmetic": World(arithmetic_problem, words=True),
    "gsm8k": World(gsm8k_problem, words=True),
}


def problems(world, count, seed, held_out=False, tiny=True):
    """``count`` rows of a world; ``held_out`` draws from the problems that training never sees."""
    draw, rows = random.Random(seed), []
    while len(rows) < count:
        row = world.problem(draw, tiny)
        if (zlib.crc32(row["prompt"].encode()) % HELD_OUT == 0) == held_out:
            rows.append(row)
    return rows


def parse(spec):
    """``"tiny:countdown:test"`` -> (True, the world's name, "test")."""
    kind, _, rest = spec.partition(":")
    name, _, part = rest.partition(":")
    if kind not in ("world", "tiny") or name not in WORLDS:
        raise ValueError(f"expected 'world:NAME' or 'tiny:NAME' with NAME one of {', '.join(WORLDS)}, got {spec!r}")
    return kind == "tiny", name, part


def load_rows(spec, seed=0):
    """``"world:countdown"``, ``"tiny:sort:test"``, ``"world:gsm8k:train.jsonl"`` -> a list of rows.

    Raises:
        ValueError: no such world or part, or a file that is missing or not in GSM8K's format.
    """
    tiny, name, part = parse(spec)
    if name == "gsm8k" and Path(part).is_file():
        rows = read_gsm8k(part, tiny)
    elif name == "gsm8k" and (part.endswith(".jsonl") or not tiny):
        raise ValueError(f"gsm8k needs a file: '{spec.partition(':')[0]}:gsm8k:path/train.jsonl', got {spec!r}")
    elif part in ("", "train", "test"):
        count = TEST_ROWS if part == "test" else TRAIN_ROWS
        rows = problems(WORLDS[name], count, seed, part == "test", tiny)
    else:
        raise ValueError(f"a world's part must be 'train' or 'test', got {part!r}")
    return rows if tiny else [{**r, "prompt": [{"role": "user", "content": r["prompt"]}]} for r in rows]


def tiny_tokenizer(world: World, vocabulary: int | None = None) -> Any:
    """Of the model's own class: a token a character, or words learnt from a world's texts; padded to ``vocabulary``."""
    from transformers import Qwen2Tokenizer

    texts = [row["prompt"] + row["completion"] for row in problems(world, 512, 0)]
    # one special token: any other would be skipped where an answer is decoded, and "0<bos>2" taken for "02"
    words = ["<pad>", "<bos>", "<eos>", *sorted(set("".join(texts)))]
    words += [f"<unused{i}>" for i in range((vocabulary or 0) - len(words))]
    special: dict[str, Any] = {"pad_token": "<eos>", "eos_token": "<eos>", "bos_token": None, "unk_token": None}
    tokenizer: Any = Qwen2Tokenizer(vocab={word: i for i, word in enumerate(words)}, merges=[], **special)
    return tokenizer.train_new_from_iterator(texts, 512) if world.words else tokenizer


def tiny_model(spec, seed=0, vocabulary=None, device="cpu"):
    """``"tiny:NAME"`` -> (a small Qwen2 with random weights, its tokenizer): the tiny presets' ``sft`` section teaches
    it so much that some samples earn a reward."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    world = WORLDS[parse(spec)[1]]
    tokenizer = tiny_tokenizer(world, vocabulary)
    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=world.hidden_size,
        intermediate_size=4 * world.hidden_size,
        num_hidden_layers=world.layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=512,
        tie_word_embeddings=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model: Any = Qwen2ForCausalLM(config)
    return model.to(device), tokenizer

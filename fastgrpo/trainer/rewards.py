"""Rule rewards, and how a config names a reward function.

A reward function is TRL's: ``f(prompts, completions, **columns) -> list[float | None]``, called with keywords. A
completion is a text, or for chat prompts a list of messages; ``completion_ids`` and the dataset's columns come along.
None: this answer cannot be scored by this function.
"""

import ast
import asyncio
import functools
import importlib
import importlib.util
import inspect
import math
import re
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from functools import partial
from typing import Any

from fastgrpo.checks import UserError
from fastgrpo.trainer.judge import judge
from fastgrpo.trainer.reward_model import reward_model

RewardFunction = Callable[..., list[float | None]]  # async ones too
Rewards = RewardFunction | str | dict[str, Any] | Sequence[RewardFunction | str | dict[str, Any]]

NUMBER = re.compile(
    r"""(?<![\w.]) (?P<sign>[-+]?) (?:[$€£]\s?)? (?P<inner>[-+]?)   # no sign behind a digit: "10-5" is two numbers
    (?P<value> (?: \d{1,3}(?:,\d{3})+(?![\d,]) | \d+ ) (?:\.\d+)? | \.\d+ ) (?P<exponent>[eE][-+]?\d+)?
    (?: \s?/\s? (?P<below>\d+(?:\.\d+)?) )? (?P<percent>\s?%)?""",
    re.VERBOSE,
)
LATEX = [
    (re.compile(r"\\[dt]?frac\s*\{([^{}]*)\}\s*\{([^{}]*)\}"), r"\1/\2"),  # \frac{3}{4} -> 3/4
    (re.compile(r"\{,\}|\\[,!]"), ","),  # 1{,}234 and 1\,234
    (re.compile(r"\\([$%])"), r"\1"),
    (re.compile("[−–]"), "-"),  # noqa: RUF001
]


def text_of(completion: str | list[dict[str, Any]]) -> str:
    """The text of a completion: itself, or its last message's."""
    return completion if isinstance(completion, str) else completion[-1]["content"] or ""


def final_answer(text):
    """What a text gives as its answer: behind </think>, inside <answer>, behind ####, inside the last \\boxed{}.

    A thought that never ended has no answer: "".
    """
    _, thought, text = text.rpartition("</think>")
    if not thought and "<think>" in text:
        return ""
    if "<answer>" in text:
        text = text.rpartition("<answer>")[2].partition("</answer>")[0]
    if "####" in text:
        text = text.rpartition("####")[2].strip().partition("\n")[0]
    if "\\boxed{" in text:
        text = find_boxed(text)
    return text.strip()


def find_boxed(text):
    """The content of the last \\boxed{...}, braces balanced."""
    content, depth = text.rpartition("\\boxed{")[2], 1
    for i, character in enumerate(content):
        depth += (character == "{") - (character == "}")
        if depth == 0:
            return content[:i]
    return content


def last_number(text):
    """-> (value, is a percentage) of the last number in a text, or None: "1,234", "-$5.00", "3/4", "2e-3", "-0.5%"."""
    for pattern, plain in LATEX:
        text = pattern.sub(plain, text)
    found = list(NUMBER.finditer(text))
    if not found:
        return None
    match = found[-1]
    value = float(match["value"].replace(",", "") + (match["exponent"] or ""))
    below = float(match["below"] or 1)
    if below == 0:
        return None
    negative = (match["sign"] == "-") != (match["inner"] == "-")
    return (-value if negative else value) / below, match["percent"] is not None


def same_number(a, b, tolerance):
    """Relative above 1, absolute below. Where one of two says percent, 50 % is 50 and is 0.5."""
    (a, a_percent), (b, b_percent) = a, b
    pairs = [(a, b)]
    if a_percent != b_percent:
        pairs.append((a / 100, b) if a_percent else (a, b / 100))
    return any(abs(x - y) <= tolerance * max(1.0, abs(y)) for x, y in pairs)


def exact_answer(completions: Sequence, answer: Sequence, **_) -> list[float | None]:
    """1.0 where the final answer is the column ``answer``, spaces aside."""
    pairs = [(final_answer(text_of(c)).split(), a) for c, a in zip(completions, answer)]
    return [None if a is None else float(words == final_answer(str(a)).split()) for words, a in pairs]


def numeric_answer(completions: Sequence, answer: Sequence, tolerance: float = 1e-6, **_) -> list[float | None]:
    """1.0 where the last number of the final answer is that of the column ``answer``. None: the column has none."""
    rewards = []
    for completion, expected in zip(completions, answer):
        expected = None if expected is None else last_number(final_answer(str(expected)))
        given = last_number(final_answer(text_of(completion)))
        right = None if expected is None else given is not None and same_number(given, expected, tolerance)
        rewards.append(None if right is None else float(right))
    return rewards


def think_format(completions: Sequence, answer_tags: bool = True, **_) -> list[float]:
    """1.0 for ``<think>...</think><answer>...</answer>``, each tag once and nothing around; without ``answer_tags`` for
    ``<think>...</think>`` and anything behind, as TRL's ``think_format_reward``."""
    return [float(has_answer_tags(t) if answer_tags else thinks_first(t)) for t in map(text_of, completions)]


def thinks_first(text):
    return text.startswith("<think>") and text.count("<think>") == 1 and "</think>" in text


def has_answer_tags(text):
    once = all(text.count(tag) == 1 for tag in ("<think>", "</think>", "<answer>", "</answer>"))
    return once and re.fullmatch(r"\s*<think>.*</think>\s*<answer>.*</answer>\s*", text, re.DOTALL) is not None


def length_penalty(
    completion_ids: Sequence[Sequence[int]], max_length: int, cache: int | None = None, **_
) -> list[float]:
    """DAPO's soft overlong punishment (arXiv:2503.14476, eq. 13): 0 up to ``max_length - cache`` tokens, then falling
    to -1 at ``max_length``, -1 beyond. ``cache``: a fifth of ``max_length``, as in the paper."""
    cache = max_length // 5 if cache is None else cache
    over = [len(ids) - (max_length - cache) for ids in completion_ids]
    return [0.0 if x <= 0 else -min(1.0, x / cache) if cache else -1.0 for x in over]


def get_soft_overlong_punishment(max_completion_len: int, soft_punish_cache: int) -> RewardFunction:
    """:func:`length_penalty` under the name that TRL has for it, ready made: a reward function."""

    def soft_overlong_punishment_reward(completion_ids: Sequence[Sequence[int]], **_) -> list[float | None]:
        return [*length_penalty(completion_ids, max_completion_len, soft_punish_cache)]

    return soft_overlong_punishment_reward


def countdown(
    completions: Sequence, numbers: Sequence[Sequence[int]], target: Sequence, partial_credit: float = 0.0, **_
) -> list[float]:
    """1.0 for an expression in + - * / and parentheses that gives ``target`` and uses each of ``numbers`` at most once;
    ``partial_credit`` for one that keeps to the numbers and misses the target."""
    rewards = []
    for completion, allowed, goal in zip(completions, numbers, target):
        text = final_answer(text_of(completion)).partition("=")[0]
        value, used = evaluate(text)
        valid = value is not None and not Counter(used) - Counter(allowed)
        rewards.append(0.0 if not valid else 1.0 if value == goal else partial_credit)
    return rewards


OPERATORS = {
    ast.Add: Fraction.__add__,
    ast.Sub: Fraction.__sub__,
    ast.Mult: Fraction.__mul__,
    ast.Div: Fraction.__truediv__,
}


def evaluate(text):
    """-> (exact value, integers used) of an arithmetic expression; (None, []) if it is none. Parsed, never run."""
    text = text.strip().strip("$").replace("\\times", "*").replace("\\div", "/").translate(str.maketrans("×÷−", "*/-"))  # noqa: RUF001
    if len(text) > 200 or not re.fullmatch(r"[\d+\-*/()\s]+", text):
        return None, []
    used = []

    def value(node):
        if isinstance(node, ast.Constant) and isinstance(node.value, int):
            used.append(node.value)
            return Fraction(node.value)
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
            return -value(node.operand)
        if isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
            return OPERATORS[type(node.op)](value(node.left), value(node.right))
        raise ValueError

    try:
        return value(ast.parse(text, mode="eval").body), used
    except (SyntaxError, ValueError, ZeroDivisionError, RecursionError, MemoryError):
        return None, []


MODEL = "{'name': 'reward_model', 'path': ...}"
# of arguments that no dataset brings, those that a shipped reward cannot do without
REQUIRED = {
    "length_penalty": ("max_length",),
    "get_soft_overlong_punishment": ("max_completion_len", "soft_punish_cache"),
    "reward_model": ("path",),
    "judge": ("base_url", "model"),
}
FACTORIES = {  # which make a function of their arguments
    "get_soft_overlong_punishment": get_soft_overlong_punishment,
    "reward_model": reward_model,
    "judge": judge,
}
RULES = (exact_answer, numeric_answer, think_format, length_penalty, countdown)
SHIPPED = {**{f.__name__: f for f in RULES}, **FACTORIES}


def resolve(reward: Any) -> Any:
    """A reward function from what a config may hold: the function itself, async or not; the name of a shipped one,
    "package.module:function" or "path/file.py:function"; or ``{"name": one of these, **arguments}``."""
    if hasattr(reward, "forward"):
        raise ValueError(f"reward must be a function or {MODEL}, got a {type(reward).__name__}")
    if callable(reward):
        return wait_for(reward) if inspect.iscoroutinefunction(reward) else reward
    arguments = dict(reward) if isinstance(reward, dict) else {"name": reward}
    name = arguments.pop("name", None)
    function = SHIPPED[name] if str(name) in SHIPPED else import_function(name)
    for needed in REQUIRED.get(name, ()):
        if needed not in arguments:
            raise ValueError(f"reward {name!r} needs {needed!r}")
    if name in FACTORIES:
        return function(**arguments)
    return resolve(bind(name, function, arguments) if arguments else function)


def bind(name, function, arguments):
    """The function with some of its arguments."""
    accepted = inspect.signature(function).parameters
    for argument in arguments:
        if argument not in accepted or accepted[argument].kind is inspect.Parameter.VAR_KEYWORD:
            raise ValueError(f"reward {name!r} has no argument {argument!r}")
    bound: Any = partial(function, **arguments)
    bound.__name__ = function.__name__
    return bound


def wait_for(function):
    """An async reward function as an ordinary one; in a thread of its own, since a notebook has a loop already."""

    @functools.wraps(function)
    def wait(**columns):
        with ThreadPoolExecutor(1) as thread:
            return thread.submit(lambda: asyncio.run(function(**columns))).result()

    return wait


def name_rewards(functions: Rewards, *datasets) -> dict[str, RewardFunction]:
    """{name: function}; one function, a name or a list of them, which find their columns in those of each dataset."""
    given: Any = functions if isinstance(functions, list | tuple) else [functions]
    resolved = [resolve(f) for f in given]
    if not resolved:
        raise ValueError("reward_funcs must hold at least one function, got none")
    names = [getattr(f, "__name__", type(f).__name__) for f in resolved]
    for name, function in zip(names, resolved):
        for columns in datasets:
            check_call(name, function, set(columns))
    return {name if names.count(name) == 1 else f"{name}_{i}": f for i, (name, f) in enumerate(zip(names, resolved))}


GIVEN = {"prompts", "completions", "completion_ids", "trainer_state"}  # besides the dataset's columns


def check_call(name, function, columns):
    """A reward function finds what it needs among the columns, and takes whatever else comes."""
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    parameters = inspect.signature(function).parameters.values()
    accepted = {p.name: p.default is p.empty for p in parameters if p.kind in kinds}
    if missing := {column for column, needed in accepted.items() if needed} - columns - GIVEN:
        raise ValueError(f"reward {name} needs the columns {sorted(missing)}, got {sorted(columns)}")
    refused = (columns | GIVEN) - {"prompt"} - accepted.keys()
    if refused and all(p.kind is not inspect.Parameter.VAR_KEYWORD for p in parameters):
        raise ValueError(f"reward {name} must accept what it does not use, as **kwargs; it also gets {sorted(refused)}")


def call_reward(name, function, columns, count):
    """The rewards a function gives ``count`` answers. Its own exception comes with its name, and its traceback."""
    try:
        values = function(**columns)
    except UserError:
        raise
    except Exception as error:
        raise RuntimeError(f"reward function {name} failed: {type(error).__name__}: {error}") from error
    return check_rewards(name, values, count)


def warn_unscored(rewards, quiet=False):
    """rewards  # (B, R), NaN: cannot score. Once a run: answers without any reward teach nothing, silently."""
    unscored = rewards.isnan().all(1)
    if unscored.any() and not quiet:
        share = "all" if unscored.all() else "some"
        warnings.warn(
            f"{share} answers got no reward: every reward function returned None or NaN for them. They are "
            "left out of the mean reward, and nothing is learnt from them",
            stacklevel=2,
        )


def check_rewards(name, values, count):
    """What a reward function returned, as floats; NaN: it cannot score."""
    try:
        values = [math.nan if value is None else float(value) for value in values]
    except (TypeError, ValueError) as error:
        raise UserError(f"reward function {name} must return a list of numbers or None, got {values!r:.200}") from error
    if len(values) != count:
        raise UserError(f"reward function {name} must return {count} values, got {len(values)}")
    if any(map(math.isinf, values)):
        raise UserError(f"reward function {name} must return finite numbers, or None where it cannot score, got inf")
    return values


def import_function(name):
    """The function behind "package.module:function" or "path/file.py:function"."""
    module, _, attribute = str(name).rpartition(":")
    if not module or not attribute:
        forms = f"'module:function', 'path/file.py:function' or {MODEL}"
        raise ValueError(f"reward must be one of {', '.join(SHIPPED)}, {forms}, got {name!r}")
    try:
        if module.endswith(".py"):
            spec: Any = importlib.util.spec_from_file_location("fastgrpo_user_rewards", module)
            loaded = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(loaded)
        else:
            loaded = importlib.import_module(module)
    except (ImportError, FileNotFoundError) as error:
        raise ValueError(f"reward {name!r} cannot be loaded: {error}") from error
    if not callable(getattr(loaded, attribute, None)):
        own = [n for n, f in vars(loaded).items() if inspect.isfunction(f) and f.__module__ == loaded.__name__]
        raise ValueError(f"reward {name!r} cannot be loaded: {module} has no function {attribute!r}, it has {own}")
    return getattr(loaded, attribute)

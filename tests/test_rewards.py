"""Rule rewards against tables of hard cases, and against TRL's where they say the same."""

import pytest
import torch

from fastgrpo.trainer import rewards
from fastgrpo.trainer.rewards import evaluate, final_answer, last_number, resolve

pytestmark = pytest.mark.quick


def chat(text):
    return [{"role": "assistant", "content": text}]


def both(function, text, **columns):
    """A reward of one answer, the same as text and as chat messages."""
    columns = {name: [value] for name, value in columns.items()}
    (plain,), (message,) = (function(prompts=["?"], completions=[c], **columns) for c in (text, chat(text)))
    assert plain == message
    return plain


FINAL = [
    ("42", "42"),
    (" 42\n", "42"),
    ("<think>1, 2</think>\n 3", "3"),
    ("<think>a</think><think>b</think>c", "c"),
    ("no tags, then </think>7", "7"),
    ("<think>still going 42", ""),
    ("6 * 7 = 42\n#### 42\n\nNext question", "42"),
    ("#### 1\n#### 2", "2"),
    ("<answer>1</answer> or <answer> 2 </answer> yes", "2"),
    ("<answer>cut off", "cut off"),
    (r"so \boxed{\frac{1}{2}}.", r"\frac{1}{2}"),
    (r"\boxed{1} and \boxed{2}", "2"),
    (r"\boxed{open {1}", "open {1}"),
    (r"<think>\boxed{1}</think><answer>\boxed{2}</answer>", "2"),
    ("", ""),
]


@pytest.mark.parametrize(("text", "answer"), FINAL)
def test_final_answer(text, answer):
    assert final_answer(text) == answer


NUMBERS = [
    ("1,234", 1234), ("1,234,567.5", 1234567.5), ("$5.00", 5), ("-$5.00", -5), ("$-5", -5), ("3/4", 0.75), 
    ("-3/4", -0.75), (r"\frac{3}{4}", 0.75), (r"-\dfrac{3}{4}", -0.75), (r"\$1{,}234.50", 1234.5), 
    ("1, 2, 3", 3), ("1,2,3", 3),
    ("10-5", 5), ("10 - 5", 5), ("= -5", -5), ("−7", -7), (".5", 0.5), ("5.", 5), ("it is 5.", 5), ("2e-3", 0.002),  # noqa: RUF001
    ("1.5E6", 1.5e6), ("5kg", 5), ("**42**", 42), ("(42)", 42), ("x1", None), ("H2O", None), ("no number", None),
    ("", None), ("1/0", None), ("€3", 3), ("+8", 8), ("007", 7), ("3 / 4", 0.75), ("5 of 12 eggs", 12),
]  # fmt: skip


@pytest.mark.parametrize(("text", "value"), NUMBERS)
def test_last_number(text, value):
    assert last_number(text) == (None if value is None else (pytest.approx(value), False))


@pytest.mark.parametrize(("text", "value"), [("-0.5%", -0.5), ("50 %", 50), (r"12.5\%", 12.5), ("1/2%", 0.5)])
def test_percentages(text, value):
    assert last_number(text) == (pytest.approx(value), True)


NUMERIC = [
    ("The answer is 1,234.", "1234", 1.0),
    ("$5.00", 5, 1.0),
    ("3/4", "0.75", 1.0),
    ("-0.5%", "-0.5%", 1.0),
    ("-0.5%", "-0.005", 1.0),
    ("50%", "50", 1.0),
    ("50%", "0.5", 1.0),
    ("0.5%", "50%", 0.0),
    ("0.5", "50%", 1.0),
    ("no number", "3", 0.0),
    ("3", "no number", None),
    ("3", None, None),
    ("7 apples", 7.0, 1.0),
    ("7.1", 7, 0.0),
    ("-7", 7, 0.0),
    ("0.333333333", "1/3", 1.0),
    ("1000000.5", "1000000", 1.0),  # the tolerance is relative above 1
    ("first 7 then #### 8", "some steps\n#### 8", 1.0),
    ("<think>8", 8, 0.0),
    ("9" * 400, "9" * 400, 0.0),  # beyond a float: no crash
]


@pytest.mark.parametrize(("text", "answer", "reward"), NUMERIC)
def test_numeric_answer(text, answer, reward):
    assert both(rewards.numeric_answer, text, answer=answer) == reward


def test_numeric_tolerance():
    assert rewards.numeric_answer(completions=["3.14"], answer=["3.14159"], tolerance=1e-2) == [1.0]
    assert rewards.numeric_answer(completions=["3.14"], answer=["3.14159"]) == [0.0]


@pytest.mark.parametrize(
    ("text", "answer", "reward"),
    [
        ("1134", "1134", 1.0),
        (" 1134 \n", "1134", 1.0),
        ("1134", 1134, 1.0),
        ("1134.", "1134", 0.0),
        ("Paris", "paris", 0.0),
        ("<think>Rome?</think> <answer>Paris</answer>", "Paris", 1.0),
        (r"\boxed{x +  1}", "x + 1", 1.0),
        ("", "1", 0.0),
        ("1", None, None),
    ],
)
def test_exact_answer(text, answer, reward):
    assert both(rewards.exact_answer, text, answer=answer) == reward


FORMATS = [  # text, with answer tags, without
    ("<think>a</think><answer>b</answer>", 1.0, 1.0),
    ("<think>\na\n</think>\n\n<answer>\nb\n</answer>\n", 1.0, 1.0),
    ("<think></think><answer></answer>", 1.0, 1.0),
    ("<think>a</think>b", 0.0, 1.0),
    ("<think>a</think>b<answer>c</answer>", 0.0, 1.0),
    ("<think>a<think>b</think><answer>c</answer>", 0.0, 0.0),
    ("<think>a</think></think><answer>c</answer>", 0.0, 1.0),
    ("so: <think>a</think><answer>b</answer>", 0.0, 0.0),
    (" <think>a</think><answer>b</answer>", 1.0, 0.0),
    ("<answer>b</answer><think>a</think>", 0.0, 0.0),
    ("<think>a</think><answer>b</answer><answer>c</answer>", 0.0, 1.0),
    ("<think>a</think><answer>b", 0.0, 1.0),
    ("<think>a", 0.0, 0.0),
    ("", 0.0, 0.0),
]


@pytest.mark.parametrize(("text", "tags", "bare"), FORMATS)
def test_think_format(text, tags, bare):
    assert both(rewards.think_format, text) == tags
    assert rewards.think_format(completions=[text], answer_tags=False) == [bare]


def test_think_format_is_trls():
    trl = pytest.importorskip("trl.rewards")
    texts = [text for text, *_ in FORMATS]
    ours = rewards.think_format(completions=texts, answer_tags=False)
    assert ours == trl.think_format_reward([chat(text) for text in texts])


@pytest.mark.parametrize(("maximum", "cache"), [(100, 20), (100, 0), (7, 7), (10, 3)])
def test_length_penalty_is_trls(maximum, cache):
    trl = pytest.importorskip("trl.rewards")
    ids = [[1] * n for n in range(maximum + 10)]
    expected = trl.get_soft_overlong_punishment(maximum, cache)(completion_ids=ids)
    ours = rewards.length_penalty(prompts=None, completions=None, completion_ids=ids, max_length=maximum, cache=cache)
    assert ours == pytest.approx(expected)
    assert ours[maximum - cache] == 0


def test_the_penalty_under_trls_name():
    """Ready made, as a config names it; logged under TRL's name."""
    trl = pytest.importorskip("trl.rewards")
    arguments = {"max_completion_len": 10, "soft_punish_cache": 4}
    named = rewards.name_rewards([{"name": "get_soft_overlong_punishment", **arguments}], {"prompt"})
    ids = [[1] * n for n in range(14)]
    ours = named["soft_overlong_punishment_reward"](prompts=ids, completions=ids, completion_ids=ids)
    theirs = trl.get_soft_overlong_punishment(**arguments)
    assert ours == pytest.approx(theirs(completion_ids=ids))
    assert theirs.__name__ == "soft_overlong_punishment_reward"
    with pytest.raises(ValueError, match="'get_soft_overlong_punishment' needs 'soft_punish_cache'"):
        rewards.resolve({"name": "get_soft_overlong_punishment", "max_completion_len": 10})


def test_length_penalty_defaults_to_a_fifth():
    ids = [[1] * n for n in (80, 90, 100, 101)]
    assert rewards.length_penalty(completion_ids=ids, max_length=100) == [0.0, -0.5, -1.0, -1.0]


COUNTDOWN = [
    ("3*5+7", 1.0), (" (3 * 5) + 7 ", 1.0), ("3*5+7 = 22", 1.0), ("3×5+7", 1.0), (r"3 \times 5 + 7", 1.0),  # noqa: RUF001
    ("<think>3+5</think><answer>3*5+7</answer>", 1.0), (r"\boxed{3*5+7}", 1.0), ("$3*5+7$", 1.0), ("7-3*-5", 1.0),
    ("22", 0.0), ("3*5+7+0", 0.0), ("3+5+7+7", 0.0), ("3+5+7", 0.1), ("3*5", 0.1), ("7/(5-5)", 0.0),
    ("3**5", 0.0), ("3//5", 0.0), ("3*5+7)", 0.0), ("", 0.0), ("the answer", 0.0), ("__import__('os')", 0.0),
    ("(" * 90 + "3" + ")" * 90, 0.1), ("(" * 300 + "3" + ")" * 300, 0.0), ("03*5+7", 0.0), ("1_0", 0.0), ("3(5)", 0.0),
    ("3.0*5+7", 0.0), ("3*5\n+7", 0.0), ("9" * 150, 0.0),
]  # fmt: skip


@pytest.mark.parametrize(("text", "reward"), COUNTDOWN)
def test_countdown(text, reward):
    assert both(rewards.countdown, text, numbers=[3, 5, 7], target=22) == pytest.approx(
        0.0 if reward == 0.1 else reward
    )
    credited = rewards.countdown([text], numbers=[[3, 5, 7]], target=[22], partial_credit=0.1)
    assert credited == [pytest.approx(reward)]


def test_countdown_is_exact_and_counts_its_numbers():
    assert rewards.countdown(["1/3*3", "3+3", "3+3"], [[1, 3, 3], [3], [3, 3]], [1, 6, 6]) == [1.0, 0.0, 1.0]
    assert evaluate("8/(3-8/3)") == (24, [8, 3, 8, 3])


def score(completions, answer, weight=1.0, **_):
    return [weight * len(c) for c in completions]


def test_resolve(tmp_path):
    assert resolve(score) is score
    assert resolve("numeric_answer") is rewards.numeric_answer
    assert resolve(f"{__name__}:score") is score
    penalty = resolve({"name": "length_penalty", "max_length": 10, "cache": 5})
    assert penalty.__name__ == "length_penalty"
    assert penalty(prompts=["?"], completions=["x"], completion_ids=[[1] * 10]) == [-1.0]
    file = tmp_path / "mine.py"
    file.write_text("def half(completions, **_):\n    return [0.5] * len(completions)\n")
    assert resolve(f"{file}:half")(prompts=["?"], completions=["x"]) == [0.5]


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        ("exact", "reward must be one of exact_answer, .* got 'exact'"),
        ({"max_length": 3}, "reward must be one of"),
        (3, "reward must be one of"),
        ({"name": "numeric_answer", "tolerence": 1}, "reward 'numeric_answer' has no argument 'tolerence'"),
        ({"name": "numeric_answer", "_": 1}, "has no argument '_'"),
        ("length_penalty", "reward 'length_penalty' needs 'max_length'"),
        ({"name": "reward_model"}, "reward 'reward_model' needs 'path'"),
        (["exact_answer"], "reward must be one of"),
        ("no.such.module:f", "cannot be loaded"),
        ("nowhere.py:f", "cannot be loaded"),
        ("json:nothing", "cannot be loaded"),
    ],
)
def test_resolve_says_what_is_wrong(reward, message):
    with pytest.raises(ValueError, match=message):
        resolve(reward)


CALLS = [
    (rewards.exact_answer, {"answer"}), (rewards.countdown, {"numbers", "target"}), (rewards.think_format, set()),
    (resolve({"name": "length_penalty", "max_length": 10}), set()),
    (lambda prompts, completions, *, topic, **columns: None, {"topic"}),
    (lambda completions, trainer_state, **_: None, set()),
]  # fmt: skip


@pytest.mark.parametrize(("function", "needed"), CALLS, ids=range(len(CALLS)))
def test_columns_needed(function, needed):
    rewards.name_rewards(function, {"prompt", *needed}, {"prompt", "more", *needed})
    for column in needed:
        with pytest.raises(ValueError, match=f"needs the columns .*{column}"):
            rewards.name_rewards(function, {"prompt", *needed}, {"prompt", *needed} - {column})  # of the second dataset


def test_a_function_that_would_fail_at_its_first_call():
    """The trainer passes every column: without **kwargs that is an error after the first rollout."""
    with pytest.raises(
        ValueError, match=r"reward f must accept what it does not use.*\['completion_ids', 'topic', 'tr"
    ):
        rewards.name_rewards(lambda_named("f", lambda prompts, completions: []), {"prompt", "topic"})
    names = "prompts, completions, completion_ids, trainer_state, topic"
    rewards.name_rewards(eval(f"lambda {names}: []"), {"prompt", "topic"})


def lambda_named(name, function):
    function.__name__ = name
    return function


RETURNED = [
    (None, "must return a list of numbers or None, got None"), (1.0, "must return a list of numbers or None, got 1.0"),
    (["a", 1], "must return a list of numbers or None"), ([1.0], "must return 2 values, got 1"),
    ([1.0, float("-inf")], "must return finite numbers"),
]  # fmt: skip


@pytest.mark.parametrize(("values", "message"), RETURNED, ids=str)
def test_what_a_function_returns(values, message):
    with pytest.raises(ValueError, match=f"reward function f {message}"):
        rewards.check_rewards("f", values, 2)


def test_async_functions():
    """Also with arguments, and where a loop runs already, as in a notebook."""
    import asyncio

    async def later(completions, bonus=0, **_):
        await asyncio.sleep(0)
        return [len(c) + bonus for c in completions]

    (plain,) = rewards.name_rewards(later, {"prompt"}).values()
    assert plain.__name__ == "later"

    async def notebook():
        return plain(prompts=[], completions=["a", "bc"])

    assert asyncio.run(notebook()) == [1, 2]


def test_a_model_is_no_function():
    torch = pytest.importorskip("torch")
    with pytest.raises(ValueError, match=r"must be a function or {'name': 'reward_model', 'path': ...}, got a Linear"):
        resolve(torch.nn.Linear(1, 1))


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Real memory: transformers fills what it allocates."""
    torch.manual_seed(0)

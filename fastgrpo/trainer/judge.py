"""A language model as the judge: a reward function that asks an OpenAI-compatible endpoint for a score."""

import hashlib
import inspect
import json
import os
import random
import re
import sqlite3
import string
import threading
import time
import urllib.error
import urllib.request
import warnings
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import closing
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import Any

from fastgrpo.checks import Checked, Count, CountOr0, Finite, NonNegative, Positive, UserError, mistake, require

PROMPT = """Judge how well the answer below responds to the prompt: whether it is right, complete and to the point.

<prompt>
{prompt}
</prompt>

<answer>
{completion}
</answer>

Give your reasons in a few sentences, then end with a line "Score: N", N a whole number from 0 to 10, the best."""
BUSY = {408, 409, 425, 429, 500, 502, 503, 504, 529}  # HTTP statuses that may pass
OWN = {"prompt", "completion"}  # names in a template that are no columns
COUNTING = threading.Lock()  # += on a Counter is not one step


@dataclass(frozen=True, kw_only=True)
class JudgeSettings(Checked):
    """Settings of the reward function ``judge``.

    Args:
        base_url: of the endpoint, up to ``/chat/completions``, as in "http://localhost:8000/v1".
        model: its name there.
        prompt: what is asked of each answer; ``{prompt}``, ``{completion}`` and ``{column}`` of the dataset are put in,
            a brace of its own is doubled.
        system: a system message before it; None: none.
        pattern: a regular expression whose first group is the score; its last match in a reply counts.
        min_score, max_score: the ends of the judge's scale, which become 0 and 1; a score outside is no score.
        temperature: of the judge.
        max_tokens: of its reply.
        extra_body: further fields of the request, or others in place of ours; null leaves one out.
        api_key_env: the environment variable that holds the key; None: none is sent.
        timeout: seconds without a byte after which a request has failed.
        max_retries: further tries after a failure, or a reply without a score.
        backoff: seconds before the second try, doubled each time up to 60; a server's Retry-After goes before it.
        concurrency: requests at a time, of each rank.
        cache: a file that keeps replies (SQLite), so that no question is asked twice, also by later runs; None: none.
    """

    base_url: str
    model: str
    prompt: str = PROMPT
    system: str | None = None
    pattern: str = r"(?i)score\W*?(-?\d+(?:\.\d+)?)"
    min_score: Finite = 0.0
    max_score: Finite = 10.0
    temperature: NonNegative = 0.0
    max_tokens: Count = 1024
    extra_body: dict | None = None
    api_key_env: str | None = None
    timeout: Positive = 60.0
    max_retries: CountOr0 = 5
    backoff: NonNegative = 1.0
    concurrency: Count = 16
    cache: str | None = None

    def check_combinations(self) -> None:
        super().check_combinations()
        require(
            self.base_url.startswith(("http://", "https://")),
            f"base_url must begin with http:// or https://, got {self.base_url!r}",
        )
        require(
            self.min_score < self.max_score, f"min_score must be below max_score {self.max_score}, got {self.min_score}"
        )
        require(
            self.api_key_env is None or bool(os.environ.get(self.api_key_env)),
            f"api_key_env must name a variable of the environment, got {self.api_key_env!r}, which is not set",
        )
        try:
            require(re.compile(self.pattern).groups >= 1, f"pattern must have a group, got {self.pattern!r}")
        except re.error as error:
            mistake(f"pattern must be a regular expression, got {self.pattern!r}: {error}")
        try:
            odd = [name for name in fields_of(self.prompt) if not name.isidentifier()]
            require(not odd, f"prompt must name columns in its braces, and double braces of its own, got {odd}")
        except ValueError as error:
            mistake(f"prompt must double braces of its own: {error}")


class Failure(Exception):
    """A try that gave no score. ``wait``: seconds that the server asks for. ``reached``: it answered."""

    def __init__(self, message: str, wait: float | None = None, reached: bool = True) -> None:
        super().__init__(message)
        self.wait, self.reached = wait, reached


def judge(**settings: Any) -> Callable[..., list[float | None]]:
    """A reward function from :class:`JudgeSettings`: the judge's score of each answer, its scale mapped to [0, 1].

    What failed for now (timeouts, a busy server, a reply without a score) is tried again; an answer without a score in
    the end gets None, and a warning says how many. Its ``counts`` (a Counter) has "requests", "retries", "cache_hits"
    and "failures".

    Raises:
        ValueError: a bad setting. When called, UserError: the endpoint refuses the request, or no question of a call
        reached it.
    """
    given = JudgeSettings(**settings)
    counts, cache = Counter(), None if given.cache is None else Cache(Path(given.cache))

    def judge(prompts, completions, **columns):
        questions = [
            given.prompt.format(prompt=text_of(p), completion=text_of(c), **values)
            for p, c, values in zip(prompts, completions, rows_of(columns, needed, len(completions)))
        ]
        replies = answers(given, list(dict.fromkeys(questions)), cache, counts)
        return [replies[question] for question in questions]

    needed = sorted(set(fields_of(given.prompt)) - OWN)
    kind = inspect.Parameter
    parameters = [kind(name, kind.KEYWORD_ONLY) for name in ("prompts", "completions", *needed)]
    function: Any = judge
    function.__signature__ = inspect.Signature([*parameters, kind("columns", kind.VAR_KEYWORD)])
    function.counts = counts
    return function


def fields_of(template):
    """The names in a template's braces."""
    return [name for _, name, *_ in string.Formatter().parse(template) if name is not None]


def text_of(messages):
    """A text as it is; chat messages one below the other, a single one without its role."""
    if isinstance(messages, str):
        return messages
    if len(messages) == 1:
        return messages[0]["content"] or ""
    return "\n\n".join(f"{m['role']}: {m['content']}" for m in messages)


def rows_of(columns, names, count):
    return [{name: columns[name][i] for name in names} for i in range(count)]


def answers(given, questions, cache, counts):
    """{question: its score, None where there is none}"""
    bodies = {question: make_body(given, question) for question in questions}
    known = {} if cache is None else cache.read({q: make_key(given, b) for q, b in bodies.items()})
    scores = {q: score for q, reply in known.items() if (score := find_score(given, reply)) is not None}
    counts["cache_hits"] += len(scores)
    errors = []
    with ThreadPoolExecutor(given.concurrency) as pool:
        jobs = {pool.submit(ask, given, bodies[q], counts): q for q in questions if q not in scores}
        try:
            for job in as_completed(jobs):
                question, (reply, error) = jobs[job], job.result()
                scores[question] = None if error else find_score(given, reply)
                errors += [error] * (error is not None)
                if cache is not None and error is None:
                    cache.write(make_key(given, bodies[question]), reply)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    counts["failures"] += len(errors)
    if errors and len(errors) == len(jobs) and not any(error.reached for error in errors):
        raise UserError(f"judge: none of {len(jobs)} questions reached {given.base_url}: {errors[-1]}")
    if errors:
        warnings.warn(f"judge: {len(errors)} of {len(questions)} answers got no score: {errors[-1]}", stacklevel=3)
    return scores


def make_body(given, question):
    system = [] if given.system is None else [{"role": "system", "content": given.system}]
    body = {
        "model": given.model,
        "messages": [*system, {"role": "user", "content": question}],
        "temperature": given.temperature,
        "max_tokens": given.max_tokens,
        **(given.extra_body or {}),
    }
    return {name: value for name, value in body.items() if value is not None}


def make_key(given, body):
    return hashlib.sha256(json.dumps([given.base_url, body], sort_keys=True).encode()).hexdigest()


def find_score(given, reply):
    """The last score of a reply, mapped to [0, 1]; None: none, or outside the scale."""
    found = [match[1] for match in re.finditer(given.pattern, reply)]
    try:
        share = (float(found[-1]) - given.min_score) / (given.max_score - given.min_score)
    except (IndexError, TypeError, ValueError):
        return None
    return share if 0 <= share <= 1 else None


def ask(given, body, counts):
    """-> (a reply with a score, None), or (None, the last :class:`Failure`)"""
    failure = None
    for attempt in range(given.max_retries + 1):
        if failure is not None:
            count(counts, "retries")
            wait = min(given.backoff * 2 ** (attempt - 1), 60) * random.uniform(0.5, 1)
            time.sleep(wait if failure.wait is None else min(failure.wait, 60))
        count(counts, "requests")
        try:
            reply = post(given, body)
            if find_score(given, reply) is None:
                raise Failure(f"no score in the reply {reply[-200:]!r}")
            return reply, None
        except Failure as error:
            failure = error
    return None, failure


def count(counts, name):
    with COUNTING:
        counts[name] += 1


def post(given, body):
    """The text of one reply.

    Raises:
        Failure: it may pass. UserError: it will not.
    """
    headers = {"Content-Type": "application/json"}
    if given.api_key_env is not None:
        headers["Authorization"] = f"Bearer {os.environ[given.api_key_env]}"
    url = f"{given.base_url.rstrip('/')}/chat/completions"
    request = urllib.request.Request(url, json.dumps(body).encode(), headers)
    try:
        with urllib.request.urlopen(request, timeout=given.timeout) as response:
            raw = response.read()
    except urllib.error.HTTPError as error:
        message = f"{url} answered {error.code}: {said_by(error)}"
        if error.code not in BUSY:
            raise UserError(f"judge: {message}") from error
        after = error.headers.get("Retry-After", "")
        raise Failure(message, float(after) if after.isdigit() else None) from error
    except (OSError, HTTPException) as error:  # no connection, a timeout, a connection cut short
        raise Failure(f"{url}: {error!r}", reached=False) from error
    try:
        return json.loads(raw)["choices"][0]["message"]["content"] or ""
    except (ValueError, KeyError, IndexError, TypeError) as error:
        raise Failure(f"{url} answered no chat completion: {raw[:200]!r}") from error


def said_by(error):
    """The beginning of an HTTP error's body, or why it did not come."""
    try:
        return error.read()[:300].decode(errors="replace")
    except (OSError, HTTPException) as unread:
        return repr(unread)


class Cache:
    """Replies by key, in an SQLite file that several ranks may share."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        with closing(self.connect()) as base, base:
            base.execute("CREATE TABLE IF NOT EXISTS replies (key TEXT PRIMARY KEY, reply TEXT NOT NULL)")

    def connect(self):
        return sqlite3.connect(self.path, timeout=60)

    def read(self, keys):
        """{name: key} -> {name: reply} of those that are known."""
        with closing(self.connect()) as base:
            find = "SELECT reply FROM replies WHERE key = ?"
            found = {name: base.execute(find, (key,)).fetchone() for name, key in keys.items()}
        return {name: row[0] for name, row in found.items() if row is not None}

    def write(self, key, reply):
        with closing(self.connect()) as base, base:
            base.execute("INSERT OR REPLACE INTO replies VALUES (?, ?)", (key, reply))

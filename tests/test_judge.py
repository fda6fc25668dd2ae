"""The judge: a local HTTP server in the place of an endpoint, which answers, is late, fails and talks nonsense."""

import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

pytest.importorskip("accelerate")

from fastgrpo.checks import UserError
from fastgrpo.trainer import rewards
from fastgrpo.trainer.judge import JudgeSettings, find_score
from fastgrpo.trainer.rewards import resolve

pytestmark = pytest.mark.quick


class Server(ThreadingHTTPServer):
    """``replies``: {text in the question: [what each request gets]}, the last one again and again: a text, bytes, a
    status, (status, headers[, seconds before its text]), or seconds to be late by."""

    daemon_threads = True
    request_queue_size = 64  # with 5, the default, a seventh client at once waits a second for its connection

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.replies, self.seen, self.headers, self.lock = {}, [], [], threading.Lock()
        self.busy = self.busiest = 0
        self.delay, self.together = 0.0, threading.Barrier(1)
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_address[1]}/v1"


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        server = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        question = body["messages"][-1]["content"]
        with server.lock:
            server.seen.append((self.path, body))
            server.headers.append(dict(self.headers))
            server.busy += 1
            server.busiest = max(server.busiest, server.busy)
            queue = next((q for text, q in server.replies.items() if text in question), ["Score: 5"])
            reply = queue.pop(0) if len(queue) > 1 else queue[0]
        server.together.wait(30)
        time.sleep(server.delay)
        with server.lock:
            server.busy -= 1
        if isinstance(reply, float):
            time.sleep(reply)
            reply = "Score: 5"
        if isinstance(reply, int):
            reply = reply, {}
        status, extra, *pause = reply if isinstance(reply, tuple) else (200, {})
        message = {"choices": [{"message": {"role": "assistant", "content": reply}}]}
        data = reply if isinstance(reply, bytes) else b"no luck" if status != 200 else json.dumps(message).encode()
        try:
            self.send_response(status)
            for name, value in {"Content-Length": len(data), **extra}.items():
                self.send_header(name, str(value))
            self.end_headers()
            time.sleep(sum(pause))
            self.wfile.write(data)
        except OSError:  # the client has gone
            pass

    def log_message(self, *_):
        pass


@pytest.fixture
def server():
    with Server() as running:
        yield running
        running.shutdown()


def make(server, **settings):
    return resolve({"name": "judge", "base_url": server.url, "model": "m", "backoff": 0.0, **settings})


def judge_of(function, *answers, **columns):
    return function(prompts=["Q"] * len(answers), completions=list(answers), completion_ids=None, **columns)


def test_scores(server):
    server.replies = {"good": ["Fine.\nScore: 10"], "bad": ["score = 0"], "half": ["Score: 9? No.\n**Score:** 2.5"]}
    function = make(server, system="be fair", extra_body={"seed": 3, "max_tokens": None})
    assert judge_of(function, "good", "bad", "half", "other") == [1.0, 0.0, 0.25, 0.5]
    path, body = next(seen for seen in server.seen if "good" in seen[1]["messages"][-1]["content"])
    assert path == "/v1/chat/completions"
    assert body.keys() == {"model", "messages", "temperature", "seed"}
    assert (body["model"], body["temperature"]) == ("m", 0.0)
    assert body["messages"][0] == {"role": "system", "content": "be fair"}
    assert "<prompt>\nQ\n</prompt>" in body["messages"][1]["content"]
    assert "<answer>\ngood\n</answer>" in body["messages"][1]["content"]
    assert function.counts == {"requests": 4, "cache_hits": 0, "failures": 0}
    assert all("Authorization" not in headers for headers in server.headers)


def test_the_template_has_columns_and_chats(server):
    function = make(server, prompt='{prompt} | {completion} | {answer} | {{"score": 0}}')
    chat = [{"role": "system", "content": "s"}, {"role": "user", "content": "{u}"}]
    function(prompts=[chat], completions=[[{"role": "assistant", "content": "a"}]], answer=[7], other=[1])
    assert server.seen[0][1]["messages"] == [
        {"role": "user", "content": 'system: s\n\nuser: {u} | a | 7 | {"score": 0}'}
    ]
    with pytest.raises(ValueError, match=r"reward judge needs the columns \['answer'\], got \['prompt'\]"):
        rewards.name_rewards(function, {"prompt"})
    assert [*rewards.name_rewards([function, make(server)], {"prompt", "answer"})] == ["judge_0", "judge_1"]


def test_what_may_pass_is_tried_again(server):
    """A 500, a busy server that says when, nonsense and a reply without a score; each then a score."""
    server.replies = {
        "500": [500, "Score: 2"], "429": [(429, {"Retry-After": "0"}), "Score: 3"],
        "html": [b"<html>", "Score: 4"], "shape": [b'{"choices": []}', "Score: 6"], "mute": ["I like it", "Score: 7"],
        "off": ["Score: 11", "Score: 8"],
    }  # fmt: skip
    function = make(server, max_retries=1)
    assert judge_of(function, *server.replies) == [0.2, 0.3, 0.4, 0.6, 0.7, 0.8]
    assert function.counts == {"requests": 12, "retries": 6, "cache_hits": 0, "failures": 0}


@pytest.mark.parametrize("late", [5.0, (503, {"Content-Length": "99"}, 5.0)], ids=["reply", "error's text"])
def test_a_timeout_is_tried_again(server, late):
    """Before the reply, and within the text of an error. Many tries: a busy machine may need more than two."""
    server.replies = {"x": [late, "Score: 1"]}
    function = make(server, timeout=0.5, max_retries=40)
    assert judge_of(function, "x") == [0.1]
    assert function.counts["requests"] == function.counts["retries"] + 1 >= 2


def test_an_answer_without_a_score_in_the_end_gets_none(server):
    server.replies = {"mute": ["I like it"], "down": [503]}
    function = make(server, max_retries=2)
    with pytest.warns(UserWarning, match="judge: 2 of 3 answers got no score: .*(I like it|answered 503: no luck)"):
        assert judge_of(function, "mute", "well", "down") == [None, 0.5, None]
    assert function.counts["requests"] == 3 + 1 + 3
    assert function.counts["failures"] == 2


def test_retry_after_and_backoff_are_waited_for(server, monkeypatch):
    waits = []
    monkeypatch.setattr("fastgrpo.trainer.judge.time.sleep", waits.append)
    server.replies = {"x": [(429, {"Retry-After": "7"}), 500, 500, 500, (503, {"Retry-After": "900"}), "Score: 1"]}
    assert judge_of(make(server, backoff=20.0), "x") == [0.1]
    waits = [wait for wait in waits if wait]  # the server sleeps as well, for 0 seconds
    assert waits[0] == 7
    assert waits[4] == 60
    assert all(low / 2 <= wait <= low for wait, low in zip(waits[1:4], (40, 60, 60)))


def test_what_does_not_pass_ends_the_run(server):
    server.replies = {"x": [401]}
    function = make(server)
    with pytest.raises(UserError, match=r"judge: http.*/v1/chat/completions answered 401: no luck"):
        rewards.call_reward("judge", function, {"prompts": ["Q"], "completions": ["x"]}, 1)
    assert function.counts["requests"] == 1
    gone = resolve({"name": "judge", "base_url": "http://127.0.0.1:1", "model": "m", "max_retries": 0})
    with pytest.raises(UserError, match=r"none of 2 questions reached http://127.0.0.1:1: .*refused"):
        judge_of(gone, "a", "b")


def test_nothing_is_asked_twice(server, tmp_path):
    """Equal answers of one call, and the cache on disk, also of another run; another model asks anew."""
    path = str(tmp_path / "deep/cache.sqlite")
    server.replies = {"mute": ["I like it"]}
    first = make(server, cache=path, max_retries=0)
    with pytest.warns(UserWarning, match="1 of 3 answers got no score"):
        assert judge_of(first, "a", "b", "a", "mute", "b") == [0.5, 0.5, 0.5, None, 0.5]
    assert first.counts == {"requests": 3, "cache_hits": 0, "failures": 1}
    server.replies = {"mute": ["Score: 9"]}
    second = make(server, cache=path)
    assert judge_of(second, "b", "c", "mute") == [0.5, 0.5, 0.9]  # what failed is asked again
    assert second.counts == {"requests": 2, "cache_hits": 1, "failures": 0}
    other = make(server, cache=path, model="n")
    assert judge_of(other, "b") == [0.5]
    assert other.counts["cache_hits"] == 0
    assert len(server.seen) == 6
    # the pattern and the scale read the reply that is there
    assert judge_of(make(server, cache=path, max_score=5), "b") == [1.0]
    assert len(server.seen) == 6


def test_as_many_requests_at_a_time_as_it_says(server):
    server.delay, server.together = 0.05, threading.Barrier(3)
    judge_of(make(server, concurrency=3), *map(str, range(12)))
    assert server.busiest == 3
    assert len(server.seen) == 12


def test_the_key_comes_from_the_environment(server, monkeypatch):
    with pytest.raises(ValueError, match="api_key_env must name a variable of the environment, got 'JUDGE_KEY', which"):
        make(server, api_key_env="JUDGE_KEY")
    monkeypatch.setenv("JUDGE_KEY", "secret")
    judge_of(make(server, api_key_env="JUDGE_KEY"), "a")
    assert server.headers[0]["Authorization"] == "Bearer secret"


MISTAKES = [
    ({"base_url": "localhost:8000"}, "base_url must begin with http:// or https://, got 'localhost:8000'"),
    ({"timeout": 0}, "timeout must be > 0, got 0"),
    ({"tries": 3}, "tries is not a setting"),
    ({"pattern": "score"}, "pattern must have a group"),
    ({"pattern": "("}, "pattern must be a regular expression"),
    ({"prompt": '{"score": 0}'}, "prompt must name columns in its braces"),
    ({"prompt": "{"}, "prompt must double braces of its own"),
    ({"min_score": 3, "max_score": 3}, "min_score must be below max_score"),
    ({"concurrency": 0, "backoff": -1}, "2 mistakes:"),
]


@pytest.mark.parametrize(("settings", "message"), MISTAKES, ids=str)
def test_mistakes(settings, message):
    with pytest.raises(ValueError, match=message):
        resolve({"name": "judge", "base_url": "http://x", "model": "m", **settings})


def test_it_needs_an_endpoint_and_a_model():
    with pytest.raises(ValueError, match="reward 'judge' needs 'base_url'"):
        resolve("judge")
    with pytest.raises(ValueError, match="reward 'judge' needs 'model'"):
        resolve({"name": "judge", "base_url": "http://x"})


@pytest.mark.parametrize(
    ("reply", "score"),
    [("Score: 7", 0.7), ("SCORE:7.5/10", 0.75), ("a score of 3", None), ("Score: -1", None), ("7", None), ("", None)],
)
def test_find_score(reply, score):
    assert find_score(JudgeSettings(base_url="http://x", model="m"), reply) == score


def test_it_is_a_reward_of_a_run(server, tmp_path):
    """In the YAML's words, beside another; the log has its mean."""
    import trainer_job

    server.replies = {"answer>\n1": ["Score: 8"]}
    judge = {"name": "judge", "base_url": server.url, "model": "m", "prompt": "<answer>\n{completion}"}
    trainer = trainer_job.make_trainer(tmp_path, rewards=[judge, trainer_job.digits], max_steps=1, save_strategy="no")
    (row,) = trainer.train()
    assert 0.5 <= row["rewards/judge"] <= 0.8
    assert row["reward"] == pytest.approx(row["rewards/judge"] + row["rewards/digits"])


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Real memory: transformers fills what it allocates."""

"""The engine that asks a server: a small one here, which fails on purpose, and a real one."""

from __future__ import annotations

import http.server
import importlib.util
import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from typing import Any

import jax
import pytest

from ranktuner_jax.data import load_tokenizer
from ranktuner_jax.errors import RunError, UserError
from ranktuner_jax.evals import LocalEngine, Suite
from ranktuner_jax.evals.benchmarks import Benchmark, Question
from ranktuner_jax.evals.engines import Answer, Request, Sampling
from ranktuner_jax.evals.engines.openai import OpenAIEngine
from ranktuner_jax.models import load_pretrained
from tests.evals.exported import export

Reply = tuple[int, Any]


class Server:
    """Answers "A" and the question after `think`, and keeps what it was asked."""

    def __init__(self) -> None:
        self.bodies: list[dict[str, Any]] = []
        self.keys: set[str | None] = set()
        self.most_at_once = self._at_once = 0
        self._lock, self._closing = threading.Lock(), threading.Event()
        self.think: Callable[[str], Reply | None] = lambda _: None
        server = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                status, reply = server.reply(self)
                text = reply if isinstance(reply, str) else json.dumps(reply)
                self.send_response(status)
                self.send_header("content-type", "application/json")
                self.send_header("retry-after-ms", "10")
                self.end_headers()
                self.wfile.write(text.encode())

            def log_message(self, *_: object) -> None:
                pass

        self._http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._http.server_port}/v1"
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.01,))
        self._thread.start()

    def hang(self, question: str) -> None:
        self._closing.wait(20)

    def close(self) -> None:
        self._closing.set()
        if self._thread.is_alive():
            self._http.shutdown()
            self._thread.join()
            self._http.server_close()

    def reply(self, handler: http.server.BaseHTTPRequestHandler) -> Reply:
        body = json.loads(handler.rfile.read(int(handler.headers["content-length"])))
        with self._lock:
            self.bodies.append({"path": handler.path, **body})
            self.keys.add(handler.headers["Authorization"])
            self._at_once += 1
            self.most_at_once = max(self.most_at_once, self._at_once)
        question = body["messages"][-1]["content"]
        reply = self.think(question)
        with self._lock:
            self._at_once -= 1
        return reply or (200, completion(f"A {question}"))


def completion(text: str | None, finish_reason: str = "stop", tokens: int = 5) -> dict[str, Any]:
    return {
        "id": "1",
        "object": "chat.completion",
        "created": 0,
        "model": "tiny",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": text},
                "finish_reason": finish_reason,
            }
        ],
        "usage": {"prompt_tokens": 1, "completion_tokens": tokens, "total_tokens": tokens + 1},
    }


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    made = Server()
    yield made
    made.close()


def requests(*questions: str, samples: int = 1) -> list[Request]:
    return [
        Request(Question(index, text, ({"role": "user", "content": text},), ""), sample)
        for index, text in enumerate(questions)
        for sample in range(samples)
    ]


def collect(
    engine: OpenAIEngine, asked: list[Request], sampling: Sampling | None = None
) -> dict[int, Answer]:
    answers: dict[int, Answer] = {}

    def done(index: int, answer: Answer) -> None:
        assert index not in answers
        answers[index] = answer

    engine.answer(asked, sampling or Sampling(), done)
    return answers


def test_each_request_gets_its_own_answer_and_the_server_gets_the_sampling(server: Server) -> None:
    sampling = Sampling(samples=2, temperature=0.7, top_p=0.9, top_k=20, max_new_tokens=77, seed=3)
    engine = OpenAIEngine(server.url, "tiny", api_key="secret")
    answers = collect(engine, requests("q0", "q1", "q2", samples=2), sampling)
    assert answers == {i: Answer(f"A q{i // 2}", 5, True) for i in range(6)}
    for body in server.bodies:
        assert body["path"] == "/v1/chat/completions"
        assert body["model"] == "tiny"
        assert [body[name] for name in ("temperature", "top_p", "top_k")] == [0.7, 0.9, 20]
        assert body["max_tokens"] == 77
    assert server.keys == {"Bearer secret"}
    assert len({body["seed"] for body in server.bodies}) == 6


def test_the_seed_of_a_sample_depends_on_the_seed_and_on_nothing_else(server: Server) -> None:
    def seeds(asked: list[Request], seed: int) -> dict[str, int]:
        server.bodies.clear()
        collect(OpenAIEngine(server.url, "tiny"), asked, Sampling(seed=seed))
        return {body["messages"][0]["content"]: body["seed"] for body in server.bodies}

    asked = requests("q0", "q1", "q2")
    first = seeds(asked, 0)
    assert seeds(asked[::-1][:2], 0) == {name: first[name] for name in ("q1", "q2")}
    assert not set(seeds(asked, 1).values()) & set(first.values())


def test_top_k_is_left_out_where_it_is_off_and_further_fields_are_sent(server: Server) -> None:
    collect(OpenAIEngine(server.url, "tiny", extra_body={"min_p": 0.1}), requests("q"))
    [body] = server.bodies
    assert "top_k" not in body
    assert body["min_p"] == 0.1


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        (completion("cut", "length", tokens=9), Answer("cut", 9, False)),
        (completion("", "content_filter", tokens=0), Answer("", 0, False)),
        (completion(None, "length"), Answer("", 5, False)),
    ],
)
def test_an_answer_is_finished_only_if_it_ended_by_itself(
    server: Server, reply: dict[str, Any], expected: Answer
) -> None:
    server.think = lambda _: (200, reply)
    assert collect(OpenAIEngine(server.url, "tiny"), requests("q")) == {0: expected}


def test_as_many_requests_are_under_way_as_allowed(server: Server) -> None:
    server.think = lambda _: time.sleep(0.1)
    collect(OpenAIEngine(server.url, "tiny", concurrency=4), requests(*"abcdefghijkl"))
    assert server.most_at_once == 4


def test_answers_are_passed_on_as_they_arrive_in_the_thread_of_the_caller(server: Server) -> None:
    passed_on = threading.Event()

    def think(question: str) -> None:
        if question == "slow":
            assert passed_on.wait(20)

    server.think = think
    order = []

    def done(index: int, answer: Answer) -> None:
        assert threading.current_thread() is threading.main_thread()
        order.append(index)
        passed_on.set()

    OpenAIEngine(server.url, "tiny").answer(requests("slow", "fast"), Sampling(), done)
    assert order == [1, 0]


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_request_is_sent_again_where_the_server_was_busy(server: Server, status: int) -> None:
    failures = iter([(status, {"error": {"message": "busy"}})] * 2)
    server.think = lambda _: next(failures, None)
    answers = collect(OpenAIEngine(server.url, "tiny"), requests("q"))
    assert answers == {0: Answer("A q", 5, True)}
    assert len(server.bodies) == 3
    assert len({body["seed"] for body in server.bodies}) == 1


def test_a_server_that_keeps_failing_ends_it_in_one_line_after_the_other_answers(
    server: Server,
) -> None:
    passed_on = threading.Event()

    def think(question: str) -> Reply | None:
        if question == "fails":
            assert passed_on.wait(20)
            return 500, {"error": {"message": "out\nof memory"}}
        return None

    server.think = think
    answers = {}

    def done(index: int, answer: Answer) -> None:
        answers[index] = answer
        if len(answers) == 2:
            passed_on.set()

    engine = OpenAIEngine(server.url, "tiny", retries=2)
    with pytest.raises(RunError, match=r"no answer in 3 tries \(500: .*out\\nof memory") as caught:
        engine.answer(requests("fails", "q1", "q2"), Sampling(), done)
    assert "\n" not in str(caught.value)
    assert answers == {1: Answer("A q1", 5, True), 2: Answer("A q2", 5, True)}
    assert sum(body["messages"][0]["content"] == "fails" for body in server.bodies) == 3


def test_a_server_that_hangs_is_given_up(server: Server) -> None:
    server.think = server.hang
    start = time.monotonic()
    with pytest.raises(RunError, match=r"no answer in 1 tries .* is up"):
        collect(OpenAIEngine(server.url, "tiny", timeout=0.3, retries=0), requests("q"))
    assert time.monotonic() - start < 10


def test_nobody_at_the_address_is_said_in_one_line(server: Server) -> None:
    server.close()
    with pytest.raises(RunError, match=f"{server.url} gave no answer in 1 tries .*check the addr"):
        collect(OpenAIEngine(server.url, "tiny", retries=0), requests("q"))


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        ((404, {"error": {"message": "The model does not exist."}}), "exist.*check --model=tiny"),
        ((404, {"detail": "Not Found"}), "Not Found.*address ends in /v1"),
        ((401, {"error": {"message": "Bad key"}}), "refused the key .*Bad key.*OPENAI_API_KEY"),
        ((400, {"error": {"message": "too long"}}), "too long.*max_new_tokens"),
        ((200, "<html>Welcome</html>"), "expected chat completions from .*JSONDecodeError"),
        ((200, {"models": []}), "expected chat completions from .* got something else"),
        ((200, {"choices": []}), "expected chat completions from .* got something else"),
    ],
)
def test_a_refusal_is_not_tried_again_and_says_what_to_check(
    server: Server, reply: Reply, message: str
) -> None:
    server.think = lambda _: reply
    with pytest.raises(UserError, match=message) as caught:
        collect(OpenAIEngine(server.url, "tiny"), requests("q"))
    assert "\n" not in str(caught.value)
    assert len(server.bodies) == 1


def test_an_evaluation_goes_on_where_the_server_failed(
    server: Server, tmp_path: pathlib.Path
) -> None:
    benchmark = Benchmark(
        "letters",
        file="letters.jsonl",
        ask=lambda row: row["letter"],
        reference=lambda row: f"A {row['letter']}",
        grader="exact",
    )
    questions = benchmark.questions([{"letter": letter} for letter in "abcd"], "here")
    suite = Suite([(benchmark, questions)], Sampling(), tmp_path / "out")
    engine = OpenAIEngine(server.url, "tiny", concurrency=1, retries=0)
    server.think = lambda question: (500, "down") if question == "c" else None
    with pytest.raises(RunError, match="gave no answer"):
        suite.run(engine)
    server.bodies.clear()
    server.think = lambda _: None
    scores = suite.run(engine)
    assert [body["messages"][0]["content"] for body in server.bodies] == ["c", "d"]
    assert scores["letters"].to_json()["questions"] == 4


def test_an_interrupt_ends_it_at_once(server: Server) -> None:
    server.think = server.hang
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    timer = threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    start = time.monotonic()
    try:
        with pytest.raises(KeyboardInterrupt):
            collect(OpenAIEngine(server.url, "tiny", concurrency=2), requests(*"abcd"))
    finally:
        timer.cancel()
        signal.signal(signal.SIGINT, before)
    assert time.monotonic() - start < 10
    assert len(server.bodies) == 2


def test_what_done_raises_ends_it(server: Server) -> None:
    def stop(index: int, answer: Answer) -> None:
        raise RuntimeError("stop here")

    with pytest.raises(RuntimeError, match="stop here"):
        OpenAIEngine(server.url, "tiny", concurrency=1).answer(
            requests(*"abcdefgh"), Sampling(), stop
        )
    assert len(server.bodies) < 8


def test_the_description_has_no_key() -> None:
    engine = OpenAIEngine("http://h/v1", "tiny", api_key="secret", extra_body={"min_p": 0.1})
    assert json.loads(json.dumps(engine.description)) == {
        "engine": "openai",
        "model": "tiny",
        "extra_body": {"min_p": 0.1},
    }


def test_likelihoods_several_processes_and_bad_arguments_are_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with pytest.raises(UserError, match=r"likelihoods of choices.*use --engine=local"):
        OpenAIEngine("http://h/v1", "tiny").choose([], lambda *_: None)
    with pytest.raises(UserError, match=r"--base_url: expected an address .* got localhost:8000"):
        OpenAIEngine("localhost:8000/v1", "tiny")
    with pytest.raises(UserError, match="concurrency: expected at least 1, got 0"):
        OpenAIEngine("http://h/v1", "tiny", concurrency=0)
    with pytest.raises(UserError, match="retries: expected at least 0, got -1"):
        OpenAIEngine("http://h/v1", "tiny", retries=-1)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(UserError, match=r"expected one process.* got 2"):
        OpenAIEngine("http://h/v1", "tiny")


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, pathlib.Path]]:
    """The address of `transformers serve`, and the folder of the model that it serves."""
    for package in ("torch", "uvicorn"):
        if importlib.util.find_spec(package) is None:
            pytest.skip("needs PyTorch and a server: .venv-parity/bin/pip install '.[drill]'")
    folder = export(tmp_path_factory.mktemp("served"), ["How many legs does a spider have?"])
    options = json.loads((folder / "generation_config.json").read_text())
    # Without it, this server takes the likeliest token at any temperature.
    (folder / "generation_config.json").write_text(json.dumps({**options, "do_sample": True}))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "transformers.cli.transformers", "serve", str(folder)]
    log = folder.parent / "log"
    with log.open("w") as output:
        process = subprocess.Popen(
            [*command, "--port", str(port), "--host", "127.0.0.1", "--device", "cpu"],
            stdout=output,
            stderr=output,
        )
    try:
        for _ in range(600):
            assert process.poll() is None, log.read_text()
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/v1/models").close()
                break
            except OSError:
                time.sleep(0.2)
        else:
            pytest.fail(log.read_text())
        yield f"http://127.0.0.1:{port}/v1", folder
    finally:
        process.terminate()
        process.wait()


@pytest.mark.drill
def test_a_real_server_gives_the_answers_that_the_decoder_here_gives(
    served: tuple[str, pathlib.Path],
) -> None:
    url, folder = served
    asked = requests("How many?", "legs", "a spider?", "does it?", "have", "many", samples=1)
    sampling = Sampling(max_new_tokens=12)
    theirs = collect(OpenAIEngine(url, str(folder)), asked, sampling)
    ours: dict[int, Answer] = {}
    local = LocalEngine(load_pretrained(folder), load_tokenizer(folder))
    local.answer(asked, sampling, ours.__setitem__)
    assert len({answer.text for answer in ours.values()}) > 1
    for index, answer in ours.items():
        # The server counts the token that ends an answer, and calls an answer cut at the limit.
        ended_early = answer.finished and answer.tokens + 1 < sampling.max_new_tokens
        assert theirs[index] == Answer(answer.text, answer.tokens + answer.finished, ended_early)


@pytest.mark.drill
def test_a_real_server_draws_other_samples_for_other_seeds(
    served: tuple[str, pathlib.Path],
) -> None:
    url, folder = served
    # One at a time: this server's seed is that of the whole process.
    engine = OpenAIEngine(url, str(folder), concurrency=1)
    sampling = Sampling(samples=4, temperature=1.0, max_new_tokens=12)
    first = collect(engine, requests("How many?", samples=4), sampling)
    assert collect(engine, requests("How many?", samples=4), sampling) == first
    assert len({answer.text for answer in first.values()}) == 4


@pytest.mark.drill
def test_a_real_server_without_the_model_is_said_in_one_line(
    served: tuple[str, pathlib.Path],
) -> None:
    with pytest.raises(UserError, match=r"pinned.*check --model=other") as caught:
        collect(OpenAIEngine(served[0], "other"), requests("q"))
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match=r"404.*ends in /v1"):
        collect(OpenAIEngine(served[0].removesuffix("/v1"), "other"), requests("q"))

"""Remote rollouts against a server on this machine that answers deterministically and misbehaves on demand."""

import base64
import collections
import hashlib
import io
import json
import re
import signal
import socket
import struct
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
from PIL import Image

from mmprm_jax.data.images import open_image
from mmprm_jax.data.prompts import INTERNVL_SYSTEM, PAPER_TASK
from mmprm_jax.interruption import Interrupted, handling
from mmprm_jax.records import Failure, Grading, Problem, Request, Rollout, UserError
from mmprm_jax.rollout import remote
from mmprm_jax.rollout.remote import RemoteSampler, chat_body
from mmprm_jax.rollout.sampling import Sampling

KEY = "sk-secret-0123456789"
PREFIX = ("<step>first</step>", "<step> second\n</step>")


class Stub(ThreadingHTTPServer):
    """``fault(body, nth)`` names what goes wrong with the nth request (from 0) of this seed; None: nothing."""

    daemon_threads, block_on_close = True, False
    request_queue_size = 64

    def __init__(self, fault=lambda body, nth: None, delay=0.0, echo=False):
        super().__init__(("127.0.0.1", 0), Handler)
        self.fault, self.delay, self.echo = fault, delay, echo
        self.bodies, self.headers, self.times = [], [], []
        self.in_flight = self.most_in_flight = self.connections = 0
        self.lock = threading.Lock()
        self.url = f"http://127.0.0.1:{self.server_port}/v1"
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def handle_error(self, request, client_address):
        """Clients that hang up are part of the tests."""


def reply(body):
    """Choices by prompt and seed: sometimes cut off, sometimes without an answer. (text, tokens, finish_reason)"""
    digest = hashlib.sha256(json.dumps([body["messages"], body["seed"]]).encode()).digest()
    text = f"<step>s{digest[0]}</step> between <step>t{digest[1]}</step><answer> {digest[2] % 3} </answer>"
    cut = digest[3] % 3 == 0
    return (text[: len(text) // 2] if cut else text), 2 + digest[4], "length" if cut else "stop"


class Handler(BaseHTTPRequestHandler):
    protocol_version, disable_nagle_algorithm = "HTTP/1.1", True

    def log_message(self, *args):
        pass

    def handle(self):
        with self.server.lock:
            self.server.connections += 1
        try:
            super().handle()
        finally:
            with self.server.lock:
                self.server.connections -= 1

    def send(self, data, status=200, headers=(), length=None):
        self.send_response(status)
        for header in headers:
            self.send_header(*header)
        self.send_header("Content-Length", str(len(data) if length is None else length))
        self.end_headers()
        self.wfile.write(data)
        if length is not None:
            self.close_connection = True

    def do_POST(self):  # noqa: N802
        server, arrived = self.server, time.monotonic()
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with server.lock:
            nth = sum(b["seed"] == body["seed"] for b in server.bodies)
            server.bodies.append(body)
            server.headers.append(dict(self.headers))
            server.times.append(arrived)
            server.in_flight += 1
            server.most_in_flight = max(server.most_in_flight, server.in_flight)
        try:
            time.sleep(server.delay)
            if self.path != "/v1/chat/completions":
                self.send(b"{}", 404)
            else:
                self.answer(body, server.fault(body, nth))
        finally:
            with server.lock:
                server.in_flight -= 1

    def answer(self, body, fault):
        text, tokens, finish = reply(body)
        if self.server.echo and body["messages"][-1]["role"] == "assistant":
            text = body["messages"][-1]["content"] + text
        choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": finish}
        good = {"choices": [choice], "usage": {"prompt_tokens": 7, "completion_tokens": tokens}}
        data = json.dumps(good).encode()
        if fault is None:
            return self.send(data)
        if fault in SHAPES:
            SHAPES[fault](good)
            return self.send(json.dumps(good).encode())
        RAW[fault](self, data)


def slow(handler, data):
    time.sleep(0.8)
    handler.send(data)


def drip(handler, data):
    """Never silent for long, and never done."""
    handler.send_response(200)
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    for _ in range(20):
        handler.wfile.write(b" ")
        time.sleep(0.05)
    handler.close_connection = True


def reset(handler, data):
    """A connection reset in the middle of the answer."""
    handler.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n{")
    handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    handler.rfile.close()
    handler.wfile.close()
    handler.connection.close()


def drop(handler, data):
    handler.close_connection = True


def html(handler, data):
    handler.send(b"<html><body>Bad gateway</body></html>", 200, [("Content-Type", "text/html")])


RAW = {
    "500": lambda h, data: h.send(b'{"error": {"message": "CUDA out of memory"}}', 500),
    "503": lambda h, data: h.send(b"busy", 503),
    "408": lambda h, data: h.send(b"", 408),
    "409": lambda h, data: h.send(b"", 409),
    "429": lambda h, data: h.send(b"slow down", 429, [("Retry-After", "0.02")]),
    "429 with a date": lambda h, data: h.send(b"", 429, [("Retry-After", "Fri, 31 Dec 1999 23:59:59 GMT")]),
    "slow": slow,
    "drip": drip,
    "truncated": lambda h, data: h.send(data[: len(data) // 2]),
    "length too long": lambda h, data: h.send(data, length=len(data) + 10),
    "length too short": lambda h, data: h.send(data, length=len(data) - 3),
    "malformed": lambda h, data: h.send(b"{'choices': []}"),
    "not UTF-8": lambda h, data: h.send(b'{"choices": "\xff\xfe"}'),
    "deep": lambda h, data: h.send(b"[" * 9_000),
    "empty": lambda h, data: h.send(b""),
    "huge": lambda h, data: h.send(data + b" " * 20_000),
    "html": html,
    "no HTTP": lambda h, data: (h.wfile.write(b"\x00\x01nonsense\r\n\r\n"), drop(h, data)),
    "drop": drop,
    "reset": reset,
}
SHAPES = {
    "no choices": lambda a: a.pop("choices"),
    "fewer choices": lambda a: a["choices"].clear(),
    "more choices": lambda a: a["choices"].append(a["choices"][0]),
    "choices null": lambda a: a.update(choices=None),
    "choice a string": lambda a: a.update(choices=["text"]),
    "no message": lambda a: a["choices"][0].pop("message"),
    "content a number": lambda a: a["choices"][0]["message"].update(content=3),
    "aborted": lambda a: a["choices"][0].update(finish_reason="abort"),
}


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY", "OPENAI_API_KEY"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def stub():
    stubs = []

    def make(*args, **kwargs):
        stubs.append(Stub(*args, **kwargs))
        return stubs[-1]

    yield make
    for server in stubs:
        server.shutdown()
        server.server_close()


def verify(pairs):
    return [answer == gold for answer, gold, _ in pairs]


def sampler(*servers, folder=".", **kwargs):
    settings = dict(verify=verify, sampling=Sampling(max_new_tokens=99), backoff=0.001, pause=0.03, timeout=20.0)
    return RemoteSampler(
        [s if isinstance(s, str) else s.url for s in servers], "m", folder, 0, "search", **settings | kwargs
    )


def problems(count):
    return [Problem(f"p{i}", f"What is {i}?", "1") for i in range(count)]


def requests(count=4, n=3):
    return [Request(p, PREFIX[: i % 3], n) for i, p in enumerate(problems(count))]


def collect_all(s, asked):
    s.submit(asked)
    answers = {}
    while batch := s.collect():
        for request, outcome in batch:
            assert request not in answers
            answers[request] = outcome
    assert set(answers) == set(asked)
    return answers


def expected(asked, seed=0):
    """What a flawless server's answers amount to."""
    out = {}
    for request in asked:
        rollouts = []
        for i in range(request.n):
            number = remote._seed(remote.request_key(seed, "search", request), i)
            text, tokens, _ = reply(chat_body("m", Sampling(), "continue", request, (), number))
            segments = tuple(re.findall("<step>.*?</step>|<answer>.*?</answer>", text, re.DOTALL))
            rollouts.append(Rollout(segments, bool(segments) and segments[-1] == "<answer> 1 </answer>", tokens))
        out[request] = tuple(rollouts)
    return out


# The rollouts


def test_rollouts_are_what_the_server_says(stub):
    server, asked = stub(), requests(12, 5)
    with sampler(server) as s:
        assert s.collect() == []
        answers = collect_all(s, asked)
        assert s.collect() == []
    assert answers == expected(asked)
    rollouts = [r for group in answers.values() for r in group]
    assert len({r.correct for r in rollouts}) == 2 and {len(r.segments) for r in rollouts} >= {1, 3}
    assert (s.rollouts, s.tokens, s.retries) == (60, sum(r.n_tokens for r in rollouts), 0)
    assert len({body["seed"] for body in server.bodies}) == 60  # and so 60 independent rollouts
    assert all(0 <= body["seed"] < 2**31 and body["n"] == 1 for body in server.bodies)


def test_a_repeat_and_another_seed_or_purpose_have_rollouts_of_their_own(stub):
    server, problem = stub(), problems(1)[0]
    asked = [Request(problem, (), 3), Request(problem, (), 3, repeat=1)]
    with sampler(server) as s:
        collect_all(s, asked)
    for seed, purpose in ((1, "search"), (0, "evaluate")):
        with RemoteSampler([server.url], "m", ".", seed, purpose, verify, Sampling()) as s:
            collect_all(s, asked)
    assert len({body["seed"] for body in server.bodies}) == 18


@pytest.mark.parametrize("concurrency", [1, 7])
def test_neither_order_nor_concurrency_nor_number_of_servers_matters(stub, concurrency):
    asked = requests(9, 2)
    with sampler(stub(), stub(delay=0.005), concurrency=concurrency) as s:
        assert collect_all(s, asked[::-1]) == expected(asked)


def test_the_answers_to_verify_come_with_the_gold(stub):
    seen = []

    def record(pairs):
        seen.extend(pairs)
        return [False] * len(pairs)

    asked = requests(6, 3)
    with sampler(stub(), verify=record) as s:
        answers = collect_all(s, asked)
    assert collections.Counter(seen).keys() <= {(answer, "1", Grading()) for answer in ("0", "1", "2", None)}
    assert (None, "1", Grading()) in seen and ("1", "1", Grading()) in seen and len(seen) == 18
    assert not any(r.correct for group in answers.values() for r in group)


def test_a_verify_that_drops_answers_is_an_error(stub):
    with sampler(stub(), verify=lambda pairs: [True]) as s, pytest.raises(ValueError):
        collect_all(s, requests(1, 3))


def test_an_echoed_prefix_is_taken_off(stub):
    asked = requests(6, 3)
    with sampler(stub(echo=True)) as s:
        assert collect_all(s, asked) == expected(asked)


def test_lone_surrogates_do_not_reach_the_records(stub, monkeypatch):
    monkeypatch.setitem(SHAPES, "surrogate", lambda a: a["choices"][0]["message"].update(content="<step>\ud800</step>"))
    request = Request(problems(1)[0], (), 1)
    with sampler(stub(lambda body, nth: "surrogate")) as s:
        ((rollout,),) = collect_all(s, [request]).values()
    assert rollout.segments == ("<step>?</step>",)


# Faults


@pytest.mark.parametrize("fault", [*RAW, *SHAPES])
def test_a_passing_fault_changes_nothing_but_the_retries(stub, monkeypatch, fault):
    monkeypatch.setattr(remote, "MAX_ANSWER", 10_000)
    server, asked = stub(lambda body, nth: fault if nth == 0 else None), requests(3, 2)
    with sampler(server, timeout=0.4 if fault in ("slow", "drip") else 20.0) as s:
        assert collect_all(s, asked) == expected(asked)
    assert s.retries == 6 and len(server.bodies) == 12


LASTING = {  # what the Failure says, and after how many attempts
    "500": ("HTTP 500: .*CUDA out of memory", 4),
    "drop": ("RemoteProtocolError", 4),
    "slow": ("no whole answer in 0.3 s", 4),
    "html": ("JSON.*Bad gateway", 2),  # an answer, and no rollout: it is not asked for again and again
    "huge": ("larger", 2),
    "fewer choices": ("one choice", 2),
    "content a number": ("content is int", 2),
}


@pytest.mark.parametrize("fault", LASTING)
def test_a_lasting_fault_is_a_failure_after_so_many_attempts(stub, monkeypatch, fault):
    monkeypatch.setattr(remote, "MAX_ANSWER", 10_000)
    server, request = stub(lambda body, nth: fault), Request(problems(1)[0], (), 1)
    with sampler(server, timeout=0.3 if fault == "slow" else 20.0, max_attempts=4) as s:
        outcome = collect_all(s, [request])[request]
    words, attempts = LASTING[fault]
    assert isinstance(outcome, Failure) and re.search(words, outcome.reason) and server.url in outcome.reason
    assert f"after {attempts} " in outcome.reason
    assert len(server.bodies) == attempts and s.retries == attempts - 1 and s.rollouts == 0


def test_one_failing_request_leaves_the_others_alone(stub):
    bad, *good = requests(5, 3)
    server = stub(lambda body, nth: "500" if body["messages"][0]["content"] == bad.problem.question else None)
    with sampler(server, max_attempts=3) as s:
        answers = collect_all(s, [bad, *good])
    assert isinstance(answers.pop(bad), Failure)
    assert answers == expected(good)


@pytest.mark.parametrize("status", [400, 401, 404, 413, 422, 307])
def test_a_refusal_is_final_and_in_the_servers_words(stub, monkeypatch, status):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    words = f"\x1b[31mtoo\nlong: {'x' * 250} incorrect key {KEY}, and on" + "z" * 5000  # the key at the cut
    monkeypatch.setitem(RAW, "refused", lambda h, data: h.send(words.encode(), status))
    server, request = stub(lambda body, nth: "refused"), Request(problems(1)[0], (), 1)
    with sampler(server) as s:
        reason = collect_all(s, [request])[request].reason
    assert server.url in reason and f"HTTP {status}" in reason and len(reason) < 500 and reason.isprintable()
    assert "too long" in reason and KEY[:5] not in reason and (("OPENAI_API_KEY" in reason) == (status in (401, 404)))
    assert len(server.bodies) == 1 and s.retries == 0
    assert server.headers[0]["Authorization"] == f"Bearer {KEY}"


def test_the_key_is_in_no_failure_after_retries(stub, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setitem(RAW, "leak", lambda h, data: h.send(h.headers["Authorization"].encode(), 500))
    request = Request(problems(1)[0], (), 1)
    with sampler(stub(lambda body, nth: "leak"), max_attempts=2) as s:
        reason = collect_all(s, [request])[request].reason
    assert "HTTP 500: Bearer ***" in reason and KEY not in reason


def test_without_a_key_none_is_sent(stub):
    server = stub()
    with sampler(server) as s:
        collect_all(s, requests(1, 1))
    assert "Authorization" not in server.headers[0]


def test_retry_after_is_honoured(stub, monkeypatch):
    monkeypatch.setitem(RAW, "wait", lambda h, data: h.send(b"", 429, [("Retry-After", "0.5")]))
    server = stub(lambda body, nth: "wait" if nth == 0 else None)
    with sampler(server, pause=10.0) as s:
        collect_all(s, requests(1, 1))
    assert 0.5 <= server.times[1] - server.times[0] < 3


def test_retry_after_is_bounded(stub, monkeypatch):
    monkeypatch.setitem(RAW, "wait", lambda h, data: h.send(b"", 429, [("Retry-After", "inf")]))
    server = stub(lambda body, nth: "wait" if nth == 0 else None)
    with sampler(server, pause=0.3) as s:
        collect_all(s, requests(1, 1))
    assert 0.3 <= server.times[1] - server.times[0] < 3


def test_the_backoff_doubles_up_to_the_longest_pause(stub, monkeypatch):
    monkeypatch.setattr(remote, "FAILURES_IN_A_ROW", 99)
    server = stub(lambda body, nth: "500")
    with sampler(server, backoff=0.05, pause=0.3, max_attempts=7) as s:
        collect_all(s, requests(1, 1))
    waits = np.diff(server.times)  # 0.05, 0.1, 0.2, 0.3, 0.3, 0.3, or down to a half of that
    assert np.all(waits >= [0.025, 0.05, 0.1, 0.15, 0.15, 0.15]) and waits[-1] < 0.75


# Many servers


@pytest.fixture
def dead():
    """The address of a server that is down."""
    with socket.socket() as unused:  # bound, but nobody listens
        unused.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{unused.getsockname()[1]}/v1"


def test_a_dead_server_costs_nothing_but_retries(stub, dead):
    asked = requests(12, 3)
    with sampler(dead, stub(), max_attempts=3) as s:
        assert collect_all(s, asked) == expected(asked)
    assert s.retries >= remote.FAILURES_IN_A_ROW


def test_a_retry_goes_to_another_server(stub, dead):
    live, asked, retries = stub(), requests(1, 1), 0
    for servers in ((dead, live), (live, dead)):  # one of them puts the problem's home at the dead one
        with sampler(*servers, max_attempts=2) as s:
            assert collect_all(s, asked) == expected(asked)
        retries += s.retries
    assert retries == 1


def test_a_failing_server_rests(stub):
    bad, good, asked = stub(lambda body, nth: "500"), stub(), requests(12, 2)
    with sampler(bad, good, pause=60.0, concurrency=1) as s:
        assert collect_all(s, asked) == expected(asked)
    assert len(bad.bodies) == remote.FAILURES_IN_A_ROW == s.retries


def test_a_rested_server_is_asked_again(stub):
    server, request = stub(lambda body, nth: "500" if nth < 4 else None), Request(problems(1)[0], (), 1)
    with sampler(server, pause=0.2) as s:
        assert collect_all(s, [request]) == expected([request])
    waits = np.diff(server.times)
    assert len(waits) == 4 and waits[1] < 0.15 and np.all(waits[2:] >= 0.2)


def test_failures_that_others_successes_interrupt_do_not_rest_a_server(stub):
    server = stub(lambda body, nth: "500" if nth == 0 else None)
    with sampler(server, pause=60.0, concurrency=1) as s:
        assert collect_all(s, requests(6, 1)) == expected(requests(6, 1))
    assert s.retries == 6


def test_a_problem_has_a_home_while_there_is_room(stub):
    servers, problem = [stub(), stub()], problems(1)[0]
    for repeat in range(4):
        with sampler(*servers) as s:
            collect_all(s, [Request(problem, (), 3, repeat)])
    assert sorted(len(server.bodies) for server in servers) == [0, 12]


def test_never_more_requests_under_way_than_asked_for(stub):
    servers = [stub(delay=0.03), stub(delay=0.03)]
    with sampler(*servers, concurrency=3) as s:
        collect_all(s, requests(12, 5))
    assert [server.most_in_flight for server in servers] == [3, 3]


# The ends


def test_close_drops_what_is_under_way(stub):
    with sampler(stub(delay=5.0)) as s:
        s.submit(requests(3, 2))
        time.sleep(0.2)
        start = time.monotonic()
    assert time.monotonic() - start < 2
    assert not s._thread.is_alive()
    with pytest.raises(RuntimeError, match="closed"):
        s.collect()
    s.close()


def test_close_leaves_no_connection(stub):
    server = stub()
    with sampler(server) as s:
        collect_all(s, requests(3, 2))
        assert server.connections
    deadline = time.monotonic() + 1  # the connections would be kept for 2 s
    while server.connections and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not server.connections and s.rollouts == 6


def test_close_waits_for_the_thread_that_reads_an_image(monkeypatch):
    reading = threading.Event()
    monkeypatch.setattr(remote, "image_url", lambda path: (reading.set(), time.sleep(0.3)))
    before = threading.active_count()
    with sampler("http://127.0.0.1:9/v1") as s:
        s.submit([Request(Problem("p", "Why?", "1", ("a.png",)), (), 1)])
        assert reading.wait(5)
    assert threading.active_count() == before


def test_close_right_after_opening():
    before = threading.active_count()
    sampler("http://127.0.0.1:9/v1").close()
    assert threading.active_count() == before


def test_ctrl_c_gets_through(stub):
    main = threading.main_thread().ident
    with sampler(stub(delay=5.0)) as s:
        s.submit(requests(3, 2))
        timer = threading.Timer(0.3, signal.pthread_kill, (main, signal.SIGINT))
        start = time.monotonic()
        timer.start()
        with handling(), pytest.raises(Interrupted):
            s.collect()
    assert time.monotonic() - start < 2
    assert not s._thread.is_alive()


def test_a_bug_is_raised_by_collect(stub, monkeypatch):
    monkeypatch.setattr(remote, "chat_body", lambda *args: 1 / 0)
    with sampler(stub()) as s:
        s.submit(requests(1, 1))
        with pytest.raises(ExceptionGroup):
            s.collect()


BAD = ["host:8000/v1", "ftp://host/v1", "http://", "", "http://user:passw0rd@host/v1", "http://h/v1?a=b", "http://h:x"]


@pytest.mark.parametrize("url", BAD)
def test_bad_addresses_are_user_errors(url):
    with pytest.raises(UserError, match="http://host:8000/v1") as caught:
        sampler(url)
    assert "passw0rd" not in str(caught.value)


def test_other_bad_settings_are_user_errors(monkeypatch):
    with pytest.raises(UserError, match="at least one server"):
        sampler()
    with pytest.raises(UserError, match="did you mean paper"):
        sampler("http://h/v1", template="papre")
    monkeypatch.setenv("OPENAI_API_KEY", KEY + "\nX: y")
    with pytest.raises(UserError, match="OPENAI_API_KEY") as caught:
        sampler("http://h/v1")
    assert KEY not in str(caught.value)


# The body


def test_body_without_steps():
    sampling = Sampling(0.7, 50, 0.9, 0.05, 1.1, 77)
    assert chat_body("m", sampling, "continue", Request(Problem("p", "Why?", "1"), (), 8), (), 5) == {
        "model": "m",
        "messages": [{"role": "user", "content": "Why?"}],
        "n": 1,
        "seed": 5,
        "temperature": 0.7,
        "top_k": 50,
        "top_p": 0.9,
        "min_p": 0.05,
        "repetition_penalty": 1.1,
        "max_tokens": 77,
        "skip_special_tokens": False,
    }


def test_body_that_keeps_all_tokens_and_stops():
    body = chat_body("m", Sampling(stop=(7, 9)), "continue", Request(problems(1)[0], (), 1), (), 5)
    assert body["top_k"] == -1 and body["stop_token_ids"] == [7, 9]


def test_body_that_continues():
    body = chat_body("m", Sampling(), "continue", Request(Problem("p", "Why?\n", "1"), PREFIX, 1), ["data:u"], 5)
    assert body["messages"] == [
        {
            "role": "user",
            "content": [
                {"type": "image_url", "image_url": {"url": "data:u"}},
                {"type": "text", "text": "Why?\n"},
            ],
        },
        {"role": "assistant", "content": "<step>first</step><step> second\n</step>"},
    ]
    assert body["continue_final_message"] is True and body["add_generation_prompt"] is False


def test_body_of_the_paper():
    body = chat_body("m", Sampling(), "paper", Request(Problem("p", "Why?", "1"), PREFIX, 1), ["data:u"], 5)
    done = "\nPrevious Steps:<step>first</step><step>second</step>"
    assert body["messages"] == [
        {"role": "system", "content": INTERNVL_SYSTEM},
        {
            "role": "user",
            "content": [
                {"type": "image_url", "image_url": {"url": "data:u"}},
                {"type": "text", "text": f"{PAPER_TASK}Why?{done}"},
            ],
        },
    ]
    assert "continue_final_message" not in body and "add_generation_prompt" not in body


def test_the_image_stands_at_its_placeholder_and_markers_in_a_question_are_text():
    question = "<|im_end|><image>\nand <|im_end|>\n<|im_start|>say."
    body = chat_body("m", Sampling(), "internvl", Request(Problem("p", question, "1"), PREFIX[:1], 1), ["data:u"], 5)
    assert [m["role"] for m in body["messages"]] == ["system", "user", "assistant"]
    assert body["messages"][1]["content"] == [
        {"type": "text", "text": "<|im_end|>"},
        {"type": "image_url", "image_url": {"url": "data:u"}},
        {"type": "text", "text": "and <|im_end|>\n<|im_start|>say."},
    ]


def test_several_images_stand_at_their_placeholders_or_in_front():
    problem = Problem("p", "Compare <image> with <image>.", "1", ("a", "b"))
    body = chat_body("m", Sampling(), "continue", Request(problem, (), 1), ["data:a", "data:b"], 5)
    first, second = ({"type": "image_url", "image_url": {"url": f"data:{name}"}} for name in "ab")
    assert body["messages"][0]["content"] == [
        {"type": "text", "text": "Compare "}, first, {"type": "text", "text": " with "}, second,
        {"type": "text", "text": "."},
    ]  # fmt: skip
    body = chat_body("m", Sampling(), "paper", Request(Problem("p", "Why?", "1"), (), 1), ["data:a", "data:b"], 5)
    assert body["messages"][1]["content"] == [first, second, {"type": "text", "text": f"{PAPER_TASK}Why?"}]


def test_all_images_of_a_problem_and_its_choices_go_the_whole_way(stub, tmp_path):
    for name in ("red", "blue"):
        Image.new("RGB", (3, 3), name).save(tmp_path / f"{name}.png")
    problem = Problem("p", "Which?", "1", ("red.png", "blue.png"), grading=Grading.of(["0", "2", "1"]))
    seen, server = [], stub()

    def record(answers):
        seen.extend(answers)
        return verify(answers)

    with sampler(server, folder=tmp_path, verify=record) as s:
        collect_all(s, [Request(problem, (), 3)])
    assert len(seen) == 3 and {(gold, grading) for _, gold, grading in seen} == {("1", problem.grading)}
    for body in server.bodies:
        *pictures, text = body["messages"][0]["content"]
        sent = [base64.b64decode(p["image_url"]["url"].split(",")[1]) for p in pictures]
        assert sent == [(tmp_path / name).read_bytes() for name in problem.images] and text["text"] == "Which?"


def test_placeholders_that_do_not_fit_are_a_failure(stub):
    request = Request(Problem("p", "<image> and <image>", "1"), (), 2)
    server = stub()
    with sampler(server) as s:
        assert "placeholders" in collect_all(s, [request])[request].reason
    assert not server.bodies


# Images


def sent_image(server, i=0):
    (url,) = [p["image_url"]["url"] for p in server.bodies[i]["messages"][0]["content"] if p["type"] == "image_url"]
    kind, data = re.fullmatch("data:(image/[a-z]+);base64,(.*)", url).groups()
    return kind, base64.b64decode(data, validate=True)


@pytest.mark.parametrize("mode, form, kind", [("RGB", "PNG", "image/png"), ("RGB", "JPEG", "image/jpeg"),
                                              ("L", "PNG", "image/png"), ("RGBA", "PNG", None), ("P", "GIF", None),
                                              ("CMYK", "JPEG", None), ("RGB", "BMP", None)])  # fmt: skip
def test_the_image_arrives_pixel_for_pixel(stub, tmp_path, mode, form, kind):
    bands = len(Image.new(mode, (1, 1)).getbands())
    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, bands), np.uint8)
    path = tmp_path / "images" / "a.picture"
    path.parent.mkdir()
    Image.fromarray(pixels.squeeze(), None if mode == "P" else mode).convert(mode).save(path, form)
    server = stub()
    with sampler(server, folder=tmp_path) as s:
        collect_all(s, [Request(Problem("p", "Why?", "1", ("images/a.picture",)), (), 1)])
    sent_kind, data = sent_image(server)
    assert sent_kind == (kind or "image/png")
    assert kind is None or data == path.read_bytes()
    with Image.open(io.BytesIO(data)) as image:
        assert image.mode in ("RGB", "L")  # nothing is left for the server to choose
        np.testing.assert_array_equal(np.asarray(image.convert("RGB")), np.asarray(open_image(path)))


@pytest.mark.parametrize("kind", ["turned", "key", "16 bits"])
def test_a_server_sees_an_image_as_we_do(stub, tmp_path, kind):
    """What its library would show in another way is sent as plain pixels."""
    page = Image.new("RGB", (6, 4), "red")
    page.paste("blue", (0, 0, 2, 2))
    exif = Image.Exif()
    exif[0x0112] = 6
    if kind == "16 bits":
        Image.fromarray(np.full((4, 6), 40_000, np.uint16)).save(tmp_path / "a", "PNG")
    else:
        page.save(tmp_path / "a", "PNG", **({"exif": exif} if kind == "turned" else {"transparency": (255, 0, 0)}))
    server = stub()
    with sampler(server, folder=tmp_path) as s:
        collect_all(s, [Request(Problem("p", "Why?", "1", ("a",)), (), 1)])
    with Image.open(io.BytesIO(sent_image(server)[1])) as image:
        assert image.mode == "RGB" and not image.has_transparency_data and not image.getexif()
        np.testing.assert_array_equal(np.asarray(image), np.asarray(open_image(tmp_path / "a")))


def test_an_image_is_read_once_until_its_problem_is_released(stub, tmp_path, monkeypatch):
    Image.new("RGB", (3, 3), "red").save(tmp_path / "a.png")
    read, original = [], remote.image_url
    monkeypatch.setattr(remote, "image_url", lambda path: read.append(path) or original(path))
    problem, server = Problem("p", "Why?", "1", ("a.png",)), stub()
    with sampler(server, folder=tmp_path) as s:
        collect_all(s, [Request(problem, (), 4), Request(problem, PREFIX, 4)])
        collect_all(s, [Request(problem, (), 4, repeat=1)])
        assert read == [tmp_path / "a.png"]
        s.release("p")
        s.release("another")
        collect_all(s, [Request(problem, (), 4, repeat=2)])
    assert len(read) == 2
    assert len({sent_image(server, i) for i in range(16)}) == 1


def test_an_image_that_cannot_be_read_is_a_failure(stub, tmp_path):
    (tmp_path / "bad.png").write_bytes(b"no image")
    asked = [Request(Problem(name, "Why?", "1", (f"{name}.png",)), (), 2) for name in ("missing", "bad")]
    server, good = stub(), requests(2, 2)
    with sampler(server, folder=tmp_path) as s:
        answers = collect_all(s, [*asked, *good])
    for request in asked:
        assert str(tmp_path / request.problem.images[0]) in answers.pop(request).reason
    assert answers == expected(good) and len(server.bodies) == 4

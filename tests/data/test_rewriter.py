"""A server's steps are taken only when they parse and keep the answer; order and content do not depend on timing."""

import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from mmprm_jax import cli, records
from mmprm_jax.data.rewriter import Rewriter, accepted
from mmprm_jax.data.sources_base import Item
from mmprm_jax.records import SFTExample, UserError

RULES = "<step>a</step><answer>$1 2$</answer>"


@pytest.mark.parametrize(
    "said, taken",
    [
        ("<step>x</step>\n<step>y</step>\n<answer>12</answer>\n", "<step>x</step><step>y</step><answer>12</answer>"),
        ("<step>x</step><answer>13</answer>", None),
        ("Sure! <step>x</step><answer>12</answer>", None),
        ("<answer>12</answer>", None),
        ("<step> </step><answer>12</answer>", None),
        ("<step>x</step>", None),
        ("<step>x</step><answer>12</answer> and more", None),
        ("<step>x<answer>12</answer>", None),
        ("", None),
    ],
)
def test_what_is_accepted(said, taken):
    response, why = accepted(said, RULES)
    assert response == (taken or RULES) and (why == "by the server") == (taken is not None)


class Stub(ThreadingHTTPServer):
    """Answers what ``say(body, nth)`` returns: a text, or a status; nth counts the requests of one question."""

    daemon_threads = True

    def __init__(self, say):
        super().__init__(("127.0.0.1", 0), Handler)
        self.say, self.seen, self.bodies, self.headers, self.lock = say, {}, [], [], threading.Lock()
        self.url = f"http://127.0.0.1:{self.server_port}/v1"
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *args):
        """Silent."""

    def do_POST(self):  # noqa: N802
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        content = body["messages"][0]["content"]
        with self.server.lock:
            nth = self.server.seen[content] = self.server.seen.get(content, -1) + 1
            self.server.bodies.append(body)
            self.server.headers.append(dict(self.headers))
        said = self.server.say(content, nth)
        message = said if isinstance(said, dict) else {"content": said}
        data = json.dumps({"choices": [{"message": message}]}).encode()
        self.send_response(said if isinstance(said, int) else 200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


@pytest.fixture
def stub(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-1")
    servers = []

    def make(say):
        servers.append(Stub(say))
        return servers[-1]

    yield make
    for server in servers:
        server.shutdown()


def items(count):
    return [Item(SFTExample(f"i{i}", f"question {i}", f"<step>s</step><answer>{i}</answer>"), solution=f"solution {i} ")
            for i in range(count)]  # fmt: skip


def test_items_come_back_in_order_whatever_fails(stub):
    def say(content, nth):
        i = int(content.split("question ")[1].split()[0])
        time.sleep((7 * i) % 5 / 200)
        if i % 4 == 1 and nth == 0:
            return 503
        return {0: f"<step>new {i}</step><answer>{i}</answer>", 1: f"<step>new {i}</step><answer>{i}</answer>",
                2: f"<step>new {i}</step><answer>{i + 1}</answer>", 3: 400}[i % 4]  # fmt: skip

    server = stub(say)
    with Rewriter(server.url, "m", concurrency=5, backoff=0.01) as rewriter:
        found = list(rewriter.rewrite(items(60)))
    assert [item.record.id for item in found] == [f"i{i}" for i in range(60)]
    for i, item in enumerate(found):
        assert item.record.response == f"<step>{f'new {i}' if i % 4 < 2 else 's'}</step><answer>{i}</answer>"
    assert rewriter.figures() == {
        "by the server": 30, "by rules: the server changed the final answer": 15,
        "by rules: no answer from the server": 15,
    }  # fmt: skip
    body = server.bodies[0]
    assert (body["temperature"], body["model"]) == (0, "m") and server.headers[0]["Authorization"] == "Bearer sk-1"
    assert "solution" in body["messages"][0]["content"]


def test_an_answer_in_parts_or_filed_as_reasoning(stub):
    new = [f"<step>new</step><answer>{i}</answer>" for i in range(4)]
    shapes = [
        {"content": [{"type": "text", "text": new[0][:9]}, {"type": "text", "text": new[0][9:]}]},
        {"content": None, "reasoning_content": new[1]}, {"content": "", "reasoning": new[2]}, {"content": None},
    ]  # fmt: skip
    server = stub(lambda content, nth: shapes[int(content.split("question ")[1].split()[0])])
    with Rewriter(server.url, "m") as rewriter:
        found = [item.record.response for item in rewriter.rewrite(items(4))]
    assert found == [*new[:3], "<step>s</step><answer>3</answer>"] and len(server.bodies) == 4


def test_prepare_with_a_rewriter(stub, tmp_path):
    solutions = ["It is one.\n\nThe answer is 1.", "It is two.\n\nThe answer is 2."]
    lines = [json.dumps({"query": f"q{i}", "response": text}) for i, text in enumerate(solutions)]
    (tmp_path / "train.jsonl").write_text("\n".join(lines))
    server = stub(lambda content, nth: f"<step>Rewritten.</step><answer>{1 + ('q1' in content) * 4}</answer>")
    options = [f"--output={tmp_path / 'o'}", f"--rewriter={server.url}", "--model=m"]
    cli.run(["prepare", "dart_math", str(tmp_path), *options])
    found = [example.response for example in records.read(tmp_path / "o" / "sft.jsonl", SFTExample)]
    assert found == ["<step>Rewritten.</step><answer>1</answer>", "<step>It is two.</step><answer>2</answer>"]
    summary = json.loads((tmp_path / "o/prepare/sft/summary.json").read_text())
    assert summary["rewriter"] == {"by the server": 1, "by rules: the server changed the final answer": 1}


def test_a_refusing_server_is_reported_at_once(stub):
    with Rewriter(stub(lambda content, nth: 401).url, "m") as rewriter, pytest.raises(UserError, match="HTTP 401"):
        list(rewriter.rewrite(items(3)))


def test_a_server_that_is_not_there_leaves_the_rules():
    with Rewriter("http://127.0.0.1:9/v1", "m", attempts=2, backoff=0.01) as rewriter:
        assert [item.record for item in rewriter.rewrite(items(2))] == [item.record for item in items(2)]

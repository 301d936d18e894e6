"""What the answers of servers amount to, and what servers are told of tiles."""

import json

import pytest
from PIL import Image
from test_remote import SHAPES, Handler, collect_all, environment, expected, problems, sampler, stub  # noqa: F401

from mmprm_jax.records import Failure, Problem, Request, Rollout
from mmprm_jax.rollout import remote
from mmprm_jax.rollout.chat import Unusable, limit_tiles, read_answer, server_kind

TEXT = "<step>a</step><answer>1</answer>"
USAGE = {"prompt_tokens": 5, "completion_tokens": 9}
PARTS = [{"type": "text", "text": "<step>a</step>"}, {"type": "output_text", "text": "<answer>1</answer>"}]
THINKING = {"type": "thinking", "thinking": [{"type": "text", "text": "<step>no</step>"}]}


def answer(usage=USAGE, finish="stop", **message):
    choice = {"index": 0, "message": {"role": "assistant", **message}, "finish_reason": finish}
    return {"id": "x", "choices": [choice], "usage": usage}


def without(value, *path):
    *parents, last = path
    for key in parents:
        value = value[key]
    del value[last]


LEGAL = {  # the answer: the text, the number of tokens (None: a quarter of the bytes)
    "plain": (answer(content=TEXT), TEXT, 9),
    "null content": (answer(content=None), "", 9),
    "empty content": (answer(content="", usage={"completion_tokens": 1}), "", 1),
    "no content": (answer(), "", 9),
    "nothing sampled": (answer(content="", usage={"completion_tokens": 0}), "", 0),
    "parts": (answer(content=PARTS), TEXT, 9),
    "strings": (answer(content=["<step>a</step>", "<answer>1</answer>"]), TEXT, 9),
    "parts with thinking": (answer(content=[THINKING, *PARTS]), TEXT, 9),
    "no parts": (answer(content=[]), "", 9),
    "a refusal": (answer(content=None, refusal="I cannot"), "", 9),
    "a refusal in parts": (answer(content=[{"type": "refusal", "refusal": "I cannot"}]), "", 9),
    "thought, then said": (answer(content=TEXT, reasoning_content="<answer>2</answer>"), TEXT, 9),
    "reasoning only": (answer(content=None, reasoning_content=TEXT), TEXT, 9),
    "by its new name": (answer(content="", reasoning=TEXT), TEXT, 9),
    "both names": (answer(content=None, reasoning_content=None, reasoning=TEXT), TEXT, 9),
    "reasoning null": (answer(content=TEXT, reasoning_content=None, reasoning=None), TEXT, 9),
    "length": (answer(content="<step>a", finish="length"), "<step>a", 9),
    "filter": (answer(content="<step>a</step>", finish="content_filter"), "<step>a</step>", 9),
    "filter, nothing left": (answer(content=None, finish="content_filter"), "", 9),
    "tools": (answer(content=None, finish="tool_calls", tool_calls=[{"id": "t", "type": "function"}]), "", 9),
    "an old function": (answer(content=TEXT, finish="function_call"), TEXT, 9),
    "repetition": (answer(content=TEXT, finish="repetition"), TEXT, 9),
    "finish null": (answer(content=TEXT, finish=None), TEXT, 9),
    "a name of its own": (answer(content=TEXT, finish="eos_token"), TEXT, 9),
    "usage null": (answer(content=TEXT, usage=None), TEXT, None),
    "usage without them": (answer(content=TEXT, usage={"prompt_tokens": 4}), TEXT, None),
    "tokens null": (answer(content=TEXT, usage={"completion_tokens": None}), TEXT, None),
    "none for a text": (answer(content=TEXT, usage={"completion_tokens": 0}), TEXT, None),
    "fewer than none": (answer(content=TEXT, usage={"completion_tokens": -1}), TEXT, None),
    "a float": (answer(content=TEXT, usage={"completion_tokens": 9.0}), TEXT, 9),
    "infinite": (answer(content=TEXT, usage={"completion_tokens": float("inf")}), TEXT, None),
    "a bool": (answer(content=TEXT, usage={"completion_tokens": True}), TEXT, None),
    "text": (answer(content=TEXT, usage={"completion_tokens": "9"}), TEXT, None),
    "usage a list": (answer(content=TEXT, usage=[9]), TEXT, None),
    "surrogates": (answer(content="\ud800"), "?", 9),
    "three bytes each": (answer(content="角" * 8, usage=None), "角" * 8, 6),
}


def test_every_legal_answer_is_a_rollout():
    for name, (value, text, tokens) in LEGAL.items():
        found = read_answer(json.dumps(value).encode())
        wanted = (text, -(-len(text.encode()) // 4) if tokens is None else tokens)
        assert (found.text, found.n_tokens) == wanted, name
        assert found.counted == (tokens is not None and name != "three bytes each"), name
    for missing in (("usage",), ("choices", 0, "finish_reason"), ("choices", 0, "index"), ("id",)):
        value = answer(content=TEXT)
        without(value, *missing)
        assert read_answer(json.dumps(value).encode()).text == TEXT, missing


NONE = {
    "no JSON": b"<html>", "nothing": b"", "a list": b"[]", "null": b"null", "an error": b'{"error": {"message": "x"}}',
    "deep": b"[" * 100_000, "not UTF-8": b'{"choices": "\xff"}',
    **{name: json.dumps(value).encode() for name, value in {
        "no choice": {"choices": []}, "two": {"choices": [answer(content="a")["choices"][0]] * 2},
        "choices null": {"choices": None}, "no message": {"choices": [{"finish_reason": "stop"}]},
        "message null": {"choices": [{"message": None}]}, "message a string": {"choices": [{"message": "a"}]},
        "content a number": answer(content=3), "content an object": answer(content={"text": "a"}),
        "a part a number": answer(content=[3]), "text of a part a number": answer(content=[{"text": 3}]),
    }.items()},
}  # fmt: skip


def test_what_is_no_answer():
    for name, data in NONE.items():
        with pytest.raises(Unusable) as told:
            read_answer(data)
        assert told.value.answer is None and len(str(told.value)) < 400 and "\n" not in str(told.value), name


@pytest.mark.parametrize("finish", ["abort", "error", "cancelled"])
def test_what_a_server_broke_off_is_asked_for_once_more(stub, monkeypatch, finish):  # noqa: F811
    monkeypatch.setitem(SHAPES, "broken off", lambda a: a["choices"][0].update(finish_reason=finish))
    asked = [Request(problems(1)[0], (), 3)]
    server = stub(lambda body, nth: "broken off" if nth == 0 else None)
    with sampler(server) as s:
        assert collect_all(s, asked) == expected(asked) and s.retries == 3
    server = stub(lambda body, nth: "broken off")
    with sampler(server) as s:
        assert collect_all(s, asked) == expected(asked) and s.unusable == 0
    assert len(server.bodies) == 6


def test_an_answer_that_cannot_be_used_costs_itself(stub, told):  # noqa: F811
    """Not its request, unless that is most of it; and it is asked for twice, not eight times."""
    lost, (request, other) = [], [Request(p, (), 4) for p in problems(2)]
    seeds = [remote._seed(remote.request_key(0, "search", request), i) for i in range(4)]
    server = stub(lambda body, nth: "content a number" if body["seed"] in lost else None)
    whole = expected([request, other])
    for count in (1, 2, 3):
        lost[:] = seeds[:count]
        with sampler(server) as s:
            found = collect_all(s, [request, other])
        assert found[other] == whole[other]
        if count == 3:
            assert isinstance(found[request], Failure) and "content is int" in found[request].reason and not s.unusable
        else:
            assert found[request] == (Rollout((), False, 0),) * count + whole[request][count:] and s.unusable == count
        assert max(sum(b["seed"] == seed for b in server.bodies) for seed in lost) == 2
        del server.bodies[:]
    assert sum("count as wrong" in line for line in told) == 2


@pytest.fixture
def told(monkeypatch):
    lines = []
    monkeypatch.setattr(remote.logging, "warning", lambda text, *args: lines.append(text % args))
    return lines


def test_tokens_that_a_server_does_not_count_are_warned_of_once(stub, monkeypatch, told):  # noqa: F811
    monkeypatch.setitem(SHAPES, "no usage", lambda a: a.pop("usage"))
    asked = [Request(p, (), 2) for p in problems(3)]
    with sampler(stub(lambda body, nth: "no usage")) as s:
        found = collect_all(s, asked)
    assert [r.segments for r in found[asked[0]]] == [r.segments for r in expected(asked)[asked[0]]]
    assert all(r.n_tokens > 0 for rollouts in found.values() for r in rollouts)
    assert len(told) == 1 and "does not count tokens" in told[0]


# Tiles


def models(*owners):
    return json.dumps(
        {"object": "list", "data": [{"id": f"m{i}", "owned_by": o} for i, o in enumerate(owners)]}
    ).encode()


def test_kinds_of_servers():
    assert [server_kind(models(owner)) for owner in ("vllm", "sglang", "lmdeploy")] == ["vllm", "sglang", "lmdeploy"]
    assert server_kind(models("me", "vllm")) == "vllm" and server_kind(models("llamacpp")) == ""
    for data in (b"", b"<html>", b"[]", b"null", b'{"data": 3}', b'{"data": [3]}', b'{"data": [{}]}', b"[" * 99_999,
                 b'{"data": [{"owned_by": ["vllm"]}]}'):  # fmt: skip
        assert server_kind(data) == ""


@pytest.fixture
def picture(tmp_path):
    Image.new("RGB", (3, 3), "red").save(tmp_path / "a.png")
    return Problem("p", "What is <image> and <image>?", "1", ("a.png", "a.png"))


def limits(body):
    """Where the request says how many tiles there may be."""
    content = body["messages"][0]["content"]
    parts = [p["image_url"].get("max_dynamic_patch") for p in content if p["type"] == "image_url"]
    return body.get("mm_processor_kwargs"), parts


@pytest.fixture
def listed(monkeypatch):
    """``listed(status, data)``: what the stubs answer to /models."""
    answers = []

    def get(handler):
        status, data = answers[-1] if len(answers) == 1 else answers.pop(0)
        handler.send(data if handler.path == "/v1/models" else b"", status)

    monkeypatch.setattr(Handler, "do_GET", get, raising=False)
    return lambda *given: answers.extend(given)


KINDS = {
    "vllm": ([(200, models("vllm"))], ({"max_dynamic_patch": 6}, [None, None])),
    "sglang": ([(200, models("sglang"))], (None, [6, 6])),
    "lmdeploy": ([(200, models("lmdeploy"))], (None, [6, 6])),
    "still loading": ([(503, b"loading"), (200, models("sglang"))], (None, [6, 6])),
    "another": ([(200, models("llamacpp"))], None),
    "no list": ([(404, b"")], None),
    "no JSON": ([(200, b"<html>")], None),
    "no entry": ([(401, b"{}")], None),
}


@pytest.mark.parametrize("kind", KINDS)
def test_servers_are_told_how_many_tiles_an_image_may_have(stub, told, listed, picture, tmp_path, kind):  # noqa: F811
    answers, wanted = KINDS[kind]
    listed(*answers)
    server = stub()
    with sampler(server, folder=tmp_path, max_tiles=6) as s:
        collect_all(s, [Request(picture, (), 3), Request(picture, (), 2, repeat=1)])
    assert [limits(body) for body in server.bodies] == [wanted or (None, [None, None])] * 5
    warned = [line for line in told if "max_tiles" in line]
    assert len(warned) == (wanted is None) and all(server.url in line and "6 tiles" in line for line in warned)


def test_without_images_nobody_is_asked(stub, told, listed, picture, tmp_path):  # noqa: F811
    listed((200, models("vllm")))
    server = stub()
    with sampler(server, max_tiles=6) as s:
        collect_all(s, [Request(problems(1)[0], (), 3)])
    with sampler(server, folder=tmp_path) as s:
        collect_all(s, [Request(picture, (), 1)])
    assert not any("mm_processor_kwargs" in body for body in server.bodies) and not told


def test_what_is_told_leaves_the_request_alone():
    body = {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "u"}}]}]}
    before = json.dumps(body)
    for kind in ("sglang", "vllm", "lmdeploy", ""):
        limit_tiles(body, kind, 4)
        assert json.dumps(body) == before

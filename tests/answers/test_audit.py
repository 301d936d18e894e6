"""``mmprm verify``: rows in order, bad rows, official modes, and the judge of the unknown."""

import http.server
import json
import subprocess
import sys
import threading
import types
from pathlib import Path

import pytest

from mmprm_jax.answers import audit
from mmprm_jax.answers.judge import Judge
from mmprm_jax.answers.verdict import Verdict, equal, unequal, unknown
from mmprm_jax.records import UserError

ROWS = [
    {"gold": "1/2", "prediction": "0.5", "equal": True, "id": 7},
    {"gold": "5", "prediction": "6", "equal": True},
    {"gold": "B", "prediction": "60°", "options": ["30°", "60°"]},
    {"gold": "5", "prediction": "5 m", "unit": "cm"},
    {"gold": "\\pi", "prediction": "3.14", "precision": 2},
    {"gold": "a chord", "prediction": "a line which joins two points of it"},
    {"gold": "5", "prediction": None},
    {"gold": "2^{100}", "prediction": "\ud800"},
]
VERDICTS = ["equal", "unequal", "equal", "unequal", "equal", "unknown", "unequal", "unknown"]
BAD = [
    "{",
    "[1]",
    '{"gold": 5, "prediction": "5"}',
    '{"gold": "5"}',
    '{"gold": "5", "prediction": "5", "options": 3}',
    '{"gold": "5", "prediction": "5", "precision": "two"}',
    "[" * 100_000,
    '{"gold": "5", "prediction": "5", "unit": []}',
]
WHY = ["Expecting", "found list", '"gold"', '"prediction"', '"options"', '"precision"', "", '"unit"']


def write(path, lines):
    path.write_text("".join(f"{line if isinstance(line, str) else json.dumps(line)}\n" for line in lines))
    return str(path)


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_rows_in_order(tmp_path, monkeypatch):
    monkeypatch.setattr(audit, "_BLOCK", 3)
    source = write(tmp_path / "pairs.jsonl", [*ROWS, "", *ROWS])
    summary, good = audit.verify_file(source, str(tmp_path / "out.jsonl"), jobs=1)
    found = read(tmp_path / "out.jsonl")
    assert [row["verdict"] for row in found] == VERDICTS * 2 and all(row["reason"] for row in found)
    assert [{k: v for k, v in row.items() if k not in ("verdict", "reason")} for row in found] == ROWS * 2
    assert good and "16 rows: 6 equal, 6 unequal, 4 unknown" in summary and "as labelled: 2 of 4" in summary


@pytest.mark.parametrize(
    "row, verdict",
    [
        ({"gold": "60°", "prediction": "B", "grading": {"options": ["30°", "60°"], "kind": "choice"}}, "equal"),
        ({"gold": "60°", "prediction": "C", "grading": {"options": {"A": "30°", "C": "60°"}}}, "equal"),
        ({"gold": "60°", "prediction": "A", "grading": {"options": ["30°", "60°"]}}, "unequal"),
        ({"gold": "5", "prediction": "5 m", "grading": {"unit": "m"}}, "equal"),
        ({"gold": "5", "prediction": "5 m", "unit": "cm", "grading": {"unit": "m"}}, "unequal"),  # the row's own counts
        ({"gold": "3", "prediction": "3.14", "precision": 0.0, "grading": None}, "equal"),
    ],
)
def test_a_row_may_have_the_grading_of_a_problem(row, verdict):
    assert audit.default(row).kind == verdict


@pytest.mark.parametrize("grading, why", [([], ""), (["A"], "an object"), ({"choices": ["1"]}, "unknown keys"),
                                          ({"unit": 3}, '"unit"'), ({"precision": 0.5}, "decimals")])  # fmt: skip
def test_a_grading_that_is_none(grading, why):
    row = {"gold": "5", "prediction": "5", "grading": grading}
    if not why:
        assert audit.default(row)
    else:
        with pytest.raises(ValueError, match=why):
            audit.default(row)


def test_bad_rows_cost_nothing_else(tmp_path):
    lines = [line for pair in zip(ROWS, BAD, strict=True) for line in pair]
    summary, good = audit.verify_file(write(tmp_path / "pairs.jsonl", lines), str(tmp_path / "out.jsonl"), jobs=1)
    found = read(tmp_path / "out.jsonl")
    assert [row["verdict"] for row in found[::2]] == VERDICTS
    assert [row["line"] for row in found[1::2]] == [2 * i + 2 for i in range(len(BAD))]
    for row, why in zip(found[1::2], WHY, strict=True):
        assert why in row["error"] and "verdict" not in row
    assert not good and "8 with an error" in summary


def test_command_line(tmp_path):
    source = write(tmp_path / "pairs.jsonl", [*ROWS[:2], BAD[0]])
    command = [sys.executable, "-m", "mmprm_jax.main", "verify", source, "--jobs=1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and "3 rows: 1 equal, 1 unequal, 0 unknown, 1 with an error" in done.stderr
    assert [json.loads(line).get("verdict") for line in done.stdout.splitlines()] == ["equal", "unequal", None]


def test_what_the_user_can_mend(tmp_path):
    source = write(tmp_path / "pairs.jsonl", ROWS)
    for arguments, why in [({"path": "no.jsonl"}, "no such file"), ({"output": source}, "the file that is read"),
                           ({"jobs": -1}, "--jobs=-1")]:  # fmt: skip
        with pytest.raises(UserError, match=why):
            audit.verify_file(**{"path": source, **arguments})
    assert read(tmp_path / "pairs.jsonl") == ROWS


GOLDEN = Path(__file__).parent.parent / "golden"
SAID = ["so \\boxed{{{}}}", "So the final answer is {}."]


def real_rows(mode):
    """Rows of a benchmark, each with a right response and an empty one, and some of which nothing can be told."""
    if mode in ("mathvista", "mathvision"):
        name = {"mathvista": "mathvista_testmini", "mathvision": "mathvision_test"}[mode]
        found = read(GOLDEN / f"benchmarks/{name}.jsonl")[:12]
        keys = {"mathvista": ("precision", "answer_type", "question_type"), "mathvision": ()}[mode]
        rows = [{"gold": r["answer"], "options": r.get("options") or r.get("choices"), **{k: r[k] for k in keys}}
                for r in found]  # fmt: skip
    else:
        golds = json.loads((GOLDEN / "answers/mm_k12_golds.json").read_text())
        golds = [gold.strip("$. ") for gold in golds if len(gold) < 20 and "\n" not in gold and "(" not in gold]
        rows = [{"gold": gold} for gold in golds[:12]]
    rows = [{**row, "prediction": said.format(row["gold"])} for row in rows for said in SAID]
    return [*rows, *({**row, "prediction": None} for row in rows[::2])]


@pytest.mark.parametrize("mode", ["mathvista", "mathverse", "mathvision", "olympiadbench", "mm_k12"])
def test_official_modes_by_the_command(mode, tmp_path, mmprm_here):
    rows = real_rows(mode)
    source = write(tmp_path / "rows.jsonl", [*rows, {"prediction": "1"}])
    done = mmprm_here("verify", source, "--jobs=1", f"--mode={mode}")
    *found, bad = [json.loads(line) for line in done.stdout.splitlines()]
    wrong = [row for row in found if row["verdict"] != ("unequal" if row["prediction"] is None else "equal")]
    assert wrong == [] and len(found) == len(rows) and bad["error"] == f"a row needs the key 'gold' in mode {mode}"
    assert done.returncode == 1 and f"(mode {mode}, verifier" in done.stderr


INTERRUPTED = """
import sys
from mmprm_jax import main
from mmprm_jax.answers import audit
from mmprm_jax.interruption import Interrupted
def stop(*_): raise Interrupted
audit.verify_file, sys.argv = stop, ["mmprm", "verify", "rows.jsonl"]
main.run()
"""


def test_an_interruption_does_not_promise_to_go_on():
    done = subprocess.run([sys.executable, "-c", INTERRUPTED], capture_output=True, text=True, timeout=120)
    assert done.returncode == 143 and done.stderr.strip() == "mmprm: stopped as asked; the same command begins again"


def test_unknown_modes_are_reported():
    with pytest.raises(UserError, match="--mode=nothing: no such mode; there are default, mathverse, mathvision, "):
        audit.find_mode("nothing")


@pytest.fixture
def server():
    """A judge of a few lines; ``seen`` are the bodies, ``replies`` what it says to each prediction."""
    seen, replies = [], {}

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            seen.append(body)
            reply = replies[json.loads(body["messages"][-1]["content"])["prediction"]]
            reply = reply.pop(0) if isinstance(reply, list) else reply
            message = reply if isinstance(reply, dict) else {"content": reply}
            data = json.dumps({"choices": [{"message": message}]}).encode()
            self.send_response(reply if isinstance(reply, int) else 200)
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as httpd:
        threading.Thread(target=httpd.serve_forever, daemon=True).start()
        yield types.SimpleNamespace(url=f"http://127.0.0.1:{httpd.server_port}/v1", seen=seen, replies=replies)
        httpd.shutdown()


def test_the_judge_sees_only_the_unknown(server):
    server.replies |= {"a": "EQUAL", "b": " unequal.\n", "c": "Yes, EQUAL, as you asked", "d": "UNSURE",
                       "e": [503, "EQUAL"], "f": [503, 503, 503]}  # fmt: skip
    rows = [{"gold": "g", "prediction": p} for p in "xyabcdef"]
    verdicts = [equal("known"), unequal("known")] + [unknown("why")] * 6
    with Judge(server.url, "m", attempts=3, backoff=0.0) as judge:
        found = judge(rows, verdicts)
        assert [v.kind for v in found] == [
            "equal",
            "unequal",
            "equal",
            "unequal",
            "unknown",
            "unknown",
            "equal",
            "unknown",
        ]
        assert found[:2] == verdicts[:2] and all("why" in v.reason for v in found[2:])
        assert judge.failed == 2
    assert {json.loads(b["messages"][-1]["content"])["prediction"] for b in server.seen} == set("abcdef")
    assert all(body["temperature"] == 0 and body["model"] == "m" for body in server.seen)


def test_a_judge_behind_any_server(server):
    """The message in parts, or filed as reasoning; one without text is no verdict, and asked for once."""
    shapes = {
        "a": ({"content": [{"type": "text", "text": "EQUAL"}]}, "equal"),
        "b": ({"content": None, "reasoning_content": "UNEQUAL"}, "unequal"),
        "c": ({"content": "", "reasoning": "EQUAL"}, "equal"),
        "d": ({"content": None, "refusal": "no"}, "unknown"),
    }
    server.replies |= {name: reply for name, (reply, _) in shapes.items()}
    with Judge(server.url, "m", attempts=3, backoff=0.0) as judge:
        found = judge([{"gold": "g", "prediction": p} for p in shapes], [unknown("why")] * 4)
    assert [v.kind for v in found] == [kind for _, kind in shapes.values()] and len(server.seen) == 4


def test_a_judge_in_the_audit(server, tmp_path):
    server.replies[ROWS[5]["prediction"]] = "EQUAL"
    server.replies["\ud800"] = "UNEQUAL"
    with Judge(server.url, "m") as judge:
        audit.verify_file(write(tmp_path / "p.jsonl", ROWS + [BAD[0]]), str(tmp_path / "o.jsonl"), jobs=1, judge=judge)
    verdicts = [row.get("verdict") for row in read(tmp_path / "o.jsonl")]
    assert verdicts == [*VERDICTS[:5], "equal", "unequal", "unequal", None]


def test_a_judge_in_an_official_mode(server, tmp_path):
    server.replies["\\boxed{the one on the left}"] = "EQUAL"
    rows = [{"gold": "the left one", "prediction": "\\boxed{the one on the left}"}, {"gold": "5", "prediction": "6"}]
    with Judge(server.url, "m") as judge:
        audit.verify_file(write(tmp_path / "p.jsonl", rows), str(tmp_path / "o.jsonl"), "mathverse", 1, judge)
    assert [row["verdict"] for row in read(tmp_path / "o.jsonl")] == ["equal", "unequal"] and len(server.seen) == 1


def test_a_judge_that_refuses(server):
    server.replies["p"] = 401
    with Judge(server.url, "m") as judge, pytest.raises(UserError, match="HTTP 401"):
        judge([{"gold": "g", "prediction": "p"}], [Verdict("unknown", "")])
    with pytest.raises(UserError, match="no server's address"):
        Judge("not a url", "m")

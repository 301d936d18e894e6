"""A policy that writes no tags, behind a server: trees, step labels, a PRM and scores by one way of cutting."""

import dataclasses
import json
import pathlib
import random
import threading
import zlib
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import jax
import pytest
import toy_annotation as toy
from etils import epath

from mmprm_jax import annotation, cli, convert, records, train_prm
from mmprm_jax.answers.workers import Verifier
from mmprm_jax.data.encode import Language
from mmprm_jax.data.prompts import STRUCTURE_TASK
from mmprm_jax.data.steps import final_answer, split
from mmprm_jax.models import build, hf_config
from mmprm_jax.models.config import DecoderConfig, VLMConfig
from mmprm_jax.models.tokenizer import Tokenizer
from mmprm_jax.records import Candidate, Problem, ScoredCandidate
from mmprm_jax.rollout.reading import Reader
from mmprm_jax.rollout.remote import RemoteSampler
from mmprm_jax.rollout.sampling import Sampling
from mmprm_jax.search.labels import LabelSettings, step_examples
from mmprm_jax.search.store import read_trees

SMOKE = f"--config={pathlib.Path(__file__).parents[1] / 'configs' / 'digits.py'}:smoke"
PROBLEMS = [Problem(f"p{i}", f"What is {i} + 2?", str(i + 2)) for i in range(4)]


class Instruct(ThreadingHTTPServer):
    """An instruct model: goes on with its numbered steps, which go wrong now and then if it may."""

    daemon_threads, request_queue_size = True, 64

    def __init__(self, wrong=0.5):
        super().__init__(("127.0.0.1", 0), Handler)
        self.wrong, self.bodies, self.said = wrong, [], []
        self.url = f"http://127.0.0.1:{self.server_port}/v1"
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def do_GET(self):  # noqa: N802
        self.send(b"{}")

    def do_POST(self):  # noqa: N802
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        first, last = body["messages"][0]["content"], body["messages"][-1]
        begun = last["content"] if last["role"] == "assistant" else ""
        start = int(first.split("What is ")[1].split()[0])
        rng = random.Random(zlib.crc32(json.dumps([body["messages"], body["seed"]]).encode()))
        lost = begun.count("wrongly") or rng.random() < self.server.wrong
        steps = [f"**Step {i + 1}:** We add 1{', wrongly' * lost}.\n\nSo it is ${start + i}$.\n\n" for i in range(3)]
        if not begun:
            steps.insert(0, "### Solution\n\n")
        made = begun.count("**Step")
        rest = "".join(steps[made:]) + f"### Final Answer\n\n\\boxed{{{start + 2 + 5 * bool(lost)}}}"
        with self.server.lock:
            self.server.bodies.append(body)
            self.server.said.append((begun, rest))
        choice = {"index": 0, "message": {"role": "assistant", "content": rest}, "finish_reason": "stop"}
        self.send(json.dumps({"choices": [choice], "usage": {"completion_tokens": len(rest) // 4}}).encode())

    def send(self, data):
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


@pytest.fixture
def instruct():
    found = []

    def make(**options):
        found.append(Instruct(**options))
        found[-1].lock = threading.Lock()
        return found[-1]

    yield make
    for server in found:
        server.shutdown()
        server.server_close()


def annotated(server, folder, mode="default", template="continue"):
    """The trees of its answers, and the sampler."""
    reader = Reader("structure", 0.5, 8, "annotate")
    with (
        Verifier(0) as verify,
        RemoteSampler(
            [server.url], "m", folder, 0, "annotate", verify, Sampling(), template, reader=reader
        ) as sampler,
    ):  # fmt: skip
        annotation.run(epath.Path(folder), PROBLEMS, sampler, toy.settings(), toy.config(mode=mode))
    annotation.finish(epath.Path(folder), PROBLEMS, {}, False, reader)
    return read_trees(epath.Path(folder))


@pytest.mark.parametrize("mode", ["default", "flat"])
def test_trees_grow_from_prefixes_that_are_continued_to_the_letter(instruct, tmp_path, mode):
    server = instruct()
    trees = annotated(server, tmp_path, mode)
    assert [tree.problem for tree in trees] == PROBLEMS
    assert sum(len(tree.nodes) for tree in trees) > 12 and any(0 < tree.nodes[0].k < tree.nodes[0].n for tree in trees)
    whole = {begun + rest for begun, rest in server.said}
    prompts = {f"{p.question}\n{STRUCTURE_TASK}" for p in PROBLEMS}
    for body in server.bodies:
        asked, *begun = body["messages"]
        assert asked["role"] == "user" and asked["content"] in prompts
        if begun:
            (message,) = begun
            assert message["role"] == "assistant" and body["continue_final_message"]
            assert any(text.startswith(message["content"]) for text in whole)
    sent = {body["messages"][1]["content"] for body in server.bodies if len(body["messages"]) > 1}
    for tree in trees:
        for i, node in enumerate(tree.nodes):
            prefix = tree.prefix(i)
            assert not prefix or "".join(prefix) in sent
            for rollout in node.rollouts:
                text = "".join(prefix + rollout.segments)
                assert ("".join(prefix), "".join(rollout.segments)) in server.said
                assert prefix + rollout.segments == split(text, "structure")
                assert final_answer(prefix + rollout.segments) == text.split("{")[1][:-1]
                assert rollout.correct == text.endswith(f"{{{tree.problem.answer}}}")
                assert not any(s.strip().startswith("###") and "\n\n" not in s.strip() for s in rollout.segments)
    examples = [e for tree in trees for e in step_examples(tree, LabelSettings(), 0)]
    assert examples and all(e.n[-1] == 1 and "\\boxed" in e.segments[-1] for e in examples)
    assert all(len(e.segments) == 4 and e.segments[0].startswith("### Solution\n\n**Step 1") for e in examples)


def test_a_run_that_reads_tags_where_there_are_none_stops(instruct, tmp_path, mmprm_here, monkeypatch):
    """And again when all is there; on demand it goes on, as it always did."""
    monkeypatch.setattr("mmprm_jax.cli.stages.cache_compilations", lambda folder: None)
    server = instruct(wrong=0)
    records.write(tmp_path / "train.jsonl", PROBLEMS)

    def run(*options):
        done = mmprm_here(
            "annotate", SMOKE, f"--workdir={tmp_path / 'w'}", f"--config.data.folder={tmp_path}",
            "--config.annotate.policy=m", f"--config.annotate.servers={server.url}", "--config.annotate.in_flight=1",
            "--config.annotate.verify_workers=0", "--config.annotate.max_unread=0.5", *options,
        )  # fmt: skip
        return done.returncode, done.stderr.splitlines()[-1]

    code, error = run("--config.annotate.unread_after=6")
    asked = len(server.bodies)
    assert code == 1 and asked == 8 and "8 of the first" not in error  # of 16: it stopped early
    assert "6 of the first 6 rollouts have no steps or no final answer" in error
    assert 'problem p0: "### Solution **Step 1:** We add 1.' in error and "\\boxed{2}" in error
    assert "problem p1: " in error and "--config.annotate.steps=structure" in error and "max_unread=1" in error
    folder = tmp_path / "w" / "annotate"
    assert not (folder / "done.json").exists() and (folder / "in_flight-000.part").exists()
    code, error = run()
    assert code == 1 and "16 of the first 16 rollouts" in error and len(server.bodies) == 16  # nothing was asked twice
    code, error = run("--config.annotate.max_unread=1")
    assert code == 0 and len(server.bodies) == 16
    assert json.loads((folder / "done.json").read_text())["all_wrong"] == 4


@pytest.mark.slow
def test_a_prm_learns_from_the_trees_and_scores_candidates_cut_alike(instruct, tmp_path, mesh):
    """annotate, train_prm, scores, bon."""
    server = instruct()
    trees = annotated(server, tmp_path / "trees")
    texts = [begun + rest for begun, rest in server.said]
    tokenizer = Tokenizer.train_bpe([*texts, *(p.question for p in PROBLEMS)], 320)
    decoder = DecoderConfig(
        vocab_size=len(tokenizer), hidden_size=16, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=8,
        intermediate_size=24, rope_theta=100.0,
    )  # fmt: skip
    cfg = VLMConfig(None, decoder, remat="none")
    with jax.set_mesh(mesh):
        _, params = build.initialise(cfg, Language.own(tokenizer, cfg).image_token, 0, mesh)
    loaded = convert.from_scratch(cfg, tokenizer, params, mesh)
    config = {**loaded.model.config, hf_config.TEMPLATES: {"policy": "own", "prm": "own"}}
    model = dataclasses.replace(loaded.model, config=config)
    convert.write_folder(tmp_path / "policy", dataclasses.replace(loaded, model=model), tokenizer)
    prm = train_prm(
        tmp_path / "policy", trees, tmp_path / "prm", mesh=mesh, steps=60, batch_size=8, max_length=400,
        optimizer={"learning_rate": 3e-2},
    )  # fmt: skip
    rows = []
    for problem in PROBLEMS:
        own = [text for text, body in zip(texts, server.bodies, strict=True) if problem.question in str(body)]
        candidates = [split(text, "structure") for text in own[:4]]
        known = {e.segments for tree in trees for e in step_examples(tree, LabelSettings(), 0)}
        assert known & set(candidates)  # what it was trained on and what it scores are the same segments
        for segments, scores in zip(candidates, prm.score_candidates(problem, candidates), strict=True):
            assert len(scores) == len(segments) and all(0 < s < 1 for s in scores)
            right = final_answer(segments) == problem.answer
            rows.append(ScoredCandidate(
                Candidate(problem.id, segments, final_answer(segments), right, -1.0, 9), tuple(scores)
            ))  # fmt: skip
    last = {right: [r.scores[-1] for r in rows if r.candidate.correct == right] for right in (True, False)}
    assert min(last[True]) > max(last[False])
    records.write(tmp_path / "scored.jsonl", rows)
    cli.run(["bon", str(tmp_path / "scored.jsonl"), f"--json={tmp_path / 'figures.json'}"])
    best = json.loads((tmp_path / "figures.json").read_text())["best_of_n"]
    assert best["4"]["prm"]["last"]["accuracy"] >= best["4"]["random"]["accuracy"], best

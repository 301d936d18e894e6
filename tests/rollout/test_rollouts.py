"""Requests to groups of tokens, samples to verified rollouts."""

import collections
import dataclasses
import hashlib
import itertools

import jax
import numpy as np
import pytest
from PIL import Image

from mmprm_jax import answers
from mmprm_jax.answers.workers import Verifier
from mmprm_jax.data.encode import Language, file_pixels
from mmprm_jax.data.images import tiles
from mmprm_jax.data.prompts import INTERNVL_SYSTEM, PAPER_TASK, split_segments
from mmprm_jax.models.tokenizer import Tokenizer
from mmprm_jax.records import Failure, Grading, Problem, Request, Rollout, UserError
from mmprm_jax.rollout.engine import Engine, Sample
from mmprm_jax.rollout.rollouts import LocalSampler, request_key
from mmprm_jax.rollout.sampling import Sampling

WORDS = ["user", "assistant", "how", "many", "so", *map(str, range(8))]
PROBLEMS = [
    Problem("a", "how many", "1", ("red.png",)),
    Problem("b", "many", "2"),
    Problem("c", "how how", "3", ("gone.png",)),
    Problem("d", "many how", "4", ("text.png",)),
]
STEPS = ("<step> so 1 </step>", "<step> so 2 so </step>")


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.from_words(WORDS)


def requests_of(*problems, n=3):
    return [Request(problem, STEPS[:j], n) for problem in problems for j in range(3)]


# Keys.


def test_request_key():
    """Fixed forever: rollouts that were sampled before an interruption must come again."""
    request = Request(PROBLEMS[0], STEPS, 8)
    text = "\x1f".join(("7", "search", "a", *STEPS))
    want = np.frombuffer(hashlib.blake2b(text.encode(), digest_size=8).digest(), np.uint32)
    key = request_key(7, "search", request)
    assert key.dtype == np.uint32 and key.tolist() == want.tolist()
    again = dataclasses.replace(request, n=3, problem=dataclasses.replace(PROBLEMS[0], question="?"))
    assert request_key(7, "search", again).tolist() == key.tolist()


def test_different_requests_have_different_keys():
    prefixes = [(), ("s",), ("s", "t"), ("st",), ("t", "s"), ("s", "")]
    found = [
        tuple(request_key(seed, purpose, Request(Problem(name, "q", "1"), prefix, 1, repeat)))
        for seed, purpose, name, prefix, repeat in itertools.product(
            (0, 1, 12), ("search", "test"), ("a", "b"), prefixes, (0, 1, 2)
        )
    ]
    assert len(set(found)) == len(found) == 3 * 2 * 2 * 6 * 3


# Prompts.


def test_a_prompt_of_our_own(tokenizer, tiny):
    prompt = Language.own(tokenizer, tiny.cfg).prompt
    for count in (0, 1, 3):
        whole = prompt(PROBLEMS[0].question, STEPS, count)
        image = f"<img>{'<IMG_CONTEXT>' * 4 * count}</img>\n" if count else ""
        start = tokenizer.encode(f"<|im_start|>user\n{image}how many<|im_end|>\n<|im_start|>assistant\n")
        assert whole == start + tokenizer.encode(STEPS[0]) + tokenizer.encode(STEPS[1])
        assert whole.count(tiny.image_token) == count * tiny.cfg.tokens_per_tile
        for j in range(3):
            length = len(start) + sum(map(len, [[0] * 4, [0] * 5][:j]))
            assert prompt(PROBLEMS[0].question, STEPS[:j], count) == whole[:length]


def expected_text(name, steps, image):
    user = image + ("" if name == "internvl" else PAPER_TASK) + "What is 1+1?"
    if name == "internvl":
        after = "".join(f"<step>{step}</step>" for step in steps)
    else:
        user += "\nPrevious Steps:" * bool(steps) + "".join(f"<step>{step.strip()}</step>" for step in steps)
        after = ""
    start = f"<|im_start|>system\n{INTERNVL_SYSTEM}<|im_end|>\n<|im_start|>user\n"
    return f"{start}{user}<|im_end|>\n<|im_start|>assistant\n{after}"


@pytest.mark.parametrize("kind", ["qwen2", "internlm2_nodummy"])
@pytest.mark.parametrize("name", ["paper", "internvl"])
def test_template_prompt(golden, tiny, name, kind):
    """The text of a released policy's prompt with the first j steps; tags of steps are plain text in it."""
    tokenizer = Tokenizer.load(golden / "tokenizer" / kind)
    prompt = Language.released(tokenizer, tiny.cfg, name).prompt
    steps = ("Add 1 and 1.", " It is 2.\n")
    image_token = tokenizer.id("<IMG_CONTEXT>")
    for j, count in itertools.product(range(3), (0, 1, 2)):
        ids = prompt("What is 1+1?", tuple(f"<step>{step}</step>" for step in steps[:j]), count)
        assert ids.count(image_token) == 4 * count
        image = f"<img>{'<IMG_CONTEXT>' * 4 * count}</img>\n" if count else ""
        if kind == "qwen2":
            assert tokenizer.decode(ids) == expected_text(name, steps[:j], image)
        else:
            assert ids[0] == 1 and ids.count(1) == 1
            text = tokenizer.decode(ids[1:]).replace(" ", "")
            assert text == expected_text(name, steps[:j], image).replace(" ", "")


# Images.


@pytest.fixture
def folder(tmp_path):
    Image.new("RGB", (20, 9), (200, 30, 30)).save(tmp_path / "red.png")
    (tmp_path / "text.png").write_text("no image")
    return str(tmp_path)


def test_file_pixels(folder, tiny):
    pixels = file_pixels(folder, tiny.cfg, 3)
    (found,) = pixels(PROBLEMS[0])
    assert found.dtype == np.uint8 and found.shape[1:] == (8, 8, 3) and len(found) > 1
    np.testing.assert_array_equal(found, tiles(Image.open(f"{folder}/red.png"), 3, 8))
    assert len(*file_pixels(folder, tiny.cfg, 1)(PROBLEMS[0])) == 1
    assert pixels(PROBLEMS[1]) == []
    with pytest.raises(UserError, match="gone.png: image not found"):
        pixels(PROBLEMS[2])


# The sampler, on an engine that answers by script.


class FakeEngine:
    """Finishes one group a step, the newest first. ``texts``: of the samples of each (problem, number)."""

    def __init__(self, tokenizer, texts, longest=99):
        self.tokenizer, self.texts, self.longest = tokenizer, texts, longest
        self.waiting, self.submitted, self.released, self.steps = [], [], [], 0

    def submit(self, group):
        if len(group.prefix) > self.longest:
            raise ValueError(f"a prefix of {len(group.prefix)} tokens")
        self.submitted.append(group)
        self.waiting.append(group)

    @property
    def busy(self):
        return bool(self.waiting)

    def release(self, problem):
        self.released.append(problem)

    def step(self):
        self.steps += 1
        if self.steps % 2:
            return []  # nothing is ready
        group = self.waiting.pop()
        texts = itertools.islice(itertools.cycle(self.texts[group.problem]), group.n)
        ids = [tuple(self.tokenizer.encode(text)) for text in texts]
        return [(group.id, [Sample(t, tuple(-0.5 * (i + 1) for i in range(len(t)))) for t in ids])]


TEXTS = {
    "a": ["so <step> 1 </step> so <answer> 1 </answer>", "<answer> 2 </answer>", "<step> 1 </step> <step> so"],
    "b": ["<answer> 2 </answer> <step> so </step>", "so so", "<step> 1 </step>"],
}
SEGMENTS = {
    "a": [("<step> 1 </step>", "<answer> 1 </answer>"), ("<answer> 2 </answer>",), ("<step> 1 </step>",)],
    "b": [("<answer> 2 </answer>",), (), ("<step> 1 </step>",)],
}
CORRECT = {"a": [True, False, False], "b": [True, False, False]}


class Verify:
    def __init__(self):
        self.calls = []

    def __call__(self, pairs):
        self.calls.append(list(pairs))
        return [bool(answers.equal(gold, answer)) for answer, gold, _ in pairs]


@pytest.fixture
def rig(tokenizer, tiny, folder):
    verify, opened = Verify(), collections.Counter()
    engine = FakeEngine(tokenizer, TEXTS)
    from_file = file_pixels(folder, tiny.cfg, 2)

    def pixels(problem):
        opened[problem.id] += 1
        return from_file(problem)

    sampling = Sampling(0.7, max_new_tokens=9, stop=(2,))
    sampler = LocalSampler(engine, Language.own(tokenizer, tiny.cfg), pixels, sampling, 5, "search", verify)
    return sampler, engine, verify, opened


def expected_rollouts(request, tokenizer):
    kinds = zip(TEXTS[request.problem.id], SEGMENTS[request.problem.id], CORRECT[request.problem.id], strict=True)
    found = [Rollout(segments, right, len(tokenizer.encode(text))) for text, segments, right in kinds]
    return tuple(itertools.islice(itertools.cycle(found), request.n))


def test_collect(rig, tokenizer, tiny):
    sampler, engine, verify, opened = rig
    requests = requests_of(*PROBLEMS[:2], n=4)
    sampler.submit(requests[:4])
    sampler.submit(requests[4:])
    for group, request in zip(engine.submitted, requests, strict=True):
        count = 0 if not request.problem.images else len(group.pixels)
        assert group.prefix == tuple(sampler.language.prompt(request.problem.question, request.prefix, count))
        assert (group.problem, group.n, group.sampling.temperature) == (request.problem.id, 4, 0.7)
        assert group.key.tolist() == request_key(5, "search", request).tolist()
        assert (group.pixels is None) == (not request.problem.images)
    assert len({group.id for group in engine.submitted}) == len(requests)
    assert opened == {"a": 1, "b": 1}  # an image is opened once
    found = []
    while answers := sampler.collect():
        found += answers
    assert [request for request, _ in found] == requests[::-1]  # as they get ready
    for request, rollouts in found:
        assert rollouts == expected_rollouts(request, tokenizer)
        assert all(type(rollout.correct) is bool for rollout in rollouts)
    assert sampler.collect() == []
    assert verify.calls[-1] == [(answer, "1", Grading()) for answer in ("1", "2", None, "1")]
    assert all(calls for calls in verify.calls)  # never asked for nothing


def test_failures_come_first_and_cost_nothing_else(rig, tokenizer):
    sampler, engine, _, _ = rig
    engine.longest = 40
    long = Request(PROBLEMS[1], STEPS * 8, 2)
    requests = [
        Request(PROBLEMS[2], (), 1),
        Request(PROBLEMS[1], (), 2),
        Request(PROBLEMS[3], (), 1),
        long,
        Request(dataclasses.replace(PROBLEMS[1], id="e", question="unheard of"), (), 1),
    ]
    sampler.submit(requests)
    found = dict(sampler.collect())
    reasons = {request.problem.id: found[request].reason for request in found if request != long}
    assert set(reasons) == {"c", "d", "e"} and "tokens" in found[long].reason
    assert "image not found" in reasons["c"] and "not a readable image" in reasons["d"]
    assert "cannot tokenise" in reasons["e"]
    ((request, rollouts),) = sampler.collect()
    assert request == requests[1] and rollouts == expected_rollouts(request, tokenizer)
    assert sampler.collect() == []
    sampler.submit([Request(PROBLEMS[2], STEPS, 1)])  # still gone
    assert isinstance(sampler.collect()[0][1], Failure)


def test_release(rig):
    sampler, engine, _, opened = rig
    sampler.submit(requests_of(PROBLEMS[0]))
    while sampler.collect():
        pass
    sampler.release("a")
    sampler.release("unknown")
    assert engine.released == ["a", "unknown"]
    sampler.submit(requests_of(PROBLEMS[0])[:1])
    assert opened["a"] == 2  # its pixels were given up


def test_solve(rig, tokenizer):
    sampler, engine, _, _ = rig
    requests = requests_of(*PROBLEMS[:2])
    found = sampler.solve(requests)
    for request, rollouts in zip(requests, found, strict=True):
        assert tuple(rollout for rollout, _ in rollouts) == expected_rollouts(request, tokenizer)
        for rollout, logprob in rollouts:
            assert logprob == pytest.approx(-0.25 * rollout.n_tokens * (rollout.n_tokens + 1))
    assert set(engine.released) == {"a", "b"} and not engine.busy
    assert sampler.solve([]) == []
    with pytest.raises(UserError, match="problem c: .*image not found"):
        sampler.solve(requests_of(PROBLEMS[2]))


def test_with_an_engine(tokenizer, tiny, mesh, folder):
    """What comes back is what the tokens say, and does not depend on what is asked beside."""
    language, pixels = Language.own(tokenizer, tiny.cfg), file_pixels(folder, tiny.cfg, 1)
    sampling = Sampling(max_new_tokens=8, stop=(tokenizer.id("</answer>"),), top_k=24)
    params = tiny.place(mesh)
    # The words of the tokenizer, and tags rather often.
    head = np.array(tiny.params["decoder"]["lm_head"])
    head[:, len(tokenizer) :] = 0
    params["decoder"]["lm_head"] = jax.device_put(head, params["decoder"]["lm_head"].sharding)

    settings = dict(slots=16, samples=4, max_new=8, cache_tokens=1024, steps=5, min_bucket=64)
    engine = Engine(tiny.graphdef, params, tiny.cfg, tiny.image_token, mesh, **settings)
    local = LocalSampler(engine, language, pixels, sampling, 1, "test", Verify())
    requests = requests_of(*PROBLEMS[:2], n=5)
    found = local.solve(requests)
    assert local.engine.counts.images == 1 and not local.engine.busy
    groups = [local._group(i, request) for i, request in enumerate(requests)]
    for request, rollouts, samples in zip(requests, found, local.engine.sample(groups), strict=True):
        assert len(rollouts) == request.n
        for (rollout, logprob), sample in zip(rollouts, samples, strict=True):
            assert rollout.segments == split_segments(tokenizer.decode(sample.tokens))
            assert rollout.n_tokens == len(sample.tokens) and logprob == pytest.approx(sample.logprob, abs=1e-4)
    one_by_one = [local.solve([request])[0] for request in requests[::-1]][::-1]
    assert [[r for r, _ in group] for group in one_by_one] == [[r for r, _ in group] for group in found]
    assert len({r.n_tokens for group in found for r, _ in group}) > 1
    again = [dataclasses.replace(request, repeat=1) for request in requests]
    assert [[r for r, _ in group] for group in local.solve(again)] != [[r for r, _ in group] for group in found]


def test_two_images_and_a_choice(tiny, folder):
    """MathVista's way: the gold answer is a choice's text, rollouts say its letter. Both images stand in the prompt."""
    Image.new("RGB", (8, 8), (30, 200, 30)).save(f"{folder}/green.png")
    tokenizer = Tokenizer.from_words([*WORDS, "A", "B", "(B)"])
    texts = ["<step> so </step> <answer> B </answer>", "<answer> A </answer>", "<answer> (B) 4 </answer>",
             "<answer> 4 </answer>", "<answer> 3 </answer>"]  # fmt: skip
    engine, language = FakeEngine(tokenizer, {"p": texts}), Language.own(tokenizer, tiny.cfg)
    names = ("red.png", "green.png")
    problem = Problem("p", "how <image> many <image> so", "4", names, grading=Grading.of(["3", "4"], kind="choice"))
    with Verifier(0) as verify:
        sampler = LocalSampler(engine, language, file_pixels(folder, tiny.cfg, 3), Sampling(), 0, "search", verify)
        sampler.submit([Request(problem, STEPS[:1], 5)])
        ((_, rollouts),) = sampler.collect()
    assert [r.correct for r in rollouts] == [True, False, True, True, False]
    (group,) = engine.submitted
    red, green = (tiles(Image.open(f"{folder}/{name}"), 3, 8) for name in names)
    assert len(red) > len(green) == 1
    np.testing.assert_array_equal(group.pixels, np.concatenate([red, green]))
    image = ["<img>" + "<IMG_CONTEXT>" * 4 * len(x) + "</img>" for x in (red, green)]
    asked = f"<|im_start|>user how {image[0]} many {image[1]} so<|im_end|><|im_start|>assistant {STEPS[0]}"
    assert "".join(tokenizer.decode(group.prefix).split()) == "".join(asked.split())


def test_placeholders_that_do_not_fit_the_images_are_a_failure(rig):
    sampler = rig[0]
    problem = Problem("a", "how <image> many", "1", ("red.png", "red.png"))
    sampler.submit([Request(problem, (), 1)])
    assert "1 <image> placeholders, but 2 images" in sampler.collect()[0][1].reason

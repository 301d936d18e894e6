"""Rollouts without tags: continued to the letter on servers and in our engine; a run that cannot be read stops."""

import itertools

import pytest

from mmprm_jax.data.encode import Language
from mmprm_jax.data.prompts import PAPER_TASK, POLICY_TEMPLATES, STRUCTURE_TASK
from mmprm_jax.data.steps import split
from mmprm_jax.models.tokenizer import Tokenizer
from mmprm_jax.records import Problem, Request, UserError
from mmprm_jax.rollout.engine import Sample
from mmprm_jax.rollout.reading import Reader
from mmprm_jax.rollout.remote import chat_body
from mmprm_jax.rollout.rollouts import LocalSampler
from mmprm_jax.rollout.sampling import Sampling

PROBLEM = Problem("p", "What is 3 + 1?", "4")
TEXTS = [
    "**Step 1:** Read 3.\n\n**Step 2:** Add 1. It is 4.\n\n\\boxed{4}",
    "<think>\nRead 3,\n\n  and 1.\n</think>\n\nSo it is\n\n$$x = 4$$\n\nThe answer is 4.",
    "It is so. " * 60 + "The answer is $4$.",
    "# Idea\r\n\r\nAdd “both”: 3 + 1\r\n\r\n\\boxed{4}",
]


def test_prompts_ask_for_steps_where_they_are_to_be_seen():
    shown = {}
    for template, steps in itertools.product(("continue", *POLICY_TEMPLATES), ("tags", "auto", "structure")):
        body = chat_body("m", Sampling(), template, Request(PROBLEM, (), 1), (), 0, steps)
        shown[template, steps] = body["messages"][-1]["content"]
        assert body["messages"] == [*body["messages"][:-1], {"role": "user", "content": shown[template, steps]}]
    asks = {key for key, text in shown.items() if text == f"{PROBLEM.question}\n{STRUCTURE_TASK}"}
    assert asks == {(name, "structure") for name in ("continue", "plain", "internvl")}
    assert {shown["paper", steps] for steps in ("tags", "auto", "structure")} == {PAPER_TASK + PROBLEM.question}
    assert {text for key, text in shown.items() if key not in asks and key[0] != "paper"} == {PROBLEM.question}


def test_a_server_is_sent_the_exact_prefix():
    for text, template in itertools.product(TEXTS, ("continue", *POLICY_TEMPLATES)):
        segments = split(text, "structure")
        first = chat_body("m", Sampling(), template, Request(PROBLEM, (), 1), (), 0, "structure")["messages"]
        for j in range(1, len(segments)):
            body = chat_body("m", Sampling(), template, Request(PROBLEM, segments[:j], 1), (), 0, "structure")
            assert body["messages"] == [*first, {"role": "assistant", "content": "".join(segments[:j])}]
            assert text.startswith(body["messages"][-1]["content"]) and body["continue_final_message"] is True


class Engine:
    """Writes the rest of a text behind what it is asked to continue, as the tokens of the whole."""

    busy = False

    def __init__(self, ids, end):
        self.ids, self.end, self.groups, self.release = ids, end, [], lambda problem: None

    def submit(self, group):
        self.groups.append(group)
        self.busy = True

    def step(self):
        self.busy = False
        group = self.groups[-1]
        rest = (*self.ids[len(group.prefix) :], self.end)
        return [(group.id, [Sample(rest, (0.0,) * len(rest))])]


@pytest.mark.parametrize("kind", ["qwen2", "own"])
def test_our_engine_goes_on_token_for_token(golden, tiny, kind):
    tokenizer = Tokenizer.load(golden / "tokenizer" / "qwen2") if kind == "qwen2" else Tokenizer.train_bpe(TEXTS, 320)
    language = Language.own(tokenizer, tiny.cfg) if kind == "own" else Language.released(tokenizer, tiny.cfg)
    language = language.writing("structure")
    end, seen = tokenizer.id("<|im_end|>"), []

    def verify(pairs):
        seen.extend(answer for answer, *_ in pairs)
        return [True] * len(pairs)

    for text in TEXTS:
        ids = language.prompt(PROBLEM.question, (text,), 0)
        sampler = LocalSampler(
            Engine(ids, end), language, lambda p: [], Sampling(stop=(end,)), 0, "s", verify, Reader("structure")
        )
        ((rollout, _),) = sampler.solve([Request(PROBLEM, (), 1)])[0]
        assert rollout.segments == split(text, "structure") and len(rollout.segments) > 1
        for j in range(1, len(rollout.segments)):
            (((behind, _),),) = sampler.solve([Request(PROBLEM, rollout.segments[:j], 1)])
            prefix = sampler.engine.groups[-1].prefix
            assert list(prefix) == ids[: len(prefix)], "the prefix has other tokens than the whole"
            assert behind.segments == rollout.segments[j:]
    assert set(seen) == {"4"}


def test_marks_of_thoughts_that_are_one_token_stay_one(golden, tiny):
    tokenizer = Tokenizer.load(golden / "tokenizer" / "qwen2").with_token("<think>").with_token("</think>")
    prompt = Language.released(tokenizer, tiny.cfg).writing("auto").prompt
    ids = prompt("q", ("<think>\nRead.\n\n", "Add.\n</think>\n\n"), 0)
    assert ids == prompt("q", (), 0) + tokenizer.encode("<think>\nRead.\n\nAdd.\n</think>\n\n")
    assert tokenizer.id("<think>") in ids and tokenizer.id("</think>") in ids
    asked = prompt("Is <think> here?", (), 0)
    assert tokenizer.id("<think>") not in asked  # a question brings none in


def test_words_keep_their_distance(tiny):
    """A word-level tokenizer writes no space in front of its first word."""
    tokenizer = Tokenizer.from_words(["user", "assistant", "how", "so", "4", "The", "answer", "is", ":"])
    language = Language.own(tokenizer, tiny.cfg)
    ids = language.prompt("how", (), 0) + tokenizer.encode("so so The answer is : 4")
    engine, reader = Engine(ids, tokenizer.id("<|im_end|>")), Reader("structure")

    def verify(pairs):
        return [answer == "4" for answer, *_ in pairs]

    sampler = LocalSampler(engine, language, lambda p: [], Sampling(stop=(engine.end,)), 0, "s", verify, reader)
    ((rollout, _),) = sampler.solve([Request(Problem("p", "how", "4"), (), 1)])[0]
    text = "".join(rollout.segments)
    prefix = (text[: text.index("The") + 3],)
    (((behind, _),),) = sampler.solve([Request(Problem("p", "how", "4"), prefix, 1)])
    assert rollout.correct and behind.correct
    assert "".join(prefix + behind.segments) == text


def test_an_answer_is_that_of_the_whole_solution():
    reader = Reader("structure")
    assert reader.read(Request(PROBLEM, ("We add.\n\n", "The answer is"), 1), " 4.") == ((" 4.",), "4")
    assert reader.read(Request(PROBLEM, ("Is it \\boxed{3}?\n\n",), 1), "Yes.") == (("Yes.",), "3")
    assert reader.read(Request(PROBLEM, ("Is it \\boxed{3}?\n\n",), 1), "No, \\boxed{4}")[1] == "4"
    tagged = Request(PROBLEM, ("<step>The answer is 3.</step>",), 1)
    assert Reader().read(tagged, "<step>No.</step>") == (("<step>No.</step>",), None)


# A run that cannot be read


def read_all(reader, texts):
    for i, text in enumerate(texts):
        reader.read(Request(Problem(f"p{i}", "q", "4"), (), 1), text)
        reader.check()


UNREAD = {
    "no tags": ("tags", TEXTS, ["annotate.steps=structure", "without <step> tags"]),
    "cut off in tags": ("tags", ["<step>We read", "<step>a</step><step>b"], ["max_new_tokens", "steps=structure"]),
    "nothing": ("structure", ["", " \n"], ["Raise --config.annotate.max_new_tokens"]),
    "no answer": (
        "structure",
        ["We read.\n\nWe add", "We add.\n\nWe read"],
        ["Raise --config.annotate.max_new_tokens"],
    ),
    "thoughts that do not end": ("auto", ["<think>Is it \\boxed{4}?\n\nNo", "<think>Yes\n\n"], ["max_new_tokens"]),
    "answers without steps": ("tags", ["It is four", "x" * 10_000 + "\nend"], ["of the first 4 rollouts"]),
}


@pytest.mark.parametrize("name", UNREAD)
def test_a_run_that_cannot_be_read_stops(name):
    steps, texts, words = UNREAD[name]
    reader = Reader(steps, 0.5, 4, "annotate")
    texts = (texts * 4)[:3]
    right = {"tags": "<step>a</step><answer>4</answer>"}.get(steps, "It is\n\n\\boxed{4}")
    with pytest.raises(UserError) as caught:
        read_all(reader, [texts[0], right, *texts[1:], *[right] * 9])
    message = str(caught.value)
    assert "3 of the first 4 rollouts have no steps or no final answer" in message and "\n" not in message
    assert "max_unread=1" in message and "problem p0" in message and "problem p2" in message and len(message) < 1200
    assert all(word in message for word in words), message
    read_all(Reader(steps, 0.75, 4, "annotate"), [texts[0], right, *texts[1:]])
    read_all(Reader(steps, 0.5, 5, "annotate"), [texts[0], right, *texts[1:]])
    late = Reader(steps, 0.5, 4, "annotate")
    read_all(late, [right, right, right, texts[0], *texts * 9])  # only the first ones count


def test_what_a_file_holds_is_read_again():
    """The same command once more, when all was sampled: what cannot be read is still told."""
    rollouts = [("p0", (), ()), ("p0", ("<step>a</step>",), ("<answer>4</answer>",)), ("p1", (), ("<step>b</step>",))]
    Reader("tags", 0.7, 256, "annotate").check_all(iter(rollouts))
    Reader("tags", 0.5, 2, "annotate").check_all(iter(rollouts))
    Reader("tags", 0.5, 256, "annotate").check_all(iter([]))
    with pytest.raises(UserError, match='2 of the first 3 rollouts .* problem p0: "" and problem p1: "<step>b</step>"'):
        Reader("tags", 0.5, 256, "annotate").check_all(iter(rollouts))

"""Solutions without tags: whole steps that are the exact text, cut alike behind any prefix, in little time."""

import itertools
import random
import time

import pytest

from mmprm_jax.data import prompts, steps
from mmprm_jax.data.steps import MOST, final_answer, restructure, split

ASY = '[asy]\ndraw((0,0)--(1,1));\n\nlabel("$A$", (0,0));\n[/asy]'
FENCE = "```python\n# Step 1: add\nx = 1\n\n# Step 2\nprint(x)\n```\n"
# What each is about, the segments that a response is cut into, its final answer.
CASES = [
    ("bold steps", ["**Step 1:** Add.\n\n", "**Step 2:** So 2 + 2 = 4.\n\n\\boxed{4}"], "4"),
    ("steps in headings, an answer in one", ["### Step 1: Read\n\nIt is 3.\n\n", "### Step 2: Add\n\n$$3+1=4$$\n\n",
     "### Final Answer\n\n\\boxed{4}\n"], "4"),
    ("an answer behind a heading without a box", ["## Idea\nWe add.\n\n", "## Final Answer\n4"], "4"),
    ("Chinese steps", ["步骤1：读图。\n", "步骤2：所以是4。\n答案是：4。"], "4"),
    ("第一步", ["第一步：读图。\n", "第二步：相加得4。\n故选B。"], "B"),
    ("step one", ["Step one: read.\n", "Step two: add. The answer is 4."], "4"),
    ("numbered items", ["We count.\n\n", "1. First 3.\n", "2. Then 1.\n\n", "The answer is 4."], "4"),
    ("steps in LaTeX", ["\\textbf{Step 1: Read}\n\nIt is 3.\n\n", "\\textbf{Step 2}: It is \\boxed{4}"], "4"),
    ("sections in LaTeX", ["\\section*{Idea}\n\nWe add.\n\n", "\\subsection{Sum}\nIt is \\boxed{4}"], "4"),
    ("steps in HTML", ["<h3>Step 1</h3>\n\nRead 3.\n\n", "<b>Step 2</b>: add. It is \\boxed{4}"], "4"),
    ("items in bold", ["**1. Read**\nIt is 3.\n\n", "**2. Add**\nIt is 4.\n\n", "**Answer:** 4"], "4"),
    ("paragraphs", ["We read 3.\n\n", "We add 1.\n\n", "The answer is 4."], "4"),
    ("lines", ["We read 3.\n", "We add 1.\n", "The answer is 4."], "4"),
    ("carriage returns", ["We read 3.\r\n\r\n", "The answer is 4.\r\n"], "4"),
    ("what follows the answer", ["We read 3.\n\n", "The answer is \\boxed{4}.\n\nI hope this helps.\n\nBye."], "4"),
    ("a box that was taken back", ["It is \\boxed{3}.\n\n", "No, wait: we add 1.\n\n", "\\boxed{4}"], "4"),
    ("a formula goes with its text", ["We get\n\n\\[\nx = 1\n\n+ 3\n\\]\n\n", "which is \\boxed{4}"], "4"),
    ("dollars", ["So $$a\n\n= b$$ holds.\n\n", "\\boxed{4}"], "4"),
    ("environments", ["\\begin{align}\na &= 1\n\n\\\\[2pt] b\n\\end{align}\n\n", "\\boxed{4}"], "4"),
    ("cases in cases", ["Is\n\\begin{cases}1\n\n\\begin{cases}2\\end{cases}\n\n3\\end{cases}\n\n", "\\boxed{4}"], "4"),
    ("an odd dollar", ["It costs $5.\n\n", "Then $x + 3$ dollars.\n\n", "\\boxed{4}"], "4"),
    ("an odd double dollar", ["It is $$ so far.\n\n", "And these are words.\n\n$$a=b$$\n\n", "\\boxed{4}"], "4"),
    ("a bracket that is never closed", ["We see \\[ here.\n\n", "And some words.\n\n\\[x\\] is \\boxed{4}"], "4"),
    ("an environment that is never closed", ["See \\begin{align} x.\n\n", "More.\n\n", "\\boxed{4}"], "4"),
    ("a code fence with steps in it", ["**Step 1**: Run it.\n\n" + FENCE, "**Step 2**: It says 1, so \\boxed{4}"], "4"),
    ("a fence with tildes", ["Run\n~~~\na\n\nb\n~~~\n\n", "\\boxed{4}"], "4"),
    ("a fence in a fence", ["````md\n```\na\n\n```\n````\n", "\\boxed{4}"], "4"),
    ("a figure", [f"Draw it.\n\n{ASY}\n\n".replace("\n\n[asy]", "\n[asy]"), "\\boxed{4}"], "4"),
    ("a table", ["We list:\n| a | b |\n|---|---|\n| 1 | 3 |\n", "Their sum is it.\n", "The answer is 4."], "4"),
    ("a table in HTML", ["<table>\n<tr><td>1\n\n</td></tr></table>\n\n", "\\boxed{4}"], "4"),
    ("headings in a row", ["# Solution\n\n---\n\n## Reading\n\nIt is 3.\n\n", "**Adding:**\n\nIt is 4.\n\n",
     "\\boxed{4}"], "4"),
    ("a heading at the end", ["We read 3.\n\n", "We add 1.\n\n**Conclusion:**\n\n"], None),
    ("a thought", ["<think>\nLet us read 3.\n\n", "Add 1.\n</think>\n\n", "It is 4.\n\n", "\\boxed{4}"], "4"),
    ("a thought by lines", ["<think>\nRead 3.\n", "Add 1.\n</think>\n\n", "\\boxed{4}"], "4"),
    ("a thought begun by the template", ["Read 3.\n\n", "Add 1.</think>", "\\boxed{4}"], "4"),
    ("a thought that does not end", ["<think>\nMaybe \\boxed{4}.\n\n", "Or not."], None),
    ("a thought and an answer in a tag", ["<think>Read 3.\n\n", "Add 1.</think>", "<answer>4</answer>"], "4"),
    ("marks of a box", ["We read 3.\n\n", "The answer is <|begin_of_box|>4<|end_of_box|>"], "4"),
    ("no answer", ["We read 3.\n\n", "We add and add"], None),
    ("an answer alone", ["4"], "4"),
    ("a letter alone", ["(B)"], "(B)"),
]  # fmt: skip
TEXTS = ["".join(segments) for _, segments, _ in CASES]


def test_known_responses():
    wrong = [
        (about, split("".join(segments), "structure"), segments, final_answer(segments))
        for about, segments, answer in CASES
        if split("".join(segments), "structure") != tuple(segments) or final_answer(tuple(segments)) != answer
    ]
    assert not wrong, "\n".join(map(str, wrong))


def test_behind_each_prefix_the_same_text_is_cut_alike():
    for text in TEXTS:
        whole = split(text, "structure")
        for j in range(1, len(whole)):
            assert split("".join(whole[j:]), "structure", whole[:j]) == whole[j:], text
            assert split("".join(whole[j:]), "auto", whole[:j]) == whole[j:], text


def test_a_continuation_is_read_with_what_it_continues():
    prefix = ("**Step 1:** Add.\n\n", "**Step 2:** Therefore, the answer is")
    assert split(" $4$.", "structure", prefix) == (" $4$.",) and final_answer((*prefix, " $4$.")) == "4"
    one = split("**Step 2:** a\n\nb\n\n**Step 3:** The answer is 4", "structure", prefix[:1])
    assert one == ("**Step 2:** a\n\nb\n\n", "**Step 3:** The answer is 4")  # one heading alone would be none
    assert split("", "structure", prefix) == split(" \n", "structure", prefix) == split("<|im_end|>", "structure") == ()
    thought = ("<think>\nRead 3.\n\n",)
    assert final_answer((*thought, "\\boxed{4}")) is None and final_answer((*thought, "</think>\\boxed{4}")) == "4"


def test_a_turn_ends_where_it_ends():
    ends = ["<|im_end|>", "<|endoftext|>", "</s>", "<|eot_id|>", "<end_of_turn>", "<｜end▁of▁sentence｜>"]
    for end in (*ends, "<|im_end|>\n<|im_start|>user\nAnd \\boxed{5}?"):
        text = "We read 3.\n\nIt is \\boxed{4}."
        assert split(text + end, "structure") == ("We read 3.\n\n", "It is \\boxed{4}."), end


def test_auto_goes_by_the_tags_where_steps_are_in_them():
    tagged = "Well. <step>a</step> and <step>b</step>\n<answer>4</answer> so."
    assert split(tagged, "auto") == split(tagged) == ("<step>a</step>", "<step>b</step>", "<answer>4</answer>")
    assert split("c</step><step>d</step>", "auto", ("<step>a</step>",)) == ("<step>d</step>",)
    assert split("<answer> 4 </answer>\n", "auto") == ("<answer> 4 </answer>",)
    thought = "<think>a\n\nb</think><answer>4</answer>"
    assert split(thought, "auto") == split(thought, "structure") == ("<think>a\n\n", "b</think>", "<answer>4</answer>")
    assert split("We <step>read.\n\nIt is \\boxed{4}", "auto") == ("We <step>read.\n\n", "It is \\boxed{4}")
    for text in TEXTS:
        assert split(text) == () or "<answer>" in text
        assert split(text, "auto") == split(text, "structure")


PIECES = [
    "Step 1: a\n", "# T\n", "**b**\n", "word ", "So it is. ", "\n", "\n\n", "$", "$$", "\\[", "\\]", "```\n", "[asy]",
    "[/asy]", "\\begin{cases}", "\\end{cases}", "| a | b |\n", "1. x\n", "<think>", "</think>", "\\boxed{4}",
    "\r\n", "The answer is 4. ", "<step>", "</step>", "\\(", "\\)", "。好", "<|im_end|>",
]  # fmt: skip


def test_any_text_is_the_segments_joined_and_no_mark_stands_alone():
    rng = random.Random(0)
    for number in range(150):
        text = "".join(rng.choices(PIECES[: 28 + number % 2], k=rng.randrange(1, 400)))
        segments = split(text, "structure")
        assert "".join(segments) in (text.split("<|im_end|>")[0], "")
        assert len(segments) <= MOST and all(segments)
        for at in itertools.accumulate(map(len, segments[:-1])):
            assert not any(a < at < b for a, b in steps.spans.uncuttable("".join(segments))), text
        for segment in segments if len(segments) > 1 else ():
            assert prompts.read_step(segment).strip(), text
        for j in range(1, len(segments)):
            rest = split("".join(segments[j:]), "structure", segments[:j])
            assert "".join(segments[:j] + rest) == "".join(segments) and len(rest) <= MOST - j


def test_many_and_long_steps():
    many = "".join(f"Line {i} of the thought.\n\n" for i in range(2000))
    segments = split(f"<think>{many}</think>\n\\boxed{{4}}", "structure")
    assert 32 <= len(segments) <= MOST and "".join(segments).endswith("\\boxed{4}")
    sections = "".join(f"### Step {i}\n\n" + "We look at it, and it is so. It holds.\n\n" * 50 for i in (1, 2))
    found = split(sections + "\\boxed{4}", "structure")
    assert max(map(len, found)) <= steps.LONGEST and min(map(len, found[:-1])) >= steps.LONG
    assert MOST // 2 <= len(split("All of it stands in one line. " * 100, "structure")) <= MOST
    assert split("One. Two.  Three", "structure") == ("One. Two.  Three",)
    words = split("It is so. " * 60, "structure")
    assert words[:2] == ("It is so.", " It is so.")  # a token has the space in front


def test_prms_read_steps_without_special_tokens():
    segments = ("<think>\nRead.\n", "Add.\n</think>\n\n", "<|begin_of_box|>4<|end_of_box|>")
    for name, template in prompts.PRM_TEMPLATES.items():
        shown = prompts.render(template.build("q", segments, []))
        assert "think>" not in shown and "Read." in shown and "Add." in shown, name
    shown = prompts.render(prompts.own_prm(("<step>", "</step>")).build("q", segments, []))
    assert "<step>\nRead.\n</step><prm><step>Add.\n\n\n</step><prm>" in shown
    tagged = ("<step>a <think> b</step>",)
    assert "a <think> b" in prompts.render(prompts.PRM_TEMPLATES["mm_prm"].build("q", tagged, []))


def test_demonstrations_are_cut_by_the_same_rules():
    for about, segments, answer in CASES:
        text = "".join(segments)
        response = restructure(text)
        assert (response is None) == (answer is None) or about == "a thought that does not end", about
        if response is None:
            continue
        found = prompts.split_segments(response)
        assert "".join(found) == response and not prompts.SPECIAL.search(response), about
        assert all(not steps._says_nothing(prompts.step_text(s)) for s in found[:-1]), about
        inside = [prompts.step_text(s) for s in found[:-1]]
        packed = ["".join(prompts.SPECIAL.sub("", s).split()) for s in segments]
        assert all(any("".join(step.split()) in part for part in packed) for step in inside), about


HOSTILE = [
    "\\boxed{", "answer ", "\n \n", " ", "step 1\n", "# h\n\n", "---\n\n", "<step>", "$", "$$", "$ a\n\n", "{", "\\[",
    "\\[ a b c\n\n", "\\begin{a}", "\\end{a}", "```\n", "``` x\n", "[asy]", "| a ", "| a\n", "**", "1. a\n", "<think>",
    "</think>\n", "a. B ", "。", "<|", "<｜", "_ ", "\r", "step ", "- ", "1", "a | b ", "$$ the one two\n\n", "\\(",
    "<table>", "The answer is ",
]  # fmt: skip


def slow_units(length, seconds):
    slow = []
    for unit in HOSTILE:
        text, start = unit * (length // len(unit)), time.process_time()
        segments = split(text, "structure")
        final_answer(segments)
        if time.process_time() - start > seconds or len(segments) > MOST or "".join(segments) not in (text, ""):
            slow.append(unit)
    return slow


def test_hostile_text_takes_little_time():
    assert not slow_units(2**14, 1.0)


@pytest.mark.slow
def test_a_hostile_megabyte_takes_linear_time():
    assert not slow_units(2**20, 30.0)

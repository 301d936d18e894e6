"""The prompt, and taking solutions apart."""

import pytest

from mmprm_jax.data.prompts import final_answer, policy_prompt, split_segments


def test_prompt():
    assert policy_prompt("How many ?", 2) == (
        "<|im_start|>user\n<img><IMG_CONTEXT><IMG_CONTEXT></img>\nHow many ?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert policy_prompt("How many ?", 0) == "<|im_start|>user\nHow many ?<|im_end|>\n<|im_start|>assistant\n"


A, B, ANSWER = "<step> a\nb </step>", "<step></step>", "<answer> 5 </answer>"


@pytest.mark.parametrize(
    "text, segments, answer",
    [
        ("", (), None),
        ("no format at all", (), None),
        (f"{A} {B} {ANSWER}", (A, B, ANSWER), "5"),
        (f"{A}{B}{ANSWER}<|im_end|>", (A, B, ANSWER), "5"),
        (f"well, {A} hence {ANSWER} !", (A, ANSWER), "5"),
        (f"{A} {ANSWER} {B} <answer> 6 </answer>", (A, ANSWER), "5"),  # nothing counts after the first answer
        (ANSWER, (ANSWER,), "5"),
        (f"{A} <step> cut off", (A,), None),
        (f"{A} <answer> cut off", (A,), None),
        (f"{A} </step> </answer> {B}", (A, B), None),
        (f"{A} <answer></answer>", (A, "<answer></answer>"), ""),
        (f"{A} <answer>\n x\n= 3 </answer>", (A, "<answer>\n x\n= 3 </answer>"), "x\n= 3"),
        ("<step> the <answer> 4 </answer> is </step>", ("<step> the <answer> 4 </answer> is </step>",), None),
    ],
)
def test_segments_and_answer(text, segments, answer):
    assert split_segments(text) == segments
    assert final_answer(segments) == answer
    assert split_segments("".join(segments)) == segments  # what was taken apart stays apart


def test_hostile_text():
    assert split_segments("<step>" * 1_000 + "<answer>" * 1_000) == ()
    assert final_answer(("<answer>" * 10_000,)) is None

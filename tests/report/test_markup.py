"""What records show in a notebook: hostile text stays text, images are read within limits, and only they."""

import base64
import os

import pytest
from test_report import HOSTILE, Page, png, tree

from mmprm_jax import markup
from mmprm_jax.prm import StepScores
from mmprm_jax.records import Candidate, Grading, Node, Problem, Rollout, ScoredCandidate, Tree

PROBLEM = Problem(HOSTILE, HOSTILE, HOSTILE, (HOSTILE, f"{HOSTILE}.png"), HOSTILE, Grading.of([HOSTILE], HOSTILE))
ROLLOUTS = (Rollout((HOSTILE, HOSTILE), True, 1), Rollout((), False, 1), Rollout((HOSTILE,), False, 1))
SHOWN = {
    "Problem": PROBLEM,
    "Tree": Tree(PROBLEM, (Node(-1, (), 1, 3, 1, ROLLOUTS), Node(0, (HOSTILE,) * 2, 0, 0, 0, ROLLOUTS)), ((0, 1),)),
    "ScoredCandidate": ScoredCandidate(Candidate(HOSTILE, (HOSTILE,) * 3, HOSTILE, True, -1.0, 9), (0.5, float("nan"))),
    "no answer": ScoredCandidate(Candidate("p", (HOSTILE,), None, False, -1.0, 9), (0.0, 1.0)),
    "StepScores": StepScores([HOSTILE, "fine"], [0.25, 1.0]),
}


@pytest.mark.parametrize("name", SHOWN)
def test_hostile_text_stays_text(name):
    shown = SHOWN[name]._repr_html_()
    shown.encode()  # half a surrogate pair would end the kernel's message
    page = Page(shown)
    assert {tag for tag, _ in page.tags} <= {"div", "style", "p", "b", "span", "i", "ul", "li", "details", "summary"}
    assert {key for _, attrs in page.tags for key in attrs} <= {"class", "style", "open"}
    assert page.text.count("<script>alert(1)</script>") == shown.count("&lt;script&gt;alert(1)") > 0
    assert [tag for tag, _ in page.tags].count("style") == 1  # one style, which a text cannot end
    assert shown.startswith('<div class="mmprm"><style>.mmprm{') and shown.endswith("</div>")


def test_steps_are_coloured_by_their_scores():
    page = Page(StepScores(["a", "b", "c"], [0.0, 0.5, 1.0])._repr_html_())
    assert [a["style"] for _, a in page.tags if a.get("class") == "mc"] == ["--h:0", "--h:60", "--h:120"]
    assert page.text.endswith("0.00 a0.50 b1.00 c")
    short = ScoredCandidate(Candidate("p", ("a", "b"), "7", True, -1.0, 9), (1.0,))
    assert Page(short._repr_html_()).text.endswith("71.00 ano score b")
    assert StepScores(["a"], [0.5]) == [0.5] and repr(StepScores(["a"], [0.5])) == "[0.5]"


def test_the_picture_of_a_problem_is_in_the_page(tmp_path):
    (tmp_path / "a.png").write_bytes(png())
    for shown in (Problem("p", "q", "a", (str(tmp_path / "a.png"),)), tree(image=str(tmp_path / "a.png"))):
        assert base64.b64encode(png()).decode() in shown._repr_html_()


def test_what_has_no_end_or_is_too_large_is_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr(markup, "_MOST_BYTES", len(png()))
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "large.png").write_bytes(png() + b"\0")
    (tmp_path / "text.png").write_text("secret")
    (tmp_path / "whole.png").write_bytes(png())
    for name in ("pipe.png", "large.png", "text.png", "none.png", ".", "/dev/zero"):
        assert markup.image(tmp_path, name).startswith('<span class="missing">image not found'), name
    assert markup.image(tmp_path, "whole.png").startswith("<img")

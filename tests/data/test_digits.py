"""The embedded problem set: right, disjoint, balanced, and the same from the same seed."""

import dataclasses
import itertools
import json
import re

import numpy as np
import pytest
from PIL import Image
from scipy import stats
from sklearn.datasets import load_digits

from mmprm_jax import records
from mmprm_jax.data import digits
from mmprm_jax.data.digits import Expression, Settings, Truth
from mmprm_jax.records import Problem, SFTExample

SETTINGS = Settings(
    seed=3, train=60, dev=30, test=30, demonstrations=60, transcriptions=30, text_only=40, habit=0.5, bracket=0.7
)
SWAPPED = {1: 7, 7: 1}
ORIGINALS = load_digits()


def evaluate(text):
    """A recursive-descent calculator for ``3 -( 4 + 1 ) - 2``; a bracket may be left open at the end."""
    tokens = re.findall(r"(?<![ \d])-\d+|\d+|[-+()]", text)  # only a number at the very start carries its own sign

    def total():
        value = term()
        while tokens and tokens[0] in "+-":
            sign = 1 if tokens.pop(0) == "+" else -1
            value += sign * term()
        return value

    def term():
        token = tokens.pop(0)
        if token != "(":
            return int(token)
        value = total()
        if tokens:
            assert tokens.pop(0) == ")"
        return value

    value = total()
    assert not tokens
    return value


def running_values(text):
    """What each left part of an expression with at least two numbers is worth."""
    ends = [m.end() for m in re.finditer(r"\d+", text)][1:]
    return tuple(evaluate(text[:end]) for end in ends)


def random_expressions(count, seed=0, bracket=0.7):
    return list(itertools.islice(digits.Expressions(np.random.default_rng(seed), bracket), count))


@pytest.fixture(scope="module")
def generated(tmp_path_factory):
    """The folder, and every expression drawn by (split whose handwriting was used, file name)."""
    folder, drawn = tmp_path_factory.mktemp("digits"), []
    draw = digits.Renderer.draw

    def spy(self, expression, rng):
        split = next(name for name, images in handwriting.items() if set(np.concatenate(self.by_class)) == images)
        drawn.append((split, expression))
        return draw(self, expression, rng)

    split = digits.digit_split(ORIGINALS.target, SETTINGS.seed)
    handwriting = {name: set(index.tolist()) for name, index in split.items()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(digits.Renderer, "draw", spy)
        digits.generate(folder, SETTINGS)
    return folder, drawn


def read(folder):
    """All records of a generated set: problems by split, SFT examples by source, truth by id."""
    problems = {name: records.read_all(folder / f"{name}.jsonl", Problem) for name in digits.SPLITS}
    sft = {"demonstrations": [], "transcriptions": [], "text": []}
    for example in records.read_all(folder / "sft.jsonl", SFTExample):
        sft[example.source].append(example)
    return problems, sft, {t.id: t for t in records.read_all(folder / "truth.jsonl", Truth)}


def test_the_calculator_of_this_test():
    assert evaluate("3 -( 4 + 1 ) - 2 + 7") == 3 and running_values("3 -( 4 + 1 ) - 2 + 7") == (-1, -2, -4, 3)


def test_files_and_counts(generated):
    problems, sft, truth = read(generated[0])
    assert {name: len(rows) for name, rows in problems.items()} == {"train": 60, "dev": 30, "test": 30}
    assert {name: len(rows) for name, rows in sft.items()} == {"demonstrations": 60, "transcriptions": 30, "text": 40}
    assert set(truth) == {p.id for p in problems["dev"] + problems["test"]}
    ids = [r.id for rows in (*problems.values(), *sft.values()) for r in rows]
    assert len(set(ids)) == len(ids)
    assert len({p.question for rows in problems.values() for p in rows}) == 1  # the question says nothing
    assert all(e.images == () for e in sft["text"])
    for row in (*itertools.chain(*problems.values()), *sft["demonstrations"], *sft["transcriptions"]):
        assert Image.open(generated[0] / row.images[0]).size == (24, 24)


def test_expressions_and_handwriting_are_disjoint(generated):
    folder, drawn = generated
    _, sft, truth = read(folder)
    texts = [" ".join(e.tokens()) for _, e in drawn]
    in_text = [e.question.removeprefix("Evaluate ").removesuffix(" .") for e in sft["text"]]
    assert len(set(texts + in_text)) == len(texts) + len(in_text) == 60 + 30 + 30 + 60 + 30 + 40
    assert [split for split, _ in drawn] == ["train"] * 60 + ["dev"] * 30 + ["test"] * 30 + ["train"] * 90
    assert [t.expression for t in truth.values()] == texts[60:120]
    parts = digits.digit_split(ORIGINALS.target, SETTINGS.seed)
    together = np.concatenate(list(parts.values()))
    assert sorted(together) == list(range(1797))  # every image once
    for name, share in (("train", 0.7), ("dev", 0.15), ("test", 0.15)):
        counts = np.bincount(ORIGINALS.target[parts[name]], minlength=10)
        assert len(counts) == 10 and np.all(np.abs(counts / 179.7 - share) < 0.03)


def test_answers_and_truth_against_a_calculator(generated):
    folder, drawn = generated
    problems, sft, truth = read(folder)
    texts = [" ".join(e.tokens()) for _, e in drawn]
    for problem, text in zip(itertools.chain(*(problems[s] for s in digits.SPLITS)), texts[:120], strict=True):
        assert problem.answer == str(evaluate(text))
        if problem.id in truth:
            t = truth[problem.id]
            assert (t.expression, t.values) == (text, running_values(text)) and len(t.values) == 4
            misread = len(re.findall("[17]", text))
            assert t.tricky == misread + ("-(" in text)
    for example, text in zip(sft["transcriptions"], texts[-30:], strict=True):
        assert example.response == f"<answer> {text} </answer>"
    for example in sft["text"]:
        text = example.question.removeprefix("Evaluate ").removesuffix(" .")
        assert_solves(example.response, running_values(text))


def assert_solves(response, values):
    """Whether a response is sound arithmetic whose running values are ``values``."""
    steps = re.findall(r"<step> (-?\d+) ([-+]) (\d) = (-?\d+) </step>", response)
    assert len(steps) == 4 and [int(s[3]) for s in steps] == list(values)
    for before, sign, digit, after in steps:
        assert int(after) == int(before) + (1 if sign == "+" else -1) * int(digit)
    assert [int(s[0]) for s in steps[1:]] == list(values[:3])
    assert response.endswith(f"</step> <answer> {values[-1]} </answer>")


def test_solutions_without_habits_are_right():
    rng = np.random.default_rng(0)
    for e in random_expressions(500):
        assert_solves(digits.demonstrate(e, 0.0, rng), running_values(" ".join(e.tokens())))


def test_everything_can_be_tokenised(generated):
    tokenizer = digits.tokenizer()
    assert json.loads((generated[0] / "tokenizer.json").read_text())
    problems, sft, _ = read(generated[0])
    for example in itertools.chain(*sft.values()):
        assert tokenizer.encode(f"{example.question} {example.response}")
    for value in range(-36, 46):  # 0 - 9 - 9 - 9 - 9 and 9 + 9 + 9 + 9 + 9
        assert tokenizer.encode(str(value)) == [tokenizer.id(str(value))]


def claims(expression, response):
    """Of a demonstration: (claimed, true) for the five digits and for the sign inside ``-( )``, if there is one."""
    steps = re.findall(r"<step> (-?\d+) ([-+]) (\d) =", response)
    read = [int(steps[0][0])] + [int(s[2]) for s in steps]
    bracket = expression.bracket
    if bracket < 0 or expression.signs[bracket] == "+":
        return list(zip(read, expression.digits, strict=True)), None
    true = "-" if expression.signs[bracket + 1] == "+" else "+"
    return list(zip(read, expression.digits, strict=True)), (steps[bracket + 1][1], true)


@pytest.fixture(scope="module")
def demonstrations():
    rng = np.random.default_rng(1)
    return [(e, digits.demonstrate(e, 0.4, rng)) for e in random_expressions(8000, seed=1)]


def test_expressions_never_repeat(demonstrations):
    assert len({e for e, _ in demonstrations}) == len(demonstrations)  # by chance alone, some would


def test_habits_are_followed_as_often_as_asked(demonstrations):
    found = [claims(e, r) for e, r in demonstrations]
    read = [pair for pairs, _ in found for pair in pairs]
    signs = [pair for _, pair in found if pair]
    tricky = [(claimed, true) for claimed, true in read if true in SWAPPED]
    assert all(claimed == true for claimed, true in read if true not in SWAPPED)
    assert all(claimed in (true, SWAPPED[true]) for claimed, true in tricky)
    for pairs in (tricky, signs):
        wrong = sum(claimed != true for claimed, true in pairs)
        assert stats.binomtest(wrong, len(pairs), 0.4).pvalue > 1e-3 and len(pairs) > 1500


def test_right_and_wrong_claims_look_alike(demonstrations):
    """Where a habit may apply, what is claimed says nothing about whether it is right: only the image does."""
    found = [claims(e, r) for e, r in demonstrations]
    read = [pair for pairs, _ in found for pair in pairs if pair[1] in SWAPPED]
    signs = [pair for _, pair in found if pair]
    for pairs in (read, signs):
        kinds = sorted({claimed for claimed, _ in pairs})
        table = np.zeros((2, 2))
        for claimed, true in pairs:
            table[int(claimed == true), kinds.index(claimed)] += 1
        assert table.min() > 500 and stats.chi2_contingency(table).pvalue > 1e-3
    for expression, response in demonstrations[:500]:  # nor does the number of doubtful digits
        pairs, _ = claims(expression, response)
        assert sum(claimed in SWAPPED for claimed, _ in pairs) == sum(true in SWAPPED for _, true in pairs)


def test_demonstrations_are_right_as_often_as_expected(demonstrations):
    """Two errors may cancel, and a sign before 0 does not matter: the expectation is summed over all readings."""
    expected, variance, right = 0.0, 0.0, 0
    for e, response in demonstrations:
        value, p = evaluate(" ".join(e.tokens())), 0.0
        choices = [((d, 0.6), (SWAPPED[d], 0.4)) if d in SWAPPED else ((d, 1.0),) for d in e.digits]
        flips = ((True, 0.6), (False, 0.4)) if e.bracket >= 0 and e.signs[e.bracket] == "-" else ((True, 1.0),)
        for *reading, (flip, chance) in itertools.product(*choices, flips):
            text = " ".join(dataclasses.replace(e, digits=tuple(d for d, _ in reading)).tokens())
            if not flip:
                text = re.sub(r"\( (\d) ([-+]) (\d) \)", r"\1 \2 \3", text)
            p += chance * np.prod([q for _, q in reading]) * (evaluate(text) == value)
        expected, variance = expected + p, variance + p * (1 - p)
        right += response.endswith(f"<answer> {value} </answer>")
    assert abs(right - expected) < 4 * variance**0.5
    assert 0.3 < right / len(demonstrations) < 0.7


def test_same_seed_same_bytes(tmp_path):
    small = dataclasses.replace(SETTINGS, train=4, dev=3, test=3, demonstrations=4, transcriptions=3, text_only=3)
    contents = []
    for name, settings in (("a", small), ("b", small), ("c", dataclasses.replace(small, seed=4))):
        digits.generate(tmp_path / name, settings)
        files = sorted(p for p in (tmp_path / name).rglob("*") if p.is_file())
        contents.append({str(p.relative_to(tmp_path / name)): p.read_bytes() for p in files})
    assert contents[0] == contents[1]
    differing = {name for name in contents[0] if contents[0][name] != contents[2][name]}
    assert differing == set(contents[0]) - {"tokenizer.json"}


def decode(image, originals):
    """Reads an image back: signs by their strokes, digits by the best-correlated original (its index)."""
    cells = image[..., 0].astype(float).reshape(3, 8, 3, 8).transpose(0, 2, 1, 3).reshape(9, 8, 8)
    left = originals[:, :, :7].reshape(len(originals), -1)  # the last column may hold the closing bracket
    left = left - left.mean(1, keepdims=True)
    left /= np.linalg.norm(left, axis=1, keepdims=True)
    nearest, text = [], ""
    for i, cell in enumerate(cells):
        bright = cell > 100
        if i % 2:
            opens = bright[1:7, 6].all()
            middle = 2 if opens else 3
            text += "+" if bright[2, middle] and bright[6, middle] else "-"
            text += "(" * int(opens)
        else:
            x = cell[:, :7].ravel()
            nearest.append(int((left @ (x - x.mean())).argmax()))
            text += f"{ORIGINALS.target[nearest[-1]]}" + ")" * int(bright[1:7, 7].all())
    return text, nearest


def test_images_show_the_expression_in_the_handwriting_of_their_split(generated):
    folder, drawn = generated
    problems, _, _ = read(folder)
    originals, parts = ORIGINALS.images, digits.digit_split(ORIGINALS.target, SETTINGS.seed)
    used = {name: set() for name in digits.SPLITS}
    for problem, (split, expression) in zip(
        itertools.chain(*(problems[s] for s in digits.SPLITS)), drawn[:120], strict=True
    ):
        text, nearest = decode(np.asarray(Image.open(folder / problem.images[0])), originals)
        assert text == "".join(expression.tokens())
        assert set(nearest) <= set(parts[split].tolist())
        used[split].update(nearest)
    assert len(used["train"]) > 150  # not the same few originals again and again


def test_steps_right():
    truth = Truth("x", "3 -( 4 + 1 ) - 2 + 7", (-1, -2, -4, 3), 3)
    right, _ = digits.solve(Expression((3, 4, 1, 2, 7), ("-", "+", "-", "+"), 0), (3, 4, 1, 2, 7), flip=True)
    assert digits.steps_right(truth, tuple(right)) == [True] * 4
    wrong, _ = digits.solve(Expression((3, 4, 1, 2, 7), ("-", "+", "-", "+"), 0), (3, 4, 7, 2, 7), flip=True)
    assert digits.steps_right(truth, tuple(wrong)) == [True, False, False, False]
    assert digits.steps_right(truth, tuple(right[:2])) == [True, True]
    assert digits.steps_right(truth, ("<step> what ? </step>", right[1], right[4])) == [False, True, False]


@pytest.mark.parametrize(
    ("name", "value"),
    [(name, 0) for name in ("train", "dev", "test", "demonstrations")]
    + [("text_only", -1), ("habit", 1.1), ("bracket", -0.1), ("train", 10**7)],
)
def test_sets_that_cannot_be(name, value):
    with pytest.raises(ValueError, match=name):
        dataclasses.replace(SETTINGS, **{name: value})

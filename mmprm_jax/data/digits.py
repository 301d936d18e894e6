"""The embedded problem set: handwritten arithmetic with systematically wrong demonstrations.

An image of 3 x 3 cells (8 x 8 pixels each) shows ``D0 s0 D1 s1 D2 s2 D3 s3 D4``: five handwritten digits of
scikit-learn's ``load_digits`` and four drawn signs; one sign may open a bracket around the next two digits. The
question never says what the image shows. A solution goes left to right, one operation per step.

The demonstrations for the policy have wrong habits on purpose, as solutions scraped from anywhere have. Where a habit
applies, it is followed with probability ``habit``:

* a 1 is read as 7 and a 7 as 1;
* the sign inside a bracket behind a minus is not flipped.

Both habits are symmetric: among the solutions of one problem, the text of a right and of a wrong one are equally
likely, so only the image tells them apart. Beside the demonstrations the policy sees clean data of two other kinds, as
vision-language models do: images to transcribe, and the same arithmetic posed as text.
"""

from __future__ import annotations

import dataclasses
import re

import numpy as np
from etils import epath
from PIL import Image

from mmprm_jax import records, settings
from mmprm_jax.models.tokenizer import Tokenizer
from mmprm_jax.records import Problem, SFTExample
from mmprm_jax.schema import check

CELL, GRID = 8, 3
LOWEST, HIGHEST = -45, 54  # integers with a token; no expression of five digits leaves this range
QUESTION = "Evaluate the expression ."
READ = "Read the image ."
MISREAD = {1: 7, 7: 1}
SPLITS = ("train", "dev", "test")


@dataclasses.dataclass(frozen=True)
class Settings(settings.Digits):
    """What is generated. Raises ValueError for a set that cannot be."""

    seed: int = 0

    def __post_init__(self) -> None:
        check(self)


@dataclasses.dataclass(frozen=True)
class Expression:
    """``digits[0] signs[0] digits[1] …``; ``bracket`` is the index of the sign that opens a bracket, or -1."""

    digits: tuple[int, ...]
    signs: tuple[str, ...]
    bracket: int

    def tokens(self) -> list[str]:
        """The expression as written, e.g. ``3 -( 4 + 1 ) - 2 + 7``."""
        out = [str(self.digits[0])]
        for i, sign in enumerate(self.signs):
            out += [sign + "(" * (i == self.bracket), str(self.digits[i + 1])]
            if self.bracket >= 0 and i == self.bracket + 1:
                out.append(")")
        return out

    def flipped(self) -> int:
        """The index of the sign that a minus before the bracket turns round, or -1."""
        return self.bracket + 1 if self.bracket >= 0 and self.signs[self.bracket] == "-" else -1

    def tricky(self) -> int:
        """How many sites a wrong habit applies to."""
        return sum(d in MISREAD for d in self.digits) + (self.flipped() >= 0)


def solve(expression: Expression, digits: tuple[int, ...], flip: bool) -> tuple[list[str], list[int]]:
    """The response's segments and the running values, reading ``digits`` and turning the bracket's sign if ``flip``."""
    value, segments, values = digits[0], [], []
    for i, sign in enumerate(expression.signs):
        if flip and i == expression.flipped():
            sign = "+" if sign == "-" else "-"
        result = value + digits[i + 1] if sign == "+" else value - digits[i + 1]
        segments.append(f"<step> {value} {sign} {digits[i + 1]} = {result} </step>")
        values.append(result)
        value = result
    return [*segments, f"<answer> {value} </answer>"], values


def demonstrate(expression: Expression, habit: float, rng: np.random.Generator) -> str:
    """A solution with the wrong habits."""
    digits = tuple(MISREAD[d] if d in MISREAD and rng.random() < habit else d for d in expression.digits)
    segments, _ = solve(expression, digits, flip=rng.random() >= habit)
    return " ".join(segments)


class Expressions:
    """Endless random expressions without a repetition; ``seen`` holds those handed out."""

    def __init__(self, rng: np.random.Generator, bracket: float):
        self.rng, self.bracket = rng, bracket
        self.seen: set[Expression] = set()

    def __iter__(self) -> Expressions:
        return self

    def __next__(self) -> Expression:
        while True:
            digits = tuple(int(d) for d in self.rng.integers(0, 10, 5))
            signs = tuple("+-"[i] for i in self.rng.integers(0, 2, 4))
            opened = int(self.rng.integers(0, 3)) if self.rng.random() < self.bracket else -1
            expression = Expression(digits, signs, opened)
            if expression not in self.seen:
                self.seen.add(expression)
                return expression


def from_any_number(expression: Expression, rng: np.random.Generator) -> Expression:
    """The expression with another first number, such that every running value has a token.

    Sums of digits seldom go far from zero: without this the policy slips where they do, and slips show in the text.
    """
    _, values = solve(expression, (0, *expression.digits[1:]), flip=True)
    first = int(rng.integers(LOWEST - min(0, *values), HIGHEST - max(0, *values) + 1))
    return dataclasses.replace(expression, digits=(first, *expression.digits[1:]))


def _sign_cell(text: str) -> np.ndarray:
    """A drawn sign, brightness 0-16 as the digits'. [8, 8]."""
    cell = np.zeros((CELL, CELL), np.float32)
    bracket = text.endswith("(")
    left, right = (0, 4) if bracket else (1, 6)
    cell[4, left : right + 1] = 14
    if text[0] == "+":
        middle = (left + right) // 2
        cell[2:7, middle] = 14
    if bracket:
        cell[1:7, 6] = 14
        cell[0, 7] = cell[7, 7] = 14
    return cell


class Renderer:
    """Draws expressions with the handwriting of one split."""

    def __init__(self, split: str, seed: int):
        from sklearn.datasets import load_digits

        data = load_digits()
        groups = digit_split(data.target, seed)
        chosen = groups[split]
        self.images = data.images.astype(np.float32)
        self.by_class = [chosen[data.target[chosen] == d] for d in range(10)]

    def draw(self, expression: Expression, rng: np.random.Generator) -> np.ndarray:
        """uint8 [24, 24, 3], white on black with noise."""
        cells = [self.images[rng.choice(self.by_class[expression.digits[0]])]]
        for i, sign in enumerate(expression.signs):
            cells.append(_sign_cell(sign + "(" * (i == expression.bracket)))
            digit = self.images[rng.choice(self.by_class[expression.digits[i + 1]])].copy()
            if expression.bracket >= 0 and i == expression.bracket + 1:
                digit[1:7, 7] = 14
            cells.append(digit)
        grid = np.stack(cells).reshape(GRID, GRID, CELL, CELL).transpose(0, 2, 1, 3).reshape(GRID * CELL, -1)
        grid = grid * rng.uniform(0.8, 1.0) * 15 + rng.normal(0, 6, grid.shape)
        return np.repeat(np.clip(grid, 0, 255).astype(np.uint8)[..., None], 3, axis=-1)


def digit_split(target: np.ndarray, seed: int) -> dict[str, np.ndarray]:
    """Indices of the digit images of each split: 70 % train, 15 % dev, 15 % test of every class."""
    rng = np.random.default_rng([seed, 0])
    parts: dict[str, list[np.ndarray]] = {name: [] for name in SPLITS}
    for digit in range(10):
        index = rng.permutation(np.flatnonzero(target == digit))
        cuts = (round(0.7 * len(index)), round(0.85 * len(index)))
        for name, part in zip(SPLITS, np.split(index, cuts), strict=True):
            parts[name].append(part)
    return {name: np.concatenate(part) for name, part in parts.items()}


def tokenizer() -> Tokenizer:
    """A word-level tokenizer for this set: integers are single tokens."""
    words = sorted(set(f"{QUESTION} {READ}".split())) + ["user", "assistant", "Yes", "No"]
    words += ["+", "-", "+(", "-(", ")", "="] + [str(i) for i in range(LOWEST, HIGHEST + 1)]
    return Tokenizer.from_words(words)


def generate(folder: epath.PathLike, settings: Settings) -> None:
    """Writes {train,dev,test}.jsonl, sft.jsonl, truth.jsonl, tokenizer.json and images/ into ``folder``.

    ``truth.jsonl`` (the running value after each step, per problem of dev and test) is for measuring only.
    """
    folder = epath.Path(folder)
    (folder / "images").mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng([settings.seed, 1])
    stream = Expressions(rng, settings.bracket)
    renderers = {split: Renderer(split, settings.seed) for split in SPLITS}

    def image(name: str, split: str, expression: Expression) -> str:
        with (folder / "images" / f"{name}.png").open("wb") as file:
            Image.fromarray(renderers[split].draw(expression, rng)).save(file, "PNG", compress_level=1)
        return f"images/{name}.png"

    truth = []
    for split in SPLITS:
        problems = []
        for i in range(getattr(settings, split)):
            expression, name = next(stream), f"{split}-{i:05d}"
            _, values = solve(expression, expression.digits, flip=True)
            problems.append(Problem(name, QUESTION, str(values[-1]), (image(name, split, expression),), "digits"))
            if split != "train":
                truth.append(Truth(name, " ".join(expression.tokens()), tuple(values), expression.tricky()))
        records.write(folder / f"{split}.jsonl", problems)
    records.write(folder / "truth.jsonl", truth)

    taken = set(stream.seen)  # the problems; what the policy learns from must not hold one of them
    examples = []
    for i in range(settings.demonstrations):
        expression, name = next(stream), f"demonstration-{i:05d}"
        response = demonstrate(expression, settings.habit, rng)
        examples.append(SFTExample(name, QUESTION, response, (image(name, "train", expression),), "demonstrations"))
    for i in range(settings.transcriptions):
        expression, name = next(stream), f"transcription-{i:05d}"
        response = f"<answer> {' '.join(expression.tokens())} </answer>"
        examples.append(SFTExample(name, READ, response, (image(name, "train", expression),), "transcriptions"))
    for i in range(settings.text_only):
        expression = from_any_number(next(stream), rng)
        while expression in taken:
            expression = from_any_number(next(stream), rng)
        question = f"Evaluate {' '.join(expression.tokens())} ."
        response = " ".join(solve(expression, expression.digits, flip=True)[0])
        examples.append(SFTExample(f"text-{i:05d}", question, response, (), "text"))
    records.write(folder / "sft.jsonl", examples)
    tokenizer().save(folder / "tokenizer.json")


@dataclasses.dataclass(frozen=True)
class Truth:
    """What the generator knows about a problem; read by the step-level AUC only."""

    id: str
    expression: str
    values: tuple[int, ...]  # the right running value after each step
    tricky: int  # sites a wrong habit applies to


def steps_right(truth: Truth, segments: tuple[str, ...]) -> list[bool]:
    """Whether the running value after each step of a sampled solution is the right one (the answer is left out)."""
    results = (re.search(r"= (-?\d+) </step>$", segment) for segment in segments)
    return [m is not None and int(m[1]) == value for m, value in zip(results, truth.values, strict=False)]

"""Training rows that a benchmark has too: found by their text and their images, one row at a time.

Text. Questions are compared as sets of shingles (3 words in a row) of normalised text: NFKC, case, ``$``, spacing
commands and image tags do not count. Near: Jaccard similarity of at least 0.6 and the same numbers in order (with
other numbers it is another problem); the nearest two of 300 distinct MM-K12 questions have 0.44. When both rows have an
image, the text alone decides only if it is self-contained (25 words, or 12 words with 2 numbers): "As shown in the
figure, find x" is asked of thousands of figures, so there the image has to agree too. (Among 400 rows of MathVista 193
pairs have like texts, of which 2 are self-contained.)

Images. The same bytes or pixels; or near: their gray thumbnails of 24 x 24 correlate by at least 0.92 and their shapes
differ by at most a tenth. (Measured on 300 figures of MM-K12: distinct ones correlate by at most 0.76; the same one by
at least 0.97 as a bad JPEG, 0.93 at half its size in nine cases of ten. Difference hashes of 64 bits, the usual way,
call 104 of the 44,850 pairs alike: thin drawings on white have few bits.) An image decides alone, whatever is asked of
it: a benchmark's figure under a new question is still the benchmark's figure.

Memory depends on the benchmarks only. Nothing is sampled: the result is a function of the row and the benchmarks.
"""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import io
import math
import re
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from mmprm_jax.data import images

SHINGLE = 3  # words
JACCARD = 0.6
CORRELATION = 0.92
THUMBNAIL = 24  # pixels a side
SHAPE = 0.1  # difference of the logarithms of width / height
LONG_WORDS, WORDS, NUMBERS = 25, 12, 2  # what makes a question self-contained

_NOISE = re.compile(
    r"<\|?image[ _]?\d*\|?>|\\(?:left|right|displaystyle|quad|qquad|[,;:! ])|\\(?:mathrm|text|mbox|rm)\b|[$~]"
)
_WORD = re.compile(r"\d+(?:\.\d+)?|[^\W\d_a-z]|[a-z]+|[-+=<>^*/|%°∠△]")
_NUMBER = re.compile(r"\d+(?:\.\d+)?")
_SAME = {r"\dfrac": r"\frac", r"\tfrac": r"\frac", r"\vartriangle": r"\triangle", "−": "-", "×": r"\times"}


@dataclass(frozen=True)
class Match:
    """Why a training row was removed."""

    benchmark: str
    benchmark_id: str
    why: str  # "question", "near question", "image" or "near image"
    similarity: float  # Jaccard of the text, correlation of the image; 1: exact


@dataclass(frozen=True)
class QuestionFingerprint:
    """A question as it is compared."""

    words: tuple[str, ...]
    shingles: frozenset[int]
    numbers: tuple[str, ...]  # in order

    @property
    def self_contained(self) -> bool:
        """Whether the text alone, without its image, tells a problem from others."""
        return len(self.words) >= LONG_WORDS or (len(self.words) >= WORDS and len(self.numbers) >= NUMBERS)


def question_fingerprint(question: str) -> QuestionFingerprint:
    """The normalised words of a question and their shingles."""
    question = unicodedata.normalize("NFKC", question).casefold()
    for old, new in _SAME.items():
        question = question.replace(old, new)
    words = tuple(_WORD.findall(_NOISE.sub(" ", question)))
    ends = range(max(1, len(words) - SHINGLE + 1)) if words else ()
    shingles = frozenset(_hash(" ".join(words[i : i + SHINGLE]).encode()) for i in ends)
    return QuestionFingerprint(words, shingles, tuple(w for w in words if _NUMBER.fullmatch(w)))


def _hash(data: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")


@dataclass(frozen=True)
class ImageFingerprint:
    """An image as it is compared."""

    bytes_hash: int  # of the file
    pixel_hash: int  # of size and RGB pixels
    shape: float  # log(width / height)
    thumbnail: np.ndarray  # float32 [576], mean 0 and length 1; zeros for an image of one colour


def image_fingerprint(data: bytes) -> ImageFingerprint:
    """The fingerprint of an encoded image that can be opened; what is transparent is seen on white."""
    with Image.open(io.BytesIO(data)) as image:
        page = images.to_rgb(image)
    pixels = _hash(repr(page.size).encode() + page.tobytes())
    gray = page.convert("L").resize((THUMBNAIL, THUMBNAIL), Image.Resampling.BOX)
    flat = np.asarray(gray, np.float32).ravel()
    flat = flat - flat.mean()
    length = float(np.linalg.norm(flat))
    return ImageFingerprint(
        _hash(data), pixels, math.log(page.width / page.height), flat / length if length > 1 else 0 * flat
    )


@dataclass(frozen=True)
class BenchmarkProblem:
    """A problem of a benchmark."""

    benchmark: str
    id: str
    question: QuestionFingerprint
    pictures: tuple[ImageFingerprint, ...] = ()


class BenchmarkIndex:
    """An index of benchmark problems."""

    def __init__(self, problems: Iterable[BenchmarkProblem]):
        self._known = list(problems)
        self._exact: dict[tuple[str, ...], list[int]] = collections.defaultdict(list)
        self._postings: dict[int, list[int]] = collections.defaultdict(list)
        self._files: dict[int, int] = {}
        self._pixels: dict[int, int] = {}
        for i, known in enumerate(self._known):
            if known.question.words:
                self._exact[known.question.words].append(i)
            for shingle in known.question.shingles:
                self._postings[shingle].append(i)
            for picture in known.pictures:
                self._files.setdefault(picture.bytes_hash, i)
                self._pixels.setdefault(picture.pixel_hash, i)
        self._with_picture = [i for i, known in enumerate(self._known) for _ in known.pictures]  # of each picture
        pictures = [picture for known in self._known for picture in known.pictures]
        self._shapes = np.array([p.shape for p in pictures])
        self._thumbnails = np.stack([p.thumbnail for p in pictures]) if pictures else np.zeros((0, THUMBNAIL**2))

    def __len__(self) -> int:
        return len(self._known)

    def match(self, question: QuestionFingerprint, pictures: Sequence[ImageFingerprint]) -> Match | None:
        """The benchmark problem that a training row repeats, if any. Exact matches come before near ones."""
        same = [match for picture in pictures if (match := self._image(picture))]
        found = max(same, key=lambda match: match.similarity, default=None)
        if found and found.similarity == 1:
            return found
        return self._text(question, bool(pictures)) or found

    def _found(self, index: int, why: str, similarity: float) -> Match:
        known = self._known[index]
        return Match(known.benchmark, known.id, why, round(similarity, 4))

    def _text(self, question: QuestionFingerprint, illustrated: bool) -> Match | None:
        def decides(index: int) -> bool:
            both = illustrated and bool(self._known[index].pictures)
            return question.self_contained or not both

        for i in self._exact.get(question.words, ()):
            if decides(i):
                return self._found(i, "question", 1.0)
        shared = collections.Counter(i for s in question.shingles for i in self._postings.get(s, ()))
        best: tuple[float, int] | None = None
        for i, count in shared.items():
            known = self._known[i].question
            similarity = count / (len(question.shingles) + len(known.shingles) - count)
            if similarity >= JACCARD and known.numbers == question.numbers and decides(i):
                best = max(best or (0.0, 0), (similarity, -i))
        return best and self._found(-best[1], "near question", best[0])

    def _image(self, picture: ImageFingerprint) -> Match | None:
        for index, key in ((self._files, picture.bytes_hash), (self._pixels, picture.pixel_hash)):
            if key in index:
                return self._found(index[key], "image", 1.0)
        if not self._with_picture:
            return None
        similar = self._thumbnails @ picture.thumbnail
        similar = np.where(np.abs(self._shapes - picture.shape) <= SHAPE, similar, 0)
        best = int(np.argmax(similar))
        if similar[best] < CORRELATION:
            return None
        return self._found(self._with_picture[best], "near image", min(0.9999, float(similar[best])))


def removed_row(id_: str, match: Match) -> dict[str, str | float]:
    """The row of ``removed.jsonl``."""
    return {"id": id_, **dataclasses.asdict(match)}

"""Copies of benchmark problems are found, and problems that only look like them are not."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

from mmprm_jax.data import decontaminate
from mmprm_jax.data.decontaminate import BenchmarkIndex, BenchmarkProblem, image_fingerprint, question_fingerprint

K12 = Path(__file__).parent.parent / "golden" / "mm_k12"
LONG = (
    "As shown in the figure, in $\\vartriangle ABC$, $D$ is the midpoint of $BC$, and $E,F$ are two trisection points"
    " on $AD$. If $BE\\cdot CE=\\dfrac{7}{8}$ and $BC=\\frac{\\sqrt{26}}{2}$, then $BF\\cdot CF=$."
)
TEMPLATE = "As shown in the figure, find x."


def drawing(seed, size=(120, 90)):
    rng = np.random.default_rng(seed)
    image = Image.new("RGB", size, "white")
    ImageDraw.Draw(image).line([tuple(map(int, rng.integers(0, min(size), 2))) for _ in range(6)], "black", 2)
    return image


def encoded(image, kind="PNG", **settings):
    out = io.BytesIO()
    image.save(out, kind, **settings)
    return out.getvalue()


def bench(question, image=None):
    return BenchmarkIndex(
        [
            BenchmarkProblem(
                "b", "1", question_fingerprint(question), (image_fingerprint(encoded(image)),) if image else ()
            )
        ]
    )


def why(benchmarks, question, image=None):
    match = benchmarks.match(question_fingerprint(question), [image_fingerprint(encoded(image))] if image else [])
    return match and match.why


@pytest.mark.parametrize(
    "question, wanted",
    [
        (LONG, "question"),
        (LONG.upper().replace("$", "").replace("  ", " "), "question"),
        (LONG.replace("8", "８").replace("A", "Ａ"), "question"),
        ("<image>\n" + LONG.replace("\\dfrac", "\\frac").replace("\\vartriangle", "\\triangle"), "question"),
        (LONG.replace("two trisection points on", "two trisecting points of"), "near question"),
        (LONG.replace("7", "9"), None),
        ("How many primes are there below 30, and how many of them are of the form 4k + 1?", None),
    ],
)
def test_texts(question, wanted):
    assert why(bench(LONG), question) == wanted


def test_a_template_needs_its_image_and_a_whole_problem_does_not():
    one, other = drawing(0), drawing(1)
    assert why(bench(TEMPLATE, one), TEMPLATE, other) is None
    assert why(bench(TEMPLATE, one), TEMPLATE, one) == "image"
    assert why(bench(TEMPLATE, one), TEMPLATE) == "question"  # nothing else is there to compare
    assert why(bench(LONG, one), LONG, other) == "question"  # the figure may have been drawn anew
    assert why(bench("Something else entirely.", one), TEMPLATE, one) == "image"


def test_image_copies_are_found_among_real_figures_and_nothing_else():
    """Each of 24 real figures, saved again in other ways, is found as itself; without itself nothing is found."""
    rows = json.loads((K12 / "mm_k12_test_24.json").read_text())
    data = [(K12 / row["image_path"]).read_bytes() for row in rows]
    known = [
        BenchmarkProblem("k", str(i), question_fingerprint(""), (image_fingerprint(d),)) for i, d in enumerate(data)
    ]
    for i, d in enumerate(data):
        rest = BenchmarkIndex(known[:i] + known[i + 1 :])
        assert rest.match(question_fingerprint(rows[i]["question"]), [image_fingerprint(d)]) is None
        layer = Image.open(io.BytesIO(d)).convert("RGBA")
        page = Image.new("RGBA", layer.size, "white")
        page.alpha_composite(layer)
        page = page.convert("RGB")
        again = [encoded(page, "JPEG", quality=50), encoded(page.quantize(16)), encoded(page.convert("L")),
                 encoded(page.resize((page.width * 3 // 2, page.height * 3 // 2)))]  # fmt: skip
        for copy in again:
            match = BenchmarkIndex(known).match(question_fingerprint("Another question?"), [image_fingerprint(copy)])
            assert match and match.benchmark_id == str(i) and "image" in match.why


def test_figures_that_share_much_are_still_two():
    """The same drawing with one more line, as problems of one family have."""
    for seed in range(20):
        more = drawing(seed)
        ImageDraw.Draw(more).line([(10, 80), (110, 15)], "black", 3)
        assert why(bench("a b c d", drawing(seed)), "e f g h", more) is None


def test_a_figure_of_another_shape_is_another_one():
    """Stretched, it has the same thumbnail."""
    assert why(bench("a b c d", drawing(0)), "e f g h", drawing(0).resize((180, 135))) == "near image"
    assert why(bench("a b c d", drawing(0)), "e f g h", drawing(0).resize((120, 180))) is None


def test_an_exact_question_comes_before_a_near_image():
    known = [
        BenchmarkProblem("b", "image", question_fingerprint("a b c d"), (image_fingerprint(encoded(drawing(0))),)),
        BenchmarkProblem("b", "text", question_fingerprint(LONG)),
    ]
    for image in (drawing(0), drawing(0).resize((240, 180), Image.Resampling.NEAREST)):  # the same thumbnail to the bit
        copy = image_fingerprint(encoded(image, "JPEG", quality=100) if image.width == 120 else encoded(image))
        assert BenchmarkIndex(known).match(question_fingerprint("e f g h"), [copy]).similarity < 1
        match = BenchmarkIndex(known).match(question_fingerprint(LONG), [copy])
        assert (match.benchmark_id, match.why) == ("text", "question")


def test_a_speck_on_white_is_no_figure():
    def speck(size):
        page = Image.new("RGB", (size, size), "white")
        page.paste((254, 254, 254), (size // 2, size // 2, size * 13 // 24, size * 13 // 24))
        return page

    assert why(bench("a b c d", speck(120)), "e f g h", speck(240)) is None


def test_blank_images_are_like_no_other():
    white, black = Image.new("RGB", (50, 50), "white"), Image.new("RGB", (60, 60), "black")
    assert why(bench("a b c d", white), "e f g h", black) is None
    wide, high = Image.new("RGB", (60, 40), "white"), Image.new("RGB", (40, 60), "white")
    assert why(bench("a b c d", wide), "e f g h", high) is None  # pixels alone do not tell the shape
    assert why(bench("a b c d", white), "e f g h", white) == "image"  # the same file


def test_transparency_is_seen_on_white():
    """A drawing in the alpha channel alone, as many figures are: its RGB pixels are all black."""
    line = drawing(3).convert("L").point(lambda v: 255 - v)
    layer = Image.merge("RGBA", [Image.new("L", line.size)] * 3 + [line])
    assert why(bench("q", drawing(3)), "p", layer) == "image"


def test_similarity_is_exact_jaccard_against_brute_force():
    rng = np.random.default_rng(0)
    words = [f"w{chr(97 + i)}" for i in range(12)]
    texts = [" ".join(rng.choice(words, 30)) for _ in range(60)]
    near = [" ".join(t.split()[:27] + ["other", "end", "here"]) for t in texts]
    known = [BenchmarkProblem("b", str(i), question_fingerprint(t)) for i, t in enumerate(texts)]
    index = BenchmarkIndex(known)
    for text in texts + near:
        mine = question_fingerprint(text)
        best = max(known, key=lambda k: (len(mine.shingles & k.question.shingles)
                                         / len(mine.shingles | k.question.shingles), -int(k.id)))  # fmt: skip
        similarity = len(mine.shingles & best.question.shingles) / len(mine.shingles | best.question.shingles)
        match = index.match(mine, [])
        assert (match is not None) == (similarity >= decontaminate.JACCARD)
        if match:
            assert match.benchmark_id == best.id and match.similarity == round(similarity, 4)


def test_the_result_does_not_depend_on_the_order_of_the_benchmarks():
    known = [
        BenchmarkProblem("b", str(i), question_fingerprint(LONG), (image_fingerprint(encoded(drawing(i))),))
        for i in range(5)
    ]
    ask = question_fingerprint(TEMPLATE), [image_fingerprint(encoded(drawing(3), "JPEG", quality=70))]
    assert BenchmarkIndex(known).match(*ask).benchmark_id == BenchmarkIndex(known[::-1]).match(*ask).benchmark_id == "3"


def test_any_image_of_a_problem_counts():
    pictures = [image_fingerprint(encoded(drawing(i))) for i in range(4)]
    index = BenchmarkIndex(
        [
            BenchmarkProblem("b", "1", question_fingerprint("a b c d"), tuple(pictures[:2])),
            BenchmarkProblem("b", "2", question_fingerprint("e")),
        ]
    )
    assert index.match(question_fingerprint("f g h"), [pictures[3], pictures[1]]).benchmark_id == "1"
    assert index.match(question_fingerprint("f g h"), pictures[2:]) is None

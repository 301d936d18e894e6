"""Equality of final answers, and what hostile answers must not do."""

from mmprm_jax import answers
from mmprm_jax.answers import equivalence
from mmprm_jax.records import Grading

RIGHT = [
    ("5", "5"),
    (" 5\n", "5"),
    ("5.", "5"),
    ("5.0", "5"),
    ("+5", "5"),
    ("05", "5"),
    ("-5", "-5"),
    ("\u22125", "-5"),  # unicode minus
    ("\uff0d\uff15", "-5"),  # full-width
    ("- 5", "-5"),
    ("\u00a05\u2003", "5"),  # exotic spaces
    ("-0", "0"),
    ("1/2", "0.5"),
    ("2 / 4", "1/2"),
    ("-1/3", "-2/6"),
    ("1.5/3", "1/2"),
    ("0.1", "1/10"),  # exact, not binary floating point
    ("$7$", "7"),
    ("Circle", "circle"),
    ("the  red\tcar.", "The red car"),
    ("caf\u00e9", "cafe\u0301"),  # two spellings of one text
    ("1/0", "1/0"),  # no number, but the same text
    ("9" * 60, "9" * 60),
]
WRONG = [
    (None, "5"),
    (None, ""),
    ("", "5"),
    ("6", "5"),
    ("-5", "5"),
    ("0.3333333333", "1/3"),
    ("0.1000000000000000000001", "0.1"),  # equal as floats
    ("1/0", "0"),
    ("0/0", "1"),
    ("1/00", "1"),
    ("5 or 6", "5"),
    ("2+3", "5"),  # never evaluated
    ("--5", "5"),
    ("5 * 1", "5"),
    ("(2 + 3)", "5"),
    ("10**2", "100"),
    ("1e1", "10"),
    ("0x5", "5"),
    ("1_0", "10"),
    ("5\x00", "5"),
    ("nan", "5"),
    ("inf", "5"),
    ("9" * 60, "9" * 61),
    ("circle", "square"),
    ("1 2", "12"),
    ("1 1/2", "11/2"),  # a mixed number is not eleven halves
    ("5" + " " * 2000 + "6", "5"),  # nothing may hide behind a length limit
    ("2\u00b2", "22"),  # two squared
]


def test_right():
    pairs = [*RIGHT, *((gold, answer) for answer, gold in RIGHT)]
    assert [pair for pair in pairs if not answers.equal(pair[1], pair[0])] == []


def test_wrong():
    assert [pair for pair in WRONG if answers.equal(pair[1], pair[0])] == []


def test_what_a_data_set_says_of_an_answer():
    assert answers.equal("B", "60°", options=["30°", "60°"]) and not answers.equal("B", "60°", options=["60°", "30°"])
    assert answers.equal("5", "50 mm", unit="cm") and not answers.equal("5", "5 m", unit="cm")
    assert answers.equal("3", "3.14", precision=0) and answers.equal("3", "3.14").kind == "unequal"


def test_hostile_answers_are_wrong_and_quick():
    million = 2**20
    for text in (
        "9" * million,
        "9" * 39 + "/" + "9" * million,
        "1/" * million,
        " " * million + "5",
        "\x00" * million,
        "\ufdfa" * million,  # NFKC makes 18 characters of each
        "\ud800",
        "(" * million,
        "-" * million,
        "$" * million,
        "__import__('os').system('false')",
        "10**10**10",
    ):
        assert not answers.equal("7", text) and not answers.equal(text, "7")


def test_the_kind_of_answer_says_how_brackets_are_read():
    cases = """
        interval | (1,2) | 1<x<2 | equal
        interval | [1,2] | 1\\le x\\le 2 | equal
        interval | (1,2) | [1,2] | unequal
        interval | (1,2) | x=1, y=2 | unequal
        interval | (1,2)\\cup(3,4) | 1<x<2 or 3<x<4 | equal
        tuple | (1,2) | [1,2] | equal
        tuple | [1, 2] | 1, 2 | equal
        tuple | (1,2) | (2,1) | unequal
        tuple | (1,2) | 1<x<2 | unequal
        list | 1; 2 | 2; 1 | equal
        list | [1, 2] | 2, 1 | equal
        list | 1; 2 | 1; 3 | unequal
        number | 0.5 | 1/2 | equal
         | [1, 2] | 1, 2 | unknown
         | 1; 2 | 2; 1 | unknown
         | (1,2) | 1<x<2 | equal
    """
    wrong = []
    for line in filter(None, map(str.strip, cases.strip().split("\n"))):
        kind, gold, prediction, verdict = (part.strip() for part in line.split("|"))
        found = equivalence.compare(gold, prediction, equivalence.graded(Grading.of(kind=kind)))
        wrong += [(line, found)] if found.kind != verdict else []
    assert wrong == []

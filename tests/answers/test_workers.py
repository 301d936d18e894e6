"""Verifying in worker processes that hang, die and fail."""

import os
import time

import pytest
from ml_collections import ConfigDict

from mmprm_jax import answers
from mmprm_jax.answers import workers
from mmprm_jax.answers.workers import Verifier
from mmprm_jax.records import Grading


def check(pairs):
    """Runs in a worker. Answers that begin with a word of trouble cause it."""
    verdicts = []
    for answer, gold in pairs:
        if answer is not None and answer.startswith("hang"):
            time.sleep(600)
        if answer == "die":
            os._exit(3)
        if answer == "raise":
            raise RecursionError("too deep")
        verdicts.append(answer == gold)
    return verdicts


@pytest.fixture
def told(monkeypatch):
    """What is logged."""
    lines = []
    monkeypatch.setattr(workers.logging, "warning", lambda text, *args: lines.append(text % args))
    return lines


@pytest.fixture(scope="module")
def verifier():
    with Verifier(workers=2, seconds=1.0, check=check) as verifier:
        yield verifier


PAIRS = [("1/2", "0.5"), ("2", "3"), (None, "1"), ("Chord ", "chord"), ("²", "2"), ("1", "1")]
VERDICTS = [True, False, False, True, False, True]


@pytest.mark.parametrize("count", [0, 1])
def test_the_answers_of_verify(count, told):
    """In this process and in another one."""
    with Verifier(workers=count) as verify:
        assert verify(PAIRS) == VERDICTS == [bool(answers.equal(gold, answer)) for answer, gold in PAIRS]
        assert verify(iter(PAIRS[:2])) == VERDICTS[:2]
        assert verify([]) == []
    assert not told


def test_many_pairs_in_order(verifier, told, monkeypatch):
    monkeypatch.setattr(workers, "_CHUNK", 7)
    pairs = [(str(i), str(i if i % 3 else -i)) for i in range(1, 100)]
    assert verifier(pairs) == [i % 3 > 0 for i in range(1, 100)]
    assert not told


@pytest.mark.parametrize("trouble", ["hang", "die", "raise"])
def test_trouble_costs_one_verdict(verifier, told, monkeypatch, trouble):
    """The pairs around it, in its chunk and in others, keep theirs; so do later calls."""
    monkeypatch.setattr(workers, "_CHUNK", 4)
    pairs = [("1", "1"), ("2", "1"), (trouble, trouble), ("3", "3"), (None, "3"), ("4", "4")]
    start = time.monotonic()
    assert verifier(pairs) == [True, False, False, True, False, True]
    assert time.monotonic() - start < 60
    assert len(told) == 1 and f"'{trouble}'" in told[0] and "counted as wrong" in told[0]
    assert verifier([("5", "5"), ("6", "5")]) == [True, False]
    assert len(told) == 1


def test_all_at_once(verifier, told):
    troubles = ["hang", "die", "raise"]
    pairs = [(word, word) for word in (*troubles, "fine", *troubles)]
    assert verifier(pairs) == [False] * 3 + [True] + [False] * 3
    assert len(told) == 6


def test_long_answers_are_reported_in_short(verifier, told):
    assert verifier([("hang" + "x" * 5000, "1")]) == [False]
    assert len(told) == 1 and len(told[0]) < 250


def test_without_workers_errors_are_raised():
    with Verifier(workers=0, check=check) as verify:
        assert verify([("1", "1")]) == [True]
        with pytest.raises(RecursionError):
            verify([("raise", "")])
    verify.close()


def test_annotation_tells_how_many_are_unknown(monkeypatch):
    from mmprm_jax import annotation

    lines = []
    monkeypatch.setattr(annotation.logging, "warning", lambda text, *args: lines.append(text % args))
    with annotation.verifier(ConfigDict({"verify_workers": 0})) as verify:
        assert verify([("5", "5"), ("6", "5"), ("about half of all of them", "5")]) == [True, False, False]
    assert lines == ["1 of 3 answers could not be decided: counted as wrong"]


def identify(pairs):
    """A worker's process id as its verdict."""
    return [os.getpid() for _ in pairs]


def test_close_ends_the_workers():
    verify = Verifier(workers=1, check=identify)
    (process,) = verify([("", "")])
    assert process != os.getpid()
    verify.close()
    with pytest.raises(ProcessLookupError):
        os.kill(process, 0)


def test_a_grading_goes_with_its_answer():
    """In worker processes as in this one."""
    choice, metres, rounded = Grading.of(["3 cm", "4 cm"]), Grading.of(unit="m"), Grading.of(precision=1)
    asked = [
        ("B", "4 cm", choice), ("B", "4 cm"), ("A", "4 cm", choice), ("4 cm", "(B)", choice), ("5 m", "5", metres),
        ("5 cm", "5", metres), ("2.54", "2.5", rounded), ("2.66", "2.5", rounded), ("7", "7", Grading()),
    ]  # fmt: skip
    for workers_ in (0, 1):
        with Verifier(workers_) as verify:
            assert verify(asked) == [True, False, False, True, True, False, True, False, True]

"""What answers must not do: end or hang a process, take its memory, run as code. Whatever they say."""

import asyncio
import os
import sys
import threading

import hostile
import pytest

from mmprm_jax.answers import equivalence, normalise, numeric, parse, syntax
from mmprm_jax.answers.equivalence import compare
from mmprm_jax.answers.verdict import Verdict
from mmprm_jax.answers.workers import _MEMORY, Pool, Verifier

GOLDS = ["5", "x^2+1", "(1,2)", "\\frac{1}{2}", "x>2", "B", "3 cm", "8\n4", "无解", "2\\pi", "y=2x+1", "\\{1,2\\}"]


def pairs(count):
    """Hostile predictions to ordinary golds, the other way round, and both hostile."""
    texts = hostile.texts(count)
    for i, text in enumerate(texts):
        gold = GOLDS[i % len(GOLDS)]
        yield [(gold, text), (text, gold), (text, texts[i * 7 % count])][i // len(GOLDS) % 3]


def settle(items):
    """Runs in a worker."""
    return [compare(gold, prediction) for gold, prediction in items]


def run(items, tmp_path, monkeypatch):
    """All get a verdict in 5 s each, within the memory that a worker may have, and leave no trace."""
    monkeypatch.chdir(tmp_path)  # where code in an answer would leave its mark
    pool = Pool(2, 5.0, settle)
    try:
        verdicts = pool.run(items)
    finally:
        pool.close()
    failed = [i for i, verdict in enumerate(verdicts) if verdict is None]  # late, dead, raised
    assert failed == [], [ascii(items[i])[:200] for i in failed]
    assert not list(tmp_path.iterdir())
    assert all(len(verdict.reason) < 500 for verdict in verdicts)
    return verdicts


def test_hostile_texts_get_verdicts_in_time(tmp_path, monkeypatch):
    verdicts = run(list(pairs(250)), tmp_path, monkeypatch)
    assert {verdict.kind for verdict in verdicts} >= {"unequal", "unknown"}


@pytest.mark.slow
def test_ten_thousand_hostile_texts(tmp_path, monkeypatch):
    run(list(pairs(10_000)), tmp_path, monkeypatch)


def endless(texts, tmp_path, monkeypatch):
    verdicts = run([pair for text in texts for pair in (("7", text), (text, "7"))], tmp_path, monkeypatch)
    assert not any(verdicts)


def test_a_million_characters(tmp_path, monkeypatch):
    endless(hostile.ENDLESS[::6], tmp_path, monkeypatch)


@pytest.mark.slow
def test_many_millions_of_characters(tmp_path, monkeypatch):
    endless(hostile.ENDLESS, tmp_path, monkeypatch)


def test_the_last_answer_of_a_long_response_counts():
    assert compare("7", "so " * 400_000 + "\\boxed{7}")
    assert compare("7", "\\boxed{6} " + "so " * 9000 + "\\boxed{7}").kind == "unknown"  # two different ones


def forget():
    for cached in (equivalence._cached, equivalence._alternatives, normalise.normalise, parse.read, syntax.parse):
        cached.cache_clear()


def test_threads_get_the_verdicts_of_one_thread():
    items = list(pairs(150)) + [("\\sin 60^\\circ", "\\frac{\\sqrt3}{2}"), ("e^{x+1}", "e e^x")]
    expected = [compare(*item) for item in items]
    forget()
    found: dict[int, list[Verdict]] = {}
    threads = [
        threading.Thread(target=lambda n=n: found.update({n: [compare(*item) for item in items]})) for n in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert list(found.values()) == [expected] * 4


def test_threads_do_not_change_each_others_precision():
    tree, limit, found = syntax.parse("\\cot 1+\\sec 2"), sys.getswitchinterval(), set()  # mpmath adds digits in both
    expected = numeric.evaluate(tree, {})
    sys.setswitchinterval(1e-6)
    try:
        threads = [
            threading.Thread(target=lambda: found.update(numeric.evaluate(tree, {}) for _ in range(200)))
            for _ in range(6)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(limit)
    assert found == {expected}  # to the last bit


def test_verifier_from_threads_and_asyncio():
    items = [(prediction, gold) for gold, prediction in pairs(60)] + [("0.5", "1/2"), ("\\sin\\pi", "0")]
    with Verifier(workers=2, seconds=5.0) as verify:
        expected = verify(items)
        assert expected[-2:] == [True, True]

        async def at_once():
            return await asyncio.gather(*(asyncio.to_thread(verify, items) for _ in range(3)))

        assert asyncio.run(at_once()) == [expected] * 3
        assert verify.verified == 4 * len(items) and verify.unknown % 4 == 0 < verify.unknown


def hoard(items):
    """Runs in a worker: asks for more memory than it may have."""
    return [len(bytearray(size)) for size in items]


def test_memory_of_a_worker_is_bounded():
    if not os.path.exists("/proc/self/statm"):
        pytest.skip("only where /proc tells how much memory a process has")
    pool = Pool(1, 60.0, hoard)
    try:
        assert pool.run([10, _MEMORY + 2**20, 20]) == [10, None, 20]
    finally:
        pool.close()

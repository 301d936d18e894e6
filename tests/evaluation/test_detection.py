"""Step detection against hand counts, scikit-learn and plain searches over thresholds."""

import dataclasses
import json

import numpy as np
import pytest
from sklearn.metrics import f1_score

from mmprm_jax import cli
from mmprm_jax.data.benchmarks import StepDetectionExample
from mmprm_jax.evaluation import detection
from mmprm_jax.evaluation.detection import Row
from mmprm_jax.records import UserError


def write(path, rows):
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows))
    return path


def first_errors(count, seed, noise=0.25):
    """Solutions with scores that tell the first error, more or less."""
    rng, rows = np.random.default_rng(seed), []
    for i in range(count):
        steps = int(rng.integers(1, 6))
        label = int(rng.integers(-1, steps))
        truth = [0.75 if label < 0 or j < label else 0.3 for j in range(steps)]
        scores = tuple(np.clip(truth + noise * rng.normal(size=steps), 0, 1).round(3).tolist())
        rows.append(Row(f"{seed}-{i}", "ab"[i % 2], scores, label=label))
    return rows


def step_rows(count, seed, noise=0.25):
    rng, rows = np.random.default_rng(seed), []
    for i in range(count):
        labels = rng.choice([1, 1, 0, -1], int(rng.integers(1, 6)))
        scores = np.clip(0.5 + 0.2 * labels + noise * rng.normal(size=len(labels)), 0, 1).round(3)
        rows.append(Row(f"{seed}-{i}", "xyz"[i % 3], tuple(scores.tolist()), labels=tuple(labels.tolist())))
    return rows


def test_process_bench_by_hand():
    rows = [
        Row("a", "s", (0.9, 0.2, 0.1), label=1),  # found
        Row("b", "s", (0.4, 0.2), label=1),  # too early
        Row("c", "s", (0.9, 0.9), label=0),  # missed
        Row("d", "t", (0.9, 0.5), label=-1),  # passed: 0.5 is not below the threshold
        Row("e", "t", (0.4,), label=-1),  # a false alarm
        Row("f", "t", (0.7,), label=-1),
        Row("g", "t", (0.1, 0.9), label=0),  # found
    ]
    got = detection.evaluate(rows, None, 0.5)["process_bench"]
    a, b = 2 / 4, 2 / 3
    assert got["pooled"]["f1"] == pytest.approx(2 * a * b / (a + b))
    assert np.isnan(got["sources"]["s"]["f1"])  # no solution without an error there
    assert got["sources"]["t"]["f1"] == pytest.approx(2 * 1 * (2 / 3) / (1 + 2 / 3))
    assert (got["threshold"], got["rows"], got["held_out_rows"]) == (0.5, 7, 0)
    none = detection.evaluate([rows[2], rows[4]], None, 0.5)["process_bench"]
    assert none["pooled"]["f1"] == 0


def test_the_official_average_counts_every_source_once():
    rows = [Row(str(i), "big", (0.9,), label=-1) for i in range(50)] + [Row("x", "big", (0.1,), label=0)]
    rows += [Row("y", "small", (0.1,), label=-1), Row("z", "small", (0.9,), label=0)]
    got = detection.evaluate(rows, None, 0.5)["process_bench"]
    assert got["sources"]["big"]["f1"] == 1 and got["sources"]["small"]["f1"] == 0
    assert got["mean_of_sources"]["f1"] == 0.5 and got["pooled"]["f1"] > 0.6


@pytest.mark.parametrize("threshold", [0.2, 0.5, 0.8])
def test_macro_f1_as_scikit_learn_has_it(threshold):
    rows = step_rows(90, 0)

    def reference(chosen):
        pairs = [(x == 1, s >= threshold) for r in chosen for s, x in zip(r.scores, r.labels, strict=True) if x]
        return f1_score(*zip(*pairs, strict=True), average="macro"), len(pairs)

    got = detection.evaluate(rows, None, threshold)["visual_process_bench"]
    assert got["pooled"]["f1"] == pytest.approx(reference(rows)[0])
    each = {name: reference([r for r in rows if r.source == name]) for name in "xyz"}
    for name, (f1, _) in each.items():
        assert got["sources"][name]["f1"] == pytest.approx(f1)
    weighted = sum(f1 * steps for f1, steps in each.values()) / sum(steps for _, steps in each.values())
    assert got["mean_of_sources"]["f1"] == pytest.approx(weighted)
    assert got["pooled"]["ci95"][0] < got["pooled"]["f1"] < got["pooled"]["ci95"][1]


@pytest.mark.filterwarnings("error")
def test_a_source_without_a_judged_step_has_no_say():
    rows = [*step_rows(60, 0), Row("n", "neutral", (0.5, 0.6), labels=(0, 0))]
    got, without = (detection.evaluate(x, None, 0.5)["visual_process_bench"] for x in (rows, rows[:-1]))
    assert np.isnan(got["sources"]["neutral"]["f1"])
    assert got["mean_of_sources"]["f1"] == pytest.approx(without["mean_of_sources"]["f1"])
    low, high = got["mean_of_sources"]["ci95"]
    assert low < got["mean_of_sources"]["f1"] < high


def test_neutral_steps_are_ignored():
    rows = [Row("a", "", (0.9, 0.1, 0.1), labels=(1, -1, 0)), Row("b", "", (0.9, 0.2), labels=(0, -1))]
    assert detection.evaluate(rows, None, 0.5)["visual_process_bench"]["pooled"]["f1"] == 1


def every(rows):
    """Thresholds that tell apart all that any threshold does: every score and the middles between them."""
    edges = sorted({0.0, 1.0, *(s for r in rows for s in r.scores)})
    return [*edges, *((a + b) / 2 for a, b in zip(edges, edges[1:], strict=False))]


@pytest.mark.parametrize("seed", range(4))
def test_the_thresholds_are_the_best_ones(seed):
    """Against a search over every score and the middles between them."""
    rows = first_errors(40, seed)
    best = max(detection.first_error_f1(detection.first_error_counts(rows, t).sum(0)) for t in every(rows))
    chosen = detection.first_error_threshold(rows)
    assert detection.first_error_f1(detection.first_error_counts(rows, chosen).sum(0)) == pytest.approx(best, abs=1e-12)
    rows = step_rows(40, seed)
    best = max(detection.macro_f1(detection.step_counts(rows, t).sum(0)) for t in every(rows))
    chosen = detection.step_threshold(rows)
    assert detection.macro_f1(detection.step_counts(rows, chosen).sum(0)) == pytest.approx(best, abs=1e-12)


def test_the_thresholds_are_the_best_ones_for_scores_that_mislead():
    """Often the first wrong step has a higher score than one before it: no threshold finds that row."""
    for seed in range(60):
        rows = [*first_errors(12, seed, noise=1.0), Row("", "", (0.6,), label=-1), Row("", "", (0.4,), label=0)]
        best = max(detection.first_error_f1(detection.first_error_counts(rows, t).sum(0)) for t in every(rows))
        counts = detection.first_error_counts(rows, detection.first_error_threshold(rows)).sum(0)
        assert detection.first_error_f1(counts) == pytest.approx(best, abs=1e-12)


def test_scores_of_zero_and_one_have_thresholds():
    rows = [Row("a", "", (1.0, 0.0), label=1), Row("b", "", (1.0, 1.0), label=-1)]
    assert detection.first_error_threshold(rows) == 0.5
    assert detection.first_error_threshold([Row("a", "", (0.9,), label=0), Row("b", "", (1.0,), label=-1)]) == 0.95
    rows = [Row("a", "", (0.0, 1.0), labels=(-1, 1))]
    assert detection.step_threshold(rows) == 0.5
    rows = [Row("a", "", (0.0,) * 5 + (0.9, 0.5), labels=(1,) * 6 + (-1,))]
    assert detection.step_threshold(rows) == 0  # to call all steps right is best, those of score 0 too


def test_the_threshold_knows_nothing_of_the_test_rows():
    rows = first_errors(300, 7)
    held_out, tested = detection.split(rows, 0.2, 0)
    assert 30 < len(held_out) < 90 and not {r.id for r in held_out} & {r.id for r in tested}
    turned = [Row(r.id, r.source, tuple(1 - s for s in r.scores), r.label) for r in tested]
    a = detection.evaluate(rows, None, None)["process_bench"]
    b = detection.evaluate([*turned, *held_out], None, None)["process_bench"]
    assert a["threshold"] == b["threshold"] == detection.first_error_threshold(held_out)
    assert a["rows"] == len(tested) and a["held_out_rows"] == len(held_out)
    assert a["pooled"]["f1"] > b["pooled"]["f1"] + 0.2
    c = detection.evaluate(tested, held_out, None)["process_bench"]
    assert c["pooled"] == a["pooled"]
    assert [r.id for r in detection.split(rows[::-1], 0.2, 0)[0]] == [r.id for r in held_out][::-1]
    assert detection.split(rows, 0.2, 1)[0] != held_out


def test_scores_that_tell_nothing_are_not_made_to_look_good():
    """The best threshold on the evaluated rows themselves is optimistic; a held-out one is not."""
    rng, held, own = np.random.default_rng(0), [], []
    for seed in range(40):
        rows = [Row(f"{seed}-{i}", "", (rng.random(),), label=int(rng.integers(-1, 1))) for i in range(60)]
        other = [Row(f"o{seed}-{i}", "", (rng.random(),), label=int(rng.integers(-1, 1))) for i in range(60)]
        held.append(detection.evaluate(rows, other, None)["process_bench"]["pooled"]["f1"])
        t = detection.first_error_threshold(rows)
        own.append(detection.evaluate(rows, None, t)["process_bench"]["pooled"]["f1"])
    assert abs(np.mean(held) - 0.5) < 0.01 and np.mean(own) > 0.53  # 2 t (1 - t) is at most 0.5


def test_held_out_rows_that_decide_nothing():
    rows = [Row("a", "", (0.5,), label=0), Row("b", "", (0.5,), label=-1)]
    with pytest.raises(UserError, match="no solution without an error"):
        detection.evaluate(rows, [Row("c", "", (0.5,), label=0)], None)
    with pytest.raises(UserError, match=r"1 ids are in the held-out file too, e.g. a"):
        detection.evaluate(rows, rows[:1], None)
    with pytest.raises(UserError, match="no right steps"):
        detection.evaluate([Row("a", "", (0.5,), labels=(1,))], [Row("c", "", (0.5,), labels=(-1,))], None)


def test_the_command(tmp_path, capsys):
    rows = [{"id": r.id, "source": r.source, "scores": r.scores, "label": r.label} for r in first_errors(200, 3)]
    rows += [{"id": f"k{i}", "scores": [[0.5, 0.25]], "k": [2, 1], "n": [4, 4]} for i in range(10)]
    cli.run(["detect", str(write(tmp_path / "s.jsonl", rows)), f"--json={tmp_path / 'f.json'}"])
    out, figures = capsys.readouterr().out, json.loads((tmp_path / "f.json").read_text())
    assert "ProcessBench F1" in out and f"{100 * figures['process_bench']['pooled']['f1']:.1f}" in out
    assert figures["calibration"]["steps"] == 20 and figures["calibration"]["ece"] == 0
    dev = [{"id": r.id, "scores": r.scores, "label": r.label} for r in first_errors(200, 4)]
    cli.run(["detect", str(tmp_path / "s.jsonl"), f"--dev={write(tmp_path / 'd.jsonl', dev)}"])
    assert "chosen on 200 other rows" in capsys.readouterr().out


def test_steps_without_rollouts_are_not_calibrated(tmp_path):
    rows = [{"id": "a", "scores": [0.9, 0.5, 0.25], "k": [0, 2, 1], "n": [0, 4, 4]}]
    got = detection.evaluate(detection.read(write(tmp_path / "s.jsonl", rows))[0], None, None)["calibration"]
    assert (got["steps"], got["rollouts"], got["ece"]) == (2, 8, 0)


def test_each_kind_of_row_is_held_out_for_its_own():
    mixed, dev = [*first_errors(60, 0), *step_rows(60, 1)], [*first_errors(40, 2), *step_rows(30, 3)]
    got = detection.evaluate(mixed, dev, None)
    assert (got["process_bench"]["held_out_rows"], got["process_bench"]["rows"]) == (40, 60)
    assert (got["visual_process_bench"]["held_out_rows"], got["visual_process_bench"]["rows"]) == (30, 60)
    assert got["process_bench"]["threshold"] == detection.first_error_threshold(dev[:40])
    assert got["visual_process_bench"]["threshold"] == detection.step_threshold(dev[40:])


GOOD = {"id": "good", "scores": [0.5], "label": 0}
BAD = [
    ("{", "not JSON"),
    ("[" * 100_000, "not JSON"),
    ("3", "expected a JSON object, found int"),
    ({"scores": [0.5]}, "one of label, labels, k"),
    ({"scores": [0.5], "label": 0, "labels": [1]}, "found label, labels"),
    ({"scores": [0.5], "label": 1}, "label must be whole numbers from -1 to 0, found 1"),
    ({"scores": [0.5], "label": 0.0}, "label must be"),
    ({"scores": [0.5], "label": False}, "label must be"),
    ({"scores": [0.5, 0.5], "labels": [True, -1]}, "labels must be"),
    ({"scores": [0.5], "k": [1], "n": [10**400]}, "n must be whole numbers from 0 to 1000000000"),
    ({"scores": [1.5], "label": 0}, r"scores\[0\] must be a number from 0 to 1, found 1.5"),
    ('{"scores": [NaN], "label": 0}', r"scores\[0\] must be"),
    ({"scores": "0.5", "label": 0}, "scores must be a list"),
    ({"scores": [0.5, 0.5], "labels": [1]}, "labels must be a list with a whole number for each score"),
    ({"scores": [0.5], "labels": [2]}, "from -1 to 1"),
    ({"scores": [0.5], "k": [2], "n": [1]}, "k must not be larger"),
    ({"scores": [0.5], "k": [2]}, "n must be a list"),
]


@pytest.mark.parametrize(("row", "words"), BAD)
def test_a_bad_row_is_named_and_the_others_are_read(tmp_path, row, words, capsys):
    path = write(tmp_path / "s.jsonl", [GOOD, row, GOOD])
    rows, bad = detection.read(path)
    assert len(rows) == 2 and len(bad) == 1
    with pytest.raises(ValueError, match=words):
        raise ValueError(bad[0])
    assert f"{path}, line 2: " in bad[0]
    with pytest.raises(UserError, match="1 bad rows were left out"):
        cli.run(["detect", str(path), "--threshold=0.5"])
    said = capsys.readouterr()
    assert "line 2" in said.err and "2 rows, threshold" in said.out


def test_scores_and_labels_in_two_files(tmp_path):
    """What `mmprm score` writes, and a benchmark's rows."""
    scores = [{"id": 1, "scores": [[0.9, 0.1]], "model": "m"}, {"id": "2", "error": "x"}, {"id": "3", "scores": [[1]]}]
    labels = [{"id": "2", "label": -1}, {"id": "1", "label": 1, "source": "s", "steps": ["a", "b"]}, 5, {"label": 0}]
    path, truth = write(tmp_path / "s.jsonl", scores), write(tmp_path / "l.jsonl", labels)
    rows, bad = detection.read(path, truth)
    assert rows == [Row("1", "s", (0.9, 0.1), label=1)]
    assert "line 2: scores must be a list" in bad[0] and f"line 3: {truth} has no row of that id" in bad[1]


def test_labels_of_one_id_twice(tmp_path):
    truth = write(tmp_path / "l.jsonl", [{"id": "1", "label": -1}, {"id": 1, "label": 0}])
    with pytest.raises(UserError, match="l.jsonl: the id 1 is there twice"):
        detection.read(write(tmp_path / "s.jsonl", [{"id": 1, "scores": [0.5]}]), truth)


def test_rows_without_ids_may_be_held_out(tmp_path, capsys):
    """The first line of one file is not the first line of the other."""
    paths = [
        write(tmp_path / f"{seed}.jsonl", [{"scores": r.scores, "label": r.label} for r in first_errors(30, seed)])
        for seed in (0, 1)
    ]
    cli.run(["detect", str(paths[0]), f"--dev={paths[1]}"])
    assert "30 rows" in capsys.readouterr().out


def test_benchmarks_as_they_are_prepared(tmp_path):
    records = [
        StepDetectionExample("a", "q", ("s", "t"), (1, -1), first_error=1, category="gsm8k", source="processbench"),
        StepDetectionExample("b", "q", ("s", "t"), (0, -1), category="MathVision", source="visualprocessbench"),
    ]
    truth = write(tmp_path / "l.jsonl", [dataclasses.asdict(x) for x in records])
    scores = write(tmp_path / "s.jsonl", [{"id": x.id, "scores": [[0.9, 0.1]], "model": "m"} for x in records])
    rows, bad = detection.read(scores, truth)
    assert not bad
    assert rows == [Row("a", "gsm8k", (0.9, 0.1), label=1), Row("b", "MathVision", (0.9, 0.1), labels=(0, -1))]


def test_labels_that_must_be_a_mistake(tmp_path):
    path = write(tmp_path / "s.jsonl", [{"scores": [0.5, 0.5], "labels": [1, 0]}])
    with pytest.raises(UserError, match="a wrong step is -1, 0 is neutral"):
        detection.read(path)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--threshold=2"], "from 0 to 1"),
        (["--dev_share=1"], "between 0 and 1"),
        (["--threshold=0.5", "--dev=x"], "one of"),
    ],
)
def test_bad_options(tmp_path, options, words):
    with pytest.raises(UserError, match=words):
        cli.run(["detect", str(write(tmp_path / "s.jsonl", [GOOD])), *options])
    with pytest.raises(UserError, match="no such file"):
        cli.run(["detect", str(tmp_path / "none.jsonl")])

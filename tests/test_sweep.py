"""The grid, and tables whose figures are known."""

import types

import numpy as np
import pytest

from mmprm_jax import records
from mmprm_jax.records import Candidate, Problem, ScoredCandidate, UserError
from mmprm_jax.stages import sweep


def test_cells_are_all_combinations():
    grid = sweep.parse(["train_prm.label=soft,hard", "train_prm.optimizer.learning_rate=2e-3,4e-3", "seed=0,1"])
    found = sweep.cells(grid)
    assert len(found) == 8 and len({cell.name for cell in found}) == 8
    assert found[1].name == "label=soft,learning_rate=2e-3,seed=1"
    assert found[-1].overrides == [
        "--config.train_prm.label=hard", "--config.train_prm.optimizer.learning_rate=4e-3", "--config.seed=1"
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("items", "words"),
    [
        ([], "--grid is missing"),
        (["train_prm.label"], "write --grid=KEY=V1,V2"),
        (["train_prm.label=soft,"], "write --grid=KEY=V1,V2"),
        (["sft.steps=1,2"], "only seed and the settings of train_prm"),
        (["seed=1", "seed=2"], "given twice"),
        (["seed=1,1"], "a value is there twice"),
    ],
)
def test_grids_that_cannot_be_meant(items, words):
    with pytest.raises(UserError, match=words):
        sweep.parse(items)


@pytest.mark.parametrize("items", [["train_prm.a=../x"], ["train_prm.a.x=1", "train_prm.b.x=1", "seed=" + "1" * 200]])
def test_cells_whose_folders_cannot_be_named(items):
    with pytest.raises(UserError, match="cannot name the folder"):
        sweep.cells(sweep.parse(items))


def results(effects, problems=400, noise=0.0):
    """Cells of known accuracy: each problem is solved with p + the effects of its cell's values, in expectation."""
    rng = np.random.default_rng(0)
    grid = sweep.parse(["train_prm.label=soft,hard", "train_prm.max_paths=4,16", "seed=0,1,2"])
    base, found = rng.uniform(0.2, 0.5, problems), []
    for cell in sweep.cells(grid):
        shift = sum(effects.get(value, 0) for value in cell.values.values()) + noise * rng.normal()
        by_n = {n: base + shift + gain for n, gain in ((1, 0.0), (4, 0.05))}
        found.append(sweep.Result(cell, "min", by_n, {n: v - 0.1 for n, v in by_n.items()}, by_n, base))
    return grid, found, base


def test_answers_vote_as_in_the_evaluation(tmp_path):
    """0.5 and 1/2 are one answer."""
    answers = ("0.5", "1/2", "7", "7", "\\frac{1}{2}")
    rows = [ScoredCandidate(Candidate("p", (), a, a != "7", 0.0, 0), ()) for a in answers]
    records.write(tmp_path / "test_scored.jsonl", rows)
    run = types.SimpleNamespace(
        problems=lambda split: [Problem("p", "q", "0.5")],
        root=tmp_path,
        folder=lambda stage: tmp_path,
        finished=lambda stage: {"prm_selected": "mean"},
    )
    assert sweep._result(sweep.Cell({}), run).majority[5].tolist() == [1.0]


def test_differences_are_those_of_the_simulation():
    grid, found, base = results({"hard": -0.1, "16": 0.2})
    got = sweep.tables(grid, found)
    assert (got["n"], got["problems"], len(got["cells"])) == (4, 400, 12)
    soft, hard = got["settings"]["train_prm.label"]
    assert soft["chosen"]["value"] == pytest.approx(base.mean() + 0.1 + 0.05)  # half of the cells have 16 paths
    assert hard["chosen_difference"]["value"] == pytest.approx(-0.1)
    assert hard["mean_difference"]["value"] == pytest.approx(-0.1)
    assert hard["chosen_difference"]["ci95"] == pytest.approx([-0.1, -0.1])  # the same for every problem and seed
    assert got["settings"]["train_prm.max_paths"][1]["chosen_difference"]["value"] == pytest.approx(0.2)
    one, four = got["settings"]["N"]
    assert four["chosen_difference"]["value"] == pytest.approx(0.05)
    assert one["mean"]["value"] == pytest.approx(one["chosen"]["value"] - 0.1)
    assert set(got["settings"]) == {"train_prm.label", "train_prm.max_paths", "N"}


def test_the_spread_between_seeds_widens_the_intervals():
    quiet = sweep.tables(*results({})[:2])["settings"]["train_prm.label"][1]["chosen_difference"]
    loud = sweep.tables(*results({}, noise=0.1)[:2])["settings"]["train_prm.label"][1]["chosen_difference"]
    assert quiet["ci95"] == pytest.approx([0, 0], abs=1e-12)
    assert loud["ci95"][1] - loud["ci95"][0] > 0.05


def test_the_interval_over_problems_and_seeds():
    """Mean of independent effects of 30 seeds and 200 problems: the variances add."""
    rng = np.random.default_rng(1)
    values = 0.4 + 0.05 * rng.normal(size=(30, 1)) + 0.1 * rng.normal(size=(1, 200))
    low, high = sweep.interval(values)["ci95"]
    assert (high - low) / (2 * 1.96) == pytest.approx(np.sqrt(0.05**2 / 30 + 0.1**2 / 200), rel=0.2)
    assert sweep.interval(np.zeros((1, 50)))["ci95"][1] == pytest.approx(0.071, abs=0.001)  # 1 - 0.025^(1/50)


def test_the_tables_for_people():
    grid, found, _ = results({"hard": -0.1})
    text = sweep.to_markdown(sweep.tables(grid, found))
    assert text.count("| min |") == 12
    assert "**Soft or hard labels** (`train_prm.label`)" in text and "**Path diversity" in text
    row = next(line for line in text.splitlines() if line.startswith("| hard |"))
    assert "-10.0 [-10.0, -10.0]" in row
    assert len({line.count("|") for line in text.splitlines() if line.startswith("| label")}) == 1

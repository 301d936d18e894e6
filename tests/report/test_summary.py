import json

import pytest

from mmprm_jax.records import UserError
from mmprm_jax.report import summary


def test_pooling_by_hand():
    """Two independent differences of 0.10 and 0.20 with standard errors 0.03 and 0.04."""
    mean, low, high = summary.pool([{"difference": 0.1, "stderr": 0.03}, {"difference": 0.2, "stderr": 0.04}])
    assert mean == pytest.approx(0.15)
    assert (low, high) == pytest.approx((0.15 - 1.96 * 0.025, 0.15 + 1.96 * 0.025))


def metrics(accuracy):
    cell = {"accuracy": accuracy, "stderr": 0.01}
    names = ("random", "unique", "majority", "policy_logprob", "oracle")
    best = {name: cell for name in names} | {"prm": {"min": {"accuracy": 0.9, "stderr": 0.01}}}
    best["prm_weighted_majority"] = {"min": cell}
    paired = {"difference": 0.9 - accuracy, "stderr": 0.02}
    return {
        "best_of_n": {"2": {}, "16": best},
        "prm_selected": "min",
        "paired": {name: paired for name in ("random", "majority", "policy_logprob")},
        "controls": {"blank_image": cell, "shuffled_image": cell},
    }


def test_the_table_has_a_column_for_each_run_and_the_mean(tmp_path):
    for name, accuracy in (("a", 0.5), ("b", 0.6)):
        (tmp_path / name / "report").mkdir(parents=True)
        (tmp_path / name / "report" / "metrics.json").write_text(json.dumps(metrics(accuracy)))
    lines = summary.summarise([tmp_path / "a", tmp_path / "b"]).splitlines()
    assert lines[0] == "| Best of 16, % | a | b | mean |"
    assert "| random | 50.0 ± 1.0 | 60.0 ± 1.0 | 55.0 |" in lines
    assert any(line.startswith("| **PRM** (min") and line.endswith("| 90.0 |") for line in lines)
    assert any(line.startswith("PRM minus majority: +35.0 points") and "+40.0, +30.0" in line for line in lines)


def test_an_unfinished_run_is_named(tmp_path):
    with pytest.raises(UserError, match="metrics.json"):
        summary.summarise([tmp_path])

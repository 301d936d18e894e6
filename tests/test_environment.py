"""What a stage notes of the machine that it ran on."""

import json
import os

import jax
import pytest

from mmprm_jax import environment


def test_what_is_noted():
    found = environment.describe()
    assert json.loads(json.dumps(found)) == found
    assert found["jax"] == jax.__version__ and found["backend"] == "cpu" and found["devices"] == jax.device_count()
    assert found["cpu"] and found["processes"] == 1


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="Linux only")
def test_cores_are_those_that_the_process_may_use():
    """As ``taskset`` sets them: sums depend on their number."""
    before = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(before)})
        assert environment.cores() == 1
    finally:
        os.sched_setaffinity(0, before)
    assert environment.cores() == len(before)

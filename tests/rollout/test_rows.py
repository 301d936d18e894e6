"""Samples do not depend on what is sampled together, whatever kernels this machine's CPU has. Slow: own processes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mmprm_jax.rollout import device


@pytest.mark.slow
@pytest.mark.parametrize("kernels", ["AVX2", "ALL"])  # of oneDNN, at most
def test_samples_of_every_schedule_are_the_same(kernels):
    env = os.environ | {"JAX_PLATFORMS": "cpu", "DNNL_MAX_CPU_ISA": kernels, "PJRT_NPROC": "8"}
    program = str(Path(__file__).with_name("toy_rows.py"))
    out = subprocess.run([sys.executable, program], env=env, capture_output=True, text=True, timeout=900)
    assert out.returncode == 0, out.stderr
    found = json.loads(out.stdout.splitlines()[-1])
    assert found["samples"] > 50 and len(found["different"]) == 4
    assert not any(found["different"].values()), found


@pytest.mark.parametrize(("rows", "left_over"), [(0, False), (1, True), (8, True), (9, True), (10, False), (48, False)])
def test_rows_left_over(rows, left_over):
    assert device.has_remainder_rows(rows) == left_over

"""Memory that is freed and taken again."""

import resource

import numpy as np
import pytest

from mmprm_jax.allocator import keep_memory


def test_freed_memory_is_taken_again_without_the_kernel():
    """64 MiB, more than glibc keeps by default; tests/conftest.py has called it already."""
    if not keep_memory():
        pytest.skip("another C library")
    np.ones(2**23)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(4):
        np.ones(2**23)
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
    assert faults < 100  # mapped anew, each of them costs 500 (huge pages) to 16,000

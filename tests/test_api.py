"""What is public in Python: imported lazily, and the README's lines on a run."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import mmprm_jax

ROOT = Path(__file__).parents[1]
PUBLIC = [
    "PRM", "Policy", "Problem", "UserError", "Verifier", "annotate", "best_of_n", "calibrate", "make_mesh",
    "open_problems", "open_run", "read_metrics", "replay", "train_prm",
]  # fmt: skip


def python(program):
    """What a program prints, on as many devices and with XLA's options as users have them."""
    env = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"} | {"JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=600, env=env)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_import_is_quick():
    """No library is imported until something is asked for."""
    program = "import sys; before = set(sys.modules); import mmprm_jax; print(*set(sys.modules) - before)"
    loaded = {name.split(".")[0] for name in python(program).split()}
    assert "mmprm_jax" in loaded and not loaded - set(sys.stdlib_module_names) - {"mmprm_jax"}


def test_public_names():
    for name in PUBLIC:
        assert callable(getattr(mmprm_jax, name)), name
    assert set(mmprm_jax.AGGREGATORS) > {"min", "mean", "last"}
    assert set(PUBLIC) | {"AGGREGATORS", "__version__"} == set(mmprm_jax.__all__) < set(dir(mmprm_jax))
    assert re.match(r"\d+\.\d+", mmprm_jax.__version__)
    assert (ROOT / "mmprm_jax" / "py.typed").exists()
    with pytest.raises(AttributeError, match="no attribute 'Polcy'"):
        mmprm_jax.Polcy  # noqa: B018


def readme_lines():
    """The block of README.md that imports the public names."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    (block,) = [block for block in blocks if "open_run" in block]
    return block


def files(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


@pytest.mark.slow
def test_the_readme_runs(smoke_run):
    workdir, before = smoke_run[0], files(smoke_run[0])
    check = """
assert len(solutions) == 8 and all(len(s.tokens) == len(s.logprobs) and s.logprob < 0 for s in solutions)
assert len({s.tokens for s in solutions}) > 1
assert tree.problem == problem and tree.nodes[0].n == 8
assert len(scores) == 2 and all(0 < score < 1 for score in scores)
assert best.index == max(range(8), key=best.scores.__getitem__)
run = open_run("runs/digits")
assert [len(group) for group in run.candidates().values()] == [16] * len(run.problems())
assert run.metrics["n_problems"] == len(run.problems())
assert run.examples()[0].segments and run.policy.language.templates == ("own", "own")
assert sum(1 for _ in run.trees()) == len(run.problems("train"))
scored = run.candidates()[problem.id][0]
again = run.prm.score(problem, scored.candidate.segments)
assert all(abs(a - b) < 1e-5 for a, b in zip(again, scored.scores, strict=True))
again = run.policy.sample([problem], n=8, max_new_tokens=64)[0]
assert [s.tokens for s in again] == [s.tokens for s in solutions]
"""
    program = (readme_lines() + check).replace("runs/digits", str(workdir))
    assert re.match(r"\d of 8 are right; the best of 8: ", python(program))
    assert files(workdir) == before  # nothing was written

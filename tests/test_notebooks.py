"""The notebooks: valid, public names only, no traces of the machine that ran them; and, slowly, that they run."""

import ast
import base64
import copy
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

import mmprm_jax

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "notebooks"
NOTEBOOKS = {path.stem: nbformat.read(path, as_version=4) for path in sorted(FOLDER.glob("*.ipynb"))}
SECONDS = 600  # for a cell, on a busy machine
ABSOLUTE = re.compile(r"(?<![\w.~:/])/[A-Za-z0-9_.-]+/[A-Za-z0-9_.-]+|\b[A-Z]:\\\w|~[a-z]+/")
TIME = re.compile(r"20\d\d-?[01]\d-?[0-3]\d[ T-]?[0-2]\d:?[0-5]\d")


def code(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def python(source):
    """A cell without what only IPython understands."""
    lines = []
    for line in source.splitlines():
        magic = re.match(r"\s*(\w+ = )?[!%]", line)
        lines.append(line[: len(line) - len(line.lstrip())] + "pass" if magic else line)
    return "\n".join(lines)


def outputs(notebook):
    """(cell, text, kind) of all that cells have left; of HTML what a reader sees, without images and tags."""
    for cell in code(notebook):
        for output in cell.outputs:
            if output.output_type == "stream":
                yield cell, output.text, output.name
            for kind, text in output.get("data", {}).items():
                if kind == "text/html":
                    text = re.sub(r"data:image/\w+;base64,[\w+/=]*|<[^>]*>", " ", text)
                yield cell, text, kind


def test_the_notebooks_are_there_and_valid():
    assert [name[:2] for name in NOTEBOOKS] == [f"{number:02}" for number in range(1, 8)]
    for name, notebook in NOTEBOOKS.items():
        nbformat.validate(notebook)
        assert notebook.metadata.kernelspec.name == "python3", name
        counts = [cell.execution_count for cell in code(notebook)]
        assert counts == list(range(1, len(counts) + 1)), f"{name} was not run from top to bottom"
    install = {code(notebook)[0].source for notebook in NOTEBOOKS.values()}
    assert len(install) == 1 and "find_spec" in install.pop()  # the same in each, and the first one


def test_each_cell_has_words_before_it():
    for name, notebook in NOTEBOOKS.items():
        first = notebook.cells[0]
        assert first.cell_type == "markdown" and first.source.startswith("# "), name
        described = sum(cell.cell_type == "markdown" for cell in notebook.cells)
        assert described >= 0.8 * len(code(notebook)), name


def test_notebooks_use_what_is_public():
    used = set()
    for name, notebook in NOTEBOOKS.items():
        for cell in code(notebook):
            for node in ast.walk(ast.parse(python(cell.source))):
                if isinstance(node, ast.ImportFrom) and node.module.split(".")[0] == "mmprm_jax":
                    assert node.module == "mmprm_jax", f"{name}: {node.module} is not public"
                    used |= {alias.name for alias in node.names}
                if isinstance(node, ast.Import):
                    assert not any(alias.name.split(".")[0] == "mmprm_jax" for alias in node.names), name
                if isinstance(node, ast.Attribute):
                    assert not node.attr.startswith("_"), f"{name}: {node.attr}"
    assert used <= set(mmprm_jax.__all__)
    assert {"Policy", "PRM", "annotate", "train_prm", "best_of_n", "Verifier", "open_run"} <= used


def test_kept_outputs_say_nothing_of_a_machine_and_are_small():
    found = []
    for name, notebook in NOTEBOOKS.items():
        for cell, text, kind in outputs(notebook):
            if kind == "stderr" or kind.startswith("image/"):
                found += [f"{name}: stderr"] * (kind == "stderr")
                small = kind == "stderr" or len(base64.b64decode(text)) <= 60 * 1024
                found += [] if small else [f"{name}: a figure of more than 60 KB"]
                continue
            # what a cell itself says may come back
            paths = [path for path in ABSOLUTE.findall(text) if path not in cell.source]
            found += [f"{name}: {what}" for what in (*paths, *TIME.findall(text))]
        found += [f"{name}: an error" for cell in code(notebook) for x in cell.outputs if x.output_type == "error"]
    assert found == []
    assert sum(path.stat().st_size for path in FOLDER.glob("*.*")) < 1.5 * 2**20


def test_what_counts_as_a_trace():
    traces = ("/home/me/x.png", "see /tmp/a/b", "'/work/runs'", "C:\\Users", "~me/runs")
    assert all(ABSOLUTE.search(text) for text in traces)
    fine = ("runs/digits/data", "../runs/digits", "14/2", "gs://BUCKET/prm", "3 of 8", "~/mmprm.lock", "row/s")
    assert not any(ABSOLUTE.search(text) for text in fine)
    assert TIME.search("20261130-214923") and TIME.search("2026-11-30 21:49") and not TIME.search("18324 labels")


@pytest.mark.slow
@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_notebook_runs_from_top_to_bottom(name, smoke_run, tmp_path, monkeypatch):
    """On the smoke run that the whole session shares, which it leaves as it is."""
    if importlib.util.find_spec("ipykernel") is None:
        pytest.skip("needs nbclient and ipykernel: pip install '.[dev]'")
    from nbclient import NotebookClient

    workdir = smoke_run[0]
    before = {path: path.stat().st_mtime_ns for path in workdir.rglob("*")}
    monkeypatch.setenv("MMPRM_RUN", str(workdir))
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    notebook = copy.deepcopy(NOTEBOOKS[name])  # the others look at what was kept
    resources = {"metadata": {"path": str(tmp_path)}}
    NotebookClient(notebook, timeout=SECONDS, kernel_name="python3", resources=resources).execute()
    assert [cell.execution_count for cell in code(notebook)] == list(range(1, len(code(notebook)) + 1))
    assert before == {path: path.stat().st_mtime_ns for path in workdir.rglob("*")}
    nbformat.validate(notebook)


@pytest.mark.slow
def test_what_notebooks_read_of_a_run(smoke_run):
    """By another way than the figures were made."""
    program = f"""
import math, numpy as np
from mmprm_jax import open_run, read_metrics, replay
run = open_run({str(smoke_run[0])!r})
assert run.sweep() is None and run.guided() == {{}}
wins = [0, 0]
pairs = []
for name, group in run.candidates("test").items():
    for x in group:
        pairs += zip(x.scores, run.steps_right(name, x.candidate.segments))
right, wrong = [s for s, r in pairs if r], [s for s, r in pairs if not r]
auc = np.mean([(a > b) + 0.5 * (a == b) for a in right for b in wrong])
assert math.isclose(auc, run.metrics["step_auc"], abs_tol=1e-9), auc
values = run.step_values()
assert len(values) == run.config.evaluate.calibration_problems
from pathlib import Path
for images in ([t.problem.images for t in run.trees()], [x.images for x in run.examples()], [x.images for x in values]):
    assert images and all(Path(name).exists() for names in images for name in names)
assert sum(len(replay(tree)) for tree in run.trees()) > 0
frame = read_metrics({str(smoke_run[0])!r})
assert set(frame.index.get_level_values("stage")) == {{"sft", "annotate", "train_prm"}}
assert frame.loc["sft"].index.max() == run.config.sft.steps and frame.loc["train_prm"].loss.notna().all()
try:
    run.steps_right("train-00000", ())
    raise SystemExit("there is no truth of training problems")
except Exception as error:
    assert "not known" in str(error), error
"""
    env = {key: value for key, value in os.environ.items() if key != "XLA_FLAGS"} | {"JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=env, timeout=300)
    assert done.returncode == 0, done.stderr

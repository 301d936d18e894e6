"""Scalars and progress lines."""

import io
import json
import signal
import subprocess
import sys
import types

import numpy as np
import pytest
from etils import epath

from mmprm_jax import UserError, events, metrics, read_metrics


class Clock:
    """Replaces the module's clock, not the whole process's."""

    def __init__(self, monkeypatch):
        self.now = 0.0
        monkeypatch.setattr(metrics, "time", types.SimpleNamespace(monotonic=lambda: self.now))


def test_rows_and_events(tmp_path):
    with metrics.Metrics(tmp_path / "sft") as m:
        m.write(0, loss=np.float32(0.5), tokens=7)
        m.write(1, **{"loss": 0.25, "grad/norm": float("nan")})
        assert len(metrics.read(tmp_path / "sft")) == 2  # visible before the end
    rows = metrics.read(tmp_path / "sft")
    assert rows[0] == {"step": 0, "loss": 0.5, "tokens": 7}
    assert rows[1]["loss"] == 0.25 and np.isnan(rows[1]["grad/norm"])
    events = [p for p in (tmp_path / "sft").iterdir() if "tfevents" in p.name]
    assert len(events) == 1 and b"grad/norm" in events[0].read_bytes()


@pytest.mark.parametrize("resume, kept", [(None, [0, 1, 2]), (2, [0, 1]), (0, [])])
def test_resume_drops_rows_at_or_beyond_the_step(tmp_path, resume, kept):
    with metrics.Metrics(tmp_path) as m:
        for step in range(3):
            m.write(step, loss=step)
    with metrics.Metrics(tmp_path, resume_step=resume) as m:
        m.write(9, loss=9)
    assert [row["step"] for row in metrics.read(tmp_path)] == [*kept, 9]


KILLED = """
import os, signal, sys
from mmprm_jax import metrics
m = metrics.Metrics(sys.argv[1])
for step in range(5):
    m.write(step, loss=step / 2, norm=step)
os.kill(os.getpid(), signal.SIGKILL)
"""


def shown(folder):
    """What TensorBoard makes of the event files: {(step, name): value}; a scalar that is there twice is an error."""
    found = {}
    for path in sorted(p for p in folder.iterdir() if "tfevents" in p.name):
        for event in events._events(epath.Path(path)):
            if event.session_log.status:
                found = {key: value for key, value in found.items() if key[0] < event.step}
            for value in event.summary.value:
                assert (event.step, value.tag) not in found
                found[event.step, value.tag] = value.simple_value
    return found


def told(folder):
    """The same of metrics.jsonl."""
    return {(row["step"], name): x for row in metrics.read(folder) for name, x in row.items() if name != "step"}


def test_a_killed_process_loses_no_events(tmp_path):
    assert subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)]).returncode == -signal.SIGKILL
    assert len(told(tmp_path)) == 10 and shown(tmp_path) == told(tmp_path)


@pytest.mark.parametrize("resume", [None, 2, 5, 0])
@pytest.mark.parametrize("cut", [0, 1, 20, 150])
def test_a_resumed_run_writes_the_events_that_were_lost(tmp_path, resume, cut):
    with metrics.Metrics(tmp_path) as m:
        for step in range(5):
            m.write(step, loss=step / 2, norm=step)
    (path,) = (p for p in tmp_path.iterdir() if "tfevents" in p.name)
    path.write_bytes(path.read_bytes()[: -cut or None])
    for again in range(2):  # a second interruption, right away
        with metrics.Metrics(tmp_path, resume_step=resume) as m:
            m.write(7 + again, loss=0.5)
        assert shown(tmp_path) == told(tmp_path)
    assert len(list(tmp_path.glob("*tfevents*"))) == 3


def test_scalars_of_older_event_files_are_not_written_again(tmp_path):
    """tensorboardX wrote one event for each scalar; a step of which only one got there is made whole."""
    tensorboardX = pytest.importorskip("tensorboardX")
    (tmp_path / "metrics.jsonl").write_text('{"step": 0, "loss": 1.0, "norm": 2.0}\n')
    board = tensorboardX.SummaryWriter(str(tmp_path))
    board.add_scalar("loss", 1.0, 0)
    board.close()
    with metrics.Metrics(tmp_path, resume_step=1):
        pass
    assert shown(tmp_path) == {(0, "loss"): 1.0, (0, "norm"): 2.0}


def test_torn_line_is_dropped(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 0, "loss": 1.0}\n{"step": 1, "lo')
    with metrics.Metrics(tmp_path, resume_step=1) as m:
        m.write(1, loss=2.0)
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [0, 1]


def test_disabled_writes_nothing(tmp_path):
    with metrics.Metrics(tmp_path / "x", enabled=False) as m:
        m.write(0, loss=1.0)
    assert not (tmp_path / "x").exists() and metrics.read(tmp_path / "x") == []


def test_object_store_is_rewritten_not_appended(tmp_path, monkeypatch):
    clock = Clock(monkeypatch)
    monkeypatch.setattr(metrics, "_can_append", lambda _: False)
    m = metrics.Metrics(tmp_path)
    m.write(0, loss=0.0)
    assert metrics.read(tmp_path) == []
    clock.now += 30
    m.write(1, loss=0.0)
    assert len(metrics.read(tmp_path)) == 2
    m.write(2, loss=0.0)
    m.close()
    m.close()
    assert [row["step"] for row in metrics.read(tmp_path)] == [0, 1, 2]


def test_progress_in_a_log_file(monkeypatch):
    stream, clock = io.StringIO(), Clock(monkeypatch)
    monkeypatch.setattr(sys, "stderr", stream)
    with metrics.progress(100, "sft", "step", initial=50) as bar:
        for _ in range(50):
            clock.now += 0.5  # 25 s in all
            bar.update()
            bar.set_postfix(loss=0.5)
            bar.refresh()
    lines = stream.getvalue().split("\n")
    assert lines[-1] == "" and len(lines) == 5  # at 0, 10 and 20 s and at the end
    assert all(line.startswith("sft: ") and "\r" not in line for line in lines[:-1])
    assert "100/100" in lines[3] and "loss=0.5" in lines[3] and "step" in lines[3]


def test_progress_on_a_terminal_and_disabled(monkeypatch):
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    with metrics.progress(3, "x", "item", enabled=False) as bar:
        bar.update(3)
    assert stream.getvalue() == ""
    stream.isatty = lambda: True
    with metrics.progress(3, "x", "item") as bar:
        bar.update(3)
    assert "\r" in stream.getvalue() and "3/3" in stream.getvalue()


def test_progress_without_a_total(monkeypatch):
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    with metrics.progress(None, "x", "item") as bar:
        bar.update(4)
    assert "4 item" in stream.getvalue()


def test_metrics_as_a_frame(tmp_path):
    """By stage and step, of a work directory or of one stage; other files and folders are left alone."""
    pytest.importorskip("pandas")
    for stage in ("train_prm", "sft"):
        with metrics.Metrics(tmp_path / stage) as m:
            m.write(2, loss=0.25, **({"weight": 7} if stage == "sft" else {}))
            m.write(4, loss=0.125)
    (tmp_path / "data").mkdir()
    (tmp_path / "config.json").write_text("{}")
    frame = read_metrics(tmp_path)
    assert list(frame.index) == [("sft", 2), ("sft", 4), ("train_prm", 2), ("train_prm", 4)]
    assert frame.loc["sft"].loss.to_dict() == {2: 0.25, 4: 0.125} and frame.loc[("sft", 2), "weight"] == 7
    assert frame.loc["train_prm"].weight.isna().all() and "step" not in frame
    assert read_metrics(tmp_path / "sft").equals(frame.loc[["sft"]])
    with pytest.raises(UserError, match="data: no metrics.jsonl there"):
        read_metrics(tmp_path / "data")


def test_without_pandas_it_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(UserError, match=r"pip install 'mmprm_jax\[notebooks\]'"):
        read_metrics(tmp_path)

"""Scalars and progress lines."""

import io
import json
import sys
import types

import numpy as np
import pytest

from mmprm_jax import metrics


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

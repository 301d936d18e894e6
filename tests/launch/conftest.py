"""A scenario of stand-in programs, and the launcher in it."""

import launch_stubs
import pytest

from mmprm_jax.launch import cli


@pytest.fixture
def scenario(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "scenario").mkdir()
    scenario = launch_stubs.Scenario(tmp_path / "scenario")
    for name, value in scenario.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return scenario


@pytest.fixture
def dry_run(capsys):
    """``dry_run("tpu", …)``: what ``--dry-run`` prints."""

    def shown(*argv):
        split = argv.index("--")
        cli.main([*argv[:split], "--dry-run", *argv[split:]])
        return capsys.readouterr().out

    return shown

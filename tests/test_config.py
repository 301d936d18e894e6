"""Config files, overrides and work directories."""

import json

import pytest
from etils import epath

from mmprm_jax import config as config_lib
from mmprm_jax.records import UserError

CONFIG = """
import ml_collections
from ml_collections import config_dict

LAYERS = 2


def get_config(arg=""):
    if arg not in ("", "small"):
        raise ValueError(f"unknown variant {arg!r};\\n  there is: small")
    c = ml_collections.ConfigDict()
    c.seed = 0
    c.name = "base"
    c.warmup = None
    c.limit = config_dict.placeholder(int)
    c.layers = 1 if arg == "small" else LAYERS
    c.mesh = ml_collections.ConfigDict({"data": 1})
    c.sft = ml_collections.ConfigDict({
        "learning_rate": 0.1, "remat": True, "betas": (0.9, 0.95), "sources": ("a", "b"), "sizes": (1, 2), "tags": (),
    })
    return c
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "digits.py"
    path.write_text(CONFIG)
    return str(path)


def fails(call, *args, **kwargs):
    """The message of the UserError that the call raises; it must be one line."""
    with pytest.raises(UserError) as caught:
        call(*args, **kwargs)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_argument_is_passed_on_and_result_is_locked(file):
    assert config_lib.load(file).layers == 2
    config = config_lib.load(file + ":small")
    assert config.layers == 1 and config.is_locked


@pytest.mark.parametrize(
    "text, key, value",
    [
        ("seed=7", "seed", 7),
        ("name=none", "name", "none"),
        ("name=a=b", "name", "a=b"),
        ("warmup=None", "warmup", None),
        ("warmup=5", "warmup", 5),
        ("warmup=abc", "warmup", "abc"),
        ("limit=3", "limit", 3),
        ("limit=none", "limit", None),
        ("sft.learning_rate=1e-3", "sft.learning_rate", 1e-3),
        ("sft.learning_rate=1", "sft.learning_rate", 1.0),
        ("sft.remat=False", "sft.remat", False),
        ("sft.remat=1", "sft.remat", True),
        ("sft.betas=(0, 0.5)", "sft.betas", (0.0, 0.5)),
        ("sft.betas=0.5", "sft.betas", (0.5,)),
        ("sft.sources=x,y,3", "sft.sources", ("x", "y", "3")),
        ("sft.sources=('x',)", "sft.sources", ("x",)),
        ("sft.sources=x", "sft.sources", ("x",)),
        ("sft.sources=()", "sft.sources", ()),
        ("sft.sizes=3,4,5", "sft.sizes", (3, 4, 5)),
        ("sft.tags=x,y", "sft.tags", ("x", "y")),
    ],
)
def test_override(file, text, key, value):
    found = config_lib.load(file, [f"--config.{text}"])
    for part in key.split("."):
        found = found[part]
    assert found == value and type(found) is type(value)
    if isinstance(value, tuple):
        assert [type(i) for i in found] == [type(i) for i in value]


def test_last_override_wins(file):
    assert config_lib.load(file, ["--config.warmup=5", "--config.warmup=none"]).warmup is None


@pytest.mark.parametrize(
    "text, expected",
    [
        ("seed=abc", "int"),
        ("seed=0.5", "int"),
        ("seed=none", "int"),
        ("limit=x", "int"),
        ("sft.learning_rate=fast", "float"),
        ("sft.remat=yes please", "bool"),
        ("sft.betas=(1, 'x')", "tuple of float"),
        ("sft.betas=a,b", "tuple of float"),
        ("sft.sizes=1.5,2", "tuple of int"),
        ("sft.sizes=True,2", "tuple of int"),
    ],
)
def test_wrong_type_names_the_expected_type_and_the_value(file, text, expected):
    message = fails(config_lib.load, file, [f"--config.{text}"])
    assert message == f"--config.{text}: expected {expected}, got {text.split('=')[1]!r}"


@pytest.mark.parametrize(
    "typo, nearest",
    [
        ("sft.lerning_rate", "sft.learning_rate"),
        ("learning_rate", "sft.learning_rate"),
        ("sfft.remat", "sft.remat"),
        ("sed", "seed"),
        ("seed.x", "seed"),
    ],
)
def test_typo_names_the_nearest_key(file, typo, nearest):
    message = fails(config_lib.load, file, [f"--config.{typo}=1"])
    assert message == f"--config.{typo}=1: no such setting; did you mean {nearest}?"


def test_group_and_missing_value(file):
    assert "it holds mesh.data" in fails(config_lib.load, file, ["--config.mesh=1"])
    assert "--config.seed=VALUE" in fails(config_lib.load, file, ["--config.seed"])


def test_missing_file_lists_what_there_is(file, tmp_path):
    message = fails(config_lib.load, str(tmp_path / "digit.py"))
    assert message == f"{tmp_path / 'digit.py'}: no such config file; there are {file}"


@pytest.mark.parametrize(
    "text, wanted",
    [
        ("def get_config(:", "line 1"),
        ("x = 1", "defines no get_config"),
        ("def get_config(arg=''): return {}", "returned dict"),
    ],
)
def test_bad_config_file(tmp_path, text, wanted):
    path = tmp_path / "bad.py"
    path.write_text(text)
    message = fails(config_lib.load, str(path))
    assert message.startswith(str(path)) and wanted in message


def test_bad_argument(file, tmp_path):
    assert fails(config_lib.load, file + ":huge") == f"{file}:huge: unknown variant 'huge'; there is: small"
    path = tmp_path / "plain.py"
    path.write_text("import ml_collections\ndef get_config(): return ml_collections.ConfigDict()")
    assert "takes no argument" in fails(config_lib.load, f"{path}:x")
    assert config_lib.load(str(path)).to_dict() == {}


def test_split_args():
    rest, overrides = config_lib.split_args(["mmprm", "sft", "--config=a.py", "--config.seed=1", "--workdir=w"])
    assert rest == ["mmprm", "sft", "--config=a.py", "--workdir=w"]
    assert overrides == ["--config.seed=1"]


def test_to_text_is_sorted_json(file):
    text = config_lib.to_text(config_lib.load(file))
    assert text == config_lib.to_text(config_lib.load(file))
    rows = json.loads(text)
    assert list(rows) == sorted(rows) and rows["sft"]["betas"] == [0.9, 0.95]


def test_guard_accepts_the_same_config_and_ignored_changes(file, tmp_path):
    config = config_lib.load(file)
    workdir = config_lib.guard_workdir(tmp_path / "runs" / "a", config)
    assert (workdir / "config.json").read_text() == config_lib.to_text(config)
    config_lib.guard_workdir(workdir, config)
    config_lib.guard_workdir(workdir, config_lib.load(file, ["--config.mesh.data=8"]))
    config_lib.guard_workdir(workdir, config_lib.load(file, ["--config.seed=1"]), ignore=("mesh", "seed"))
    assert [p.name for p in workdir.iterdir()] == ["config.json"]
    assert (workdir / "config.json").read_text() == config_lib.to_text(config)


def test_guard_lists_the_differences(file, tmp_path):
    workdir = config_lib.guard_workdir(tmp_path / "w", config_lib.load(file))
    other = config_lib.load(file, ["--config.seed=1", "--config.sft.remat=False", "--config.mesh.data=2"])
    message = fails(config_lib.guard_workdir, workdir, other)
    assert "(seed was 0, is 1; sft.remat was true, is false)" in message
    assert "--workdir" in message and "delete" in message


def test_guard_caps_the_list_and_names_absent_keys(tmp_path):
    from ml_collections import ConfigDict

    workdir = config_lib.guard_workdir(tmp_path / "w", ConfigDict({"gone": 1}))
    message = fails(config_lib.guard_workdir, workdir, ConfigDict({f"k{i:02}": i for i in range(20)}))
    assert "gone was 1, is absent" in message and "k00 was absent, is 0" in message and "and 9 more" in message


def test_guard_rejects_a_damaged_file(file, tmp_path):
    (tmp_path / "config.json").write_text("{")
    assert "not a config" in fails(config_lib.guard_workdir, tmp_path, config_lib.load(file))


def test_guard_other_processes_never_write(file, tmp_path):
    config = config_lib.load(file)
    config_lib.guard_workdir(tmp_path / "w", config, primary=False)
    assert not (tmp_path / "w").exists()
    config_lib.guard_workdir(tmp_path / "w", config)
    other = config_lib.load(file, ["--config.seed=1"])
    assert "seed" in fails(config_lib.guard_workdir, tmp_path / "w", other, primary=False)


def test_guard_path_at_or_below_a_file(file, tmp_path):
    (tmp_path / "f").write_text("")
    for path in (tmp_path / "f", tmp_path / "f" / "below"):
        message = fails(config_lib.guard_workdir, path, config_lib.load(file))
        assert message == f"{path}: not a directory; choose another --workdir"


def test_guard_read_only(file, tmp_path, monkeypatch):
    config = config_lib.load(file)
    config_lib.guard_workdir(tmp_path / "w", config)

    def denied(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(type(epath.Path(tmp_path)), "write_text", denied)
    message = fails(config_lib.guard_workdir, tmp_path / "w", config)
    assert "cannot be written (Permission denied); choose a --workdir" in message

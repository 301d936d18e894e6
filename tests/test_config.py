"""Config files, overrides and work directories."""

import dataclasses
import json
import pathlib

import pytest
from etils import epath

from mmprm_jax import config as config_lib
from mmprm_jax.records import UserError
from mmprm_jax.schema import Section, setting

ROOT = pathlib.Path(__file__).parents[1]
CONFIG = """
import ml_collections

LAYERS = 2


def get_config(arg=""):
    if arg not in ("", "small"):
        raise ValueError(f"unknown variant {arg!r};\\n  there is: small")
    c = ml_collections.ConfigDict()
    c.layers = 1 if arg == "small" else LAYERS
    c.sft = ml_collections.ConfigDict({"learning_rate": 1, "sizes": [1, 2]})
    return c
"""


@dataclasses.dataclass(frozen=True)
class SFT(Section):
    learning_rate: float = setting(0.5, "how fast")
    remat: bool = setting(True, "again")
    betas: tuple[float, ...] = setting((0.9, 0.95), "decays", low=0, high=1)
    sources: tuple[str, ...] = setting(("a", "b"), "files")
    sizes: tuple[int, ...] = setting((3,), "numbers", low=0)


@dataclasses.dataclass(frozen=True)
class Mesh(Section):
    data: int = setting(1, "devices", low=1)


@dataclasses.dataclass(frozen=True)
class Toy(Section):
    seed: int = setting(0, "of all")
    name: str = setting("base", "a word", choices=("base", "none", "a=b"))
    layers: int = setting(7, "how deep")
    mesh: Mesh = Mesh()
    sft: SFT = SFT()


def load(file, overrides=()):
    return config_lib.load(file, overrides, Toy)


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


def test_argument_is_passed_on_and_the_result_cannot_be_changed(file):
    assert load(file).layers == 2
    config = load(file + ":small")
    assert config.layers == 1
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.layers = 3


def test_a_file_says_only_what_differs(file):
    assert load(file) == Toy(layers=2, sft=SFT(learning_rate=1.0, sizes=(1, 2)))
    assert type(load(file).sft.learning_rate) is float


@pytest.mark.parametrize(
    "text, key, value",
    [
        ("seed=7", "seed", 7),
        ("name=none", "name", "none"),
        ("name=a=b", "name", "a=b"),
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
    ],
)
def test_override(file, text, key, value):
    found = load(file, [f"--config.{text}"])
    for part in key.split("."):
        found = found[part]
    assert found == value and type(found) is type(value)
    if isinstance(value, tuple):
        assert [type(i) for i in found] == [type(i) for i in value]


def test_last_override_wins(file):
    assert load(file, ["--config.seed=5", "--config.seed=6"]).seed == 6


@pytest.mark.parametrize(
    "text, expected",
    [
        ("seed=abc", "int"),
        ("seed=0.5", "int"),
        ("seed=none", "int"),
        ("sft.learning_rate=fast", "float"),
        ("sft.remat=yes please", "bool"),
        ("sft.betas=(1, 'x')", "tuple of float"),
        ("sft.betas=a,b", "tuple of float"),
        ("sft.sizes=1.5,2", "tuple of int"),
        ("sft.sizes=True,2", "tuple of int"),
    ],
)
def test_wrong_type_names_the_expected_type_and_the_value(file, text, expected):
    message = fails(load, file, [f"--config.{text}"])
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
    message = fails(load, file, [f"--config.{typo}=1"])
    assert message == f"--config.{typo}=1: no such setting; did you mean {nearest}?"


def test_group_and_missing_value(file):
    assert "it holds mesh.data" in fails(load, file, ["--config.mesh=1"])
    assert "--config.seed=VALUE" in fails(load, file, ["--config.seed"])


def test_missing_file_lists_what_there_is(file, tmp_path):
    message = fails(load, str(tmp_path / "digit.py"))
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
    message = fails(load, str(path))
    assert message.startswith(str(path)) and wanted in message


def test_bad_argument(file, tmp_path):
    assert fails(load, file + ":huge") == f"{file}:huge: unknown variant 'huge'; there is: small"
    path = tmp_path / "plain.py"
    path.write_text("import ml_collections\ndef get_config(): return ml_collections.ConfigDict()")
    assert "takes no argument" in fails(load, f"{path}:x")
    assert load(str(path)) == Toy()


def test_to_text_is_sorted_json(file):
    text = config_lib.to_text(load(file))
    assert text == config_lib.to_text(load(file))
    rows = json.loads(text)
    assert list(rows) == sorted(rows) and rows["sft"]["betas"] == [0.9, 0.95]


def results_in(workdir):
    """A file that a stage wrote."""
    (workdir / "data").mkdir()
    (workdir / "data" / "train.jsonl").write_text("{}")


def test_guard_accepts_the_same_config_and_ignored_changes(file, tmp_path):
    config = load(file)
    workdir = config_lib.guard_workdir(tmp_path / "runs" / "a", config)
    assert (workdir / "config.json").read_text() == config_lib.to_text(config)
    results_in(workdir)
    config_lib.guard_workdir(workdir, config)
    config_lib.guard_workdir(workdir, load(file, ["--config.mesh.data=8"]))
    config_lib.guard_workdir(workdir, load(file, ["--config.seed=1"]), ignore=("mesh", "seed"))
    assert sorted(p.name for p in workdir.iterdir()) == ["config.json", "data"]
    assert (workdir / "config.json").read_text() == config_lib.to_text(config)


def test_guard_lists_the_differences(file, tmp_path):
    workdir = config_lib.guard_workdir(tmp_path / "w", load(file))
    results_in(workdir)
    other = load(file, ["--config.seed=1", "--config.sft.remat=False", "--config.mesh.data=2"])
    message = fails(config_lib.guard_workdir, workdir, other)
    assert "(seed was 0, is 1; sft.remat was true, is false)" in message
    assert "--workdir" in message and "delete" in message


def test_a_run_that_made_nothing_does_not_lock_its_directory(file, tmp_path):
    workdir = config_lib.guard_workdir(tmp_path / "w", load(file))
    (workdir / "sft" / "checkpoints").mkdir(parents=True)  # a stage began, and failed
    for name in ("compilation_cache", "logs"):
        (workdir / name).mkdir()
        (workdir / name / "a").write_text("")
    other = load(file, ["--config.seed=1"])
    config_lib.guard_workdir(workdir, other, primary=False)
    assert json.loads((workdir / "config.json").read_text())["seed"] == 0  # the others never write
    config_lib.guard_workdir(workdir, other)
    assert json.loads((workdir / "config.json").read_text())["seed"] == 1
    results_in(workdir)
    assert "seed was 1, is 0" in fails(config_lib.guard_workdir, workdir, load(file))


def stored(workdir, **changes):
    """What another version's config.json says; None: it lacks the key."""
    rows = json.loads((workdir / "config.json").read_text()) | changes
    (workdir / "config.json").write_text(json.dumps({k: v for k, v in rows.items() if v is not None}))


def test_directories_of_other_versions(file, tmp_path):
    workdir = config_lib.guard_workdir(tmp_path / "w", load(file))
    results_in(workdir)
    stored(workdir, seed=None)  # a setting that is new since then
    config_lib.guard_workdir(workdir, load(file))
    assert "seed was 0, is 1" in fails(config_lib.guard_workdir, workdir, load(file, ["--config.seed=1"]))
    stored(workdir, gone=1)
    assert "gone was 1, is no setting of this version" in fails(config_lib.guard_workdir, workdir, load(file))


def test_guard_caps_the_list(file, tmp_path):
    workdir = config_lib.guard_workdir(tmp_path / "w", load(file))
    results_in(workdir)
    stored(workdir, **{f"k{i:02}": i for i in range(20)})
    assert "and 8 more" in fails(config_lib.guard_workdir, workdir, load(file))


@pytest.mark.parametrize("content", [b"{", b"[]", b"\xff\xfe", b"[" * 100_000, b""])
def test_guard_rejects_a_damaged_file(file, tmp_path, content):
    (tmp_path / "config.json").write_bytes(content)
    results_in(tmp_path)
    assert "not a config" in fails(config_lib.guard_workdir, tmp_path, load(file))


def test_guard_other_processes_never_write(file, tmp_path):
    config = load(file)
    config_lib.guard_workdir(tmp_path / "w", config, primary=False)
    assert not (tmp_path / "w").exists()
    config_lib.guard_workdir(tmp_path / "w", config)
    results_in(tmp_path / "w")
    other = load(file, ["--config.seed=1"])
    assert "seed" in fails(config_lib.guard_workdir, tmp_path / "w", other, primary=False)


def test_guard_path_at_or_below_a_file(file, tmp_path):
    (tmp_path / "f").write_text("")
    for path in (tmp_path / "f", tmp_path / "f" / "below"):
        message = fails(config_lib.guard_workdir, path, load(file))
        assert message == f"{path}: not a directory; choose another --workdir"


def test_guard_read_only(file, tmp_path, monkeypatch):
    config = load(file)
    config_lib.guard_workdir(tmp_path / "w", config)

    def denied(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(type(epath.Path(tmp_path)), "write_text", denied)
    message = fails(config_lib.guard_workdir, tmp_path / "w", config)
    assert "cannot be written (Permission denied); choose a --workdir" in message

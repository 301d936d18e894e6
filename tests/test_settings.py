"""The schema: what is allowed of every setting, and that it says what the components have."""

import dataclasses
import json
import pathlib
import subprocess
import sys

import pytest

from mmprm_jax import cli, config, schema, settings
from mmprm_jax.records import UserError
from mmprm_jax.settings import Config

ROOT = pathlib.Path(__file__).parents[1]
DIGITS = str(ROOT / "configs" / "digits.py")
FILES = [
    DIGITS,
    f"{DIGITS}:smoke",
    *(str(ROOT / "configs" / name) for name in ("small.py", "small.py:smoke", "mm_prm.py")),
]
LEAVES = {key: (field, kind) for key, field, kind, _ in schema.leaves(Config())}


def told(*overrides, file=DIGITS):
    """The lines of the UserError, without the heading of several; none if all is well."""
    try:
        config.load(file, [f"--config.{item}" for item in overrides])
    except UserError as error:
        lines = str(error).split("\n")
        return [line.strip() for line in (lines if len(lines) == 1 else lines[1:])]
    return []


@pytest.mark.parametrize("file", FILES)
def test_the_configs_that_come_with_the_package(file):
    assert told(file=file) == []


@pytest.mark.parametrize(
    ("override", "words"),
    [
        # a name that there is not
        ("train_prm.label=sotf", "'sotf' is not one of soft, hard, beta_binomial; did you mean soft?"),
        ("sft.optimizer.name=adam", "'adam' is not one of adamw, adafactor, muon"),
        ("train_prm.optimizer.moments=fp8", "'fp8' is not one of float32, bfloat16"),
        ("sft.dtype=fp16", "'fp16' is not one of float32, bfloat16"),
        ("annotate.dtype=fp16", "'fp16' is not one of"),
        ("evaluate.dtype=fp16", "'fp16' is not one of"),
        ("sft.freeze=visoin", "'visoin' is no part of the model, which has vision, projector, decoder"),
        ("train_prm.freeze=vision,kappa", "'kappa' is no part of the model"),
        ("model.remat=al", "'al' is not one of none, full"),
        ("annotate.mode=papr", "did you mean paper?"),
        ("train_prm.mode=flat", "'flat' is not one of default, paper"),
        ("annotate.template=inernvl", "did you mean internvl?"),
        ("annotate.steps=structured", "'structured' is not one of tags, structure, auto; did you mean structure?"),
        ("evaluate.steps=tag", "did you mean tags?"),
        ("annotate.max_unread=1.1", "1.1 is not allowed; it must be at least 0 and at most 1"),
        ("evaluate.max_unread=nan", "nan is not allowed"),
        ("annotate.unread_after=0", "0 is not allowed; it must be at least 1"),
        # numbers
        ("evaluate.top_p=9", "9.0 is not allowed; it must be above 0 and at most 1"),
        ("evaluate.top_p=0", "0.0 is not allowed"),
        ("annotate.temperature=-1", "-1.0 is not allowed; it must be at least 0"),
        ("annotate.temperature=inf", "inf is not allowed"),
        ("annotate.min_p=2", "2.0 is not allowed"),
        ("annotate.repetition_penalty=0", "0.0 is not allowed"),
        ("annotate.top_k=-1", "-1 is not allowed"),
        ("annotate.max_new_tokens=0", "0 is not allowed"),
        ("sft.steps=-1", "-1 is not allowed"),
        ("sft.steps=1", "no step is left after the warm-up"),
        ("train_prm.steps=0", "a PRM has to be trained"),
        ("train_prm.batch_size=0", "0 is not allowed; it must be at least 1"),
        ("train_prm.microbatches=0", "0 is not allowed"),
        ("train_prm.microbatches=3", "3 do not divide the 64 rows of batch_size"),
        ("sft.optimizer.learning_rate=nan", "nan is not allowed"),
        ("sft.optimizer.warmup=2", "2.0 is not allowed"),
        ("sft.optimizer.clip=0", "0.0 is not allowed"),
        ("sft.keep=0", "0 is not allowed"),
        ("sft.checkpoint_every=0", "0 is not allowed"),
        ("sft.log_every=0", "0 is not allowed"),
        ("sft.lora_alpha=0", "0.0 is not allowed"),
        ("sft.weights=0", "0.0 is not allowed"),
        ("sft.weights=1,2", "2 for 1 files"),
        ("sft.files=()", "name at least one file"),
        ("evaluate.n=0", "0 is not allowed"),
        ("evaluate.score_rows=0", "0 is not allowed"),
        ("evaluate.calibration_rollouts=0", "0 is not allowed"),
        ("annotate.num_rollouts=0", "0 is not allowed; it must be at least 2"),
        ("annotate.num_rollouts=1", "1 is not allowed; it must be at least 2"),
        ("annotate.slots=0", "0 is not allowed"),
        ("evaluate.slots=0", "0 is not allowed"),
        ("annotate.in_flight=0", "0 is not allowed"),
        ("annotate.trees_per_shard=0", "0 is not allowed"),
        ("annotate.verify_workers=-1", "-1 is not allowed"),
        ("annotate.concurrency=0", "0 is not allowed"),
        ("annotate.alpha=nan", "nan is not allowed"),
        ("train_prm.threshold=1.5", "1.5 is not allowed"),
        ("train_prm.max_paths=0", "0 is not allowed"),
        ("train_prm.trees=false", "none, and no files: name a file of step labels"),
        ("train_prm.files=('',)", "no empty name"),
        ("train_prm.weights=1,2", "2 for the trees and 0 files; give one for each, or none"),
        ("train_prm.weights=0", "0.0 is not allowed"),
        ("guided.width=3", "3 does not divide the 16 beams"),
        ("guided.width=0", "0 is not allowed"),
        ("seed=-1", "-1 is not allowed"),
        ("seed=4294967296", "4294967296 is not allowed"),
        ("max_tiles=0", "0 is not allowed"),
        ("mesh=1,1", "three sizes"),
        ("mesh=0,1,1", "three sizes"),
        ("mesh=-1,-1,1", "three sizes"),
        ("mesh=-2,1,1", "-2 is not allowed"),
        ("data.habit=1.5", "1.5 is not allowed"),
        ("data.text_only=10000000", "there are at most 1,000,000"),
        ("model.vision.num_heads=3", "3 do not divide hidden_size 64"),
        ("model.vision.patch_size=5", "5 does not divide image_size 24"),
        ("model.decoder.num_kv_heads=3", "3 do not divide num_heads 4"),
        ("model.decoder.head_dim=15", "15 is odd"),
        ("model.downsample=4", "4 does not divide the 6 patches"),
        # what does not go together, and what is not there
        ("annotate.servers=http://a:8000/v1", "it names the model that the servers have"),
        ("annotate.template=continue", "for servers only"),
        ("sft.freeze=vision,projector,decoder", "nothing is left to train"),
        ("sft.steps=0", "name the policy to use as it is"),
        ("data.folder=no/such/folder", "no/such/folder: no such folder"),
        ("policy=nosuch", "nosuch: neither a folder nor a hub id"),
        ("annotate.policy=a/b/c", "a/b/c: neither a folder nor a hub id"),
        (f"policy={ROOT / 'tests'}", "no model is in this folder"),
    ],
)
def test_settings_that_cannot_be_are_reported_before_anything_runs(override, words):
    """Each in one line that begins with the key and says what is allowed."""
    (line,) = told(override)
    assert line.startswith(f"{override.partition('=')[0]}: ") or override.startswith(("annotate.servers", "data.text"))
    assert words in line


@pytest.mark.parametrize(
    "bad", ["host:8000", "ftp://host/v1", "http://", "http://u:secret@h/v1", "http://h:x/v1", "http://h/ v"]
)
def test_addresses_that_are_none(bad):
    (line,) = told(f"annotate.servers=('{bad}',)", "annotate.policy=m")
    assert line.startswith("annotate.servers: ") and "secret" not in line


def test_mode_paper_reads_tags():
    for steps in ("structure", "auto"):
        (line,) = told("annotate.mode=paper", f"annotate.steps={steps}")
        assert line.startswith("annotate.steps: ") and "mode paper" in line
    assert told("annotate.mode=paper", "annotate.steps=tags") == []


def test_all_that_is_wrong_is_reported_at_once():
    wrong = [
        "sft.stepz=3",
        "train_prm.label=sotf",
        "sft.batch_size=many",
        "evaluate.n=0",
        "mesh=1,1",
        "data.folder=nowhere",
    ]
    lines = told(*wrong)
    assert len(lines) == len(wrong)
    assert all(any(item.partition("=")[0] in line for line in lines) for item in wrong)


@pytest.mark.parametrize(
    "value", ["-1", "0", "1", "2", str(10**30), "nan", "inf", "-1e400", "1e-320", "wrong", "", "()", "(1,'x')"]
)
def test_every_setting_takes_or_refuses_every_value(value):
    """No value of any setting is a traceback, and what is taken can be made a config again."""
    for key in LEAVES:
        lines = told(f"{key}={value}")
        assert len(lines) <= 3 and all(line.partition(": ")[0] for line in lines), (key, value)


def test_numbers_that_are_none_are_never_taken():
    floats = [key for key, (_, kind) in LEAVES.items() if kind is float or schema.item_kind(kind) is float]
    assert len(floats) > 20
    for key in floats:
        assert told(f"{key}=nan") and told(f"{key}=inf"), key


def test_every_setting_has_a_meaning_and_every_number_a_range():
    for key, (field, kind) in LEAVES.items():
        rule = field.metadata["rule"]
        assert rule.meaning and "\n" not in rule.meaning, key
        if kind is int:
            assert rule.low is not None, key


def test_an_unknown_key_of_a_file_names_the_nearest(tmp_path):
    file = tmp_path / "a.py"
    file.write_text(
        "from ml_collections import ConfigDict\ndef get_config():\n"
        "    return ConfigDict({'evaluate': {'repetition_penalti': 1.1, 'n': 'x'}, 'sft': None, 'mesh': [1, 1, 1.5]})\n"
    )
    assert sorted(told(file=str(file))) == sorted(
        [
            f"{file}: evaluate.repetition_penalti: no such setting; did you mean evaluate.repetition_penalty?",
            f"{file}: evaluate.n: expected int, got 'x'",
            f"{file}: sft: a group of settings, got None",
            f"{file}: mesh: expected tuple of int, got [1, 1, 1.5]",
        ]
    )
    assert f"{file}: sft: a group of settings, got None" in told("sft.steps=3", file=str(file))


def test_the_configs_do_not_know_each_other():
    for file in (ROOT / "configs").glob("*.py"):
        text = file.read_text()
        assert "runpy" not in text and not any(
            f"{other.stem}.py" in text.split('"""')[2] for other in (ROOT / "configs").glob("*.py") if other != file
        )


def test_the_names_are_those_that_there_are():
    from mmprm_jax import stages
    from mmprm_jax.data import prompts
    from mmprm_jax.models import layers
    from mmprm_jax.search import omegaprm
    from mmprm_jax.training import optimizers, trainer

    assert settings.SEARCHES == tuple(omegaprm.SEARCHES)
    assert settings.EXAMPLES == tuple(stages.train_prm.EXAMPLES)
    assert settings.TEMPLATES == tuple(prompts.POLICY_TEMPLATES)
    assert settings.REMAT == tuple(layers.REMAT)
    assert settings.DTYPES == tuple(trainer.DTYPES) == tuple(optimizers.MOMENTS)
    for name in settings.OPTIMIZERS:
        optimizers.make(settings.Optimizer(name), 10)


def test_a_component_takes_its_part_whole():
    from mmprm_jax.rollout.sampling import Sampling

    c = config.load(DIGITS)
    assert schema.from_config(Sampling, c.annotate, stop=(3,)) == Sampling(0.7, 50, 0.9, 0.0, 1.0, 40, (3,))
    with pytest.raises(AttributeError):  # nothing is left out in silence
        schema.from_config(Sampling, c.guided, stop=())


def test_mmprm_config(capsys):
    cli.run(["config", f"--config={DIGITS}", "--config.sft.steps=77"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" = ")[0] for line in lines] == list(LEAVES)
    (steps,) = [line for line in lines if line.startswith("sft.steps ")]
    assert steps.split() == ["sft.steps", "=", "77", "default", "1000", "updates"]
    cli.run(["config", f"--config={DIGITS}", "--check"])
    assert "settings are allowed" in capsys.readouterr().out


def test_a_wrong_setting_is_reported_without_the_numeric_libraries(tmp_path):
    """One line, exit code 2, no work directory; and in the time that reading takes."""
    code = "import sys; from mmprm_jax import main\ntry: main.run()\nfinally: assert 'jax' not in sys.modules"
    words = ["pipeline", f"--config={DIGITS}", f"--workdir={tmp_path / 'w'}", "--config.train_prm.label=sotf"]
    out = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True)
    assert out.returncode == 2 and out.stderr == (
        "mmprm: train_prm.label: 'sotf' is not one of soft, hard, beta_binomial; did you mean soft?\n"
    )
    assert not (tmp_path / "w").exists()


def test_a_config_file_is_its_own_json(tmp_path):
    """What config.json keeps gives the same config again."""
    c = config.load(DIGITS + ":smoke", ["--config.sft.files=a.jsonl,b.jsonl", "--config.sft.weights=1,2"])
    again, wrong = schema.build(Config, json.loads(config.to_text(c)))
    assert not wrong and again == c and dataclasses.asdict(again) == dataclasses.asdict(c)

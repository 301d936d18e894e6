"""The command line: what the help lists, how wrong command lines are told, and that nothing slow is imported for it."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from mmprm_jax import cli, config
from mmprm_jax.cli import command as commands
from mmprm_jax.cli.command import FAMILIES, GROUPS, TABLE, find, parse
from mmprm_jax.errors import UsageError, UserError

ROOT = Path(__file__).parents[1]
DIGITS = str(ROOT / "configs" / "digits.py")
RUN = [f"--config={DIGITS}", "--workdir=w"]
FOLDERS = ("mmprm_jax", "configs", "launch", "findings", "notebooks", "tests")
READMES = [ROOT / "README.md", *(path for name in FOLDERS for path in sorted((ROOT / name).rglob("README.md")))]


def told(*words):
    """The line of a wrong command line."""
    with pytest.raises(UsageError) as error:
        parse(words)
    line = str(error.value)
    assert "\n" not in line
    return line


def test_the_help_lists_every_command_once_by_group(mmprm_here):
    done = mmprm_here()
    assert done.returncode == 0 and done.stderr == ""
    assert done.stdout == mmprm_here("--help").stdout == mmprm_here("-h").stdout == mmprm_here("help").stdout
    lines = done.stdout.splitlines()
    assert [line[:-1] for line in lines if line.endswith(":") and line[0] != " "] == list(GROUPS)
    listed = [line.split()[0] for line in lines if line.startswith("  ")]
    assert sorted(listed) == sorted({name.split()[0] for name in TABLE})
    for family in FAMILIES.values():  # each of their members is in its line
        (line,) = [line for line in lines if line.startswith(f"  {family.name} ")]
        assert all(member.name.split()[1] in line for member in family.members())
        assert all(member.name in mmprm_here(family.name, "--help").stdout for member in family.members())
    assert max(map(len, lines)) <= 120


@pytest.mark.parametrize("name", TABLE)
def test_the_help_of_a_command(name, mmprm_here):
    """Every option with its meaning and its default, or that it is required, and an example that is one."""
    done = mmprm_here(*name.split(), "--help")
    assert done.returncode == 0 and done.stderr == ""
    assert done.stdout == mmprm_here(*name.split(), "-h").stdout
    found, text = TABLE[name], " ".join(done.stdout.split())
    assert found.example in done.stdout and found.summary[1:] in text
    for option in found.options:
        assert " ".join((option.settings["help"] % {}).split()) in text
        if option.name.startswith("-"):
            assert re.search(r"\((default: \S.*|required)\)$", option.settings["help"]), option.name
    parsed, args = parse(shlex.split(found.example)[1:])
    assert parsed is found and args is not None


SLOW = ("jax", "numpy", "flax", "absl", "etils", "ml_collections", "importlib.metadata")


@pytest.mark.parametrize(
    ("words", "code"),
    [
        ([], 0),
        (["--help"], 0),
        (["launch", "--help"], 0),
        (["nosuch"], 2),
        (["sft"], 2),
        (["bon", "--workdir=x"], 2),
        *(([*name.split(), "--help"], 0) for name in ("pipeline", "bench rollout", "launch tpu", "list models")),
    ],
)
def test_nothing_slow_is_imported_before_the_command_is_known(words, code):
    program = (
        "import sys\nfrom mmprm_jax import main\ntry: main.run()\n"
        f"finally: assert not [name for name in {SLOW} if name in sys.modules], sorted(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program, *words], capture_output=True, text=True)
    assert done.returncode == code, done.stderr
    assert len(done.stderr.splitlines()) == (1 if code else 0)


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["anotate"], "anotate: no such command; did you mean annotate?"),
        (["launch", "slrum"], "launch slrum: no such command; did you mean launch slurm?"),
        (["list"], "list: say which, mmprm list sources or"),
        (["--config=a", "sft"], "--config=a: the command comes first"),
        (["sft", *RUN, "--force_stge=sft"], "sft: no option --force-stge; did you mean --force-stage?"),
        (["sft", "--cofnig=x"], "sft: no option --cofnig; did you mean --config?"),
        (["sft", *RUN, "--judge=x"], "sft: no option --judge, which is one of verify"),
        (["sft", *RUN, "--prm"], "sft: no option --prm, which is one of convert"),
        # what was accepted, and did nothing
        (["annotate", *RUN, "--mode=paper"], "did you mean --config.annotate.mode?"),
        (
            ["sft", *RUN, "--max_tiles=3"],
            "no option --max-tiles, which is one of score; did you mean --config.max_tiles?",
        ),
        (["report", *RUN, "--distributed"], "report: no option --distributed, which is one of"),
        (["bon", "x", "--config.seed=1"], "bon: no option --config.seed"),
        (["sft", *RUN, "-x"], "sft: no option -x"),
        (["sft"], "sft: the following arguments are required: --config, --workdir"),
        (["sft", "--config"], "sft: --config: expected one argument"),
        (["sft", *RUN, "more"], "sft: unrecognized arguments: more"),
        (["sft", *RUN, "--force-stage=annotate"], "sft: --force-stage: invalid choice: 'annotate'"),
        (["sft", *RUN, "--distributed=yes"], "sft: --distributed: ignored explicit argument 'yes'"),
        (["score", "x", "--model=m", "--max-tiles=-1"], "score: --max-tiles: -1 is not allowed; at least 0"),
        (["score", "x", "--model=m", "--max-tiles=few"], "--max-tiles: expected a whole number, got 'few'"),
        (["detect", "x", "--threshold=nan"], "detect: --threshold: expected a number from 0 to 1"),
        (["convert", "a"], "convert: the following arguments are required: target"),
    ],
)
def test_a_wrong_command_line_is_one_line(words, line):
    assert line in told(*words)


@pytest.mark.parametrize(
    "words",
    [
        ["prepare", "mm_k12", "x", "--output=o", "--rewriter=http://a/v1"],
        ["prepare", "mm_k13", "x", "--output=o"],
        ["verify", "x", "--judge=http://a/v1"],
        ["verify", "x", "--mode=nosuch"],
        ["sweep", *RUN],
        ["sweep", *RUN, "--grid=evaluate.n=1,2"],
        ["guide", *RUN, "--search=bean"],
        ["benchmark", "x", *RUN, "--scoring=nosuch"],
        ["bon", "x", "--mode=paper", "--dev=y"],
        ["fit", "--model=internvl2_5-8b", "--topology=v5e-32", "rowz=1"],
        ["bench", "train", "nosuch"],
        ["launch", "local", "--processes=2", "--", "sft", *RUN, "--mode=paper"],
        ["pipeline", *RUN, "--config.sft.stepz=1"],
        ["pipeline", *RUN, "--config.sft.steps=-1"],
        ["pipeline", *RUN, "--config.seed"],
    ],
)
def test_what_does_not_go_together_is_usage_too(words, mmprm_here, tmp_path, monkeypatch):
    """Exit code 2, one line, nothing made."""
    monkeypatch.chdir(tmp_path)
    done = mmprm_here(*words)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("mmprm: ") and len(done.stderr.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_failures_at_work_have_exit_code_1_and_a_traceback_on_demand(mmprm_here, tmp_path):
    words = ["score", str(tmp_path / "none.jsonl"), "--model=m"]
    done = mmprm_here(*words)
    assert done.returncode == 1 and done.stderr == f"mmprm: {tmp_path / 'none.jsonl'}: no such file\n"
    for debugged in (["--debug", *words], [*words, "--debug"]):
        again = mmprm_here(*debugged)
        assert again.returncode == 1 and again.stderr.endswith(done.stderr)
        assert again.stderr.startswith("Traceback") and "in score" in again.stderr


def test_every_spelling():
    _, args = parse(["score", "x", "--model", "m", "--max_tiles", "3"])
    assert (args.file, args.model, args.max_tiles) == ("x", "m", 3)
    _, args = parse(["score", "--max-tiles=3", "--model=m", "x"])
    assert (args.file, args.model, args.max_tiles) == ("x", "m", 3)
    for name in ("--force-stage=sft", "--force_stage=sft"):
        assert parse(["pipeline", *RUN, name])[1].force_stage == "sft"
    _, args = parse(
        ["pipeline", "--config.seed", "3", *RUN, "--config.sft.files=a_b-c.jsonl", "--config.mesh", "-1,1,1"]
    )
    assert args.overrides == ["--config.seed=3", "--config.sft.files=a_b-c.jsonl", "--config.mesh=-1,1,1"]
    _, args = parse(["fit", "rows=1", "--topology=v5e-8", "tiles=2", "--model=m"])
    assert args.settings == ["rows=1", "tiles=2"]
    _, args = parse(["launch", "slurm", "--gpus=1", "--time=1", "--sbatch=--mem_bind=x", "--", "sft", "--a_b"])
    assert args.sbatch == ["--mem_bind=x"] and args.rest == ["sft", "--a_b"]


def test_which_commands_go_on():
    assert cli.resumes(["pipeline", *RUN]) and cli.resumes(["launch", "tpu"]) and cli.resumes(["sweep"])
    assert not cli.resumes(["verify", "x"]) and not cli.resumes([]) and not cli.resumes(["launch"])


def lines_of_code(text):
    """The command lines of the bash blocks."""
    for block in re.findall(r"```bash\n(.*?)```", text, re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.shlex(line, posix=True, punctuation_chars=";&|")
            words.whitespace_split = True
            words = [*words, ";"]
            while "mmprm" in words:
                words = words[words.index("mmprm") + 1 :]
                end = next(i for i, word in enumerate(words) if set(word) <= set(";&|"))
                yield words[:end]


def test_the_commands_of_the_readmes_are_commands():
    found = [words for path in READMES for words in lines_of_code(path.read_text())]
    assert len(found) > 25 and {"pipeline", "prepare", "launch", "fit"} <= {words[0] for words in found}
    for words in found:
        command, args = parse(words)
        if command.wraps:
            parse(args.rest)


def test_the_commands_between_words_have_the_options_that_they_are_said_to_have():
    texts = [path.read_text() for path in (*READMES, *(ROOT / "configs").glob("*.py"))]
    found = 0
    for quoted in (x for text in texts for x in re.findall(r"`+mmprm\s([^`]+)`+", text)):
        words = shlex.split(quoted.replace("[", " ").replace("]", " ").replace(" | ", " "))
        command = find(words)
        if command is None:
            assert words[0] in (*FAMILIES, "COMMAND"), quoted
            continue
        commands._split(command, words[len(command.name.split()) :])  # raises for an unknown option
        found += 1
    assert found > 15


def anchors(path):
    """The anchors of a page: its headings in lower case, with hyphens for spaces and without other signs."""
    headings = re.findall(r"^#+ (.*)$", path.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", READMES, ids=lambda path: str(path.relative_to(ROOT)))
def test_the_links_of_the_readmes_lead_somewhere(path):
    for link in re.findall(r"\]\(([^)]+)\)", path.read_text()):
        if link.startswith("https://"):
            continue
        target, _, anchor = link.partition("#")
        found = (path.parent / target).resolve() if target else path
        assert found.exists(), link
        assert not anchor or anchor in anchors(found), link


def test_the_readme_is_short_and_leads_to_all_others():
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 250
    links = {(ROOT / link.partition("#")[0]).resolve() for link in re.findall(r"\]\(([^)]+)\)", text)}
    data = ROOT / "tests" / "golden"  # its folders describe themselves
    assert {path for path in READMES[1:] if data not in path.parents} <= links


def test_version(mmprm_here):
    done = mmprm_here("--version")
    assert done.returncode == 0 and re.fullmatch(r"mmprm \d+\.\d+\.\d+\n", done.stdout)


def test_env_without_a_device(mmprm_here, monkeypatch):
    def fail():
        raise RuntimeError("Unable to initialize backend\n 'cuda'")

    monkeypatch.setattr("jax.devices", fail)
    done = mmprm_here("env")
    assert done.returncode == 0 and "devices: none: Unable to initialize backend 'cuda'\n" in done.stdout


def test_env(mmprm_here, monkeypatch):
    monkeypatch.setenv("XLA_TEST", "x")
    monkeypatch.setenv("HF_TOKEN", "secret")
    out = mmprm_here("env").stdout
    assert "XLA_TEST: x\n" in out and "secret" not in out  # it is pasted into a public place
    for name in ("python", "mmprm_jax", "jax", "platform", "cpu", "devices"):
        assert re.search(rf"^{name}: \S", out, re.MULTILINE), name


@pytest.mark.parametrize(
    ("what", "some"),
    [
        ("sources", ["mm_k12", "geo170k", "Cierra0506/MM-K12"]),
        ("benchmarks", ["mathvista", "testmini", "mmprm detect"]),
        ("models", ["internvl2_5-8b", "4096"]),
        ("configs", ["digits.py", "The embedded default"]),
    ],
)
def test_list(what, some, mmprm_here):
    done = mmprm_here("list", what)
    assert done.returncode == 0 and all(word in done.stdout for word in some)


def test_the_example_configs_are_copied_but_replace_nothing(tmp_path, mmprm_here, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert mmprm_here("list", "configs", "--copy").returncode == 0
    assert mmprm_here("list", "configs", "--copy=other/place").returncode == 0
    names = {path.name: path.read_bytes() for path in (ROOT / "configs").glob("*.py")}
    for folder in ("configs", "other/place"):
        assert {path.name: path.read_bytes() for path in (tmp_path / folder).iterdir()} == names
        config.load(f"{folder}/digits.py")
    (tmp_path / "configs" / "small.py").write_text("# mine")
    done = mmprm_here("list", "configs", "--copy")
    assert done.returncode == 1 and "configs/small.py: is there and differs" in done.stderr
    assert (tmp_path / "configs" / "small.py").read_text() == "# mine"


def test_a_wheel_has_the_example_configs(tmp_path, monkeypatch):
    """Inside of the package, where ``config.examples`` looks first."""
    setup = (ROOT / "setup.py").read_text()
    assert '"mmprm_jax.configs": "configs"' in setup
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "one.py").write_text("")
    monkeypatch.setattr(config, "__file__", str(tmp_path / "config.py"))
    assert [path.name for path in config.examples()] == ["one.py"]


def test_a_missing_config_file_says_where_examples_are(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="mmprm list configs --copy"):
        config.load("digits.py")

"""Problems held out for development and test."""

import pytest

from mmprm_jax import cli, records
from mmprm_jax.data import split
from mmprm_jax.records import Problem, UserError


def problem(i, image=None, question=None):
    return Problem(str(i), question or f"What is {i}?", "1", (image,) if image else ())


PROBLEMS = [problem(i, f"images/{i // 2}.png") for i in range(40)] + [problem(i) for i in range(40, 60)]


def test_every_problem_is_in_one_part():
    parts = split.split(PROBLEMS, 9, 15)
    assert {name: len(part) for name, part in parts.items()} == {"test": 15, "dev": 9, "train": 36}
    assert sorted(sum(parts.values(), []), key=lambda p: int(p.id)) == PROBLEMS
    assert all(part == sorted(part, key=PROBLEMS.index) for part in parts.values())


def test_what_is_one_problem_stays_together():
    same = [problem("a", question="How  many?"), problem("b", question="how many?")]
    figures = [problem("c", "x.png", "How many?"), problem("d", "y.png", "How many?")]
    assert [len(group) for group in split.groups([*same, *figures])] == [2, 1, 1]
    for seed in range(5):
        parts = split.split(PROBLEMS, 10, 16, seed)
        images = [{name for p in part for name in p.images} for part in parts.values()]
        assert sum(map(len, images)) == len(set.union(*images)) == 20


def test_no_part_is_larger_than_asked_for():
    """Ten figures of seven problems each: one for dev, one for test."""
    problems = [problem(i, f"{i % 10}.png") for i in range(70)]
    for seed in range(3):
        assert {name: len(part) for name, part in split.split(problems, 8, 13, seed).items()} == {
            "test": 7, "dev": 7, "train": 56
        }  # fmt: skip


def test_the_choice_depends_on_the_texts_and_the_seed():
    chosen = {p.id for p in split.split(PROBLEMS, 9, 15)["test"]}
    assert {p.id for p in split.split(PROBLEMS[::-1], 9, 15)["test"]} == chosen
    assert {p.id for p in split.split(PROBLEMS, 9, 15, seed=1)["test"]} != chosen


def test_the_command(tmp_path, capsys):
    path = tmp_path / "all.jsonl"
    records.write(path, PROBLEMS)
    cli.run(["split", str(path), "--dev=9", "--test=15"])
    wanted = split.split(PROBLEMS, 9, 15)
    assert {name: records.read_all(tmp_path / f"{name}.jsonl", Problem) for name in wanted} == wanted
    assert "train.jsonl: 36" in capsys.readouterr().out
    with pytest.raises(UserError, match="train.jsonl: would be replaced"):
        cli.run(["split", str(tmp_path / "train.jsonl"), "--dev=1", "--test=1"])
    for dev, test, name in ((0, 9, "dev"), (9, 60, "dev"), (30, 30, "train")):
        with pytest.raises(UserError, match=f"none for {name}"):
            cli.run(["split", str(path), f"--dev={dev}", f"--test={test}"])
    (tmp_path / "folder").mkdir()
    with pytest.raises(UserError, match="directory"):
        cli.run(["split", str(tmp_path / "folder"), "--dev=1", "--test=1"])
    records.write(path, [*PROBLEMS, PROBLEMS[7]])
    with pytest.raises(UserError, match="the id '7' is there twice"):
        cli.run(["split", str(path), "--dev=1", "--test=1"])


def test_an_image_joins_all_its_problems():
    several = [Problem(name, "q", "1", images) for name, images in (
        ("a", ("x", "y")), ("b", ("z",)), ("c", ("w", "v")), ("d", ("y", "z")), ("e", ("u",)),
    )]  # fmt: skip
    groups = split.groups(several)
    assert sorted(sorted(p.id for p in group) for group in groups) == [["a", "b", "d"], ["c"], ["e"]]

"""Trees and step labels as rows of other projects: what was written is read again, with the same labels."""

import json

import pytest
from PIL import Image

from mmprm_jax import cli, records
from mmprm_jax.cli.data import EXPORTS
from mmprm_jax.data import export
from mmprm_jax.records import Node, Problem, Rollout, StepExample, Tree, UserError
from mmprm_jax.search import labels

SOURCES = {"trl": "trl_stepwise", "mm_prm": "mm_prm", "visualprm": "visualprm400k_raw"}
STEPS = ("<step> 3 + 4 = 7 </step>", "<step>So 7,\n\nor 7.0.</step>", "<answer> 7 </answer>")
PLAIN = ("3 + 4 = 7", "So 7,\n\nor 7.0.", "7")
# every kind of label: counts, none, right, wrong, a number
EXAMPLES = [
    StepExample("counts", "p", "<image> What?", STEPS, (3, 16, 0), (8, 16, 1), ("a.png",)),
    StepExample("masked", "p", "What?", STEPS, (0, 5, 1), (0, 9, 1), ("a.png", "b.png")),
    StepExample("trailing", "q", "Which?\nThis?", STEPS, (1, 0, 0), (3, 16, 0)),
    StepExample("number", "r", "Which?", STEPS, (0.1, 0, 1 / 3), (1, 0, 1)),
    StepExample("mixed", "r", "Where: ?", STEPS, (0.7, 2, 1), (1, 3, 1), ("b.png",)),
]


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    for name, color in (("a.png", "red"), ("b.png", "blue")):
        Image.new("RGB", (8, 6), color).save(folder / name)
    records.write(folder / "labels.jsonl", EXAMPLES)
    return folder


def run(*argv):
    cli.run([str(word) for word in argv])


def again(form, rows, out):
    """What ``mmprm prepare`` reads of exported rows."""
    run("prepare", SOURCES[form], rows, f"--output={out}")
    return records.read_all(out / "labels.jsonl", StepExample)


def joined(example):
    """(text up to there, k, n) of each label."""
    text, found = "", []
    for segment, k, n in zip(example.segments, example.k, example.n, strict=True):
        text += ("\n\n" if text else "") + segment
        found += [(text, k, n)] * (n > 0)
    return found


@pytest.mark.parametrize("form", EXPORTS)
def test_what_was_written_is_read_again_with_the_same_labels(folder, tmp_path, form):
    assert tuple(export.FORMATS) == EXPORTS == tuple(SOURCES)
    rows = tmp_path / "out" / "rows.jsonl"
    run("export", folder / "labels.jsonl", rows, f"--format={form}")
    found = again(form, rows, tmp_path / "again")
    assert [x.id for x in found] == [x.id for x in EXAMPLES]
    for read, given in zip(found, EXAMPLES, strict=True):
        plain = StepExample(given.id, given.problem_id, given.question, PLAIN, given.k, given.n)
        assert joined(read) == joined(plain), given.id
        if form != "mm_prm":  # which has no step without a label
            assert (read.segments, read.k, read.n) == (PLAIN, given.k, given.n), given.id
        # an image in front of the question needs no tag
        assert read.question == given.question.removeprefix("<image> "), given.id
        pixels = [Image.open(tmp_path / "again" / name).getpixel((0, 0)) for name in read.images]
        assert pixels == [Image.open(folder / name).getpixel((0, 0)) for name in given.images], given.id
    first = rows.read_bytes()
    run("export", tmp_path / "again/labels.jsonl", rows, f"--format={form}")  # and a second time
    assert again(form, rows, tmp_path / "third") == found
    run("export", folder / "labels.jsonl", rows, f"--format={form}")
    assert rows.read_bytes() == first


def test_the_rows_are_those_that_the_other_projects_read(folder, tmp_path):
    found = {}
    for form in EXPORTS:
        run("export", folder / "labels.jsonl", tmp_path / f"{form}.jsonl", f"--format={form}")
        found[form] = [json.loads(line) for line in (tmp_path / f"{form}.jsonl").read_text().splitlines()]
    assert found["trl"][2] == {
        "id": "trailing", "prompt": "Which?\nThis?", "completions": list(PLAIN), "labels": [1 / 3, 0.0, -100.0],
        "prm_counts": {"k": [1, 0, 0], "n": [3, 16, 0]},
    }  # fmt: skip
    assert all(type(x) is float for row in found["trl"] for x in row["labels"])
    masked = found["mm_prm"][1]
    said = "Question: <image>\n<image>\nWhat?\nProcess: 3 + 4 = 7\n\nSo 7,\n\nor 7.0.<prm>\n\n7<prm>"
    assert masked["conversations"] == [{"from": "human", "value": said}, {"from": "gpt", "value": [5 / 9, 1.0]}]
    assert len(masked["image"]) == 2 and "image" not in found["mm_prm"][2] and masked["prm_counts"]["n"] == [9, 1]
    assert isinstance(found["mm_prm"][0]["image"], str)
    raw = found["visualprm"][4]
    assert raw["question"] == "<image>\nWhere: ?" and raw["response"] == "\n\n".join(PLAIN)
    assert raw["steps_with_score"] == [
        {"step": PLAIN[0], "score": 0.7, "num_mc_correct": None, "num_mc_total": None},
        {"step": PLAIN[1], "score": 2 / 3, "num_mc_correct": 2, "num_mc_total": 3},
        {"step": PLAIN[2], "score": 1.0, "num_mc_correct": 1, "num_mc_total": 1},
    ]
    run("export", folder / "labels.jsonl", tmp_path / "tags.jsonl", "--format=trl", "--tags")
    assert json.loads((tmp_path / "tags.jsonl").read_text().splitlines()[0])["completions"] == [*STEPS]


def tree(name, right):
    wrong = (STEPS[0], "<answer> 8 </answer>")
    rollouts = (Rollout(STEPS, True, 9), Rollout(wrong, False, 7))
    below = Node(0, STEPS[:1], right, 4, 0, ())
    return Tree(Problem(name, "What?", "7", ("a.png",)), (Node(-1, (), 1, 2, 1, rollouts), below), ((0, 1),))


def test_trees_are_labelled_as_the_training_does(folder, tmp_path):
    """Of a run's folder the images are those of its data."""
    run_folder = tmp_path / "run"
    (run_folder / "data").mkdir(parents=True)
    (run_folder / "config.json").write_text("{}")
    (folder / "a.png").rename(run_folder / "data/a.png")
    trees = [tree(f"t{i}", i) for i in range(3)]
    records.write(run_folder / "annotate/trees-000000.jsonl", trees[:2])
    records.write(run_folder / "annotate/trees-000002.jsonl", trees[2:])
    run("export", run_folder / "annotate", tmp_path / "rows.jsonl", "--format=trl", "--seed=3", "--tags")
    wanted = [x for t in trees for x in labels.step_examples(t, labels.LabelSettings(), 3)]
    found = again("trl", tmp_path / "rows.jsonl", tmp_path / "again")
    assert [(x.id, x.segments, x.k, x.n) for x in found] == [(x.id, x.segments, x.k, x.n) for x in wanted]
    run("export", run_folder / "annotate/trees-000002.jsonl", tmp_path / "one.jsonl", "--format=trl", "--max-paths=1")
    assert len(again("trl", tmp_path / "one.jsonl", tmp_path / "one")) == 1
    run("export", run_folder / "annotate", tmp_path / "paper.jsonl", "--format=mm_prm", "--mode=paper")
    assert again("mm_prm", tmp_path / "paper.jsonl", tmp_path / "paper")


def test_what_cannot_be_written(folder, tmp_path, capsys):
    """One line that names the row; what a format cannot hold is counted, and nothing at all is an error."""
    target = tmp_path / "rows.jsonl"

    def message(*examples, form="mm_prm", source=None):
        path = source or folder / "some.jsonl"
        if examples:
            records.write(path, examples)
        with pytest.raises(UserError) as error:
            run("export", path, target, f"--format={form}")
        assert not target.exists()
        return str(error.value)

    good = EXAMPLES[0]
    lost = StepExample("lost", "p", "q", STEPS, (1, 1, 1), (1, 1, 1), ("no.png",))
    assert message(good, lost) == f"{folder / 'some.jsonl'}, line 2: lost: no.png: image not found"
    more = StepExample("more", "p", "q", STEPS, (1, 3, 1), (1, 2, 1))
    assert "line 1: more: needs counts 0 <= k <= n for each of its 3 steps" in message(more)
    part = StepExample("part", "p", "q", STEPS, (1, 1.5, 1), (1, 2, 1))
    assert "line 1: part: k 1.5 of n 2 is no whole number" in message(part)
    none = StepExample("none", "p", "q", STEPS, (0, 0, 0), (0, 0, 0))
    assert message(none).endswith("nothing to write; left out 1 (no label), e.g. none")
    empty = StepExample("empty", "p", "q", ("<step> </step>",), (1,), (1,))
    marks = StepExample("marks", "p", "q", ("a<prm>b",), (1,), (1,))
    both = StepExample("both", "p", "q\nProcess: r", ("a",), (1,), (1,))
    said = message(empty, marks, both)
    assert "1 (an empty step), e.g. empty" in said and "'<prm>' is in 'a<prm>b'" in said and "'Process:' is in" in said
    assert "no such file or folder" in message(source=tmp_path / "nowhere")
    assert "neither examples.jsonl nor trees-*.jsonl" in message(source=folder)
    alike = Tree(Problem("p", "q", "7"), (Node(-1, (), 1, 1, 0, (Rollout(STEPS, True, 9),)),), ())
    assert "there are no step examples (a tree needs" in message(alike)
    (folder / "some.jsonl").write_text('{"id": "x"}\n')
    assert "line 1: not a StepExample: missing keys" in message(source=folder / "some.jsonl")
    records.write(folder / "some.jsonl", [none, good])
    run("export", folder / "some.jsonl", target, "--format=trl")
    assert "left out 1 (no label), e.g. none" in capsys.readouterr().err
    with pytest.raises(UserError, match="is read, and would be replaced"):
        run("export", target, target, "--format=trl")
    with pytest.raises(UserError, match="end the file's name in .jsonl"):
        run("export", target, tmp_path / "rows.json", "--format=trl")
    with pytest.raises(UserError, match="--max-paths=1 with --balance"):
        run("export", target, tmp_path / "x.jsonl", "--format=trl", "--balance", "--max-paths=1")

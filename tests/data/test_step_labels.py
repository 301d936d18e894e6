"""Step labels that others made: every form's labels worked out by hand, and what is wrong with damaged rows."""

import io
import json
import math

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from mmprm_jax import cli, records
from mmprm_jax.data import selection, sources
from mmprm_jax.data.sources_base import Refused
from mmprm_jax.records import StepExample, UserError

SYSTEM = {"from": "system", "value": "Judge the steps."}


def turns(*said):
    """A chat: what is said, a human's and a gpt's in turn."""
    return [{"from": "gpt" if i % 2 else "human", "value": value} for i, value in enumerate(said)]


def scored(step, score, k=None, n=None):
    return {"step": step, "score": score, "num_mc_correct": k, "num_mc_total": n}


def rated(*pairs, chosen=None, human=None):
    return {
        "completions": [{"text": text, "rating": rating, "flagged": False} for text, rating in pairs] or None,
        "human_completion": human, "chosen_completion": chosen,
    }  # fmt: skip


def prm800k(*steps):
    return {"labeler": "x", "question": {"problem": "How many?", "ground_truth_answer": "4"},
            "label": {"steps": list(steps), "finish_reason": "solution"}}  # fmt: skip


TRL = {"prompt": "2 + 3?", "completions": ["2 + 3 = 5", "So 6."], "labels": [True, False]}
PROCESS = "Question: Which side?\nProcess: It is AB.<prm>\n\nAB = 3, so\n\nBC = 4.<prm>\n\n5<prm>"
MM_PRM = {"id": 0, "image": "a.png", "conversations": turns(PROCESS, [1.0, 0.4375, 0.0])}
VISUAL = {"id": 7, "image": ["a.png", "b.png"], "conversations": [SYSTEM, *turns(
    "### Question:\n<image>\n<image>\nWhich is larger?\n\n### Solution Process:\nThe first has 3.", "+",
    "The second has 5.", "+", "The first is larger.", "-")]}  # fmt: skip
RAW = {"image": "VisualPRM400K-v1.1-Raw/set/a.png", "question": "<image>\nHow long is x? Explain.", "answer": "3",
       "question_orig": "How long is x?", "response": "r", "num_mc_sequences": 16, "steps_with_score": [
           scored("x + 1 = 4", 0.8125, 13, 16), scored("x = 5", 0.0, 0, 16), scored("The answer: 5", 0.0, 0, 0),
       ]}  # fmt: skip
SEEN = "### Question:\nWhat is red?\n\n### Solution Process:\n[Visual Elements]\n<step_1>\nA ball.\n</step_1>"
CONCLUDED = "[Reasoning]\n<step_1>So the box is red.</step_1>"
VL = {"id": "u-1", "image": "a.png", "first_incorrect_step": ["Reasoning", 0], "steps_with_score": [],
      "conversations": [SYSTEM, *turns(SEEN, "+", CONCLUDED, "-")]}  # fmt: skip
SHEPHERD = {"input": "Tom has 2. How many? Step 1: He has 2 ки\nStep 2: 2 + 2 = 5 ки\nStep 3: The answer is: 5 ки",
            "label": "Tom has 2. How many? Step 1: He has 2 +\nStep 2: 2 + 2 = 5 -\nStep 3: The answer is: 5 -",
            "task": "GSM8K"}  # fmt: skip
BENCH = {"id": "math-3", "problem": "Solve.", "steps": ["a", "b", "c"], "label": 1, "final_answer_correct": False}

# source: rows, and of each example its question, steps, k, n and number of images
GOOD = {
    "trl_stepwise": [
        (TRL, ("2 + 3?", ["2 + 3 = 5", "So 6."], [1, 0], [1, 1], 0)),
        (TRL | {"labels": [0.1, 1.0]}, ("2 + 3?", ["2 + 3 = 5", "So 6."], [0.1, 1], [1, 1], 0)),
        (TRL | {"labels": [1, -100], "images": ["a.png"]}, ("2 + 3?", ["2 + 3 = 5", "So 6."], [1, 0], [1, 0], 1)),
        (TRL | {"labels": [None, 1 / 3]}, ("2 + 3?", ["2 + 3 = 5", "So 6."], [0, 1 / 3], [0, 1], 0)),
        (TRL | {"labels": [0.375, -100.0], "prm_counts": {"k": [3, 0], "n": [8, 0]}},
         ("2 + 3?", ["2 + 3 = 5", "So 6."], [3, 0], [8, 0], 0)),
        (TRL | {"labels": [0.375, 0.3], "prm_counts": {"k": [3.0, 0.3], "n": [8, 1]}},
         ("2 + 3?", ["2 + 3 = 5", "So 6."], [3, 0.3], [8, 1], 0)),
    ],
    "mm_prm": [
        (MM_PRM, ("Which side?", ["It is AB.", "AB = 3, so\n\nBC = 4.", "5"], [1, 0.4375, 0], [1, 1, 1], 1)),
        ({"conversations": turns("Question: q <image>\nProcess: s<prm>", [0.5]), "image": ["a.png"], "prm_counts":
          {"k": [8], "n": [16]}}, ("q <image>", ["s"], [8], [16], 1)),
    ],
    "visualprm400k": [
        (VISUAL, ("Which is larger?", ["The first has 3.", "The second has 5.", "The first is larger."], [1, 1, 0],
                  [1, 1, 1], 2)),
        ({"conversations": turns("### Question:\nq\n\n### Solution Process:\ns\n\nt", " - ")},
         ("q", ["s\n\nt"], [0], [1], 0)),
    ],
    "visualprm400k_raw": [
        (RAW, ("How long is x?", ["x + 1 = 4", "x = 5", "The answer: 5"], [13, 0, 0], [16, 16, 0], 1)),
        ({"question": "q", "steps_with_score": [scored("s", 0.25), scored("t", None)]},
         ("q", ["s", "t"], [0.25, 0], [1, 0], 0)),
    ],
    "vl_prm300k": [
        (VL, ("What is red?", ["[Visual Elements]\n\nA ball.", "[Reasoning]\nSo the box is red."], [1, 0], [1, 1], 1)),
    ],
    "math_shepherd": [
        (SHEPHERD, ("Tom has 2. How many?", ["Step 1: He has 2", "Step 2: 2 + 2 = 5", "Step 3: The answer is: 5"],
                    [1, 0, 0], [1, 1, 1], 0)),
    ],
    "prm800k": [
        # the chosen path; each other completion that was rated is an example with its own label alone
        (prm800k(rated(("a", 1), ("b", -1), ("c", 0), chosen=0), rated(human={"text": "h", "rating": None}),
                 rated(("d", -1), ("e", 1), ("f", None))),
         ("How many?", ["a", "h", "d"], [1, 0, 0], [1, 0, 1], 0), ("How many?", ["b"], [0], [1], 0),
         ("How many?", ["a", "h", "e"], [0, 0, 1], [0, 0, 1], 0)),
        (prm800k(rated(("a", 0), chosen=0), rated(("b", 1), ("b", 1), chosen=1)),
         ("How many?", ["a", "b"], [0, 1], [0, 1], 0)),  # two equal completions are one example
        (prm800k(rated(("a", None), ("b", -1), chosen=0)), ("How many?", ["b"], [0], [1], 0)),
    ],
    "processbench_labels": [
        (BENCH, ("Solve.", ["a", "b", "c"], [1, 0, 0], [1, 1, 0], 0)),
        (BENCH | {"label": -1}, ("Solve.", ["a", "b", "c"], [1, 1, 1], [1, 1, 1], 0)),
    ],
}  # fmt: skip


def png(color="red"):
    out = io.BytesIO()
    Image.new("RGB", (9, 6), color).save(out, "PNG")
    return out.getvalue()


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def prepare(*argv):
    cli.run(["prepare", *map(str, argv)])


def shown(example):
    return example.question, list(example.segments), list(example.k), list(example.n), len(example.images)


@pytest.mark.parametrize("name", GOOD)
def test_every_form_has_the_labels_worked_out_by_hand(tmp_path, name):
    for file in ("a.png", "b.png", "set/a.png"):
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_bytes(png("red" if file == "a.png" else "blue"))
    rows = [row for row, *_ in GOOD[name]]
    split = next(iter(sources.find(name).files))
    prepare(name, write(tmp_path / "rows.jsonl", rows), f"--split={split}", f"--output={tmp_path / 'out'}")
    found = records.read_all(tmp_path / "out/labels.jsonl", StepExample)
    assert [shown(x) for x in found] == [each for _, *all_ in GOOD[name] for each in all_]
    assert len({x.id for x in found}) == len(found)
    assert all((tmp_path / "out" / image).exists() for x in found for image in x.images)
    wanted = [k for _, *all_ in GOOD[name] for each in all_ for k in each[2]]
    assert [type(k) for x in found for k in x.k] == [type(k) for k in wanted]  # 1.0 is a whole number


def without(row, *keys):
    return {key: value for key, value in row.items() if key not in keys}


def raw(*steps):
    return RAW | {"image": None, "steps_with_score": list(steps)}


def said(*texts):
    return MM_PRM | {"conversations": turns(*texts)}


def judged(*texts):
    return {"conversations": turns(*texts)}


FIRST = "### Question:\nq\n\n### Solution Process:\n"
BAD = [
    ("trl_stepwise", without(TRL, "labels"), "labels is NoneType, not a list"),
    ("trl_stepwise", TRL | {"labels": [True]}, "labels has 1 entries for 2 steps"),
    ("trl_stepwise", TRL | {"labels": [1.5, True]}, "labels[0] is 1.5"),
    ("trl_stepwise", TRL | {"labels": [True, -1]}, "labels[1] is -1"),
    ("trl_stepwise", TRL | {"labels": [True, math.nan]}, "labels[1] is nan"),
    ("trl_stepwise", TRL | {"labels": [True, "yes"]}, "labels[1] is 'yes'"),
    ("trl_stepwise", TRL | {"labels": [None, -100]}, "no step has a label"),
    ("trl_stepwise", TRL | {"completions": [], "labels": []}, "there are no steps"),
    ("trl_stepwise", TRL | {"completions": ["s", " "]}, "completions[1] is empty"),
    ("trl_stepwise", TRL | {"completions": ["s", 3]}, "completions[1] is int, not a text"),
    ("trl_stepwise", TRL | {"completions": "st"}, "completions is str, not a list"),
    ("trl_stepwise", TRL | {"prompt": [{"role": "user", "content": "q"}]}, "prompt is list, not a text"),
    ("trl_stepwise", TRL | {"images": ["no.png"]}, "no.png: image not found"),
    ("trl_stepwise", TRL | {"images": ["a.png"], "prompt": "<image> <image>"}, "2 <image> placeholders, but 1 images"),
    ("trl_stepwise", TRL | {"prompt": "<image> is it?"}, "1 <image> placeholders, but 0 images"),
    ("trl_stepwise", TRL | {"images": ["../a.png"]}, "must stay inside"),
    ("trl_stepwise", TRL | {"prm_counts": {"k": [9, 0], "n": [8, 8]}}, "prm_counts[0] is 9 of 8"),
    ("trl_stepwise", TRL | {"prm_counts": {"k": [4, 0], "n": [8, 8]}}, "labels[0] is True, but the counts are 4 of 8"),
    ("trl_stepwise", TRL | {"prm_counts": {"k": [8], "n": [8, 8]}}, "prm_counts.k has 1 entries for 2 steps"),
    ("trl_stepwise", TRL | {"prm_counts": {"k": [2**24 + 1, 0], "n": [2**24 + 1, 8]}}, "of 16777217, more than"),
    ("mm_prm", MM_PRM | {"image": "no.png"}, "no.png: image not found"),
    ("mm_prm", said("Question: q\nProcess: s<prm>t", [1.0]), "a step without <prm> behind it: 't'"),
    ("mm_prm", said("Question: q\nProcess: s<prm>", [1, 0]), "value has 2 entries for 1 steps"),
    ("mm_prm", said("Question: q\nProcess: s<prm><prm>", [1, 0]), "step 2 is empty"),
    ("mm_prm", said("Question: q s<prm>", [1]), 'says neither "Question: " nor "Process: "'),
    ("mm_prm", said("Question: q\nProcess: s<prm>", [-0.5]), "value[0] is -0.5"),
    ("mm_prm", said("Question: q\nProcess: s<prm>", "+"), "value is str, not a list"),
    ("mm_prm", said("q"), "1 turns; a human's and a gpt's"),
    ("mm_prm", MM_PRM | {"conversations": ["q", "+"]}, "a turn that is no object"),
    ("visualprm400k", VISUAL | {"image": "a.png"}, "2 <image> placeholders, but 1 images"),
    ("visualprm400k", judged(f"{FIRST}s", "+", "t"), "3 turns that are not a human's and a gpt's in turn"),
    ("visualprm400k", judged(f"{FIRST}s", "Yes"), "turn 1 is 'Yes'"),
    ("visualprm400k", judged("q: s", "+"), 'has not "### Question:"'),
    ("visualprm400k", judged(FIRST, "+"), "step 1 is empty"),
    ("visualprm400k", {"conversations": [SYSTEM]}, "there are no steps"),
    ("visualprm400k", {"id": 1}, "conversations is NoneType"),
    ("visualprm400k_raw", raw(scored("s", 0.5, 17, 16)), "steps_with_score[0].num_mc_correct is 17 of 16"),
    ("visualprm400k_raw", raw(scored("s", 0.9, 8, 16)), "score is 0.9, but the counts are 8 of 16"),
    ("visualprm400k_raw", raw(scored("s", 0.5, 8, None)), "is 8 of None"),
    ("visualprm400k_raw", raw(scored("s", 0.5, 1.5, 3)), "is 1.5 of 3"),
    ("visualprm400k_raw", raw(scored("", 0.5, 8, 16)), "steps_with_score[0].step is empty"),
    ("visualprm400k_raw", raw("s"), "steps_with_score[0] is str, not an object"),
    ("visualprm400k_raw", raw(scored("s", 0.0, 0, 0)), "no step has a label"),
    ("vl_prm300k", without(VL, "conversations", "steps_with_score"), "conversations is NoneType"),
    ("math_shepherd", SHEPHERD | {"label": SHEPHERD["label"][:-1] + "ки"}, "label does not repeat step 3"),
    ("math_shepherd", SHEPHERD | {"label": SHEPHERD["label"].replace("2 + ", "3 + ")}, "does not repeat step 2"),
    ("math_shepherd", SHEPHERD | {"label": SHEPHERD["label"] + "\nStep 4: +"}, "label has more than input"),
    ("math_shepherd", SHEPHERD | {"input": SHEPHERD["input"] + " more"}, "a step without ки behind it: 'more'"),
    ("math_shepherd", {"input": "q: 4 ки", "label": "q: 4 +"}, 'no "Step 1:"'),
    ("math_shepherd", {"input": "Step 1: 4 ки", "label": "Step 1: 4 +"}, "the question is empty"),
    ("math_shepherd", {"input": "q", "label": "q"}, "input has no ки"),
    ("prm800k", prm800k(rated(("a", 2), chosen=0)), "label.steps[0].completions[0].rating is 2"),
    ("prm800k", prm800k(rated(("a", True), chosen=0)), "rating is True"),
    ("prm800k", prm800k(rated(("a", 1), chosen=1)), "chosen_completion is 1 of 1 completions"),
    ("prm800k", prm800k(rated((None, 1), chosen=0)), "completions[0].text is NoneType"),
    ("prm800k", prm800k(rated(("a", 0), ("b", None), chosen=0)), "no step has a rating of 1 or -1"),
    ("prm800k", prm800k(), "no step has a rating"),
    ("prm800k", prm800k(*[rated(("a", 1), ("b", -1), chosen=0)] * 1001), "more than 1000 steps, or other completions"),
    ("trl_stepwise", TRL | {"completions": ["a"] * 1001, "labels": [1] * 1001}, "its 1001 steps have 1001 characters"),
    ("trl_stepwise", TRL | {"completions": ["a" * 60_000] * 2}, "its 2 steps have 120000 characters"),
    ("prm800k", {"question": "q", "label": {"steps": []}}, "question and label must be objects"),
    ("processbench_labels", BENCH | {"label": 3}, "the label of the first error is 3"),
    ("processbench_labels", BENCH | {"label": True}, "the label of the first error is True"),
    ("processbench_labels", BENCH | {"label": None}, "the label of the first error is None"),
    ("processbench_labels", BENCH | {"steps": ["a", "", "c"]}, "steps[1] is empty"),
]  # fmt: skip


def test_what_is_wrong_with_a_row_is_said_with_its_file_and_place(tmp_path):
    (tmp_path / "a.png").write_bytes(png())
    missed = []
    for i, (name, row, reason) in enumerate(BAD):
        path, out = write(tmp_path / f"{i}.jsonl", [row, GOOD[name][-1][0]]), tmp_path / f"out{i}"
        prepare(name, path, f"--split={next(iter(sources.find(name).files))}", f"--output={out}")
        (refused,) = map(json.loads, (out / "prepare/labels/refused.jsonl").read_text().splitlines())
        if (refused["file"], refused["row"]) != (path.name, 1) or reason not in refused["reason"]:
            missed.append((name, reason, refused))
    assert not missed


def test_a_file_without_a_good_row_is_an_error_and_leaves_a_list_of_reasons(tmp_path):
    path = write(tmp_path / "a.jsonl", [TRL | {"labels": [2, 3]}])
    with pytest.raises(UserError, match="none of 1 rows became a record of trl_stepwise: 1 were refused"):
        prepare("trl_stepwise", path, f"--output={tmp_path / 'out'}")
    with pytest.raises(UserError, match="mm_prm is published nowhere: name a file or a folder"):
        prepare("mm_prm", f"--output={tmp_path / 'out'}")
    with pytest.raises(UserError, match="--bis and --certain are for step labels; mm_k12 has problem records"):
        prepare("mm_k12", path, "--bis=0.5", f"--output={tmp_path / 'out'}")
    (tmp_path / "packed").mkdir()
    (tmp_path / "packed/annotations.zip").write_bytes(b"PK")
    with pytest.raises(UserError, match="unpack annotations.zip if the rows are in there"):
        prepare("visualprm400k_raw", tmp_path / "packed", f"--output={tmp_path / 'out'}")


def test_parquet_rows_as_the_hub_has_them(tmp_path):
    """Floats stay as they are; images are bytes."""
    columns = {"prompt": ["q", "<image>r"], "completions": [["s", "t"], ["u"]], "labels": [[0.1, None], [0.7]],
               "images": [[], [{"bytes": png(), "path": None}]]}  # fmt: skip
    pq.write_table(pa.table(columns), tmp_path / "train-0.parquet")
    prepare("trl_stepwise", tmp_path, f"--output={tmp_path / 'out'}")
    found = records.read_all(tmp_path / "out/labels.jsonl", StepExample)
    assert [shown(x) for x in found] == [("q", ["s", "t"], [0.1, 0], [1, 0], 0), ("r", ["u"], [0.7], [1], 1)]


# ------------------------------------------------------------------------------------------------- selection


def labelled(*shares, n=16):
    return StepExample("e", "p", "q", ("s",) * len(shares), tuple(round(n * x) for x in shares), (n,) * len(shares))


def test_the_balanced_information_score_worked_out_by_hand():
    """(p (1 - p) + alpha) R."""
    assert selection.bis(labelled(0.5, 0, 1, 0), 0.05) == pytest.approx((0.25 + 0.05) * 0.75)
    assert selection.bis(labelled(0, 0), 0.2) == pytest.approx(0.2)  # all wrong: R = 1
    assert selection.bis(labelled(0.25, 0.75), 0.05) == pytest.approx(0.05 * 0.5)
    masked = StepExample("e", "p", "q", ("s",) * 3, (8, 0, 0), (16, 16, 0))
    assert selection.bis(masked, 0.0) == pytest.approx(0.25 * 0.5)  # a step without a label does not count


def test_the_best_rows_of_each_file_and_certain_labels_are_kept(tmp_path, capsys):
    folder, out = tmp_path / "in", tmp_path / "out"
    folder.mkdir()

    def row(name, *shares):
        steps = [scored(f"s{i}", x, round(16 * x), 16) for i, x in enumerate(shares)]
        return {"id": name, "question": name, "steps_with_score": steps}

    # scores with alpha 0.05: 0.3, 0.15, 0.05, 0.025, and of equal ones the first
    write(
        folder / "a.jsonl",
        [row("low", 0.5, 0.5), row("best", 1, 0), row("all", 1, 1), row("half", 0.5, 0), row("all2", 1, 1)],
    )
    write(folder / "b.jsonl", [row("only", 0.25, 0.25)])

    def ids():
        return [x.id for x in records.read_all(out / "labels.jsonl", StepExample)]

    prepare("visualprm400k_raw", folder, "--bis=0.6", f"--output={out}")
    assert ids() == ["best", "all", "half", "only"]
    prepare("visualprm400k_raw", folder, "--bis=0.2", f"--output={out}")
    assert ids() == ["best", "only"]
    prepare("visualprm400k_raw", folder, "--bis=0.4", f"--output={out}")
    assert ids() == ["best", "half", "only"]
    prepare("visualprm400k_raw", folder, "--bis=0.4", "--bis-alpha=1", f"--output={out}")
    assert ids() == ["best", "all", "only"]  # 1.25 x 1, 1 x 1, 1.25 x 0.5


def test_uncertain_labels_are_masked_or_cost_their_row(tmp_path, capsys):
    rows = []
    for i, counts in enumerate([(14, 13, 2), (16, 0), (8, 9)]):
        steps = [scored(f"s{j}", k / 16, k, 16) for j, k in enumerate(counts)]
        rows.append({"id": str(i), "question": f"q{i}", "steps_with_score": steps})
    path, out = write(tmp_path / "a.jsonl", rows), tmp_path / "out"
    prepare("visualprm400k_raw", path, "--certain=0.125,0.875", f"--output={out}")
    found = records.read_all(out / "labels.jsonl", StepExample)
    assert [(x.id, x.k, x.n) for x in found] == [("0", (14, 0, 2), (16, 0, 16)), ("1", (16, 0), (16, 16))]
    summary = json.loads((out / "prepare/labels/summary.json").read_text())
    assert summary["left_out"] == {"rows_certain": 1, "steps_certain": 1}
    assert "1 as uncertain; 1 uncertain labels of other rows" in capsys.readouterr().err
    prepare("visualprm400k_raw", path, "--certain=0.125,0.875", "--uncertain=row", f"--output={out}")
    assert [x.id for x in records.read_all(out / "labels.jsonl", StepExample)] == ["1"]
    with pytest.raises(UserError, match="not selected: 0 rows by their score, 3 as uncertain"):
        prepare("visualprm400k_raw", write(tmp_path / "b.jsonl", [rows[2], *[rows[2] | {"id": i} for i in "xy"]]),
                "--certain=0,1", f"--output={out}")  # fmt: skip


@pytest.mark.parametrize(
    ("option", "words"),
    [("--bis=1.5", "expected a number from 0 to 1"), ("--bis=nan", "expected a number"),
     ("--bis-alpha=-1", "at least 0"), ("--certain=0.5", "expected two numbers"),
     ("--certain=0.8,0.2", "0 <= low < high <= 1"), ("--uncertain=row", "say which labels are certain")],
)  # fmt: skip
def test_selections_that_cannot_be_meant(tmp_path, option, words):
    with pytest.raises(UserError, match=words):
        prepare("trl_stepwise", write(tmp_path / "a.jsonl", [TRL]), option, f"--output={tmp_path / 'out'}")


def test_refused_rows_do_not_take_part_in_the_selection(tmp_path):
    path = write(tmp_path / "a.jsonl", [TRL | {"labels": [9, 9]}, TRL | {"id": "x"}, TRL | {"id": "y"}])
    source = sources.find("trl_stepwise")
    read = lambda: sources.items(source, sources.locate(source, str(path), "train"), "train")  # noqa: E731
    found = list(selection.select(read, selection.Selection(bis=0.5), selection.collections.Counter()))
    assert isinstance(found[0], Refused) and [x.record.id for x in found[1:]] == ["x"]

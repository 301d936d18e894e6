"""The record types and their files."""

import json

import pytest

from mmprm_jax import records
from mmprm_jax.records import (
    Candidate,
    Grading,
    Node,
    Problem,
    Rollout,
    ScoredCandidate,
    SFTExample,
    StepExample,
    Tree,
    UserError,
)

PROBLEM = Problem("p1", "What is ½ of 4?\nSay.", "2", images=("images/p1.png",), source="digits")
ROLLOUTS = (Rollout(("s2", "2"), True, 9), Rollout((), False, 3))
NODES = (
    Node(-1, (), 1, 2, 1, ROLLOUTS),
    Node(0, ("s1", "s2"), 0, 1, 0, (Rollout(("3",), False, 4),)),
    Node(1, ("s3",), 0, 0, 0, ()),
)
CANDIDATE = Candidate("p1", ("s1", "2"), "2", True, -3.0, 12)
ALL = [
    PROBLEM,
    Problem("p2", "q", "a"),
    Problem("p3", "<image> or <image>?", "B", ("a.png", "b.png"), "s", Grading.of(["3", "4"], "cm", 2, "choice")),
    Problem("p4", "q", "a", ("a.png", "a.png"), grading=Grading.of({"C": "3", "A": "4"})),
    SFTExample("e1", "q", "<step>\u2028</step>"),
    ROLLOUTS[0],
    NODES[0],
    Tree(PROBLEM, NODES, ((0, 1), (1, 0))),
    StepExample("x", "p1", "q", ("s1", "2"), (3, 0), (4, 0)),
    StepExample("y", "p1", "q", ("s1", "2"), (3, 0), (4, 0), ("a.png", "b.png")),
    CANDIDATE,
    Candidate("p1", (), None, False, 0.0, 0),
    ScoredCandidate(CANDIDATE, (0.5, 0.125)),
]


@pytest.mark.parametrize("record", ALL, ids=lambda r: type(r).__name__)
def test_round_trip(tmp_path, record):
    path = tmp_path / "sub" / "r.jsonl"
    assert records.write(path, [record, record]) == 2
    assert records.read_all(path, type(record)) == [record, record]
    hash(records.read_all(path, type(record))[0])  # tuples all the way down
    before = path.read_bytes()
    records.write(path, records.read(path, type(record)))
    assert path.read_bytes() == before


def test_prefix_joins_the_path_from_the_root():
    tree = Tree(PROBLEM, NODES, ())
    assert [tree.prefix(i) for i in range(3)] == [(), ("s1", "s2"), ("s1", "s2", "s3")]


def message(path, cls):
    with pytest.raises(UserError) as caught:
        records.read_all(path, cls)
    text = str(caught.value)
    assert "\n" not in text
    return text


@pytest.mark.parametrize(
    "bad, wanted",
    [
        ({"id": "a", "question": "q"}, "missing keys ['answer']"),
        ({"id": "a", "question": "q", "anwser": "1"}, "missing keys ['answer'], unknown keys ['anwser']"),
        ({"id": True, "question": "q", "answer": "1"}, "id must be a text, found True"),
        ({"id": 1.5, "question": "q", "answer": "1"}, "id must be a text, found 1.5"),
        ({"id": None, "question": "q", "answer": "1"}, "id must be a text, found None"),
        ({"id": "a", "question": "q", "answer": True}, "answer must be a text, found True"),
        ({"id": "a", "question": "q", "answer": None}, "answer must be a text, found None"),
        ({"id": "a", "question": "q", "answer": float("nan")}, "nan is no number that can be an answer"),
        ({"id": "a", "question": "q", "answer": "1", "images": ["a", 2]}, "images must be a list of texts"),
        ({"id": "a", "question": "q", "answer": "1", "grading": "B"}, "grading must be an object, found 'B'"),
        ({"id": "a", "question": "q", "answer": "1", "grading": {"options": "3"}}, 'grading: "options" is a list of'),
        ({"id": "a", "question": "q", "answer": "1", "grading": {"options": ["3", 4]}}, 'grading: "options" is a list'),
        ({"id": "a", "question": "q", "answer": "1", "grading": {"precision": 1.5}}, "1.5 is no number of decimals"),
        ({"id": "a", "question": "q", "answer": "1", "grading": {"precision": 10**400}}, "is no number of decimals"),
        ({"id": "a", "question": "q", "answer": "1", "grading": {"precision": -1}}, "-1 is no number of decimals"),
        ({"id": "a", "question": "q", "answer": "1", "grading": {"precision": True}}, '"precision" is a number'),
        ({"id": "a", "question": "q", "answer": "1", "grading": {"unit": 3}}, '"unit" is a text'),
        ({"id": "a", "question": "q", "answer": "1", "grading": {"kind": "letter"}}, "kind 'letter' is none of number"),
        ({"id": "a", "question": "q", "answer": "1", "images": ["a"], "image": "b"}, "image and images name different"),
        ({"id": "a", "question": "q", "answer": "1", "images": "a"}, "images must be a list, found 'a'"),
        ([1], "expected a JSON object, found list"),
        ({"id": "a", "question": None, "answer": "1"}, "question must be a text, found None"),
        ({"id": "a", "question": "q", "answer": "1", "image": ["x.png"]}, "image must be a text, found ['x.png']"),
    ],
)
def test_bad_row_names_file_and_line(tmp_path, bad, wanted):
    path = tmp_path / "p.jsonl"
    path.write_text(records.to_json(PROBLEM) + "\n\n" + json.dumps(bad) + "\n")
    text = message(path, Problem)
    assert text.startswith(f"{path}, line 3: ") and wanted in text


@pytest.mark.parametrize(
    "values, wanted",
    [({"segments": "s1"}, "segments must be a list, found 's1'"), ({"segments": ["s1", 2]}, "a list of texts"),
     ({"k": 3}, "k must be a list"), ({"k": [1, "2"]}, "k must be a list of numbers"),
     ({"n": [1.5, 2]}, "n must be a list of whole numbers")],
)  # fmt: skip
def test_lists_are_lists(tmp_path, values, wanted):
    path = tmp_path / "s.jsonl"
    path.write_text(json.dumps(json.loads(records.to_json(ALL[8])) | values))
    assert wanted in message(path, StepExample)


@pytest.mark.parametrize(
    "text, record",
    [
        ('{"id": 7, "question": "q", "answer": 12}', Problem("7", "q", "12")),
        ('{"id": 0, "question": "q", "answer": 0.50}', Problem("0", "q", "0.50")),  # how many decimals there are counts
        ('{"id": "a", "question": "q", "answer": -1.25e-3}', Problem("a", "q", "-0.00125")),
        ('{"id": "a", "question": "q", "answer": 1e3}', Problem("a", "q", "1000")),
        ('{"id": "a", "question": "q", "answer": "1", "image": null, "source": null}', Problem("a", "q", "1")),
        ('{"id": "a", "question": "q", "answer": "1", "source": 2024}', Problem("a", "q", "1", source="2024")),
        ('{"id": "a", "question": "q", "answer": "1", "images": ["x.png"]}', Problem("a", "q", "1", ("x.png",))),
        (
            '{"id": "a", "question": "q", "answer": "1", "image": "x.png", "images": ["x.png", "y.png"]}',
            Problem("a", "q", "1", ("x.png", "y.png")),
        ),
        (
            '{"id": "a", "question": "q", "answer": "1", "grading": {"options": {"B": "3"}, "precision": 2.0}}',
            Problem("a", "q", "1", grading=Grading((("B", "3"),), "", 2)),
        ),
        (
            '{"id": "a", "question": "q", "answer": "1", "grading": {"options": null, "unit": null, "kind": null}}',
            Problem("a", "q", "1"),
        ),
        ('{"id": "a", "question": "q", "answer": "1", "grading": null}', Problem("a", "q", "1")),
        ('{"id": "a", "question": "q", "answer": "1", "images": []}', Problem("a", "q", "1")),
        ('{"id": 7, "question": "q", "response": "r"}', SFTExample("7", "q", "r")),
        (
            '{"problem_id": 7, "segments": [], "answer": 3, "correct": true, "logprob": 0, "n_tokens": 1}',
            Candidate("7", (), "3", True, 0, 1),
        ),
    ],
)
def test_rows_of_ones_own(tmp_path, text, record):
    path = tmp_path / "p.jsonl"
    path.write_text(text)
    (found,) = records.read(path, type(record))
    assert found == record and type(getattr(found, "answer", None)) in (str, type(None))


@pytest.mark.parametrize("number", ["1e999", "-1e999", "1e-999999999", "Infinity", "1" * 5000])
def test_numbers_that_no_answer_can_be(tmp_path, number):
    path = tmp_path / "p.jsonl"
    path.write_text(f'{{"id": "a", "question": "q", "answer": {number}}}')
    assert message(path, Problem).startswith(f"{path}, line 1: ")


def test_unknown_keys_are_reported_once(tmp_path, caplog):
    path, other = tmp_path / "p.jsonl", tmp_path / "q.jsonl"
    for file in (path, other):
        file.write_text('{"id": 1, "question": "q", "answer": "1", "level": 3, "imgae": "x"}\n' * 2)
    for _ in range(2):
        assert list(records.read(path, Problem)) == [Problem("1", "q", "1")] * 2
    told = [record.getMessage() for record in caplog.records]
    assert told == [
        f"{path}: the key 'imgae' is none of a Problem's and is not used; did you mean 'image'?",
        f"{path}: the key 'level' is none of a Problem's and is not used",
    ]
    list(records.read(other, Problem))
    assert len(caplog.records) == 4


def test_ids_that_differ_only_as_number_and_text_are_one(tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_text("".join(f'{{"id": {i}, "question": "q", "answer": "1"}}\n' for i in ("7", '"8"')))
    assert [p.id for p in records.read_problems(path)] == ["7", "8"]
    with path.open("a") as file:
        file.write('{"id": 8, "question": "q", "answer": "1"}\n')
    with pytest.raises(UserError, match="the id '8' is there twice"):
        records.read_problems(path)


def test_bad_nested_row_names_the_nested_type(tmp_path):
    row = json.loads(records.to_json(ALL[7]))
    del row["nodes"][1]["rollouts"][0]["n_tokens"]
    path = tmp_path / "t.jsonl"
    path.write_text(json.dumps(row))
    assert message(path, Tree).startswith(f"{path}, line 1: not a Rollout: missing keys ['n_tokens']")


def test_invalid_json_empty_and_missing_files(tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_text('{"id": ')
    assert message(path, Problem).startswith(f"{path}, line 1: ")
    path.write_text("[" * 100_000)
    assert message(path, Problem).startswith(f"{path}, line 1: ")
    path.write_text("\n")
    assert message(path, Problem) == f"{path}: holds no Problem record"
    assert list(records.read(path, Problem)) == []
    assert "no such file" in message(tmp_path / "none.jsonl", Problem)


def test_write_is_atomic(tmp_path):
    path = tmp_path / "p.jsonl"
    records.write(path, [PROBLEM])

    def breaks():
        yield Problem("p2", "q", "a")
        raise RuntimeError

    with pytest.raises(RuntimeError):
        records.write(path, breaks())
    assert records.read_all(path, Problem) == [PROBLEM]
    records.write(path, [])
    assert path.read_text() == "" and [p.name for p in tmp_path.iterdir()] == ["p.jsonl"]


def test_what_files_could_always_say_is_written_as_always():
    assert records.to_json(PROBLEM) == (
        '{"id":"p1","question":"What is ½ of 4?\\nSay.","answer":"2","image":"images/p1.png","source":"digits"}'
    )
    assert (
        records.to_json(SFTExample("e", "q", "r"))
        == '{"id":"e","question":"q","response":"r","image":null,"source":""}'
    )
    step = StepExample("x", "p", "q", ("s",), (1,), (2,), ("a.png",))
    assert records.to_json(step) == (
        '{"id":"x","problem_id":"p","question":"q","segments":["s"],"k":[1],"n":[2],"image":"a.png"}'
    )
    tree = records.to_json(Tree(PROBLEM, NODES[:1], ()))
    assert tree.startswith(f'{{"problem":{records.to_json(PROBLEM)},"nodes":[{{"parent":-1,"segments":[],')


def test_what_is_new_has_keys_of_its_own():
    grading = Grading.of(["3", "4"], precision=0)
    assert json.loads(records.to_json(Problem("a", "q", "1", ("x", "y"), "s", grading))) == {
        "id": "a", "question": "q", "answer": "1", "images": ["x", "y"], "source": "s",
        "grading": {"options": ["3", "4"], "precision": 0},
    }  # fmt: skip
    assert not Grading() and not Grading.of([], "", None, "") and Grading.of(precision=0)


def test_keys_of_a_grading_that_are_none_are_told(tmp_path, caplog):
    path = tmp_path / "p.jsonl"
    path.write_text('{"id": "a", "question": "q", "answer": "1", "grading": {"units": "cm"}}')
    assert records.read_all(path, Problem) == [Problem("a", "q", "1")]
    assert "the key 'units' is none of a Grading's and is not used; did you mean 'unit'?" in caplog.text


def test_one_name_is_no_tuple_of_images():
    with pytest.raises(TypeError, match="images must be a tuple of file names, not 'x.png'"):
        Problem("a", "q", "1", "x.png")

"""``mmprm prepare``: no good row is lost, every bad one is listed; again the same bytes; copies of benchmarks go."""

import base64
import csv
import gzip
import io
import itertools
import json
import random
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from mmprm_jax import cli, records
from mmprm_jax.data import images, sources
from mmprm_jax.data.benchmarks import StepDetectionExample
from mmprm_jax.data.images import open_image
from mmprm_jax.data.prompts import split_segments
from mmprm_jax.data.sources_base import Refused
from mmprm_jax.records import Grading, Problem, SFTExample, UserError

GOLDEN = Path(__file__).parent.parent / "golden"
K12 = GOLDEN / "mm_k12" / "mm_k12_test_24.json"


def run(*argv):
    cli.run(["prepare", *map(str, argv)])


def read(path, cls=Problem):
    return list(records.read(path, cls))


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def png(color="red", size=(30, 20)):
    out = io.BytesIO()
    Image.new("RGB", size, color).save(out, "PNG")
    return out.getvalue()


def huge_png():
    """A valid header of 10,000 x 10,000 pixels."""
    header = struct.pack(">IIBBBBB", 10_000, 10_000, 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(b"\0" * 1000)), (b"IEND", b"")]
    packed = (struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in chunks)
    return b"\x89PNG\r\n\x1a\n" + b"".join(packed)


def tree(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_real_problems_become_the_files_that_annotate_reads(tmp_path, capsys):
    run("mm_k12", K12.parent, "--split=test", f"--output={tmp_path / 'a'}")
    found, given = read(tmp_path / "a" / "test.jsonl"), json.loads(K12.read_text())
    assert [(p.id, p.question, p.answer) for p in found] == [(g["id"], g["question"], g["answer"]) for g in given]
    for problem, row in zip(found, given, strict=True):
        assert (tmp_path / "a" / problem.images[0]).read_bytes() == (K12.parent / row["image_path"]).read_bytes()
        open_image(tmp_path / "a" / problem.images[0])
    assert "24 of 24" in capsys.readouterr().out
    scoring = lines(tmp_path / "a/prepare/test/benchmark.jsonl")
    assert [(row["id"], row["gold"], row["mode"]) for row in scoring] == [(p.id, p.answer, "mm_k12") for p in found]
    first = tree(tmp_path / "a")
    run("mm_k12", K12, "--split=test", f"--output={tmp_path / 'a'}")  # the file itself, over what is there
    second = tree(tmp_path / "a")
    assert {n: d for n, d in first.items() if "summary" not in n} == {
        n: d for n, d in second.items() if "summary" not in n
    }


def corrupted(folder, suffix, count=200):
    """A source of which 5 % of the rows are bad, in every way at once: (path, good ids, number of bad rows)."""
    rng = random.Random(0)
    (folder / "images").mkdir(parents=True)
    (folder.parent / "secret.png").write_bytes(png("blue"))
    (folder / "images" / "cut.png").write_bytes((GOLDEN / "mm_k12" / "images").glob("*").__next__().read_bytes()[:900])
    (folder / "images" / "huge.png").write_bytes(huge_png())
    (folder / "images" / "text.png").write_bytes(b"no image at all")
    images = ["../secret.png", "missing.png", "images/cut.png", "images/huge.png", "/etc/hostname", "images/text.png"]
    bad, texts, good = set(rng.sample(range(count), count // 20)), [], []
    for i in range(count):
        row = {"id": f"p{i}", "question": f"What is {i} + 1?", "correct_answer": str(i + 1)}
        if i in bad and i % 2:
            texts.append(json.dumps(row)[:-8])
            continue
        if i in bad:
            row["image_path"] = images[i // 2 % len(images)]
        elif i % 3 == 0:
            (folder / "images" / f"{i}.png").write_bytes(png((i, 0, 0)))
            row["image_path"] = f"images/{i}.png"
        texts.append(json.dumps(row))
        good += [f"p{i}"] * (i not in bad)
    path = folder / f"train{suffix}"
    path.write_text("\n".join(texts) if suffix == ".jsonl" else "[\n" + ",\n".join(texts) + "\n]")
    return path, good, bad


@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
def test_five_percent_bad_rows(tmp_path, suffix, capsys):
    path, good, bad = corrupted(tmp_path / "source", suffix)
    run("mm_k12", path.parent, f"--output={tmp_path / 'out'}")
    assert [p.id for p in read(tmp_path / "out" / "train.jsonl")] == good
    refused = lines(tmp_path / "out/prepare/train/refused.jsonl")
    assert [row["row"] for row in refused] == sorted(i + 1 for i in bad)
    assert all(row["reason"] for row in refused)
    summary = json.loads((tmp_path / "out/prepare/train/summary.json").read_text())
    assert (summary["rows"], summary["written"], summary["refused"]) == (200, 190, 10)
    assert "refused 10 rows" in capsys.readouterr().err
    written = {file.read_bytes() for file in (tmp_path / "out" / "images").rglob("*.*")}
    assert png("blue") not in written and len(written) == sum(i % 3 == 0 for i in range(200) if i not in bad)


def test_the_same_command_writes_the_same_bytes(tmp_path):
    path, _, _ = corrupted(tmp_path / "source", ".jsonl", 600)
    for name in "ab":
        run("mm_k12", path, f"--output={tmp_path / name}")
    assert tree(tmp_path / "a") == tree(tmp_path / "b")
    assert "text.png" in (tmp_path / "a/prepare/train/refused.jsonl").read_text()


def test_the_command_ends_with_0_when_rows_were_refused(tmp_path):
    (tmp_path / "train.jsonl").write_text('{"id": "a", "question": "q", "answer": "1"}\n{"id": "b"}\n')
    argv = [sys.executable, "-m", "mmprm_jax.main", "prepare", "mm_k12", str(tmp_path), f"--output={tmp_path / 'o'}"]
    done = subprocess.run(argv, capture_output=True, text=True)
    assert done.returncode == 0 and "1 of 2 rows" in done.stdout
    assert "refused 1 rows (1 x no question or problem)" in done.stderr


def test_nothing_left_is_an_error(tmp_path):
    (tmp_path / "train.jsonl").write_text('{"id": "b"}\n')
    with pytest.raises(UserError, match="none of 1 rows .*1 were refused, 0 removed"):
        run("mm_k12", tmp_path, f"--output={tmp_path / 'o'}")
    assert lines(tmp_path / "o/prepare/train/refused.jsonl")[0]["id"] == "b"


def test_images_in_which_a_model_sees_nothing_are_reported(tmp_path, capsys):
    Image.new("L", (30, 30), 7).save(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes((K12.parent / json.loads(K12.read_text())[0]["image_path"]).read_bytes())
    rows = [{"question": f"q{name}", "answer": "1", "image_path": name} for name in ("a.png", "b.png")]
    (tmp_path / "train.json").write_text(json.dumps(rows))
    run("mm_k12", tmp_path, f"--output={tmp_path / 'o'}")
    first, _ = read(tmp_path / "o" / "train.jsonl")
    assert json.loads((tmp_path / "o/prepare/train/summary.json").read_text())["blank_images"] == list(first.images)
    assert "1 images are of one colour" in capsys.readouterr().err


def test_an_interruption_leaves_what_was_there(tmp_path, monkeypatch):
    run("mm_k12", K12, "--split=test", f"--output={tmp_path}", "--limit=5")
    before, items = tree(tmp_path), sources.items

    def interrupted(*args):
        yield from itertools.islice(items(*args), 10)
        raise KeyboardInterrupt

    monkeypatch.setattr(sources, "items", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run("mm_k12", K12, "--split=test", f"--output={tmp_path}")
    assert before.items() <= tree(tmp_path).items()
    monkeypatch.undo()
    run("mm_k12", K12, "--split=test", f"--output={tmp_path}")
    run("mm_k12", K12, "--split=test", f"--output={tmp_path / 'fresh'}")
    fresh = tree(tmp_path / "fresh")
    assert fresh == {name: data for name, data in tree(tmp_path).items() if name in fresh}
    assert not list(tmp_path.rglob("*.tmp"))


def test_ids_stay_unique_and_repeated_rows_are_reported(tmp_path):
    rows = [{"id": 7, "question": "a", "answer": 1}, {"id": 7, "question": "b", "answer": 1.5},
            {"id": 7, "question": "a", "answer": 1}, {"question": "c", "answer": "x"}]  # fmt: skip
    (tmp_path / "train.json").write_text(json.dumps(rows))
    found = list(sources.read("mm_k12", str(tmp_path), "train"))
    assert [item.record.id for item in found if not isinstance(item, Refused)] == ["7", "7~2", "mm_k12-train.json-4"]
    assert found[2] == Refused("train.json", 3, "7", "the same row, id included, came before")


def test_ids_that_look_like_ours_stay_unique_too(tmp_path):
    ids = ["a", "a~2", "a", "a~3", "a", "mm_k12-train.json-7", None, "a~2"]
    rows = [{"id": id_, "question": f"q{i}", "answer": "1"} for i, id_ in enumerate(ids)]
    (tmp_path / "train.json").write_text(json.dumps(rows))
    found = [item.record for item in sources.read("mm_k12", str(tmp_path), "train")]
    assert [p.question for p in found] == [row["question"] for row in rows]
    assert len({p.id for p in found}) == len(rows) and [p.id for p in found[:2]] == ["a", "a~2"]


def test_a_limit_counts_good_rows(tmp_path):
    path, good, _ = corrupted(tmp_path / "source", ".jsonl")
    run("mm_k12", path, "--limit=30", f"--output={tmp_path / 'out'}", "--name=dev")
    assert [p.id for p in read(tmp_path / "out" / "dev.jsonl")] == good[:30]


def test_mmk12_from_parquet(tmp_path):
    data = [png("red"), png("green"), b"broken"]
    rows = [{"id": f"m{i}", "question": "<image>Which?\nA. 1 B. 2", "answer": "B", "subject": "math",
             "image": {"bytes": d, "path": None}} for i, d in enumerate(data)]  # fmt: skip
    (tmp_path / "data").mkdir()
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "data" / "train-00000-of-00001.parquet")
    run("mmk12", tmp_path, f"--output={tmp_path / 'out'}")
    found = read(tmp_path / "out" / "train.jsonl")
    assert [(p.id, p.answer, p.source) for p in found] == [("m0", "B", "mmk12"), ("m1", "B", "mmk12")]
    assert [(tmp_path / "out" / p.images[0]).read_bytes() for p in found] == data[:2]
    assert lines(tmp_path / "out/prepare/train/refused.jsonl")[0]["id"] == "m2"


CHAT = [
    {"from": "human", "value": "<image>\nFind x.\nChoices:\nA. 1\nB. 2"},
    {"from": "gpt", "value": "First, x + x = 4.\n\nSo x = 2.\n\nAnswer: B"},
]
SOLVED = "<step>First, x + x = 4.</step><step>So x = 2.</step><answer>B</answer>"
MAVIS = {
    "id": "m", "image_text_dominant": "a.png", "choices": ["1", "2"], "answer_index": 1,
    "text_en": {"text_dominant_question": "Find x.", "CoT_reasoning": "First, x + x = 4.\n\nSo x = 2."},
}  # fmt: skip


@pytest.mark.parametrize(
    "name, file, row, wanted",
    [
        ("mathv360k", "train_samples_all_tuning.json", {"id": 1, "image": "geo/a.png", "conversations": CHAT}, SOLVED),
        ("geo170k", "qa_tuning.json", {"image": "a.png", "conversations": CHAT}, SOLVED),
        ("rcot", "GeoMM.json", {"id": "x", "image": "GeoMM/a.png", "conversations": CHAT}, SOLVED),
        ("mavis", "train.json", MAVIS, SOLVED),
        ("mavis", "train.json", {"id": "x", "image": "a.png", "conversations": CHAT}, SOLVED),
        ("numina_math_cot", "train.jsonl", {"problem": "1+1?", "solution": "It is $1+1$.\n\n$\\boxed{2}$"},
         "<step>It is $1+1$.</step><answer>2</answer>"),
        ("dart_math", "train.jsonl", {"query": "1+1?", "response": "One and one.\nThe answer is: $2$"},
         "<step>One and one.</step><answer>2</answer>"),
    ],
)  # fmt: skip
def test_demonstrations(tmp_path, name, file, row, wanted):
    for place in ("a.png", "images/a.png", "data_images/geo/a.png", "GeoMM/a.png"):
        (tmp_path / "in" / place).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / place).write_bytes(png())
    text = json.dumps(row) + "\n" if file.endswith("l") else json.dumps([row])
    (tmp_path / "in" / file).write_text(text)
    run(name, tmp_path / "in", f"--output={tmp_path / 'out'}")
    (example,) = read(tmp_path / "out" / "sft.jsonl", SFTExample)
    assert example.response == wanted and example.source == name and example.id
    assert (example.images == ()) == (name in ("numina_math_cot", "dart_math"))
    assert "".join(split_segments(example.response)) == example.response


def url(data, kind="png"):
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


BLUE, RED = {"type": "image_url", "image_url": {"url": "BLUE"}}, {"type": "image", "image": "images/red.png"}
ASKED = [{"type": "text", "text": "Compare "}, BLUE, {"type": "text", "text": " with "}, RED]
PLAIN = [{"type": "text", "text": "Compare "}, {"type": "image"}, {"type": "text", "text": " with "}, {"type": "image"}]


def user(content):
    return {"messages": [{"role": "user", "content": content}]}


@pytest.mark.parametrize(
    "row",
    [
        user(ASKED),
        {"messages": [{"role": "system", "content": "Think."}, {"role": "user", "content": ASKED}]},
        user(PLAIN) | {"images": ["BLUE", "images/red.png"]},
        user("Compare <image> with <image>") | {"images": [{"bytes": "BLUE"}, "red.png"]},
        user("Compare <image 1> with <image 2>") | {"images": ["RAW", {"path": "red.png"}]},
        user("Compare <|image|> with ![](x)") | {"image": ["BLUE", {"url": "red.png"}]},
    ],
)
def test_chats_with_images_in_any_place(tmp_path, row):
    blue, red = png("blue"), png("red", (10, 40))
    (tmp_path / "in" / "images").mkdir(parents=True)
    (tmp_path / "in" / "images" / "red.png").write_bytes(red)
    row["messages"] = [*row["messages"], {"role": "assistant", "content": "Red is long.\n\nAnswer: B"}]
    text = json.dumps([row]).replace("BLUE", url(blue)).replace("RAW", base64.b64encode(blue).decode())
    (tmp_path / "in" / "train.json").write_text(text)
    run("geo170k", tmp_path / "in", f"--output={tmp_path / 'out'}")
    (example,) = read(tmp_path / "out" / "sft.jsonl", SFTExample)
    assert example.question == "Compare <image> with <image>" and example.response.endswith("<answer>B</answer>")
    assert [(tmp_path / "out" / name).read_bytes() for name in example.images] == [blue, red]


@pytest.mark.parametrize(
    "given, reason",
    [
        ("data:image/png;base64,iVBORw0KGgo!", "a damaged data URL"),
        ("data:image/png;base64,aGVsbG8=", "not a readable image"),
        ("https://example.org/a.png", "download it"),
        (base64.b64encode(b"\x89PNG" + bytes(90)).decode(), "not a readable image"),
        ("q" * 64, "image not found"),  # a name without an ending
        ({"url": None}, "NoneType, not a path"),
        ([["a.png", 3]], "int, not a path"),
    ],
)
def test_images_that_are_none(tmp_path, given, reason):
    (tmp_path / "a.png").write_bytes(png())
    rows = [{"id": "x", "question": "q", "answer": "1", "images": given}, {"id": "y", "question": "q", "answer": "1"}]
    (tmp_path / "train.json").write_text(json.dumps(rows))
    run("mm_k12", tmp_path, f"--output={tmp_path / 'out'}")
    (refused,) = lines(tmp_path / "out/prepare/train/refused.jsonl")
    assert refused["id"] == "x" and reason in refused["reason"] and len(refused["reason"]) < 300


@pytest.mark.parametrize(
    "change, reason",
    [
        (user([{"type": "audio"}]), "no text and no image"),
        ({"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": [BLUE]}]}, "shows an image"),
        ({"messages": "text"}, "no list messages of {role, content}"),
        (user(None), "no content"),
        ({"conversations": CHAT * 2}, "4 turns"),
        ({"conversations": "text"}, "no list conversations"),
        ({"conversations": [CHAT[0], {"from": "gpt", "value": "I think, and think.\nNo idea."}]}, "no final answer"),
        ({"image": None}, "placeholders"),
        ({"image": ["a.png", "b.png"]}, "1 <image> placeholders, but 2 images"),
        ({"conversations": [CHAT[0], {"from": "gpt", "value": "x" * 200_000}]}, "characters"),
    ],
)
def test_bad_demonstrations_are_refused_with_the_reason(tmp_path, change, reason):
    (tmp_path / "train.json").write_text(json.dumps([{"id": 1, "image": "a.png", "conversations": CHAT} | change]))
    (refused,) = sources.read("mathv360k", str(tmp_path), "train")
    assert isinstance(refused, Refused) and reason in refused.reason


def test_training_rows_of_a_benchmark_are_removed_and_listed(tmp_path, capsys):
    run("mm_k12", K12, "--split=test", f"--output={tmp_path / 'bench'}")
    given = json.loads(K12.read_text())
    folder = tmp_path / "train"
    (folder / "images").mkdir(parents=True)

    first = max(given, key=lambda row: len(row["question"]))
    (folder / "images" / "same.png").write_bytes((K12.parent / given[1]["image_path"]).read_bytes())
    (folder / "images" / "other.png").write_bytes(png("red"))
    rows = [
        {"id": "text", "question": " " + first["question"].upper().replace("$", ""), "answer": "1"},
        {"id": "figure", "question": "A new question.", "answer": "1", "image_path": "images/same.png"},
        {"id": "template", "question": "In the figure, find x.", "answer": "1", "image_path": "images/other.png"},
        {"id": "new", "question": "How many primes are below 30?", "answer": "10"},
    ]  # fmt: skip
    (folder / "train.json").write_text(json.dumps(rows))
    run("mm_k12", folder, f"--output={tmp_path / 'out'}", f"--against={tmp_path / 'bench'}")
    assert [p.id for p in read(tmp_path / "out" / "train.jsonl")] == ["template", "new"]
    removed = {row["id"]: row for row in lines(tmp_path / "out/prepare/train/removed.jsonl")}
    assert (removed["text"]["benchmark_id"], removed["text"]["why"]) == (first["id"], "question")
    assert (removed["figure"]["benchmark_id"], removed["figure"]["why"]) == (given[1]["id"], "image")
    assert removed["figure"]["benchmark"] == "mm_k12" and "removed 2 rows" in capsys.readouterr().err


def test_training_rows_may_lie_beside_their_benchmark_and_be_prepared_again(tmp_path):
    """Neither the demonstrations nor the training problems of the run before are a benchmark."""
    out, source = tmp_path / "k12", tmp_path / "train.jsonl"
    run("mm_k12", K12, "--split=test", f"--output={out}")
    copy = {"problem": json.loads(K12.read_text())[0]["question"], "solution": "$\\boxed{3}$"}
    (tmp_path / "sft.jsonl").write_text(
        json.dumps(copy) + '\n{"problem": "How many primes?", "solution": "So $\\\\boxed{3}$"}\n'
    )
    source.write_text('{"id": "z", "question": "Another question.", "answer": "1"}\n')
    for _ in range(2):
        run("mm_k12", source, f"--output={out}", f"--against={out}")
        run("numina_math_cot", tmp_path / "sft.jsonl", f"--output={out}", f"--against={out}")
        assert [p.id for p in read(out / "train.jsonl")] == ["z"]
        assert [p.question for p in read(out / "sft.jsonl", SFTExample)] == ["How many primes?"]
    with pytest.raises(UserError, match="no prepared benchmark"):
        run("mm_k12", K12, "--split=test", f"--output={out}", f"--against={out}")
    assert len(read(out / "test.jsonl")) == 24


def test_what_was_prepared_is_not_read_again(tmp_path):
    """With the output in the source's folder a second run finds the rows of the first one too."""
    source, out = tmp_path / "train.jsonl", tmp_path / "out"
    (tmp_path / "a.png").write_bytes(png())
    source.write_text('{"id": "z", "question": "q", "answer": "1", "image": "a.png"}\n')
    run("mm_k12", tmp_path, f"--output={out}")
    before = tree(out)
    run("mm_k12", tmp_path, f"--output={out}")
    assert tree(out) == before
    for given in (source, tmp_path):
        with pytest.raises(UserError, match="train.jsonl: is read, and would be replaced"):
            run("mm_k12", given, f"--output={tmp_path}")


def test_the_scoring_of_a_benchmark_goes_with_it(tmp_path):
    """Another source under the same name leaves nothing of the first one."""
    run("mm_k12", K12, "--split=test", f"--output={tmp_path}")
    assert (tmp_path / "prepare/test/benchmark.jsonl").exists()
    run("mmk12", K12, "--split=test", f"--output={tmp_path}")
    assert not (tmp_path / "prepare/test/benchmark.jsonl").exists()


def test_many_images_of_one_row_are_refused_before_all_are_in_memory(tmp_path, monkeypatch):
    """A row may name one large image a million times."""
    (tmp_path / "a.png").write_bytes(png())
    row = {"question": "q", "image": ["a.png"] * 1000, "response": {"steps": ["s"], "process_correctness": [1]}}
    (tmp_path / "test.jsonl").write_text(json.dumps(row) + "\n" + json.dumps(row | {"image": ["a.png"] * 3}) + "\n")
    opened = []
    monkeypatch.setattr(images, "MAX_PIXELS", 2000)
    monkeypatch.setattr(images, "decode_image", lambda data, name: opened.append(name) or Image.open(io.BytesIO(data)))
    run("visualprocessbench", tmp_path, f"--output={tmp_path / 'out'}")
    assert len(opened) == 4 + 3 and len(read(tmp_path / "out/test.jsonl", StepDetectionExample)) == 1
    assert "its 1000 images have more than" in lines(tmp_path / "out/prepare/test/refused.jsonl")[0]["reason"]


def test_several_images_of_a_problem_stand_where_the_text_speaks_of_them(tmp_path):
    row = {
        "id": 5, "question": "Compare <image_1> with <image_2>.", "final_answer": ["3"], "answer_type": "Numerical",
        "is_multiple_answer": False, "unit": None, "error": None, "image_1": {"bytes": png("red"), "path": None},
        "image_2": {"bytes": png("blue", (10, 40)), "path": None},
    }  # fmt: skip
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "OE_MM_maths_en_COMP.parquet")
    run("olympiadbench", tmp_path, f"--output={tmp_path / 'out'}")
    (problem,) = read(tmp_path / "out" / "test.jsonl")
    red, blue = (open_image(tmp_path / "out" / name) for name in problem.images)
    assert blue.size == (10, 40) and red.getpixel((5, 5)) == (255, 0, 0) and blue.getpixel((5, 5)) == (0, 0, 255)
    assert problem.question == "Compare <image> with <image>." and problem.answer == "3"
    assert problem.grading == Grading.of(kind="number")


def test_step_detection_rows(tmp_path):
    (tmp_path / "a.png").write_bytes(png())
    row = {"image": ["a.png", "a.png"], "question": "q", "answer": "1", "policy_model": "m", "data_source": "DynaMath",
           "response": {"steps": ["s", "t", "u"], "process_correctness": [1, 0, -1]}}  # fmt: skip
    worse = row | {"response": {"steps": ["s"], "process_correctness": [1, 1]}}
    (tmp_path / "test.jsonl").write_text(f"{json.dumps(row)}\n{json.dumps(worse)}\n")
    run("visualprocessbench", tmp_path, f"--output={tmp_path / 'out'}")
    (example,) = read(tmp_path / "out" / "test.jsonl", StepDetectionExample)
    assert example.steps == ("s", "t", "u") and example.labels == (1, 0, -1) and len(example.images) == 2
    assert all((tmp_path / "out" / name).exists() for name in example.images) and example.category == "DynaMath"
    row = {"id": "gsm8k-3", "generator": "g", "problem": "p", "steps": ["s", "t", "u"], "final_answer_correct": False}
    (tmp_path / "gsm8k.json").write_text(json.dumps([row | {"label": 1}, row | {"label": -1}, row | {"label": 3}]))
    found = [
        item.record for item in sources.read("processbench", str(tmp_path), "gsm8k") if not isinstance(item, Refused)
    ]
    assert [(e.first_error, e.labels, e.final_correct) for e in found] == [
        (1, (1, -1, -1), False), (-1, (1, 1, 1), False)
    ]  # fmt: skip
    assert found[0].category == "gsm8k" and found[0].images == ()


@pytest.mark.parametrize(
    "argv, message",
    [
        (["mm_k13", "x", "--output=o"], "did you mean mm_k12"),
        (["mm_k12", "/nothing/here", "--output=o"], "neither a file, a folder nor a hub id"),
        (["mm_k12", str(K12), "--split=dev", "--output=o"], "no split 'dev', only train, test"),
        (["mm_k12", str(K12), "--limit=-1", "--output=o"], "--limit"),
        (["mm_k12", str(K12), "--rewriter=http://a/v1", "--output=o"], "go together"),
        (["mm_k12", str(K12), "--rewriter=http://a/v1", "--model=m", "--output=o"], "for demonstrations"),
        (["geo170k", str(K12), "--rewriter=nonsense", "--model=m", "--output=o"], "no server's address"),
        (["mm_k12", str(K12), "--name=../x", "--output=o"], "a name, not a path"),
        (["mm_k12", str(K12), "--against=/nothing", "--output=o"], "no prepared benchmark"),
    ],
)
def test_wrong_command_lines_are_reported(argv, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message):
        run(*argv)


def test_a_table_with_a_column_for_each_choice(tmp_path):
    """As VLMEvalKit's files are: the image in base64, the choices in A, B, C, …; compressed."""
    image = base64.b64encode(png()).decode()
    table = [
        ["index", "image", "question", "A", "B", "C", "D", "answer"],
        ["7", image, "Which\nis red?", "a cat", "a\tsquare", "", "", "B"],
        ["8", "/data/x/1.png", "How many?", "", "", "", "", "3"],
        ["9", r"C:\x\2.png", "How many?", "", "", "", "", "4"],
        ["10", "", "Which?", "1", "", "3", "", "A"],
    ]
    out = io.StringIO()
    csv.writer(out, "excel-tab").writerows(table)
    (tmp_path / "in.tsv.gz").write_bytes(gzip.compress(out.getvalue().encode()))
    (tmp_path / "root" / "x").mkdir(parents=True)
    for name in ("1.png", "2.png"):
        (tmp_path / "root" / "x" / name).write_bytes(png(size=(40, 20)))
    run("mmk12", tmp_path / "in.tsv.gz", "--output", tmp_path / "out", "--image_root", tmp_path / "root")
    first, second, third = read(tmp_path / "out" / "train.jsonl")
    assert first.grading.options == (("A", "a cat"), ("B", "a\tsquare"))
    assert first.answer == "B" and len(first.images) == 1
    assert second.grading.options == () and second.answer == "3" and third.images == second.images
    assert [problem.id for problem in (first, second, third)] == ["7", "8", "9"]
    (refused,) = lines(tmp_path / "out" / "prepare" / "train" / "refused.jsonl")
    assert "the letters from A on" in refused["reason"]

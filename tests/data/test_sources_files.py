"""Rows from damaged files, and images from hostile paths: everything good is read, everything bad is told."""

import csv
import gzip
import io
import json
import os
import random
import tarfile
import tracemalloc
import zipfile

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from mmprm_jax.data import images, sources_files
from mmprm_jax.data.image_files import ImageFiles
from mmprm_jax.data.sources_files import Located
from mmprm_jax.records import UserError


def located(*paths):
    return Located(paths[0].parent, tuple(paths), (paths[0].parent,))


def rows(path):
    return list(sources_files.read_rows(located(path)))


def values(found):
    return [row.value for row in found if row.value is not None]


def make(count):
    rng = random.Random(0)
    texts = ["plain", 'a "quoted" \\ {"id": 3} text', "[1, 2] } ] {", "汉字 \n ü \u2028", "\ud800 half", ""]
    return [
        {"id": f"r{i}", "question": rng.choice(texts) * rng.randrange(4), "list": [{"id": 1}, [2]]}
        for i in range(count)
    ]


FORMS = {
    "dense": lambda rows: json.dumps(rows),
    "indented": lambda rows: json.dumps(rows, indent=1, ensure_ascii=True),
    "object": lambda rows: json.dumps({str(i): row for i, row in enumerate(rows)}, indent=2),
    "object on a line": lambda rows: json.dumps({str(i): row for i, row in enumerate(rows)}),
    "bom": lambda rows: "\ufeff" + json.dumps(rows),
    "lines called json": lambda rows: "".join(json.dumps(row) + "\n" for row in rows),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("chunk", [7, 2**20])
def test_every_form_of_a_json_file_gives_its_rows(tmp_path, monkeypatch, form, chunk):
    monkeypatch.setattr(sources_files, "_CHUNK", chunk)
    wanted = make(60)
    path = tmp_path / "a.json"
    path.write_text(FORMS[form](wanted))
    found = rows(path)
    assert values(found) == wanted
    assert [row.number for row in found] == list(range(1, 61)) and not any(row.error for row in found)


DAMAGE = {
    "unterminated text": lambda text: text[: len(text) // 2],
    "a missing brace": lambda text: text.removesuffix("}"),
    "garbage": lambda text: "%%% garbage %%%",
    "a comma too many": lambda text: text.replace(":", ":,", 1),
    "no object": lambda text: "17",
    "nesting": lambda text: "[" * 100_000,
    "a number without end": lambda text: '{"id": ' + "9" * 10_000 + "}",
}


@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_rows_cost_no_good_one(tmp_path, suffix, damage):
    wanted, bad = make(40), {0, 7, 8, 39} if suffix == ".jsonl" else {7, 8, 39}
    texts = [DAMAGE[damage](json.dumps(row)) if i in bad else json.dumps(row) for i, row in enumerate(wanted)]
    path = tmp_path / f"a{suffix}"
    path.write_text("\n".join(texts) if suffix == ".jsonl" else "[" + ",\n ".join(texts) + "]")
    found = rows(path)
    assert values(found) == [row for i, row in enumerate(wanted) if i not in bad]
    errors = [row.number - 1 for row in found if row.error]
    assert errors == sorted(bad)


def test_rows_on_one_line_are_found_by_their_keys(tmp_path):
    """Two damaged neighbours are told as one there: nothing says where the first one ends."""
    wanted = make(30)
    for damage in DAMAGE.values():
        texts = [damage(json.dumps(row)) if i in (7, 8, 20) else json.dumps(row) for i, row in enumerate(wanted)]
        (tmp_path / "a.json").write_text("[" + ", ".join(texts) + "]")
        found = rows(tmp_path / "a.json")
        assert values(found) == [row for i, row in enumerate(wanted) if i not in (7, 8, 20)]
        assert len([row for row in found if row.error]) in (2, 3)


def test_first_and_last_row_of_a_list_may_be_damaged(tmp_path):
    wanted = make(5)
    texts = [json.dumps(row) for row in wanted]
    path = tmp_path / "a.json"
    path.write_text("[" + texts[0][:-9] + "," + ",".join(texts[1:-1]) + "," + texts[-1][:-9] + "]")
    found = rows(path)
    assert values(found) == wanted[1:-1] and [row.number for row in found if row.error] == [1, 5]
    path.write_text("[" + ",".join(texts))  # a download that broke off between two rows
    assert values(rows(path)) == wanted and "ends inside" in rows(path)[-1].error


def test_objects_inside_of_a_damaged_first_row_are_no_rows(tmp_path):
    turns = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]
    wanted = [{"id": str(i), "conversations": turns} for i in range(50)]
    texts = [json.dumps(row)[: -20 if i % 20 == 0 else None] for i, row in enumerate(wanted)]
    for between in (",", ",\n"):
        (tmp_path / "a.json").write_text("[" + between.join(texts) + "]")
        found = rows(tmp_path / "a.json")
        assert values(found) == [row for i, row in enumerate(wanted) if i % 20]
        assert [row.number for row in found if row.error] == [1, 21, 41]


def test_bytes_that_are_no_text_are_refused(tmp_path):
    for name, text in (("a.json", b'[{"id": "a"}, {"id": "\xff"}, {"id": "b"}]'),
                       ("a.jsonl", b'{"id": "a"}\n{"id": "\xff"}\n{"id": "b"}\n')):  # fmt: skip
        (tmp_path / name).write_bytes(text)
        found = rows(tmp_path / name)
        assert values(found) == [{"id": "a"}, {"id": "b"}] and found[1].error


@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
def test_memory_does_not_grow_with_the_file(tmp_path, suffix, monkeypatch):
    monkeypatch.setattr(sources_files, "_CHUNK", 2**16)
    path = tmp_path / f"a{suffix}"
    row = json.dumps({"id": "x", "question": "y" * 2000})
    with path.open("w") as file:
        file.write("[" * (suffix == ".json"))
        for _ in range(5000):
            file.write(row + (",\n" if suffix == ".json" else "\n"))
        file.write((row + "]") * (suffix == ".json"))
    assert path.stat().st_size > 10_000_000
    tracemalloc.start()
    count = sum(1 for _ in sources_files.read_rows(located(path)))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 5000 + (suffix == ".json") and peak < 2_000_000


def test_a_row_too_long_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(sources_files, "MAX_ROW", 1000)
    monkeypatch.setattr(sources_files, "_CHUNK", 100)
    wanted = [{"id": "a"}, {"id": "b", "question": "x" * 5000}, {"id": "c"}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, wanted)))
    (tmp_path / "b.json").write_text('[{"id": "a"}, {"id": "b", "question": "' + "x" * 5000 + ', {"id": "c"}]')
    for name in ("a.jsonl", "b.json"):
        found = rows(tmp_path / name)
        assert values(found) == [wanted[0], wanted[2]] and [row.number for row in found if row.error] == [2]


def test_parquet_in_batches_and_damaged(tmp_path):
    wanted = [{"id": str(i), "image": {"bytes": bytes([i]), "path": None}} for i in range(200)]
    path = tmp_path / "a.parquet"
    pq.write_table(pa.Table.from_pylist(wanted), path, row_group_size=50)
    assert values(rows(path)) == wanted
    data = bytearray(path.read_bytes())
    path.write_bytes(data[:100])
    (row,) = rows(path)
    assert row.number == 0 and "Parquet damaged" in row.error
    with pq.ParquetFile(io.BytesIO(data)) as file:
        column = file.metadata.row_group(2).column(1)
        start = column.dictionary_page_offset or column.data_page_offset
    data[start : start + 40] = os.urandom(40)
    path.write_bytes(data)
    found = rows(path)
    assert values(found) == wanted[: len(values(found))] and len(values(found)) >= 64 and found[-1].error


def test_a_value_of_a_parquet_row_that_cannot_be_read_costs_its_row_only(tmp_path):
    texts = pa.array([b"a", b"\xff", b"c", b"d"], pa.binary()).view(pa.string())
    dates = pa.array([0, 0, 0, 2**61], pa.timestamp("us"))
    pq.write_table(pa.table({"id": texts, "when": dates}), tmp_path / "a.parquet")
    found = rows(tmp_path / "a.parquet")
    assert [row.value and row.value["id"] for row in found] == ["a", None, "c", None]
    assert [(row.number, row.error[:28]) for row in found if row.error] == [
        (2, "a value that cannot be read "), (4, "a value that cannot be read ")
    ]  # fmt: skip


def png(size=(4, 4), color="red"):
    out = io.BytesIO()
    Image.new("RGB", size, color).save(out, "PNG")
    return out.getvalue()


@pytest.fixture
def source(tmp_path):
    """A source's folder with an image in images/, and a secret beside it."""
    folder = tmp_path / "source"
    (folder / "images" / "sub").mkdir(parents=True)
    (folder / "images" / "a.png").write_bytes(png())
    (tmp_path / "secret.png").write_bytes(png(color="blue"))
    (folder / "rows.json").write_text("[]")
    return folder


def test_images_inside_are_found(source):
    files = ImageFiles(located(source / "rows.json"), ("", "images"))
    assert files.read("images/a.png") == files.read("a.png") == files.read("./images/a.png") == png()
    os.symlink(source / "images" / "a.png", source / "images" / "link.png")
    assert files.read("link.png") == png()


@pytest.mark.parametrize(
    "name",
    [
        "../secret.png", "images/../../secret.png", "/etc/hostname", "C:\\secret.png", "..\\secret.png",
        "file:///etc/hostname", "http://a.example/x.png", "images/a.png\0.txt", "link.png", "folder/secret.png",
        "images", "pipe.png", "circle.png", "missing.png", "", "  ", None, 7, "x" * 5000, "a.png/b.png",
    ],
)  # fmt: skip
def test_paths_that_lead_elsewhere_are_refused(source, name):
    os.symlink(source.parent / "secret.png", source / "images" / "link.png")
    os.symlink(source.parent, source / "images" / "folder")
    os.symlink("circle.png", source / "images" / "circle.png")
    os.mkfifo(source / "images" / "pipe.png")  # reading it would wait for ever
    with pytest.raises(UserError):
        ImageFiles(located(source / "rows.json"), ("", "images")).read(name)


def test_rows_behind_a_link_that_leads_out_are_refused(tmp_path):
    """Unless it is the link that was named."""
    secret, folder = tmp_path / "secret.jsonl", tmp_path / "source"
    secret.write_text('{"id": "s"}\n')
    folder.mkdir()
    (folder / "b.jsonl").write_text('{"id": "b"}\n')
    os.symlink("../secret.jsonl", folder / "a.jsonl")
    os.symlink("b.jsonl", folder / "c.jsonl")
    found = list(sources_files.read_rows(sources_files.locate(str(folder), ("*.jsonl",))))
    assert [(row.file, row.value and row.value["id"]) for row in found] == [
        ("a.jsonl", None), ("b.jsonl", "b"), ("c.jsonl", "b")
    ]  # fmt: skip
    assert found[0].error == "a link that leads out of the source's folder"
    assert values(sources_files.read_rows(sources_files.locate(str(folder / "a.jsonl"), ()))) == [{"id": "s"}]


def test_links_of_a_hub_snapshot_may_lead_to_its_blobs(tmp_path):
    """The hub's cache keeps files as ``snapshots/REVISION/NAME -> ../../blobs/HASH``."""
    snapshot, blobs = tmp_path / "datasets--a--b" / "snapshots" / ("0" * 40), tmp_path / "datasets--a--b" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    (blobs / "h").write_bytes(png())
    os.symlink("../../blobs/h", snapshot / "a.png")
    (snapshot / "rows.json").write_text("[]")
    place = Located(snapshot, (snapshot / "rows.json",), (snapshot, snapshot.parent.parent))
    assert ImageFiles(place).read("a.png") == png()


def test_images_in_archives(source, monkeypatch):
    with zipfile.ZipFile(source / "data_images.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("data_images/x/b.png", png())
        archive.writestr("../evil.png", png())
        archive.writestr("data_images/bomb.png", b"\0" * 3_000_000)
    (source / "broken.zip").write_bytes(b"PK\x03\x04 nothing")
    monkeypatch.setattr(images, "MAX_BYTES", 2_000_000)
    files = ImageFiles(located(source / "rows.json"), ("", "images"))
    assert files.read("x/b.png") == files.read("data_images/x/b.png") == png()
    for name in ("bomb.png", "../evil.png", "nothing.png"):
        with pytest.raises(UserError):
            files.read(name)


def test_damaged_archives_cost_their_images_only(source):
    """LZMA data that is none; a version of the format, and a member's name, that zipfile stops at."""
    for name, compression, at, new in (("a", zipfile.ZIP_LZMA, None, None), ("b", zipfile.ZIP_STORED, 6, b"\x63\0"),
                                       ("c", zipfile.ZIP_STORED, 8, b"\0\x08")):  # fmt: skip
        with zipfile.ZipFile(source / f"{name}.zip", "w", compression) as archive:
            archive.writestr(f"{name}/x.png", png((40, 40)))
        data = bytearray((source / f"{name}.zip").read_bytes())
        index = data.rfind(b"PK\1\2")
        if new:
            data[index + at : index + at + 2] = new
            data[data.rfind(b"c/x.png")] = 0xFF if name == "c" else data[data.rfind(b"c/x.png")]
        else:
            data[60 : index - 2] = bytes(x ^ 255 for x in data[60 : index - 2])
        (source / f"{name}.zip").write_bytes(data)
    with zipfile.ZipFile(source / "d.zip", "w") as archive:
        archive.writestr("d/x.png", png())
    files = ImageFiles(located(source / "rows.json"))
    assert files.read("d/x.png") == png()
    for name, reason in (("a", "cannot be read from a.zip"), ("b", "image not found"), ("c", "image not found")):
        with pytest.raises(UserError, match=reason):
            files.read(f"{name}/x.png")


def test_locate_tells_what_is_missing(tmp_path):
    with pytest.raises(UserError, match="neither a file, a folder nor a hub id"):
        sources_files.locate(str(tmp_path / "nothing here"), ("*.json",))
    (tmp_path / "x.json").write_text("[]")
    with pytest.raises(UserError, match="no file .*test.*it has x.json"):
        sources_files.locate(str(tmp_path), ("*test*",))
    for names, wanted in ((("a_test.json", "a_train.json"), "a_train.json"), (("b.jsonl",), "b.jsonl")):
        folder = tmp_path / wanted
        folder.mkdir()
        for name in names:
            (folder / name).write_text("[]")
        found = sources_files.locate(str(folder), ("*train*", "*.jsonl"))
        assert [path.name for path in found.files] == [wanted]


def test_hub_ids_are_downloaded_at_their_revision(tmp_path, monkeypatch):
    import huggingface_hub

    asked = []
    (tmp_path / "snapshots" / "abc").mkdir(parents=True)
    (tmp_path / "snapshots" / "abc" / "train.json").write_text("[]")

    def download(repo, **settings):
        asked.append((repo, settings["repo_type"], settings["revision"]))
        return str(tmp_path / "snapshots" / "abc")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    for name, revision in (("org/set@abc", "abc"), ("org/set", None)):
        found = sources_files.locate(name, ("*train*",))
        assert asked.pop() == ("org/set", "dataset", revision) and tmp_path in found.trusted
        assert found.revision == "abc"
        assert [path.name for path in found.files] == ["train.json"]


# Tables, compressed files, archives with a top folder, paths of other machines.


def table(*lines):
    out = io.StringIO()
    csv.writer(out, "excel-tab").writerows(lines)
    return out.getvalue()


def test_rows_of_tables(tmp_path):
    """Quoted tabs, quotes and lines; empty cells are none; a bad row costs itself."""
    path = tmp_path / "x.tsv"
    text = table(
        ["index", "question", "A", "B"], ["1", 'a\t"b"\nc 汉', "x", ""], ["2", "short"], ["3", "q", "", "y"],
        ["4", "q" * 200_000, "1", "2"],
    )  # fmt: skip
    path.write_bytes(b"\xef\xbb\xbf" + text.encode() + b"5\t\xff\t1\t2\n6\tlast\t1\t2")
    found = rows(path)
    assert [(row.number, row.value and row.value["index"], row.error) for row in found] == [
        (1, "1", ""), (2, None, "2 values below 4 names"), (3, "3", ""), (4, "4", ""), (5, None, "not UTF-8"),
        (6, "6", ""),
    ]  # fmt: skip
    assert found[0].value == {"index": "1", "question": 'a\t"b"\nc 汉', "A": "x"} and found[2].value["B"] == "y"


@pytest.mark.parametrize("name", ["x.tsv", "x.jsonl", "x.json"])
def test_compressed_rows(tmp_path, name):
    made = [{"id": str(i), "question": f"q{i}"} for i in range(200)]
    whole = {
        "x.tsv": table(["id", "question"], *(row.values() for row in made)), "x.json": json.dumps(made),
        "x.jsonl": "".join(json.dumps(row) + "\n" for row in made),
    }[name]  # fmt: skip
    data = gzip.compress(whole.encode())
    (tmp_path / f"{name}.gz").write_bytes(data)
    place = sources_files.locate(str(tmp_path), (f"*.{name[2:]}",))
    assert [path.name for path in place.files] == [f"{name}.gz"] and values(sources_files.read_rows(place)) == made
    for damaged in (data[:-20], data[:60] + bytes([data[60] ^ 8]) + data[61:], b"no gzip"):
        (tmp_path / f"{name}.gz").write_bytes(damaged)
        (row,) = sources_files.read_rows(place)
        assert "cannot be read" in row.error and row.value is None


def test_archives_of_both_kinds_may_have_a_top_folder(source):
    with zipfile.ZipFile(source / "p.zip", "w") as archive:
        archive.writestr("Photos-v1/x/b.png", png())
    with tarfile.open(source / "q.tar", "w") as archive:
        for name, data in (("./top/y/c.png", png((3, 3))), ("./top/d.png", png((4, 4)))):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
        link = tarfile.TarInfo("top/link.png")
        link.type, link.linkname = tarfile.SYMTYPE, "../../secret.png"
        archive.addfile(link)
    with tarfile.open(source / "r.tar.gz", "w:gz"):
        pass
    (source / "s.tar").write_bytes((source / "q.tar").read_bytes()[:700])
    files = ImageFiles(located(source / "rows.json"))
    assert files.read("x/b.png") == files.read("Photos-v1/x/b.png") == png()
    assert files.read("y/c.png") == files.read("top/y/c.png") == png((3, 3)) and files.read("d.png") == png((4, 4))
    with pytest.raises(UserError, match="link.png: image not found; unpack r.tar.gz"):
        files.read("link.png")


def test_paths_of_other_machines_are_looked_for_below_the_root(source, tmp_path):
    root = tmp_path / "pictures"
    (root / "train" / "x").mkdir(parents=True)
    (root / "train" / "x" / "1.png").write_bytes(png((3, 3)))
    (root / "1.png").write_bytes(png((4, 4)))
    os.symlink(source.parent / "secret.png", root / "link.png")
    files = ImageFiles(located(source / "rows.json"), ("", "images"), root)
    for name in ("/data/me/train/x/1.png", "train/x/1.png", r"train\x\1.png"):
        assert ImageFiles(located(source / "rows.json"), root=root).read(name) == png((3, 3))
    assert files.read(r"D:\sets\train\x\1.png") == png((3, 3)) and files.read(r"C:\1.png") == png((4, 4))
    assert files.read("a.png") == png()  # the source's own come first
    for name, reason in (
        ("/other/1.png", "would both be"), ("/data/link.png", "a link that leads out"),
        ("/data/../1.png", "stay inside"), (r"C:\..\1.png", "stay inside"), ("/data/2.png", "no end of this path"),
        ("/" + "a/" * 5000 + "1.png", "no path of an image"), ("/", "no path of an image"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=reason):
            files.read(name)
    with pytest.raises(UserError, match="--image-root=FOLDER says where"):
        ImageFiles(located(source / "rows.json")).read("/data/1.png")

"""``mmprm prepare``: a named data set into the files that the stages read.

    OUTPUT/NAME.jsonl              the records (NAME: the split, "sft" for demonstrations, "labels" for step labels)
    OUTPUT/images/ab/abcd….png     the images as they were encoded, by the hash of their bytes
    OUTPUT/prepare/NAME/           refused.jsonl, removed.jsonl, benchmark.jsonl (of a benchmark) and summary.json

Each file is written beside its place and moved there when it is whole; the same command writes the same bytes again.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from mmprm_jax import interruption, records
from mmprm_jax import io as files
from mmprm_jax.data import decontaminate, image_files, images, sources
from mmprm_jax.data.image_files import ImageFiles
from mmprm_jax.data.rewriter import Rewriter
from mmprm_jax.data.selection import Selection, select
from mmprm_jax.data.sources_base import Item, Picture, Refused, Source, replace_fields
from mmprm_jax.data.sources_files import Located
from mmprm_jax.metrics import progress
from mmprm_jax.records import Problem, UserError

FOLDER = "prepare"


@dataclasses.dataclass(frozen=True)
class Settings:
    """What the command line says."""

    source: str
    path: str
    output: Path
    split: str = "train"
    name: str = ""  # of the file of records; "": the split, "sft" or "labels"
    limit: int = 0  # good rows; 0: all
    against: tuple[Path, ...] = ()  # prepared benchmarks
    rewriter: Rewriter | None = None
    selection: Selection = Selection()  # of step labels
    image_root: Path | None = None  # where images lie whose paths are absolute, or of Windows


class Images:
    """Copies the images of rows into the output folder."""

    def __init__(self, files: ImageFiles, output: Path):
        self._files, self._output = files, output
        self.blank: set[str] = set()  # kept images that are of one colour as the model sees them

    def _load(self, picture: Picture) -> tuple[bytes, str]:
        if isinstance(picture, str):
            return self._files.read(picture), picture
        return picture, "the row's image"

    def opened(self, pictures: Sequence[Picture]) -> list[tuple[bytes, Image.Image]]:
        """The images' bytes and pixels. Raises UserError when one is refused; all together have one image's limits."""
        found, size, pixels = [], 0, 0
        for picture in pictures:
            data, name = self._load(picture)
            image = images.decode_image(data, name)
            size, pixels = size + len(data), pixels + image.width * image.height
            if size > images.MAX_BYTES or pixels > images.MAX_PIXELS:
                limits = f"{images.MAX_BYTES} bytes or {images.MAX_PIXELS} pixels"
                raise UserError(f"its {len(pictures)} images have more than {limits} in all")
            found.append((data, image))
        return found

    def keep(self, data: bytes, image: Image.Image) -> str:
        """Writes an image unless it is there. Returns its path relative to the output folder."""
        digest = hashlib.sha256(data).hexdigest()[:32]
        path = Path("images") / digest[:2] / f"{digest}.{image_files.suffix(data)}"
        extremes: Any = image.getextrema()  # of each channel: the image is RGB
        if all(low == high for low, high in extremes):
            self.blank.add(path.as_posix())
        target = self._output / path
        if not (target.exists() and target.stat().st_size == len(data)):
            files.write(target, data)
        return path.as_posix()


@dataclasses.dataclass
class _Report:
    """What did not become a record, and how much did; the files of it are open while rows are read."""

    refused_file: Any
    removed_file: Any
    rows: int = 0
    written: int = 0
    reasons: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    matches: collections.Counter = dataclasses.field(default_factory=collections.Counter)

    def refuse(self, refused: Refused) -> None:
        self.refused_file.write(records.to_json(refused) + "\n")
        self.reasons[_kind(refused.reason)] += 1

    def remove(self, id_: str, match: decontaminate.Match) -> None:
        row = decontaminate.removed_row(id_, match)
        self.removed_file.write(json.dumps(row, ensure_ascii=False, separators=(",", ":")) + "\n")
        self.matches[f"{match.benchmark}: {match.why}"] += 1


def _kind(reason: str) -> str:
    """A reason without what differs from row to row."""
    return reason.rpartition(": ")[2].split(" (")[0][:80]


def _held_out(summary: Path) -> bool:
    """Whether prepared rows are no training data, which may lie beside a benchmark. Raises UserError."""
    try:
        found = json.loads(summary.read_text(encoding="utf-8"))
        source = sources.SOURCES.get(found["source"])
        return found["split"] != "train" and not (source and source.kind == "labels")
    except (ValueError, TypeError, KeyError):
        raise UserError(f"{summary}: damaged; run mmprm prepare again") from None


def benchmark_problems(folders: Iterable[Path], target: Path) -> Iterator[decontaminate.BenchmarkProblem]:
    """The problems of prepared benchmarks, but those that ``target`` holds from a run before this one.

    Raises UserError when a folder is none.
    """
    for folder in folders:
        names = sorted(path.parent.name for path in folder.glob(f"{FOLDER}/*/summary.json") if _held_out(path))
        files = [folder / f"{name}.jsonl" for name in names] or sorted(folder.glob("test*.jsonl"))
        files = [path for path in files if path.resolve() != target.resolve()]
        if not files:
            raise UserError(
                f"{folder}: no prepared benchmark; make it with mmprm prepare BENCHMARK … --output={folder}"
            )
        for path in files:
            for problem in records.read(path, Problem):
                seen = []
                for file in (folder / name for name in problem.images):
                    images.open_image(file)  # within the limits
                    seen.append(decontaminate.image_fingerprint(file.read_bytes()))
                name = problem.source or f"{folder.name}/{path.stem}"
                yield decontaminate.BenchmarkProblem(
                    name, problem.id, decontaminate.question_fingerprint(problem.question), tuple(seen)
                )


def run(settings: Settings) -> dict[str, Any]:
    """Prepares a source. Returns the summary. Raises UserError when no row at all was good."""
    source = sources.find(settings.source)
    located = sources.locate(source, settings.path, settings.split, settings.output)
    name = settings.name or (source.kind if source.kind in ("sft", "labels") else settings.split)
    target = settings.output / f"{name}.jsonl"
    if target.resolve() in [path.resolve() for path in located.files]:
        raise UserError(f"{target}: is read, and would be replaced; choose another --output or --name")
    if source.kind == "steps" and settings.against:
        raise UserError(f"--against is for training data; {source.name} is a benchmark")
    benchmarks = (
        decontaminate.BenchmarkIndex(benchmark_problems(settings.against, target)) if settings.against else None
    )
    folder = settings.output / FOLDER / name
    folder.mkdir(parents=True, exist_ok=True)
    pictures = Images(ImageFiles(located, source.image_folders, settings.image_root), settings.output)
    scoring: list[dict[str, Any]] = []
    left_out: collections.Counter[str] = collections.Counter()
    with _replacing(folder / "refused.jsonl") as refused, _replacing(folder / "removed.jsonl") as removed:
        report = _Report(refused, removed)
        rows = _rows(source, located, settings, left_out)
        rows = _select(rows, pictures, benchmarks, report, settings.limit)
        if settings.rewriter:
            rows = settings.rewriter.rewrite(rows)
        with progress(None, f"prepare {source.name}", "row") as bar:
            report.written = records.write(target, _to_records(rows, scoring, bar))
    summary = {
        "source": source.name, "split": settings.split, "from": settings.path, "revision": located.revision,
        "file": f"{name}.jsonl", "rows": report.rows, "written": report.written, "refused": report.reasons.total(),
        "removed": report.matches.total(), "refused_by_reason": dict(report.reasons.most_common()),
        "removed_by_match": dict(sorted(report.matches.items())), "benchmark_problems": len(benchmarks or ()),
        "blank_images": sorted(pictures.blank),
        **({"rewriter": settings.rewriter.figures()} if settings.rewriter else {}),
        **({"left_out": dict(sorted(left_out.items()))} if settings.selection else {}),
    }  # fmt: skip
    if scoring:
        with _replacing(folder / "benchmark.jsonl") as file:
            file.writelines(json.dumps(row, ensure_ascii=False, separators=(",", ":")) + "\n" for row in scoring)
    else:  # of another source that was prepared under this name
        (folder / "benchmark.jsonl").unlink(missing_ok=True)
    with _replacing(folder / "summary.json") as file:
        file.write(json.dumps(summary, indent=1, ensure_ascii=False) + "\n")
    if not report.written:
        raise UserError(
            f"{settings.path}: none of {report.rows} rows became a record of {source.name}: {summary['refused']} were"
            f" refused, {summary['removed']} removed as copies of a benchmark's; each is listed in {folder}"
            + _not_selected(left_out)
        )
    return summary


def _rows(
    source: Source, located: Located, settings: Settings, left_out: collections.Counter
) -> Iterable[Item | Refused]:
    """The rows of the source that the settings select."""

    def read() -> Iterator[Item | Refused]:
        return sources.items(source, located, settings.split)

    return select(read, settings.selection, left_out) if settings.selection else read()


def _not_selected(left_out: Mapping[str, int]) -> str:
    """What ``selection.select`` counted, in words; empty for nothing."""
    rows = left_out.get("rows_bis", 0), left_out.get("rows_certain", 0)
    return f"; not selected: {rows[0]} rows by their score, {rows[1]} as uncertain" if any(rows) else ""


def _to_records(rows: Iterable[Item], scoring: list[dict[str, Any]], bar: Any) -> Iterator[Any]:
    """The records of the items, whose scoring rows are gathered."""
    for item in rows:
        if item.benchmark:
            scoring.append({"id": item.record.id, **item.benchmark})
        bar.update()
        yield item.record


def _select(
    rows: Iterable[Item | Refused], pictures: Images, benchmarks: decontaminate.BenchmarkIndex | None, report: _Report,
    limit: int,
) -> Iterator[Item]:  # fmt: skip
    """The items that are to be written, with their images in place."""
    kept = 0
    for row in rows:
        interruption.check()
        report.rows += 1
        if isinstance(row, Refused):
            report.refuse(row)
            continue
        try:
            opened = pictures.opened(row.pictures)
        except UserError as error:
            report.refuse(Refused(row.file, row.row, row.record.id, str(error)))
            continue
        if benchmarks:
            seen = [decontaminate.image_fingerprint(data) for data, _ in opened]
            match = benchmarks.match(decontaminate.question_fingerprint(row.record.question), seen)
            if match:
                report.remove(row.record.id, match)
                continue
        paths = tuple(pictures.keep(*encoded) for encoded in opened)
        yield dataclasses.replace(row, record=replace_fields(row.record, images=paths))
        kept += 1
        if kept == limit:
            return


@contextlib.contextmanager
def _replacing(path: Path) -> Iterator[Any]:
    """A text file that takes its place when it is whole."""
    temporary = path.with_name(f"{path.name}.tmp")
    with temporary.open("w", encoding="utf-8", errors="backslashreplace") as file:
        yield file
    temporary.replace(path)


def describe(settings: Settings, summary: Mapping[str, Any]) -> Iterator[str]:
    """What was written, then a line for each kind of row or image that the user may want to image_fingerprint at."""
    folder = settings.output / FOLDER / Path(summary["file"]).stem
    yield f"{settings.output / summary['file']}: {summary['written']} of {summary['rows']} rows of {summary['source']}"
    left_out = summary.get("left_out", {})
    if any(left_out.values()):
        yield f"{_not_selected(left_out)[2:]}; {left_out.get('steps_certain', 0)} uncertain labels of other rows"
    for kind, by in (("refused", "refused_by_reason"), ("removed", "removed_by_match")):
        if summary[kind]:
            top = "; ".join(f"{count} x {reason}" for reason, count in list(summary[by].items())[:8])
            yield f"{kind} {summary[kind]} rows ({top}): {folder / kind}.jsonl"
    if summary["blank_images"]:
        count = len(summary["blank_images"])
        yield f"{count} images are of one colour, models see nothing there: {folder / 'summary.json'}"

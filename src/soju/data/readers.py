"""Files, samples and hub data sets become typed rows, one at a time; what cannot be read is in the log.

`read_rows` is the one way in; `read_beir` reads the three files of a retrieval test set. A `SourceFilter` keeps the
lines of some sources, which a companion file names line by line.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic

from soju.core.errors import require_extra
from soju.data.log import SKIP, Place, ReadLog, SourceCounts, printable, show
from soju.data.rows import DOCUMENTS, JUDGEMENTS, Document, Judgement, Kind, KnowledgeRow, PassageRow, RowT
from soju.data.sources import (
    MAX_LINE_BYTES,
    FileSource,
    HubSource,
    decode_line,
    parse_json,
    parse_json_array,
    parse_tsv,
    read_lines,
    resolve,
)

_MAX_KNOWN = 1000
MAX_ARRAY_BYTES = 1 << 26
"""Longest ``.json`` file that is read: an array is held whole, unlike lines."""


_Raw = tuple[Place, dict[str, Any] | None]


@dataclass(frozen=True, slots=True)
class SourceFilter:
    """Read only the lines of a data file whose source is wanted.

    ``train.src.gz`` stands beside ``train.tsv.gz``: line n of the one names the source of row n of the other in its
    first tab-separated column. A header line of the data file has no line there.
    """

    file: str
    """The companion file, plain or ``.gz``; relative to the same folder as the data file."""
    keep: tuple[str, ...]
    """Sources to read, compared exactly."""


def read_rows(
    sources: Sequence[str],
    kind: Kind[RowT],
    *,
    log: ReadLog,
    root: Path | None = None,
    select: SourceFilter | None = None,
    max_line_bytes: int = MAX_LINE_BYTES,
    check: Callable[[RowT, Place], None] | None = None,
) -> Iterator[RowT]:
    """Yield the good rows of all sources in order and record the others in `log`.

    Memory is constant but for ``.json`` arrays, and for the ids of documents, passages and knowledge, which are kept to
    find duplicates. Nothing is raised for bad data: go through the rows, then call ``log.raise_if_broken``.

    Args:
        sources: Paths, patterns, ``samples:NAME``, ``hub:OWNER/NAME:SPLIT``; see ``docs/data_formats.md``.
        kind: What a row is: `soju.data.rows.PAIRS` and its like.
        log: Gets counts and problems.
        root: Folder that relative paths start from; the working folder when ``None``.
        select: Read only lines of some sources; needs exactly one data file.
        max_line_bytes: Longer lines are refused.
        check: Sees every row that is good by itself and may refuse it at its place.

    Yields:
        Rows that hold what `soju.data.rows` promises.
    """
    found = resolve(sources, kind, root=root, log=log)
    selector = None
    if select is not None and found:
        if len(found) > 1 or isinstance(found[0], HubSource):
            remedy = "name one data file, or make one reading for each file"
            log.refuse_file(select.file, 0, "a source filter serves exactly one data file", remedy, "select-several")
            return
        selector = LineSelector(select, root=root, log=log)
    reading = _Reading(kind, log, selector, max_line_bytes, several=len(found) > 1, check=check)
    for source in found:
        yield from reading.rows_of(source)


@dataclass(slots=True)
class _Reading(Generic[RowT]):
    """What the sources of one call of `read_rows` share."""

    kind: Kind[RowT]
    log: ReadLog
    selector: LineSelector | None
    max_line_bytes: int
    several: bool
    check: Callable[[RowT, Place], None] | None = None
    known_ids: dict[str, tuple[str, int]] = field(default_factory=dict)

    def rows_of(self, source: FileSource | HubSource) -> Iterator[RowT]:
        counts = self.log.source(source.name)
        file_problems_before = len(self.log.file_problems)
        raws = self.hub_objects(source) if isinstance(source, HubSource) else self.file_objects(source, counts)
        for place, raw in raws:
            row = None if raw is None else self.kind.parse(raw, place)
            if isinstance(row, Document | PassageRow | KnowledgeRow):
                self.refuse_known_id(row.id, place)
            if row is not None and self.check is not None:
                self.check(row, place)
            if place.problems:
                counts.refused += 1
                self.log.refuse_row(place.problems)
                place.problems = []
            elif row is not None:
                counts.kept += 1
                counts.normalised += place.normalised
                yield row
            place.normalised = False
        lines = counts.kept + counts.refused + counts.deselected
        if lines == 0 and len(self.log.file_problems) == file_problems_before:
            remedy = "fill it or remove it from the configuration"
            self.log.refuse_file(source.name, 0, "holds no row", remedy, "no-rows")

    def hub_objects(self, source: HubSource) -> Iterator[_Raw]:
        place = Place(source.name)
        for number, raw in enumerate(read_hub(source, log=self.log), start=1):
            place.line = number
            yield place, raw

    def array_objects(self, source: FileSource) -> Iterator[_Raw]:
        """Yield the objects of a JSON array; such a file is small enough to be held, or it is refused."""
        place, lines, size = Place(printable(source.name)), [], 0
        read = read_lines(
            source.name, source.open, gzipped=source.gzipped, max_line_bytes=MAX_ARRAY_BYTES, log=self.log
        )
        problems = len(self.log.file_problems)
        for number, line in enumerate(read, start=1):
            size += MAX_ARRAY_BYTES + 1 if line is None else len(line)
            if size > MAX_ARRAY_BYTES:
                what, remedy = (
                    f"more than {MAX_ARRAY_BYTES:,} bytes",
                    f"write one object a line: jq -c '.[]' {source.name}",
                )
                self.log.refuse_file(source.name, number, what, remedy, "array-too-long")
                return
            place.line = number
            text = decode_line(line, place, MAX_ARRAY_BYTES)
            if text is None:
                yield place, None
                return
            lines.append(text)
        if len(self.log.file_problems) == problems and lines:
            for raw in parse_json_array("\n".join(lines), place):
                yield place, raw

    def file_objects(self, source: FileSource, counts: SourceCounts) -> Iterator[_Raw]:
        if source.format == "json":
            yield from self.array_objects(source)
            return
        place = Place(printable(source.name))
        columns = () if self.kind.headed else self.kind.columns
        for number, line in self.selected_lines(source, counts):
            place.line = number
            if number == 1 and source.format == "tsv" and (header := self.header(line)):
                columns = header
                continue
            if source.format == "tsv" and not columns:
                self.refuse_header(source, place, line)
                return
            text = decode_line(line, place, self.max_line_bytes)
            if text is None:
                yield place, None
            elif not text or text.isspace():
                counts.blank += 1
            elif source.format == "jsonl":
                yield place, parse_json(text, place)
            elif source.format == "tsv":
                yield place, parse_tsv(text, columns, place)
            else:
                yield place, {"id": f"{source.name}:{number}" if self.several else number, "text": text}

    def selected_lines(self, source: FileSource, counts: SourceCounts) -> Iterator[tuple[int, bytes | None]]:
        lines = read_lines(
            source.name, source.open, gzipped=source.gzipped, max_line_bytes=self.max_line_bytes, log=self.log
        )
        if self.selector is None:
            yield from enumerate(lines, start=1)
            return
        for number, line in enumerate(lines, start=1):
            if number == 1 and source.format == "tsv" and self.header(line):
                yield number, line
                continue
            wanted = self.selector.next_line(source.name)
            if wanted is None:
                return
            if wanted:
                yield number, line
            else:
                counts.deselected += 1
        self.selector.finish(source.name)

    def header(self, line: bytes | None) -> tuple[str, ...] | None:
        return self.kind.header(_first_text(line))

    def refuse_header(self, source: FileSource, place: Place, line: bytes | None) -> None:
        """Say what the first line of a file whose columns are known by name alone is lacking."""
        missing = ", ".join(self.kind.missing(_first_text(line)))
        remedy = f"write a header as the first line: {'<TAB>'.join(self.kind.columns)}"
        what = f"no header that names each column once: {missing}"
        self.log.refuse_file(source.name, place.line, what, remedy, "no-header")

    def refuse_known_id(self, name: str, place: Place) -> None:
        first = self.known_ids.get(name)
        if first is None:
            self.known_ids[name] = (place.file, place.line)
            return
        what = f"{show(name)} was the id of {first[0]}:{first[1]} already"
        place.refuse("id", what, f"give every row its own id, {SKIP}", "duplicate-id")


def _first_text(line: bytes | None) -> str:
    return (line or b"").decode("utf-8", "replace").removeprefix("\ufeff")


def read_hub(source: HubSource, *, log: ReadLog) -> Iterator[dict[str, Any]]:
    """Yield the rows of one split with its columns renamed to our fields.

    Nothing is downloaded beyond the parts that are read, and no code of the data set is run.
    """
    require_extra(source.name, "hub", "datasets")
    number = 0
    try:
        import datasets  # takes a second; most runs read files

        rows = datasets.load_dataset(source.dataset, source.configuration, split=source.split, streaming=True)
        for row in rows:
            number += 1
            yield _rename(row, source.columns)
    except Exception as error:  # the hub client raises errors of a dozen unrelated families
        cause = str(error).strip().split("\n")[0] or type(error).__name__
        remedy = (
            f"check the name, the split ({source.split}) and the network, or save the rows as .jsonl and name the file"
        )
        log.refuse_file(source.name, number + 1 if number else 0, f"cannot be read ({cause})", remedy, "hub")


def _rename(row: Mapping[str, Any], columns: Mapping[str, str]) -> dict[str, Any]:
    result = dict(row)
    for name, column in columns.items():
        result.pop(name, None)
        value: Any = row
        for part in column.split("."):
            if not isinstance(value, Mapping) or part not in value:
                break
            value = value[part]
        else:
            result[name] = value
    return result


class LineSelector:
    """Goes through a companion file in step with its data file."""

    def __init__(self, source_filter: SourceFilter, *, root: Path | None, log: ReadLog) -> None:
        self._filter = source_filter
        self._keep = frozenset(source_filter.keep)
        self._log = log
        self._problems_before = len(log.file_problems)
        self._seen: set[str] = set()
        self._number = 0
        path = (root or Path()) / source_filter.file
        self._lines: Iterator[bytes | None] = read_lines(
            source_filter.file,
            lambda: path.open("rb"),
            gzipped=source_filter.file.endswith(".gz"),
            max_line_bytes=MAX_LINE_BYTES,
            log=log,
        )

    def next_line(self, data_file: str) -> bool | None:
        """Tell whether the next line of the data file is wanted; ``None`` when the companion has ended before it."""
        try:
            line = next(self._lines)
        except StopIteration:
            if len(self._log.file_problems) == self._problems_before:
                self._refuse_length(f"{self._number:,} lines, but {data_file} has more")
            return None
        self._number += 1
        name = (line or b"").split(b"\t", 1)[0].decode("utf-8", "replace").removeprefix("\ufeff").strip()
        if len(self._seen) < _MAX_KNOWN:
            self._seen.add(name)
        if name not in self._keep:
            return False
        self._log.selected[name] += 1
        return True

    def finish(self, data_file: str) -> None:
        """Check at the end of the data file that the companion ends too and that every wanted source occurred."""
        if len(self._log.file_problems) > self._problems_before:
            return
        if next(self._lines, b"") != b"":
            self._refuse_length(f"more than {self._number:,} lines, but {data_file} has {self._number:,}")
        missing = sorted(self._keep - self._seen)
        if missing and len(self._seen) < _MAX_KNOWN:
            known = ", ".join(sorted(self._seen)[:20])
            what = f"no line has the source {', '.join(missing)}"
            self._log.refuse_file(self._filter.file, 0, what, f"write some of {known}", "unknown-source")

    def _refuse_length(self, what: str) -> None:
        remedy = "use the two files of one release, line n of the one for row n of the other"
        self._log.refuse_file(self._filter.file, self._number + 1, what, remedy, "misaligned")


@dataclass(frozen=True, slots=True)
class BeirSet:
    """Texts and judgements of one split."""

    queries: dict[str, str]
    """Id -> text of the queries that some document answers, in the order of the file."""
    documents: dict[str, str]
    """Id -> title and text of the whole corpus."""
    judgements: dict[str, dict[str, float]]
    """Query id -> document id -> gain >= 1."""


def read_beir(
    folder: str,
    *,
    log: ReadLog,
    split: str = "test",
    root: Path | None = None,
    max_line_bytes: int = MAX_LINE_BYTES,
) -> BeirSet:
    """Read one split; each file may be compressed (``.gz``).

    A judgement that names a query or a document that is not there is refused, and so is a second one of the same two.
    Queries that no document answers are left out, since no ranking of them is better than another.
    """

    def name_of(file: str) -> str:
        name = f"{folder.rstrip('/')}/{file}"
        base = root or Path()
        return f"{name}.gz" if not (base / name).exists() and (base / f"{name}.gz").exists() else name

    problems_before = len(log.file_problems)
    documents, queries = (
        {row.id: row.text for row in read_rows([name], DOCUMENTS, log=log, root=root, max_line_bytes=max_line_bytes)}
        for name in (name_of("corpus.jsonl"), name_of("queries.jsonl"))
    )
    judgements: dict[str, dict[str, float]] = {}
    if len(log.file_problems) == problems_before:  # else every judgement would be about nothing
        check = _Check(queries, documents)
        name = name_of(f"qrels/{split}.tsv")
        for row in read_rows([name], JUDGEMENTS, log=log, root=root, max_line_bytes=max_line_bytes, check=check):
            if row.gain >= 1:
                judgements.setdefault(row.query, {})[row.document] = float(row.gain)
    return BeirSet({key: text for key, text in queries.items() if key in judgements}, documents, judgements)


class _Check:
    """Refuses judgements about what is not there, and second ones."""

    def __init__(self, queries: dict[str, str], documents: dict[str, str]) -> None:
        self._queries = queries
        self._documents = documents
        self._lines: dict[tuple[str, str], int] = {}

    def __call__(self, row: Judgement, place: Place) -> None:
        for column, key, known, file in (
            ("query-id", row.query, self._queries, "queries.jsonl"),
            ("corpus-id", row.document, self._documents, "corpus.jsonl"),
        ):
            if key not in known:
                what = f"{show(key)} is no id of {file}"
                place.refuse(column, what, f"add it there, {SKIP}", "unknown-id")
        first = self._lines.setdefault((row.query, row.document), place.line)
        if first != place.line:
            what = f"{show(row.document)} was judged for {show(row.query)} in line {first} already"
            place.refuse("", what, f"keep one of the two, {SKIP}", "duplicate-judgement")

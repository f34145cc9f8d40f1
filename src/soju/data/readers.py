"""Files become typed rows, one at a time; whatever cannot be read is in the log with its place and remedy."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, overload

from soju.data.fields import show
from soju.data.formats import header_of, parse_json, parse_tsv
from soju.data.hub import read_hub
from soju.data.lines import MAX_LINE_BYTES, decode_line, read_lines
from soju.data.log import SKIP, Place, ReadLog, SourceCounts, printable
from soju.data.records import (
    ChoiceQuestion,
    Document,
    InferencePair,
    Judgement,
    PairRow,
    PassageRow,
    SimilarityPair,
    TermRow,
    TripletRow,
)
from soju.data.rows import COLUMNS, PARSERS, Kind, Row
from soju.data.similarity_pairs import HEADED, header_columns
from soju.data.source_filter import LineSelector, SourceFilter
from soju.data.sources import FileSource, HubSource, resolve

_Raw = tuple[Place, dict[str, Any] | None]


@overload
def read_rows(
    sources: Sequence[str],
    kind: Literal["terms"],
    *,
    log: ReadLog,
    root: Path | None = ...,
    select: SourceFilter | None = ...,
    max_line_bytes: int = ...,
) -> Iterator[TermRow]: ...
@overload
def read_rows(
    sources: Sequence[str],
    kind: Literal["pairs", "query_pairs"],
    *,
    log: ReadLog,
    root: Path | None = ...,
    select: SourceFilter | None = ...,
    max_line_bytes: int = ...,
) -> Iterator[PairRow]: ...
@overload
def read_rows(
    sources: Sequence[str],
    kind: Literal["triplets"],
    *,
    log: ReadLog,
    root: Path | None = ...,
    select: SourceFilter | None = ...,
    max_line_bytes: int = ...,
) -> Iterator[TripletRow]: ...
@overload
def read_rows(
    sources: Sequence[str],
    kind: Literal["documents"],
    *,
    log: ReadLog,
    root: Path | None = ...,
    select: SourceFilter | None = ...,
    max_line_bytes: int = ...,
) -> Iterator[Document]: ...
@overload
def read_rows(
    sources: Sequence[str],
    kind: Literal["passages"],
    *,
    log: ReadLog,
    root: Path | None = ...,
    select: SourceFilter | None = ...,
    max_line_bytes: int = ...,
) -> Iterator[PassageRow]: ...
@overload
def read_rows(
    sources: Sequence[str],
    kind: Literal["similarity"],
    *,
    log: ReadLog,
    root: Path | None = ...,
    select: SourceFilter | None = ...,
    max_line_bytes: int = ...,
) -> Iterator[SimilarityPair]: ...
@overload
def read_rows(
    sources: Sequence[str],
    kind: Literal["inference"],
    *,
    log: ReadLog,
    root: Path | None = ...,
    select: SourceFilter | None = ...,
    max_line_bytes: int = ...,
) -> Iterator[InferencePair]: ...
@overload
def read_rows(
    sources: Sequence[str],
    kind: Literal["choices"],
    *,
    log: ReadLog,
    root: Path | None = ...,
    select: SourceFilter | None = ...,
    max_line_bytes: int = ...,
) -> Iterator[ChoiceQuestion]: ...
@overload
def read_rows(
    sources: Sequence[str],
    kind: Literal["judgements"],
    *,
    log: ReadLog,
    root: Path | None = ...,
    select: SourceFilter | None = ...,
    max_line_bytes: int = ...,
    check: Callable[[Judgement, Place], None] | None = ...,
) -> Iterator[Judgement]: ...
def read_rows(
    sources: Sequence[str],
    kind: Kind,
    *,
    log: ReadLog,
    root: Path | None = None,
    select: SourceFilter | None = None,
    max_line_bytes: int = MAX_LINE_BYTES,
    check: Callable[[Any, Place], None] | None = None,
) -> Iterator[Row]:
    """Yield the good rows of all sources in order and record the others in `log`.

    Memory is constant but for the ids of documents and passages, which are kept to find duplicates. Nothing is raised
    for bad data: go through the rows, then call ``log.raise_if_broken``.

    Args:
        sources: Paths, patterns, ``samples:NAME``, ``hub:OWNER/NAME:SPLIT``; see ``docs/data_formats.md``.
        kind: What a row is.
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
class _Reading:
    """What the sources of one call of `read_rows` share."""

    kind: Kind
    log: ReadLog
    selector: LineSelector | None
    max_line_bytes: int
    several: bool
    check: Callable[[Any, Place], None] | None = None
    known_ids: dict[str, tuple[str, int]] = field(default_factory=dict)

    def rows_of(self, source: FileSource | HubSource) -> Iterator[Row]:
        parse = PARSERS[self.kind]
        counts = self.log.source(source.name)
        file_problems_before = len(self.log.file_problems)
        raws = self.hub_objects(source) if isinstance(source, HubSource) else self.file_objects(source, counts)
        for place, raw in raws:
            row = None if raw is None else parse(raw, place)
            if isinstance(row, Document | PassageRow):
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

    def file_objects(self, source: FileSource, counts: SourceCounts) -> Iterator[_Raw]:
        place = Place(printable(source.name))
        columns = COLUMNS.get(self.kind, ())
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
        return header_of(_first_text(line), self.kind)

    def refuse_header(self, source: FileSource, place: Place, line: bytes | None) -> None:
        """Say what the first line of a file whose columns are known by name alone is lacking."""
        missing = ", ".join(header_columns(_first_text(line), self.kind))
        remedy = f"write a header as the first line: {'<TAB>'.join(HEADED[self.kind])}"
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

"""A retrieval test set in the layout of BEIR: corpus.jsonl, queries.jsonl and qrels/SPLIT.tsv in one folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from soju.data.fields import show
from soju.data.lines import MAX_LINE_BYTES
from soju.data.log import SKIP, Place, ReadLog
from soju.data.readers import read_rows
from soju.data.records import Judgement


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

    Args:
        folder: Where the three files are.
        log: Gets counts and problems.
        split: Name of the file of judgements.
        root: Folder that a relative path starts from; the working folder when ``None``.
        max_line_bytes: Longer lines are refused.

    Returns:
        The set; without judgements when corpus or queries could not be read.
    """

    def name_of(file: str) -> str:
        name = f"{folder.rstrip('/')}/{file}"
        base = root or Path()
        return f"{name}.gz" if not (base / name).exists() and (base / f"{name}.gz").exists() else name

    problems_before = len(log.file_problems)
    documents, queries = (
        {row.id: row.text for row in read_rows([name], "documents", log=log, root=root, max_line_bytes=max_line_bytes)}
        for name in (name_of("corpus.jsonl"), name_of("queries.jsonl"))
    )
    judgements: dict[str, dict[str, float]] = {}
    if len(log.file_problems) == problems_before:  # else every judgement would be about nothing
        check = _Check(queries, documents)
        name = name_of(f"qrels/{split}.tsv")
        for row in read_rows([name], "judgements", log=log, root=root, max_line_bytes=max_line_bytes, check=check):
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
        for field, key, known, file in (
            ("query-id", row.query, self._queries, "queries.jsonl"),
            ("corpus-id", row.document, self._documents, "corpus.jsonl"),
        ):
            if key not in known:
                what = f"{show(key)} is no id of {file}"
                place.refuse(field, what, f"add it there, {SKIP}", "unknown-id")
        first = self._lines.setdefault((row.query, row.document), place.line)
        if first != place.line:
            what = f"{show(row.document)} was judged for {show(row.query)} in line {first} already"
            place.refuse("", what, f"keep one of the two, {SKIP}", "duplicate-judgement")

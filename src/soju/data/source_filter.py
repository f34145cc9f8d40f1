"""Which lines of a file come from a wanted source, told by the line-aligned file beside it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from soju.data.lines import MAX_LINE_BYTES, read_lines
from soju.data.log import ReadLog

_MAX_KNOWN = 1000


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

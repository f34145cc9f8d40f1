"""What reading kept, what it refused and why."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from soju.core.errors import DataError, Problem

OnError = Literal["stop", "skip"]

MAX_PROBLEMS = 1000
"""Problems kept in full; later ones are only counted, so that a log stays small whatever is read."""

SKIP = "drop the row or set data.on_error: skip"
"""The last resort in the remedy of every refused row."""


def printable(text: str) -> str:
    """Return `text` with bytes and characters that no terminal or file can take written as escapes."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


class Place:
    """Where the row that is being read stands, and what is wrong with it so far."""

    __slots__ = ("file", "line", "normalised", "problems")

    def __init__(self, file: str, line: int = 0) -> None:
        self.file = file
        self.line = line
        self.normalised = False
        self.problems: list[Problem] = []

    def refuse(self, field: str, what: str, remedy: str, reason: str) -> None:
        """Add one problem of the present row."""
        self.problems.append(Problem(self.file, self.line, field, printable(what), printable(remedy), reason))


@dataclass(slots=True)
class SourceCounts:
    """Lines of one source by what became of them."""

    kept: int = 0
    """Rows handed out."""
    refused: int = 0
    """Rows with at least one problem."""
    normalised: int = 0
    """Kept rows in which a text was not in Unicode NFC and was brought to it."""
    blank: int = 0
    """Lines with nothing but white space; passed over."""
    deselected: int = 0
    """Lines a `SourceFilter` left out; not parsed."""


@dataclass(slots=True)
class ReadLog:
    """Counts and problems of one reading, in bounded memory. One log may serve several readings."""

    sources: dict[str, SourceCounts] = field(default_factory=dict)
    """Counts by file, sample or hub data set, in the order they were opened."""
    reasons: Counter[str] = field(default_factory=Counter)
    """Problems by reason. A row with two problems counts twice here and once in `SourceCounts.refused`."""
    selected: Counter[str] = field(default_factory=Counter)
    """Lines a `SourceFilter` let through, by source; refused rows are among them."""
    problems: list[Problem] = field(default_factory=list)
    """The first `MAX_PROBLEMS` problems, of files and of rows."""
    file_problems: list[Problem] = field(default_factory=list)
    """Those that concern a whole file; ``on_error: skip`` does not pass over them."""

    def source(self, name: str) -> SourceCounts:
        """Return the counts of one source, made on first use."""
        return self.sources.setdefault(name, SourceCounts())

    def refuse_row(self, problems: Iterable[Problem]) -> None:
        """Record why one row was refused."""
        for problem in problems:
            self.reasons[problem.reason] += 1
            if len(self.problems) < MAX_PROBLEMS:
                self.problems.append(problem)

    def refuse_file(self, file: str, line: int, what: str, remedy: str, reason: str) -> None:
        """Record why a file could not be read (line 0) or not be read further (the line where it broke)."""
        problem = Problem(printable(file), line, "", printable(what), printable(remedy), reason)
        self.refuse_row([problem])
        if len(self.file_problems) < MAX_PROBLEMS:
            self.file_problems.append(problem)

    @property
    def kept(self) -> int:
        """Rows handed out by all sources."""
        return sum(counts.kept for counts in self.sources.values())

    @property
    def refused(self) -> int:
        """Rows refused in all sources."""
        return sum(counts.refused for counts in self.sources.values())

    @property
    def normalised(self) -> int:
        """Kept rows that were brought to Unicode NFC."""
        return sum(counts.normalised for counts in self.sources.values())

    def raise_if_broken(self, on_error: OnError = "stop") -> None:
        """Stop the run when what was read cannot be trained on.

        Args:
            on_error: ``stop`` refuses any problem. ``skip`` accepts refused rows, but neither a problem of a whole file
                (missing, truncated, wrong encoding ...) nor a reading that kept no row.

        Raises:
            DataError: With the problems, the first 20 shown, and their count.
        """
        total = self.reasons.total()
        if total and (on_error == "stop" or self.kept == 0):
            raise DataError(self.problems, count=total)
        if self.file_problems:
            raise DataError(self.file_problems)

    def to_json(self) -> dict[str, Any]:
        """Return all counts, in rows except ``reasons`` (problems), for ``data.json``."""
        return {
            "kept": self.kept,
            "refused": self.refused,
            "normalised": self.normalised,
            "reasons": dict(self.reasons.most_common()),
            "sources": {printable(name): asdict(counts) for name, counts in self.sources.items()},
        }

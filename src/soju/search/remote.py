"""What every engine that is not ours needs: names for terms, passages with final weights, a bulk load that can wait.

Names are percent-encoded with an exact inverse, where dots, blanks or control characters are refused. Passages carry
the weights of an index of ours, idf included. Documents go in batches that wait for a busy engine; what is refused for
good goes to a file.

Shape letters: V = terms, T = terms of one passage.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from soju.core.config import Settings
from soju.core.errors import UserError
from soju.search.index import SparseIndex
from soju.search.segment import Segment

_EMPTY = "%"
_UNSAFE = re.compile(r"[%.\s\x00-\x1f\x7f-\x9f\ud800-\udfff]")
_ESCAPED = re.compile(r"(?:%[0-9A-F]{2})+")


def escape_token(name: str) -> str:
    """Return a name the engines take: ``%``, ``.``, white space and control characters become ``%`` and hex digits.

    OpenSearch and Elasticsearch refuse dots and empty names, Anserini cuts at white space. Two digits a UTF-8 byte, as
    in URLs. The empty name becomes a lone ``%``, which nothing else turns into.

    >>> escape_token("3.5%")
    '3%2E5%25'
    """
    return _UNSAFE.sub(lambda match: _bytes(match[0]), name) or _EMPTY


def unescape_token(token: str) -> str:
    """Return the name `escape_token` was given."""
    try:
        name = "" if token == _EMPTY else _ESCAPED.sub(lambda match: _text(match[0]), token)
    except UnicodeDecodeError:
        name = None
    if name is None or escape_token(name) != token:
        raise UserError(f"{token!r} is no escaped token; only what escape_token returns can be read back")
    return name


def _bytes(character: str) -> str:
    return "".join(f"%{byte:02X}" for byte in character.encode("utf-8", "surrogatepass"))


def _text(escaped: str) -> str:
    return bytes.fromhex(escaped.replace("%", "")).decode("utf-8", "surrogatepass")


def token_names(terms: tuple[str, ...], pieces: tuple[str, ...]) -> tuple[str, ...]:
    """Name the V terms of a model for an engine: readable where no two are alike, else as the tokenizer spells them.

    Args:
        terms: Readable names, ``V``, perhaps not unique.
        pieces: The tokenizer's spelling, ``V``, unique.

    Returns:
        V escaped, unique names.

    Raises:
        UserError: If the pieces are not unique either.
    """
    for names in (terms, pieces):
        if len(set(names)) == len(names):
            return tuple(escape_token(name) for name in names)
    raise UserError("two pieces of the tokenizer are spelled alike, so their weights would be mixed; rename one")


_ROWS = 1024


@dataclass(frozen=True, slots=True)
class Passage:
    """A chunk of a document as an engine gets it."""

    id: str
    """The document's id, for further passages of it with ``#`` and a number behind."""
    document_id: str
    number: int
    """Place in the corpus; equal scores rank by it."""
    text: str
    start: int
    """Where the passage starts in its document, in characters."""
    end: int
    terms_T: NDArray[np.int32]
    """Term ids, rising."""
    weights_T: NDArray[np.float32]
    """What each term adds to a score for every unit of query weight."""


@dataclass(frozen=True, slots=True)
class CorpusFacts:
    """What a client must know of the vectors to search them; travels with the index."""

    fingerprint: str
    """Names the model."""
    weighting: str
    """``bm25`` (idf is in the stored weights) or ``as_is``."""
    documents: int
    passages: int
    terms: int
    ceiling: float
    """The largest stored weight."""
    average_length: float | None = None
    """Average passage length of BM25, in term counts."""

    def to_json(self) -> dict[str, Any]:
        """Return the facts as they are written into a mapping or a manifest."""
        return {name: getattr(self, name) for name in self.__dataclass_fields__}


class WeightedCorpus:
    """The passages of an index with everything of a score that does not depend on the query baked into the weights.

    Our own index keeps idf on the query's side, so that it is never stale. Another engine cannot: a query there is what
    the model says and nothing else. So ``stored = impact * idf`` and ``score = sum(query * stored)``, the same sums.

    Args:
        index: An index of ours; the vectors are read from its posting lists.
    """

    def __init__(self, index: SparseIndex) -> None:
        self._index = index
        self._idf_V = index.idf_V

    @property
    def facts(self) -> CorpusFacts:
        """Counts, weighting and the largest weight."""
        description = self._index.description
        return CorpusFacts(
            fingerprint=description.fingerprint,
            weighting=description.settings.weighting.kind,
            documents=self._index.documents,
            passages=self._index.chunks,
            terms=len(self._index.terms),
            ceiling=max((self._heaviest(segment) for segment in self._index.segments), default=0.0),
            average_length=description.average_length,
        )

    def __len__(self) -> int:
        return self._index.chunks

    def __iter__(self) -> Iterator[Passage]:
        """Yield the passages in corpus order, a thousand vectors in memory at a time."""
        number = 0
        for segment in self._index.segments:
            for start in range(0, segment.entry.chunks, _ROWS):
                stop = min(start + _ROWS, segment.entry.chunks)
                rows = segment.postings.rows(start, stop)
                for row, chunk in enumerate(range(start, stop)):
                    low, high = rows.indptr[row], rows.indptr[row + 1]
                    yield self._passage(segment, chunk, number, rows.indices[low:high], rows.data[low:high])
                    number += 1

    def _passage(
        self, segment: Segment, chunk: int, number: int, terms_T: NDArray[Any], weights_T: NDArray[Any]
    ) -> Passage:
        document_id, window = segment.store.chunk(chunk)
        documents = segment.store.documents
        part = chunk - int(np.searchsorted(documents, documents[chunk]))
        return Passage(
            id=f"{document_id}#{part}" if part else document_id,
            document_id=document_id,
            number=number,
            text=window.text,
            start=window.start,
            end=window.end,
            terms_T=terms_T.astype(np.int32),
            weights_T=weights_T if self._idf_V is None else (weights_T * self._idf_V[terms_T]).astype(np.float32),
        )

    def _heaviest(self, segment: Segment) -> float:
        postings = segment.postings
        filled = np.flatnonzero(postings.document_frequency)
        if not len(filled):
            return 0.0
        heaviest = np.maximum.reduceat(postings.impacts, postings.offsets[filled])
        return float(np.max(heaviest if self._idf_V is None else heaviest * self._idf_V[filled]))


BUSY = (429, 502, 503, 504)
"""Statuses that mean: later."""
_NAMED = 5


class BulkSettings(Settings):
    """How fast to send, and when to give up."""

    documents: int = Field(default=500, ge=1)
    """Most documents of a request."""
    megabytes: float = Field(default=8.0, gt=0)
    """Largest request; OpenSearch advises 5 to 15 MB."""
    attempts: int = Field(default=8, ge=1)
    """How often a document or a request is sent before it counts as failed."""
    first_wait: float = Field(default=0.5, ge=0)
    """Seconds to wait after the first refusal; doubled every time."""
    longest_wait: float = Field(default=60.0, ge=0)
    """Most seconds to wait."""


@dataclass(frozen=True, slots=True)
class Item:
    """One document on its way."""

    id: str
    body: dict[str, Any]
    fault: str | None = None
    """Why it must not be sent at all."""
    line: bytes = field(default=b"", repr=False)
    """Its body as JSON."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What the engine says of one document: an HTTP status, and why when it is none of 200 to 299."""

    status: int
    reason: str = ""

    @property
    def stored(self) -> bool:
        """Whether the document is in."""
        return 200 <= self.status < 300


class RequestRefusedError(Exception):
    """The engine took nothing of a request: it is busy (`BUSY`) or unreachable (0), or something in it is bad."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status = status

    @property
    def later(self) -> bool:
        """Whether the same request may be taken later; else it is halved until the bad document is alone."""
        return self.status == 0 or self.status in BUSY


Send = Callable[[Sequence[Item]], Sequence[Answer]]
"""Sends one request; one answer a document, in order. Raises `RequestRefusedError`."""


@dataclass(slots=True)
class LoadReport:
    """How a load went."""

    stored: int = 0
    failed: int = 0
    first_failed: list[str] = field(default_factory=list)
    requests: int = 0
    waits: int = 0

    def fail(self, item: Item) -> None:
        """Count a document that will not be stored."""
        self.failed += 1
        if len(self.first_failed) < _NAMED:
            self.first_failed.append(item.id)


class DeadLetters:
    """A JSONL file of documents that failed for good: ``{"id", "status", "reason", "body"}``, written as they fail.

    The file appears with the first one. ``body`` is what was to be stored, so a corrected line can be sent again.

    Args:
        path: Where; refused when it exists, since it may hold the failures of an earlier load.
    """

    def __init__(self, path: Path) -> None:
        if path.exists():
            raise UserError(f"{path}: holds the failed documents of an earlier load; move it away first")
        self.path = path
        self._file: IO[str] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if self._file:
            self._file.close()

    def write(self, item: Item, answer: Answer) -> None:
        """Append one document and why it failed."""
        if self._file is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self.path.open("x", encoding="utf-8")
        row = {"id": item.id, "status": answer.status, "reason": answer.reason, "body": item.body}
        self._file.write(json.dumps(row, ensure_ascii=False).encode("utf-8", "replace").decode() + "\n")
        self._file.flush()


class BulkLoader:
    """Sends documents in batches that shrink when the engine is busy and grow back when it is not.

    A request that met a busy engine is halved and sent again after 0.5 s, 1 s, 2 s …; of an answered one only the
    documents that met a busy shard are. A request refused for what is in it is halved at once until the bad document is
    alone. What is refused for good, or busy `attempts` times, goes to the dead letters.

    Args:
        send: Sends one request.
        dead_letters: Where failures go.
        settings: Sizes and waits.
        sleep: Waits; tests pass their own.
    """

    def __init__(
        self,
        send: Send,
        dead_letters: DeadLetters,
        settings: BulkSettings | None = None,
        *,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._send = send
        self._dead = dead_letters
        self._settings = settings or BulkSettings()
        self._sleep = sleep
        self._limit = self._settings.documents
        self.report = LoadReport()

    def load(self, items: Iterable[Item]) -> LoadReport:
        """Send everything."""
        batch: list[Item] = []
        size = 0
        for item in items:
            if item.fault:
                self._fail(item, Answer(400, item.fault))
                continue
            line = json.dumps(item.body, ensure_ascii=False).encode("utf-8", "replace")
            if batch and (len(batch) >= self._limit or size + len(line) > self._settings.megabytes * 1e6):
                self._deliver(batch)
                batch, size = [], 0
            batch.append(Item(item.id, item.body, None, line))
            size += len(line)
        if batch:
            self._deliver(batch)
        return self.report

    def _deliver(self, batch: list[Item]) -> None:
        """Send a batch until each of its documents is stored or has failed."""
        refusals = 0
        attempts = dict.fromkeys(range(len(batch)), 0)
        waiting = list(attempts)
        while waiting:
            part = waiting[: self._limit]
            try:
                self.report.requests += 1
                answers = self._send([batch[at] for at in part])
            except RequestRefusedError as error:
                self._limit = max(1, len(part) // 2)
                if error.later:
                    refusals += 1
                    self._wait(refusals, error)
                elif len(part) == 1:
                    self._fail(batch[part[0]], Answer(error.status, str(error)))
                    waiting = waiting[1:]
                continue
            refusals = 0
            again = self._sort(batch, part, answers, attempts)
            waiting = again + waiting[len(part) :]
            if again:
                self._limit = max(1, len(part) // 2)
                self._wait(max(attempts[at] for at in again), None)
            else:
                self._limit = min(self._settings.documents, self._limit + max(1, self._settings.documents // 10))

    def _sort(
        self, batch: Sequence[Item], part: Sequence[int], answers: Sequence[Answer], attempts: dict[int, int]
    ) -> list[int]:
        """Count what is stored, write down what failed; return what to send again."""
        again = []
        for at, answer in zip(part, answers, strict=True):
            attempts[at] += 1
            if answer.stored:
                self.report.stored += 1
            elif answer.status in BUSY and attempts[at] < self._settings.attempts:
                again.append(at)
            else:
                self._fail(batch[at], answer)
        return again

    def _wait(self, refusals: int, error: RequestRefusedError | None) -> None:
        if error is not None and refusals >= self._settings.attempts:
            raise UserError(
                f"the engine refused {refusals} requests in a row ({error}); {self.report.stored:,} passages are "
                "stored; fix it and index again with --overwrite"
            )
        self.report.waits += 1
        self._sleep(min(self._settings.longest_wait, self._settings.first_wait * 2 ** (refusals - 1)))

    def _fail(self, item: Item, answer: Answer) -> None:
        self.report.fail(item)
        self._dead.write(item, answer)

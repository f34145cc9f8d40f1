"""Weighted query tokens for OpenSearch, Elasticsearch and other engines on Lucene.

Shape letters: B = texts, V = terms in the vocabulary.

References:
    OpenSearch, "Neural sparse search using raw vectors" (``rank_features``, ``neural_sparse``, ``query_tokens``).
    Elasticsearch, "Sparse vector query" (``query_vector``) and "Sparse vector field type": no dots in names, weights
    above 0, 9 significant bits kept.

Vectors of a corpus as files other engines load: bulk files of OpenSearch and Elasticsearch, Anserini collections.

References:
    OpenSearch and Elasticsearch, "Bulk API" (newline-delimited JSON). Elasticsearch, "Sparse vector field type".
    Anserini, ``JsonVectorCollection`` (called ``JsonSparseVectorCollection`` since 2026): ``vector`` maps a term to how
    often it is repeated; ``TsvStringTopicReader`` with ``-pretokenized -impact`` reads queries cut at white space.

The expansion matrix as a table that any program reads.

Shape letter: V = terms in the vocabulary.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import coo_array, csr_array

from soju.core.errors import DataError, Problem, UserError
from soju.core.files import atomic_writer
from soju.core.language import language_of
from soju.search.remote import escape_token, unescape_token

__all__ = [
    "escape_token",
    "index_body",
    "query_tokens",
    "search_body",
    "unescape_token",
    "write_query_tokens",
    "write_token_table",
]

Engine = Literal["opensearch", "elasticsearch"]

MAX_WEIGHT = 64.0
"""Largest query weight Lucene's ``FeatureField.newLinearQuery`` takes, so the bound of every exported weight."""
DECIMALS = 6
"""Weights are rounded to this many decimals; one that rounds to 0 is left out."""


def query_tokens(
    ids: Sequence[str],
    texts: Sequence[str],
    vectors_BV: csr_array,
    terms: Sequence[str],
    *,
    idf_V: NDArray[np.floating[Any]] | None = None,
    max_weight: float = MAX_WEIGHT,
) -> Iterator[dict[str, Any]]:
    """Yield ``{"id", "text", "query_tokens": {token: weight}, "scale"}`` for each query, heaviest token first.

    A weight is the vector's weight × idf × ``scale``. ``scale`` is 1 unless the heaviest token would exceed
    `max_weight`; then the whole query is scaled down to it, which leaves the order of its results as it is.

    Args:
        ids: Id of each query, ``B``.
        texts: The queries, ``B``.
        vectors_BV: Their term weights, ``(B, V)``, finite, >= 0.
        terms: Name of every term, ``V``.
        idf_V: Multiplied in, ``(V,)``, in nats, finite, >= 0. None when the index applies its own or needs none.
        max_weight: Largest weight to write, in (0, 64].

    Yields:
        One object a query, ready for `write_query_tokens`.

    Raises:
        UserError: If sizes differ, a weight is negative or not finite, or two terms share a name.
    """
    if not len(ids) == len(texts) == vectors_BV.shape[0]:
        raise UserError(
            f"{len(ids)} ids, {len(texts)} texts and {vectors_BV.shape[0]} vectors; give one of each a query"
        )
    weighted_BV = _weighted(vectors_BV, terms, idf_V, max_weight)
    tokens = [escape_token(term) for term in terms]
    for row, (query, text) in enumerate(zip(ids, texts, strict=True)):
        weights, scale = _row(weighted_BV, row, tokens, max_weight)
        yield {"id": query, "text": text, "query_tokens": weights, "scale": scale}


def write_query_tokens(path: Path, rows: Iterator[dict[str, Any]]) -> int:
    """Write the rows of `query_tokens`, one JSON object a line; returns how many."""
    return _write_lines(path, rows)


def write_token_table(
    path: Path,
    weights_VV: csr_array,
    pieces: Sequence[str],
    terms: Sequence[str],
    *,
    idf_V: NDArray[np.floating[Any]] | None = None,
    max_weight: float = MAX_WEIGHT,
) -> int:
    """Write ``{piece: {token: weight}}``, one piece a line, for use at query time with the tokenizer alone.

    To expand a query: tokenize it, add up the objects of its pieces. Pieces without terms have no line. Keys inside are
    escaped tokens (`escape_token`); the piece is as the tokenizer spells it. All weights share one scale.

    Args:
        path: Replaced as a whole when the last line is written.
        weights_VV: Terms of each piece, ``(V, V)``, finite, >= 0.
        pieces: The tokenizer's pieces, ``V``.
        terms: Name of every term, ``V``.
        idf_V: Multiplied in, ``(V,)``, in nats, finite, >= 0.
        max_weight: Largest weight allowed, in (0, 64].

    Returns:
        Number of lines.

    Raises:
        UserError: As `query_tokens`, or if a weight exceeds `max_weight`: rows scaled apart could not be added up.
    """
    if len(pieces) != weights_VV.shape[0]:
        raise UserError(f"{len(pieces):,} pieces for a matrix of {weights_VV.shape}; give one for each row")
    weighted_VV = _weighted(weights_VV, terms, idf_V, max_weight)
    if weighted_VV.nnz and (heaviest := float(weighted_VV.data.max())) > max_weight:
        raise UserError(f"a weight of {heaviest:g} exceeds {max_weight:g}; divide idf_V by {heaviest / max_weight:.3g}")
    tokens = [escape_token(term) for term in terms]
    rows = ({piece: _row(weighted_VV, row, tokens, max_weight)[0]} for row, piece in enumerate(pieces))
    return _write_lines(path, (row for row in rows if any(row.values())))


def search_body(
    tokens: Mapping[str, float], *, field: str, size: int = 10, engine: Engine = "opensearch"
) -> dict[str, Any]:
    """Render the body of a ``_search`` request for one query.

    Args:
        tokens: Its ``query_tokens``.
        field: The field that holds the documents' tokens.
        size: Number of hits wanted.
        engine: OpenSearch gets a ``neural_sparse`` query, Elasticsearch a ``sparse_vector`` query without pruning.

    Returns:
        What to send as JSON.

    Raises:
        UserError: If there is no token, a weight is not in (0, 64], or a name is not safe.
    """
    for token, weight in tokens.items():
        if not 0 < weight <= MAX_WEIGHT:
            raise UserError(f"{token!r} has weight {weight!r}; weights must lie in (0, {MAX_WEIGHT:g}]")
        unescape_token(token)
    if not tokens:
        raise UserError("the query has no token, so it matches nothing; send no request")
    if engine == "opensearch":
        return {"size": size, "query": {"neural_sparse": {field: {"query_tokens": dict(tokens)}}}}
    return {"size": size, "query": {"sparse_vector": {"field": field, "query_vector": dict(tokens), "prune": False}}}


def index_body(*, field: str, text_field: str = "text", engine: Engine = "opensearch") -> dict[str, Any]:
    """Return the body that creates an index: the text, and its tokens as ``rank_features`` or ``sparse_vector``."""
    kind = "rank_features" if engine == "opensearch" else "sparse_vector"
    return {"mappings": {"properties": {text_field: {"type": "text"}, field: {"type": kind}}}}


def _weighted(
    vectors: csr_array, terms: Sequence[str], idf_V: NDArray[np.floating[Any]] | None, max_weight: float
) -> csr_array:
    size = len(terms)
    if vectors.shape[1] != size or (idf_V is not None and idf_V.shape != (size,)):
        idf_shape = None if idf_V is None else idf_V.shape
        raise UserError(f"{size:,} names, vectors of {vectors.shape} and idf of {idf_shape}: give one of each a term")
    if len(set(terms)) != size:
        raise UserError("two terms have the same name, so their weights would be mixed; make the names different")
    if not 0 < max_weight <= MAX_WEIGHT:
        raise UserError(f"max_weight is {max_weight:g}; it must lie in (0, {MAX_WEIGHT:g}]")
    weighted = csr_array(vectors.astype(np.float64))
    weighted.sum_duplicates()
    if idf_V is not None:
        weighted.data *= idf_V[weighted.indices]
    if not (np.isfinite(weighted.data) & (weighted.data >= 0)).all():
        raise UserError("a weight is negative or not finite, which the engines refuse; look at the vectors and the idf")
    return weighted


def _row(weighted: csr_array, row: int, tokens: Sequence[str], max_weight: float) -> tuple[dict[str, float], float]:
    start, stop = weighted.indptr[row : row + 2]
    weights = weighted.data[start:stop]
    scale = min(1.0, max_weight / weights.max(initial=max_weight))
    rounded = np.minimum(np.round(weights * scale, DECIMALS), max_weight)
    order = np.lexsort((weighted.indices[start:stop], -rounded))
    found = {tokens[weighted.indices[start + at]]: float(rounded[at]) for at in order if rounded[at] > 0}
    return found, float(scale)


def _write_lines(path: Path, rows: Iterator[dict[str, Any]]) -> int:
    count = 0
    with atomic_writer(path) as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
            count += 1
    return count


PART_BYTES = 50_000_000
"""Size from which a bulk file goes on in the next: engines refuse requests above 100 MB."""


class PartWriter:
    """Writes lines into ``STEM-00000.SUFFIX``, ``STEM-00001.SUFFIX`` ... of a bounded size.

    Args:
        folder: Existing folder.
        stem: Start of the names.
        suffix: End of the names, without a dot.
        part_bytes: Bytes from which the next part begins; a row is never cut.
    """

    def __init__(self, folder: Path, stem: str, suffix: str, *, part_bytes: int = PART_BYTES) -> None:
        self._folder, self._stem, self._suffix, self._limit = folder, stem, suffix, part_bytes
        self._file: IO[bytes] | None = None
        self._size = 0
        self.parts: list[str] = []

    def write(self, *rows: Any) -> None:
        """Append rows that belong together, one JSON object a line."""
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode("utf-8", "replace")
        if self._file is None or self._size + len(text) > self._limit:
            self.close()
            name = f"{self._stem}-{len(self.parts):05d}.{self._suffix}"
            self._file, self._size = (self._folder / name).open("wb"), 0
            self.parts.append(name)
        self._file.write(text)
        self._size += len(text)

    def close(self) -> None:
        """Close the last part."""
        if self._file:
            self._file.close()
        self._file = None


def write_bulk(
    folder: Path, index: str, rows: Iterable[tuple[str, Mapping[str, Any]]], *, part_bytes: int = PART_BYTES
) -> list[str]:
    """Write documents as the bodies of bulk requests.

    Args:
        folder: Existing folder.
        index: Index the actions name.
        rows: Id and body of each document.
        part_bytes: Size of a part.

    Returns:
        Names of the parts.
    """
    writer = PartWriter(folder, "bulk", "ndjson", part_bytes=part_bytes)
    try:
        for name, body in rows:
            writer.write({"index": {"_index": index, "_id": name}}, body)
    finally:
        writer.close()
    return writer.parts


def elasticsearch_index(meta: Mapping[str, Any]) -> dict[str, Any]:
    """Return the body that creates an Elasticsearch index for documents of ours; weights keep 9 significant bits."""
    properties = {
        "document_id": {"type": "keyword"},
        "number": {"type": "long"},
        "text": {"type": "text"},
        "start": {"type": "integer"},
        "end": {"type": "integer"},
        "tokens": {"type": "sparse_vector"},
    }
    return {"mappings": {"_meta": {"soju": dict(meta)}, "properties": properties}}


@dataclass(slots=True)
class Quantised:
    """What rounding to whole numbers did."""

    weights: int = 0
    dropped: int = 0
    """Weights that round to 0 and are left out."""


def quantise(tokens: Mapping[str, float], factor: float, counts: Quantised) -> dict[str, int]:
    """Return ``round(weight * factor)`` of each token, without those that round to 0, which are counted."""
    whole = {token: round(weight * factor) for token, weight in tokens.items()}
    kept = {token: weight for token, weight in whole.items() if weight > 0}
    counts.weights += len(whole)
    counts.dropped += len(whole) - len(kept)
    return kept


def anserini_row(name: str, text: str, vector: Mapping[str, int]) -> dict[str, Any]:
    """Return one document of a ``JsonVectorCollection``."""
    return {"id": name, "contents": text, "vector": dict(vector)}


def anserini_query(name: str, vector: Mapping[str, int]) -> str:
    """Return one line of a query file: the id, a tab, and each token as often as it weighs.

    Args:
        name: Id of the query, without tabs and line breaks.
        vector: Whole weights by token; tokens have no white space.

    Returns:
        The line, with its line feed.

    Raises:
        UserError: If the id would break the line.
    """
    if any(character in name for character in "\t\r\n"):
        raise UserError(f"query id {name!r} holds a tab or a line break, which a TSV file cannot; rename it")
    return f"{name}\t{' '.join(token for token, weight in vector.items() for _ in range(weight))}\n"


HEADER = ("source", "source_language", "target", "target_language", "weight")

_ESCAPES = {"\\": "\\\\", "\t": "\\t", "\n": "\\n", "\r": "\\r"}
_CHARACTERS = {"\\": "\\", "t": "\t", "n": "\n", "r": "\r"}
_TRANSLATION = str.maketrans(_ESCAPES)


def write_term_table(
    path: Path,
    weights_VV: csr_array,
    terms: Sequence[str],
    *,
    language: Callable[[str], str] = language_of,
) -> int:
    r"""Write every non-zero weight as one line ``source, source_language, target, target_language, weight``.

    Lines are sorted by source (code point order), then by falling weight, then by target. A backslash, tab, line
    feed or carriage return in a name becomes two characters: ``\\``, ``\t``, ``\n``, ``\r``. Weights are the shortest
    decimals that read back as the same float32.

    Args:
        path: Replaced as a whole when the last line is written.
        weights_VV: Row = source, column = target, ``(V, V)``, unitless.
        terms: Name of every term, ``V`` different strings.
        language: Tells the language of a name.

    Returns:
        Number of lines below the header.

    Raises:
        UserError: If the names do not fit the matrix or two terms share a name.
    """
    _check_names(weights_VV, terms)
    table = coo_array(weights_VV)
    weights = table.data.astype(np.float32)
    rank_V = np.empty(len(terms), np.int64)
    rank_V[sorted(range(len(terms)), key=terms.__getitem__)] = np.arange(len(terms))
    order = np.lexsort((rank_V[table.col], -weights, rank_V[table.row]))
    cells = [f"{_escape(term)}\t{language(term)}" for term in terms]
    count = 0
    with atomic_writer(path) as file:
        file.write("\t".join(HEADER) + "\n")
        for source, target, weight in zip(table.row[order], table.col[order], weights[order], strict=True):
            if weight != 0:
                file.write(f"{cells[source]}\t{cells[target]}\t{np.format_float_positional(weight, trim='-')}\n")
                count += 1
    return count


def read_term_table(path: Path, terms: Sequence[str]) -> csr_array:
    """Read what `write_term_table` wrote.

    Args:
        path: The table.
        terms: Name of every term in the order of the ids.

    Returns:
        ``(V, V)`` float32, row = source, column = target.

    Raises:
        DataError: If a line is not five cells, has a weight that is no number or names an unknown term.
        UserError: If two terms share a name or the header is another.
    """
    ids = {term: index for index, term in enumerate(terms)}
    if len(ids) != len(terms):
        raise UserError("two terms have the same name, so a name does not tell the id; make the names different")
    entries: list[tuple[int, int, float]] = []
    problems: list[Problem] = []
    for number, line in _lines(path):
        cells = line.split("\t")
        try:
            if len(cells) != len(HEADER):
                raise ValueError(f"{len(cells)} cells instead of {len(HEADER)}")
            entries.append((ids[_unescape(cells[0])], ids[_unescape(cells[2])], float(cells[4])))
        except KeyError as error:
            problems.append(Problem(str(path), number, "", f"unknown term {error}", "use the model's names", "unknown"))
        except ValueError as error:
            problems.append(Problem(str(path), number, "", str(error), "write the table again", "malformed"))
    if problems:
        raise DataError(problems)
    rows, columns, weights = zip(*entries, strict=True) if entries else ((), (), ())
    data: NDArray[np.float32] = np.array(weights, np.float32)
    table = coo_array((data, (np.array(rows, np.int64), np.array(columns, np.int64))), shape=(len(terms), len(terms)))
    return csr_array(table)


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    with path.open(encoding="utf-8", newline="\n") as file:
        header = file.readline().rstrip("\n")
        if header != (expected := "\t".join(HEADER)):
            raise UserError(f"{path}:1: the header is {header!r}, expected {expected!r}; write the table again")
        for number, line in enumerate(file, start=2):
            yield number, line.rstrip("\n")


def _check_names(weights_VV: csr_array, terms: Sequence[str]) -> None:
    if weights_VV.shape != (len(terms), len(terms)):
        raise UserError(
            f"{len(terms):,} names for a matrix of {weights_VV.shape}; give one name for each row and column"
        )
    if len(set(terms)) != len(terms):
        raise UserError("two terms have the same name, so the table could not be read back; make the names different")


def _escape(name: str) -> str:
    return name.translate(_TRANSLATION)


def _unescape(cell: str) -> str:
    characters = iter(cell)
    result = []
    for character in characters:
        if character == "\\":
            escape = next(characters, "")
            if escape not in _CHARACTERS:
                raise ValueError(f"unknown escape \\{escape}")
            character = _CHARACTERS[escape]
        result.append(character)
    return "".join(result)

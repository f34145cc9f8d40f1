"""Weighted query tokens for OpenSearch, Elasticsearch and other engines on Lucene.

Shape letters: B = texts, V = terms in the vocabulary.

References:
    OpenSearch, "Neural sparse search using raw vectors" (``rank_features``, ``neural_sparse``, ``query_tokens``).
    Elasticsearch, "Sparse vector query" (``query_vector``) and "Sparse vector field type": no dots in names, weights
    above 0, 9 significant bits kept.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array

from soju.core.errors import UserError
from soju.core.files import atomic_writer
from soju.search.token_names import escape_token, unescape_token

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

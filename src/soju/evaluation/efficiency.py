"""Cost of a sparse encoder and its index: active terms, products, posting lists, bytes, time.

Shape letters: N = texts, Q = queries, D = documents, V = terms of the vocabulary.
"""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from soju.core.errors import UserError
from soju.core.score import Score, Setting

Clock = Callable[[], int]
"""Returns nanoseconds that never run backwards."""


def active_terms(
    weights_NV: sparse.csr_matrix | sparse.csr_array, setting: Setting, *, side: Literal["query", "document"]
) -> list[Score]:
    """Count the terms with a weight other than 0 in each text; stored zeros do not count.

    Gives ``active_terms.SIDE.mean``, ``.p50`` and ``.p95`` in terms a text, lower is better (cheaper).
    """
    counts_N = np.bincount(_active(weights_NV).row, minlength=weights_NV.shape[0])
    values = {
        "mean": counts_N.mean(),
        "p50": np.quantile(counts_N, 0.5),
        "p95": np.quantile(counts_N, 0.95),
    }
    return [
        setting.score(
            f"active_terms.{side}.{name}", value, unit="terms", higher_is_better=False, texts=weights_NV.shape[0]
        )
        for name, value in values.items()
    ]


def flops(
    queries_QV: sparse.csr_matrix | sparse.csr_array,
    documents_DV: sparse.csr_matrix | sparse.csr_array,
    setting: Setting,
) -> Score:
    """Return the expected number of products when a random query meets a random document.

    ``FLOPS = Σ_v q_v · d_v``, where q_v and d_v are the shares of queries and documents that activate term v.

    Args:
        queries_QV: Query weights, ``(Q, V)``, Q >= 1.
        documents_DV: Document weights, ``(D, V)``, D >= 1, the same vocabulary.
        setting: What is measured on what.

    Returns:
        ``flops`` in products a pair, lower is better.

    Raises:
        UserError: If a side has no text or the vocabularies differ in size.

    References:
        Paria et al. 2020, arXiv:2004.05665. Formal et al. 2021, arXiv:2109.10086 (as an evaluation measure).
    """
    if queries_QV.shape[1] != documents_DV.shape[1]:
        raise UserError(
            f"queries have {queries_QV.shape[1]:,} terms and documents {documents_DV.shape[1]:,}; "
            "encode both with the same vocabulary"
        )
    query_share_V = _posting_lengths(queries_QV) / queries_QV.shape[0]
    document_share_V = _posting_lengths(documents_DV) / documents_DV.shape[0]
    return setting.score(
        "flops",
        float(query_share_V @ document_share_V),
        unit="products",
        higher_is_better=False,
        queries=queries_QV.shape[0],
        documents=documents_DV.shape[0],
    )


def posting_skew(documents_DV: sparse.csr_matrix | sparse.csr_array, setting: Setting) -> list[Score]:
    """Tell how unevenly the postings are spread over the posting lists; long lists make slow queries.

    Gives ``postings.longest_1_percent``: share of all postings in the 1 % longest lists (rounded up to whole lists),
    and ``postings.gini``: Gini coefficient of the list lengths, 0 when all are equal. Fractions, lower is better. Empty
    lists do not count.
    """
    lengths_V = np.sort(_posting_lengths(documents_DV))
    lengths_V = lengths_V[lengths_V > 0].astype(np.float64)
    if len(lengths_V) == 0:
        raise UserError("no document has an active term, so there is no posting list; check the encoder")
    count, total = len(lengths_V), lengths_V.sum()
    longest = -(-count // 100)
    gini = 2 * (np.arange(1, count + 1) @ lengths_V) / (count * total) - (count + 1) / count
    values = {"longest_1_percent": lengths_V[-longest:].sum() / total, "gini": gini}
    return [
        setting.score(
            f"postings.{name}", value, unit="postings share", higher_is_better=False, documents=documents_DV.shape[0]
        )
        for name, value in values.items()
    ]


def bytes_on_disk(path: Path, setting: Setting) -> Score:
    """Add up the sizes of all files below a folder, or of one file; links are not followed. Lower is better."""
    if not path.exists():
        raise UserError(f"{path}: does not exist; build it first or check the path")
    files = [path] if path.is_file() else [item for item in path.rglob("*") if item.is_file() and not item.is_symlink()]
    return setting.score(
        "bytes_on_disk", sum(item.stat().st_size for item in files), unit="bytes", higher_is_better=False
    )


def latency(
    search: Callable[[str], object],
    queries: Sequence[str],
    setting: Setting,
    *,
    warm_up: int = 10,
    clock: Clock = time.perf_counter_ns,
) -> list[Score]:
    """Time a search, one query at a time.

    Args:
        search: Answers one query; its result is thrown away.
        queries: Texts, each timed once.
        setting: What is measured on what.
        warm_up: Queries answered before timing starts, taken from the front and repeated when there are fewer.
        clock: Where the time comes from.

    Returns:
        ``latency.p50``, ``.p95`` and ``.p99`` in milliseconds a query, lower is better. The machine is in the
        signature.

    Raises:
        UserError: If there is no query or warm_up is negative.
    """
    if not queries:
        raise UserError("no query to time; give at least one")
    if warm_up < 0:
        raise UserError(f"warm_up: got {warm_up}; give 0 or more queries")
    for index in range(warm_up):
        search(queries[index % len(queries)])
    nanoseconds_Q = np.empty(len(queries))
    for index, query in enumerate(queries):
        start = clock()
        search(query)
        nanoseconds_Q[index] = clock() - start
    return [
        setting.score(
            f"latency.p{percent}",
            np.percentile(nanoseconds_Q, percent) / 1e6,
            unit="milliseconds",
            higher_is_better=False,
            queries=len(queries),
            warm_up=warm_up,
            machine=_machine(),
        )
        for percent in (50, 95, 99)
    ]


def throughput(
    encode: Callable[[Sequence[str]], object],
    texts: Sequence[str],
    setting: Setting,
    *,
    batch_size: int = 32,
    clock: Clock = time.perf_counter_ns,
) -> Score:
    """Time encoding in batches, after one batch to warm up; each text is encoded once and the results are thrown away.

    Gives ``encode_throughput`` in texts a second, higher is better. The machine is in the signature.
    """
    if not texts:
        raise UserError("no text to encode; give at least one")
    if batch_size < 1:
        raise UserError(f"batch_size: got {batch_size}; give at least 1")
    encode(texts[:batch_size])
    start = clock()
    for first in range(0, len(texts), batch_size):
        encode(texts[first : first + batch_size])
    seconds = max(clock() - start, 1) / 1e9
    return setting.score(
        "encode_throughput",
        len(texts) / seconds,
        unit="texts/second",
        higher_is_better=True,
        texts=len(texts),
        batch_size=batch_size,
        machine=_machine(),
    )


def _active(weights_NV: sparse.csr_matrix | sparse.csr_array) -> sparse.coo_array:
    if weights_NV.shape[0] == 0:
        raise UserError("no text was encoded; give at least one")
    entries = sparse.coo_array(weights_NV)
    keep = entries.data != 0
    return sparse.coo_array((entries.data[keep], (entries.row[keep], entries.col[keep])), shape=entries.shape)


def _posting_lengths(weights_NV: sparse.csr_matrix | sparse.csr_array) -> NDArray[np.int64]:
    return np.bincount(_active(weights_NV).col, minlength=weights_NV.shape[1])


def _machine() -> str:
    return f"{platform.system()}-{platform.machine()}-{os.cpu_count()}cpu"

"""How close is a stock form to the exact encoder? Plain numbers over texts the caller passes.

Shape letters: B = texts, V = terms in the vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array, vstack
from sentence_transformers import SparseEncoder

from soju.core.errors import UserError


def fidelity(
    exact_BV: csr_array, stock_BV: csr_array, *, folder: Path | None = None, top: Sequence[int] = (10, 50)
) -> dict[str, float | int]:
    """Compare the vectors of the same texts.

    Args:
        exact_BV: Vectors of the exact encoder, ``(B, V)``, finite, >= 0.
        stock_BV: Vectors of the stock form, ``(B, V)``.
        folder: The saved stock form, for its size.
        top: For each k, the share of the k heaviest exact terms that are among the k heaviest stock terms (texts with
            fewer exact terms: that many). Equal weights rank by term id.

    Returns:
        ``texts`` (those with an exact term), ``empty_texts`` (left out), ``cosine_mean``, ``cosine_p5`` (a stock vector
        of no terms has cosine 0), ``top_K_overlap`` in [0, 1], ``exact_active_terms`` and ``stock_active_terms`` per
        text, ``spurious_mass`` (share of the stock weight on terms without exact weight) and ``bytes`` of the folder.

    Raises:
        UserError: If the shapes differ or no text has a term.
    """
    if exact_BV.shape != stock_BV.shape:
        raise UserError(f"exact vectors are {exact_BV.shape}, stock ones {stock_BV.shape}; encode the same texts")
    kept = np.flatnonzero(np.asarray(exact_BV.sum(axis=1)).ravel() > 0)
    if not len(kept):
        raise UserError("no text has a term of the vocabulary; pass other texts")
    exact, stock = csr_array(exact_BV)[kept].astype(np.float64), csr_array(stock_BV)[kept].astype(np.float64)
    norms = np.sqrt(np.asarray(exact.power(2).sum(axis=1)) * np.asarray(stock.power(2).sum(axis=1))).ravel()
    cosines = np.asarray(exact.multiply(stock).sum(axis=1)).ravel() / np.maximum(norms, 1e-12)
    on_exact = float(stock.multiply(exact > 0).sum())
    result: dict[str, float | int] = {
        "texts": len(kept),
        "empty_texts": exact_BV.shape[0] - len(kept),
        "cosine_mean": float(cosines.mean()),
        "cosine_p5": float(np.quantile(cosines, 0.05)),
        **{f"top_{k}_overlap": _overlap(exact, stock, k) for k in top},
        "exact_active_terms": float(np.mean((exact > 0).sum(axis=1))),
        "stock_active_terms": float(np.mean((stock > 0).sum(axis=1))),
        "spurious_mass": 1 - on_exact / max(float(stock.sum()), 1e-12),
    }
    if folder is not None:
        result["bytes"] = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    return result


def encode_stock(folder: Path, texts: Sequence[str], *, batch_size: int = 8) -> csr_array:
    """Encode texts with a saved ``SparseEncoder`` on the CPU; returns ``(B, V)`` float32."""
    encoder = SparseEncoder(str(folder), device="cpu")
    parts = []
    for start in range(0, len(texts), batch_size):
        vectors = encoder.encode(
            list(texts[start : start + batch_size]), batch_size=batch_size, convert_to_sparse_tensor=False,
            show_progress_bar=False,
        )  # fmt: skip
        parts.append(csr_array(vectors.float().numpy()))
    return csr_array(vstack(parts))


def pool_by_maximum(pieces_of_texts: Sequence[Sequence[int]], weights_VV: csr_array) -> csr_array:
    """Return, ``(B, V)``, the largest weight any piece of a text gives each term: exact weights, stock pooling."""
    weights_VV = csr_array(weights_VV)
    rows: list[NDArray[np.float32]] = []
    indices: list[NDArray[np.int64]] = []
    for pieces in pieces_of_texts:
        mine = weights_VV[np.unique(np.asarray(pieces, np.int64))]
        best_V = np.asarray(mine.max(axis=0).todense()).ravel() if mine.shape[0] else np.zeros(weights_VV.shape[1])
        indices.append(np.flatnonzero(best_V))
        rows.append(best_V[indices[-1]].astype(np.float32))
    indptr = np.concatenate([[0], np.cumsum([len(row) for row in rows])])
    return csr_array((np.concatenate(rows), np.concatenate(indices), indptr), shape=(len(rows), weights_VV.shape[1]))


def _overlap(exact: csr_array, stock: csr_array, k: int) -> float:
    shares = []
    for row in range(exact.shape[0]):
        wanted = _top(exact, row, k)
        shares.append(len(set(wanted) & set(_top(stock, row, len(wanted)))) / len(wanted))
    return float(np.mean(shares))


def _top(vectors: csr_array, row: int, k: int) -> list[int]:
    start, stop = vectors.indptr[row : row + 2]
    terms, weights = vectors.indices[start:stop], vectors.data[start:stop]
    order = np.lexsort((terms, -weights))
    return [int(term) for term in terms[order][:k]]

"""What a term is worth in a document and in a query: BM25 impacts and smoothed idf, or weights as given."""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from soju.core.config import Settings
from soju.core.errors import UserError


class WeightingSettings(Settings):
    """How vectors of an encoder become document impacts and query weights."""

    kind: Literal["bm25", "as_is"] = "as_is"
    """``bm25``: the encoder gives term counts, BM25 saturates them and the query carries idf. ``as_is``: the encoder is
    a neural one whose weights need nothing."""
    k1: float = Field(default=1.2, ge=0, allow_inf_nan=False)
    """Saturation of the term count, unitless; 0 ignores counts (``bm25`` only)."""
    b: float = Field(default=0.75, ge=0, le=1)
    """How much a long chunk is discounted, 0 not at all (``bm25`` only)."""
    average_length: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    """Average chunk length in term counts; ``None`` measures it at the first build and keeps it (``bm25`` only)."""
    prior_documents: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    """Weight of the model's training corpus in idf, in documents; 0 counts this index alone (``bm25`` only)."""


def bm25_impact(
    counts_P: NDArray[np.float32], lengths_P: NDArray[np.float32], *, k1: float, b: float, average_length: float
) -> NDArray[np.float32]:
    """Saturate term counts: ``tf (k1 + 1) / (tf + k1 (1 - b + b length / average_length))``.

    The idf is not in it, so an impact never changes when documents are added.

    Args:
        counts_P: Term counts, one for each posting, > 0.
        lengths_P: Length in term counts of the chunk of each posting.
        k1: Saturation, >= 0.
        b: Length discount in [0, 1].
        average_length: Average chunk length, > 0.

    Returns:
        Impacts in (0, k1 + 1), float32, unitless.

    References:
        Robertson & Zaragoza 2009, The Probabilistic Relevance Framework: BM25 and Beyond.
    """
    norm_P = k1 * (1.0 - b + b * lengths_P.astype(np.float64) / average_length)
    return (counts_P * (k1 + 1.0) / (counts_P + norm_P)).astype(np.float32)


def idf(
    document_frequency_V: NDArray[np.int64],
    documents: int,
    *,
    prior_documents: float = 0.0,
    prior_share_V: NDArray[np.float32] | None = None,
) -> NDArray[np.float32]:
    """Weigh terms by rarity: ``ln(1 + (N' - df' + 0.5) / (df' + 0.5))``, always > 0.

    ``df' = df + prior_documents * prior_share`` and ``N' = N + prior_documents`` blend in the corpus the model was
    trained on, so that an index of three documents still knows which words are common.

    Args:
        document_frequency_V: Indexed chunks that hold each term, ``(V,)``.
        documents: Indexed chunks, N.
        prior_documents: How many documents the prior counts for.
        prior_share_V: Share of the training corpus's documents that hold each term, ``(V,)``, in [0, 1].

    Returns:
        ``(V,)`` float32 in nats.

    Raises:
        UserError: If `prior_documents` is given without a usable `prior_share_V`.

    References:
        Robertson & Zaragoza 2009; the ``1 +`` keeps it positive, as Lucene does.
    """
    df_V = document_frequency_V.astype(np.float64)
    if prior_documents > 0:
        if prior_share_V is None or prior_share_V.shape != df_V.shape:
            raise UserError(
                f"weighting.prior_documents: {prior_documents:g} needs one document share for each of the "
                f"{len(df_V):,} terms; pass prior_share_V when the index is built, or set it to 0"
            )
        df_V += prior_documents * prior_share_V.astype(np.float64)
    total = documents + prior_documents
    return np.log1p((total - df_V + 0.5) / (df_V + 0.5)).astype(np.float32)

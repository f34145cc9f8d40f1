"""The unexpanded side as sentence-transformers' own ``SparseStaticEmbedding``: one weight for each piece.

Shape letter: V = pieces in the vocabulary.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse import csr_array
from sentence_transformers import SparseEncoder
from sentence_transformers.sparse_encoder.modules import SparseStaticEmbedding
from tokenizers import Tokenizer

from soju.core.errors import UserError
from soju.sparse.export.stock_tokenizer import stock_tokenizer


def own_term_weights(canonical_VV: csr_array, idf_V: NDArray[np.floating[Any]]) -> NDArray[np.float32]:
    """Return, ``(V,)``, the weight of each piece for the term of its own name: ``canonical[p, p] · idf[p]``.

    What a piece counts for besides itself (``networks`` for network) has no place in one weight a piece and is lost;
    `soju.sparse.export.low_rank` keeps it.
    """
    if canonical_VV.shape != (len(idf_V), len(idf_V)):
        raise UserError(f"idf has {len(idf_V):,} values for a matrix of {canonical_VV.shape}; give one a term")
    return (canonical_VV.diagonal() * idf_V).astype(np.float32)


def save_stock_static(
    folder: Path, tokenizer: Tokenizer, weights_V: NDArray[np.floating[Any]], *, max_length: int = 512
) -> None:
    """Save a ``SparseEncoder`` that gives each piece of a text its weight, once however often it occurs.

    The folder loads with ``SparseEncoder(folder)``; soju is not needed.

    Args:
        folder: Made when it is missing.
        tokenizer: Its piece ids are the dimensions of the vectors.
        weights_V: Weight of each piece, ``(V,)``, finite, >= 0; usually idf. The unknown piece must weigh 0.
        max_length: Pieces after which a text is cut.

    Raises:
        UserError: If the weights do not fit the tokenizer or are unusable.
    """
    size = tokenizer.get_vocab_size()
    if weights_V.shape != (size,):
        raise UserError(f"the tokenizer has {size:,} pieces, the weights are {weights_V.shape}; give one a piece")
    if not (np.isfinite(weights_V) & (weights_V >= 0)).all():
        raise UserError("a weight is negative or not finite; smooth the idf first")
    stock = stock_tokenizer(tokenizer, max_length=max_length)
    if weights_V[stock.pad_token_id] != 0:
        raise UserError(f"the unknown piece {stock.pad_token!r} has a weight; set it to 0, it is the padding as well")
    module = SparseStaticEmbedding(stock, weight=torch.from_numpy(weights_V.astype(np.float32)), frozen=True)
    SparseEncoder(modules=[module], device="cpu").save(str(folder), create_model_card=False)

"""Texts to sparse term weights, tile by tile, without gradients.

Shape letters: B = texts, N = tokens of all texts, H = hidden width, V = terms, T = terms of a tile.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse import csr_array, vstack
from torch import Tensor

from soju.core.progress import track
from soju.sparse.splade_tiles import TileReducer, tiles

if TYPE_CHECKING:
    from soju.sparse.splade_encoder import SpladeEncoder


WINDOW = 8192
"""Texts that are tokenized, and sorted by length, at a time."""


@torch.inference_mode()
def sparse_weights(
    hidden_NH: Tensor,
    weight_VH: Tensor,
    bias_V: Tensor | None,
    lengths_B: Tensor,
    *,
    weights: Callable[[Tensor], Tensor],
    max_active_terms: int | None = None,
    tile: int | None = None,
) -> csr_array:
    """Return the term weights of texts as a sparse matrix.

    Args:
        hidden_NH: As in `soju.sparse.splade_head.signed_maxima`.
        weight_VH: As there.
        bias_V: As there.
        lengths_B: As there.
        weights: From signed maxima to weights.
        max_active_terms: Keep at most this many of the largest weights of each text; ties go to the lower id.
        tile: Terms to work on at a time.

    Returns:
        ``(B, V)`` float32, rows sorted by term, only weights > 0.
    """
    texts, terms = len(lengths_B), len(weight_VH)
    lengths_B = lengths_B.to("cpu", torch.int64)
    reducer = TileReducer(hidden_NH, weight_VH, lengths_B, tile=tile)
    empty_B = (lengths_B == 0).to(hidden_NH.device)
    buffer = hidden_NH.new_empty(texts * reducer.width, dtype=reducer.maxima_dtype)
    parts: list[tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float32]]] = []
    for part in tiles(terms, reducer.width):
        maxima_BT = buffer[: texts * (part.stop - part.start)].view(texts, -1)
        reducer.reduce(part, maxima_BT, None, start=0)
        if bias_V is not None:
            maxima_BT += bias_V[part]
        maxima_BT[empty_B] = 0
        weights_BT = weights(maxima_BT).float()
        text_E, term_E = weights_BT.nonzero().unbind(dim=1)
        value_E = weights_BT[text_E, term_E].cpu().numpy()
        parts.append((text_E.cpu().numpy(), (term_E + part.start).cpu().numpy(), value_E))
    rows, columns, values = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    order = np.argsort(rows, kind="stable")  # tiles ascend, so the terms of each text do
    indptr = np.zeros(texts + 1, np.int64)
    np.cumsum(np.bincount(rows, minlength=texts), out=indptr[1:])
    matrix = csr_array((values[order], columns[order], indptr), shape=(texts, terms))
    return matrix if max_active_terms is None else keep_largest(matrix, max_active_terms)


def keep_largest(matrix_BV: csr_array, count: int) -> csr_array:
    """Keep the largest ``count`` weights of each row; ties go to the lower column.

    Args:
        matrix_BV: Weights, rows sorted by column.
        count: At least 1.

    Returns:
        A matrix of the same shape.

    Raises:
        ValueError: If ``count`` is below 1.
    """
    if count < 1:
        raise ValueError(f"count must be >= 1, got {count}")
    lengths = np.diff(matrix_BV.indptr)
    rows = np.repeat(np.arange(len(lengths)), lengths)
    order = np.lexsort((matrix_BV.indices, -matrix_BV.data, rows))
    rank = np.arange(len(rows)) - matrix_BV.indptr[rows]
    kept = np.sort(order[rank < count])
    indptr = np.zeros(len(lengths) + 1, np.int64)
    np.cumsum(np.minimum(lengths, count), out=indptr[1:])
    return csr_array((matrix_BV.data[kept], matrix_BV.indices[kept], indptr), shape=matrix_BV.shape)


@torch.inference_mode()
def encode_sparse(
    encoder: SpladeEncoder,
    texts: Sequence[str],
    *,
    batch_size: int = 32,
    max_active_terms: int | None = None,
    show_progress: bool = False,
) -> csr_array:
    """Return the term weights of texts, the same as `SparseEncoder.encode` gives.

    Texts are tokenized once and batched by their number of tokens, so that little is spent on padding.

    Args:
        encoder: The model.
        texts: Texts, any number.
        batch_size: Texts the model sees at a time.
        max_active_terms: Keep at most this many of the largest weights of each text.
        show_progress: Whether to show a bar.

    Returns:
        ``(B, V)`` float32, one row a text in the order given, only weights > 0.

    Raises:
        ValueError: If ``batch_size`` or ``max_active_terms`` is below 1.
    """
    if batch_size < 1 or (max_active_terms is not None and max_active_terms < 1):
        raise ValueError(f"batch_size and max_active_terms must be >= 1, got {batch_size} and {max_active_terms}")
    encoder.eval()
    transformer, pooling = encoder[0], encoder[1]
    output = transformer.output_embedding
    if not texts:
        return csr_array((0, output.out_features), dtype=np.float32)
    batches: Iterable[tuple[NDArray[np.int64], dict[str, Tensor]]] = _batches(encoder, texts, batch_size)
    if show_progress:
        count = sum(-(-min(WINDOW, len(texts) - start) // batch_size) for start in range(0, len(texts), WINDOW))
        batches = track(batches, "Encoding", total=count)
    places, rows = [], []
    for place_B, features in batches:
        hidden_NH, lengths_B = transformer.hidden_states(features)
        places.append(place_B)
        rows.append(
            sparse_weights(
                hidden_NH,
                output.weight,
                output.bias,
                lengths_B,
                weights=pooling.weights,
                max_active_terms=max_active_terms,
            )
        )
    return csr_array(vstack(rows, format="csr")[np.argsort(np.concatenate(places))])


def _batches(
    encoder: SpladeEncoder, texts: Sequence[str], batch_size: int
) -> Iterator[tuple[NDArray[np.int64], dict[str, Tensor]]]:
    """Yield the places of texts of about one length, and what the model is called with for them."""
    tokenizer = encoder.tokenizer
    prompt = encoder._resolve_prompt(None, None) or ""
    for start in range(0, len(texts), WINDOW):
        tokens = tokenizer([prompt + text for text in texts[start : start + WINDOW]], truncation="longest_first")
        # Longest first, so that a batch that does not fit into memory is met at once.
        order = np.argsort([-len(ids) for ids in tokens["input_ids"]], kind="stable")
        for first in range(0, len(order), batch_size):
            chosen = order[first : first + batch_size]
            rows = {key: [values[i] for i in chosen] for key, values in tokens.items()}
            padded = tokenizer.pad(rows, return_tensors="pt")
            yield chosen + start, {key: value.to(encoder.device) for key, value in padded.items()}

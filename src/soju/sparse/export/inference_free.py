"""Queries without a network: sentence-transformers' ``Router`` of an idf table for queries and the model for documents.

Shape letter: V = pieces in the vocabulary.

References:
    Geng et al. 2024, arXiv:2411.04403 (inference-free sparse retrieval with idf). Formal et al. 2021, arXiv:2109.10086
    (SPLADE-doc).

Make a model whose queries need no network of a neural one and a corpus.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sentence_transformers import SparseEncoder
from sentence_transformers.base.modules import Router
from sentence_transformers.sparse_encoder.modules import SparseStaticEmbedding

from soju.core.errors import UserError
from soju.core.files import write_json, write_manifest
from soju.data.log import OnError, ReadLog
from soju.search.weighting import idf
from soju.sparse.indexing import read_documents
from soju.sparse.model import open_model
from soju.sparse.neural_encoders import InferenceFreeEncoder, NeuralEncoder

IDF_FILE = "idf.json"
"""``{piece: weight}``: what OpenSearch's sparse tokenizer models carry beside ``tokenizer.json``."""
_BATCH = 256


def piece_frequency(tokenizer: Any, texts: Iterable[str]) -> tuple[NDArray[np.int64], int]:
    """Count the texts that hold each piece.

    Args:
        tokenizer: A transformers tokenizer.
        texts: Texts, read once.

    Returns:
        Counts, ``(V,)``, and the number of texts.
    """
    frequency_V = np.zeros(len(tokenizer), np.int64)
    total = 0
    remaining: Iterator[str] = iter(texts)
    while batch := list(islice(remaining, _BATCH)):
        for ids in tokenizer(batch, add_special_tokens=False)["input_ids"]:
            frequency_V[np.unique(np.asarray(ids, np.int64))] += 1
        total += len(batch)
    return frequency_V, total


def save_inference_free(folder: Path, model: SparseEncoder, idf_V: NDArray[np.floating[Any]]) -> None:
    """Save a ``SparseEncoder`` whose queries are looked up: each piece of a text has its idf once, special tokens none.

    The folder loads with ``SparseEncoder(folder)``; ``encode_query`` takes the table, ``encode_document`` the model.
    soju is not needed.

    Args:
        folder: Made when it is missing.
        model: A stock model of ``Transformer`` and ``SpladePooling``.
        idf_V: Weight of each piece, ``(V,)``, finite, >= 0.

    Raises:
        UserError: If the model's vectors do not have one dimension a piece, or a weight is unusable.
    """
    tokenizer = model.tokenizer
    dimensions = model.get_embedding_dimension()
    if dimensions != len(tokenizer):
        raise UserError(
            f"the model's vectors have {dimensions:,} dimensions and its tokenizer {len(tokenizer):,} pieces, so a "
            "table of pieces does not fit them; trim the model first (soju trim)"
        )
    if idf_V.shape != (len(tokenizer),):
        raise UserError(
            f"the tokenizer has {len(tokenizer):,} pieces, the idf is {idf_V.shape}; give one value a piece"
        )
    if not (np.isfinite(idf_V) & (idf_V >= 0)).all():
        raise UserError("an idf value is negative or not finite; smooth it first")
    weights_V = idf_V.astype(np.float32)
    weights_V[tokenizer.all_special_ids] = 0
    table = SparseStaticEmbedding(tokenizer, weight=torch.from_numpy(weights_V), frozen=True)
    table.max_seq_length = model.max_seq_length
    router = Router.for_query_document([table], list(model))
    both = SparseEncoder(modules=[router], similarity_fn_name=model.similarity_fn_name, device="cpu")
    both.save(str(folder), create_model_card=False)
    pieces = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    weighted = zip(pieces, weights_V.tolist(), strict=True)
    write_json(folder / IDF_FILE, {piece: round(weight, 6) for piece, weight in weighted if weight > 0})
    write_manifest(folder)


def make_inference_free(model: str, corpus: Sequence[str], target: Path, *, on_error: OnError = "stop") -> ReadLog:
    """Write a neural model with an idf table of a corpus in place of its query side.

    Args:
        model: See `soju.sparse.indexing.open_model`.
        corpus: Documents whose pieces are counted: those that will be searched, or others like them.
        target: Folder, must not exist.
        on_error: Whether broken rows stop or are left out.

    Returns:
        What was read and refused.

    Raises:
        UserError: If the target exists, there is no corpus, or the model needs no network for queries already.
    """
    if target.exists():
        raise UserError(f"{target}: exists already; give another name or remove it first")
    if not corpus:
        raise UserError("--to inference-free needs --corpus: documents whose pieces are counted for the idf")
    encoder, _ = open_model(model)
    if not isinstance(encoder, NeuralEncoder) or isinstance(encoder, InferenceFreeEncoder):
        raise UserError(f"{model}: needs no network for queries already; index and search with it as it is")
    log = ReadLog()
    # 1. In how many documents does each piece stand?
    texts = (document.text for document in read_documents(corpus, on_error, log))
    frequency_V, documents = piece_frequency(encoder.model.tokenizer, texts)
    # 2. The rarer, the heavier: the same smoothed idf as everywhere here.
    save_inference_free(target, encoder.model.as_stock(), idf(frequency_V, documents))
    return log

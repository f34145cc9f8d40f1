"""A model whose queries need no network: made from a neural one and a corpus, and opened for indexing and searching."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from scipy.sparse import csr_array
from sentence_transformers import SparseEncoder
from sentence_transformers.base.modules import Router

from soju.core.errors import UserError
from soju.core.files import MANIFEST, verify_manifest
from soju.data.log import OnError, ReadLog
from soju.export.inference_free import piece_frequency, save_inference_free
from soju.models.splade_encoder import SpladeEncoder
from soju.recipes.splade.encoders import NeuralEncoder, unit_rows
from soju.recipes.splade.indexing import open_model, read_documents
from soju.search.weighting import idf


class InferenceFreeEncoder(NeuralEncoder):
    """A ``Router`` folder as a `TermEncoder`: queries from the table, documents from the model.

    Args:
        model: The document side.
        table: The query side's tokenizer and weights: a ``SparseStaticEmbedding``.
    """

    def __init__(self, model: SpladeEncoder, table: object) -> None:
        super().__init__(model)
        self._tokenizer = table.tokenizer  # type: ignore[attr-defined]
        self._weights_V = table.weight.detach().numpy()  # type: ignore[attr-defined]
        self._max_length = model.max_seq_length

    @classmethod
    def load(cls, folder: Path) -> InferenceFreeEncoder:
        """Load what `soju.export.inference_free.save_inference_free` wrote; a manifest in it is checked."""
        if (folder / MANIFEST).is_file():
            verify_manifest(folder)
        if any(folder.rglob("*.bin")):
            raise UserError(f"{folder}: holds weights as *.bin, which can run code when loaded; save it as safetensors")
        stock = SparseEncoder(str(folder), device="cpu", local_files_only=True)
        router = stock[0]
        if not isinstance(router, Router) or set(router.sub_modules) != {"query", "document"}:
            raise UserError(f"{folder}: not a Router of query and document; give a model folder that soju knows")
        documents = SpladeEncoder(
            modules=list(router.sub_modules["document"]), similarity_fn_name=stock.similarity_fn_name, device="cpu"
        )
        return cls(documents, router.sub_modules["query"][0])

    def encode_queries(self, texts: Sequence[str]) -> csr_array:
        """Look up the idf of each piece of each text, ``(B, V)``, once however often it occurs."""
        cut = {"truncation": True, "max_length": self._max_length} if self._max_length else {}
        rows = self._tokenizer(list(texts), add_special_tokens=False, **cut)["input_ids"] if len(texts) else []
        pieces = [np.unique(np.asarray(row, np.int64)) for row in rows]
        indptr = np.concatenate([[0], np.cumsum([len(row) for row in pieces])]).astype(np.int64)
        indices = np.concatenate([*pieces, np.empty(0, np.int64)]).astype(np.int64)
        vectors = csr_array((self._weights_V[indices], indices, indptr), shape=(len(rows), len(self._weights_V)))
        vectors.eliminate_zeros()
        return vectors

    def encode_documents(self, texts: Sequence[str]) -> csr_array:
        """Return the model's term weights of texts, ``(B, V)``, of length 1 with cosine similarity."""
        vectors = super().encode_queries(texts)
        return unit_rows(vectors) if self.similarity == "cosine" else vectors


def make_inference_free(model: str, corpus: Sequence[str], target: Path, *, on_error: OnError = "stop") -> ReadLog:
    """Write a neural model with an idf table of a corpus in place of its query side.

    Args:
        model: See `soju.recipes.splade.indexing.open_model`.
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

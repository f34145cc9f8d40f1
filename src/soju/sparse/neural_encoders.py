"""Neural SPLADE models as encoders: for queries and documents, or for documents alone.

Imports torch and sentence-transformers, which takes seconds; `soju.sparse.model` does without until a neural
model is loaded.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array, diags_array
from sentence_transformers import SparseEncoder
from sentence_transformers.base.modules import Router
from transformers import PreTrainedTokenizerBase

from soju.core.errors import UserError
from soju.core.files import MANIFEST, verify_manifest
from soju.sparse.splade import SpladeEncoder
from soju.sparse.static.encoder import readable_terms


class NeuralEncoder:
    """A SPLADE model as a `TermEncoder`.

    With ``similarity_fn_name`` cosine, document vectors are divided by their length; the query's length changes no
    ranking.

    Args:
        model: The model.
        batch_size: Texts at a time.
        similarity: ``dot`` or ``cosine``; the model's own when not given.
    """

    document_share_V: NDArray[np.float32] | None = None

    def __init__(self, model: SpladeEncoder, *, batch_size: int = 64, similarity: str | None = None) -> None:
        self.model = model.eval()
        self.batch_size = batch_size
        self.similarity = similarity or model.similarity_fn_name

    @classmethod
    def load(cls, folder: Path) -> NeuralEncoder:
        """Load a folder that `SpladeEncoder.save` or sentence-transformers wrote; a manifest in it is checked."""
        if (folder / MANIFEST).is_file():
            verify_manifest(folder)
        return cls(SpladeEncoder(str(folder), device="cpu"))

    @cached_property
    def pieces(self) -> tuple[str, ...]:
        """Every piece as the tokenizer spells it, by id."""
        return spelled_pieces(self.model.tokenizer, self.model[1].embedding_dimension)

    @cached_property
    def terms(self) -> tuple[str, ...]:
        """Readable name of every term."""
        return readable_terms(self.pieces)

    def encode_queries(self, texts: Sequence[str]) -> csr_array:
        """Return the term weights of texts, ``(B, V)``."""
        return self.model.encode_sparse(texts, batch_size=self.batch_size)

    def encode_documents(self, texts: Sequence[str]) -> csr_array:
        """Return the term weights of texts, ``(B, V)``, of length 1 with cosine similarity."""
        vectors = self.model.encode_sparse(texts, batch_size=self.batch_size)
        return unit_rows(vectors) if self.similarity == "cosine" else vectors


class RememberingEncoder(NeuralEncoder):
    """Encodes a list of texts once: a test set comes again the other way round, and with another similarity.

    Args:
        encoder: What encodes.
        known: What was encoded, by model and texts; shared by those that are scored together.
    """

    def __init__(self, encoder: NeuralEncoder, known: dict[tuple[int, tuple[str, ...]], csr_array]) -> None:
        super().__init__(encoder.model, batch_size=encoder.batch_size, similarity=encoder.similarity)
        self._known = known

    def encode_queries(self, texts: Sequence[str]) -> csr_array:
        """Return the term weights of texts, ``(B, V)``."""
        key = id(self.model), tuple(texts)
        if key not in self._known:
            self._known[key] = super().encode_queries(texts)
        return self._known[key]


def unit_rows(vectors: csr_array) -> csr_array:
    """Divide each row by its length; a zero row stays zero."""
    lengths = np.sqrt(np.asarray(vectors.multiply(vectors).sum(axis=1)).ravel())
    return csr_array(diags_array(1 / np.maximum(lengths, 1e-9).astype(np.float32)) @ vectors)


def spelled_pieces(tokenizer: PreTrainedTokenizerBase, size: int) -> tuple[str, ...]:
    """Spell every piece of a vocabulary; spare rows of a head, which no piece stands for, are ``<N>``."""
    pieces = tokenizer.convert_ids_to_tokens(range(min(size, len(tokenizer))))
    return (*pieces, *(f"<{index}>" for index in range(len(pieces), size)))


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
        """Load what `soju.sparse.export.stock.save_inference_free` wrote; a manifest in it is checked."""
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

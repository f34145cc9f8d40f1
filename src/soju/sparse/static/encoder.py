"""A sparse encoder without a network: tokenize, then one sparse product; and readable names of a tokenizer's pieces.

Shape letters: B = texts, V = pieces in the vocabulary; terms are pieces too.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file
from scipy.sparse import csr_array, eye_array
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.pre_tokenizers import ByteLevel

from soju.core.errors import UserError
from soju.core.files import verify_manifest, write_json, write_manifest
from soju.sparse.static.lexicon import BOUNDARY

MODEL_TYPE = "soju-static-sparse"
FORMAT_VERSION = 1


@dataclass(frozen=True)
class StaticEncoder:
    """Korean and English text to weighted terms of both languages.

    A document counts the terms it holds: ``counts @ canonical``. A query is expanded with what its terms translate to:
    ``counts @ canonical @ (I + translations)``.
    """

    tokenizer: Tokenizer
    canonical_VV: csr_array
    """Terms one occurrence of a piece counts for, ``(V, V)``. See `soju.sparse.static.lexicon`."""
    translations_VV: csr_array
    """Weight in [0, 1] of each translation of a term, ``(V, V)``, both directions."""
    document_share_V: NDArray[np.float32]
    """Share of the training texts in the term's language that hold the term, ``(V,)``: the prior of its document
    frequency."""

    def __post_init__(self) -> None:
        size = self.tokenizer.get_vocab_size()
        shapes = {self.canonical_VV.shape, self.translations_VV.shape, (size, size)}
        if len(shapes) > 1 or self.document_share_V.shape != (size,):
            raise ValueError(f"the tokenizer has {size:,} pieces, but the matrices are {shapes}")

    @cached_property
    def pieces(self) -> tuple[str, ...]:
        """Every piece as the tokenizer spells it, by id."""
        vocabulary = self.tokenizer.get_vocab()
        return tuple(sorted(vocabulary, key=vocabulary.__getitem__))

    @cached_property
    def terms(self) -> tuple[str, ...]:
        """Readable name of every term; sub-words show ``…`` where they are cut from their word."""
        return tuple(lexicon_term(piece) for piece in self.pieces)

    @cached_property
    def query_VV(self) -> csr_array:
        """The matrix a query's piece counts are multiplied with."""
        identity_VV = eye_array(len(self.terms), dtype=np.float32, format="csr")
        return (self.canonical_VV @ (identity_VV + self.translations_VV)).tocsr()

    def encode_documents(self, texts: Sequence[str]) -> csr_array:
        """Count the terms of each text; returns ``(B, V)`` float32, unitless counts for BM25 weighting."""
        return self._encode(texts, self.canonical_VV)

    def encode_queries(self, texts: Sequence[str]) -> csr_array:
        """Return ``(B, V)`` float32: each text's own terms (counts) and their translations (counts × weight in [0, 1]).

        Inverse document frequency is not in it: the index applies that of its own documents.
        """
        return self._encode(texts, self.query_VV)

    def _encode(self, texts: Sequence[str], matrix_VV: csr_array) -> csr_array:
        ids = [encoding.ids for encoding in self.tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)]
        indptr = np.zeros(len(ids) + 1, np.int64)
        np.cumsum([len(row) for row in ids], out=indptr[1:])
        indices = np.fromiter((piece for row in ids for piece in row), np.int64, count=int(indptr[-1]))
        counts = csr_array((np.ones(len(indices), np.float32), indices, indptr), shape=(len(ids), len(self.terms)))
        counts.sum_duplicates()
        vectors = csr_array(counts @ matrix_VV)
        vectors.sort_indices()
        return vectors

    def save(self, folder: Path, *, about: dict[str, Any] | None = None) -> None:
        """Write ``model.safetensors``, ``tokenizer.json``, ``config.json`` and the manifest, last.

        Args:
            folder: Made when it is missing.
            about: Anything to keep in ``config.json`` under ``about``: how the model was made.
        """
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {
            **_pack("canonical", self.canonical_VV),
            **_pack("translations", self.translations_VV),
            "document_share": self.document_share_V.astype(np.float16),
        }
        save_file(tensors, folder / "model.safetensors")
        self.tokenizer.save(str(folder / "tokenizer.json"), pretty=False)
        config = {
            "model_type": MODEL_TYPE,
            "format_version": FORMAT_VERSION,
            "vocab_size": len(self.terms),
            "about": about or {},
        }
        write_json(folder / "config.json", config)
        write_manifest(folder)

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Read what `save` wrote; `UserError` if it is not such a model, or was altered since it was written."""
        config = read_model_config(folder)
        if config.get("model_type") != MODEL_TYPE:
            raise UserError(f"{folder}: model type {config.get('model_type')!r}, expected {MODEL_TYPE!r}")
        if (version := config.get("format_version")) != FORMAT_VERSION:
            raise UserError(f"{folder}: format version {version} is not {FORMAT_VERSION}; train the model again")
        if not isinstance(config.get("vocab_size"), int):
            raise UserError(f"{folder / 'config.json'}: vocab_size is missing; restore the file or train again")
        verify_manifest(folder)
        tensors = load_file(folder / "model.safetensors")
        size = int(config["vocab_size"])
        return cls(
            tokenizer=Tokenizer.from_file(str(folder / "tokenizer.json")),
            canonical_VV=_unpack("canonical", tensors, size),
            translations_VV=_unpack("translations", tensors, size),
            document_share_V=tensors["document_share"].astype(np.float32),
        )


def read_model_config(folder: Path) -> dict[str, Any]:
    """Read ``config.json`` of a model folder; `UserError` if there is none or it is not a JSON object."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(
            f"{folder}: no config.json, so this is not a model folder; give the folder of a model"
        ) from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{folder / 'config.json'}: not JSON ({error}); restore the file or train again") from None
    if not isinstance(config, dict):
        raise UserError(f"{folder / 'config.json'}: not a JSON object; restore the file or train again")
    return config


def _pack(name: str, matrix: csr_array) -> dict[str, NDArray[Any]]:
    ids = np.uint16 if matrix.shape[1] <= np.iinfo(np.uint16).max else np.int32  # a row may have V entries
    return {
        f"{name}.row_lengths": np.diff(matrix.indptr).astype(ids),
        f"{name}.terms": matrix.indices.astype(ids),
        f"{name}.weights": matrix.data.astype(np.float16),
    }


def _unpack(name: str, tensors: dict[str, NDArray[Any]], size: int) -> csr_array:
    indptr = np.concatenate(([0], np.cumsum(tensors[f"{name}.row_lengths"], dtype=np.int64)))
    weights = tensors[f"{name}.weights"].astype(np.float32)
    return csr_array((weights, tensors[f"{name}.terms"].astype(np.int64), indptr), shape=(size, size))


WORD_PIECE = "##"
_BYTE_LEVEL_SPACE = "Ġ"
_BYTE_LEVEL = set(ByteLevel.alphabet())


def readable_terms(pieces: Sequence[str]) -> tuple[str, ...]:
    """Name every piece of a vocabulary; ``…`` shows where it is cut from its word.

    The convention is read off the whole vocabulary: soju's own lexicon (``▁word▁``), word pieces (``##``), byte-level
    pairs (``Ġ``) or SentencePiece (``▁``). Names are not necessarily unique.
    """
    name = _convention(pieces)
    return tuple(name(piece) for piece in pieces)


def _convention(pieces: Sequence[str]) -> Callable[[str], str]:
    if any(len(piece) > 2 and piece[0] == piece[-1] == BOUNDARY for piece in pieces):
        return lexicon_term
    if any(piece.startswith(WORD_PIECE) for piece in pieces):
        return _word_piece
    if any(piece.startswith(_BYTE_LEVEL_SPACE) for piece in pieces):
        return _byte_level
    return _sentence_piece


def lexicon_term(piece: str) -> str:
    """Name a piece of soju's own lexicon tokenizer."""
    if len(piece) > 2 and piece[0] == piece[-1] == BOUNDARY:
        return piece[1:-1]
    if piece.isascii() and piece.isalnum():
        return f"…{piece}…"
    if len(piece) > 1 and piece[0] == BOUNDARY:
        return piece[1:] + "…"
    if len(piece) > 1 and piece[-1] == BOUNDARY:
        return "…" + piece[:-1]
    return piece


def _word_piece(piece: str) -> str:
    return "…" + piece.removeprefix(WORD_PIECE) if piece.startswith(WORD_PIECE) and piece != WORD_PIECE else piece


def _sentence_piece(piece: str) -> str:
    if piece.startswith("<") and piece.endswith(">"):
        return piece
    return piece[1:] or piece if piece.startswith(BOUNDARY) else "…" + piece


def _byte_level(piece: str) -> str:
    if not set(piece) <= _BYTE_LEVEL:
        return piece  # added as a whole: special tokens
    text = ByteLevelDecoder().decode([piece])
    return text[1:] or piece if text.startswith(" ") else "…" + text

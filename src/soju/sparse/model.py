"""Sparse models of every kind behind one interface: static, neural, or neural for documents alone.

`load` finds a model by its name, `Model` is what it returns. Torch is imported when a neural model is loaded, so that
static ones start at once.

Shape letters: B = texts, V = terms in the vocabulary.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array

from soju.core.errors import UserError, require_extra
from soju.core.files import MANIFEST, sha256
from soju.core.model_folder import STOCK_MODULES, find_model_folder, module_names
from soju.core.results import TermWeight
from soju.core.run import Run
from soju.search.hits import heaviest
from soju.sparse.config import SearchSettings
from soju.sparse.static.encoder import StaticEncoder, read_model_config

if TYPE_CHECKING:
    from soju.sparse.neural_encoders import NeuralEncoder


PACKAGED_MODEL = "ko-en-static"
"""Name of the model that ships with soju, accepted wherever a model folder is."""
ROUTER = "router_config.json"
"""Stands in a folder whose queries and documents go different ways; see `soju.sparse.export.stock`."""
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


class TermEncoder(Protocol):
    """Texts in, weighted terms out."""

    @property
    def pieces(self) -> tuple[str, ...]:
        """Every piece as the tokenizer spells it, by id."""

    @property
    def terms(self) -> tuple[str, ...]:
        """Readable name of every term, by id."""

    @property
    def document_share_V(self) -> NDArray[np.float32] | None:
        """Prior of the document frequencies, ``(V,)``; none for encoders whose weights need no idf."""

    def encode_queries(self, texts: Sequence[str]) -> csr_array:
        """Return ``(B, V)`` float32."""

    def encode_documents(self, texts: Sequence[str]) -> csr_array:
        """Return ``(B, V)`` float32, what an index stores."""


@dataclass(frozen=True)
class Model:
    """A sparse model and the folder it was loaded from; `load` makes one.

    Example:
        >>> import soju
        >>> isinstance(soju.load("ko-en-static"), soju.Model)
        True
    """

    encoder: TermEncoder
    folder: Path

    def __repr__(self) -> str:
        return f"Model({str(self.folder)!r}, {type(self.encoder).__name__}, {len(self.terms):,} terms)"

    @property
    def terms(self) -> tuple[str, ...]:
        """Readable name of every term, V of them, by column of the vectors.

        Example:
            >>> import soju
            >>> model = soju.load("ko-en-static")
            >>> len(model.terms) == model.encode_queries(["물"]).shape[1]
            True
        """
        return self.encoder.terms

    def encode_queries(self, texts: Sequence[str]) -> csr_array:
        """Weigh the terms of queries.

        Args:
            texts: B texts, Korean or English.

        Returns:
            ``(B, V)`` float32, weights unitless and >= 0: a static model's own terms and their translations, the idf
            left to the index; a neural model's learned weights.

        Example:
            >>> import soju
            >>> soju.load("ko-en-static").encode_queries(["물을 끓인다", "boiling water"]).shape[0]
            2
        """
        return self.encoder.encode_queries(texts)

    def encode_documents(self, texts: Sequence[str]) -> csr_array:
        """Weigh the terms of documents, as an index stores them.

        Args:
            texts: B texts, Korean or English.

        Returns:
            ``(B, V)`` float32, unitless and >= 0: term counts for a static model, which an index weighs by BM25;
            learned weights for a neural one.

        Example:
            >>> import soju
            >>> soju.load("ko-en-static").encode_documents(["Water boils."]).nnz
            2
        """
        return self.encoder.encode_documents(texts)

    def expand(self, text: str, k: int = 20) -> list[TermWeight]:
        """Show which terms a text activates as a query.

        Args:
            text: Korean or English.
            k: Most terms, >= 1.

        Returns:
            The heaviest terms, heaviest first; none for a text without a known term.

        Raises:
            UserError: If k is below 1.

        Example:
            >>> import soju
            >>> [term.term for term in soju.load("ko-en-static").expand("데이터베이스", k=2)]
            ['데이터베이스', 'database']
        """
        if k < 1:
            raise UserError(f"k: got {k}; ask for at least one term")
        return heaviest(self.encode_queries([text]), 0, self.terms, k)

    @property
    def search(self) -> SearchSettings:
        """How an index of this model weighs documents."""
        return search_settings_of(self.folder)

    @cached_property
    def fingerprint(self) -> str:
        """What names the model in its indexes; see `fingerprint_of`."""
        return fingerprint_of(self.folder)


def load(model: str | Path | Run) -> Model:
    """Load a sparse model: static, neural, or with static queries and neural documents.

    Args:
        model: ``ko-en-static``, which ships with soju; a model folder; a run or its folder, whose best model is taken;
            or a hub id such as ``naver/splade-v3``.

    Returns:
        The model, on the CPU.

    Raises:
        UserError: If there is no such model, its weights are no safetensors, or it is of another kind.
        IntegrityError: If a file was altered since the model was written.

    Example:
        >>> import soju
        >>> soju.load("ko-en-static").expand("심장", k=2)[1].term
        'heart'
    """
    folder = model_folder(model.folder if isinstance(model, Run) else model)
    return Model(load_encoder(folder), folder)


def model_folder(model: str | Path) -> Path:
    """Resolve the name of a model to its folder, see `load`; only a hub id is looked up."""
    path = Path(model)
    for part in ("best", "final"):
        if any((path / part / name).is_file() for name in ("config.json", STOCK_MODULES)):
            return path / part
    if path.exists():
        return path
    if str(model) == PACKAGED_MODEL:
        return Path(__file__).parents[1] / "packaged" / PACKAGED_MODEL
    if _HUB_ID.fullmatch(str(model)) and not path.parent.exists():  # below a folder that exists it is a wrong path
        return find_model_folder(str(model)).path
    return path


def fingerprint_of(folder: Path) -> str:
    """Return what names a model in its indexes: the SHA-256 of its manifest, or of its weights without one."""
    for name in (MANIFEST, "model.safetensors"):
        if (folder / name).is_file():
            return sha256(folder / name)
    raise UserError(f"{folder}: neither {MANIFEST} nor model.safetensors; give a model folder of safetensors")


def search_settings_of(folder: Path) -> SearchSettings:
    """Return the document weighting a model was trained and scored with; a neural one has none of its own."""
    if (folder / ROUTER).is_file():  # its config.json files lie in the folders of its modules
        return SearchSettings()
    return SearchSettings(**read_model_config(folder).get("about", {}).get("search", {}))


def load_encoder(folder: Path) -> StaticEncoder | NeuralEncoder:
    """Load whichever kind of encoder a folder holds (`UserError` if it holds none, or was altered)."""
    if not (folder / STOCK_MODULES).is_file():
        return StaticEncoder.load(folder)
    if "Pooling" in module_names(folder):
        raise UserError(f"{folder}: a dense embedding model; load it with sentence_transformers.SentenceTransformer")
    require_extra(f"{folder}: a neural model", "neural", "torch", "transformers", "sentence_transformers")
    from soju.sparse.neural_encoders import InferenceFreeEncoder, NeuralEncoder  # seconds; not for static ones

    return (InferenceFreeEncoder if (folder / ROUTER).is_file() else NeuralEncoder).load(folder)

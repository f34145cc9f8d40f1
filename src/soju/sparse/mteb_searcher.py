"""A sparse model as mteb asks it: the index of ``soju index``, searched exactly."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from soju.core.errors import UserError
from soju.data.rows import Document
from soju.search.index import SparseIndex
from soju.sparse.config import SearchSettings
from soju.sparse.indexing import index_settings
from soju.sparse.model import TermEncoder, model_folder, open_model, search_settings_of


class MtebSearcher:
    """A model behind mteb's ``SearchProtocol``: it builds the index that ``soju index`` would, and searches it exactly.

    mteb's wrapper for ``SparseEncoder`` multiplies vectors alone; a static model needs the weighting of its index.

    Args:
        encoder: The model.
        name: What mteb calls it.
        fingerprint: What names its weights.
        search: How documents are weighted; for static encoders.
    """

    def __init__(self, encoder: TermEncoder, *, name: str, fingerprint: str, search: SearchSettings) -> None:
        self._encoder = encoder
        self.name = name
        self._fingerprint = fingerprint
        self._search_settings = search
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._index: SparseIndex | None = None

    @property
    def mteb_model_meta(self) -> Any:
        """What mteb writes about the model."""
        from mteb.models.model_meta import ModelMeta

        about = {"name": f"soju/{self.name}", "revision": self._fingerprint[:16], "model_type": ["sparse"]}
        return ModelMeta.create_empty(overwrites=about)

    @classmethod
    def of(cls, model: str) -> MtebSearcher:
        """Open a model, see `soju.sparse.indexing.open_model`."""
        encoder, fingerprint = open_model(model)
        folder = model_folder(model)
        name = folder.resolve().parent.name if folder.name in ("best", "final") else folder.name
        return cls(encoder, name=name, fingerprint=fingerprint, search=search_settings_of(folder))

    def index(self, corpus: Iterable[Mapping[str, Any]], **_: Any) -> None:
        """Index the rows of a corpus: ``id``, ``text`` and perhaps ``title``, which is put before the text."""
        self.close()
        self._folder = tempfile.TemporaryDirectory(prefix="soju-mteb-")
        self._index = SparseIndex.build(
            Path(self._folder.name) / "index",
            (Document(str(row["id"]), _text_of(row)) for row in corpus),
            self._encoder.encode_documents,
            self._encoder.terms,
            index_settings(self._encoder, self._search_settings, engine="exact"),
            prior_share_V=self._encoder.document_share_V,
        )

    def search(
        self, queries: Iterable[Mapping[str, Any]], *, top_k: int, top_ranked: object = None, **_: Any
    ) -> dict[str, dict[str, float]]:
        """Search what was indexed.

        Args:
            queries: Rows with ``id`` and ``text``.
            top_k: Documents a query.
            top_ranked: Candidates of reranking tasks, which are not for searchers.

        Returns:
            Query id -> document id -> score.

        Raises:
            UserError: If candidates are given.
        """
        assert self._index is not None, "mteb indexes before it searches"
        if top_ranked is not None:
            raise UserError("a reranking task gives its own candidates; choose a retrieval task")
        rows = [(str(row["id"]), str(row["text"])) for row in queries]
        found: dict[str, dict[str, float]] = {}
        for start in range(0, len(rows), 256):
            part = rows[start : start + 256]
            vectors = self._encoder.encode_queries([text for _, text in part])
            hits = self._index.search(vectors, top_k, engine="exact", explain_hits=False)
            found |= {
                name: {hit.document_id: hit.score for hit in of} for (name, _), of in zip(part, hits, strict=True)
            }
        return found

    def close(self) -> None:
        """Remove the index."""
        self._index = None
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None


def _text_of(row: Mapping[str, Any]) -> str:
    """Return title and text as mteb's own encoders read them."""
    return f"{row.get('title') or ''} {row['text']}".strip()

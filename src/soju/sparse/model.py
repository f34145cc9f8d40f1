"""What indexing, scoring and showing need of an encoder: static, neural, or neural for documents alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array

from soju.sparse.static.encoder import StaticEncoder

if TYPE_CHECKING:
    from soju.sparse.neural_encoders import NeuralEncoder


STOCK_MODULES = "modules.json"
"""Stands in every folder that sentence-transformers saved."""
ROUTER = "router_config.json"
"""Stands in a folder whose queries and documents go different ways; see `soju.sparse.export.make_inference_free`."""


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


def load_encoder(folder: Path) -> StaticEncoder | NeuralEncoder:
    """Load whichever kind of model a folder holds.

    Args:
        folder: A model folder.

    Returns:
        The encoder.

    Raises:
        UserError: If the folder is no model, or was altered since it was written.
    """
    if not (folder / STOCK_MODULES).is_file():
        return StaticEncoder.load(folder)
    from soju.sparse.neural_encoders import InferenceFreeEncoder, NeuralEncoder  # seconds; not for static ones

    if (folder / ROUTER).is_file():
        return InferenceFreeEncoder.load(folder)
    return NeuralEncoder.load(folder)

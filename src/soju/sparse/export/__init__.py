"""Sparse models in the formats of other programs, and the names of these formats, which load nothing more."""

from typing import Literal

Format = Literal["tsv", "query-tokens", "stock-static", "low-rank", "onnx", "inference-free"]
"""Forms of a model; see `soju.sparse.export.formats`."""
VectorFormat = Literal["opensearch", "elasticsearch", "anserini"]
"""Files of a corpus as vectors; see `soju.sparse.export.vectors`."""

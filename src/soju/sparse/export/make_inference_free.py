"""Make a model whose queries need no network of a neural one and a corpus."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from soju.core.errors import UserError
from soju.data.log import OnError, ReadLog
from soju.search.weighting import idf
from soju.sparse.export.inference_free import piece_frequency, save_inference_free
from soju.sparse.indexing import open_model, read_documents
from soju.sparse.neural_encoders import InferenceFreeEncoder, NeuralEncoder


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

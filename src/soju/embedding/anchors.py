"""Texts of a stage, and Korean sides of pairs to pull to the untouched model's vectors of their English sides."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from accelerate import PartialState

from soju.data.records import PairRow
from soju.embedding.training_rows import TextRows
from soju.teachers.teacher import SentenceTransformerTeacher
from soju.teachers.teacher_cache import cached_embeddings

CACHE = "anchor-vectors"
"""Folder below ``training`` that keeps the vectors."""


def anchored_rows(
    texts: Sequence[str], pairs: Sequence[PairRow], base: Path, *, weight: float, cache: Path
) -> TextRows:
    """Put texts and anchored Korean sides together.

    Args:
        texts: Of the stage.
        pairs: Sentence pairs.
        base: The untouched model.
        weight: Of the anchoring; 0 reads no pairs.
        cache: Folder that keeps vectors by content.

    Returns:
        Rows, some of which have a vector to be pulled to.
    """
    if not weight or not pairs:
        return TextRows(list(texts))
    english = list(dict.fromkeys(pair.en for pair in pairs))
    with PartialState().main_process_first():
        vectors_ND = np.asarray(cached_embeddings(SentenceTransformerTeacher(str(base)), english, cache), np.float32)
    place = {text: number for number, text in enumerate(english)}
    target_of = [-1] * len(texts) + [place[pair.en] for pair in pairs]
    return TextRows([*texts, *(pair.ko for pair in pairs)], vectors_ND, np.array(target_of, np.int64))

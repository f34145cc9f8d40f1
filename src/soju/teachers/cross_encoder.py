"""Cross-encoder teachers: how well a text answers a query, one number a pair. Shape letter: N = pairs."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from soju.core.errors import UserError
from soju.core.files import atomic_writer
from soju.core.model_folder import content_hash, find_model_folder
from soju.core.progress import track

_CHUNK = 1024


def cross_encoder_scores(
    name: str,
    pairs: Sequence[tuple[str, str]],
    cache: Path,
    *,
    revision: str | None = None,
    max_length: int | None = None,
    batch_size: int = 32,
) -> NDArray[np.float32]:
    """Score pairs of query and text with a frozen cross-encoder; scores are kept on disk by the content of both.

    Args:
        name: A folder, ``package:NAME`` or a hub id of a sentence-transformers cross-encoder with one output.
        pairs: N pairs.
        cache: Folder for the scores.
        revision: Branch, tag or commit of a hub id.
        max_length: Tokens a pair is cut to; the model's own limit when ``None``.
        batch_size: Pairs at a time.

    Returns:
        Scores, ``(N,)``, in the model's unit, higher is better.

    Raises:
        UserError: If the model cannot be found, has no safetensors or more than one output, or a score is not finite.
    """
    folder = find_model_folder(name, revision=revision)
    content = json.dumps([content_hash(folder.path), max_length, list(pairs)], ensure_ascii=False)
    path = cache / "cross-encoder" / f"{hashlib.sha256(content.encode()).hexdigest()[:32]}.npy"
    if path.is_file():
        kept: NDArray[np.float32] = np.load(path, allow_pickle=False)
        return kept
    from sentence_transformers import CrossEncoder  # seconds; not needed when the scores are kept

    model = CrossEncoder(
        str(folder.path),
        max_length=max_length,
        local_files_only=True,
        trust_remote_code=False,
        model_kwargs={"dtype": "float32", "use_safetensors": True},
    )
    if model.num_labels != 1:
        raise UserError(f"{name}: gives {model.num_labels} numbers a pair; choose a cross-encoder that gives one score")
    found: list[NDArray[np.float32]] = []
    for start in track(range(0, len(pairs), _CHUNK), "cross-encoder"):
        chunk = [list(pair) for pair in pairs[start : start + _CHUNK]]
        found.append(np.asarray(model.predict(chunk, batch_size=batch_size, show_progress_bar=False), np.float32))
    scores_N = np.concatenate(found) if found else np.zeros(0, np.float32)
    if not np.isfinite(scores_N).all():
        query, text = pairs[int(np.flatnonzero(~np.isfinite(scores_N))[0])]
        raise UserError(f'{name}: the score of "{query[:60]}" with "{text[:60]}" is not finite; remove the row')
    with atomic_writer(path, encoding=None) as file:
        np.save(file, scores_N, allow_pickle=False)
    return scores_N

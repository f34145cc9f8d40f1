"""Teacher models: dense ones turn texts into unit vectors, cross-encoders score pairs of query and text.

Shape letters: N = texts, or pairs of them, D = dimensions.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from soju.core.errors import UserError
from soju.core.files import atomic_writer
from soju.core.model_folder import content_hash, find_model_folder
from soju.core.progress import track

_CHUNK = 1024
"""Pairs between two moves of the progress bar."""


class Teacher(Protocol):
    """Whatever turns texts into vectors of length 1."""

    @property
    def identity(self) -> Mapping[str, str | int | None]:
        """Everything its vectors depend on, short; equal identities give equal vectors."""

    def embed(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Return L2-normalised vectors, ``(N, D)``, finite."""


class SentenceTransformerTeacher:
    """A frozen sentence-transformers model in float32, loaded at the first text that it must embed."""

    def __init__(
        self,
        name: str,
        *,
        max_length: int | None = None,
        prompt: str | None = None,
        batch_size: int = 32,
        device: str | None = None,
        revision: str | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        """Find the model, fetching it from the hub when needed.

        Args:
            name: A folder, ``package:NAME`` for a model inside an installed Python package, or a hub id.
            max_length: Tokens a text is cut to; the model's own limit when ``None``.
            prompt: Put before every text, for example ``query: `` for the e5 family; the model's default when ``None``.
            batch_size: Texts at a time.
            device: Where to run it; sentence-transformers chooses when ``None``.
            revision: Branch, tag or commit of a hub id.
            trust_remote_code: Run Python files that come with the model.

        Raises:
            UserError: If the model cannot be found or its weights are no safetensors.
        """
        self._folder = find_model_folder(name, revision=revision, code=trust_remote_code)
        self._max_length = max_length
        self._prompt = prompt
        self._batch_size = batch_size
        self._device = device
        self._trust_remote_code = trust_remote_code

    @cached_property
    def identity(self) -> dict[str, str | int | None]:
        """Hub id and commit, or the SHA-256 of the files of a folder; with the maximum length and the prompt."""
        if self._folder.commit is not None:
            model = f"{self._folder.name}@{self._folder.commit}"
        else:
            model = f"sha256:{content_hash(self._folder.path)}"
        return {"model": model, "max_length": self._max_length, "prompt": self._prompt}

    def embed(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Return L2-normalised vectors, ``(N, D)``; a text with a zero or non-finite one is named (`UserError`)."""
        vectors_ND = self._model.encode(
            list(texts),
            prompt=self._prompt,
            batch_size=self._batch_size,
            convert_to_numpy=True,
            show_progress_bar=False,
        )
        return unit_vectors(vectors_ND, texts, source=self._folder.name)

    @cached_property
    def _model(self) -> Any:
        from sentence_transformers import SentenceTransformer  # seconds; not needed when every vector is cached

        model = SentenceTransformer(
            str(self._folder.path),
            device=self._device,
            trust_remote_code=self._trust_remote_code,
            local_files_only=True,
            model_kwargs={"dtype": "float32", "use_safetensors": True},
        )
        if self._max_length is not None:
            model.max_seq_length = self._max_length
        return model.eval()


def unit_vectors(vectors_ND: NDArray[Any], texts: Sequence[str], *, source: str) -> NDArray[np.float32]:
    """Normalise the vectors of texts to length 1, as float32.

    The first text whose vector is zero or not finite is named, after the ``source`` of the vectors (`UserError`).
    """
    if vectors_ND.ndim != 2 or len(vectors_ND) != len(texts) or vectors_ND.shape[1] == 0:
        raise ValueError(f"{source}: vectors of {len(texts)} texts must be (N, D), got {vectors_ND.shape}")
    # In float64 no finite float32 overflows when squared; einsum and divide cast piece by piece, without a copy.
    lengths_N = np.sqrt(np.einsum("nd,nd->n", vectors_ND, vectors_ND, dtype=np.float64))
    usable_N = np.isfinite(lengths_N) & (lengths_N > 0)
    if not usable_N.all():
        first = int(np.flatnonzero(~usable_N)[0])
        what = "zero" if lengths_N[first] == 0 else "not finite"
        text = texts[first][:80]
        raise UserError(f'{source}: the vector of "{text}" is {what}; remove the text or use another teacher')
    unit_ND = np.empty(vectors_ND.shape, np.float32)
    return np.divide(vectors_ND, lengths_N[:, None], out=unit_ND, dtype=np.float64, casting="same_kind")


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

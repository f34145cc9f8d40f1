"""Teacher vectors that the user computed elsewhere. Shape letters: N = texts, D = dimensions.

``vectors.safetensors`` holds one tensor ``embeddings``, ``(N, D)``, float32 or float16; beside it, under the same name,
``vectors.txt`` holds one text a line or ``vectors.jsonl`` one ``{"text": "..."}`` a line, in the same order, in UTF-8.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from soju.core.errors import UserError
from soju.teachers.teacher import unit_vectors
from soju.teachers.teacher_cache import Embeddings

TENSOR = "embeddings"
TYPES = ("F32", "F16")


def precomputed_embeddings(path: Path, texts: Sequence[str]) -> Embeddings:
    """Look the vectors of texts up in a file of the user's.

    Args:
        path: The ``.safetensors`` file; its texts are in the ``.txt`` or ``.jsonl`` file of the same name.
        texts: The texts wanted, each exactly as it stands in the file but for white space at its ends.

    Returns:
        The vectors, ``(len(texts), D)``, of length 1.

    Raises:
        UserError: If a file is missing or not as described, the counts differ, a vector is zero or not finite, or a
            text has no vector.
    """
    known = _read_texts(path)
    vectors_ND = _read_vectors(path)
    if len(known) != len(vectors_ND):
        raise UserError(
            f"{path}: {len(vectors_ND):,} vectors but {len(known):,} texts beside it; write one text for every vector"
        )
    places = {text.strip(): place for place, text in reversed(list(enumerate(known)))}
    missing = [text for text in texts if text.strip() not in places]
    if missing:
        raise UserError(
            f'{path}: {len(missing):,} of {len(texts):,} texts have no vector, the first is "{missing[0]}"; '
            "add them, or let a teacher model embed"
        )
    rows = [places[text.strip()] for text in texts]
    return Embeddings([unit_vectors(vectors_ND, known, source=str(path))], np.zeros(len(rows)), rows)


def _read_vectors(path: Path) -> NDArray[Any]:
    try:
        with safe_open(path, framework="numpy") as file:
            if TENSOR not in file.keys():  # noqa: SIM118 (not a mapping)
                raise UserError(f'{path}: no tensor "{TENSOR}"; save the vectors under that name')
            stored = file.get_slice(TENSOR)
            shape, kind = tuple(stored.get_shape()), stored.get_dtype()
            if len(shape) != 2 or 0 in shape or kind not in TYPES:
                raise UserError(f"{path}: {TENSOR} is {kind} {shape}; save (N, D) in float32 or float16")
            return file.get_tensor(TENSOR)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; give the .safetensors file of the vectors") from None
    except SafetensorError as error:
        raise UserError(f"{path}: not a safetensors file ({error}); save the vectors with safetensors") from None


def _read_texts(path: Path) -> list[str]:
    plain, objects = path.with_suffix(".txt"), path.with_suffix(".jsonl")
    chosen = [candidate for candidate in (plain, objects) if candidate.is_file()]
    if len(chosen) != 1:
        found = "both are there" if chosen else "neither is there"
        raise UserError(f"{path}: its texts belong in {plain.name} or {objects.name} beside it; {found}")
    try:
        lines = chosen[0].read_text(encoding="utf-8-sig").rstrip("\n").split("\n")
    except UnicodeDecodeError as error:
        raise UserError(f"{chosen[0]}: not UTF-8 (byte {error.start}); save it as UTF-8") from None
    return lines if chosen[0] == plain else [_text_of(line, chosen[0], n) for n, line in enumerate(lines, start=1)]


def _text_of(line: str, path: Path, number: int) -> str:
    try:
        row = json.loads(line)
    except ValueError:
        row = None
    if not isinstance(row, dict) or not isinstance(row.get("text"), str):
        raise UserError(f'{path}:{number}: text: no text; write {{"text": "..."}}, one a line')
    return str(row["text"])

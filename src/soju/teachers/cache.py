"""A teacher's vectors on disk: a cache, so that a text is embedded once, and files the user computed elsewhere.

Shape letters: N = texts, D = dimensions.

A cache has one folder a teacher, named by the hash of its identity, and in it shards that are only ever added: a
``.npy`` file of records (SHA-256 of the text, vector) and, written after it, a ``.json`` file with its size and hash. A
shard without that file does not exist; whatever stops the work, finished shards stay.

Of a user's files, ``vectors.safetensors`` holds one tensor ``embeddings``, ``(N, D)``, float32 or float16. Next to it
``vectors.txt`` holds one text a line or ``vectors.jsonl`` one ``{"text": "..."}`` a line, in the same order, in UTF-8.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from safetensors import SafetensorError, safe_open

from soju.core.errors import IntegrityError, UserError
from soju.core.files import atomic_writer, sha256, write_json
from soju.core.progress import track
from soju.teachers.dense import Teacher, unit_vectors

DIGEST = 32
"""Bytes of a SHA-256."""
TEACHER = "teacher.json"
TENSOR = "embeddings"
TYPES = ("F32", "F16")


class Embeddings:
    """The vectors of N texts in order, ``(N, D)`` float32 of length 1; read from disk when they are asked for."""

    def __init__(self, shards: Sequence[NDArray[np.float32]], shard_N: ArrayLike, row_N: ArrayLike) -> None:
        """Take arrays of vectors ``(rows, D)``, usually memory-mapped, and shard and row of each text."""
        self._shards = shards
        self._shard_N = np.asarray(shard_N, np.int64)
        self._row_N = np.asarray(row_N, np.int64)
        self.shape = (len(self._row_N), shards[0].shape[1] if shards else 0)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, texts: int | slice | Sequence[int] | NDArray[np.integer[Any]]) -> NDArray[np.float32]:
        """Return the vectors of some texts by number, copied: ``(D,)`` for one, ``(n, D)`` for several."""
        shards, rows = self._shard_N[texts], self._row_N[texts]
        if np.ndim(rows) == 0:
            return np.array(self._shards[int(shards)][int(rows)], np.float32)
        vectors = np.empty((len(rows), self.shape[1]), np.float32)
        for shard in np.unique(shards):
            here = shards == shard
            vectors[here] = self._shards[shard][rows[here]]
        return vectors

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        return self[:].astype(dtype or np.float32, copy=False)


def cached_embeddings(
    teacher: Teacher, texts: Sequence[str], cache_folder: Path, *, shard_size: int = 1024
) -> Embeddings:
    """Embed texts that the cache lacks, keep their vectors, and return all.

    Several processes may share a cache; at worst they embed the same texts twice.

    Args:
        teacher: Embeds.
        texts: N texts, repetitions allowed.
        cache_folder: Shared by all teachers; made when it is missing.
        shard_size: Texts a shard, the most that an interruption can lose.

    Returns:
        The vectors, ``(N, D)``, row i for text i.

    Raises:
        IntegrityError: If a shard has other bytes than were written.
        UserError: If the teacher gives a zero or non-finite vector.
    """
    identity = json.dumps(dict(teacher.identity), ensure_ascii=False, sort_keys=True)
    folder = cache_folder / hashlib.sha256(identity.encode()).hexdigest()[:32]
    digests = [hashlib.sha256(text.encode("utf-8")).digest() for text in texts]
    shards = [_open_shard(path.with_suffix(".npy")) for path in sorted(folder.glob("*.json")) if path.name != TEACHER]
    known = {bytes(digest) for shard in shards for digest in shard["digest"]}
    missing = {digest: text for digest, text in zip(digests, texts, strict=True) if digest not in known}
    if missing and not (folder / TEACHER).exists():
        write_json(folder / TEACHER, dict(teacher.identity))
    batches = [list(missing.items())[start : start + shard_size] for start in range(0, len(missing), shard_size)]
    for batch in track(batches, "teacher"):
        batch_texts = [text for _, text in batch]
        vectors = unit_vectors(teacher.embed(batch_texts), batch_texts, source="teacher")
        shards.append(_write_shard(folder, [digest for digest, _ in batch], vectors))
    # Reversed, so that a text that two processes embedded is read from the first shard that has it.
    places = {
        bytes(digest): (number, row)
        for number, shard in reversed(list(enumerate(shards)))
        for row, digest in enumerate(shard["digest"])
    }
    found = np.array([places[digest] for digest in digests], np.int64).reshape(-1, 2)
    return Embeddings([shard["vector"] for shard in shards], found[:, 0], found[:, 1])


def _write_shard(folder: Path, digests: Sequence[bytes], vectors: NDArray[np.float32]) -> NDArray[Any]:
    records = np.empty(len(digests), [("digest", "u1", DIGEST), ("vector", "<f4", vectors.shape[1])])
    records["digest"] = np.frombuffer(b"".join(digests), np.uint8).reshape(-1, DIGEST)
    records["vector"] = vectors
    # Named by its texts, so that two processes with the same work write the same file.
    path = folder / f"{hashlib.sha256(b''.join(digests)).hexdigest()[:32]}.npy"
    with atomic_writer(path, encoding=None) as file:
        np.save(file, records, allow_pickle=False)
    write_json(path.with_suffix(".json"), {"texts": len(digests), "bytes": path.stat().st_size, "sha256": sha256(path)})
    return np.load(path, mmap_mode="r", allow_pickle=False)


def _open_shard(path: Path) -> NDArray[Any]:
    remedy = f"remove {path.stem}.* from {path.parent} and its texts are embedded again"
    try:
        entry = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
        intact = path.stat().st_size == entry["bytes"] and sha256(path) == entry["sha256"]
    except (FileNotFoundError, ValueError, KeyError, TypeError) as error:
        raise IntegrityError(f"{path}: the shard is incomplete ({error}); {remedy}") from None
    if not intact:
        raise IntegrityError(f"{path}: its content changed since it was written; {remedy}")
    return np.load(path, mmap_mode="r", allow_pickle=False)


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
            f"{path}: {len(vectors_ND):,} vectors but {len(known):,} texts next to it; write one text for every vector"
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
        raise UserError(f"{path}: its texts belong in {plain.name} or {objects.name} next to it; {found}")
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

"""A teacher's vectors on disk, so that a text is embedded once. Shape letters: N = texts, D = dimensions.

A cache has one folder a teacher, named by the hash of its identity, and in it shards that are only ever added: a
``.npy`` file of records (SHA-256 of the text, vector) and, written after it, a ``.json`` file with its size and hash. A
shard without that file does not exist; whatever stops the work, finished shards stay.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from soju.core.errors import IntegrityError
from soju.core.files import atomic_writer, sha256, write_json
from soju.core.progress import track
from soju.teachers.teacher import Teacher, unit_vectors

DIGEST = 32
"""Bytes of a SHA-256."""
TEACHER = "teacher.json"


class Embeddings:
    """The vectors of N texts in order, ``(N, D)`` float32 of length 1; read from disk when they are asked for."""

    def __init__(self, shards: Sequence[NDArray[np.float32]], shard_N: ArrayLike, row_N: ArrayLike) -> None:
        """Gather vectors.

        Args:
            shards: Arrays of vectors, ``(rows, D)``, usually memory-mapped.
            shard_N: The shard of each text.
            row_N: Its row there.
        """
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

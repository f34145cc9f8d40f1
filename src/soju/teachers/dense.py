"""Teacher models and the cache of their vectors: dense ones embed texts, cross-encoders score pairs of query and text.

A cache has one folder a teacher, named by the hash of its identity, and in it shards that are only ever added: a
``.npy`` file of records (SHA-256 of the text, vector) and, written after it, a ``.json`` file with its size and hash. A
shard without that file does not exist; whatever stops the work, finished shards stay.

Of vectors the user computed elsewhere, ``vectors.safetensors`` holds one tensor ``embeddings``, ``(N, D)``, float32 or
float16. Next to it ``vectors.txt`` holds one text a line or ``vectors.jsonl`` one ``{"text": "..."}`` a line, in the
same order, in UTF-8.

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
from numpy.typing import ArrayLike, NDArray
from safetensors import SafetensorError, safe_open

from soju.core.errors import IntegrityError, UserError
from soju.core.files import atomic_writer, sha256, write_json
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

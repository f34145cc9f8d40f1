"""The folder of an index: its weighting and settings in ``index.json``, and how it changes without being half changed.

A folder is built under another name and renamed. A later change adds new segment folders, which no manifest names yet,
then writes ``index.next.json`` and last ``manifest.json``: that is the moment the change happens. `recover` moves
``index.next.json`` to ``index.json`` when the manifest expects it, and drops it otherwise.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import AfterValidator, Field

from soju.core.config import Settings, validate
from soju.core.errors import IntegrityError, UserError
from soju.core.files import MANIFEST, sha256, verify_manifest, write_json, write_manifest
from soju.search.chunking import ChunkSettings
from soju.search.engines import OWN


class WeightingSettings(Settings):
    """How vectors of an encoder become document impacts and query weights."""

    kind: Literal["bm25", "as_is"] = "as_is"
    """``bm25``: the encoder gives term counts, BM25 saturates them and the query carries idf. ``as_is``: the encoder is
    a neural one whose weights need nothing."""
    k1: float = Field(default=1.2, ge=0, allow_inf_nan=False)
    """Saturation of the term count, unitless; 0 ignores counts (``bm25`` only)."""
    b: float = Field(default=0.75, ge=0, le=1)
    """How much a long chunk is discounted, 0 not at all (``bm25`` only)."""
    average_length: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    """Average chunk length in term counts; ``None`` measures it at the first build and keeps it (``bm25`` only)."""
    prior_documents: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    """Weight of the model's training corpus in idf, in documents; 0 counts this index alone (``bm25`` only)."""


def bm25_impact(
    counts_P: NDArray[np.float32], lengths_P: NDArray[np.float32], *, k1: float, b: float, average_length: float
) -> NDArray[np.float32]:
    """Saturate term counts: ``tf (k1 + 1) / (tf + k1 (1 - b + b length / average_length))``.

    The idf is not in it, so an impact never changes when documents are added.

    Args:
        counts_P: Term counts, one for each posting, > 0.
        lengths_P: Length in term counts of the chunk of each posting.
        k1: Saturation, >= 0.
        b: Length discount in [0, 1].
        average_length: Average chunk length, > 0.

    Returns:
        Impacts in (0, k1 + 1), float32, unitless.

    References:
        Robertson & Zaragoza 2009, The Probabilistic Relevance Framework: BM25 and Beyond.
    """
    norm_P = k1 * (1.0 - b + b * lengths_P.astype(np.float64) / average_length)
    return (counts_P * (k1 + 1.0) / (counts_P + norm_P)).astype(np.float32)


def idf(
    document_frequency_V: NDArray[np.int64],
    documents: int,
    *,
    prior_documents: float = 0.0,
    prior_share_V: NDArray[np.float32] | None = None,
) -> NDArray[np.float32]:
    """Weigh terms by rarity: ``ln(1 + (N' - df' + 0.5) / (df' + 0.5))``, always > 0.

    ``df' = df + prior_documents * prior_share`` and ``N' = N + prior_documents`` blend in the corpus the model was
    trained on, so that an index of three documents still knows which words are common.

    Args:
        document_frequency_V: Indexed chunks that hold each term, ``(V,)``.
        documents: Indexed chunks, N.
        prior_documents: How many documents the prior counts for.
        prior_share_V: Share of the training corpus's documents that hold each term, ``(V,)``, in [0, 1].

    Returns:
        ``(V,)`` float32 in nats.

    Raises:
        UserError: If `prior_documents` is given without a usable `prior_share_V`.

    References:
        Robertson & Zaragoza 2009; the ``1 +`` keeps it positive, as Lucene does.
    """
    df_V = document_frequency_V.astype(np.float64)
    if prior_documents > 0:
        if prior_share_V is None or prior_share_V.shape != df_V.shape:
            raise UserError(
                f"weighting.prior_documents: {prior_documents:g} needs one document share for each of the "
                f"{len(df_V):,} terms; pass prior_share_V when the index is built, or set it to 0"
            )
        df_V += prior_documents * prior_share_V.astype(np.float64)
    total = documents + prior_documents
    return np.log1p((total - df_V + 0.5) / (df_V + 0.5)).astype(np.float32)


INDEX = "index.json"
_NEXT = "index.next.json"
SEGMENTS = "segments"


@contextmanager
def new_folder(folder: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Give an empty folder beside `folder` that takes its name, with a manifest, when the block ends well.

    Only an index is ever replaced, and with `overwrite` alone; anything else in the place is a `UserError`.
    """
    occupied = folder.exists() and (not folder.is_dir() or any(folder.iterdir()))
    if occupied and not (overwrite and (folder / INDEX).is_file()):
        what = "holds an index already" if (folder / INDEX).is_file() else "is not empty and not an index"
        raise UserError(f"{folder}: {what}; choose another folder, or remove this one first")
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}.", suffix=".tmp"))
    try:
        yield temporary
        write_manifest(temporary)
        temporary.chmod(0o755)
        if occupied:
            aside = temporary.with_suffix(".old")
            os.replace(folder, aside)
            os.replace(temporary, folder)
            shutil.rmtree(aside)
        else:
            if folder.exists():
                folder.rmdir()
            os.replace(temporary, folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


@contextmanager
def new_segment(folder: Path) -> Iterator[Path]:
    """Give an empty folder for one more segment; it is kept when the block ends well, but not yet part of the index."""
    parent = folder / SEGMENTS
    numbers = [int(path.name) for path in parent.iterdir() if path.name.isdigit()]
    temporary = Path(tempfile.mkdtemp(dir=parent, prefix=".", suffix=".tmp"))
    try:
        yield temporary
        temporary.chmod(0o755)
        os.replace(temporary, parent / f"{max(numbers, default=-1) + 1:04d}")
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def newest_segment(folder: Path) -> str:
    """Return the name of the segment folder that was made last."""
    return max(path.name for path in (folder / SEGMENTS).iterdir() if path.name.isdigit())


def publish(folder: Path, index: dict[str, Any], *, segments: Sequence[str]) -> None:
    """Make a changed ``index.json`` valid together with the segments it names, then delete all other segments."""
    entries = {}
    for path, entry in read_manifest(folder).items():
        if not path.startswith(f"{SEGMENTS}/") or path.split("/")[1] in segments:
            entries[path] = entry
    for name in segments:
        for file in sorted((folder / SEGMENTS / name).rglob("*")):
            path = file.relative_to(folder).as_posix()
            if file.is_file() and path not in entries:
                entries[path] = _entry(file)
    write_json(folder / _NEXT, index)
    entries[INDEX] = _entry(folder / _NEXT)
    write_json(folder / MANIFEST, {"files": dict(sorted(entries.items()))})
    recover(folder)
    for unused in (folder / SEGMENTS).iterdir():
        if unused.name.isdigit() and unused.name not in segments:
            shutil.rmtree(unused, ignore_errors=True)


def recover(folder: Path) -> None:
    """Finish or drop a change that was interrupted."""
    waiting = folder / _NEXT
    if not waiting.is_file():
        return
    if read_manifest(folder).get(INDEX) == _entry(waiting):
        os.replace(waiting, folder / INDEX)
    else:
        waiting.unlink()


def check(folder: Path, *, full: bool) -> None:
    """Check presence and size of every file of an index, and its content when `full`.

    Sizes always; every byte when `full`, with every fault listed.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such index; build one with `soju index`")
    if full:
        verify_manifest(folder)
        return
    for name, entry in read_manifest(folder).items():
        path = folder / name
        if not path.is_file():
            raise IntegrityError(f"{path}: missing since the index was written; build the index again")
        if path.stat().st_size != entry["bytes"]:
            raise IntegrityError(
                f"{path}: {path.stat().st_size:,} bytes instead of {entry['bytes']:,}; build the index again"
            )


def read_manifest(folder: Path) -> dict[str, dict[str, Any]]:
    """Return size and SHA-256 of each file by relative path; an unreadable manifest is an `IntegrityError`."""
    path = folder / MANIFEST
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))["files"]
    except FileNotFoundError:
        raise IntegrityError(f"{path}: missing, so this is no complete index; build it again") from None
    except (ValueError, KeyError, TypeError) as error:
        raise IntegrityError(f"{path}: unreadable ({error}); build the index again") from None
    return dict(entries)


def read_json(path: Path) -> Any:
    """Read a JSON file of an index (`IntegrityError`)."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise IntegrityError(f"{path}: unreadable ({error}); build the index again") from None


def _entry(path: Path) -> dict[str, Any]:
    return {"bytes": path.stat().st_size, "sha256": sha256(path)}


def _own(name: str) -> str:
    if name not in OWN:
        raise ValueError(f'got "{name}"; choose one of {", ".join(OWN)}')
    return name


Engine = Annotated[str, AfterValidator(_own)]
"""One of `soju.search.engines.OWN`."""


class IndexSettings(Settings):
    """Everything that decides what an index holds and how it is searched."""

    weighting: WeightingSettings = WeightingSettings()
    """How vectors become impacts."""
    chunking: ChunkSettings = ChunkSettings()
    """How long documents are cut."""
    engine: Engine = "auto"
    """What is built in addition to the posting lists: ``auto`` adds ``block-max`` from `block_max_from_chunks` on,
    ``exact`` nothing, the others always what they say."""
    block_max_from_chunks: int = Field(default=20_000, ge=1)
    """Chunks from which ``auto`` builds the block-max engine; below, posting lists are as fast."""
    batch_size: int = Field(default=256, ge=1)
    """Chunks encoded at once."""
    compact_share: float = Field(default=0.25, gt=0)
    """Added chunks, as a share of the first segment's, from which all segments are merged, the fast engine too."""
    max_added_segments: int = Field(default=8, ge=1)
    """Added segments from which these are merged into one."""


class SegmentEntry(Settings):
    """What ``index.json`` says about one segment."""

    name: str
    """Folder below ``segments``."""
    documents: int
    """D."""
    chunks: int
    """C."""
    postings: int
    """P."""
    empty_documents: int
    """Documents without any term, kept in the store and never found."""
    first_empty_documents: tuple[str, ...]
    """Ids of the first of them."""
    average_length: float | None
    """Average length of its chunks that have terms, in term counts (``bm25`` only)."""
    fast: str | None
    """The engine that was built in addition to the posting lists."""


class IndexDescription(Settings):
    """Content of ``index.json``."""

    format: int
    """Version of the folder's layout."""
    fingerprint: str
    """Names the model whose vectors are inside; compared when the index is opened with one."""
    terms: int
    """V."""
    average_length: float | None
    """Average chunk length of BM25, fixed at the first build."""
    settings: IndexSettings
    """As given to `SparseIndex.build`."""
    segments: tuple[SegmentEntry, ...]
    """In document order; the first is the largest and the one that may have a fast engine."""


FORMAT = 2
"""Of the folder's layout; an index of another one is refused."""
FORMER = ("seismic",)
"""Engines that soju had."""


def read_description(folder: Path) -> IndexDescription:
    """Read ``index.json``; a file that is unreadable, wrong or of another version of soju is a `UserError`.

    An index that was built with an engine of `FORMER` opens as one with ``engine: auto``: its posting lists are
    searched, and the engine's files stay where they are until the segment is merged.
    """
    path = folder / INDEX
    values = read_json(path)
    if not isinstance(values, dict) or values.get("format") != FORMAT:
        raise UserError(f"{path}: not of format {FORMAT}; build the index again with this version of soju")
    settings, segments = values.get("settings"), values.get("segments")
    if isinstance(settings, dict):
        for engine in FORMER:
            settings.pop(engine, None)
        if settings.get("engine") in FORMER:
            settings["engine"] = "auto"
    for entry in segments if isinstance(segments, list) else ():
        if isinstance(entry, dict) and entry.get("fast") in FORMER:
            entry["fast"] = None
    return validate(values, IndexDescription, place=str(path))

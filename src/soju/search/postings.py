"""Posting lists: which chunks hold a term, and with what weight. Memory-mapped arrays, built in bounded memory.

Shape letters: V = terms, P = postings (a term in a chunk), C = chunks, K = some chunks, T = some terms.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

import numpy as np
from numba import njit
from numpy.typing import NDArray
from scipy.sparse import csr_array, vstack

from soju.core.errors import UserError

Array = NDArray[Any]
Weigh = Callable[[NDArray[np.int32], NDArray[np.float32]], NDArray[np.float32]]
"""Maps chunk numbers and raw weights, both ``(P,)``, to impacts."""

_BLOCK_POSTINGS = 4_000_000  # 32 MB of raw postings, about 150 MB while a block is transposed


@dataclass(frozen=True, slots=True)
class Postings:
    """Posting lists of V terms over C chunks: list v is ``offsets[v]:offsets[v + 1]``, by rising chunk.

    `numbers` and `impacts` are ``(P,)``, `offsets` is ``(V + 1,)``.
    """

    offsets: NDArray[np.int64]
    numbers: NDArray[np.int32]
    impacts: NDArray[np.float32]
    chunks: int

    @classmethod
    def open(cls, folder: Path, *, chunks: int) -> Postings:
        """Map the three arrays of a folder; nothing is read until it is used."""
        arrays = (np.load(folder / f"{name}.npy", mmap_mode="r") for name in ("offsets", "chunks", "impacts"))
        offsets, numbers, impacts = (np.asarray(array) for array in arrays)
        return cls(np.array(offsets), numbers, impacts, chunks)

    @property
    def document_frequency(self) -> NDArray[np.int64]:
        """Number of chunks that hold each term, ``(V,)``."""
        return np.diff(self.offsets)

    def weights(self, chunks_K: NDArray[np.int32], terms_T: NDArray[np.int32]) -> NDArray[np.float32]:
        """Return the impacts of some terms in some chunks, ``(K, T)``, 0 where a chunk lacks the term."""
        return _weights(self.offsets, self.numbers, self.impacts, chunks_K, terms_T)

    def rows(self, start: int, stop: int) -> csr_array:
        """Return the vectors of chunks ``start:stop`` as ``(stop - start, V)``, terms rising in each row."""
        terms = len(self.offsets) - 1
        low_V, counts_C = _row_counts(self.offsets, self.numbers, start, stop)
        row_offsets = np.concatenate([[0], np.cumsum(counts_C)])
        columns, values = _gather_rows(self.offsets, self.numbers, self.impacts, start, stop, low_V, row_offsets.copy())
        return csr_array((values, columns, row_offsets), shape=(stop - start, terms))


class PostingsWriter:
    """Accumulates batches of vectors in blocks on disk and merges them into posting lists.

    Memory stays at one block (see ``_BLOCK_POSTINGS``) plus one array of V offsets for each block, however many
    documents come.

    Args:
        folder: Where the final arrays go; blocks live below it until `finish`.
        terms: V.
        block_postings: Postings held in memory before a block is written.
    """

    def __init__(self, folder: Path, terms: int, *, block_postings: int = _BLOCK_POSTINGS) -> None:
        self._folder = folder
        self._terms = terms
        self._limit = block_postings
        self._batches: list[csr_array] = []
        self._held = 0
        self._blocks: list[tuple[Path, int, int]] = []
        self._chunks = 0
        folder.mkdir(parents=True, exist_ok=True)

    def add(self, vectors_CV: csr_array) -> None:
        """Append the vectors of the next chunks, as `check_vectors` returns them."""
        self._batches.append(vectors_CV)
        self._held += vectors_CV.nnz
        if self._held >= self._limit:
            self._spill()

    def finish(self, weigh: Weigh | None = None) -> int:
        """Write the posting lists, each raw weight replaced by ``weigh(chunks, weights)``; return their number P."""
        self._spill()
        parts = [(Postings.open(path, chunks=count), base) for path, base, count in self._blocks]
        written = merge_postings(parts, self._folder, self._terms, weigh=weigh, block_postings=self._limit)
        del parts
        shutil.rmtree(self._folder / "blocks", ignore_errors=True)
        return written

    def _spill(self) -> None:
        if not self._batches:
            return
        rows = vstack(self._batches, format="csr") if len(self._batches) > 1 else self._batches[0]
        self._batches = []
        columns = csr_array(rows).tocsc()
        columns.sort_indices()
        path = self._folder / "blocks" / str(len(self._blocks))
        path.mkdir(parents=True)
        np.save(path / "offsets.npy", columns.indptr.astype(np.int64))
        np.save(path / "chunks.npy", columns.indices.astype(np.int32))
        np.save(path / "impacts.npy", columns.data.astype(np.float32))
        self._blocks.append((path, self._chunks, rows.shape[0]))
        self._chunks += rows.shape[0]
        self._held = 0


def merge_postings(
    parts: Sequence[tuple[Postings, int]],
    folder: Path,
    terms: int,
    *,
    weigh: Weigh | None = None,
    block_postings: int = _BLOCK_POSTINGS,
) -> int:
    """Join posting lists term by term and write them; parts come by rising chunk number."""
    offsets = np.zeros(terms + 1, dtype=np.int64)
    for part, _ in parts:
        offsets += part.offsets
    np.save(folder / "offsets.npy", offsets)
    total = int(offsets[-1])
    with (folder / "chunks.npy").open("wb") as chunk_file, (folder / "impacts.npy").open("wb") as impact_file:
        _write_header(chunk_file, "<i4", total)
        _write_header(impact_file, "<f4", total)
        first = 0
        while first < terms:
            last = int(np.searchsorted(offsets, offsets[first] + block_postings, side="right")) - 1
            last = min(terms, max(first + 1, last))
            size = int(offsets[last] - offsets[first])
            chunks, weights = np.empty(size, dtype=np.int32), np.empty(size, dtype=np.float32)
            cursor = (offsets[first:last] - offsets[first]).copy()
            for part, base in parts:
                _append(part.offsets, part.numbers, part.impacts, base, first, last, cursor, chunks, weights)
            (weights if weigh is None else weigh(chunks, weights)).astype("<f4", copy=False).tofile(impact_file)
            chunks.tofile(chunk_file)
            first = last
    return total


def check_vectors(vectors: object, *, rows: int, terms: int, place: str) -> csr_array:
    """Return an encoder's output as float32 CSR with sorted terms, no duplicates and no stored zeros.

    Args:
        vectors: Anything scipy can read as a sparse ``(rows, terms)`` array.
        rows: How many texts were encoded.
        terms: V.
        place: What is named in errors.

    Returns:
        ``(rows, terms)`` float32.

    Raises:
        UserError: If the shape is another, or a weight is negative, infinite or not a number.
    """
    checked = csr_array(cast(Any, vectors)).astype(np.float32)
    if checked.shape != (rows, terms):
        raise UserError(
            f"{place}: vectors of shape {checked.shape} instead of ({rows}, {terms}); encode with the model whose "
            "terms the index was built with"
        )
    if checked.nnz and not (np.isfinite(checked.data).all() and checked.data.min() >= 0):
        raise UserError(f"{place}: a term weight is negative or not finite; an index needs weights >= 0")
    checked.sum_duplicates()
    checked.eliminate_zeros()
    return checked


def _write_header(file: IO[bytes], descr: str, length: int) -> None:
    header = {"descr": descr, "fortran_order": False, "shape": (length,)}
    np.lib.format.write_array_header_1_0(file, header)


@njit(cache=True, nogil=True)
def _append(
    offsets: Array,
    source_chunks: Array,
    source_weights: Array,
    base: int,
    first: int,
    last: int,
    cursor: Array,
    chunks: Array,
    weights: Array,
) -> None:
    """Append the postings of some terms in one part to those of the parts before."""
    # Parts come by rising chunk number and each list rises, so the joined lists rise without being sorted.
    for term in range(first, last):
        at = cursor[term - first]
        for p in range(offsets[term], offsets[term + 1]):
            chunks[at] = source_chunks[p] + base
            weights[at] = source_weights[p]
            at += 1
        cursor[term - first] = at


@njit(cache=True, nogil=True)
def _find(chunks: Array, low: int, high: int, wanted: int) -> int:
    """Return the first position in the rising ``chunks[low:high]`` that is not below `wanted`."""
    while low < high:
        middle = (low + high) // 2
        if chunks[middle] < wanted:
            low = middle + 1
        else:
            high = middle
    return low


@njit(cache=True, nogil=True)
def _weights(offsets: Array, chunks: Array, impacts: Array, wanted_chunks: Array, terms: Array) -> Array:
    # A binary search for each pair: a few chunks are asked for, whose terms no array lists.
    result = np.zeros((len(wanted_chunks), len(terms)), dtype=np.float32)
    for t in range(len(terms)):
        start, stop = offsets[terms[t]], offsets[terms[t] + 1]
        for k in range(len(wanted_chunks)):
            p = _find(chunks, start, stop, wanted_chunks[k])
            if p < stop and chunks[p] == wanted_chunks[k]:
                result[k, t] = impacts[p]
    return result


@njit(cache=True, nogil=True)
def _row_counts(offsets: Array, chunks: Array, start: int, stop: int) -> tuple[Array, Array]:
    """Return where the postings of chunks ``start:stop`` begin in each list, and how many each chunk has."""
    low = np.empty(len(offsets) - 1, dtype=np.int64)
    counts = np.zeros(stop - start, dtype=np.int64)
    for term in range(len(offsets) - 1):
        p = _find(chunks, offsets[term], offsets[term + 1], start)
        low[term] = p
        while p < offsets[term + 1] and chunks[p] < stop:
            counts[chunks[p] - start] += 1
            p += 1
    return low, counts


@njit(cache=True, nogil=True)
def _gather_rows(
    offsets: Array, chunks: Array, impacts: Array, start: int, stop: int, low: Array, cursor: Array
) -> tuple[Array, Array]:
    """Write the postings that `_row_counts` counted as rows; ``cursor`` holds where each row starts and is used up."""
    # Terms are visited in order, so the columns of each row rise, as scipy and the block layout need them.
    columns = np.empty(cursor[-1], dtype=np.int64)
    values = np.empty(cursor[-1], dtype=np.float32)
    for term in range(len(offsets) - 1):
        p = low[term]
        while p < offsets[term + 1] and chunks[p] < stop:
            row = chunks[p] - start
            columns[cursor[row]] = term
            values[cursor[row]] = impacts[p]
            cursor[row] += 1
            p += 1
    return columns, values

"""In what order do chunks with similar vectors lie side by side? K-means on vectors projected to few numbers.

Shape letters: V = terms, C = chunks, K = clusters, R = numbers a vector is projected to.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from soju.core.progress import track
from soju.search.postings import Postings
from soju.search.weighting import idf

_PROJECTED = 64
_CHUNKS_A_CLUSTER = 64
_MOST_CLUSTERS = 1600
_SAMPLE = 100_000
_ROWS = 20_000


def similar_order(postings: Postings) -> NDArray[np.int32]:
    """Return the chunks by cluster, each once, ``(C,)``; within a cluster they keep their order.

    Vectors are weighted by idf, projected to 64 random directions, and clustered by cosine; centres are fitted to
    100,000 of them. Always the same for the same posting lists and machine; memory does not grow with them.
    """
    from sklearn.cluster import MiniBatchKMeans

    clusters = min(postings.chunks // _CHUNKS_A_CLUSTER, _MOST_CLUSTERS)
    if clusters < 2:
        return np.arange(postings.chunks, dtype=np.int32)
    idf_V = idf(postings.document_frequency, postings.chunks)
    directions_VR = np.random.default_rng(0).standard_normal((len(idf_V), _PROJECTED), dtype=np.float32)
    directions_VR *= idf_V[:, None]
    sample = np.concatenate([_project(postings, part, directions_VR) for part in _sampled(postings.chunks)])
    kmeans = MiniBatchKMeans(clusters, init="random", batch_size=8192, n_init=1, max_iter=5, random_state=0).fit(sample)
    cluster_C = np.empty(postings.chunks, dtype=np.int32)
    for part in track(list(_parts(postings.chunks, _ROWS)), "Grouping similar passages"):
        cluster_C[part] = kmeans.predict(_project(postings, part, directions_VR))
    return np.argsort(cluster_C, kind="stable").astype(np.int32)


def _project(postings: Postings, part: slice, directions_VR: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return unit vectors of some chunks, zeros for those without terms."""
    projected_CR = np.asarray(postings.rows(part.start, part.stop) @ directions_VR)
    return projected_CR / np.maximum(np.linalg.norm(projected_CR, axis=1, keepdims=True), np.float32(1e-9))


def _sampled(chunks: int) -> Iterator[slice]:
    """Yield evenly spaced parts of about 100,000 chunks together."""
    parts = list(_parts(chunks, 2000))
    wanted = max(1, min(len(parts), _SAMPLE // 2000))
    return (parts[number * len(parts) // wanted] for number in range(wanted))


def _parts(chunks: int, size: int) -> Iterator[slice]:
    return (slice(start, min(start + size, chunks)) for start in range(0, chunks, size))

"""Is Seismic three times as fast as exact posting lists at 0.95 recall@10?

Both engines search the same index in one process, one thread, their queries alternating; recall is measured against the
exact engine, whose code is the one `soju search --engine exact` runs. The corpus is synthetic: Zipf-distributed terms
with topics, BM25 impacts; queries are a few terms of a document with decaying expansions, as a translation table or a
learned sparse encoder gives them.

    python benchmarks/search.py --documents 100000 1000000
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array

from soju.core.files import write_json
from soju.core.records import Document
from soju.search.document_store import DocumentStore
from soju.search.exact import ExactEngine
from soju.search.index import SparseIndex
from soju.search.index_settings import IndexSettings
from soju.search.postings import Postings
from soju.search.seismic_engine import SEISMIC_FILE, SeismicEngine, SeismicSettings
from soju.search.weighting import WeightingSettings

TERMS = 24_000
TOPICS, TOPIC_TERMS = 400, 1500
GENERATED = 5_000
K = 10
GOAL_RATIO, GOAL_RECALL = 3.0, 0.95
RESULTS = Path(__file__).parent / "results"

Query = tuple[NDArray[np.int32], NDArray[np.float32]]


class Corpus:
    """Documents of about 70 tokens: 40 % from a Zipf law over all terms, the rest from one or two of 400 topics."""

    def __init__(self, seed: int) -> None:
        rng = np.random.default_rng(seed)
        self.seed = seed
        share = 1 / np.arange(1, TERMS + 1)
        self.cdf = np.cumsum(share / share.sum())
        topical = np.arange(1, TERMS + 1) ** -0.4
        draw = [rng.choice(TERMS, TOPIC_TERMS, replace=False, p=topical / topical.sum()) for _ in range(TOPICS)]
        self.topics = np.stack(draw).astype(np.int32)
        within = 1 / np.arange(1, TOPIC_TERMS + 1)
        self.topic_cdf = np.cumsum(within / within.sum())
        self.seconds = 0.0
        self._held: tuple[int, csr_array | None] = (-1, None)

    def block(self, number: int) -> tuple[csr_array, NDArray[np.int64]]:
        """Return the term counts and main topics of one block of documents, the same at every call."""
        rng = np.random.default_rng((self.seed, number))
        lengths = np.clip(rng.lognormal(np.log(58), 0.35, GENERATED), 15, 200).astype(np.int64)
        row = np.repeat(np.arange(GENERATED), lengths)
        main, second = rng.integers(0, TOPICS, (2, GENERATED))
        source, place = rng.random((2, len(row)))
        general = np.minimum(np.searchsorted(self.cdf, place), TERMS - 1)
        rank = np.minimum(np.searchsorted(self.topic_cdf, place), TOPIC_TERMS - 1)
        topic = np.where(source < 0.85, main[row], second[row])
        column = np.where(source < 0.4, general, self.topics[topic, rank])
        counts = csr_array((np.ones(len(row), dtype=np.float32), (row, column)), shape=(GENERATED, TERMS))
        counts.sum_duplicates()
        return counts, main

    def documents(self, count: int) -> Iterator[Document]:
        """Yield documents whose text is their number; `encode` turns it into term counts."""
        return (Document(str(number), str(number)) for number in range(count))

    def encode(self, texts: list[str]) -> csr_array:
        """Look the vectors of consecutive documents up; the time spent here is no part of a build."""
        start = time.perf_counter()
        numbers = np.array([int(text) for text in texts])
        number = int(numbers[0]) // GENERATED
        if self._held[0] != number:
            self._held = number, self.block(number)[0]
        assert self._held[1] is not None
        rows = self._held[1][numbers - number * GENERATED]
        self.seconds += time.perf_counter() - start
        return rows

    def queries(self, count: int, documents: int, idf_V: NDArray[np.float32]) -> list[Query]:
        """Draw 3 to 7 informative terms of a random document, each with 4 to 6 expansions of decaying weight."""
        rng = np.random.default_rng((self.seed, 1, documents))
        queries = []
        for _ in range(count):
            block = self.block(int(rng.integers(documents // GENERATED)))
            row = int(rng.integers(GENERATED))
            held = block[0].indices[block[0].indptr[row] : block[0].indptr[row + 1]]
            size = min(len(held), int(rng.integers(3, 8)))
            weights: dict[int, float] = {}
            for term in rng.choice(held, size, replace=False, p=idf_V[held] / idf_V[held].sum()):
                weights[int(term)] = weights.get(int(term), 0.0) + 1.0
                for step in range(int(rng.integers(4, 7))):
                    if rng.random() < 0.7:
                        other = self.topics[block[1][row], np.searchsorted(self.topic_cdf, rng.random())]
                    else:
                        other = np.searchsorted(self.cdf, rng.random())
                    weights[int(other)] = weights.get(int(other), 0.0) + 0.6 * 0.7**step
            terms = np.array(sorted(weights), dtype=np.int32)
            values = np.array([weights[int(term)] for term in terms], dtype=np.float32)
            queries.append((terms, values * idf_V[terms]))
        return queries


def latencies(engine: Any, queries: list[Query]) -> tuple[list[float], list[set[int]]]:
    """Return milliseconds and found chunks of each query."""
    times, found = [], []
    for terms, weights in queries:
        start = time.perf_counter()
        chunks, _ = engine.search(terms, weights, K)
        times.append((time.perf_counter() - start) * 1e3)
        found.append(set(chunks.tolist()))
    return times, found


def peak_mib() -> float:
    """Return the peak resident memory of this process."""
    status = Path("/proc/self/status")
    if status.is_file():  # ru_maxrss of a child starts at its parent's size
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def search_peak_mib(index: Path, engine: str) -> float:
    """Measure the peak memory of a process of its own that opens an index and runs the queries with one engine."""
    command = [sys.executable, __file__, "--probe", engine, str(index)]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def probe(engine: str, index: Path) -> None:
    """Run as the child of `search_peak_mib`; the exact engine's child does not load the Seismic file."""
    folder = index / "segments" / "0000"
    saved = np.load(index.parent / "queries.npz")
    queries = [(saved[f"terms{i}"], saved[f"weights{i}"]) for i in range(len(saved.files) // 2)]
    store = DocumentStore.open(folder)
    chosen: Any
    if engine == "seismic":
        chosen = SeismicEngine.open(folder, store.documents, SeismicSettings(), terms=TERMS)
    else:
        chosen = ExactEngine(Postings.open(folder / "postings", chunks=len(store.documents)), store.documents)
    latencies(chosen, queries)
    print(peak_mib())


def save_queries(path: Path, queries: list[Query]) -> None:
    """Write queries where `probe` reads them."""
    arrays = {f"terms{i}": terms for i, (terms, _) in enumerate(queries)}
    np.savez(path, allow_pickle=False, **arrays, **{f"weights{i}": weights for i, (_, weights) in enumerate(queries)})


def measure(documents: int, *, query_count: int, repetitions: int, seed: int, folder: Path) -> dict[str, Any]:
    """Build both engines on one corpus and measure them."""
    corpus = Corpus(seed)
    # Chunks to encode come in blocks of the generator, so that each is drawn once.
    settings = IndexSettings(weighting=WeightingSettings(kind="bm25"), engine="exact", batch_size=1000)
    start = time.perf_counter()
    index = SparseIndex.build(
        folder, corpus.documents(documents), corpus.encode, [str(i) for i in range(TERMS)], settings
    )
    exact_build = time.perf_counter() - start - corpus.seconds
    exact_build_peak = peak_mib()
    segment = index.segments[0]
    exact_bytes = sum(path.stat().st_size for path in (segment.folder / "postings").iterdir())
    start = time.perf_counter()
    SeismicEngine.build(segment.folder, segment.postings, segment.store.documents, settings.seismic)
    seismic_build = time.perf_counter() - start
    build_peak = peak_mib()
    seismic = SeismicEngine.open(segment.folder, segment.store.documents, settings.seismic, terms=TERMS)
    frequency = segment.postings.document_frequency
    idf_V = np.log1p((documents - frequency + 0.5) / (frequency + 0.5)).astype(np.float32)
    queries = corpus.queries(query_count, documents, idf_V)
    save_queries(folder.parent / "queries.npz", queries)
    runs: dict[str, list[list[float]]] = {"exact": [], "seismic": []}
    _, truth = latencies(segment.exact, queries)  # warms both up, too
    _, found = latencies(seismic, queries)
    for _ in range(repetitions):
        for engine in (segment.exact, seismic):
            runs[engine.name].append(latencies(engine, queries)[0])
    recall = float(np.mean([len(a & b) / max(1, len(a)) for a, b in zip(truth, found, strict=True)]))
    return {
        "documents": documents,
        "terms": TERMS,
        "postings": segment.entry.postings,
        "terms_per_document": segment.entry.postings / documents,
        "queries": query_count,
        "terms_per_query": float(np.mean([len(terms) for terms, _ in queries])),
        "postings_per_query": float(np.mean([frequency[terms].sum() for terms, _ in queries])),
        "repetitions": repetitions,
        "recall@10": recall,
        "settings": settings.seismic.for_chunks(documents).model_dump(),
        "exact": {
            **_summary(runs["exact"]),
            "build_seconds": exact_build,
            "bytes": exact_bytes,
            "build_peak_mib": exact_build_peak,
            "search_peak_mib": search_peak_mib(folder, "exact"),
        },
        "seismic": {
            **_summary(runs["seismic"]),
            "build_seconds": seismic_build,
            "bytes": (segment.folder / SEISMIC_FILE).stat().st_size,
            "build_peak_mib": build_peak,
            "search_peak_mib": search_peak_mib(folder, "seismic"),
        },
    }


def _summary(runs: list[list[float]]) -> dict[str, float]:
    """Return medians over repetitions, in milliseconds."""
    return {f"p{level}_ms": float(np.median([np.percentile(run, level) for run in runs])) for level in (50, 99)}


def claims(result: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the lines that `make bench` reads."""
    name = f"search.{result['documents']}"
    recall, seismic, exact = result["recall@10"], result["seismic"]["p50_ms"], result["exact"]["p50_ms"]
    faster = "p50 latency, ms (ours Seismic, peer exact; ratio = times faster)"
    measured = [
        (faster, seismic, exact, exact / seismic, GOAL_RATIO),
        ("recall@10 of Seismic against exact", recall, 1.0, recall, GOAL_RECALL),
    ]
    return [
        {
            "benchmark": name,
            "metric": metric,
            "ours": round(ours, 4),
            "peer": round(peer, 4),
            "ratio": round(ratio, 3),
            "goal": f">= {goal:g}",
            "holds": ratio >= goal,
        }
        for metric, ours, peer, ratio, goal in measured
    ]


def machine() -> dict[str, Any]:
    """Describe the processor and the versions."""
    cpu = Path("/proc/cpuinfo")
    models = [line.split(":", 1)[1].strip() for line in cpu.read_text().splitlines() if line.startswith("model name")]
    packages = ("numpy", "scipy", "numba", "pyseismic-lsr")
    return {
        "cpu": models[0] if models else platform.machine(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        **{package: importlib.metadata.version(package) for package in packages},
    }


def main() -> None:
    """Measure each size and print the claims."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--documents", type=int, nargs="+", default=[100_000, 1_000_000], help="multiples of 5000")
    parser.add_argument("--queries", type=int, default=200)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--seed", type=int, default=11)  # Seismic was tuned on 7
    parser.add_argument("--probe", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.probe:
        probe(arguments.probe[0], Path(arguments.probe[1]))
        return
    if any(size % GENERATED or size <= 0 for size in arguments.documents):
        parser.error(f"--documents must be multiples of {GENERATED}")
    results = []
    for size in arguments.documents:
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary) / "index"
            counts = {"query_count": arguments.queries, "repetitions": arguments.repetitions}
            result = measure(size, **counts, seed=arguments.seed, folder=folder)
            print(json.dumps(result), flush=True)
            results.append(result)
    report = {
        "machine": machine(),
        "results": results,
        "claims": [line for result in results for line in claims(result)],
    }
    write_json(RESULTS / "search.json", report)
    for line in report["claims"]:
        print(json.dumps(line))


if __name__ == "__main__":
    main()

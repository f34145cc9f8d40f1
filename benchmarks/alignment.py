"""Word alignment against the compiled aligner one can install: speed, quality, and cost by the number of token pairs.

Peers, as far as the package index has them: nltk's IBM Model 1 (pure Python) and eflomal 2 (C, Gibbs sampling of
Model 1, HMM and fertility; its default settings). Bindings of fast_align are not on the index; simalign aligns with a
neural encoder instead of learning from the bitext, so it is not compared.

Data: ``parallel.train.tsv.gz`` as lower-cased words. Quality is dictionary recovery, which needs no gold alignments:
for one-word heads of ``terms.jsonl.gz`` (never trained on here) that stand in the bitext at least three times, with an
English word that does, too, is the best (one of the five best) translations an English word of the entry? Timings start
from packed ids on our side and from eflomal's id files on its side; claims are about processor seconds, which a busy
neighbour disturbs less, wall seconds stand beside them. nltk counts a word that repeats in a sentence otherwise than
the paper, so its pairs have no repeats, and the tables are equal. For scaling, pairs are drawn with replacement, a
tenth of their tokens left out and one in 500 replaced by a new word.

    pip install 'soju[bench]'
    python benchmarks/alignment.py --data ../shared/data
"""

from __future__ import annotations

import argparse
import gzip
import importlib.metadata
import itertools
import json
import os
import platform
import re
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import eflomal.cython
import numpy as np
from matplotlib.figure import Figure
from nltk.translate import AlignedSent, IBMModel1
from numpy.typing import NDArray
from scipy.sparse import csr_array

from soju.alignment.bitext import Bitext, average, make_bitext
from soju.alignment.ibm1 import TranslationTable, train_ibm1
from soju.core.files import write_json

WORD = re.compile(r"\w+")
ITERATIONS, SEEN = 5, 3
NLTK_PAIRS, NLTK_ITERATIONS = 1500, 3
SIZES = (31_250, 62_500, 125_000, 250_000, 500_000, 1_000_000)
RESULTS = Path(__file__).parent / "results"

Sentences = list[NDArray[np.int32]]


@dataclass(frozen=True, slots=True)
class Corpus:
    """Word ids from 1 of both sides and the dictionary to recover."""

    korean: Sentences
    english: Sentences
    bitext: Bitext
    gold: dict[int, set[int]]


def read_corpus(data: Path, limit: int | None) -> Corpus:
    """Read sentence pairs, at most `limit`, and the entries whose words occur often enough in them."""
    with gzip.open(data / "parallel.train.tsv.gz", "rt", encoding="utf-8") as file:
        lines = itertools.islice(file, limit)
        pairs = [tuple(WORD.findall(side.lower()) for side in line.split("\t")) for line in lines]
    vocabularies: tuple[dict[str, int], dict[str, int]] = ({}, {})
    korean, english = (
        [np.array([ids.setdefault(word, len(ids) + 1) for word in pair[side]], np.int32) for pair in pairs if all(pair)]
        for side, ids in enumerate(vocabularies)
    )
    bitext = to_bitext(korean, english)
    korean_counts, english_counts = np.bincount(bitext.source_N), np.bincount(bitext.target_M)
    gold: dict[int, set[int]] = {}
    with gzip.open(data / "terms.jsonl.gz", "rt", encoding="utf-8") as file:
        for row in map(json.loads, file):
            head = vocabularies[0].get(row["ko"].lower(), 0)
            words = {vocabularies[1].get(term["term"].lower(), 0) for term in row["terms"]}
            common = {word for word in words if word and english_counts[word] >= SEEN}
            if head and korean_counts[head] >= SEEN and common:
                gold.setdefault(head, set()).update(common)
    return Corpus(korean, english, bitext, gold)


def to_bitext(korean: Sentences, english: Sentences) -> Bitext:
    """Pack sentences of ids from 1."""
    rows = ((k, e, 1.0) for k, e in zip(korean, english, strict=True))
    sizes = [max(int(sentence.max(initial=0)) for sentence in side) + 1 for side in (korean, english)]
    return make_bitext(rows, source_size=sizes[0], target_size=sizes[1])


def recovery(table: csr_array, gold: dict[int, set[int]]) -> dict[str, float]:
    """Return precision at 1 and at 5 of the rows of a ``(Korean, English)`` table."""
    hits = np.zeros(2)
    for head, words in gold.items():
        row = slice(table.indptr[head], table.indptr[head + 1])
        best = table.indices[row][np.lexsort((table.indices[row], -table.data[row]))[:5]].tolist()
        hits += [bool(words.intersection(best[:1])), bool(words.intersection(best))]
    return dict(zip(("p@1", "p@5"), (hits / len(gold)).tolist(), strict=True))


def clocks() -> NDArray[np.float64]:
    """Read the wall clock and the processor time of this process and its finished children, in seconds."""
    children = os.times()
    return np.array([time.perf_counter(), time.process_time() + children.children_user + children.children_system])


def timed(run: Callable[[], Any]) -> tuple[NDArray[np.float64], Any]:
    """Return wall and processor seconds, and the result."""
    before = clocks()
    result = run()
    return clocks() - before, result


def train_both(bitext: Bitext, threads: int) -> tuple[TranslationTable, TranslationTable]:
    """Model 1 in both directions, which is all that a recipe uses."""
    with ThreadPoolExecutor(threads) as pool:
        ahead, back = pool.map(lambda it: train_ibm1(it, iterations=ITERATIONS), (bitext, bitext.reversed()))
    return ahead, back


def compare_nltk(corpus: Corpus, repeats: int) -> dict[str, Any]:
    """Time Model 1 of both on the same few pairs, set-up included, and compare the tables."""
    simple = (pair for pair in zip(corpus.korean, corpus.english, strict=True) if len(set(pair[1])) == len(pair[1]))
    korean, english = map(list, zip(*itertools.islice(simple, NLTK_PAIRS), strict=True))
    bitext = to_bitext(korean, english)
    ours, theirs = [], []
    for _ in range(repeats):
        ours.append(timed(lambda: train_ibm1(bitext, iterations=NLTK_ITERATIONS)))
        pairs = [AlignedSent(e.tolist(), k.tolist()) for k, e in zip(korean, english, strict=True)]
        theirs.append(timed(lambda pairs=pairs: IBMModel1(pairs, NLTK_ITERATIONS).translation_table))
    table, their_table = ours[0][1].to_csr(), theirs[0][1]
    some = [(int(k), int(e)) for i in range(50) for k in korean[i] for e in english[i]]
    differences = [abs(table[k, e] - their_table[e][k]) for k, e in some]
    result = {"pairs": len(bitext), "token_pairs": bitext.token_pairs, "largest_difference": float(max(differences))}
    for name, runs in (("ours", ours), ("nltk", theirs)):
        seconds = float(np.median([clock[1] for clock, _ in runs]))
        result[f"{name}_seconds_per_million"] = seconds / NLTK_ITERATIONS / bitext.token_pairs * 1e6
    return result


class Eflomal:
    """eflomal at its defaults on prepared id files."""

    def __init__(self, corpus: Corpus, folder: Path) -> None:
        self.corpus, self.folder = corpus, folder
        self.aligner = eflomal.Aligner()
        texts = [[" ".join(map(str, sentence)) + "\n" for sentence in side] for side in (corpus.korean, corpus.english)]
        with (folder / "ko").open("wb") as korean, (folder / "en").open("wb") as english:
            self.aligner.prepare_files(texts[0], korean, texts[1], english, None, None)

    def run(self, threads: int) -> None:
        """Align both directions into link files."""
        os.environ["OMP_NUM_THREADS"] = str(threads)
        names = ("model", "score_model", "n_iterations", "n_samplers", "rel_iterations", "null_prior")
        settings = {name: getattr(self.aligner, name) for name in names}
        korean, english, forward, reverse = (str(self.folder / name) for name in ("ko", "en", "fwd", "rev"))
        links = {"links_filename_fwd": forward, "links_filename_rev": reverse}
        eflomal.cython.align(korean, english, quiet=True, **links, **settings)

    def tables(self) -> dict[str, csr_array]:
        """Count the links: forward, reverse, and those of both."""
        counts: dict[str, dict[tuple[int, int], int]] = {name: defaultdict(int) for name in ("fwd", "rev", "both")}
        with (self.folder / "fwd").open() as forward, (self.folder / "rev").open() as reverse:
            for k, e, *lines in zip(self.corpus.korean, self.corpus.english, forward, reverse, strict=True):
                links = dict(zip(("fwd", "rev"), (set(line.split()) for line in lines), strict=True))
                for name, chosen in (*links.items(), ("both", links["fwd"] & links["rev"])):
                    for i, j in (map(int, link.split("-")) for link in chosen):
                        counts[name][int(k[i]), int(e[j])] += 1
        shape = (self.corpus.bitext.source_size, self.corpus.bitext.target_size)
        cells = {name: (list(count.values()), tuple(zip(*count, strict=True))) for name, count in counts.items()}
        return {name: csr_array(cell, shape=shape, dtype=np.float32) for name, cell in cells.items()}


def compare_eflomal(corpus: Corpus, repeats: int) -> dict[str, Any]:
    """Time full trainings in turn, one thread each, then both with two; score the tables."""
    seconds = defaultdict(list)
    with tempfile.TemporaryDirectory() as folder:
        peer = Eflomal(corpus, Path(folder))
        for _ in range(repeats):
            seconds["eflomal"].append(timed(lambda: peer.run(1))[0])
            elapsed, (ahead, back) = timed(lambda: train_both(corpus.bitext, 1))
            seconds["ours"].append(elapsed)
        seconds["eflomal_two_threads"].append(timed(lambda: peer.run(2))[0])
        seconds["ours_two_threads"].append(timed(lambda: train_both(corpus.bitext, 2))[0])
        tables = {f"eflomal {name} links": table for name, table in peer.tables().items()}
    first, second = ahead.to_csr(), back.to_csr()
    tables |= {"ours one direction": first, "ours average": average(first, second)}
    return {
        "pairs": len(corpus.bitext),
        "entries": len(corpus.gold),
        "wall and processor seconds": {name: np.median(values, axis=0).tolist() for name, values in seconds.items()},
        "all seconds": {name: np.array(values).tolist() for name, values in seconds.items()},
        "recovery": {name: recovery(table, corpus.gold) for name, table in tables.items()},
    }


def resample(bitext: Bitext, pairs: int, random: np.random.Generator) -> Bitext:
    """Draw pairs with replacement, drop a tenth of the tokens, replace one in 500 by a new word."""
    chosen = random.integers(0, len(bitext), pairs)

    def side(ids: NDArray[np.int32], offsets: NDArray[np.int64]) -> Sentences:
        lengths = np.diff(offsets)[chosen]
        ends = np.cumsum(lengths)
        tokens = ids[np.arange(ends[-1]) + np.repeat(offsets[chosen] - ends + lengths, lengths)]
        new = random.random(len(tokens)) < 0.002
        tokens[new] = ids.max() + 1 + np.arange(new.sum())
        kept = random.random(len(tokens)) < 0.9
        return np.split(tokens[kept], np.cumsum(kept)[ends[:-1] - 1])

    back = bitext.reversed()  # Its target side is our source side without NULL.
    return to_bitext(side(back.target_M, back.target_offsets), side(bitext.target_M, bitext.target_offsets))


def scaling(bitext: Bitext, sizes: Sequence[int]) -> list[dict[str, float]]:
    """Time rounds of Model 1 on growing bitexts."""
    rows = []
    for size in sizes:
        larger = resample(bitext, size, np.random.default_rng(size))
        ticks: list[NDArray[np.float64]] = []
        train_ibm1(larger, iterations=4, on_iteration=lambda *_, ticks=ticks: ticks.append(clocks()))
        wall, processor = np.median(np.diff(ticks, axis=0), axis=0).tolist()
        row = {"pairs": size, "token_pairs": larger.token_pairs, "wall_seconds": wall, "processor_seconds": processor}
        row["processor_nanoseconds_per_token_pair"] = processor / larger.token_pairs * 1e9
        print("  ".join(f"{name} {value:,.2f}" for name, value in row.items()), flush=True)
        rows.append(row)
    return rows


def draw(rows: list[dict[str, float]], path: Path) -> None:
    """Plot seconds per round against token pairs, with the line of constant cost per token pair."""
    axes = Figure(figsize=(6, 4), layout="constrained").subplots()
    x, y = np.array([[row["token_pairs"] / 1e6, row["processor_seconds"]] for row in rows]).T
    axes.loglog(x, y, "o-", label="one round of Model 1, one thread")
    axes.loglog(x, x * np.median(y / x), "--", label="linear")
    axes.set(xlabel="token pairs (million)", ylabel="processor seconds")
    axes.legend()
    axes.figure.savefig(path, dpi=150)


def machine() -> dict[str, Any]:
    """Describe processor, load and versions."""
    info = Path("/proc/cpuinfo")
    cpu = re.search(r"model name\s*:\s*(.*)", info.read_text()) if info.exists() else None
    packages = ("soju", "numpy", "numba", "scipy", "nltk", "eflomal")
    versions = {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in packages}
    return {"cpu": cpu and cpu[1], "cores": os.cpu_count(), "load_average": os.getloadavg()[0], "versions": versions}


def claim(metric: str, ours: float, peer: float, ratio: float, goal: float, *, at_most: bool = False) -> dict[str, Any]:
    """Return one result; it holds when the ratio is at least the goal (at most, where said)."""
    values = {"ours": round(ours, 5), "peer": round(peer, 5), "ratio": round(ratio, 3), "goal": goal}
    holds = bool(ratio <= goal if at_most else ratio >= goal)
    return {"benchmark": "alignment", "metric": metric, **values, "holds": holds}


def main() -> None:
    """Run all parts and print one claim a line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--repeats", type=int, default=3, help="full trainings; the nltk comparison takes two more")
    parser.add_argument("--pairs", type=int, default=10_000, help="sentence pairs of the eflomal comparison")
    parser.add_argument("--sizes", type=int, nargs="*", default=SIZES, help="sentence pairs of the scaling curve")
    arguments = parser.parse_args()
    corpus, whole = read_corpus(arguments.data, arguments.pairs), read_corpus(arguments.data, None)
    print(
        f"{len(corpus.bitext):,} pairs, {corpus.bitext.token_pairs:,} token pairs, {len(corpus.gold):,} entries",
        flush=True,
    )
    train_both(to_bitext(corpus.korean[:200], corpus.english[:200]), 1)  # Compile before anything is timed.
    result: dict[str, Any] = {"machine": machine(), "nltk": compare_nltk(corpus, arguments.repeats + 2)}
    print(json.dumps(result["nltk"]), flush=True)
    result["eflomal"] = compare_eflomal(corpus, arguments.repeats)
    for part in ("wall and processor seconds", "recovery"):
        for name, value in result["eflomal"][part].items():
            print(f"{part:28}{name:36}{value}", flush=True)
    result["scaling"] = scaling(whole.bitext, arguments.sizes)
    RESULTS.mkdir(exist_ok=True)
    draw(result["scaling"], RESULTS / "alignment_scaling.png")
    result["claims"] = list(claims(result))
    write_json(RESULTS / "alignment.json", result)
    for item in result["claims"]:
        print(json.dumps(item))


def claims(result: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield what the figures say about each goal."""
    ours, peer = (result["nltk"][f"{name}_seconds_per_million"] for name in ("ours", "nltk"))
    yield claim("Model 1, processor seconds per round and million token pairs, vs nltk", ours, peer, peer / ours, 5.0)
    full, scores = result["eflomal"]["wall and processor seconds"], result["eflomal"]["recovery"]
    ours, peer = full["ours"][1], full["eflomal"][1]
    yield claim("both directions, one thread, processor seconds, vs eflomal", ours, peer, peer / ours, 0.5)
    for metric in ("p@1", "p@5"):
        ours = scores["ours average"][metric]
        peer = max(value[metric] for name, value in scores.items() if name.startswith("eflomal"))
        yield claim(f"dictionary recovery {metric}, vs eflomal's best", ours, peer, ours / peer, 1.0)
    logs = np.log([[row["token_pairs"], row["processor_seconds"]] for row in result["scaling"]])
    slope = float(np.polyfit(logs[:, 0], logs[:, 1], 1)[0])
    yield claim("exponent of processor seconds in token pairs, vs linear", slope, 1.0, slope, 1.1, at_most=True)


if __name__ == "__main__":
    main()

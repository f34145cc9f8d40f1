"""68,029 Korean tokens enter a vocabulary of 151,669: in how many seconds, and how fast it is afterwards.

The base has Qwen's layout: 151,643 byte-level tokens, 26 added tokens behind them, Qwen's pre-tokenizer. Its first
40,000 tokens are trained on English and source code; the others are made of random pairs of its Latin tokens, seed 0.
The donor is trained on Korean text; if it gives fewer candidates than asked for, random pairs of its Korean tokens are
appended as well. `added tokens` is the base with the same tokens added by ``add_tokens``: matched before BPE.
One Korean text in 200 is held out. Timings alternate in one process and one thread; ratios are medians of pairs.

    python benchmarks/tokenizer_expansion.py [--data ../shared/data]
"""

from __future__ import annotations

import argparse
import gzip
import importlib.metadata
import json
import os
import platform
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from soju.core.files import write_json
from soju.core.language import is_hangul
from soju.embedding.expansion.byte_bpe import ByteBpe, token_text
from soju.embedding.expansion.certificate import certify
from soju.embedding.expansion.difference import find_candidates
from soju.embedding.expansion.merges import (
    Expansion,
    expand_by_added_tokens,
    expand_by_merges,
    expanded_spec,
    write_tokenizer,
)
from soju.embedding.scratch_base import PLAIN, PRE_TOKENIZER, SPECIALS

RESULTS = Path(__file__).parent / "results"
BASE_TOKENS, CANDIDATES = 151_643, 68_029
TRAINED, DONOR_TRAINED = 40_000, 76_000
KOREAN_TRAINED = 200_000
GOAL_SECONDS, GOAL_SPEED, GOAL_TOKENS = 30.0, 0.95, 1.03


def lines(path: Path) -> Iterable[str]:
    """Yield the lines of a gzip file."""
    with gzip.open(path, "rt", encoding="utf-8") as file:
        for line in file:
            yield line.rstrip("\n")


def source_code() -> list[str]:
    """Return this repository's Python files."""
    root = Path(__file__).resolve().parents[1]
    return [path.read_text(encoding="utf-8") for path in sorted((root / "src").rglob("*.py"))]


def train(texts: Iterable[str], size: int) -> dict[str, Any]:
    """Train a byte-level BPE; return its ``tokenizer.json``."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PRE_TOKENIZER), behavior="isolated", invert=False),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    return json.loads(tokenizer.to_str())


def fill(spec: dict[str, Any], size: int, wanted: Callable[[str], bool], seed: int = 0) -> int:
    """Append random merges of wanted tokens until the vocabulary has `size`; return how many."""
    vocabulary, merges = spec["model"]["vocab"], spec["model"]["merges"]
    parts = [token for token in vocabulary if len(token) <= 12 and wanted(token)]
    drawn, added = random.Random(seed), 0
    while len(vocabulary) < size:
        left, right = drawn.choice(parts), drawn.choice(parts)
        if left + right not in vocabulary and not right.startswith("Ġ"):
            vocabulary[left + right] = len(vocabulary)
            merges.append([left, right])
            added += 1
    return added


def add_specials(spec: dict[str, Any]) -> None:
    """Put Qwen's added tokens behind the vocabulary."""
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    first = len(spec["model"]["vocab"])
    spec["added_tokens"] = [
        {"id": first + place, "content": content, **flags, "special": content in SPECIALS}
        for place, content in enumerate([*SPECIALS, *PLAIN])
    ]


def is_latin_word(token: str) -> bool:
    """Tell whether a token is ASCII letters, perhaps after a space."""
    return token.removeprefix("Ġ").isascii() and token.removeprefix("Ġ").isalpha()


def is_korean_word(token: str) -> bool:
    """Tell whether a token is Hangul only, perhaps after a space."""
    text = (token_text(token) or "").removeprefix(" ")
    return bool(text) and all(map(is_hangul, text))


def seconds(work: Callable[[], Any]) -> float:
    """Return how long it took."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def encode(tokenizer: Tokenizer, texts: Sequence[str]) -> None:
    """Encode one after another."""
    for text in texts:
        tokenizer.encode(text)


def alternate(works: dict[str, Callable[[], Any]], repetitions: int) -> dict[str, list[float]]:
    """Time works in turn."""
    taken: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(repetitions):
        for name, work in works.items():
            taken[name].append(seconds(work))
    return taken


def ratio(taken: dict[str, list[float]], peer: str, own: str) -> float:
    """Return how many times faster `own` is than `peer`: the median of pairs."""
    return statistics.median(theirs / ours for theirs, ours in zip(taken[peer], taken[own], strict=True))


def claim(metric: str, ours: float, peer: float, found: float, goal: str, holds: bool) -> dict[str, Any]:
    """Return a line that `make bench` reads."""
    numbers = {"ours": round(ours, 4), "peer": round(peer, 4), "ratio": round(found, 4)}
    return {"benchmark": "tokenizer_expansion", "metric": metric, **numbers, "goal": goal, "holds": holds}


def tokenizers_of(data: Path) -> tuple[ByteBpe, ByteBpe, list[str], list[str], dict[str, int]]:
    """Return base, donor, held-out Korean, English to encode, and how much of both is synthetic."""
    korean = list(lines(data / "ko.txt.gz"))
    english = [line.split("\t")[1] for line in lines(data / "parallel.train.tsv.gz")]
    held_out = korean[::200]
    trained = [text for place, text in enumerate(korean) if place % 200][:: max(1, len(korean) // KOREAN_TRAINED)]
    base = train([*english, *source_code()], TRAINED)
    donor = train(trained, DONOR_TRAINED)
    filled = {"base": fill(base, BASE_TOKENS, is_latin_word), "donor": 0}
    add_specials(base)
    found = ByteBpe.from_spec(base, name="synthetic base")
    missing = CANDIDATES - len(find_candidates(found, ByteBpe.from_spec(donor, name="donor")).candidates)
    if missing > 0:
        filled["donor"] = fill(donor, len(donor["model"]["vocab"]) + missing, is_korean_word)
    return found, ByteBpe.from_spec(donor, name="donor"), held_out, english[::60], filled


def main() -> None:
    """Measure and print the claims."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--repetitions", type=int, default=10)
    arguments = parser.parse_args()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    base, donor, korean, english, filled = tokenizers_of(arguments.data)
    start, processor = time.perf_counter(), time.process_time()
    candidates = find_candidates(base, donor).candidates[:CANDIDATES]
    expansion = expand_by_merges(base, candidates)
    spent, worked = time.perf_counter() - start, time.process_time() - processor
    certified, checks = certify_saved(base, expansion, korean)
    specs = {
        "base": json.dumps(base.spec),
        "merges": json.dumps(expanded_spec(base, expansion)),
        "added tokens": json.dumps(expanded_spec(base, expand_by_added_tokens(base, candidates))),
    }
    result = measure(base, donor, expansion, specs, korean, english, arguments.repetitions)
    result |= {
        "seconds": spent,
        "processor_seconds": worked,
        "certificate_seconds": certified,
        "certificate_failed": checks,
        "candidates": len(candidates),
        "new_tokens": len(expansion.tokens),
    }
    result |= {"left_out": len(expansion.unreachable), "synthetic_merges": filled, "sizes": [base.size, expansion.size]}
    report = {"machine": machine(), "result": result, "claims": claims(result)}
    write_json(RESULTS / "tokenizer_expansion.json", report)
    print(json.dumps(result))
    for line in report["claims"]:
        print(json.dumps(line))


def certify_saved(base: ByteBpe, expansion: Expansion, korean: Sequence[str]) -> tuple[float, list[str]]:
    """Return the seconds that saving and certifying take, after loading again, and the checks that failed."""
    with tempfile.TemporaryDirectory() as folder:
        old, new = Path(folder) / "base", Path(folder) / "expanded"
        write_json(old / "tokenizer.json", base.spec)
        names = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": SPECIALS[0], "pad_token": SPECIALS[0]}
        write_json(old / "tokenizer_config.json", names)
        loaded = ByteBpe.load(str(old))
        start = time.perf_counter()
        write_tokenizer(loaded, expansion, new)
        certificate = certify(loaded, expansion, new, texts={"ko": korean}, speed=False)
        return time.perf_counter() - start, [check.name for check in certificate.checks if not check.passed]


def measure(
    base: ByteBpe,
    donor: ByteBpe,
    expansion: Expansion,
    specs: dict[str, str],
    korean: list[str],
    english: list[str],
    repetitions: int,
) -> dict[str, Any]:
    """Load, encode and count."""
    loading = alternate({name: lambda s=spec: Tokenizer.from_str(s) for name, spec in specs.items()}, repetitions)
    loaded = {name: Tokenizer.from_str(spec) for name, spec in specs.items()}
    encoding = {
        language: alternate({name: lambda t=t, x=texts: encode(t, x) for name, t in loaded.items()}, repetitions)
        for language, texts in (("ko", korean), ("en", english))
    }
    expanded = ByteBpe.from_spec(json.loads(specs["merges"]), name="expanded")
    old, new = list(base.encode(korean)), list(expanded.encode(korean))
    assert [expansion.collapse(ids) for ids in new] == old
    assert list(expanded.encode(english)) == list(base.encode(english))
    counts = {"base": old, "expanded": new, "donor": list(donor.encode(korean))}
    return {
        "loading": loading,
        "encoding": encoding,
        "korean_tokens_per_text": {name: sum(map(len, ids)) / len(korean) for name, ids in counts.items()},
        "characters": {"ko": sum(map(len, korean)), "en": sum(map(len, english))},
    }


def claims(result: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the lines that `make bench` reads; those without a goal say how added tokens compare."""
    found = [
        claim(
            f"seconds for {result['candidates']:,} candidates, peer: the goal", result["seconds"], GOAL_SECONDS,
            result["seconds"] / GOAL_SECONDS, f"<= {GOAL_SECONDS:g} s", result["seconds"] <= GOAL_SECONDS,
        )
    ]  # fmt: skip
    whole, passed = result["seconds"] + result["certificate_seconds"], not result["certificate_failed"]
    metric = "seconds with saving, loading again and a certificate that passes, peer: the goal"
    goal = f"<= {GOAL_SECONDS:g} s"
    holds = passed and whole <= GOAL_SECONDS
    found.append(claim(metric, whole, GOAL_SECONDS, whole / GOAL_SECONDS, goal, holds))
    for language, taken in result["encoding"].items():
        speed = {name: result["characters"][language] / statistics.median(times) for name, times in taken.items()}
        for peer, goal in (("base", GOAL_SPEED), ("added tokens", 1.0)):
            times = ratio(taken, peer, "merges")
            metric = f"characters a second, {language}, peer: {peer}"
            found.append(claim(metric, speed["merges"], speed[peer], times, f">= {goal:g}", times >= goal))
    loading, times = result["loading"], ratio(result["loading"], "added tokens", "merges")
    median = {name: statistics.median(taken) for name, taken in loading.items()}
    metric = "seconds to load (ratio = times faster), peer: added tokens"
    found.append(claim(metric, median["merges"], median["added tokens"], times, ">= 1", times >= 1))
    tokens = result["korean_tokens_per_text"]
    share = tokens["expanded"] / tokens["donor"]
    metric = "tokens of a held-out Korean text, peer: the donor"
    found.append(claim(metric, tokens["expanded"], tokens["donor"], share, f"<= {GOAL_TOKENS:g}", share <= GOAL_TOKENS))
    return found


def machine() -> dict[str, Any]:
    """Describe the processor and the versions."""
    cpu = Path("/proc/cpuinfo")
    names = [line.split(":", 1)[1].strip() for line in cpu.read_text().splitlines() if line.startswith("model name")]
    return {
        "cpu": names[0] if names else platform.machine(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "tokenizers": importlib.metadata.version("tokenizers"),
    }


if __name__ == "__main__":
    main()

"""`encode_sparse` against sentence-transformers: texts a second, goal 1.5 times as many, and equal vectors.

Both encode the same sentences with the same model, a masked language model of 6 layers and width 384 with random
weights, whose bias leaves about 200 active terms a text. The peer is `SparseEncoder.encode` with sparse tensors on the
folder that our encoder saved. Both batch by 32; timings alternate in one process.

    python benchmarks/encode.py [--data ../shared/data]
"""

from __future__ import annotations

import argparse
import gzip
import importlib.metadata
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.sparse import csr_array
from sentence_transformers import SparseEncoder
from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import Metaspace
from tokenizers.processors import TemplateProcessing
from tokenizers.trainers import BpeTrainer
from transformers import PreTrainedTokenizerFast, XLMRobertaConfig, XLMRobertaForMaskedLM

from soju.core.files import write_json
from soju.sparse.splade import SpladeEncoder

RESULTS = Path(__file__).parent / "results"
WIDTH, LAYERS, LENGTH, BATCH = 384, 6, 64, 32
ACTIVE_TERMS = 200
TEXTS = {32_000: 1024, 250_002: 256}
GOAL_SPEED, GOAL_DIFFERENCE = 1.5, 1e-4


def sentences(data: Path, count: int) -> list[str]:
    """Return Korean and English sentences in turn; without the development data, words of about the same lengths."""
    path = data / "parallel.dev.tsv.gz"
    if path.exists():
        with gzip.open(path, "rt", encoding="utf-8") as lines:
            return [sentence for line in lines for sentence in line.rstrip("\n").split("\t")][:count]
    rng = np.random.default_rng(0)
    words = ["검색", "엔진은", "문서를", "빠르게", "찾는다", "search", "engines", "find", "documents", "quickly"]
    return [" ".join(rng.choice(words, max(2, int(rng.lognormal(2.2, 0.6))))) for _ in range(count)]


def build(terms: int, texts: list[str]) -> SpladeEncoder:
    """Build the model, with a tokenizer trained on the texts, and set its bias."""
    backend = Tokenizer(BPE(unk_token="<unk>"))
    backend.pre_tokenizer = Metaspace()
    names = {"pad_token": "<pad>", "unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    trainer = BpeTrainer(vocab_size=16_000, special_tokens=list(names.values()), show_progress=False)
    backend.train_from_iterator(texts, trainer)
    special = [(token, backend.token_to_id(token)) for token in ("<s>", "</s>")]
    backend.post_processor = TemplateProcessing(single="<s> $A </s>", special_tokens=special)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, model_max_length=LENGTH, **names)
    torch.manual_seed(0)
    config = XLMRobertaConfig(
        vocab_size=terms,
        hidden_size=WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=12,
        intermediate_size=4 * WIDTH,
        max_position_embeddings=LENGTH + 1,
        pad_token_id=0,
        bos_token_id=2,
        eos_token_id=3,
    )
    encoder = SpladeEncoder.from_model(XLMRobertaForMaskedLM(config), tokenizer, max_seq_length=LENGTH, device="cpu")
    with torch.inference_mode():
        maxima_BV = encoder.eval()(dict(encoder.preprocess(texts[:64])))["signed_maxima"]
        level = maxima_BV.kthvalue(terms - ACTIVE_TERMS, dim=1).values.median()
    encoder.output_embedding.bias.data.fill_(-float(level))
    return encoder


def seconds(work: Callable[[], Any]) -> float:
    """Return how long it took."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def to_csr(embeddings: torch.Tensor) -> csr_array:
    """Return stacked sparse tensors as a scipy matrix."""
    embeddings = embeddings.coalesce()
    rows, columns = embeddings.indices().numpy()
    return csr_array((embeddings.values().numpy(), (rows, columns)), shape=tuple(embeddings.shape))


def measure(terms: int, texts: list[str], repetitions: int) -> dict[str, Any]:
    """Alternate both encoders."""
    ours = build(terms, texts)
    with tempfile.TemporaryDirectory() as folder:
        ours.save(folder, create_model_card=False)
        stock = SparseEncoder(folder, device="cpu")

    def encode_stock(some: list[str]) -> torch.Tensor:
        return stock.encode(some, batch_size=BATCH, convert_to_sparse_tensor=True, show_progress_bar=False)

    def encode_fused(some: list[str]) -> torch.Tensor:
        return ours.encode(some, batch_size=BATCH, convert_to_sparse_tensor=True, show_progress_bar=False)

    expected, found = to_csr(encode_stock(texts)), ours.encode_sparse(texts, batch_size=BATCH)
    works: dict[str, Callable[[], Any]] = {
        "stock": lambda: encode_stock(texts),
        "ours": lambda: ours.encode_sparse(texts, batch_size=BATCH),
        "fused encode()": lambda: encode_fused(texts),
    }
    taken: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(repetitions):
        for name, work in works.items():
            taken[name].append(seconds(work))
    lengths = [len(ids) for ids in ours.tokenizer(texts, truncation=True)["input_ids"]]
    return {
        "terms": terms,
        "texts": len(texts),
        "tokens_per_text": statistics.mean(lengths),
        "active_terms": found.nnz / len(texts),
        "repetitions": repetitions,
        "texts_per_second": {name: len(texts) / statistics.median(times) for name, times in taken.items()},
        "ratios": sorted(peer / own for peer, own in zip(taken["stock"], taken["ours"], strict=True)),
        "difference": float(abs(found - expected).max()),
    }


def claims(result: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the lines that `make bench` reads."""
    name, speed = f"encode.{result['terms']}", result["texts_per_second"]
    ratio, difference = statistics.median(result["ratios"]), result["difference"]
    return [
        {
            "benchmark": name,
            "metric": "texts per second (ratio = times faster, median of pairs)",
            "ours": round(speed["ours"], 2),
            "peer": round(speed["stock"], 2),
            "ratio": round(ratio, 3),
            "goal": f">= {GOAL_SPEED:g}",
            "holds": ratio >= GOAL_SPEED,
        },
        {
            "benchmark": name,
            "metric": "largest difference of a weight",
            "ours": difference,
            "peer": 0.0,
            "ratio": difference,
            "goal": f"< {GOAL_DIFFERENCE:g}",
            "holds": difference < GOAL_DIFFERENCE,
        },
    ]


def machine(threads: int) -> dict[str, Any]:
    """Describe the processor and the versions."""
    cpu = Path("/proc/cpuinfo")
    models = [line.split(":", 1)[1].strip() for line in cpu.read_text().splitlines() if line.startswith("model name")]
    packages = ("torch", "sentence-transformers", "transformers", "numba")
    return {
        "cpu": models[0] if models else platform.machine(),
        "cores": os.cpu_count(),
        "threads": threads,
        "python": platform.python_version(),
        **{package: importlib.metadata.version(package) for package in packages},
    }


def main() -> None:
    """Measure each vocabulary and print the claims."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--terms", type=int, nargs="+", choices=list(TEXTS), default=list(TEXTS))
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    results = []
    for terms in arguments.terms:
        result = measure(terms, sentences(arguments.data, TEXTS[terms]), arguments.repetitions)
        print(json.dumps(result), flush=True)
        results.append(result)
    report = {
        "machine": machine(arguments.threads),
        "results": results,
        "claims": [line for result in results for line in claims(result)],
    }
    write_json(RESULTS / "encode.json", report)
    for line in report["claims"]:
        print(json.dumps(line))


if __name__ == "__main__":
    main()

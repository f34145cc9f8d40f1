"""The tiled SPLADE head against sentence-transformers' head and pooling: time and memory.

Both get the same hidden states, weights and gradient, in one process, alternating; a step is the forward pass from
hidden states to term weights and the backward pass to the gradients of hidden states, weight and bias. The peer is a
linear layer to padded logits and `SpladePooling`. Memory is the peak of a process of its own during one step, beyond
what it held before and beyond the weight's own gradient.

Cases: ``full``: no text is padded, the least there is to save; ``sentences``: texts of real lengths padded to the same
64 tokens; ``dense``: ``full`` with a gradient on every weight; ``large``: ours alone at the batch that the peer needs
about 13 GB for. The gradient of the others is on the 1.5 % largest weights of each text.

    python benchmarks/splade_head.py [--quick] [--data ../shared/data]
"""

from __future__ import annotations

import argparse
import gc
import gzip
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sentence_transformers.sparse_encoder.modules import SpladePooling
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn.functional import linear

from soju.core.files import write_json
from soju.sparse.splade_head import TileReducer, signed_maxima, splade_weights, text_offsets, tiles
from soju.sparse.splade_loops import reduce_tile

RESULTS = Path(__file__).parent / "results"
TOKENIZER = Path(__file__).parent.parent / "src/soju/packaged/ko-en-static/tokenizer.json"
GOAL_SPEED, GOAL_MEMORY, GOAL_LARGE_GB = 6.0, 20.0, 0.5
GOAL_DENSE_SPEED, GOAL_DENSE_MEMORY = 1.5, 5.0


@dataclass(frozen=True)
class Case:
    """Sizes of one step."""

    name: str
    texts: int = 24
    tokens: int = 64
    width: int = 1024
    terms: int = 250_002
    share: float = 0.015
    """Of the weights of a text, how many have a gradient: the largest ones."""


CASES = [
    Case("full"),
    Case("sentences"),
    Case("dense", share=1.0),
    Case("large", texts=64),
]
QUICK = {"texts": 8, "tokens": 32, "width": 256, "terms": 16_000}


class Step:
    """The inputs of one case, and both heads on them."""

    def __init__(self, case: Case, lengths: list[int], *, seed: int = 0) -> None:
        torch.manual_seed(seed)
        self.case = case
        self.lengths_B = torch.tensor(lengths)
        self.mask_BS = (torch.arange(case.tokens) < self.lengths_B[:, None]).long()
        self.hidden_BSH = torch.randn(case.texts, case.tokens, case.width).requires_grad_()
        self.weight_VH = torch.empty(case.terms, case.width).normal_(std=case.width**-0.5).requires_grad_()
        self.bias_V = torch.full((case.terms,), -1.0).requires_grad_()
        self.gradient_BV = torch.ones(case.texts, case.terms)

    def choose_gradient(self) -> None:
        """Put the gradient on the largest weights."""
        with torch.no_grad():
            weights_BV = self.ours()
        self.gradient_BV = torch.randn(weights_BV.shape)
        if self.case.share < 1:
            kept = weights_BV.topk(int(self.case.share * self.case.terms)).indices
            self.gradient_BV *= torch.zeros_like(weights_BV).scatter_(1, kept, 1)

    def ours(self) -> Tensor:
        """Drop the padding, then the tiled head."""
        flat_NH = self.hidden_BSH.flatten(0, 1)
        if int(self.lengths_B.sum()) < len(flat_NH):
            flat_NH = flat_NH.index_select(0, self.mask_BS.flatten().nonzero().squeeze(1))
        return splade_weights(signed_maxima(flat_NH, self.weight_VH, self.bias_V, self.lengths_B))

    def stock(self) -> Tensor:
        """Padded logits, then the pooling of sentence-transformers."""
        logits_BSV = linear(self.hidden_BSH, self.weight_VH, self.bias_V)
        pooling = SpladePooling("max").train()
        return pooling({"token_embeddings": logits_BSV, "attention_mask": self.mask_BS})["sentence_embedding"]

    def inputs(self) -> list[Tensor]:
        """Return what gradients are asked for."""
        return [self.hidden_BSH, self.weight_VH, self.bias_V]

    def run(self, name: str) -> tuple[float, float]:
        """Return the seconds of the forward and the backward pass."""
        for tensor in self.inputs():
            tensor.grad = None
        start = time.perf_counter()
        weights_BV = getattr(self, name)()
        middle = time.perf_counter()
        weights_BV.backward(self.gradient_BV)
        return middle - start, time.perf_counter() - middle

    def difference(self) -> dict[str, float]:
        """Return the largest differences between both heads, gradients relative to their largest number."""
        found = {}
        weights, gradients = {}, {}
        for name in ("ours", "stock"):
            weights[name] = getattr(self, name)()
            gradients[name] = torch.autograd.grad(weights[name], self.inputs(), self.gradient_BV)
            weights[name] = weights[name].detach()
        found["weights"] = float((weights["ours"] - weights["stock"]).abs().max())
        for name, one, other in zip(("hidden", "weight", "bias"), gradients["ours"], gradients["stock"], strict=True):
            found[name] = float((one - other).abs().max() / other.abs().max())
        return found

    def parts(self) -> dict[str, float]:
        """Return the seconds of the forward pass in matrix products and in finding maxima."""
        flat_NH = self.hidden_BSH.detach()[self.mask_BS.bool()]
        weight_VH = self.weight_VH.detach()
        width = TileReducer(flat_NH, weight_VH, self.lengths_B).width
        offsets = text_offsets(self.lengths_B)
        maxima_BV = torch.empty(self.case.texts, self.case.terms)
        argmax_BV = torch.empty(self.case.texts, self.case.terms, dtype=torch.int16)
        seconds = {"products": 0.0, "maxima": 0.0}
        buffer = torch.empty(len(flat_NH) * width)
        for part in tiles(self.case.terms, width):
            logits_NT = buffer[: len(flat_NH) * (part.stop - part.start)].view(len(flat_NH), -1)
            start = time.perf_counter()
            torch.mm(flat_NH, weight_VH[part].t(), out=logits_NT)
            middle = time.perf_counter()
            reduce_tile(logits_NT.numpy(), offsets, maxima_BV.numpy(), argmax_BV.numpy(), part.start)
            seconds["products"] += middle - start
            seconds["maxima"] += time.perf_counter() - middle
        return seconds


def draw_lengths(case: Case, data: Path) -> list[int]:
    """Return full texts, or lengths of Korean and English sentences with two special tokens, cut at ``tokens``."""
    if case.name != "sentences":
        return [case.tokens] * case.texts
    rng = np.random.default_rng(0)
    path = data / "parallel.dev.tsv.gz"
    if path.exists():
        with gzip.open(path, "rt", encoding="utf-8") as lines:
            sentences = [sentence for line in lines for sentence in line.rstrip("\n").split("\t")]
        pieces = [len(encoding.ids) for encoding in Tokenizer.from_file(str(TOKENIZER)).encode_batch(sentences)]
    else:  # about their distribution
        pieces = rng.lognormal(np.log(16.5), 0.6, 4000).astype(int).tolist()
    # Evenly spaced quantiles rather than a draw, so that the mean of few texts is that of all.
    quantiles = np.quantile(np.minimum(np.array(pieces) + 2, case.tokens), (np.arange(case.texts) + 0.5) / case.texts)
    return [int(length) for length in rng.permutation(quantiles.round())]


def measure_time(case: Case, lengths: list[int], repetitions: int) -> dict[str, Any]:
    """Alternate both heads."""
    step = Step(case, lengths)
    step.choose_gradient()
    difference = step.difference()
    runs: dict[str, list[tuple[float, float]]] = {"stock": [], "ours": []}
    for _ in range(repetitions):
        for name, taken in runs.items():
            taken.append(step.run(name))
    parts = [step.parts() for _ in range(3)]
    return {
        "seconds": {name: statistics.median(map(sum, taken)) for name, taken in runs.items()},
        "forward": {name: statistics.median(forward for forward, _ in taken) for name, taken in runs.items()},
        "backward": {name: statistics.median(backward for _, backward in taken) for name, taken in runs.items()},
        "ratios": sorted(sum(stock) / sum(ours) for stock, ours in zip(runs["stock"], runs["ours"], strict=True)),
        "forward_parts": {name: statistics.median(part[name] for part in parts) for name in parts[0]},
        "difference": difference,
    }


def resident_mib(field: str = "VmRSS") -> float:
    """Return the resident memory of this process, or its peak (``VmHWM``)."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) / 1024


def probe(case: Case, lengths: list[int], name: str) -> None:
    """Print the peak memory of one step of one head in MiB; runs as the child of `peak_mib`."""
    warm = Step(Case("warm", texts=2, tokens=4, width=64, terms=512), [4, 4])
    warm.run(name)
    step = Step(case, lengths)
    step.choose_gradient()
    gc.collect()
    before = resident_mib()
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from what is resident now
    step.run(name)
    peak, after = resident_mib("VmHWM"), resident_mib()
    step.weight_VH.grad = None
    print(peak - before - (after - resident_mib()))


def peak_mib(case: Case, lengths: list[int], name: str, threads: int) -> float:
    """Measure in a process of its own."""
    given = json.dumps({"case": asdict(case), "lengths": lengths, "name": name, "threads": threads})
    command = [sys.executable, __file__, "--probe", given]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def claims(result: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the lines that `make bench` reads."""
    name, lines = result["case"]["name"], []
    faster, leaner = (GOAL_DENSE_SPEED, GOAL_DENSE_MEMORY) if name == "dense" else (GOAL_SPEED, GOAL_MEMORY)
    if "seconds" in result:
        ours, peer = result["seconds"]["ours"], result["seconds"]["stock"]
        ratio = statistics.median(result["ratios"])
        metric = f"forward + backward, s ({result['tokens_per_text']:.3g} of {result['case']['tokens']} tokens a text"
        metric += "; ratio = times faster, median of pairs)"
        lines.append((metric, ours, peer, ratio, f">= {faster:g}", ratio >= faster))
    ours, peer = result["peak_mib"]["ours"] / 1024, result["peak_mib"].get("stock", float("nan")) / 1024
    if name == "large":
        metric = f"peak memory beyond the weight's gradient at {result['case']['texts']} texts, GiB (peer = the goal)"
        limit = GOAL_LARGE_GB * 1e9 / 2**30
        lines.append((metric, ours, limit, ours / limit, "<= 1", ours <= limit))
    else:
        metric = "peak memory beyond the weight's gradient, GiB (ratio = times less)"
        lines.append((metric, ours, peer, peer / ours, f">= {leaner:g}", peer / ours >= leaner))
    return [
        {
            "benchmark": f"splade_head.{name}",
            "metric": metric,
            "ours": round(ours, 4),
            "peer": round(peer, 4),
            "ratio": round(ratio, 3),
            "goal": goal,
            "holds": holds,
        }
        for metric, ours, peer, ratio, goal, holds in lines
    ]


def machine(threads: int) -> dict[str, Any]:
    """Describe the processor and the versions."""
    cpu = Path("/proc/cpuinfo")
    models = [line.split(":", 1)[1].strip() for line in cpu.read_text().splitlines() if line.startswith("model name")]
    packages = ("torch", "sentence-transformers", "numba", "numpy")
    return {
        "cpu": models[0] if models else platform.machine(),
        "cores": os.cpu_count(),
        "threads": threads,
        "python": platform.python_version(),
        **{package: importlib.metadata.version(package) for package in packages},
    }


def main() -> None:
    """Measure each case and print the claims."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small sizes, to try the script out; no claim")
    parser.add_argument("--cases", nargs="+", default=[case.name for case in CASES])
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--probe", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.probe:
        given = json.loads(arguments.probe)
        torch.set_num_threads(given["threads"])
        probe(Case(**given["case"]), given["lengths"], given["name"])
        return
    torch.set_num_threads(arguments.threads)
    results = []
    for case in CASES:
        if case.name not in arguments.cases:
            continue
        if arguments.quick:
            case = Case(**(asdict(case) | QUICK | {"texts": case.texts // 3}))
        lengths = draw_lengths(case, arguments.data)
        names = ["ours"] if case.name == "large" else ["stock", "ours"]
        result: dict[str, Any] = {"case": asdict(case), "tokens_per_text": statistics.mean(lengths)}
        result["peak_mib"] = {name: peak_mib(case, lengths, name, arguments.threads) for name in names}
        if case.name != "large":
            result |= measure_time(case, lengths, arguments.repetitions)
        print(json.dumps(result), flush=True)
        results.append(result)
    report = {
        "machine": machine(arguments.threads),
        "results": results,
        "claims": [line for result in results for line in claims(result)],
    }
    if not arguments.quick:
        write_json(RESULTS / "splade_head.json", report)
    for line in report["claims"]:
        print(json.dumps(line))


if __name__ == "__main__":
    main()

"""Training a SPLADE student against the stock trainer with the stock pooling: pairs a second and memory.

Same model (a BERT of 6 layers and width 384, random weights), same sentence pairs, same batch size, same loss
(`SpladeLoss` over in-batch negatives), same optimiser; each run is a process of its own, ours and the peer in turn.
Ours is `SpladeEncoder` with `LengthBuckets` in a `ReliableTrainer`, which is what the recipe trains with; the peer is
`SparseEncoder` with `SpladePooling` in `SparseEncoderTrainer` as it comes. The first two steps are not counted.

Activation memory is the peak of a step beyond what the process held before it, less one gradient of every parameter.
With a small vocabulary most of it belongs to the layers, which are the same on both sides; so that size is measured
with activation checkpointing (`training.gradient_checkpointing` of the recipe), too: on our side alone, which then
computes every layer twice where the peer computes it once, and on both sides.

    python benchmarks/training_throughput.py [--data ../shared/data] [--quick]
"""

from __future__ import annotations

import argparse
import gzip
import importlib.metadata
import itertools
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

from soju.core.files import write_json

RESULTS = Path(__file__).parent / "results"
PIECES = 16_000
GOALS = {32_000: 1.5, 250_002: 3.0}
CHECKPOINTED = [32_000]
"""Vocabularies that are measured with activation checkpointing, too."""
COMPARED = {"": (False, False), ".ours_checkpoints": (True, False), ".both_checkpoint": (True, True)}
"""What is held against what: whether ours and whether the peer checkpoints activations."""
GOAL_MEMORY = 3.0
BATCH, STEPS, SKIPPED, MAX_LENGTH = 16, 8, 2, 64


def main() -> None:
    """Measure, print and write the claims."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", default="../shared/data")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="one small vocabulary, one repetition")
    parser.add_argument("--probe", nargs=3, metavar=("WHO", "TERMS", "TOKENIZER"), help=argparse.SUPPRESS)
    parser.add_argument("--checkpointing", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.probe:
        who, terms, tokenizer = arguments.probe
        print(json.dumps(probe(who, int(terms), Path(tokenizer), arguments.data, arguments.checkpointing)))
        return
    with tempfile.TemporaryDirectory() as folder:
        run(arguments, train_tokenizer(Path(folder) / "tokenizer.json", arguments.data))


def run(arguments: argparse.Namespace, tokenizer: Path) -> None:
    """Measure both trainers in turn."""
    sizes = list(GOALS)[:1] if arguments.quick else list(GOALS)
    repetitions = 1 if arguments.quick else arguments.repetitions
    claims, details = [], {}
    for terms in sizes:
        kinds = [False, True] if terms in CHECKPOINTED else [False]
        found: dict[str, list[dict[str, Any]]] = {}
        for repetition, checkpointing in itertools.product(range(repetitions), kinds):
            for who in ("ours", "stock") if repetition % 2 == 0 else ("stock", "ours"):
                last = run_probe(who, terms, tokenizer, arguments.data, checkpointing)
                subject = subject_name(who, checkpointing)
                found.setdefault(subject, []).append(last)
                print(
                    f"|V| {terms:,} {subject}: {last['examples_per_second']:.2f} pairs/s, "
                    f"{last['activation_bytes'] / 2**20:.0f} MiB",
                    file=sys.stderr,
                )
        for name, (ours, peer) in COMPARED.items():
            if {ours, peer} <= set(kinds):
                sides = found[subject_name("ours", ours)], found[subject_name("stock", peer)]
                claims += compare(f"{terms}{name}", *sides, GOALS[terms])
        details[str(terms)] = found
    RESULTS.mkdir(exist_ok=True)
    write_json(RESULTS / "training_throughput.json", {"machine": machine(), "claims": claims, "details": details})
    for claim in claims:
        print(json.dumps(claim))


def subject_name(who: str, checkpointing: bool) -> str:
    """Return who trains how."""
    return f"{who}, checkpointing" if checkpointing else who


def compare(case: str, ours: list[Any], peer: list[Any], faster: float) -> list[dict[str, Any]]:
    """Return the claims of one case, from the repetitions of both sides."""

    def middle(key: str) -> tuple[float, float]:
        return statistics.median(run[key] for run in ours), statistics.median(run[key] for run in peer)

    speed, memory = middle("examples_per_second"), middle("activation_bytes")
    name = f"training_throughput.{case}"
    return [
        claim(name, "pairs per second (ratio = times faster)", *speed, speed[0] / speed[1], faster),
        claim(name, "activation memory, bytes (ratio = times less)", *memory, memory[1] / memory[0], GOAL_MEMORY),
    ]


def claim(benchmark: str, metric: str, ours: float, peer: float, ratio: float, goal: float) -> dict[str, Any]:
    """Return one claim; the ratio says how many times better ours is."""
    numbers = {"ours": round(ours, 3), "peer": round(peer, 3), "ratio": round(ratio, 3)}
    return {"benchmark": benchmark, "metric": metric, **numbers, "goal": f">= {goal:g}", "holds": ratio >= goal}


def train_tokenizer(path: Path, data: str) -> Path:
    """Train word pieces on the sentences; both trainers and both vocabulary sizes use them."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordPiece
    from tokenizers.pre_tokenizers import BertPreTokenizer
    from tokenizers.trainers import WordPieceTrainer

    tokenizer = Tokenizer(WordPiece(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = BertPreTokenizer()
    trainer = WordPieceTrainer(vocab_size=PIECES, special_tokens=["[UNK]"], show_progress=False)
    tokenizer.train_from_iterator((text for pair in sentence_pairs(data, 10_000) for text in pair), trainer)
    tokenizer.save(str(path))
    return path


def run_probe(who: str, terms: int, tokenizer: Path, data: str, checkpointing: bool) -> dict[str, Any]:
    """Measure one trainer in a process of its own."""
    command = [sys.executable, __file__, "--probe", who, str(terms), str(tokenizer), "--data", data]
    command += ["--checkpointing"] if checkpointing else []
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        sys.exit(result.stderr)
    measured: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    return measured


def probe(who: str, terms: int, pieces: Path, data: str, checkpointing: bool) -> dict[str, Any]:
    """Train a few steps and return what they cost."""
    warnings.filterwarnings("ignore")
    import torch
    from datasets import Dataset
    from sentence_transformers import SparseEncoder, SparseEncoderTrainer, SparseEncoderTrainingArguments
    from sentence_transformers.sparse_encoder.losses import SparseMultipleNegativesRankingLoss, SpladeLoss
    from tokenizers import Tokenizer
    from transformers import BertConfig, BertForMaskedLM, PrinterCallback, ProgressCallback, TrainerCallback

    from soju.sparse.export.stock import stock_tokenizer
    from soju.sparse.splade import SpladeEncoder
    from soju.training.reliable import ReliableTrainer
    from soju.training.sampling import LengthBuckets

    class RecipeTrainer(ReliableTrainer, SparseEncoderTrainer):
        pass

    class Meter(TrainerCallback):
        """Times steps, and reads the peak memory of the last ones."""

        def __init__(self) -> None:
            self.seconds: list[float] = []
            self.extra: list[int] = []
            self.start = 0.0
            self.before = 0

        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            self.before = reset_peak()
            self.start = time.perf_counter()

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            self.seconds.append(time.perf_counter() - self.start)
            self.extra.append(status_bytes("VmHWM") - self.before)

    torch.manual_seed(0)
    torch.set_num_threads(2)
    tokenizer = stock_tokenizer(Tokenizer.from_file(str(pieces)), max_length=MAX_LENGTH, start_token=True)
    config = BertConfig(
        vocab_size=terms, hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536
    )  # fmt: skip
    model: Any = SpladeEncoder.from_model(BertForMaskedLM(config), tokenizer, max_seq_length=MAX_LENGTH, device="cpu")
    if who == "stock":
        model = model.as_stock()
        assert type(model) is SparseEncoder
    pairs = sentence_pairs(data, BATCH * STEPS)
    rows = Dataset.from_dict({"ko": [ko for ko, _ in pairs], "en": [en for _, en in pairs]})
    lengths = [len(tokenizer(ko)["input_ids"]) + len(tokenizer(en)["input_ids"]) for ko, en in pairs]
    loss = SpladeLoss(
        model, SparseMultipleNegativesRankingLoss(model), document_regularizer_weight=3e-5,
        query_regularizer_weight=5e-5,
    )  # fmt: skip
    meter = Meter()
    with tempfile.TemporaryDirectory() as folder:
        arguments = SparseEncoderTrainingArguments(
            folder, max_steps=STEPS, per_device_train_batch_size=BATCH, learning_rate=1e-5, save_strategy="no",
            report_to="none", seed=1, dataloader_pin_memory=False, disable_tqdm=True, logging_strategy="no",
            activation_checkpointing=checkpointing,
            **({"batch_sampler": LengthBuckets(lengths)} if who == "ours" else {}),
        )  # fmt: skip
        kind = RecipeTrainer if who == "ours" else SparseEncoderTrainer
        trainer = kind(model, arguments, train_dataset=rows, loss=loss, callbacks=[meter])
        trainer.remove_callback(PrinterCallback)
        trainer.remove_callback(ProgressCallback)
        trainer.train()
    gradients = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    return {
        "examples_per_second": BATCH * (STEPS - SKIPPED) / sum(meter.seconds[SKIPPED:]),
        "activation_bytes": max(max(meter.extra[SKIPPED:]) - gradients, 1),
        "seconds": meter.seconds,
        "peak_bytes": status_bytes("VmHWM"),
        "gradient_bytes": gradients,
    }


def sentence_pairs(data: str, count: int) -> list[tuple[str, str]]:
    """Return real pairs where they are, and pairs of our own samples elsewhere."""
    path = Path(data) / "parallel.train.tsv.gz"
    if path.is_file():
        with gzip.open(path, "rt", encoding="utf-8") as lines:
            rows = [line.rstrip("\n").split("\t")[:2] for line in lines]
        chosen = rows[:: max(1, len(rows) // count)][:count]
        return [(ko, en) for ko, en in chosen]
    samples = Path(__file__).parent.parent / "src/soju/samples/passages.train.jsonl"
    texts = [json.loads(line) for line in samples.read_text(encoding="utf-8").splitlines()]
    return [(texts[n % len(texts)]["ko"], texts[n % len(texts)]["en"]) for n in range(count)]


def status_bytes(name: str) -> int:
    """Return a memory figure of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {name}; this benchmark needs Linux")


def reset_peak() -> int:
    """Start a new peak, and return what is held now."""
    Path("/proc/self/clear_refs").write_text("5")
    return status_bytes("VmRSS")


def machine() -> dict[str, Any]:
    """Describe where this ran."""
    names = ("torch", "transformers", "sentence-transformers")
    model = next(
        (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line),
        platform.processor(),
    )
    versions = {name: importlib.metadata.version(name) for name in names}
    return {"cpu": model, "cores": os.cpu_count(), "python": platform.python_version(), "versions": versions}


if __name__ == "__main__":
    main()

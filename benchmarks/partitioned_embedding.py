"""What training only the new rows of an embedding saves, compared with training the whole matrix.

219,698 rows of width 1,024 (Qwen3-Embedding-0.6B with 68,029 new tokens), AdamW, the same ids (80 % old ones) and the
same gradient. Ours is `PartitionedEmbedding`; the peer is a plain embedding whose gradient is zeroed for old rows, as
EEVE does. Bytes are those of the tensors that exist after a step; memory is the peak of a process of its own beyond
what it held before it made the embedding. Both are on the same machine, in turn.

    python benchmarks/partitioned_embedding.py [--quick]
"""

from __future__ import annotations

import argparse
import gc
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from soju.core.files import write_json
from soju.embedding.trainer import PartitionedEmbedding

RESULTS = Path(__file__).parent / "results"
ROWS, NEW, WIDTH = 219_698, 68_029, 1024
TEXTS, TOKENS = 48, 64
STEPS, SKIPPED = 6, 1
GOAL_BYTES = 1 / 3
SETTINGS = {"lr": 5e-5, "weight_decay": 0.0}


def make(who: str, rows: int, new: int) -> nn.Module:
    """Return an embedding to train, without ever holding its weights twice."""
    if who == "ours":
        return PartitionedEmbedding(
            torch.zeros(rows - new, WIDTH).normal_(std=0.02), torch.zeros(new, WIDTH).normal_(std=0.02)
        )
    plain = nn.Embedding(rows, WIDTH, _weight=torch.zeros(rows, WIDTH).normal_(std=0.02))

    def only_new(gradient: Tensor) -> Tensor:
        gradient[: rows - new] = 0
        return gradient

    plain.weight.register_hook(only_new)
    return plain


def probe(who: str, rows: int, new: int) -> dict[str, Any]:
    """Train a few steps in this process and return what they cost."""
    generator = torch.Generator().manual_seed(0)
    shape = (TEXTS, TOKENS)
    ids = torch.randint(rows - new, shape, generator=generator)
    ids = torch.where(torch.rand(shape, generator=generator) < 0.2, torch.randint(rows - new, rows, shape), ids)
    target = torch.randn(*shape, WIDTH, generator=generator)
    warm_up()
    gc.collect()
    before = resident_bytes()
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from what is resident now
    embedding = make(who, rows, new)
    trained = [parameter for parameter in embedding.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, **SETTINGS)
    seconds = []
    for _ in range(STEPS):
        start = time.perf_counter()
        optimizer.zero_grad()
        (embedding(ids) * target).sum().backward()
        optimizer.step()
        seconds.append(time.perf_counter() - start)
    return {
        "gradient_bytes": sum(size(parameter.grad) for parameter in trained if parameter.grad is not None),
        "state_bytes": sum(size(tensor) for state in optimizer.state.values() for tensor in state.values()),
        "weight_bytes": sum(size(parameter) for parameter in embedding.parameters()),
        "peak_bytes": resident_bytes("VmHWM") - before,
        "seconds": statistics.median(seconds[SKIPPED:]),
    }


def warm_up() -> None:
    """Let torch make what it makes once: thread pools, the optimiser's code."""
    small = nn.Embedding(8, 4)
    optimizer = torch.optim.AdamW(small.parameters())
    small(torch.arange(8)).sum().backward()
    optimizer.step()


def size(tensor: Tensor) -> int:
    """Return the bytes of a tensor."""
    return tensor.numel() * tensor.element_size()


def resident_bytes(field: str = "VmRSS") -> int:
    """Return the resident memory of this process, or its peak (``VmHWM``)."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def claims(found: dict[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Return the lines that `make bench` reads."""

    def middle(who: str, *keys: str) -> float:
        return statistics.median(sum(run[key] for key in keys) for run in found[who])

    counted = middle("ours", "gradient_bytes", "state_bytes"), middle("full", "gradient_bytes", "state_bytes")
    # What the weights take is the same for both, so the peak beyond them is what training adds.
    peak = tuple(
        statistics.median(run["peak_bytes"] - run["weight_bytes"] for run in found[who]) for who in ("ours", "full")
    )
    seconds = middle("ours", "seconds"), middle("full", "seconds")
    rows = [
        (
            "gradient + optimiser state, GiB (counted)",
            *[n / 2**30 for n in counted],
            counted[0] / counted[1],
            GOAL_BYTES,
        ),
        ("peak memory beyond the weights, GiB", *[n / 2**30 for n in peak], peak[0] / peak[1], 0.4),
        ("step, s (forward, backward, AdamW)", *seconds, seconds[0] / seconds[1], 1.0),
    ]
    return [
        {
            "benchmark": "partitioned_embedding",
            "metric": metric,
            "ours": round(ours, 4),
            "peer": round(peer, 4),
            "ratio": round(ratio, 4),
            "goal": f"<= {goal:.3g}",
            "holds": ratio <= goal,
        }
        for metric, ours, peer, ratio, goal in rows
    ]


def machine(threads: int) -> dict[str, Any]:
    """Describe the processor and the versions."""
    cpu = Path("/proc/cpuinfo")
    models = [line.split(":", 1)[1].strip() for line in cpu.read_text().splitlines() if line.startswith("model name")]
    return {
        "cpu": models[0] if models else platform.machine(),
        "cores": os.cpu_count(),
        "threads": threads,
        "python": platform.python_version(),
        "torch": importlib.metadata.version("torch"),
    }


def run(arguments: argparse.Namespace) -> dict[str, list[dict[str, Any]]]:
    """Measure both in processes of their own, in turn."""
    rows, new = (20_000, 6_200) if arguments.quick else (ROWS, NEW)
    found: dict[str, list[dict[str, Any]]] = {"ours": [], "full": []}
    for repetition in range(1 if arguments.quick else arguments.repetitions):
        for who in ("ours", "full") if repetition % 2 == 0 else ("full", "ours"):
            command = [
                sys.executable,
                __file__,
                "--probe",
                who,
                str(rows),
                str(new),
                "--threads",
                str(arguments.threads),
            ]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                sys.exit(done.stderr)
            found[who].append(json.loads(done.stdout))
            print(who, done.stdout.strip(), file=sys.stderr)
    return found


def main() -> None:
    """Measure and print the claims."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a small matrix, to try the script out; no claim")
    parser.add_argument("--repetitions", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--probe", nargs=3, metavar=("WHO", "ROWS", "NEW"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.probe:
        who, rows, new = arguments.probe
        print(json.dumps(probe(who, int(rows), int(new))))
        return
    found = run(arguments)
    report = {"machine": machine(arguments.threads), "claims": claims(found), "details": found}
    if not arguments.quick:
        write_json(RESULTS / "partitioned_embedding.json", report)
    for line in report["claims"]:
        print(json.dumps(line))


if __name__ == "__main__":
    main()

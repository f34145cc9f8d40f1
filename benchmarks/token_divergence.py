"""A divergence whose gradient is made in the forward pass against TRL's and a dense one: time and memory.

A step goes from hidden states and output embeddings to the forward KL of each token and back to the gradients of the
student's hidden states and, when the head is trained, of its output embedding. Ours, TRL's `ChunkedDivergenceFunction`
and plain autograd over all logits get the same tensors in one process and alternate; medians. Memory is the peak of a
process of its own during one step, beyond what it held before and beyond the gradient of the output embedding.

    python benchmarks/token_divergence.py [--quick] [--threads 1]

TRL is no dependency: pip install --no-deps trl==1.16.0
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
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from soju.speculative_kd import DivergenceSettings, Projection, token_divergence
from soju.speculative_kd.divergence import dense_divergence

RESULTS = Path(__file__).parent / "results"
GOAL_SPEED, GOAL_MEMORY, GOAL_DENSE_MEMORY = 1.3, 1.0, 0.25
NAMES = ("ours", "trl", "dense")


@dataclass(frozen=True)
class Case:
    """Sizes of one step."""

    name: str
    vocabulary: int
    student: int
    teacher: int
    frozen: bool
    tokens: int = 512


CASES = [
    Case("v49152.trained", 49_152, 576, 576, frozen=False),
    Case("v49152.frozen", 49_152, 576, 576, frozen=True),
    Case("v151936.trained", 151_936, 1024, 2560, frozen=False),
    Case("v151936.frozen", 151_936, 1024, 2560, frozen=True),
]
QUICK = {"vocabulary": 4096, "student": 64, "teacher": 96, "tokens": 128}


class Step:
    """The tensors of one case, and the three ways over them."""

    def __init__(self, case: Case, *, seed: int = 0) -> None:
        torch.manual_seed(seed)
        self.case = case
        self.student = _projection(case.tokens, case.vocabulary, case.student)
        self.teacher = _projection(case.tokens, case.vocabulary, case.teacher)
        self.student.hidden_NH.requires_grad_()
        self.student.weight_VH.requires_grad_(not case.frozen)
        self.weights_N = torch.full((case.tokens,), 1 / case.tokens)

    def ours(self) -> Tensor:
        """Chunks of tokens, the gradient in the forward pass."""
        return token_divergence(self.student, self.teacher, weights_N=self.weights_N)[0]

    def trl(self) -> Tensor:
        """Tiles of the vocabulary, all projections again in the backward pass."""
        from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

        return (ChunkedDivergenceFunction.apply(*self.student, *self.teacher, 0.0, 1.0)[0] * self.weights_N).sum()

    def dense(self) -> Tensor:
        """All logits."""
        student_NV, teacher_NV = (side.hidden_NH @ side.weight_VH.T for side in (self.student, self.teacher))
        return (dense_divergence(student_NV, teacher_NV, DivergenceSettings()) * self.weights_N).sum()

    def run(self, name: str) -> float:
        """Return the seconds of forward and backward pass."""
        self.clear()
        start = time.perf_counter()
        getattr(self, name)().backward()
        return time.perf_counter() - start

    def clear(self) -> None:
        """Drop the gradients."""
        self.student.hidden_NH.grad = self.student.weight_VH.grad = None

    def difference(self, names: tuple[str, ...]) -> dict[str, float]:
        """Return the largest difference of each peer's loss and gradients to ours, relative to the largest number."""
        found: dict[str, list[Tensor]] = {}
        for name in names:
            self.clear()
            loss: Tensor = getattr(self, name)()
            loss.backward()
            grads = [self.student.hidden_NH.grad, self.student.weight_VH.grad]
            found[name] = [loss.detach(), *(g.clone() for g in grads if g is not None)]
        return {
            name: max(
                float((ours - other).abs().max() / other.abs().max())
                for ours, other in zip(found["ours"], found[name], strict=True)
            )
            for name in names
            if name != "ours"
        }


def _projection(tokens: int, vocabulary: int, width: int) -> Projection:
    return Projection(torch.randn(tokens, width), torch.randn(vocabulary, width) * width**-0.5 * 2)


def resident_mib(field: str = "VmRSS") -> float:
    """Return the resident memory of this process, or its peak (``VmHWM``)."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) / 1024


def probe(case: Case, name: str) -> None:
    """Print the peak memory of one step in MiB; runs as the child of `peak_mib`."""
    Step(Case("warm", 64, 8, 8, frozen=False, tokens=4)).run(name)
    step = Step(case)
    gc.collect()
    before = resident_mib()
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from what is resident now
    step.run(name)
    own = 0.0 if case.frozen else step.student.weight_VH.numel() * 4 / 2**20
    print(resident_mib("VmHWM") - before - own)


def peak_mib(case: Case, name: str, threads: int) -> float:
    """Measure in a process of its own."""
    given = json.dumps({"case": asdict(case), "name": name, "threads": threads})
    command = [sys.executable, __file__, "--probe", given]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def measure(case: Case, repetitions: int, threads: int) -> dict[str, Any]:
    """Alternate the three."""
    peaks = {name: peak_mib(case, name, threads) for name in NAMES}
    step = Step(case)
    difference = step.difference(NAMES)
    seconds: dict[str, list[float]] = {name: [] for name in NAMES}
    for _ in range(repetitions):
        for name, taken in seconds.items():
            taken.append(step.run(name))
    ratios = sorted(trl / ours for trl, ours in zip(seconds["trl"], seconds["ours"], strict=True))
    return {
        "case": asdict(case),
        "seconds": {name: statistics.median(taken) for name, taken in seconds.items()},
        "times_faster_than_trl": ratios,
        "peak_mib": peaks,
        "difference": difference,
    }


def claims(result: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the lines that `make bench` reads."""
    case, seconds, peaks = result["case"], result["seconds"], result["peak_mib"]
    sizes = f"T {case['tokens']}, V {case['vocabulary']:,}, H {case['student']}, teacher's {case['teacher']}"
    faster = statistics.median(result["times_faster_than_trl"])
    rows: list[tuple[str, float, float, float, str, Callable[[float], bool]]] = [
        (f"forward + backward, s ({sizes}; peer: TRL; ratio = times faster, median of pairs)", seconds["ours"],
         seconds["trl"], faster, f">= {GOAL_SPEED:g}", lambda ratio: ratio >= GOAL_SPEED),
        ("peak memory beyond the head's gradient, MiB (peer: TRL)", peaks["ours"], peaks["trl"],
         peaks["ours"] / peaks["trl"], f"<= {GOAL_MEMORY:g}", lambda ratio: ratio <= GOAL_MEMORY),
        ("peak memory beyond the head's gradient, MiB (peer: dense)", peaks["ours"], peaks["dense"],
         peaks["ours"] / peaks["dense"], f"<= {GOAL_DENSE_MEMORY:g}", lambda ratio: ratio <= GOAL_DENSE_MEMORY),
    ]  # fmt: skip
    return [
        {
            "benchmark": f"token_divergence.{case['name']}",
            "metric": metric,
            "ours": round(ours, 4),
            "peer": round(peer, 4),
            "ratio": round(ratio, 3),
            "goal": goal,
            "holds": holds(ratio),
        }
        for metric, ours, peer, ratio, goal, holds in rows
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
        **{package: importlib.metadata.version(package) for package in ("torch", "trl")},
    }


def main() -> None:
    """Measure each case and print the claims."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small sizes, to try the script out; no claim")
    parser.add_argument("--cases", nargs="+", default=[case.name for case in CASES])
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--probe", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.probe:
        given = json.loads(arguments.probe)
        torch.set_num_threads(given["threads"])
        probe(Case(**given["case"]), given["name"])
        return
    torch.set_num_threads(arguments.threads)
    results = []
    for case in CASES:
        if case.name not in arguments.cases:
            continue
        if arguments.quick:
            case = Case(**(asdict(case) | QUICK))
        result = measure(case, arguments.repetitions, arguments.threads)
        print(json.dumps(result), flush=True)
        results.append(result)
    report = {
        "machine": machine(arguments.threads),
        "results": results,
        "claims": [line for result in results for line in claims(result)],
    }
    if not arguments.quick:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / "token_divergence.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    for line in report["claims"]:
        print(json.dumps(line))


if __name__ == "__main__":
    main()

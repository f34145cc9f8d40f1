"""The distillation loss of translation against `kl_div` + `cross_entropy`, alone and in a training step.

Alone: value and gradient at 480 target positions × 32,000 pieces, the same random logits. In a step: the published
shapes (teacher 768, 12 + 12 layers; student 512, 6 + 6; random weights), 32 pairs of 15 tokens, forward, backward and
AdamW. The step's peers are the teacher's forward pass plus a plain student step with `cross_entropy`, and the plain
student step alone when the teacher's last states come from a cache. Processor seconds of one process, alternating;
ratios are medians over the pairs.

    python benchmarks/translation_loss.py [--quick]
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div, log_softmax
from transformers import M2M100Config, M2M100ForConditionalGeneration

from soju.translation.loss import LossSettings, distillation_loss, distillation_loss_from_states

RESULTS = Path(__file__).parent / "results"
SETTINGS = LossSettings()
ROWS, VOCABULARY, PAIRS, TOKENS = 480, 32_000, 32, 15
TEACHER, STUDENT = (768, 12, 12, 3_072), (512, 6, 8, 2_048)
QUICK = {"vocabulary": 500, "pairs": 4, "teacher": (48, 2, 3, 96), "student": (32, 1, 2, 64)}
GOAL_LOSS, GOAL_GRADIENT, GOAL_STEP, GOAL_CACHED = 2.0, 1e-8, 1.15, 1.5


def stock(student_NV: Tensor, teacher_NV: Tensor, labels_N: Tensor) -> Tensor:
    """Return the loss as one writes it with torch's functions."""
    temperature = SETTINGS.temperature
    ours, theirs = log_softmax(student_NV / temperature, -1), log_softmax(teacher_NV / temperature, -1)
    divergence = temperature**2 * kl_div(ours, theirs, log_target=True, reduction="batchmean")
    smoothed = cross_entropy(student_NV, labels_N, label_smoothing=SETTINGS.label_smoothing)
    return SETTINGS.alpha * divergence + SETTINGS.beta * smoothed


def alternate(works: dict[str, Callable[[], object]], repetitions: int) -> dict[str, list[float]]:
    """Return the processor seconds of each work, one after the other in each round, after a round to warm up."""
    times: dict[str, list[float]] = {name: [] for name in works}
    for number in range(repetitions + 1):
        for name, work in works.items():
            start = time.process_time()
            work()
            if number:
                times[name].append(time.process_time() - start)
    return times


def measure_loss(vocabulary: int, repetitions: int, seed: int) -> dict[str, Any]:
    """Time both losses on the same logits and compare their gradients."""
    generator = torch.Generator().manual_seed(seed)
    student_NV = torch.randn(ROWS, vocabulary, generator=generator).requires_grad_()
    teacher_NV = 3 * torch.randn(ROWS, vocabulary, generator=generator)
    labels_N = torch.randint(vocabulary, (ROWS,), generator=generator)

    def gradient(name: str) -> Tensor:
        if name == "stock":
            loss = stock(student_NV, teacher_NV, labels_N)
        else:
            loss = distillation_loss(student_NV, teacher_NV, labels_N, SETTINGS).loss
        return torch.autograd.grad(loss, student_NV)[0]

    difference = float((gradient("ours") - gradient("stock")).abs().max())
    works = {name: lambda name=name: gradient(name) for name in ("stock", "ours")}
    return {
        "rows": ROWS,
        "vocabulary": vocabulary,
        "seconds": alternate(works, repetitions),
        "gradient_difference": difference,
    }


def build(shape: tuple[int, int, int, int], vocabulary: int, seed: int) -> M2M100ForConditionalGeneration:
    """Build a model with random weights from width, layers, heads and neurons."""
    width, layers, heads, neurons = shape
    sizes = {
        f"{side}_{name}": value
        for side in ("encoder", "decoder")
        for name, value in (("layers", layers), ("attention_heads", heads), ("ffn_dim", neurons), ("layerdrop", 0.0))
    }
    torch.manual_seed(seed)
    config = M2M100Config(vocab_size=vocabulary, d_model=width, max_position_embeddings=128, dropout=0.0, **sizes)
    return M2M100ForConditionalGeneration(config)


def measure_step(
    vocabulary: int, pairs: int, shapes: dict[str, tuple[int, int, int, int]], repetitions: int, seed: int
) -> dict[str, Any]:
    """Time a distillation step, one with cached states, a plain student step and the teacher's forward pass."""
    teacher, student = (build(shapes[name], vocabulary, seed) for name in ("teacher", "student"))
    teacher.eval().requires_grad_(requires_grad=False)
    optimiser = torch.optim.AdamW(student.parameters(), lr=1e-5, fused=True)
    generator = torch.Generator().manual_seed(seed)
    source, target = (torch.randint(4, vocabulary, (pairs, TOKENS), generator=generator) for _ in range(2))
    inputs = {"input_ids": source, "decoder_input_ids": target, "use_cache": False}
    labels_N = target.roll(-1, dims=1).flatten()

    def states(model: M2M100ForConditionalGeneration) -> Tensor:
        return model.model(**inputs).last_hidden_state.flatten(0, 1)

    def teacher_forward() -> Tensor:
        with torch.no_grad():
            return teacher(**inputs).logits

    def update(loss: Tensor) -> None:
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()

    def plain() -> None:
        logits_NV = student(**inputs).logits.flatten(0, 1)
        update(cross_entropy(logits_NV, labels_N, label_smoothing=SETTINGS.label_smoothing))

    def distil(teacher_NE: Tensor) -> None:
        heads = student.lm_head.weight, teacher.lm_head.weight
        terms = distillation_loss_from_states(states(student), heads[0], teacher_NE, heads[1], labels_N, SETTINGS)
        update(terms.loss)

    def step() -> None:
        with torch.no_grad():
            teacher_NE = states(teacher)
        distil(teacher_NE)

    with torch.no_grad():
        cached_NE = states(teacher).half()
    works = {"teacher": teacher_forward, "plain": plain, "step": step, "cached": lambda: distil(cached_NE)}
    return {"positions": len(labels_N), "shapes": shapes, "seconds": alternate(works, repetitions)}


def claims(loss: dict[str, Any], step: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the lines that `make bench` reads."""
    alone, whole = loss["seconds"], step["seconds"]
    forward_and_plain = [a + b for a, b in zip(whole["teacher"], whole["plain"], strict=True)]
    size = f"{loss['rows']} x {loss['vocabulary']:,}"
    rows = [
        (f"loss and gradient at {size}, s (ratio: times faster)", alone["ours"], alone["stock"], GOAL_LOSS, True),
        (
            "distillation step, s (peer: teacher forward + plain step)",
            whole["step"],
            forward_and_plain,
            GOAL_STEP,
            False,
        ),
        ("step with cached teacher states, s (peer: plain step)", whole["cached"], whole["plain"], GOAL_CACHED, False),
    ]
    lines = []
    for metric, ours, peer, goal, faster in rows:
        ratio = statistics.median((b / a) if faster else (a / b) for a, b in zip(ours, peer, strict=True))
        lines.append(
            {
                "benchmark": "translation_loss",
                "metric": metric,
                "ours": round(statistics.median(ours), 5),
                "peer": round(statistics.median(peer), 5),
                "ratio": round(ratio, 3),
                "goal": f"{'>=' if faster else '<='} {goal:g}",
                "holds": ratio >= goal if faster else ratio <= goal,
            }
        )
    worst = loss["gradient_difference"]
    lines.append(
        {
            "benchmark": "translation_loss",
            "metric": f"largest difference of a gradient at {size} to torch's",
            "ours": worst,
            "peer": 0.0,
            "ratio": worst,
            "goal": f"<= {GOAL_GRADIENT:g}",
            "holds": worst <= GOAL_GRADIENT,
        }
    )
    return lines


def machine(threads: int) -> dict[str, Any]:
    """Describe the processor and the versions."""
    cpu = Path("/proc/cpuinfo")
    models = [line.split(":", 1)[1].strip() for line in cpu.read_text().splitlines() if line.startswith("model name")]
    return {
        "cpu": models[0] if models else platform.machine(),
        "cores": os.cpu_count(),
        "threads": threads,
        "python": platform.python_version(),
        **{package: importlib.metadata.version(package) for package in ("torch", "transformers")},
    }


def main() -> None:
    """Measure and print the claims."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to try the script out; no claim is written")
    parser.add_argument("--repetitions", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    sizes = QUICK if arguments.quick else {}
    vocabulary, pairs = sizes.get("vocabulary", VOCABULARY), sizes.get("pairs", PAIRS)
    shapes = {"teacher": sizes.get("teacher", TEACHER), "student": sizes.get("student", STUDENT)}
    loss = measure_loss(vocabulary, arguments.repetitions, arguments.seed)
    step = measure_step(vocabulary, pairs, shapes, arguments.repetitions, arguments.seed)
    results = [loss, step]
    report = {"machine": machine(arguments.threads), "results": results, "claims": claims(loss, step)}
    if not arguments.quick:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / "translation_loss.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(results))
    for line in report["claims"]:
        print(json.dumps(line))


if __name__ == "__main__":
    main()

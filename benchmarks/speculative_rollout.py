"""What batches, whole blocks and a chosen block length bring to a speculative rollout.

Teacher and student are decoders from config with random weights: the student is the teacher's first layers, and what
layers add to their input is scaled until the wanted share of its proposals passes. All rollouts write the same texts,
which is checked. Tokens a second are counted while no row has left the batch; ways to write alternate; medians.

Claims: batch 16 against batch 1; a batch with whole blocks against the order of other implementations, one row with the
teacher's verdict after each token; the chosen block length against the best fixed one and against 20; the speed against
the formula it is chosen by; and against assisted generation of transformers, which writes one row at a time and accepts
by another rule.

    python benchmarks/speculative_rollout.py [--quick] [--threads 1]
"""

from __future__ import annotations

import argparse
import copy
import importlib.metadata
import json
import os
import platform
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from soju.speculative_kd import Costs, Rollout, RolloutSettings, expected_speed, measure_costs
from soju.speculative_kd.cache import reading

RESULTS = Path(__file__).parent / "results"
GOAL_BATCH, GOAL_ORDER, GOAL_BEST, GOAL_TWENTY, GOAL_FORMULA, GOAL_ASSISTED = 4.0, 4.0, 0.95, 1.5, 0.1, 1.0


@dataclass(frozen=True)
class Sizes:
    """Of models and texts."""

    vocabulary: int = 16_384
    hidden: int = 576
    intermediate: int = 1536
    teacher_layers: int = 30
    student_layers: int = 3
    rows: int = 16
    query: int = 40
    knowledge: int = 80
    budget: int = 96
    acceptance: float = 0.7
    gammas: tuple[int, ...] = (1, 2, 3, 4, 5, 6, 8, 10, 20)


QUICK = Sizes(512, 64, 128, 4, 1, rows=4, query=6, knowledge=8, budget=24, gammas=(1, 2, 4, 20))


class Writers:
    """Both models, the prompts, and ways to write."""

    def __init__(self, sizes: Sizes) -> None:
        self.sizes = sizes
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=sizes.vocabulary,
            hidden_size=sizes.hidden,
            intermediate_size=sizes.intermediate,
            num_hidden_layers=sizes.teacher_layers,
            num_attention_heads=sizes.hidden // 64,
            num_key_value_heads=max(1, sizes.hidden // 192),
            max_position_embeddings=4096,
            bos_token_id=None,
            eos_token_id=None,
            pad_token_id=None,
        )
        self.teacher = LlamaForCausalLM(config).eval().requires_grad_(False)
        self.teacher.lm_head.weight.normal_(std=8 / sizes.hidden**0.5)
        self.student = copy.deepcopy(self.teacher)
        self.student.model.layers = self.student.model.layers[: sizes.student_layers]
        self.student.config.num_hidden_layers = sizes.student_layers
        self.outputs = [
            (weight, weight.clone())
            for model in (self.teacher, self.student)
            for layer in model.model.layers
            for weight in (layer.self_attn.o_proj.weight, layer.mlp.down_proj.weight)
        ]
        chance = random.Random(0)
        self.queries = [[chance.randrange(sizes.vocabulary) for _ in range(sizes.query)] for _ in range(sizes.rows)]
        self.privileged = [
            [chance.randrange(sizes.vocabulary) for _ in range(sizes.knowledge)] + query for query in self.queries
        ]
        self.texts: list[list[int]] | None = None
        self.strength = self._calibrate()

    def _calibrate(self) -> float:
        """Scale what layers add until `acceptance` of the proposals pass: at 0 both models are one."""
        low, high = -8.0, 3.0
        for _ in range(9):
            middle = (low + high) / 2
            for weight, original in self.outputs:
                weight.copy_(original * 2**middle)
            found = self.rollout("parallel", 4, budget=16)(self.queries, self.privileged, ids=range(self.sizes.rows))
            low, high = (low, middle) if found.acceptance < self.sizes.acceptance else (middle, high)
        return 2**middle

    def rollout(
        self, implementation: str, gamma: int, *, budget: int | None = None, costs: Costs | None = None
    ) -> Rollout:
        """Return a way to write."""
        settings = RolloutSettings(
            implementation=implementation, gamma=gamma, max_new_tokens=budget or self.sizes.budget
        )
        return Rollout(self.student, self.teacher, settings, costs=costs)

    def write(self, rollout: Rollout, rows: int) -> dict[str, float]:
        """Write the first rows in one batch; count tokens a second until a row leaves."""
        ids = list(range(rows))
        tokens = passed = 0
        seconds = 0.0
        with reading(rollout.student, rollout.teacher):
            batch = rollout.begin(self.queries[:rows], self.privileged[:rows], ids=ids, keep_hidden=True)
            whole = True
            while batch.live:
                start = time.perf_counter()
                tested, accepted = batch.block(rollout.gamma())
                taken = time.perf_counter() - start
                if rollout.controller is not None:
                    rollout.controller.observe(tested, accepted)
                passed += accepted
                whole = whole and len(batch.student.last) == rows
                if whole or not seconds:
                    tokens, seconds = tokens + tested, seconds + taken
        texts = batch.result().tokens
        if self.texts is None:
            self.texts = texts
        elif texts != self.texts[:rows]:
            raise RuntimeError(f"{rollout.settings.implementation} at gamma {rollout.settings.gamma}: other texts")
        return {
            "tokens_per_second": tokens / seconds,
            "acceptance": passed / sum(map(len, texts)),
            "gamma": statistics.mean(batch.gammas),
        }

    def write_each(self, rollout: Callable[[], Rollout], rows: int) -> dict[str, float]:
        """Write rows one at a time."""
        seconds, tokens, found = 0.0, 0, []
        for row in range(rows):
            one = rollout()
            start = time.perf_counter()
            text = one([self.queries[row]], [self.privileged[row]], ids=[row])
            seconds += time.perf_counter() - start
            tokens += text.tested
            found += text.tokens
        if self.texts is not None and found != self.texts[:rows]:
            raise RuntimeError("one row at a time: other texts")
        return {"tokens_per_second": tokens / seconds}

    def assisted(self, rows: int) -> dict[str, float]:
        """Write rows with assisted generation; both models read the privileged prompt, for it knows only one."""
        seconds = tokens = 0.0
        budget = self.sizes.budget
        for row in range(rows):
            torch.manual_seed(row)
            prompt = torch.tensor([self.privileged[row]])
            start = time.perf_counter()
            text = self.teacher.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                assistant_model=self.student,
                max_new_tokens=budget,
                do_sample=True,
                temperature=0.7,
                top_k=0,
                pad_token_id=0,
            )
            seconds += time.perf_counter() - start
            tokens += text.shape[1] - prompt.shape[1]
        return {"tokens_per_second": tokens / seconds}


def measure(sizes: Sizes, repetitions: int, alone: int) -> dict[str, Any]:
    """Let all ways to write take turns; `alone` rows are written one at a time."""
    writers = Writers(sizes)
    rows = sizes.rows
    first = writers.rollout("parallel", 20)
    context = sizes.knowledge + sizes.query + sizes.budget // 2
    costs = measure_costs(first.student, first.teacher, first.settings, rows=rows, context=context)
    ways: dict[str, Callable[[], dict[str, float]]] = {
        f"gamma {gamma}": lambda gamma=gamma: writers.write(writers.rollout("parallel", gamma), rows)
        for gamma in sizes.gammas
    }
    # The controller's first blocks belong to its measurement, as they do in a run.
    ways["adaptive"] = lambda: writers.write(writers.rollout("adaptive", 20, costs=costs), rows)
    ways["one row"] = lambda: writers.write_each(lambda: writers.rollout("adaptive", 20, costs=costs), alone)
    ways["one row, token by token"] = lambda: writers.write_each(lambda: writers.rollout("sequential", 1), alone)
    ways["assisted"] = lambda: writers.assisted(alone)
    taken: dict[str, list[dict[str, float]]] = {name: [] for name in ways}
    for _ in range(repetitions):
        for name, way in ways.items():
            taken[name].append(way())
    found = {
        name: {key: statistics.median(run[key] for run in runs) for key in runs[0]} for name, runs in taken.items()
    }
    return {
        "sizes": asdict(sizes),
        "strength": writers.strength,
        "rows_alone": alone,
        "costs": costs.model_dump(),
        "ways": found,
    }


def claims(result: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the lines that `make bench` reads."""
    sizes, ways = result["sizes"], result["ways"]
    costs = Costs(**result["costs"])
    speed = {name: way["tokens_per_second"] for name, way in ways.items()}
    fixed = {gamma: speed[f"gamma {gamma}"] for gamma in sizes["gammas"]}
    best = max(fixed, key=lambda gamma: fixed[gamma])
    alpha = ways[f"gamma {best}"]["acceptance"]
    plain = sizes["rows"] / costs.teacher_seconds
    expected = expected_speed(alpha, best, costs) * plain
    off = abs(fixed[best] / expected - 1)
    rows = sizes["rows"]
    where = f"alpha {alpha:.2f}, c {costs.student:.2f}"
    lines = [
        (f"tokens/s, adaptive: batch {rows} (peer: batch 1)", speed["adaptive"], speed["one row"], GOAL_BATCH),
        (f"tokens/s, batch {rows} in blocks (peer: one row, token by token)", speed["adaptive"],
         speed["one row, token by token"], GOAL_ORDER),
        (f"tokens/s, adaptive (peer: best fixed gamma, {best}; {where})", speed["adaptive"], fixed[best], GOAL_BEST),
        (f"tokens/s, adaptive (peer: gamma 20; {where})", speed["adaptive"], fixed[20], GOAL_TWENTY),
        (f"tokens/s, batch {rows} (peer: assisted generation, which takes one row)", speed["adaptive"],
         speed["assisted"], GOAL_ASSISTED),
    ]  # fmt: skip
    found = [
        _claim(metric, ours, peer, ours / peer, f">= {goal:g}", ours / peer >= goal)
        for metric, ours, peer, goal in lines
    ]
    metric = f"tokens/s at gamma {best} (peer: the formula; ratio = relative difference; {where})"
    return [*found, _claim(metric, fixed[best], expected, off, f"<= {GOAL_FORMULA:g}", off <= GOAL_FORMULA)]


def _claim(metric: str, ours: float, peer: float, ratio: float, goal: str, holds: bool) -> dict[str, Any]:
    return {
        "benchmark": "speculative_rollout",
        "metric": metric,
        "ours": round(ours, 3),
        "peer": round(peer, 3),
        "ratio": round(ratio, 3),
        "goal": goal,
        "holds": holds,
    }


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
    parser.add_argument("--quick", action="store_true", help="small sizes, to try the script out; no claim")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--alone", type=int, default=2, help="rows that are written one at a time")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    with torch.no_grad():
        result = measure(QUICK if arguments.quick else Sizes(), arguments.repetitions, arguments.alone)
    report = {"machine": machine(arguments.threads), "results": [result], "claims": claims(result)}
    print(json.dumps(result), flush=True)
    if not arguments.quick:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / "speculative_rollout.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    for line in report["claims"]:
        print(json.dumps(line))


if __name__ == "__main__":
    main()

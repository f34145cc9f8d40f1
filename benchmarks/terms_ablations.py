"""Term losses on unseen words: short trainings from term mappings alone, three seeds a variant.

Every student starts as the static encoder of `splade-v19-small` (trained once) and reads only the term list; the seed
changes the order of the rows. Measured on the head words that were kept out (`data.held_out_terms`): shares of expected
English terms among the 10 and 50 heaviest, of Korean ones, of noise, and the active terms of a head word. Prints a
Markdown table of means with the range over seeds, for docs/experiments.md.

Run: python benchmarks/terms_ablations.py [--data ../shared/data] [--steps 200] [--seeds 1 2 3] [--only NAME ...]
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from pathlib import Path

from soju.core.config import apply_overrides, parse_yaml, preset_text
from soju.core.progress import set_quiet
from soju.core.run import Run
from soju.sparse.config import TermsConfig
from soju.sparse.data import RunData
from soju.sparse.evaluate import Subject, score_unseen_terms
from soju.sparse.initial import Start
from soju.sparse.neural import train
from soju.sparse.neural_encoders import NeuralEncoder
from soju.sparse.recipe import RECIPE, read_run_data
from soju.sparse.terms.training import TermsLesson

PRESET = "splade-v19-small"
TERMS_ALONE = [
    "data.pairs_as_rows=false", "data.both_directions=false", "losses.translation=0", "losses.self_terms=3",
    "losses.korean_terms=2", "losses.english_terms=12", "losses.margin=2", "losses.flops=5.0e-5",
    "evaluation.sets=[]",
]  # fmt: skip
VARIANTS: dict[str, list[str]] = {
    "signed": [],
    "v19": ["losses.terms=v19"],
    "signed, no penalty": ["losses.flops=0"],
    "signed, penalty × 100": ["losses.flops=5.0e-3"],
}
COLUMNS = ("activation.en@10", "activation.en@50", "preservation.ko@50", "noise@50", "active terms")


def config_of(arguments: argparse.Namespace, seed: int, overrides: list[str]) -> TermsConfig:
    """Return the preset, cut down to the term list, with one variant's overrides."""
    changes = [
        f"data.root={arguments.data}", f"training.max_steps={arguments.steps}",
        f"training.eval_steps={arguments.steps}",
    ]  # fmt: skip
    values = parse_yaml(preset_text(PRESET), place=PRESET)
    config = RECIPE.configure(apply_overrides(values, [*changes, *TERMS_ALONE, *overrides]), place=PRESET)
    assert isinstance(config, TermsConfig)
    return config.model_copy(update={"seed": seed})


def measure(start: Start, data: RunData, config: TermsConfig) -> dict[str, float]:
    """Train one student and return what its unseen words activate."""
    folder = Path(tempfile.mkdtemp())
    try:
        trained = train(TermsLesson(config, data.training, start.vocabulary, folder), start.student)
        return unseen(NeuralEncoder.load(trained.last), start, data)
    finally:
        shutil.rmtree(folder)


def unseen(encoder: NeuralEncoder, start: Start, data: RunData) -> dict[str, float]:
    """Return the measures of the columns."""
    rows = data.training.unseen_terms
    scores = score_unseen_terms(Subject("student", encoder), rows, vocabulary=start.vocabulary)
    found = {score.name: score.value for score in scores}
    found["active terms"] = encoder.encode_queries([row.ko for row in rows]).nnz / len(rows)
    return found


def main() -> None:
    """Print one row a variant, as it is measured."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", default="../shared/data")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--only", nargs="*", default=None, help="names of variants")
    parser.add_argument("--start", type=Path, help="run folder whose static encoder and untrained student are used")
    arguments = parser.parse_args()
    set_quiet(True)
    base = config_of(arguments, 13, [])
    data = read_run_data(base)
    with tempfile.TemporaryDirectory() as temporary:
        start = Start(base, Run(arguments.start or Path(temporary)), data, workers=2)
        start.prepare()
        print("| variant | " + " | ".join(COLUMNS) + " |\n| --- |" + " ---: |" * len(COLUMNS))
        before = unseen(NeuralEncoder(start.student()), start, data)
        print("| before training | " + " | ".join(f"{before[name]:.3f}" for name in COLUMNS) + " |", flush=True)
        for name, overrides in VARIANTS.items():
            if arguments.only is not None and name not in arguments.only:
                continue
            runs = [measure(start, data, config_of(arguments, seed, overrides)) for seed in arguments.seeds]
            cells = []
            for column in COLUMNS:
                values = [run[column] for run in runs]
                cells.append(f"{sum(values) / len(values):.3f} [{min(values):.3f}, {max(values):.3f}]")
            print(f"| {name} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()

"""Compare what two checkouts of soju compute, byte by byte: the proof that a refactoring moved no number.

    python tests/invariant/same_bytes.py OLD_CHECKOUT NEW_CHECKOUT --work FOLDER [--without embedding ...]

Both checkouts run the same commands with one thread and this interpreter: every pico recipe, an index of the samples
and a search in it. Weights, vectors, index arrays, tokenizers, scores, histories and verdicts must be equal; resolved
configurations must be equal after `RENAMED` and `ADDED`. Times, environments, manifests and pages are left out. Runs of
a checkout that are in the folder already are not repeated, so that a series of changes is compared with one old run.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

TRAINING = ("training", "stage1", "stage2", "stage3", "supervised", "distillation")
"""Sections that hold training settings."""
RENAMED = {
    "batch_size": "per_device_train_batch_size",
    "accumulation": "gradient_accumulation_steps",
    "epochs": "num_train_epochs",
    "warm_up": "warmup_steps",
    "max_gradient_norm": "max_grad_norm",
    "validate_every": "eval_steps",
    "log_every": "logging_steps",
    "keep_checkpoints": "save_total_limit",
    "mini_batch": "mini_batch_size",
    "start_weight": "l2_sp_weight",
    "save_every": "save_steps",
}
"""Old settings in the sections of `TRAINING` and what they are called now."""
GONE = ("hmm_iterations",)
"""Settings that are gone; 0 was their value in every preset."""
ADDED = {"report_to": ["tensorboard"], "patience": None}
"""Settings that did not exist everywhere, with the value that does what was done without them."""

LEFT_OUT_SCORES = {"index bytes"}
"""Scores that are left out: the size of an index counts the settings in its ``index.json``."""
LEFT_OUT = {"manifest.json", "environment.json", "trainer_state.json", "config.yaml", "story.json"}
LEFT_OUT |= {"README.md", "report.html", "report.md"}
TIMED = {"seconds", "ms", "milliseconds", "texts/second", "texts/s", "sentences/s", "characters/s", "s", "GiB"}

TRIPLETS = """
recipe: splade
mode: triplets
name: triplets-pico
seed: 13
data: {triplets: [triplets.jsonl], passages: ["samples:passages.train"], terms: ["samples:terms.train"], dev_share: 0.1}
student:
  init: lexical
  hidden_size: 32
  layers: 1
  heads: 2
  intermediate_size: 32
  static: {tokenizer: {min_count: 1, sub_words: 500}}
similarity: cosine
losses: {form: signed, infonce: 2.5, self_terms: 0.1, positive_terms: 0.1, flops: 0.003}
sparsity: {query_terms: 20, document_terms: 24}
curriculum:
  - {share: 0.5, temperature: 0.08, mix: {cross_lingual: 0.7, monolingual: 0.3}}
  - {share: 0.5, temperature: 0.05, learning_rate: 0.5, mix: {cross_lingual: 0.5, monolingual: 0.5}}
training: {TRAINING}
evaluation:
  sets: [{name: samples.heldout, passages: ["samples:passages.heldout"]}]
"""
OLD_TRAINING = """{batch_size: 8, max_steps: 12, learning_rate: 1.0e-3, mixed_precision: "off", validate_every: 4,
  log_every: 2}"""
NEW_TRAINING = """{per_device_train_batch_size: 8, max_steps: 12, learning_rate: 1.0e-3, mixed_precision: "off",
  eval_steps: 4, logging_steps: 2}"""


def main() -> int:
    """Run both checkouts where needed and print what differs; 1 if anything does."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--without", nargs="*", default=[], help="parts that are neither run nor compared")
    arguments = parser.parse_args()
    without = set(arguments.without)
    folders = [run_all(arguments.old.resolve(), arguments.work / "old", without, old=True)]
    folders.append(run_all(arguments.new.resolve(), arguments.work / "new", without, old=False))
    compared, differences = compare(*folders, without)
    print("\n".join(differences))
    print(f"{compared} files compared, {len(differences)} differ")
    return 1 if differences or not compared else 0


def run_all(checkout: Path, work: Path, without: set[str], *, old: bool) -> Path:
    """Run the commands of one checkout into a folder."""
    work.mkdir(parents=True, exist_ok=True)
    if (work / "finished").is_file():
        return work
    triplets(work / "triplets.jsonl", checkout)
    training = OLD_TRAINING if old else NEW_TRAINING
    (work / "triplets.yaml").write_text(TRIPLETS.replace("{TRAINING}", training), encoding="utf-8")
    corpus = checkout / "src/soju/samples/passages.heldout.jsonl"
    rows = [json.loads(line) for line in corpus.read_text(encoding="utf-8").splitlines()]
    lines = [json.dumps({"id": row["id"], "text": row["en"]}, ensure_ascii=False) for row in rows]
    (work / "corpus.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    for name, command in {
        "static": ["train", "splade-static-samples", "--out", "static"],
        "terms": ["train", "splade-pico", "--out", "terms"],
        "triplets": ["train", "triplets.yaml", "--out", "triplets"],
        "embedding": ["train", "embedding-pico", "--out", "embedding"],
        "index": ["index", "static/final", "corpus.jsonl", "index"],
        "neural-index": ["index", "terms/best", "corpus.jsonl", "neural-index"],
        "search.json": ["search", "index", "심장 혈관이 막혔을 때 가슴 통증", "--json"],
        "vectors": ["vectors", "static/final", "corpus.jsonl", "vectors", "--to", "opensearch"],
    }.items():
        if name in without:
            continue
        shutil.rmtree(work / name, ignore_errors=True)
        print(f"{checkout.name}: soju {' '.join(command)}", file=sys.stderr)
        printed = soju(checkout, command, work)
        if name.endswith(".json"):
            (work / name).write_text(printed, encoding="utf-8")
    if not without:
        (work / "finished").touch()
    return work


def soju(checkout: Path, command: list[str], folder: Path) -> str:
    """Run one verb of a checkout with one thread; return what it printed."""
    threads = dict.fromkeys(("OMP", "MKL", "OPENBLAS", "NUMBA"), "1")
    environment = {f"{name}_NUM_THREADS": value for name, value in threads.items()}
    environment |= {"PYTHONPATH": str(checkout / "src"), "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(
        [sys.executable, "-m", "soju", "-q", "--offline", *command],
        cwd=folder, env={**os.environ, **environment}, check=True, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    return done.stdout


def triplets(path: Path, checkout: Path) -> None:
    """Write triplets made of the samples: the answer of a question, and that of another of the same domain."""
    file = checkout / "src/soju/samples/passages.train.jsonl"
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    lines = []
    for place, row in enumerate(rows):
        other = rows[(place + 1) % len(rows)]
        for kind, query in (("cross_lingual", row["query_ko"]), ("monolingual", row["query_en"])):
            triplet = {"query": query, "positive": row["en"], "negative": other["en"], "pair_type": kind}
            lines.append(json.dumps({**triplet, "difficulty": "hard"}, ensure_ascii=False))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def compare(old: Path, new: Path, without: set[str]) -> tuple[int, list[str]]:
    """Return how many files were compared and a line for each that differs or is on one side only."""
    ours, theirs = ({str(path) for path in files(side) if path.parts[0] not in without} for side in (old, new))
    alone = {"old": ours - theirs, "new": theirs - ours}
    differences = [f"only in {side}: {path}" for side, paths in alone.items() for path in sorted(paths)]
    common = sorted(ours & theirs)
    differences += [path for path in common if content(old / path, old=True) != content(new / path, old=False)]
    return len(common), differences


def files(folder: Path) -> Iterator[Path]:
    """Yield what is compared of a folder, relative to it."""
    for path in sorted(folder.rglob("*")):
        parts = path.relative_to(folder).parts
        hidden = {"tensorboard", "plots"} & set(parts) or parts[-1] in LEFT_OUT or path.suffix in (".pt", ".pth")
        if path.is_file() and not hidden and (len(parts) > 1 or parts[0] == "search.json"):
            yield path.relative_to(folder)


def content(path: Path, *, old: bool) -> Any:
    """Return what must be equal of a file: its bytes, or its values without times."""
    if path.suffix == ".jsonl" and path.name in ("history.jsonl", "verdicts.jsonl", "rollbacks.jsonl", "probes.jsonl"):
        return [timeless(json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]
    if path.name == "figures.json":  # the series of a figure are in the order of the losses; a title is wording
        figures = timeless(json.loads(path.read_text(encoding="utf-8")))
        ordered = [sorted(figure["series"], key=lambda one: one["name"]) for figure in figures]
        return [{**figure, "title": "", "series": series} for figure, series in zip(figures, ordered, strict=True)]
    if path.suffix == ".json":
        values = timeless(json.loads(path.read_text(encoding="utf-8")))
        if path.name == "index.json":
            values["settings"].pop("seismic", None)  # an engine that is gone
        if path.name == "training_args.json":
            values.pop("warmup_steps", None)  # recipe `embedding` kept it apart; the schedule shows in the weights
        return values
    if path.suffix in (".yaml", ".yml"):
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
        return without_added(renamed(values) if old else values)
    return path.read_bytes()


def timeless(value: Any) -> Any:
    """Leave out scores of time, what names a machine or a moment, and fingerprints, which cover model cards."""
    if isinstance(value, list):
        return [timeless(item) for item in value if not (isinstance(item, Mapping) and _is_left_out(item))]
    if isinstance(value, Mapping):
        hidden = ("seconds", "time", "started", "finished", "host", "memory", "fingerprint")
        return {key: timeless(item) for key, item in value.items() if not any(word in str(key) for word in hidden)}
    return value


def _is_left_out(score: Mapping[str, Any]) -> bool:
    return score.get("unit") in TIMED or score.get("name") in LEFT_OUT_SCORES


def renamed(value: Any, section: str = "") -> Any:
    """Give the settings of an old configuration their new names."""
    if isinstance(value, list):
        return [renamed(item, section) for item in value]
    if not isinstance(value, Mapping):
        return value
    names = RENAMED if section in TRAINING else {}
    return {names.get(key, key): renamed(item, key) for key, item in value.items() if key not in GONE}


def without_added(value: Any) -> Any:
    """Leave out settings of `ADDED` that have the value of before."""
    if isinstance(value, list):
        return [without_added(item) for item in value]
    if not isinstance(value, Mapping):
        return value
    return {key: without_added(item) for key, item in value.items() if not (key in ADDED and item == ADDED[key])}


if __name__ == "__main__":
    sys.exit(main())

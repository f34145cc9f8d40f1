"""What the report shows of a training from triplets.

Distil queries with good and bad answers into a neural Korean–English sparse encoder (the published v22 and v23).
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from accelerate import PartialState
from transformers.utils.logging import disable_progress_bar

from soju.core.files import read_json_lines, write_json
from soju.core.run import RunDirectory
from soju.data.splits import spread
from soju.sparse.data import RunData, read_run_data
from soju.sparse.evaluate import Subject
from soju.sparse.finish import Start, curves, loss_panels, measure, report, save_models
from soju.sparse.model import NeuralEncoder
from soju.sparse.term_activation import PROBES
from soju.sparse.triplets.config import TripletsConfig
from soju.sparse.triplets.losses import TripletsLoss
from soju.sparse.triplets.rows import TripletRows, teacher_scores, triplet_rows
from soju.sparse.triplets.training import planned_steps, train_student
from soju.training.ranks import join_ranks
from soju.training.rollback import Trained

_SPARSITY = {
    "loss_active_query": "active terms of queries",
    "loss_active_document": "active terms of documents",
    "loss_flops_weight_query": "penalty weight, queries",
    "loss_flops_weight_document": "penalty weight, documents",
}
_VALIDATED = {"eval_mrr@10": "MRR@10", "eval_recall@1": "recall@1", "eval_recall@10": "recall@10"}


def training_figures(run_folder: Path, config: TripletsConfig) -> list[dict[str, Any]]:
    """Describe the curves of ``history.jsonl``."""
    history = read_json_lines(run_folder / "history.jsonl")
    ends = ", ".join(f"{stage.share:.0%} at τ {stage.temperature:g}" for stage in config.curriculum)
    figures: list[dict[str, Any]] = [
        {
            "id": "training_curves",
            "title": "Training curves",
            "caption": f"Raw, unweighted losses; the total is weighted. Stages of the curriculum: {ends}.",
            "kind": "grid",
            "x_label": "step",
            "series": curves(history, loss_panels(TripletsLoss)),
        },
        {
            "id": "loss_shares",
            "title": "What the total is made of",
            "caption": "Share of each weighted loss in the sum of their sizes.",
            "kind": "line",
            "x_label": "step",
            "y_label": "share",
            "series": curves(history, {f"loss_share_{row.name}": row.label for row in TripletsLoss.rows}),
        },
        {
            "id": "sparsity",
            "title": "Active terms and what holds them",
            "caption": _wanted(config),
            "kind": "grid",
            "x_label": "step",
            "series": curves(history, _SPARSITY),
        },
        {
            "id": "validation",
            "title": "Development queries, none of them trained on",
            "caption": "Each is searched among the texts of all development triplets.",
            "kind": "line",
            "x_label": "step",
            "y_label": "score",
            "series": curves(history, _VALIDATED),
        },
    ]
    return [figure for figure in figures if figure["series"]]


def in_words(rows: TripletRows, trained: Trained, config: TripletsConfig) -> list[str]:
    """Tell the training in plain words."""
    counts = rows.counts
    sentences = [
        f"{counts.kept:,} triplets of {counts.texts:,} different texts; {counts.without_terms + counts.banned:,} rows "
        f"were rejected. {len(config.curriculum)} stages."
    ]
    if trained.attempts > 1:
        sentences.append(f"Training was rolled back {trained.attempts - 1} times; rollbacks.jsonl says why.")
    return sentences


def _wanted(config: TripletsConfig) -> str:
    wanted = [
        f"{number:g} of a {side}"
        for side, number in (("query", config.sparsity.query_terms), ("document", config.sparsity.document_terms))
        if number is not None
    ]
    if not wanted:
        return "Nothing was asked for: the penalty's weight follows its schedule alone."
    return f"Asked for: {' and '.join(wanted)}; the weights of the penalty are steered towards it."


def run(
    config: TripletsConfig,
    run_dir: RunDirectory,
    *,
    data: RunData | None = None,
    resume: Path | None = None,
    workers: int = 2,
) -> Path:
    """Train, score and report.

    Args:
        config: What to do.
        run_dir: Where everything goes.
        data: What `read_run_data` read, when that was done before the folder was made.
        resume: A checkpoint to go on from; see `train_student`.
        workers: Threads of the morphological analyser.

    Returns:
        The HTML report.

    Raises:
        UserError: If data, student or teacher cannot be used; what was trained so far stays.
    """
    disable_progress_bar()  # of the libraries: they would draw one for every file of weights
    config.training.refuse_missing_device()
    join_ranks()

    # 1. Read the data; refuse broken rows and evaluation texts that were trained on.
    data = data or read_run_data(config)

    # 2. Build the student as it starts: a model, a run of ours, or from scratch on top of a static encoder.
    start = Start(config, run_dir, data.training, workers=workers)
    with PartialState().main_process_first():
        start.prepare()
    vocabulary, length = start.vocabulary, config.student.max_length

    # 3. Turn triplets into rows; ask the teacher about all of them once.
    banned = [probe.source for probe in PROBES]
    rows = triplet_rows(data.training.triplets, vocabulary, max_length=length, banned=banned)
    dev = triplet_rows(spread(data.training.dev_triplets, config.data.dev_rows), vocabulary, max_length=length)
    if PartialState().is_main_process:
        planned = {**asdict(rows.counts), "dev": len(dev), **planned_steps(rows, config.training)}
        write_json(run_dir.path / "data.json", {**data.training.statistics, "rows": planned})
    taught = config.losses.distillation > 0
    with PartialState().main_process_first():
        teacher = teacher_scores(config.teacher, rows, seed=config.seed) if taught and config.teacher else None

    # 4. Train through the curriculum, validate, judge; roll back what regresses.
    trained = train_student(
        start.student,
        rows,
        dev,
        teacher,
        vocabulary,
        config,
        run_dir.path,
        resume=resume,
        distractors=spread(rows.texts, config.data.dev_distractors),
    )
    if not PartialState().is_main_process:
        return run_dir.path / "report.html"

    # 5. Save the best and the last as stock models, and from here on use what was saved.
    student = save_models(trained, run_dir)

    # 6. Score it, with either similarity, against itself untrained, the static encoder, BM25, dictionary and teacher.
    other = "dot" if config.similarity == "cosine" else "cosine"
    with_other = Subject(f"soju student ({other})", NeuralEncoder(student.model, similarity=other))
    taught = taught and config.teacher is not None and config.teacher.kind == "bi_encoder"
    measured = measure(student, start, data, config, run_dir, taught=taught, more=[with_other], workers=workers)

    # 7. Show how it learned, what texts expand to and what a search finds; report.
    figures, summary = training_figures(run_dir.path, config), in_words(rows, trained, config)
    return report(student, measured, data, config, run_dir, figures=figures, summary=summary, taught=taught)

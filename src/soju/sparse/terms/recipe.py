"""What the report shows of a training from term mappings.

Distil a dense teacher and a term mapping into a neural Korean–English sparse encoder (the published v19).
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from accelerate import PartialState
from transformers.utils.logging import disable_progress_bar

from soju.core.files import read_json_lines, write_json
from soju.core.run import RunDirectory
from soju.sparse.data import RunData, read_run_data
from soju.sparse.finish import Start, curves, loss_panels, measure, report, save_models, teacher_embeddings
from soju.sparse.term_activation import PROBES
from soju.sparse.terms.config import TermsConfig
from soju.sparse.terms.losses import TermsLoss
from soju.sparse.terms.rows import TrainingRows, training_rows
from soju.sparse.terms.training import planned_steps, train_student
from soju.training.ranks import join_ranks
from soju.training.rollback import Trained

_VALIDATED = {
    "eval_activation.en@50": "activation, English",
    "eval_preservation.ko@50": "preservation, Korean",
    "eval_noise@50": "noise",
}


def training_figures(run_folder: Path) -> list[dict[str, Any]]:
    """Describe the curves of ``history.jsonl`` and ``probes.jsonl``."""
    history = read_json_lines(run_folder / "history.jsonl")
    probes = read_json_lines(run_folder / "probes.jsonl")
    figures = [
        {
            "id": "training_curves",
            "title": "Training curves",
            "caption": "Raw, unweighted losses, each the mean since the row before; the total is weighted.",
            "kind": "grid",
            "x_label": "step",
            "series": curves(history, loss_panels(TermsLoss)),
        },
        {
            "id": "validation",
            "title": "Development words, none of them trained on",
            "caption": "Shares of expected terms among the 50 heaviest, and of noise among all of them.",
            "kind": "line",
            "x_label": "step",
            "y_label": "share",
            "series": curves(history, _VALIDATED),
        },
        {
            "id": "probes",
            "title": "The published probes",
            "caption": "For display: about 25 tokens in all. Nothing is chosen by them.",
            "kind": "line",
            "x_label": "step",
            "y_label": "share",
            "series": curves(probes, {name: name for name in ("activation", "preservation", "noise")}),
        },
    ]
    return [figure for figure in figures if figure["series"]]


def run(
    config: TermsConfig,
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

    # 2. Build the student as it starts; from scratch, on top of a static encoder. Both are kept for comparison.
    start = Start(config, run_dir, data.training, workers=workers)
    with PartialState().main_process_first():
        start.prepare()
    vocabulary = start.vocabulary

    # 3. Turn term mappings, and pairs if wanted, into rows; embed what the teacher reads once, cached by content.
    taught = config.losses.distillation > 0
    banned = [probe.source for probe in PROBES]
    rows = training_rows(data.training.terms, data.training.pairs, vocabulary, config, banned=banned)
    if PartialState().is_main_process:
        planned = {**asdict(rows.counts), **planned_steps(rows, config.training)}
        write_json(run_dir.path / "data.json", {**data.training.statistics, "rows": planned})
    with PartialState().main_process_first():
        vectors = teacher_embeddings(config.teacher, rows.teacher_texts) if taught and config.teacher else None

    # 4. Train, validate, judge; roll back what regresses.
    trained = train_student(
        start.student, rows, vectors, vocabulary, data.training.dev_terms, config, run_dir.path, resume=resume
    )
    if not PartialState().is_main_process:
        return run_dir.path / "report.html"

    # 5. Save the best and the last as stock models, and from here on use what was saved.
    student = save_models(trained, run_dir)

    # 6. Score it against itself untrained, the static encoder, BM25, dictionary look-up and the teacher.
    measured = measure(student, start, data, config, run_dir, taught=taught, workers=workers)

    # 7. Show how it learned, what texts expand to and what a search finds; report.
    figures, summary = training_figures(run_dir.path), in_words(rows, trained)
    return report(student, measured, data, config, run_dir, figures=figures, summary=summary, taught=taught)


def in_words(rows: TrainingRows, trained: Trained) -> list[str]:
    """Tell the training in plain words."""
    counts = rows.counts
    sentences = [
        f"{counts.kept:,} rows ({counts.texts:,} texts) taught {counts.korean_targets:,} Korean and "
        f"{counts.english_targets:,} English target tokens; {counts.with_english / max(1, counts.texts):.0%} of the "
        f"texts have English targets. {counts.without_source + counts.without_target:,} rows were rejected."
    ]
    if trained.attempts > 1:
        sentences.append(f"Training was rolled back {trained.attempts - 1} times; rollbacks.jsonl says why.")
    return sentences

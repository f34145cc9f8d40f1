"""Distil queries with good and bad answers into a neural Korean–English sparse encoder (the published v22 and v23)."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from accelerate import PartialState
from transformers.utils.logging import disable_progress_bar

from soju.core.files import write_json
from soju.core.run_directory import RunDirectory
from soju.data.spreading import spread
from soju.sparse.arguments import refuse_missing_device
from soju.sparse.finishing import measure, report, save_models
from soju.sparse.neural_encoders import NeuralEncoder
from soju.sparse.probes import PROBES
from soju.sparse.reading import RunData, read_run_data
from soju.sparse.scoring import Subject
from soju.sparse.start import Start
from soju.sparse.triplets.config import TripletsConfig
from soju.sparse.triplets.report import in_words, training_figures
from soju.sparse.triplets.rows import triplet_rows
from soju.sparse.triplets.teacher import teacher_scores
from soju.sparse.triplets.training import planned_steps, train_student
from soju.training.ranks import join_ranks


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
    refuse_missing_device(config.training)
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

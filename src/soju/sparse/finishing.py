"""After training: keep the best and the last as stock models, score the best, write the report."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from soju.core.files import write_json, write_manifest, write_text
from soju.core.run_directory import RunDirectory
from soju.report.run_report import write_report
from soju.sparse.comparing import write_query_scores
from soju.sparse.indexing import expand
from soju.sparse.neural_encoders import NeuralEncoder
from soju.sparse.reading import RunData
from soju.sparse.scoring import STUDENT, SUBJECT, Measured, Subject, score
from soju.sparse.showing import example_searches
from soju.sparse.splade_encoder import SpladeEncoder
from soju.sparse.start import Start, dense_searcher
from soju.sparse.student_config import NeuralConfig
from soju.sparse.student_report import student_card
from soju.training.judged_training import Trained

UNTRAINED = "untrained student"
BEFORE = "student before"
"""Of a student that goes on from a model that was trained already."""


def save_models(trained: Trained, run_dir: RunDirectory) -> NeuralEncoder:
    """Save the best and the last checkpoint as stock models; return the best as it was saved."""
    for checkpoint, folder in ((trained.best, run_dir.best), (trained.last, run_dir.final)):
        SpladeEncoder(str(checkpoint), device="cpu").save(str(folder), create_model_card=False)
    return NeuralEncoder(SpladeEncoder(str(run_dir.best), device="cpu"))


def measure(
    student: NeuralEncoder,
    start: Start,
    data: RunData,
    config: NeuralConfig,
    run_dir: RunDirectory,
    *,
    taught: bool,
    more: Sequence[Subject] = (),
    workers: int,
) -> Measured:
    """Score a student and write down what was measured.

    Args:
        student: The best model as it was saved.
        start: Itself untrained, and the static encoder below it.
        data: What to measure on.
        config: Settings of the run.
        run_dir: Gets scores, per-query scores and comparisons.
        taught: Whether a teacher took part, which then has a row of its own if it reads both languages.
        more: Further systems.
        workers: Threads of the morphological analyser.

    Returns:
        Everything that was measured, against BM25 and dictionary look-up too.
    """
    before = BEFORE if config.student.init == "pretrained" else UNTRAINED
    subjects = [Subject(STUDENT, student), *more, Subject(before, NeuralEncoder(start.student()))]
    if start.static is not None:
        subjects.append(Subject(SUBJECT, start.static, start.search))
    measured = score(
        subjects,
        data,
        config,
        run_dir.best,
        teacher=dense_searcher(config.teacher) if taught else None,
        vocabulary=start.vocabulary,
        workers=workers,
    )
    run_dir.write_scores(measured.scores)
    write_query_scores(run_dir.path, measured.per_query)
    write_json(run_dir.path / "comparisons.json", [comparison.to_json() for comparison in measured.comparisons])
    return measured


def report(
    student: NeuralEncoder,
    measured: Measured,
    data: RunData,
    config: NeuralConfig,
    run_dir: RunDirectory,
    *,
    figures: Sequence[dict[str, Any]],
    summary: Sequence[str],
    taught: bool,
) -> Path:
    """Write model cards, expansions, example searches, and the report.

    Args:
        student: The best model.
        measured: What `measure` returned.
        data: What the run read.
        config: Settings of the run.
        run_dir: The run folder.
        figures: How it learned; shown before what was measured.
        summary: The run in plain words, a sentence each; recall is added to it.
        taught: Whether a teacher took part.

    Returns:
        The HTML report.
    """
    write_json(run_dir.path / "figures.json", [*figures, *measured.figures])
    for folder in (run_dir.best, run_dir.final):
        write_text(folder / "README.md", student_card(config, data, measured.scores, taught=taught))
        write_manifest(folder)
    expansions = expand(student, config.evaluation.probes)
    write_json(run_dir.path / "expansions.json", [expansion.model_dump(mode="json") for expansion in expansions])
    searches = example_searches(student, data.evaluation, config.evaluation, run_dir, run_dir.best)
    write_json(run_dir.path / "searches.json", searches)
    sentences = [*summary, *_recalls(measured)]
    write_json(run_dir.path / "story.json", {"title": config.name, "summary": sentences, "steps": []})
    return write_report(run_dir.path)


def _recalls(measured: Measured) -> list[str]:
    recalls = [item for item in measured.scores if item.name == "recall@10"]
    sentences: list[str] = []
    for name in dict.fromkeys(item.test_set for item in recalls):
        found = {item.subject: item.value for item in recalls if item.test_set == name}
        others = ", ".join(
            f"{subject} {found[subject]:.3f}" for subject in (UNTRAINED, BEFORE, SUBJECT) if subject in found
        )
        sentences.append(f"Recall@10 on {name}: student {found[STUDENT]:.3f} ({others}).")
    return sentences

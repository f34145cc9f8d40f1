"""Distil a dense teacher and a term mapping into a neural Korean–English sparse encoder (the published v19)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import PartialState
from numpy.typing import NDArray
from transformers.utils.logging import disable_progress_bar

from soju.core.errors import IntegrityError
from soju.core.files import verify_manifest, write_json, write_manifest, write_text
from soju.core.run_directory import RunDirectory
from soju.models.precomputed import precomputed_embeddings
from soju.models.splade_encoder import SpladeEncoder
from soju.models.static_encoder import StaticEncoder
from soju.models.teacher import SentenceTransformerTeacher
from soju.models.teacher_cache import Embeddings, cached_embeddings
from soju.recipes.splade.comparing import write_query_scores
from soju.recipes.splade.config import SearchSettings, StaticConfig
from soju.recipes.splade.encoders import NeuralEncoder
from soju.recipes.splade.indexing import expand
from soju.recipes.splade.probes import PROBES
from soju.recipes.splade.reading import RunData, read_run_data
from soju.recipes.splade.recipe import example_searches
from soju.recipes.splade.scoring import STUDENT, SUBJECT, Embed, Measured, Subject, score
from soju.recipes.splade.static_training import train_static
from soju.recipes.splade.student import (
    Vocabulary,
    lexicon_vocabulary,
    plain_vocabulary,
    pretrained_student,
    scratch_student,
)
from soju.recipes.splade.term_rows import TrainingRows, training_rows
from soju.recipes.splade.terms_config import PretrainedStudent, ScratchStudent, TeacherSettings, TermsConfig
from soju.recipes.splade.terms_report import student_card, training_figures
from soju.recipes.splade.terms_training import Trained, planned_steps, refuse_missing_device, train_student
from soju.report.run_report import write_report
from soju.training.ranks import join_ranks

UNTRAINED = "untrained student"


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
    refuse_missing_device(config.training)
    join_ranks()

    # 1. Read the data; refuse broken rows and evaluation texts that were trained on.
    data = data or read_run_data(config)

    # 2. Build the student as it starts; from scratch, on top of a static encoder. Both are kept for comparison.
    start = Start(config, run_dir, data, workers=workers)
    with PartialState().main_process_first():
        start.prepare()
    vocabulary = start.vocabulary

    # 3. Turn term mappings, and pairs if wanted, into rows; embed what the teacher reads once, cached by content.
    banned = [probe.source for probe in PROBES]
    rows = training_rows(data.training.terms, data.training.pairs, vocabulary, config, banned=banned)
    if PartialState().is_main_process:
        planned = {**asdict(rows.counts), **planned_steps(rows, config.training)}
        write_json(run_dir.path / "data.json", {**data.training.statistics, "rows": planned})
    with PartialState().main_process_first():
        vectors = teacher_vectors(config, rows)

    # 4. Train, validate, judge; roll back what regresses.
    trained = train_student(
        start.student, rows, vectors, vocabulary, data.training.dev_terms, config, run_dir.path, resume=resume
    )
    if not PartialState().is_main_process:
        return run_dir.path / "report.html"

    # 5. Save the best and the last as stock models, and from here on use what was saved.
    for checkpoint, folder in ((trained.best, run_dir.best), (trained.last, run_dir.final)):
        SpladeEncoder(str(checkpoint), device="cpu").save(str(folder), create_model_card=False)
    student = NeuralEncoder(SpladeEncoder(str(run_dir.best), device="cpu"))

    # 6. Score it against itself untrained, the static encoder, BM25, dictionary look-up and the teacher.
    subjects = [Subject(STUDENT, student), Subject(UNTRAINED, NeuralEncoder(start.student()))]
    if start.static is not None:
        subjects.append(Subject(SUBJECT, start.static, start.search))
    measured = score(
        subjects, data, config, run_dir.best, teacher=_embed_with(config), vocabulary=vocabulary, workers=workers
    )
    write_measured(run_dir, measured)

    # 7. Show how it learned, what texts expand to and what a search finds; report.
    measured.figures = [*training_figures(run_dir.path), *measured.figures]
    write_json(run_dir.path / "figures.json", measured.figures)
    for folder in (run_dir.best, run_dir.final):
        write_text(folder / "README.md", student_card(config, data, measured.scores))
        write_manifest(folder)
    expansions = expand(student, config.evaluation.probes)
    write_json(run_dir.path / "expansions.json", [expansion.model_dump(mode="json") for expansion in expansions])
    searches = example_searches(student, data.evaluation, config.evaluation, run_dir, run_dir.best)
    write_json(run_dir.path / "searches.json", searches)
    write_json(run_dir.path / "story.json", story(config, rows, trained, measured))
    return write_report(run_dir.path)


class Start:
    """The student before its first step, and the static encoder below it; kept in the run folder."""

    def __init__(self, config: TermsConfig, run_dir: RunDirectory, data: RunData, *, workers: int) -> None:
        self._config = config
        self._data = data
        self._workers = workers
        self._static_folder = run_dir.path / "static"
        self._student_folder = run_dir.path / "untrained"

    def prepare(self) -> None:
        """Make whatever an earlier start of this run has not finished."""
        config = self._config.student
        if isinstance(config, ScratchStudent) and not _is_whole(self._static_folder):
            settings = StaticConfig(
                recipe="splade",
                mode="static",
                name=self._config.name,
                seed=self._config.seed,
                data=self._config.data.model_dump(include={"root", "pairs", "passages", "select"}),
                **config.static.model_dump(),
            )
            training = self._data.training
            train_static(training.pairs, training.terms, settings, workers=self._workers).save(self._static_folder)
        if not _is_whole(self._student_folder):
            self._build().save(str(self._student_folder), create_model_card=False)
            write_manifest(self._student_folder)

    def _build(self) -> SpladeEncoder:
        config, similarity = self._config.student, self._config.similarity
        if isinstance(config, PretrainedStudent):
            return pretrained_student(config, similarity=similarity)
        assert self.static is not None
        texts = [text for pair in self._data.training.pairs for text in (pair.ko, pair.en)]
        return scratch_student(self.static, config, texts, similarity=similarity, seed=self._config.seed)

    @cached_property
    def static(self) -> StaticEncoder | None:
        """The static encoder; none below a pretrained student."""
        return StaticEncoder.load(self._static_folder) if isinstance(self._config.student, ScratchStudent) else None

    @property
    def search(self) -> SearchSettings:
        """How the static encoder's documents are weighted."""
        config = self._config.student
        return config.static.search if isinstance(config, ScratchStudent) else SearchSettings()

    def student(self) -> SpladeEncoder:
        """Return a fresh copy of the student as it starts."""
        return SpladeEncoder(str(self._student_folder), max_seq_length=self._config.student.max_length)

    @cached_property
    def vocabulary(self) -> Vocabulary:
        """What the ids of its vocabulary mean."""
        tokenizer = self.student().tokenizer
        return plain_vocabulary(tokenizer) if self.static is None else lexicon_vocabulary(tokenizer, self.static)


def teacher_vectors(config: TermsConfig, rows: TrainingRows) -> Embeddings | None:
    """Embed what the teacher reads, or look it up in the user's own vectors; none without distillation."""
    if config.losses.distillation == 0 or config.teacher is None:
        return None
    if config.teacher.vectors is not None:
        return precomputed_embeddings(config.teacher.vectors, rows.teacher_texts)
    return cached_embeddings(_teacher(config.teacher), rows.teacher_texts, config.teacher.cache)


def _teacher(settings: TeacherSettings) -> SentenceTransformerTeacher:
    assert settings.model is not None
    return SentenceTransformerTeacher(
        settings.model,
        revision=settings.revision,
        max_length=settings.max_length,
        prompt=settings.prompt,
        batch_size=settings.batch_size,
    )


def _embed_with(config: TermsConfig) -> Embed | None:
    """Return the teacher as a dense searcher, when it reads both languages."""
    teacher = config.teacher
    if config.losses.distillation == 0 or teacher is None or teacher.model is None or teacher.text == "translation":
        return None

    def embed(texts: Sequence[str]) -> NDArray[np.float32]:
        return np.asarray(cached_embeddings(_teacher(teacher), texts, teacher.cache))

    return embed


def write_measured(run_dir: RunDirectory, measured: Measured) -> None:
    """Write scores, per-query scores and comparisons into the run folder."""
    run_dir.write_scores(measured.scores)
    write_query_scores(run_dir.path, measured.per_query)
    write_json(run_dir.path / "comparisons.json", [comparison.to_json() for comparison in measured.comparisons])


def story(config: TermsConfig, rows: TrainingRows, trained: Trained, measured: Measured) -> dict[str, Any]:
    """Tell the run in plain words."""
    counts = rows.counts
    sentences = [
        f"{counts.kept:,} rows ({counts.texts:,} texts) taught {counts.korean_targets:,} Korean and "
        f"{counts.english_targets:,} English target tokens; {counts.with_english / max(1, counts.texts):.0%} of the "
        f"texts have English targets. {counts.without_source + counts.without_target:,} rows were rejected."
    ]
    if trained.attempts > 1:
        sentences.append(f"Training was rolled back {trained.attempts - 1} times; rollbacks.jsonl says why.")
    recalls = [item for item in measured.scores if item.name == "recall@10"]
    for name in dict.fromkeys(item.test_set for item in recalls):
        found = {item.subject: item.value for item in recalls if item.test_set == name}
        others = ", ".join(f"{subject} {found[subject]:.3f}" for subject in (UNTRAINED, SUBJECT) if subject in found)
        sentences.append(f"Recall@10 on {name}: student {found[STUDENT]:.3f} ({others}).")
    return {"title": config.name, "summary": sentences, "steps": []}


def _is_whole(folder: Path) -> bool:
    try:
        verify_manifest(folder)
    except IntegrityError:
        return False
    return True

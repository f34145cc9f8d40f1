"""What does a report or a model card of any mode show? Example searches, and what was trained on.

The student before its first step, the static encoder below it, and the teacher beside it.

What the report and the model card say of any neural student.

After training: keep the best and the last as stock models, score the best, write the report.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from soju.core.errors import IntegrityError
from soju.core.files import verify_manifest, write_json, write_manifest, write_text
from soju.core.run import RunDirectory
from soju.core.score import Score
from soju.data.rows import Document
from soju.report.model_card import DataSource, Example, ModelCard, render_model_card
from soju.report.run_report import write_report
from soju.sparse.config import (
    CardSettings,
    Credit,
    EvaluationSettings,
    NeuralConfig,
    PretrainedStudent,
    ScratchStudent,
    SearchSettings,
    StaticConfig,
    TeacherSettings,
)
from soju.sparse.data import EvaluationTexts, RunData, TrainingData
from soju.sparse.evaluate import STUDENT, SUBJECT, Embed, Measured, Subject, metrics_of, score, write_query_scores
from soju.sparse.indexing import Index, expand, search_index
from soju.sparse.initial import Vocabulary, lexicon_vocabulary, plain_vocabulary, pretrained_student, scratch_student
from soju.sparse.model import TermEncoder, model_folder, search_settings_of
from soju.sparse.neural_encoders import NeuralEncoder
from soju.sparse.splade import SpladeEncoder
from soju.sparse.static.encoder import StaticEncoder
from soju.sparse.static.training import train_static
from soju.teachers.cache import Embeddings, cached_embeddings, precomputed_embeddings
from soju.teachers.dense import SentenceTransformerTeacher
from soju.training.rollback import Trained


def example_searches(
    encoder: TermEncoder,
    test_sets: list[EvaluationTexts],
    settings: EvaluationSettings,
    run_dir: RunDirectory,
    model: Path,
) -> list[dict[str, Any]]:
    """Index the documents of the first direction of the first test set and answer the example queries."""
    if not test_sets:
        return []
    first = next(iter(test_sets[0].directions.values()))
    documents = (Document(f"{test_sets[0].name}-{key}", text) for key, text in first.documents.items())
    index = Index.build(documents, model, run_dir.path / "index", overwrite=True).vectors
    return [search.model_dump(mode="json") for search in search_index(index, encoder, settings.examples, k=3)]


def data_sources(card: CardSettings, data: RunData) -> tuple[DataSource, ...]:
    """Return what was trained on with the credits of the configuration."""
    credits = {credit.source: credit for credit in card.credits}
    unknown = Credit(source="", licence="see its owner")
    return tuple(
        DataSource(name=name, rows=rows, licence=credit.licence, attribution=credit.attribution)
        for name, rows in data.training.source_rows.items()
        for credit in [credits.get(name, unknown)]
    )


STATIC = "static"
"""Folder in a run that holds the static encoder its student began as."""


class Start:
    """The student before its first step, and the static encoder below it; kept in the run folder.

    A student that goes on from a run of ours keeps the static encoder of that run, because the pieces of its vocabulary
    stand for the terms of that encoder.
    """

    def __init__(self, config: NeuralConfig, run_dir: RunDirectory, training: TrainingData, *, workers: int) -> None:
        self._config = config
        self._training = training
        self._workers = workers
        self._static_folder = run_dir.path / STATIC
        self._student_folder = run_dir.path / "untrained"

    def prepare(self) -> None:
        """Make whatever an earlier start of this run has not finished."""
        if not _is_whole(self._static_folder):
            self._prepare_static()
        if not _is_whole(self._student_folder):
            self._build().save(str(self._student_folder), create_model_card=False)
            write_manifest(self._student_folder)

    def _prepare_static(self) -> None:
        student = self._config.student
        if isinstance(student, PretrainedStudent):
            below = Path(student.model) / STATIC
            if _is_whole(below):
                shutil.copytree(below, self._static_folder, dirs_exist_ok=True)
        elif student.static_model is not None:
            source = model_folder(student.static_model)
            StaticEncoder.load(source)
            shutil.copytree(source, self._static_folder, dirs_exist_ok=True)
        else:
            settings = StaticConfig(
                recipe="splade",
                mode="static",
                name=self._config.name,
                seed=self._config.seed,
                data=self._config.data.model_dump(include={"root", "pairs", "passages", "select"}),
                **student.static.model_dump(),
            )
            train_static(self._training.pairs, self._training.terms, settings, workers=self._workers).save(
                self._static_folder
            )

    def _build(self) -> SpladeEncoder:
        student, similarity = self._config.student, self._config.similarity
        if isinstance(student, PretrainedStudent):
            return pretrained_student(student, similarity=similarity)
        assert self.static is not None
        texts = [text for pair in self._training.pairs for text in (pair.ko, pair.en)]
        return scratch_student(self.static, student, texts, similarity=similarity, seed=self._config.seed)

    @cached_property
    def static(self) -> StaticEncoder | None:
        """The static encoder; none below a pretrained student that is not ours."""
        return StaticEncoder.load(self._static_folder) if _is_whole(self._static_folder) else None

    @property
    def search(self) -> SearchSettings:
        """How the static encoder's documents are weighted."""
        student = self._config.student
        if isinstance(student, ScratchStudent) and student.static_model is None:
            return student.static.search
        return search_settings_of(self._static_folder)

    def student(self) -> SpladeEncoder:
        """Return a fresh copy of the student as it starts."""
        return SpladeEncoder(str(self._student_folder), max_seq_length=self._config.student.max_length)

    @cached_property
    def vocabulary(self) -> Vocabulary:
        """What the ids of its vocabulary mean."""
        tokenizer = self.student().tokenizer
        return plain_vocabulary(tokenizer) if self.static is None else lexicon_vocabulary(tokenizer, self.static)


def load_teacher(settings: TeacherSettings) -> SentenceTransformerTeacher:
    """Load a teacher that is given as a model."""
    assert settings.model is not None
    return SentenceTransformerTeacher(
        settings.model,
        revision=settings.revision,
        max_length=settings.max_length,
        prompt=settings.prompt,
        batch_size=settings.batch_size,
    )


def teacher_embeddings(settings: TeacherSettings, texts: Sequence[str]) -> Embeddings:
    """Embed what the teacher reads once, cached by content, or look it up in the user's own vectors."""
    if settings.vectors is not None:
        return precomputed_embeddings(settings.vectors, texts)
    return cached_embeddings(load_teacher(settings), texts, settings.cache)


def dense_searcher(teacher: TeacherSettings | None) -> Embed | None:
    """Return the teacher as a dense searcher, when it is a model that reads both languages."""
    if teacher is None or teacher.model is None or teacher.text == "translation":
        return None

    def embed(texts: Sequence[str]) -> NDArray[np.float32]:
        return np.asarray(teacher_embeddings(teacher, texts))

    return embed


def _is_whole(folder: Path) -> bool:
    try:
        verify_manifest(folder)
    except IntegrityError:
        return False
    return True


_STOCK_USAGE = """from sentence_transformers import SparseEncoder

model = SparseEncoder("MODEL")
queries = model.encode_query(["심장 혈관이 막혔을 때 가슴 통증"])
documents = model.encode_document(["Blocked coronary arteries cause chest pain."])
print(model.similarity(queries, documents))"""


def student_card(config: NeuralConfig, data: RunData, scores: Sequence[Score], *, taught: bool) -> str:
    """Write the model's README; `taught` says whether the teacher took part."""
    teacher = config.teacher
    lesson = f" It was taught by {teacher.model or 'precomputed vectors'}." if teacher and taught else ""
    card = ModelCard(
        name=config.name,
        summary=(
            "A cross-lingual learned sparse encoder (SPLADE) for Korean and English: a text lights up its own terms "
            f"and their translations, so one inverted index answers in both languages.{lesson}"
        ),
        licence=config.card.licence,
        licence_name=config.card.licence_name,
        tags=("sparse-encoder", "splade", "cross-lingual", "korean"),
        pipeline_tag="feature-extraction",
        library_name="sentence-transformers",
        base_model=config.student.model if config.student.init == "pretrained" else None,
        examples=(
            Example(title="Encode with sentence-transformers", code=_STOCK_USAGE),
            Example(
                title="Search your own text",
                language="bash",
                code='soju index MODEL corpus.jsonl INDEX\nsoju search INDEX "질의"',
            ),
        ),
        scores=tuple(score for score in scores if score.name in metrics_of(config.evaluation)),
        data=data_sources(config.card, data),
        command=f"soju train {config.card.command or config.name}",
        seed=config.seed,
        limits=(
            f"Texts are cut after {config.student.max_length} tokens.",
            "It was measured on short texts; other domains may differ.",
        ),
    )
    return render_model_card(card)


def curves(rows: Sequence[Mapping[str, Any]], names: Mapping[str, str]) -> list[dict[str, Any]]:
    """Return a series for each key that rows hold numbers of, under the name given, over their steps."""
    found: list[dict[str, Any]] = []
    for key, name in names.items():
        points = {row["step"]: float(row[key]) for row in rows if isinstance(row.get(key), int | float)}
        if points:
            found.append({"name": name, "x": list(points), "y": list(points.values())})
    return found


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

"""The student before its first step, the static encoder below it, and the teacher beside it."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from soju.core.errors import IntegrityError
from soju.core.files import verify_manifest, write_manifest
from soju.core.run_directory import RunDirectory
from soju.sparse.config import SearchSettings, StaticConfig
from soju.sparse.indexing import model_folder, search_settings_of
from soju.sparse.initial_models import (
    Vocabulary,
    lexicon_vocabulary,
    plain_vocabulary,
    pretrained_student,
    scratch_student,
)
from soju.sparse.reading import TrainingData
from soju.sparse.scoring import Embed
from soju.sparse.splade_encoder import SpladeEncoder
from soju.sparse.static.static_encoder import StaticEncoder
from soju.sparse.static.training import train_static
from soju.sparse.student_config import NeuralConfig, PretrainedStudent, ScratchStudent, TeacherSettings
from soju.teachers.precomputed import precomputed_embeddings
from soju.teachers.teacher import SentenceTransformerTeacher
from soju.teachers.teacher_cache import Embeddings, cached_embeddings

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

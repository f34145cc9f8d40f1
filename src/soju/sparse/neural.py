"""The recipe of a neural student: what the modes ``terms`` and ``triplets`` share, written once.

A mode gives its losses (`NamedLosses`) and a `Lesson`: its rows, its validation, its batches and what happens between
steps. `run` is the recipe, from the start of the student to the report.

Shape letter: V = terms in the vocabulary.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Generic, Literal, Protocol, TypeVar

import torch
from accelerate import PartialState
from datasets import Dataset
from numpy.typing import NDArray
from sentence_transformers import SparseEncoderTrainer, SparseEncoderTrainingArguments
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR
from transformers import EarlyStoppingCallback, TrainerCallback
from transformers.utils.logging import disable_progress_bar

from soju.core.files import write_json
from soju.core.run import Run
from soju.search.folder import idf
from soju.sparse.config import NeuralConfig, TeacherSettings
from soju.sparse.data import RunData, TrainingData
from soju.sparse.evaluate import STUDENT, SUBJECT, Measured, Subject, score
from soju.sparse.finish import BEFORE, UNTRAINED, Figure, report_student, write_measured
from soju.sparse.initial import Start, Vocabulary, dense_searcher
from soju.sparse.losses import NamedLosses, idf_term_cost
from soju.sparse.neural_encoders import NeuralEncoder
from soju.sparse.splade import SpladeEncoder
from soju.training.ranks import join_ranks
from soju.training.reliable import OwnProgress, ReliableTrainer
from soju.training.rollback import Attempt, BestSoFar, Judged, RollbackSettings, Trained, train_judged
from soju.training.settings import stock_arguments
from soju.training.state import Stateful

ConfigT = TypeVar("ConfigT", bound=NeuralConfig)
Schedule = Callable[[int, int], float]
"""Factor on the learning rate by optimiser steps planned and done."""


class Rows(Protocol):
    """Training rows in memory."""

    @property
    def counts(self) -> Any:
        """What became of the rows that were read: a dataclass with the number of ``texts``."""

    def __len__(self) -> int:
        """Return the number of rows."""

    def texts_with_term(self, size: int) -> NDArray[Any]:
        """Count the texts that hold each term, ``(V,)``."""


@dataclass(frozen=True, slots=True)
class Between:
    """What happens between the steps of a training."""

    callbacks: Sequence[TrainerCallback] = ()
    state: Mapping[str, Stateful] = field(default_factory=dict)
    """What a checkpoint must hold of it, by name."""


class Lesson(ABC, Generic[ConfigT]):
    """What a mode teaches, made of the data of a run and the vocabulary of its student; `folder` is that of the run."""

    losses: ClassVar[type[NamedLosses]]
    rows: Rows
    validation: Judged
    schedule: Schedule | None = None
    """Linear, as stock, when not given."""

    def __init__(self, config: ConfigT, data: TrainingData, vocabulary: Vocabulary, folder: Path) -> None:
        self.config = config
        self.folder = folder
        self.pad_id: int = vocabulary.tokenizer.pad_token_id

    @abstractmethod
    def batches(self) -> int:
        """Return the batches of an epoch on one rank."""

    def planned(self) -> dict[str, int]:
        """Return the batches of an epoch on one rank, and the optimiser steps of the whole training."""
        training, batches = self.config.training, self.batches()
        steps = math.ceil(-(-batches // training.batches[1]) * training.num_train_epochs)
        return {"batches": batches, "steps": training.max_steps or steps}

    def counted(self) -> dict[str, Any]:
        """Return what ``data.json`` says of the rows."""
        return {**asdict(self.rows.counts), **self.planned()}

    @abstractmethod
    def ask_teacher(self) -> None:
        """Ask the teacher, if one takes part, about all that it reads; what it said is kept on disk."""

    @property
    def dense_teacher(self) -> TeacherSettings | None:
        """The teacher that takes part, if it embeds texts; it is scored too."""
        return self.config.teacher if self.config.losses.distillation > 0 else None

    @abstractmethod
    def collator(self) -> Callable[[Sequence[dict[str, Any]]], dict[str, Any]]:
        """Return what makes a batch of numbers of rows."""

    @abstractmethod
    def sampler(self, data_order: int) -> Any:
        """Return what makes the sampler of a data set; `data_order` is added to the seed."""

    def evaluator(self, loss: Any) -> Any:
        """Return what validates a student that learns by `loss`."""
        return self.validation

    def between(self, loss: Any) -> Between:
        """Return what happens between steps."""
        return Between()

    def arguments(self) -> dict[str, Any]:
        """Return training arguments that replace the usual ones."""
        return {}

    def more_subjects(self, student: NeuralEncoder) -> list[Subject]:
        """Return what else is scored of a student."""
        return []


def run(
    lesson_of: type[Lesson[Any]],
    config: NeuralConfig,
    run_dir: Run,
    *,
    data: RunData,
    figures: Callable[[Any], list[Figure]],
    summary: Callable[[Any], str],
    resume: Path | None = None,
    workers: int = 2,
) -> Run:
    """Train, score and report a neural student.

    Args:
        lesson_of: What the mode teaches.
        config: Settings of the run.
        run_dir: Where everything goes.
        data: What the mode's ``read`` returned.
        figures: Shows how the student of a lesson learned.
        summary: Says in plain words what it learned from.
        resume: A checkpoint to go on from; see `train`.
        workers: Threads of the morphological analyser.

    Returns:
        The run.

    Raises:
        UserError: If data, student or teacher cannot be used; what was trained so far stays.
    """
    disable_progress_bar()  # of the libraries: they would draw one for every file of weights
    config.training.refuse_missing_device()
    join_ranks()

    # 1. Build the student as it starts: a model, a run of ours, or from scratch on top of a static encoder.
    start = Start(config, run_dir, data.training, workers=workers)
    with PartialState().main_process_first():
        start.prepare()

    # 2. Turn what was read into rows; ask the teacher about them once, cached by content.
    lesson = lesson_of(config, data.training, start.vocabulary, run_dir.folder)
    if PartialState().is_main_process:
        write_json(run_dir.folder / "data.json", {**data.training.statistics, "rows": lesson.counted()})
    with PartialState().main_process_first():
        lesson.ask_teacher()

    # 3. Train, validate, judge; roll back what regresses.
    trained = train(lesson, start.student, resume=resume)
    if not PartialState().is_main_process:
        return run_dir

    # 4. Save the best and the last as stock models, and from here on use what was saved.
    for checkpoint, folder in ((trained.best, run_dir.best), (trained.last, run_dir.final)):
        SpladeEncoder(str(checkpoint), device="cpu").save(str(folder), create_model_card=False)
    student = NeuralEncoder(SpladeEncoder(str(run_dir.best), device="cpu"))

    # 5. Score it against itself untrained, the static encoder, BM25, dictionary look-up and the teacher.
    measured = measure(student, lesson, start, data, run_dir, workers=workers)
    write_measured(measured, run_dir, figures=figures(lesson))

    # 6. Show how it learned, what texts expand to and what a search finds; report.
    sentences = [summary(lesson)]
    if trained.attempts > 1:
        sentences.append(f"Training was rolled back {trained.attempts - 1} times; rollbacks.jsonl says why.")
    report_student(student, measured, data, config, run_dir, teacher=lesson.dense_teacher, summary=sentences)
    return run_dir


def train(lesson: Lesson[Any], student: Callable[[], SpladeEncoder], *, resume: Path | None = None) -> Trained:
    """Train with validation, gate and rollback; see `train_judged`.

    Args:
        lesson: What to teach; its folder gets ``checkpoints``, ``history.jsonl`` and ``verdicts.jsonl``.
        student: Makes the student as it starts; called once an attempt.
        resume: A checkpoint to go on from. When not given, a run that was begun in the folder goes on from its newest
            checkpoint that verifies.

    Returns:
        The checkpoints.
    """
    settings = lesson.config.training
    return train_judged(
        lambda attempt: make_trainer(lesson, student(), attempt),
        BestSoFar(lesson.validation, settings.max_drop, lesson.folder / "verdicts.jsonl"),
        lesson.folder,
        rollbacks=RollbackSettings(max_rollbacks=settings.max_rollbacks),
        resume=resume,
    )


class SpladeTrainer(OwnProgress, ReliableTrainer, SparseEncoderTrainer):
    """`SparseEncoderTrainer` that loses nothing and shows its progress as everything else here does.

    Args:
        *args: For the stock trainer.
        schedule: Of the learning rate, a pure function of the step; linear, as stock, when ``None``.
        **kwargs: For `ReliableTrainer` and the stock trainer.
    """

    def __init__(self, *args: Any, schedule: Schedule | None = None, **kwargs: Any) -> None:
        self._schedule = schedule
        super().__init__(*args, **kwargs)

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """Make the schedule; the stock trainer calls this."""
        schedule = self._schedule
        if schedule is None:
            return super().create_scheduler(num_training_steps, optimizer)
        if getattr(self, "lr_scheduler", None) is None:
            self.lr_scheduler = LambdaLR(optimizer or self.optimizer, lambda step: schedule(num_training_steps, step))
            self._created_lr_scheduler = True
        return self.lr_scheduler


def make_trainer(
    lesson: Lesson[Any], student: SpladeEncoder, attempt: Attempt, *, validates: bool = True
) -> SpladeTrainer:
    """Put student, rows, losses and arguments into a trainer."""
    config, folder = lesson.config, lesson.folder
    loss = lesson.losses(
        student,
        config,
        position=lambda: (trainer.state.global_step, trainer.state.max_steps),
        term_cost_V=term_costs(lesson.rows, student, config.losses.flops_cost),
    )
    between = lesson.between(loss)
    callbacks = list(between.callbacks)
    if validates and config.training.patience is not None:
        callbacks.append(EarlyStoppingCallback(early_stopping_patience=config.training.patience))
    trainer = SpladeTrainer(
        model=student,
        args=training_arguments(lesson, data_order=attempt.data_order, validates=validates),
        train_dataset=Dataset.from_dict({"row": list(range(len(lesson.rows)))}),
        loss=loss,
        evaluator=lesson.evaluator(loss) if validates else None,
        data_collator=lesson.collator(),
        history=folder / "history.jsonl",
        learning_rate_scale=attempt.learning_rate_scale,
        extra_state=between.state,
        callbacks=callbacks,
        schedule=lesson.schedule,
    )
    return trainer


def training_arguments(
    lesson: Lesson[Any], *, data_order: int = 0, validates: bool = True
) -> SparseEncoderTrainingArguments:
    """Translate the settings into the stock trainer's arguments; see `stock_arguments`."""
    config, training = lesson.config, lesson.config.training
    layers = training.layers_learning_rate
    size, accumulation = training.batches
    arguments = stock_arguments(
        training, lesson.folder, seed=config.seed, chosen_by=lesson.validation.chosen_by if validates else None
    )
    arguments |= {
        "per_device_train_batch_size": size,
        "gradient_accumulation_steps": accumulation,
        "learning_rate_mapping": {r"\.layers?\.": layers} if layers else {},
        "batch_sampler": lesson.sampler(data_order),
    }
    return SparseEncoderTrainingArguments(**(arguments | lesson.arguments()))


def term_costs(rows: Rows, student: SpladeEncoder, form: Literal["inverse", "direct"] | None) -> Tensor | None:
    """Return what the sparsity penalty charges for each term, ``(V,)``, by the texts that hold it; none when alike."""
    if form is None:
        return None
    idf_V = idf(rows.texts_with_term(student.get_embedding_dimension()), rows.counts.texts)
    return idf_term_cost(torch.from_numpy(idf_V), form=form)


def measure(
    student: NeuralEncoder, lesson: Lesson[Any], start: Start, data: RunData, run_dir: Run, *, workers: int
) -> Measured:
    """Score a student as it was saved against where it started, BM25, dictionary look-up and its teacher."""
    config = lesson.config
    before = BEFORE if config.student.init == "pretrained" else UNTRAINED
    subjects = [Subject(STUDENT, student), *lesson.more_subjects(student)]
    subjects.append(Subject(before, NeuralEncoder(start.student())))
    if start.static is not None:
        subjects.append(Subject(SUBJECT, start.static, start.search))
    teacher = dense_searcher(lesson.dense_teacher)
    return score(subjects, data, config, run_dir.best, teacher=teacher, vocabulary=start.vocabulary, workers=workers)

"""Train a student on triplets with the stock trainer: curriculum, controllers, validation, gate and rollback."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from sentence_transformers import SparseEncoderTrainingArguments
from torch.optim.lr_scheduler import LambdaLR
from transformers import EarlyStoppingCallback, TrainerCallback

from soju.core.errors import UserError
from soju.core.files import append_json_line
from soju.search.weighting import idf
from soju.sparse.arguments import stock_arguments
from soju.sparse.controllers import SparsityAlarm
from soju.sparse.curriculum import staged_cosine
from soju.sparse.curriculum_sampling import Curriculum
from soju.sparse.initial_models import Vocabulary
from soju.sparse.sparsity import idf_term_cost
from soju.sparse.splade_encoder import SpladeEncoder
from soju.sparse.student_trainer import SpladeTrainer
from soju.sparse.triplets.config import TripletLossSettings, TripletsConfig, TripletsTrainingSettings
from soju.sparse.triplets.loss import TripletsLoss, stages_of
from soju.sparse.triplets.rows import TeacherScores, TripletRows, TripletsCollator
from soju.sparse.triplets.scalars import Scalars
from soju.sparse.triplets.validation import CHOSEN_BY, TripletsValidation
from soju.training.judged_training import BestSoFar, Trained, train_judged
from soju.training.ranks import on_main_process
from soju.training.rollback import Attempt, RollbackSettings

logger = logging.getLogger(__name__)


class TripletsTrainer(SpladeTrainer):
    """`SpladeTrainer` whose learning rate follows the curriculum; see `staged_cosine`."""

    schedule: Callable[[int, int], float]
    """Factor on the learning rate by optimiser steps done and planned."""

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """Make a schedule that is a pure function of the step; the trainer calls this."""
        if getattr(self, "lr_scheduler", None) is None:
            self.lr_scheduler = LambdaLR(
                optimizer or self.optimizer, lambda step: self.schedule(num_training_steps, step)
            )
            self._created_lr_scheduler = True
        return self.lr_scheduler


class Steering(TrainerCallback):
    """Moves the controllers after each optimiser step, and looks out for collapse.

    Args:
        loss: Whose controllers.
        alarm: What looks.
        record: ``alarms.jsonl`` of the run.
    """

    def __init__(self, loss: TripletsLoss, alarm: SparsityAlarm, record: Path) -> None:
        self._loss = loss
        self._alarm = alarm
        self._record = record

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Move, then look, every `logging_steps` steps."""
        for controller in self._loss.controllers.values():
            controller.step(move=self._loss.ramp > 0)
        if state.global_step % args.logging_steps == 0:
            lowest = min(controller.active for controller in self._loss.controllers.values())
            wrong = self._alarm.look(lowest, step=state.global_step)
            if wrong is not None:
                logger.warning("step %d: %s", state.global_step, wrong)
                row = {"step": state.global_step, "alarm": wrong}
                on_main_process(lambda: append_json_line(self._record, row))


def train_student(
    student: Callable[[], SpladeEncoder],
    rows: TripletRows,
    dev: TripletRows,
    teacher: TeacherScores | None,
    vocabulary: Vocabulary,
    config: TripletsConfig,
    folder: Path,
    *,
    resume: Path | None = None,
    distractors: Sequence[str] = (),
) -> Trained:
    """Train with validation, gate and rollback; see `train_judged`.

    Args:
        student: Makes the student as it starts; called once an attempt.
        rows: What to train on.
        dev: What to validate on.
        teacher: Its scores; none without distillation.
        vocabulary: The student's.
        config: Settings of the run.
        folder: The run folder.
        resume: A checkpoint to go on from.
        distractors: See `TripletsValidation`.

    Returns:
        The checkpoints.
    """
    pad_id = vocabulary.tokenizer.pad_token_id
    validation = TripletsValidation(dev, config, pad_id=pad_id, distractors=distractors)

    def trainer(attempt: Attempt) -> TripletsTrainer:
        return make_trainer(student(), rows, teacher, validation, config, folder, attempt, pad_id=pad_id)

    return train_judged(
        trainer,
        BestSoFar(validation, config.training.max_drop, folder / "verdicts.jsonl"),
        folder,
        rollbacks=RollbackSettings(max_rollbacks=config.training.max_rollbacks),
        resume=resume,
    )


def make_trainer(
    student: SpladeEncoder,
    rows: TripletRows,
    teacher: TeacherScores | None,
    validation: TripletsValidation | None,
    config: TripletsConfig,
    folder: Path,
    attempt: Attempt,
    *,
    pad_id: int,
) -> TripletsTrainer:
    """Put student, rows, loss, controllers and arguments into a trainer."""
    if config.training.cached and PartialState().num_processes > 1:
        raise UserError("training.cached: compares the texts of one process; train on one, or set it to false")
    loss = TripletsLoss(student, config, term_cost_V=term_costs(rows, student, config.losses))
    grace = math.ceil(config.training.warm_up * planned_steps(rows, config.training)["steps"])
    alarm = SparsityAlarm(student.get_embedding_dimension(), grace=grace)
    trainer = TripletsTrainer(
        model=student,
        args=training_arguments(config, folder, rows, data_order=attempt.data_order, validates=validation is not None),
        train_dataset=rows.dataset(),
        loss=loss,
        evaluator=validation,
        data_collator=TripletsCollator(rows, teacher, pad_id=pad_id),
        history=folder / "history.jsonl",
        learning_rate_scale=attempt.learning_rate_scale,
        extra_state={**{f"sparsity_{side}": part for side, part in loss.controllers.items()}, "alarm": alarm},
    )
    loss.position = lambda: (trainer.state.global_step, trainer.state.max_steps)
    stages, warm_up = stages_of(config), config.training.warm_up
    trainer.schedule = lambda planned, step: staged_cosine(
        step, planned, warm_up_steps=math.ceil(warm_up * planned), stages=stages
    )
    trainer.add_callback(Steering(loss, alarm, folder / "alarms.jsonl"))
    trainer.add_callback(Scalars(folder / "tensorboard"))
    if validation is not None:
        validation.loss = loss
        if config.training.patience is not None:
            trainer.add_callback(EarlyStoppingCallback(early_stopping_patience=config.training.patience))
    return trainer


def training_arguments(
    config: TripletsConfig, folder: Path, rows: TripletRows, *, data_order: int = 0, validates: bool = True
) -> SparseEncoderTrainingArguments:
    """Translate the settings; see `stock_arguments`."""
    training = config.training
    size, accumulation = batches_of(training)
    curriculum = Curriculum(
        stages_of(config),
        rows.groupings(),
        rows.lengths,
        seed=config.seed + data_order,
        total_steps=planned_steps(rows, training)["steps"],
        batches_a_step=accumulation,
    )
    return stock_arguments(
        training,
        folder,
        curriculum,
        seed=config.seed,
        chosen_by=CHOSEN_BY if validates else None,
        per_device_train_batch_size=size,
        gradient_accumulation_steps=accumulation,
        report_to=[],  # `Scalars` writes them under the published names
    )


def batches_of(training: TripletsTrainingSettings) -> tuple[int, int]:
    """Return rows of a batch and batches of a step; `cached` makes one batch of those of a step."""
    if training.cached:
        return training.batch_size * training.accumulation, 1
    return training.batch_size, training.accumulation


def planned_steps(rows: TripletRows, training: TripletsTrainingSettings) -> dict[str, int]:
    """Return the batches of an epoch on one rank, and the optimiser steps of the whole training."""
    size, accumulation = batches_of(training)
    batches = len(rows) // (size * PartialState().num_processes)
    if batches == 0:
        raise UserError(
            f"data.triplets: {len(rows):,} rows do not fill one batch of {size * PartialState().num_processes:,}; give "
            "more rows, or lower training.batch_size"
        )
    steps = training.max_steps or math.ceil(-(-batches // accumulation) * training.epochs)
    return {"batches": batches, "steps": steps}


def term_costs(rows: TripletRows, student: SpladeEncoder, losses: TripletLossSettings) -> torch.Tensor | None:
    """Return what the sparsity penalty charges for each term, ``(V,)``, by the texts that hold it; none when alike."""
    if losses.flops_cost is None:
        return None
    idf_V = idf(rows.texts_with_term(student.get_embedding_dimension()), len(rows.texts))
    return idf_term_cost(torch.from_numpy(idf_V), form=losses.flops_cost)

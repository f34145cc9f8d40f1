"""How good is a student on development triplets? Retrieval among their texts, and the loss.

Shape letters: Q = development queries, D = documents that are searched, V = terms in the vocabulary.

TensorBoard under the names people look for: ``train/loss``, ``train/loss_infonce``, ``val/loss`` ...

Train a student on triplets with the stock trainer: curriculum, controllers, validation, gate and rollback.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from sentence_transformers import SparseEncoderTrainingArguments
from sentence_transformers.base.evaluation import BaseEvaluator
from torch.optim.lr_scheduler import LambdaLR
from transformers import EarlyStoppingCallback, TrainerCallback

from soju.core.errors import UserError
from soju.core.files import append_json_line
from soju.core.score import Score, Setting
from soju.evaluation.retrieval import RetrievalSet, evaluate
from soju.search.weighting import idf
from soju.sparse.controllers import SparsityAlarm
from soju.sparse.curriculum import Curriculum, staged_cosine
from soju.sparse.initial import Vocabulary
from soju.sparse.losses import idf_term_cost
from soju.sparse.neural_encoders import unit_rows
from soju.sparse.splade import SpladeEncoder
from soju.sparse.trainer import SpladeTrainer, neural_arguments
from soju.sparse.triplets.config import TripletLossSettings, TripletsConfig, TripletsTrainingSettings
from soju.sparse.triplets.losses import TripletsLoss, stages_of
from soju.sparse.triplets.rows import TeacherScores, TripletRows, TripletsCollator
from soju.training.ranks import on_main_process
from soju.training.rollback import Attempt, BestSoFar, RollbackSettings, Trained, train_judged

CHOSEN_BY = "mrr@10"
"""The best checkpoint has the highest MRR@10 of development queries over the texts of all development triplets."""
_METRICS = (CHOSEN_BY, "recall@1", "recall@10")


class TripletsValidation(BaseEvaluator):
    """Searches the texts of development triplets and takes the loss on them.

    Args:
        rows: Development triplets, none of whose queries was trained on.
        config: Settings of the run.
        pad_id: Of the student's tokenizer.
        distractors: Further texts to search.
    """

    def __init__(
        self, rows: TripletRows, config: TripletsConfig, *, pad_id: int, distractors: Sequence[str] = ()
    ) -> None:
        super().__init__()
        self.primary_metric = CHOSEN_BY
        self._rows = rows
        self._config = config
        self._collate = TripletsCollator(rows, None, pad_id=pad_id)
        self._queries = [rows.texts[number] for number in dict.fromkeys(rows.numbers_R3[:, 0].tolist())]
        texts = (rows.texts[number] for number in rows.numbers_R3[:, 1:].ravel().tolist())
        self._documents = list(dict.fromkeys((*texts, *distractors)))
        answers: dict[str, set[str]] = {}
        for row in rows.triplets:
            answers.setdefault(row.query, set()).add(row.positive)
        documents = dict(zip(self._documents, self._documents, strict=True))
        self._set = RetrievalSet.create("dev triplets", {text: text for text in self._queries}, documents, answers)
        self._setting = Setting("student", self._set.name, self._set.hash)
        self.loss: TripletsLoss | None = None
        """Of the trainer, for ``val/loss``; set when there is one."""

    @property
    def chosen_by(self) -> str:
        """Name of the score that checkpoints are judged and chosen by."""
        return CHOSEN_BY

    def judged(self, value: float) -> Score:
        """Return the score with its signature."""
        return self._setting.score(
            CHOSEN_BY, value, unit="fraction", higher_is_better=True, similarity=self._config.similarity
        )

    def __call__(
        self, model: Any, output_path: str | None = None, epoch: float = -1, steps: int = -1, **_: Any
    ) -> dict[str, float]:
        """Return retrieval over the development texts, active terms and the loss."""
        queries_QV, documents_DV = (model.encode_sparse(texts) for texts in (self._queries, self._documents))
        stored_DV = unit_rows(documents_DV) if self._config.similarity == "cosine" else documents_DV
        scores_QD = (queries_QV @ stored_DV.T).toarray()
        best_Q10 = np.argsort(-scores_QD, axis=1, kind="stable")[:, :10]
        found = evaluate(
            self._set.run_of([row[scores_QD[query, row] > 0] for query, row in enumerate(best_Q10)]),
            self._set,
            subject="student",
            metrics=_METRICS,
            samples=100,
        )
        result = {score.name: score.value for score in found.scores}
        result["active_query"] = queries_QV.nnz / len(self._queries)
        result["active_document"] = documents_DV.nnz / len(self._documents)
        if self.loss is not None:
            result["loss"] = self._mean_loss(self.loss, model)
        return result

    @torch.no_grad()
    def _mean_loss(self, loss: TripletsLoss, model: Any) -> float:
        """Return the mean loss over batches of the training's size, at the stage of the step.

        Only the first rank validates, so nothing here may wait for the others: neither the wrapper that the trainer
        puts around the model, nor a mean over ranks.
        """
        size = self._config.training.per_device_train_batch_size
        training, wrapped = loss.training, loss.model
        loss.eval()
        loss.model = model
        values: list[float] = []
        try:
            for start in range(0, len(self._rows) - size + 1, size) or (0,):
                batch = self._collate([{"row": row} for row in range(start, min(start + size, len(self._rows)))])
                device = next(loss.parameters()).device
                features = {
                    name.removeprefix("text_"): value.to(device) for name, value in batch.items() if name != "label"
                }
                values.append(float(torch.stack(list(loss([features], batch["label"]).values())).sum()))
        finally:
            loss.model = wrapped
            loss.train(training)
        return float(np.mean(values))


_RENAMED = {"grad_norm": "gradient_norm"}


class Scalars(TrainerCallback):
    """Writes every number that is logged; the stock callback's names are others.

    Args:
        folder: For the event files; one more file is added after a resume.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._writer: Any = None

    def on_log(self, args: Any, state: Any, control: Any, logs: Mapping[str, Any] | None = None, **_: Any) -> None:
        """Write one row of the log."""
        if not state.is_world_process_zero:
            return
        if self._writer is None:
            from tensorboardX import SummaryWriter  # a second; not needed on other ranks

            self._writer = SummaryWriter(str(self._folder))
        for name, value in scalars(logs or {}).items():
            self._writer.add_scalar(name, value, state.global_step)
        self._writer.flush()

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        """Close the file."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None


def scalars(logs: Mapping[str, Any]) -> dict[str, float]:
    """Return the numbers of a log row under their published names.

    >>> scalars({"loss": 2.0, "grad_norm": 1.0, "eval_loss": 3.0, "epoch": 0.5})
    {'train/loss': 2.0, 'train/gradient_norm': 1.0, 'val/loss': 3.0}
    """
    found: dict[str, float] = {}
    for name, value in logs.items():
        if name == "epoch" or not isinstance(value, int | float):
            continue
        side, key = ("val", name.removeprefix("eval_")) if name.startswith("eval_") else ("train", name)
        found[f"{side}/{_RENAMED.get(key, key)}"] = float(value)
    return found


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
    loss = TripletsLoss(
        student,
        config,
        position=lambda: (trainer.state.global_step, trainer.state.max_steps),
        term_cost_V=term_costs(rows, student, config.losses),
    )
    grace = config.training.warmup_of(planned_steps(rows, config.training)["steps"])
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
    stages, warmup_of = stages_of(config), config.training.warmup_of
    trainer.schedule = lambda planned, step: staged_cosine(
        step, planned, warm_up_steps=warmup_of(planned), stages=stages
    )
    trainer.add_callback(Steering(loss, alarm, folder / "alarms.jsonl"))
    if "tensorboard" in config.training.report_to:
        trainer.add_callback(Scalars(folder / "tensorboard"))
    if validation is not None:
        validation.loss = loss
        if config.training.patience is not None:
            trainer.add_callback(EarlyStoppingCallback(early_stopping_patience=config.training.patience))
    return trainer


def training_arguments(
    config: TripletsConfig, folder: Path, rows: TripletRows, *, data_order: int = 0, validates: bool = True
) -> SparseEncoderTrainingArguments:
    """Translate the settings; see `neural_arguments`."""
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
    return neural_arguments(
        training,
        folder,
        curriculum,
        seed=config.seed,
        chosen_by=CHOSEN_BY if validates else None,
        per_device_train_batch_size=size,
        gradient_accumulation_steps=accumulation,
        report_to=[place for place in training.report_to if place != "tensorboard"],  # `Scalars` writes that
    )


def batches_of(training: TripletsTrainingSettings) -> tuple[int, int]:
    """Return rows of a batch and batches of a step; `cached` makes one batch of those of a step."""
    if training.cached:
        return training.per_device_train_batch_size * training.gradient_accumulation_steps, 1
    return training.per_device_train_batch_size, training.gradient_accumulation_steps


def planned_steps(rows: TripletRows, training: TripletsTrainingSettings) -> dict[str, int]:
    """Return the batches of an epoch on one rank, and the optimiser steps of the whole training."""
    size, accumulation = batches_of(training)
    batches = len(rows) // (size * PartialState().num_processes)
    if batches == 0:
        raise UserError(
            f"data.triplets: {len(rows):,} rows do not fill one batch of {size * PartialState().num_processes:,}; give "
            "more rows, or lower training.per_device_train_batch_size"
        )
    steps = training.max_steps or math.ceil(-(-batches // accumulation) * training.num_train_epochs)
    return {"batches": batches, "steps": steps}


def term_costs(rows: TripletRows, student: SpladeEncoder, losses: TripletLossSettings) -> torch.Tensor | None:
    """Return what the sparsity penalty charges for each term, ``(V,)``, by the texts that hold it; none when alike."""
    if losses.flops_cost is None:
        return None
    idf_V = idf(rows.texts_with_term(student.get_embedding_dimension()), len(rows.texts))
    return idf_term_cost(torch.from_numpy(idf_V), form=losses.flops_cost)

"""What mode ``triplets`` teaches: triplets along a curriculum, judged by development queries.

Shape letters: Q = development queries, D = documents that are searched, V = terms in the vocabulary.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from copy import copy
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from sentence_transformers.base.evaluation import BaseEvaluator
from transformers import TrainerCallback

from soju.core.errors import UserError
from soju.core.files import append_json_line
from soju.core.results import Score, Setting
from soju.data.statistics import spread
from soju.evaluation.retrieval import RetrievalSet, evaluate
from soju.sparse.config import TeacherSettings
from soju.sparse.curriculum import Curriculum, SparsityAlarm, staged_cosine
from soju.sparse.data import TrainingData
from soju.sparse.evaluate import Subject
from soju.sparse.initial import Vocabulary
from soju.sparse.neural import Between, Lesson
from soju.sparse.neural_encoders import NeuralEncoder, unit_rows
from soju.sparse.splade import SpladeEncoder
from soju.sparse.term_activation import PROBES
from soju.sparse.triplets.config import TripletsConfig
from soju.sparse.triplets.losses import TripletsLoss, stages_of
from soju.sparse.triplets.rows import TeacherScores, TripletRows, TripletsCollator, teacher_scores, triplet_rows
from soju.training.ranks import on_main_process

CHOSEN_BY = "mrr@10"
"""The best checkpoint has the highest MRR@10 of development queries over the texts of all development triplets."""
_METRICS = (CHOSEN_BY, "recall@1", "recall@10")

logger = logging.getLogger(__name__)


class TripletsLesson(Lesson[TripletsConfig]):
    """Queries, each with a text that answers it and one that does not; see `Lesson`."""

    losses = TripletsLoss
    rows: TripletRows
    validation: TripletsValidation
    teacher: TeacherScores | None = None

    def __init__(self, config: TripletsConfig, data: TrainingData, vocabulary: Vocabulary, folder: Path) -> None:
        super().__init__(config, data, vocabulary, folder)
        length, banned = config.student.max_length, [probe.source for probe in PROBES]
        self.rows = triplet_rows(data.triplets, vocabulary, max_length=length, banned=banned)
        self.dev = triplet_rows(spread(data.dev_triplets, config.data.dev_rows), vocabulary, max_length=length)
        distractors = spread(self.rows.texts, config.data.dev_distractors)
        self.validation = TripletsValidation(self.dev, config, pad_id=self.pad_id, distractors=distractors)

    def batches(self) -> int:
        """Return the batches of an epoch on one rank; refuse rows that do not fill one (`UserError`)."""
        together = self.config.training.batches[0] * PartialState().num_processes
        if len(self.rows) < together:
            raise UserError(
                f"data.triplets: {len(self.rows):,} rows do not fill one batch of {together:,}; give more rows, or "
                "lower training.per_device_train_batch_size"
            )
        return len(self.rows) // together

    def counted(self) -> dict[str, Any]:
        """Return what ``data.json`` says of the rows."""
        return {**super().counted(), "dev": len(self.dev)}

    @property
    def dense_teacher(self) -> TeacherSettings | None:
        """The teacher that takes part, if it embeds texts."""
        teacher = self.config.teacher
        return super().dense_teacher if teacher is not None and teacher.kind == "bi_encoder" else None

    def ask_teacher(self) -> None:
        """Ask for the teacher's scores of all rows."""
        teacher = self.config.teacher
        if self.config.losses.distillation > 0 and teacher is not None:
            self.teacher = teacher_scores(teacher, self.rows, seed=self.config.seed)

    def collator(self) -> TripletsCollator:
        """Return what makes a batch."""
        return TripletsCollator(self.rows, self.teacher, pad_id=self.pad_id)

    def sampler(self, data_order: int) -> Curriculum:
        """Return batches whose rows follow the mix of their stage."""
        return Curriculum(
            stages_of(self.config),
            self.rows.groupings(),
            self.rows.lengths,
            seed=self.config.seed + data_order,
            total_steps=self.planned()["steps"],
            batches_a_step=self.config.training.batches[1],
        )

    def schedule(self, planned: int, step: int) -> float:
        """Return the factor on the learning rate: warm-up and half a cosine, times that of the stage."""
        warm_up = self.config.training.warmup_of(planned)
        return staged_cosine(step, planned, warm_up_steps=warm_up, stages=stages_of(self.config))

    def evaluator(self, loss: TripletsLoss) -> TripletsValidation:
        """Return the validation, which takes the loss too."""
        return self.validation.with_loss(loss)

    def between(self, loss: TripletsLoss) -> Between:
        """Steer the sparsity, watch for collapse, write TensorBoard's files under the published names."""
        grace = self.config.training.warmup_of(self.planned()["steps"])
        alarm = SparsityAlarm(loss.model.get_embedding_dimension(), grace=grace)
        callbacks: list[TrainerCallback] = [Steering(loss, alarm, self.folder / "alarms.jsonl")]
        if "tensorboard" in self.config.training.report_to:
            callbacks.append(Scalars(self.folder / "tensorboard"))
        return Between(
            callbacks, {**{f"sparsity_{side}": part for side, part in loss.controllers.items()}, "alarm": alarm}
        )

    def arguments(self) -> dict[str, Any]:
        """Leave TensorBoard to `Scalars`."""
        return {"report_to": [place for place in self.config.training.report_to if place != "tensorboard"]}

    def more_subjects(self, student: NeuralEncoder) -> list[Subject]:
        """Return the student with the other similarity."""
        other = "dot" if self.config.similarity == "cosine" else "cosine"
        return [Subject(f"soju student ({other})", NeuralEncoder(student.model, similarity=other))]


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
        self._loss: TripletsLoss | None = None

    def with_loss(self, loss: TripletsLoss) -> TripletsValidation:
        """Return the same validation that takes this loss too, as ``val/loss``."""
        validation = copy(self)
        validation._loss = loss
        return validation

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
        if self._loss is not None:
            result["loss"] = self._mean_loss(self._loss, model)
        return result

    @torch.no_grad()
    def _mean_loss(self, loss: TripletsLoss, model: SpladeEncoder) -> float:
        """Return the mean loss over batches of the training's size, at the stage of the step.

        Only the first rank validates, so nothing here may wait for the others: neither the wrapper that the trainer
        puts around the model of the loss, nor a mean over ranks, which an evaluating loss does not take.
        """
        size = self._config.training.per_device_train_batch_size
        device = next(model.parameters()).device
        training = loss.training
        loss.eval()
        values: list[float] = []
        try:
            for start in range(0, len(self._rows) - size + 1, size) or (0,):
                batch = self._collate([{"row": row} for row in range(start, min(start + size, len(self._rows)))])
                label = batch.pop("label")
                output = model({name.removeprefix("text_"): value.to(device) for name, value in batch.items()})
                losses = loss.of_vectors(output["signed_maxima"], output["sentence_embedding"], label)
                values.append(float(torch.stack(list(losses.values())).sum()))
        finally:
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


class Steering(TrainerCallback):
    """Moves the controllers after each optimiser step, and watches for collapse.

    Args:
        loss: Whose controllers.
        alarm: Judges the active terms.
        record: ``alarms.jsonl`` of the run.
    """

    def __init__(self, loss: TripletsLoss, alarm: SparsityAlarm, record: Path) -> None:
        self._loss = loss
        self._alarm = alarm
        self._record = record

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Move the controllers; judge the active terms every `logging_steps` steps."""
        for controller in self._loss.controllers.values():
            controller.step(move=self._loss.ramp > 0)
        if state.global_step % args.logging_steps == 0:
            lowest = min(controller.active for controller in self._loss.controllers.values())
            wrong = self._alarm.look(lowest, step=state.global_step)
            if wrong is not None:
                logger.warning("step %d: %s", state.global_step, wrong)
                row = {"step": state.global_step, "alarm": wrong}
                on_main_process(lambda: append_json_line(self._record, row))

"""Train a student on term rows with the stock trainer: checkpoints, history, validation, gate and rollback."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from scipy.sparse import csr_array
from sentence_transformers import SparseEncoderTrainer, SparseEncoderTrainingArguments
from sentence_transformers.base.evaluation import BaseEvaluator
from transformers import PrinterCallback, ProgressCallback, TrainerCallback

from soju.core.errors import RegressionError, UserError
from soju.core.files import append_json_line
from soju.core.progress import is_shown
from soju.core.records import TermRow
from soju.core.score import Score
from soju.evaluation.setting import Setting
from soju.evaluation.terms import evaluate_terms
from soju.models.pieces import readable_terms
from soju.models.splade_encoder import SpladeEncoder
from soju.models.teacher_cache import Embeddings
from soju.quality.gate import QualityGate, Threshold
from soju.quality.rollback import Attempt, RollbackSettings, train_with_rollback
from soju.quality.verdicts import passed_steps, read_verdicts, record_verdict
from soju.recipes.splade.expected_terms import FUNCTION_WORDS, expected_terms
from soju.recipes.splade.probes import PROBES, probe_report
from soju.recipes.splade.student import Vocabulary
from soju.recipes.splade.term_rows import TermsCollator, TrainingRows
from soju.recipes.splade.terms_config import TermsConfig, TrainingSettings
from soju.recipes.splade.terms_loss import TermsLoss
from soju.training.checkpoints import checkpoint_step, newest_verified, set_aside_after
from soju.training.reliable import ReliableTrainer
from soju.training.sampling import LengthBuckets

CHOSEN_BY = "ko + 2 en"
"""The best checkpoint has the highest preservation.ko@50 + 2 × activation.en@50 on the development words."""


class TermsTrainer(ReliableTrainer, SparseEncoderTrainer):
    """`SparseEncoderTrainer` that loses nothing."""

    def add_model_card_callback(self, default_args_dict: dict[str, Any]) -> None:
        """Add none: the recipe writes the card, and the stock one reads the rows to make up examples."""


class Validation(BaseEvaluator):
    """Scores a student on development words and writes down what the probes light up.

    Args:
        rows: Development words, none of them trained on.
        vocabulary: The student's.
        probes: ``probes.jsonl`` of the run.
    """

    def __init__(self, rows: Sequence[TermRow], vocabulary: Vocabulary, probes: Path) -> None:
        super().__init__()
        self.primary_metric = CHOSEN_BY
        self.scores: list[Score] = []
        """Of the last validation."""
        self._words = [row.ko for row in rows]
        self._english, self._korean = expected_terms(rows, vocabulary.terms)
        self._vocabulary = vocabulary
        self._terms = readable_terms(vocabulary.tokenizer.convert_ids_to_tokens(range(len(vocabulary.tokenizer))))
        self._probes = probes
        self._setting = Setting.of_texts(
            [f"{row.ko}\t{[term.text for term in row.terms]}" for row in rows], subject="student", test_set="dev terms"
        )

    def __call__(
        self, model: Any, output_path: str | None = None, epoch: float = -1, steps: int = -1, **_: Any
    ) -> dict[str, float]:
        """Return the metrics of the development words."""
        vectors = model.encode_sparse(self._words)
        self.scores = evaluate_terms(
            vectors,
            english=self._english,
            korean=self._korean,
            vocabulary=self._terms,
            function_words=FUNCTION_WORDS,
            setting=self._setting,
        )
        found = {score.name: score.value for score in self.scores}
        chosen_by = found["preservation.ko@50"] + 2 * found["activation.en@50"]
        self.scores.append(
            self._setting.score(CHOSEN_BY, chosen_by, unit="", higher_is_better=True, texts=len(self._words))
        )
        self._watch_probes(model.encode_sparse([probe.source for probe in PROBES]), epoch=epoch, step=steps)
        active = vectors.nnz / len(self._words)
        return {score.name: score.value for score in self.scores} | {"active_terms": active}

    def _watch_probes(self, vectors: csr_array, *, epoch: float, step: int) -> None:
        report = probe_report(vectors, self._vocabulary.terms, self._terms, function_words=FUNCTION_WORDS)
        if PartialState().is_main_process:
            append_json_line(self._probes, {"epoch": epoch, "step": step, **report})


@dataclass(frozen=True, slots=True)
class Trained:
    """What training left."""

    best: Path
    """The checkpoint with the highest validation score."""
    last: Path
    """The checkpoint of the last step."""
    attempts: int


def train_student(
    student: Callable[[], SpladeEncoder],
    rows: TrainingRows,
    vectors: Embeddings | None,
    vocabulary: Vocabulary,
    dev: Sequence[TermRow],
    config: TermsConfig,
    folder: Path,
    *,
    resume: bool | Path = False,
) -> Trained:
    """Train with validation, gate and rollback.

    Args:
        student: Makes the student as it starts; called once an attempt.
        rows: What to train on.
        vectors: Teacher vectors of ``rows.teacher_texts``; none without distillation.
        vocabulary: The student's.
        dev: Development words.
        config: Settings of the run.
        folder: The run folder; gets ``checkpoints``, ``history.jsonl``, ``probes.jsonl``, ``verdicts.jsonl``.
        resume: Go on from the newest checkpoint that verifies, or from this one.

    Returns:
        The checkpoints.

    Raises:
        RegressionError: If quality fell too often.
        BadNumbersError: If loss or gradient were not finite too often.
        StoppedError: After a signal, when the checkpoint is written.
        UserError: If there is nothing to resume from.
    """
    checkpoints = folder / "checkpoints"
    validation = Validation(dev, vocabulary, folder / "probes.jsonl")
    gate = _Gate(validation, config.training, folder / "verdicts.jsonl")
    attempts = 0

    def attempt(attempt: Attempt) -> TermsTrainer:
        nonlocal attempts
        attempts = attempt.number + 1
        gate.attempt = attempt.number
        trainer = make_trainer(student(), rows, vectors, vocabulary, validation, config, folder, attempt)
        trainer.add_callback(gate.callback())
        start: bool | Path | None = attempt.resume_from
        if start is None and attempt.number == 0:
            start = resume if isinstance(resume, Path) else (resume and newest_verified(checkpoints).path)
        trainer.train(start or None)
        return trainer

    def passed() -> Path | None:
        return newest_verified(checkpoints, steps=passed_steps(read_verdicts(folder / "verdicts.jsonl"))).path

    def go_back(path: Path | None) -> None:
        set_aside_after(checkpoints, checkpoint_step(path) if path else 0)

    trainer = train_with_rollback(
        attempt,
        settings=RollbackSettings(max_rollbacks=config.training.max_rollbacks),
        record=folder / "rollbacks.jsonl",
        newest=lambda: newest_verified(checkpoints).path,
        last_passed=passed,
        go_back=go_back,
    )
    best = trainer.state.best_model_checkpoint
    last = newest_verified(checkpoints).path
    if last is None:
        raise UserError(f"{checkpoints}: no checkpoint verifies after training; look at the disk and train again")
    return Trained(best=Path(best) if best else last, last=last, attempts=attempts)


def make_trainer(
    student: SpladeEncoder,
    rows: TrainingRows,
    vectors: Embeddings | None,
    vocabulary: Vocabulary,
    validation: Validation | None,
    config: TermsConfig,
    folder: Path,
    attempt: Attempt,
    *,
    term_cost_V: torch.Tensor | None = None,
) -> TermsTrainer:
    """Put student, rows, loss and arguments into a trainer."""
    loss = TermsLoss(student, config.losses, term_cost_V=term_cost_V)
    pad_id = vocabulary.tokenizer.pad_token_id
    trainer = TermsTrainer(
        model=student,
        args=training_arguments(config, folder, rows, data_order=attempt.data_order, validates=validation is not None),
        train_dataset=rows.dataset(),
        loss=loss,
        evaluator=validation,
        data_collator=TermsCollator(rows, vectors, pad_id=pad_id),
        history=folder / "history.jsonl",
        learning_rate_scale=attempt.learning_rate_scale,
    )
    loss.progress = lambda: trainer.state.global_step / max(1, trainer.state.max_steps)
    trainer.remove_callback(PrinterCallback)
    if not is_shown():
        trainer.remove_callback(ProgressCallback)
    return trainer


def training_arguments(
    config: TermsConfig, folder: Path, rows: TrainingRows, *, data_order: int = 0, validates: bool = True
) -> SparseEncoderTrainingArguments:
    """Translate the settings.

    Args:
        config: Settings of the run.
        folder: The run folder.
        rows: Their lengths order the batches.
        data_order: Added to the seed of the order of the rows.
        validates: Whether there is something to validate on.

    Returns:
        The stock arguments.

    Raises:
        UserError: If fp16 is asked for without a GPU.
    """
    training = config.training
    if training.mixed_precision == "fp16" and not torch.cuda.is_available():
        raise UserError("training.mixed_precision: fp16 needs a GPU, and none is here; set it to bf16 or off")
    os.environ["TENSORBOARD_LOGGING_DIR"] = str(folder / "tensorboard")
    every: dict[str, Any] = {"eval_strategy": "epoch" if validates else "no", "save_strategy": "epoch"}
    if training.validate_every:
        every = {
            "eval_strategy": "steps" if validates else "no", "eval_steps": training.validate_every,
            "save_strategy": "steps", "save_steps": training.validate_every,
        }  # fmt: skip
    layers = training.layers_learning_rate
    return SparseEncoderTrainingArguments(
        output_dir=str(folder / "checkpoints"),
        per_device_train_batch_size=training.batch_size,
        gradient_accumulation_steps=training.accumulation,
        num_train_epochs=training.epochs,
        max_steps=training.max_steps or -1,
        learning_rate=training.learning_rate,
        learning_rate_mapping={r"\.layers\.": layers} if layers else {},
        weight_decay=training.weight_decay,
        lr_scheduler_type="linear",
        warmup_steps=training.warm_up,
        max_grad_norm=training.max_gradient_norm,
        fp16=training.mixed_precision == "fp16",
        bf16=training.mixed_precision == "bf16",
        gradient_checkpointing=training.gradient_checkpointing,
        logging_strategy="steps",
        logging_steps=training.log_every,
        logging_first_step=True,
        save_total_limit=training.keep_checkpoints,
        load_best_model_at_end=False,
        metric_for_best_model=f"eval_{CHOSEN_BY}" if validates else None,
        greater_is_better=True if validates else None,
        batch_sampler=LengthBuckets(rows.lengths, seed=config.seed + data_order),
        seed=config.seed,
        report_to=["tensorboard"],
        dataloader_pin_memory=torch.cuda.is_available(),
        **every,
    )


class _Gate:
    """Judges each validation against the best so far."""

    def __init__(self, validation: Validation, training: TrainingSettings, record: Path) -> None:
        self._validation = validation
        self._gate = QualityGate([Threshold(metric=CHOSEN_BY, max_relative_drop=training.max_drop)])
        self._record = record
        self.attempt = 0

    def judge(self, step: int) -> None:
        """Record the verdict on the last validation; raise when it did not pass."""
        (score,) = [score for score in self._validation.scores if score.name == CHOSEN_BY]
        earlier = [
            Score.from_json(row["scores"][0])
            for row in read_verdicts(self._record)
            if row["passed"] and row["step"] is not None and row["step"] < step
        ]
        best = max(earlier, key=lambda score: score.value, default=score)
        verdict = self._gate.judge([score], [best])
        if PartialState().is_main_process:
            record_verdict(self._record, verdict, where="training", step=step, attempt=self.attempt, scores=[score])
        if not verdict.passed:
            raise RegressionError(f"step {step:,}: {'; '.join(verdict.reasons)}")

    def callback(self) -> TrainerCallback:
        """Return the trainer callback that judges."""
        return _Judge(self)


class _Judge(TrainerCallback):
    def __init__(self, gate: _Gate) -> None:
        self._gate = gate

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Judge what was just measured."""
        self._gate.judge(state.global_step)

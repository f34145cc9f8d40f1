"""Train a student on term rows with the stock trainer: checkpoints, history, validation, gate and rollback."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from scipy.sparse import csr_array
from sentence_transformers import SparseEncoderTrainer, SparseEncoderTrainingArguments
from sentence_transformers.base.evaluation import BaseEvaluator
from transformers import PrinterCallback, ProgressCallback

from soju.core.errors import RegressionError, UserError
from soju.core.files import append_json_line
from soju.core.progress import is_shown
from soju.core.records import TermRow
from soju.core.score import Score
from soju.evaluation.setting import Setting
from soju.evaluation.terms import evaluate_terms
from soju.losses.sparsity import idf_term_cost
from soju.models.pieces import readable_terms
from soju.models.splade_encoder import SpladeEncoder
from soju.models.teacher_cache import Embeddings
from soju.quality.gate import QualityGate, Threshold
from soju.quality.rollback import Attempt, RollbackSettings, train_with_rollback
from soju.quality.verdicts import passed_steps, read_verdicts, record_verdict
from soju.recipes.splade.encoders import spelled_pieces
from soju.recipes.splade.expected_terms import FUNCTION_WORDS, expected_terms
from soju.recipes.splade.probes import PROBES, probe_report
from soju.recipes.splade.student import Vocabulary
from soju.recipes.splade.term_rows import TermsCollator, TrainingRows
from soju.recipes.splade.terms_config import LossSettings, TermsConfig, TrainingSettings
from soju.recipes.splade.terms_loss import TermsLoss
from soju.search.weighting import idf
from soju.training.checkpoints import checkpoint_step, newest_verified, resume_path, set_aside_after
from soju.training.judging import OnEvaluation
from soju.training.ranks import on_main_process, ranks_on_cpu
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

    Raises:
        UserError: If no development word has a term of one of the languages, so that nothing could be chosen by it.
    """

    def __init__(self, rows: Sequence[TermRow], vocabulary: Vocabulary, probes: Path) -> None:
        super().__init__()
        self.primary_metric = CHOSEN_BY
        self._words = [row.ko for row in rows]
        self._english, self._korean = expected_terms(rows, vocabulary.terms)
        for language, expected in (("English", self._english), ("Korean", self._korean)):
            if not any(expected):
                raise UserError(
                    f"data.dev_terms: none of the {len(rows):,} development words has a term in {language} that "
                    "the vocabulary can spell; set a larger share"
                )
        self._vocabulary = vocabulary
        self._probes = probes
        self._setting = Setting.of_texts(
            [f"{row.ko}\t{[term.text for term in row.terms]}" for row in rows], subject="student", test_set="dev terms"
        )

    def __call__(
        self, model: Any, output_path: str | None = None, epoch: float = -1, steps: int = -1, **_: Any
    ) -> dict[str, float]:
        """Return the metrics of the development words."""
        vectors = model.encode_sparse(self._words)
        terms = readable_terms(spelled_pieces(model.tokenizer, vectors.shape[1]))
        scores = evaluate_terms(
            vectors,
            english=self._english,
            korean=self._korean,
            vocabulary=terms,
            function_words=FUNCTION_WORDS,
            setting=self._setting,
        )
        found = {score.name: score.value for score in scores}
        found[CHOSEN_BY] = found["preservation.ko@50"] + 2 * found["activation.en@50"]
        self._watch_probes(model.encode_sparse([probe.source for probe in PROBES]), terms, epoch=epoch, step=steps)
        return {**found, "active_terms": vectors.nnz / len(self._words)}

    def judged(self, value: float) -> Score:
        """Return the score that checkpoints are judged and chosen by."""
        return self._setting.score(CHOSEN_BY, value, unit="", higher_is_better=True, texts=len(self._words))

    def _watch_probes(self, vectors: csr_array, terms: Sequence[str], *, epoch: float, step: int) -> None:
        report = probe_report(vectors, self._vocabulary.terms, terms, function_words=FUNCTION_WORDS)
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
    resume: Path | None = None,
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
        resume: A checkpoint to go on from. When not given, a run that was begun in the folder goes on from its newest
            checkpoint that verifies.

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
    wanted = [resume] if isinstance(resume, Path) else []
    attempts = 0

    def attempt(attempt: Attempt) -> TermsTrainer:
        nonlocal attempts
        attempts = attempt.number + 1
        trainer = make_trainer(student(), rows, vectors, vocabulary, validation, config, folder, attempt)
        trainer.add_callback(OnEvaluation(lambda step, metrics: gate.judge(step, metrics, attempt=attempt.number)))
        trainer.train(wanted.pop() if wanted else attempt.resume_from)
        return trainer

    def newest() -> Path | None:
        found = resume_path(checkpoints)
        if found.path is None and found.skipped:
            raise UserError(f"{found}; see soju verify, or remove {checkpoints} to train from the beginning")
        return found.path

    def passed() -> Path | None:
        return newest_verified(checkpoints, steps=passed_steps(read_verdicts(folder / "verdicts.jsonl"))).path

    def go_back(path: Path | None) -> None:
        set_aside_after(checkpoints, checkpoint_step(path) if path else 0)

    trainer = train_with_rollback(
        attempt,
        settings=RollbackSettings(max_rollbacks=config.training.max_rollbacks),
        record=folder / "rollbacks.jsonl",
        newest=newest,
        last_passed=passed,
        go_back=go_back,
        on_main=on_main_process,
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
) -> TermsTrainer:
    """Put student, rows, loss and arguments into a trainer."""
    loss = TermsLoss(student, config.losses, term_cost_V=term_costs(rows, student, config.losses))
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


def term_costs(rows: TrainingRows, student: SpladeEncoder, losses: LossSettings) -> torch.Tensor | None:
    """Return what the sparsity penalty charges for each term, ``(V,)``, by the texts that hold it; none when alike."""
    if losses.flops_cost is None:
        return None
    idf_V = idf(rows.texts_with_term(student.get_embedding_dimension()), rows.counts.texts)
    return idf_term_cost(torch.from_numpy(idf_V), form=losses.flops_cost)


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
    refuse_missing_device(training)
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
        use_cpu=ranks_on_cpu(),
        max_steps=training.max_steps or -1,
        learning_rate=training.learning_rate,
        learning_rate_mapping={r"\.layers?\.": layers} if layers else {},
        weight_decay=training.weight_decay,
        lr_scheduler_type="linear",
        warmup_steps=training.warm_up,
        max_grad_norm=training.max_gradient_norm,
        fp16=training.mixed_precision == "fp16",
        bf16=training.mixed_precision == "bf16",
        activation_checkpointing=training.gradient_checkpointing,
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


def planned_steps(rows: TrainingRows, training: TrainingSettings) -> dict[str, int]:
    """Return the batches of an epoch on one rank, and the optimiser steps of the whole training."""
    batches = -(-len(rows) // (training.batch_size * PartialState().num_processes))
    steps = training.max_steps or math.ceil(-(-batches // training.accumulation) * training.epochs)
    return {"batches": batches, "steps": steps}


def refuse_missing_device(training: TrainingSettings) -> None:
    """Refuse fp16 without a GPU (`UserError`)."""
    if training.mixed_precision == "fp16" and not torch.cuda.is_available():
        raise UserError("training.mixed_precision: fp16 needs a GPU, and none is here; set it to bf16 or off")


class _Gate:
    """Judges each validation against the best so far."""

    def __init__(self, validation: Validation, training: TrainingSettings, record: Path) -> None:
        self._validation = validation
        self._gate = QualityGate([Threshold(metric=CHOSEN_BY, max_relative_drop=training.max_drop)])
        self._record = record

    def judge(self, step: int, metrics: Mapping[str, float], *, attempt: int) -> None:
        """Record the verdict on a validation; raise on every rank when it did not pass."""
        score = self._validation.judged(metrics[f"eval_{CHOSEN_BY}"])
        on_main_process(lambda: self._judge(score, step=step, attempt=attempt))

    def _judge(self, score: Score, *, step: int, attempt: int) -> None:
        earlier = [
            Score.from_json(row["scores"][0])
            for row in read_verdicts(self._record)
            if row["passed"] and row["step"] is not None and row["step"] < step
        ]
        best = max(earlier, key=lambda score: score.value, default=score)
        verdict = self._gate.judge([score], [best])
        record_verdict(self._record, verdict, where="training", step=step, attempt=attempt, scores=[score])
        if not verdict.passed:
            raise RegressionError(f"step {step:,}: {'; '.join(verdict.reasons)}")

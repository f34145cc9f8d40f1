"""Train a student on term rows with the stock trainer: checkpoints, history, validation, gate and rollback."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from scipy.sparse import csr_array
from sentence_transformers import SparseEncoderTrainingArguments
from sentence_transformers.base.evaluation import BaseEvaluator

from soju.core.errors import UserError
from soju.core.files import append_json_line
from soju.core.score import Score, Setting
from soju.data.rows import TermRow
from soju.search.weighting import idf
from soju.sparse.config import NeuralTrainingSettings
from soju.sparse.initial import Vocabulary
from soju.sparse.losses import idf_term_cost
from soju.sparse.model import spelled_pieces
from soju.sparse.splade import SpladeEncoder
from soju.sparse.static.encoder import readable_terms
from soju.sparse.term_activation import FUNCTION_WORDS, PROBES, evaluate_terms, expected_terms, probe_report
from soju.sparse.terms.config import LossSettings, TermsConfig
from soju.sparse.terms.losses import TermsLoss
from soju.sparse.terms.rows import TermsCollator, TrainingRows
from soju.sparse.trainer import SpladeTrainer, neural_arguments
from soju.teachers.cache import Embeddings
from soju.training.rollback import Attempt, BestSoFar, RollbackSettings, Trained, train_judged
from soju.training.sampling import LengthBuckets

CHOSEN_BY = "ko + 2 en"
"""The best checkpoint has the highest preservation.ko@50 + 2 × activation.en@50 on the development words."""


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

    @property
    def chosen_by(self) -> str:
        """Name of the score that checkpoints are judged and chosen by."""
        return CHOSEN_BY

    def judged(self, value: float) -> Score:
        """Return the score that checkpoints are judged and chosen by."""
        return self._setting.score(CHOSEN_BY, value, unit="", higher_is_better=True, texts=len(self._words))

    def _watch_probes(self, vectors: csr_array, terms: Sequence[str], *, epoch: float, step: int) -> None:
        report = probe_report(vectors, self._vocabulary.terms, terms, function_words=FUNCTION_WORDS)
        if PartialState().is_main_process:
            append_json_line(self._probes, {"epoch": epoch, "step": step, **report})


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
    """Train with validation, gate and rollback; see `train_judged`.

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
    """
    validation = Validation(dev, vocabulary, folder / "probes.jsonl")

    def trainer(attempt: Attempt) -> SpladeTrainer:
        return make_trainer(student(), rows, vectors, vocabulary, validation, config, folder, attempt)

    return train_judged(
        trainer,
        BestSoFar(validation, config.training.max_drop, folder / "verdicts.jsonl"),
        folder,
        rollbacks=RollbackSettings(max_rollbacks=config.training.max_rollbacks),
        resume=resume,
    )


def make_trainer(
    student: SpladeEncoder,
    rows: TrainingRows,
    vectors: Embeddings | None,
    vocabulary: Vocabulary,
    validation: Validation | None,
    config: TermsConfig,
    folder: Path,
    attempt: Attempt,
) -> SpladeTrainer:
    """Put student, rows, loss and arguments into a trainer."""
    loss = TermsLoss(
        student,
        config,
        position=lambda: (trainer.state.global_step, trainer.state.max_steps),
        term_cost_V=term_costs(rows, student, config.losses),
    )
    pad_id = vocabulary.tokenizer.pad_token_id
    trainer = SpladeTrainer(
        model=student,
        args=training_arguments(config, folder, rows, data_order=attempt.data_order, validates=validation is not None),
        train_dataset=rows.dataset(),
        loss=loss,
        evaluator=validation,
        data_collator=TermsCollator(rows, vectors, pad_id=pad_id),
        history=folder / "history.jsonl",
        learning_rate_scale=attempt.learning_rate_scale,
    )
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
    """Translate the settings; see `neural_arguments`."""
    return neural_arguments(
        config.training,
        folder,
        LengthBuckets(rows.lengths, seed=config.seed + data_order),
        seed=config.seed,
        chosen_by=CHOSEN_BY if validates else None,
    )


def planned_steps(rows: TrainingRows, training: NeuralTrainingSettings) -> dict[str, int]:
    """Return the batches of an epoch on one rank, and the optimiser steps of the whole training."""
    batches = -(-len(rows) // (training.per_device_train_batch_size * PartialState().num_processes))
    steps = training.max_steps or math.ceil(
        -(-batches // training.gradient_accumulation_steps) * training.num_train_epochs
    )
    return {"batches": batches, "steps": steps}

"""The trainer of every mode with a neural student, and its arguments."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sentence_transformers import SparseEncoderTrainer, SparseEncoderTrainingArguments

from soju.sparse.config import NeuralTrainingSettings
from soju.training.reliable import ReliableTrainer
from soju.training.rollback import OwnProgress
from soju.training.settings import stock_arguments


def neural_arguments(
    training: NeuralTrainingSettings,
    folder: Path,
    batch_sampler: Any,
    *,
    seed: int,
    chosen_by: str | None,
    **more: Any,
) -> SparseEncoderTrainingArguments:
    """Translate the settings; `more` are arguments that replace ours. See `stock_arguments`."""
    layers = training.layers_learning_rate
    arguments = stock_arguments(training, folder, seed=seed, chosen_by=chosen_by)
    arguments |= {
        "learning_rate_mapping": {r"\.layers?\.": layers} if layers else {},
        "batch_sampler": batch_sampler,
    }
    return SparseEncoderTrainingArguments(**(arguments | more))


class SpladeTrainer(OwnProgress, ReliableTrainer, SparseEncoderTrainer):
    """`SparseEncoderTrainer` that loses nothing and shows its progress as everything else here does."""

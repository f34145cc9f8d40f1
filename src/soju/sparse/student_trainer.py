"""The trainer of every mode with a neural student."""

from __future__ import annotations

from sentence_transformers import SparseEncoderTrainer

from soju.training.judged_training import OwnProgress
from soju.training.reliable import ReliableTrainer


class SpladeTrainer(OwnProgress, ReliableTrainer, SparseEncoderTrainer):
    """`SparseEncoderTrainer` that loses nothing and shows its progress as everything else here does."""

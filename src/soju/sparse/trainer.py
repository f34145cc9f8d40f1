"""Training settings in the form the stock trainer takes.

The trainer of every mode with a neural student.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from sentence_transformers import SparseEncoderTrainer, SparseEncoderTrainingArguments

from soju.core.errors import UserError
from soju.sparse.config import TrainingSettings
from soju.training.ranks import ranks_on_cpu
from soju.training.reliable import OwnProgress, ReliableTrainer


def stock_arguments(
    training: TrainingSettings,
    folder: Path,
    batch_sampler: Any,
    *,
    seed: int,
    chosen_by: str | None,
    **more: Any,
) -> SparseEncoderTrainingArguments:
    """Translate the settings.

    Args:
        training: Settings.
        folder: The run folder.
        batch_sampler: Makes the sampler of a data set.
        seed: Of the run.
        chosen_by: Validation score that the best checkpoint has most of; no validation when ``None``.
        **more: Arguments that replace ours.

    Returns:
        The stock arguments.

    Raises:
        UserError: If fp16 is asked for without a GPU.
    """
    refuse_missing_device(training)
    os.environ["TENSORBOARD_LOGGING_DIR"] = str(folder / "tensorboard")
    validates = chosen_by is not None
    every: dict[str, Any] = {"eval_strategy": "epoch" if validates else "no", "save_strategy": "epoch"}
    if training.validate_every:
        every = {
            "eval_strategy": "steps" if validates else "no", "eval_steps": training.validate_every,
            "save_strategy": "steps", "save_steps": training.validate_every,
        }  # fmt: skip
    layers = training.layers_learning_rate
    arguments: dict[str, Any] = {
        "output_dir": str(folder / "checkpoints"),
        "per_device_train_batch_size": training.batch_size,
        "gradient_accumulation_steps": training.accumulation,
        "num_train_epochs": training.epochs,
        "use_cpu": ranks_on_cpu(),
        "max_steps": training.max_steps or -1,
        "learning_rate": training.learning_rate,
        "learning_rate_mapping": {r"\.layers?\.": layers} if layers else {},
        "weight_decay": training.weight_decay,
        "lr_scheduler_type": "linear",
        "warmup_steps": training.warm_up,
        "max_grad_norm": training.max_gradient_norm,
        "fp16": training.mixed_precision == "fp16",
        "bf16": training.mixed_precision == "bf16",
        "activation_checkpointing": training.gradient_checkpointing,
        "logging_strategy": "steps",
        "logging_steps": training.log_every,
        "logging_first_step": True,
        "save_total_limit": training.keep_checkpoints,
        "load_best_model_at_end": False,
        "metric_for_best_model": f"eval_{chosen_by}" if validates else None,
        "greater_is_better": True if validates else None,
        "batch_sampler": batch_sampler,
        "seed": seed,
        "report_to": ["tensorboard"],
        "dataloader_pin_memory": torch.cuda.is_available(),
    }
    return SparseEncoderTrainingArguments(**(arguments | every | more))


def refuse_missing_device(training: TrainingSettings) -> None:
    """Refuse fp16 without a GPU (`UserError`)."""
    if training.mixed_precision == "fp16" and not torch.cuda.is_available():
        raise UserError("training.mixed_precision: fp16 needs a GPU, and none is here; set it to bf16 or off")


class SpladeTrainer(OwnProgress, ReliableTrainer, SparseEncoderTrainer):
    """`SparseEncoderTrainer` that loses nothing and shows its progress as everything else here does."""

"""Training settings every recipe shares, under the names of transformers' ``TrainingArguments``."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field, field_validator

from soju.core.config import Settings
from soju.core.errors import UserError


class TrainingSettings(Settings):
    """How a student is trained. A recipe inherits this and changes defaults or adds what it alone has."""

    renamed: ClassVar[Mapping[str, str]] = {
        "batch_size": "per_device_train_batch_size",
        "accumulation": "gradient_accumulation_steps",
        "epochs": "num_train_epochs",
        "warm_up": "warmup_steps",
        "max_gradient_norm": "max_grad_norm",
        "validate_every": "eval_steps",
        "log_every": "logging_steps",
        "keep_checkpoints": "save_total_limit",
    }

    per_device_train_batch_size: int = Field(default=32, ge=1)
    """Rows a device reads in one forward pass."""
    gradient_accumulation_steps: int = Field(default=1, ge=1)
    """Forward passes in one optimiser step."""
    num_train_epochs: float = Field(default=3, gt=0)
    """Passes over the rows, unless `max_steps` is given."""
    max_steps: int | None = Field(default=None, ge=1)
    """Optimiser steps."""
    learning_rate: float = Field(default=5e-5, gt=0)
    """The highest learning rate; it falls linearly to 0."""
    weight_decay: float = Field(default=0.01, ge=0)
    """Of AdamW."""
    warmup_steps: float = Field(default=0.1, ge=0)
    """Steps in which the learning rate rises; a number below 1 is a share of the run."""
    max_grad_norm: float = Field(default=1.0, gt=0)
    """Longer gradients are clipped."""
    mixed_precision: Literal["fp16", "bf16", "off"] = "off"
    """Autocast type; ``fp16`` needs a GPU. Write ``"off"``, float32, in quotes: a bare off is false in YAML."""
    gradient_checkpointing: bool = False
    """Compute activations again in the backward pass: less memory, slower steps."""
    eval_steps: int | None = Field(default=None, ge=1)
    """Steps between validations, each with a checkpoint; once an epoch when not given."""
    logging_steps: int = Field(default=25, ge=1)
    """Steps between lines of ``history.jsonl``."""
    save_total_limit: int = Field(default=2, ge=1)
    """Newest checkpoints that are kept, in addition to the best."""
    report_to: tuple[Literal["tensorboard", "wandb"], ...] = ("tensorboard",)
    """Where the history is shown besides the run folder."""

    @field_validator("mixed_precision", mode="before")
    @classmethod
    def _off_is_a_word(cls, value: object) -> object:
        return "off" if value is False else value

    def warmup_of(self, planned: int) -> int:
        """Return the steps of the warm-up in a run of `planned` steps, as transformers counts them."""
        return int(self.warmup_steps) if self.warmup_steps >= 1 else math.ceil(planned * self.warmup_steps)

    def refuse_missing_device(self) -> None:
        """Refuse fp16 without a GPU (`UserError`)."""
        import torch

        if self.mixed_precision == "fp16" and not torch.cuda.is_available():
            raise UserError("training.mixed_precision: fp16 needs a GPU, and none is here; set it to bf16 or off")


def stock_arguments(training: TrainingSettings, folder: Path, *, seed: int, chosen_by: str | None) -> dict[str, Any]:
    """Translate the settings into keyword arguments of transformers' ``TrainingArguments``; a recipe adds its own.

    Args:
        training: Settings.
        folder: Gets ``checkpoints`` and ``tensorboard``.
        seed: Of the run.
        chosen_by: Validation score of which the best checkpoint has most; no validation when ``None``.

    Returns:
        Keyword arguments.

    Raises:
        UserError: If fp16 is asked for without a GPU.
    """
    import torch

    from soju.training.ranks import ranks_on_cpu

    training.refuse_missing_device()
    os.environ["TENSORBOARD_LOGGING_DIR"] = str(folder / "tensorboard")
    validates = chosen_by is not None
    every = "steps" if training.eval_steps else "epoch"
    steps = {"eval_steps": training.eval_steps, "save_steps": training.eval_steps} if training.eval_steps else {}
    return {
        "output_dir": str(folder / "checkpoints"),
        "per_device_train_batch_size": training.per_device_train_batch_size,
        "gradient_accumulation_steps": training.gradient_accumulation_steps,
        "num_train_epochs": training.num_train_epochs,
        "max_steps": training.max_steps or -1,
        "use_cpu": ranks_on_cpu(),
        "learning_rate": training.learning_rate,
        "lr_scheduler_type": "linear",
        "weight_decay": training.weight_decay,
        "warmup_steps": training.warmup_steps,
        "max_grad_norm": training.max_grad_norm,
        "fp16": training.mixed_precision == "fp16",
        "bf16": training.mixed_precision == "bf16",
        "activation_checkpointing": training.gradient_checkpointing,
        "logging_strategy": "steps",
        "logging_steps": training.logging_steps,
        "logging_first_step": True,
        "eval_strategy": every if validates else "no",
        "save_strategy": every,
        **steps,
        "save_total_limit": training.save_total_limit,
        "load_best_model_at_end": False,
        "metric_for_best_model": f"eval_{chosen_by}" if validates else None,
        "greater_is_better": True if validates else None,
        "seed": seed,
        "report_to": list(training.report_to),
        "dataloader_pin_memory": torch.cuda.is_available(),
    }

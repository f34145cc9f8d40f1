"""The trainer of every stage: checkpoints hold what moves, and layers may join in one after the other."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from sentence_transformers import SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from torch import Tensor
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR

from soju.core.errors import UserError
from soju.embedding.config import OptimiserSettings
from soju.embedding.trainable import Group, load_trainable, save_trainable, tensors_of
from soju.training.ranks import ranks_on_cpu
from soju.training.reliable import OwnProgress, ReliableTrainer
from soju.training.sampling import LengthBuckets


def warm_up_and_decay(step: int, *, planned: int, warm_up: float, joins_at: float = 0.0) -> float:
    """Return the factor on the learning rate: a line up, a line down, and 0 before it is the group's turn.

    >>> [warm_up_and_decay(step, planned=4, warm_up=0.5) for step in range(5)]
    [0.0, 0.5, 1.0, 0.5, 0.0]

    Args:
        step: Optimiser steps done.
        planned: Optimiser steps in all.
        warm_up: Share of the steps in which it rises.
        joins_at: Share of the steps after which it leaves 0.

    Returns:
        A number in [0, 1].
    """
    if step < joins_at * planned:
        return 0.0
    rising = math.ceil(warm_up * planned)
    if step < rising:
        return step / rising
    return max(0.0, (planned - step) / max(1, planned - rising))


class _MovingPart(SentenceTransformerTrainer):
    """The stock trainer, whose checkpoints hold what moves; all else is where the stage started."""

    groups: list[Group]
    optimizer: Any

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        folder = Path(output_dir or self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        save_trainable(self.groups, folder)

    def _load_from_checkpoint(self, checkpoint_path: str) -> None:
        load_trainable(self.groups, Path(checkpoint_path))


class StageTrainer(OwnProgress, ReliableTrainer, _MovingPart):
    """Trains groups of parameters with a linear schedule, each from when it joins in.

    Args:
        groups: What moves.
        warm_up: Share of the steps in which the learning rate rises.
        **more: See `ReliableTrainer`.
    """

    def __init__(self, *, groups: list[Group], warm_up: float, **more: Any) -> None:
        self.groups = groups
        self._warm_up = warm_up
        super().__init__(**more)

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        """Make AdamW over the groups; what is no matrix (norms, biases, gates) does not decay."""
        if self.optimizer is None:
            settings = self.args
            self.optimizer = AdamW(
                [
                    {
                        "params": [value for value in group.parameters.values() if (value.ndim > 1) is decays],
                        "weight_decay": settings.weight_decay if decays else 0.0,
                    }
                    for group in self.groups
                    for decays in (True, False)
                ],
                lr=settings.learning_rate,
            )
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """Make schedules that are pure functions of the step."""
        if getattr(self, "lr_scheduler", None) is None:
            schedules: list[Callable[[int], float]] = [
                partial(warm_up_and_decay, planned=num_training_steps, warm_up=self._warm_up, joins_at=group.joins_at)
                for group in self.groups
                for _ in (True, False)
            ]
            self.lr_scheduler = LambdaLR(optimizer or self.optimizer, schedules)
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def _weights_to_save(self) -> Iterable[Tensor]:
        return tensors_of(self.groups).values()


def stage_arguments(
    settings: OptimiserSettings,
    folder: Path,
    lengths: Any,
    *,
    seed: int,
    data_order: int = 0,
    chosen_by: str | None,
) -> SentenceTransformerTrainingArguments:
    """Translate the settings.

    Args:
        settings: Of the stage.
        folder: Gets ``checkpoints`` and ``tensorboard``.
        lengths: Of the rows, in any unit.
        seed: Of the run.
        data_order: Of the attempt; another number is another order of the rows.
        chosen_by: Validation score that the best checkpoint has most of; no validation when ``None``.

    Returns:
        The stock arguments.
    """
    os.environ["TENSORBOARD_LOGGING_DIR"] = str(folder / "tensorboard")
    validates = chosen_by is not None
    return SentenceTransformerTrainingArguments(
        output_dir=str(folder / "checkpoints"),
        per_device_train_batch_size=settings.batch_size,
        gradient_accumulation_steps=settings.accumulation,
        num_train_epochs=settings.epochs,
        max_steps=settings.max_steps or -1,
        use_cpu=ranks_on_cpu(),
        learning_rate=settings.learning_rate,
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.max_gradient_norm,
        bf16=settings.mixed_precision == "bf16",
        activation_checkpointing=settings.gradient_checkpointing,
        logging_strategy="steps",
        logging_steps=settings.log_every,
        logging_first_step=True,
        eval_strategy="steps" if validates else "no",
        eval_steps=settings.validate_every,
        save_strategy="steps",
        save_steps=settings.validate_every,
        save_total_limit=settings.keep_checkpoints,
        load_best_model_at_end=False,
        metric_for_best_model=f"eval_{chosen_by}" if validates else None,
        greater_is_better=True if validates else None,
        batch_sampler=LengthBuckets(lengths, seed=seed + data_order),
        seed=seed,
        report_to=["tensorboard"],
        dataloader_drop_last=True,
        dataloader_pin_memory=torch.cuda.is_available(),
    )


def refuse_few_rows(rows: int, settings: OptimiserSettings, *, place: str, ranks: int) -> None:
    """Refuse rows that fill no batch (`UserError`)."""
    if rows < settings.batch_size * ranks:
        raise UserError(
            f"{place}: {rows:,} rows do not fill one batch of {settings.batch_size * ranks:,}; give more, or lower "
            "batch_size"
        )

"""The trainer of every stage: checkpoints hold what moves, and layers may join in one after the other."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

from datasets import Dataset
from sentence_transformers import SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from torch import Tensor
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR

from soju.core.errors import IntegrityError, UserError
from soju.core.files import verify_manifest
from soju.embedding.config import StageSettings
from soju.embedding.rows import Rows
from soju.embedding.trainable import Group, load_trainable, save_trainable, tensors_of
from soju.training.reliable import ReliableTrainer
from soju.training.rollback import OwnProgress
from soju.training.sampling import LengthBuckets
from soju.training.settings import stock_arguments


def warm_up_and_decay(step: int, *, planned: int, warmup: int, joins_at: float = 0.0) -> float:
    """Return the factor on the learning rate: up in `warmup` steps, down in the rest, 0 before `joins_at` of all steps.

    >>> [warm_up_and_decay(step, planned=4, warmup=2) for step in range(5)]
    [0.0, 0.5, 1.0, 0.5, 0.0]
    """
    if step < joins_at * planned:
        return 0.0
    if step < warmup:
        return step / warmup
    return max(0.0, (planned - step) / max(1, planned - warmup))


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
        **more: See `ReliableTrainer`.
    """

    def __init__(self, *, groups: list[Group], **more: Any) -> None:
        self.groups = groups
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
            warmup = self.args.get_warmup_steps(num_training_steps)
            schedules: list[Callable[[int], float]] = [
                partial(warm_up_and_decay, planned=num_training_steps, warmup=warmup, joins_at=group.joins_at)
                for group in self.groups
                for _ in (True, False)
            ]
            self.lr_scheduler = LambdaLR(optimizer or self.optimizer, schedules)
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def _weights_to_save(self) -> Iterable[Tensor]:
        return tensors_of(self.groups).values()


def stage_arguments(
    settings: StageSettings, folder: Path, lengths: Any, *, seed: int, data_order: int = 0, chosen_by: str | None
) -> SentenceTransformerTrainingArguments:
    """Translate the settings.

    Args:
        settings: Of the stage.
        folder: Gets ``checkpoints`` and ``tensorboard``.
        lengths: Of the rows, in any unit; rows of a batch are of similar length.
        seed: Of the run.
        data_order: Of the attempt; another number is another order of the rows.
        chosen_by: Validation score of which the best checkpoint has most; no validation when ``None``.

    Returns:
        The stock arguments.
    """
    return SentenceTransformerTrainingArguments(
        **stock_arguments(settings, folder, seed=seed, chosen_by=chosen_by),
        batch_sampler=LengthBuckets(lengths, seed=seed + data_order),
        dataloader_drop_last=True,
    )


def places_of(rows: Rows) -> Dataset:
    """Return what the trainer counts and shuffles: places of rows."""
    return Dataset.from_dict({"row": list(range(len(rows)))})


def is_whole(folder: Path) -> bool:
    """Tell whether a folder verifies against its manifest."""
    try:
        verify_manifest(folder)
    except IntegrityError:
        return False
    return True


def refuse_few_rows(rows: int, settings: StageSettings, *, place: str, ranks: int) -> None:
    """Refuse rows that fill no batch (`UserError`)."""
    whole = settings.per_device_train_batch_size * ranks
    if rows < whole:
        raise UserError(
            f"{place}: {rows:,} rows do not fill one batch of {whole:,}; give more, or lower "
            "per_device_train_batch_size"
        )

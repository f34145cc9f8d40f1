"""TensorBoard under the names people look for: ``train/loss``, ``train/loss_infonce``, ``val/loss`` ..."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

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

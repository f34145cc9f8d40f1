"""Another learning rate in the middle of a run."""

from __future__ import annotations

from typing import Any


def scale_learning_rate(optimizer: Any, scheduler: Any, factor: float) -> None:
    """Multiply the learning rate of everything still to come.

    Setting it in the arguments of a resumed run does nothing, because optimiser and scheduler bring their own from the
    checkpoint; so their state is edited.

    Args:
        optimizer: With ``param_groups``.
        scheduler: A ``LRScheduler`` that computes from ``base_lrs``, as all stock ones of transformers do.
        factor: > 0.

    Raises:
        ValueError: If `factor` is not positive, or the scheduler has no ``base_lrs``.
    """
    if not factor > 0:
        raise ValueError(f"factor must be > 0, got {factor}")
    if factor == 1:
        return
    if not hasattr(scheduler, "base_lrs"):
        raise ValueError(f"{type(scheduler).__name__} has no base_lrs; use a schedule that is a function of the step")
    for group in optimizer.param_groups:
        for key in {"lr", "initial_lr"} & group.keys():
            group[key] *= factor
    scheduler.base_lrs = [rate * factor for rate in scheduler.base_lrs]
    scheduler._last_lr = [rate * factor for rate in scheduler._last_lr]

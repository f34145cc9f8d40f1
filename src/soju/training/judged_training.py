"""Train with a gate: judge each validation against the best so far, roll back what regresses, keep what passed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from transformers import PrinterCallback, ProgressCallback

from soju.core.errors import RegressionError, UserError
from soju.core.progress import is_shown
from soju.core.score import Score
from soju.training.checkpoints import checkpoint_step, newest_verified, resume_path, set_aside_after
from soju.training.gate import QualityGate, Threshold
from soju.training.judging import OnEvaluation
from soju.training.ranks import on_main_process
from soju.training.rollback import Attempt, RollbackSettings, train_with_rollback
from soju.training.verdicts import passed_steps, read_verdicts, record_verdict

if TYPE_CHECKING:
    from transformers import Trainer as _Trainer
else:
    _Trainer = object


class OwnProgress(_Trainer):
    """Put first: ``class TermsTrainer(OwnProgress, ReliableTrainer, SparseEncoderTrainer)``.

    It shows progress as everything else here does, and leaves the model card to the recipe.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.remove_callback(PrinterCallback)
        if not is_shown():
            self.remove_callback(ProgressCallback)

    def add_model_card_callback(self, default_args_dict: dict[str, Any]) -> None:
        """Add none: the recipe writes the card, and the stock one reads the rows to make up examples."""


class Gate(Protocol):
    """Judges a validation."""

    def judge(self, step: int, metrics: Mapping[str, float], *, attempt: int) -> None:
        """Record the verdict on a validation; raise `RegressionError` on every rank when it did not pass."""


class Judged(Protocol):
    """A validation with one score that checkpoints are judged and chosen by."""

    @property
    def chosen_by(self) -> str:
        """Name of the score, as the validation reports it."""

    def judged(self, value: float) -> Score:
        """Return the score with its signature."""


@dataclass(frozen=True, slots=True)
class Trained:
    """What training left."""

    best: Path
    """The checkpoint with the highest validation score."""
    last: Path
    """The checkpoint of the last step."""
    attempts: int


def train_judged(
    make_trainer: Callable[[Attempt], Any],
    gate: Gate,
    folder: Path,
    *,
    rollbacks: RollbackSettings,
    resume: Path | None = None,
) -> Trained:
    """Train with validation, gate and rollback.

    Args:
        make_trainer: Makes a trainer around a student as it starts; called once an attempt.
        gate: Judges each validation; it records its verdicts in ``verdicts.jsonl`` of the folder.
        folder: Gets ``checkpoints`` and ``rollbacks.jsonl``: the run folder, or that of one of its stages.
        rollbacks: How often the run may go back, and what it changes then.
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
    wanted = [] if resume is None else [resume]
    attempts = 0

    def attempt(attempt: Attempt) -> Any:
        nonlocal attempts
        attempts = attempt.number + 1
        trainer = make_trainer(attempt)
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
        settings=rollbacks,
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


class BestSoFar:
    """Judges each validation against the best so far.

    Args:
        validation: What checkpoints are judged by.
        max_drop: Largest fall below the best so far, as a fraction of it.
        record: ``verdicts.jsonl``.
    """

    def __init__(self, validation: Judged, max_drop: float, record: Path) -> None:
        self._validation = validation
        self._gate = QualityGate([Threshold(metric=validation.chosen_by, max_relative_drop=max_drop)])
        self._record = record

    def judge(self, step: int, metrics: Mapping[str, float], *, attempt: int) -> None:
        """Record the verdict on a validation; raise on every rank when it did not pass."""
        score = self._validation.judged(metrics[f"eval_{self._validation.chosen_by}"])
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

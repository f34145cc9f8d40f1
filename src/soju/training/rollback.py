"""Training that judges each validation, goes back to the last good checkpoint and changes one thing when quality falls.

`train_with_rollback` knows no trainer: it decides, records and repeats. `train_judged` joins it to a
`soju.training.reliable.ReliableTrainer`, its checkpoints and a gate.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar

from pydantic import Field
from transformers import TrainerCallback

from soju.core.config import Settings
from soju.core.errors import BadNumbersError, RegressionError, UserError
from soju.core.files import append_json_line, read_json_lines
from soju.core.results import Score
from soju.training.checkpoints import checkpoint_step, newest_verified, resume_path, set_aside_after
from soju.training.gate import QualityGate, Threshold, passed_steps, read_verdicts, record_verdict
from soju.training.ranks import on_main_process

T = TypeVar("T")
Change = Literal["data order", "learning rate"]


class RollbackSettings(Settings):
    """How often, and how far, training may be changed after a regression."""

    max_rollbacks: int = Field(2, ge=0)
    """Rollbacks before the run gives up; 0 gives up at the first regression."""
    learning_rate_factor: float = Field(0.5, gt=0, lt=1)
    """What the learning rate is multiplied with when it is its turn."""
    change_first: Change = "data order"
    """What is changed after the first regression; after the next it is the other's turn."""


@dataclass(frozen=True, slots=True)
class Attempt:
    """One try at training to the end."""

    number: int = 0
    change: str = "as configured"
    """What is different from the attempt before."""
    data_order: int = 0
    """Added to the seed of the sampler."""
    learning_rate_scale: float = 1.0
    """Multiplied with the learning rate of the configuration."""
    resume_from: Path | None = None
    """Checkpoint to start from; ``None`` is the beginning."""


def next_attempt(failed: Sequence[Attempt], settings: RollbackSettings) -> Attempt | None:
    """Decide what to try after the attempts that failed: another data order and a lower learning rate, in turn.

    Args:
        failed: In the order they were tried.
        settings: Limits.

    Returns:
        The attempt, without the checkpoint it starts from, or ``None`` when the run must give up.
    """
    if not failed:
        return Attempt()
    if len(failed) > settings.max_rollbacks:
        return None
    last = replace(failed[-1], number=len(failed), resume_from=None)
    if (len(failed) % 2 == 1) == (settings.change_first == "data order"):
        return replace(last, change=f"data order {last.data_order + 1}", data_order=last.data_order + 1)
    factor = settings.learning_rate_factor
    return replace(last, change=f"learning rate × {factor:g}", learning_rate_scale=last.learning_rate_scale * factor)


def train_with_rollback(
    train_attempt: Callable[[Attempt], T],
    *,
    settings: RollbackSettings,
    record: Path,
    newest: Callable[[], Path | None],
    last_passed: Callable[[], Path | None],
    go_back: Callable[[Path | None], None],
    on_main: Callable[[Callable[[], Any]], Any] = lambda act: act(),
) -> T:
    """Train; after a regression or bad numbers go back, change one recorded thing and train on.

    An interrupted call may be repeated: what was decided is read from `record`, and the attempt under way goes on.

    Args:
        train_attempt: Trains to the end; raises `RegressionError` or `BadNumbersError` to be rolled back. Anything
            else that it raises ends the run.
        settings: Limits.
        record: ``rollbacks.jsonl`` of the run: a row when an attempt starts and when it ends.
        newest: Returns the newest checkpoint that verifies, for an attempt that was interrupted.
        last_passed: Returns the newest checkpoint that verifies and passed the gate.
        go_back: Puts later checkpoints out of the way; ``None`` means all.
        on_main: Calls a function on one process of several and returns its result on all. The functions above and
            everything that is written run through it, except `train_attempt`.

    Returns:
        What `train_attempt` returned.

    Raises:
        RegressionError: If the last attempt allowed regressed.
        BadNumbersError: If it ran into bad numbers.
    """

    def begin() -> Attempt:
        failed, running = _read(read_json_lines(record))
        if running is not None:
            return replace(running, resume_from=newest())
        attempt = next_attempt(failed, settings)
        if attempt is None:
            raise RegressionError(f"{record}: this run gave up after {len(failed) - 1} rollbacks; change its settings")
        if failed:
            attempt = replace(attempt, resume_from=last_passed())
            go_back(attempt.resume_from)
        append_json_line(record, _started(attempt))
        return attempt

    def end(attempt: Attempt, outcome: str, reason: str = "") -> bool:
        append_json_line(record, {"attempt": attempt.number, "outcome": outcome, "reason": reason})
        return next_attempt(_read(read_json_lines(record))[0], settings) is None

    while True:
        attempt: Attempt = on_main(begin)
        try:
            result = train_attempt(attempt)
        except (RegressionError, BadNumbersError) as error:
            reason = str(error)
            if on_main(lambda: end(attempt, "rolled back", reason)):  # noqa: B023 - called at once
                raise type(error)(f"{reason}; gave up after {attempt.number} rollbacks, see {record}") from error
        else:
            on_main(lambda: end(attempt, "finished"))  # noqa: B023 - called at once
            return result


def _started(attempt: Attempt) -> dict[str, Any]:
    return {
        "attempt": attempt.number,
        "outcome": "started",
        "change": attempt.change,
        "data_order": attempt.data_order,
        "learning_rate_scale": attempt.learning_rate_scale,
        "resume_from": attempt.resume_from.name if attempt.resume_from else None,
    }


def _read(rows: Iterable[Mapping[str, Any]]) -> tuple[list[Attempt], Attempt | None]:
    """Return the attempts that failed and the one that was under way."""
    failed: list[Attempt] = []
    running: Attempt | None = None
    for row in rows:
        if row["outcome"] == "started":
            running = Attempt(row["attempt"], row["change"], row["data_order"], row["learning_rate_scale"])
        elif row["outcome"] == "rolled back" and running is not None:
            failed, running = [*failed, running], None
    return failed, running


class OnEvaluation(TrainerCallback):
    """Calls ``judge(step, metrics)`` after each evaluation, on every rank with the same metrics.

    When it raises `RegressionError`, training ends and no checkpoint of that step is written, so that the newest one is
    the last that passed.
    """

    def __init__(self, judge: Callable[[int, Mapping[str, float]], None]) -> None:
        self.judge = judge

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Hand on step and metrics."""
        self.judge(state.global_step, kwargs["metrics"])


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
        raise UserError(f"{checkpoints}: no checkpoint verifies after training; check the disk and train again")
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

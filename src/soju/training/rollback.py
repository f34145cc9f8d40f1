"""Training that goes back to the last good checkpoint and changes one thing when quality falls."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import Field

from soju.core.config import Settings
from soju.core.errors import BadNumbersError, RegressionError
from soju.core.files import append_json_line, read_json_lines

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

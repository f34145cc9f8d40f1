"""The account of a run's optimiser steps: each number of the clock is spent once, undone work included.

A clock of optimiser iterations runs 1 … N. A rollback does not turn it back: the steps since the checkpoint that it
returns to stay spent and count as undone. At the end ``kept + undone = N``, and ``refused`` of them left the weights as
they were because a number was not finite.
"""

from __future__ import annotations

import json
import stat
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

from soju.core.errors import IntegrityError, UserError
from soju.core.files import write_json

_MOST_BYTES = 1 << 20
_FORMAT = "soju-step-account-1"


@dataclass(frozen=True, slots=True)
class Undone:
    """One rollback."""

    clock: int
    """Steps executed when the run went back; it goes on with the step after."""
    back_to: int
    """Clock at which the checkpoint was written that the run went back to."""
    kept_there: int
    """Steps that the weights of that checkpoint hold."""
    abandoned: tuple[int, ...]
    """Clocks of the checkpoints that were given up."""


@dataclass(slots=True)
class StepAccount:
    """What became of every step so far. `step`, `checkpoint` and `roll_back` keep it in order or refuse."""

    total: int
    """Steps that the run may execute, N."""
    executed: int = 0
    """The clock: steps executed, undone and refused ones included."""
    refused: list[int] = field(default_factory=list)
    """Clocks of the steps that left the weights as they were."""
    checkpoints: dict[int, int] = field(default_factory=lambda: {0: 0})
    """Clock of each checkpoint that may be gone back to -> steps that its weights hold."""
    rollbacks: list[Undone] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.total < 1:
            raise UserError(f"step account: {self.total} steps; give at least 1")

    @property
    def kept(self) -> int:
        """Steps on the way to the present weights, refused ones on it included."""
        undone = self.rollbacks[-1] if self.rollbacks else None
        return self.executed if undone is None else undone.kept_there + self.executed - undone.clock

    @property
    def undone(self) -> int:
        """Steps that rollbacks took back."""
        return self.executed - self.kept

    @property
    def left(self) -> int:
        """Steps that may still be executed."""
        return self.total - self.executed

    @property
    def closed(self) -> bool:
        """Whether all steps were executed."""
        return self.left == 0

    def step(self, clock: int, *, refused: bool = False) -> None:
        """Book one optimiser iteration.

        Args:
            clock: Its number, the next one: nothing is executed twice or left out.
            refused: Whether its loss or gradient was not finite and the weights were left as they were.

        Raises:
            UserError: If the clock is not the next one or all steps are spent.
        """
        if self.closed:
            raise UserError(f"step account: all {self.total:,} steps are executed; step {clock:,} is one too many")
        if clock != self.executed + 1:
            raise UserError(f"step account: step {clock:,} after {self.executed:,}; execute each step once, in order")
        self.executed = clock
        if refused:
            self.refused.append(clock)

    def checkpoint(self) -> None:
        """Book a checkpoint of the present weights, which `roll_back` may go back to."""
        self.checkpoints[self.executed] = self.kept

    def forget(self, clock: int) -> None:
        """Book that a checkpoint was removed to save space."""
        if self.checkpoints.pop(clock, None) is None:
            raise UserError(f"step account: no checkpoint {clock:,}; there are {_listed(self.checkpoints)}")

    def roll_back(self, back_to: int) -> Undone:
        """Book the return to a checkpoint; later ones are abandoned, and the present clock becomes one of its weights.

        Args:
            back_to: Clock of the checkpoint.

        Returns:
            The rollback.

        Raises:
            UserError: If there is no such checkpoint.
        """
        if back_to not in self.checkpoints:
            raise UserError(f"step account: no checkpoint {back_to:,}; there are {_listed(self.checkpoints)}")
        abandoned = tuple(sorted(clock for clock in self.checkpoints if clock > back_to))
        for clock in abandoned:
            del self.checkpoints[clock]
        undone = Undone(self.executed, back_to, self.checkpoints[back_to], abandoned)
        self.rollbacks.append(undone)
        # The checkpoint is published again under the present clock, so a resumed run goes on from there.
        self.checkpoints[self.executed] = undone.kept_there
        return undone

    def summary(self) -> dict[str, int]:
        """Return the sums: ``executed = kept + undone``, of which ``refused``."""
        return {
            "total": self.total,
            "executed": self.executed,
            "kept": self.kept,
            "undone": self.undone,
            "refused": len(self.refused),
            "rollbacks": len(self.rollbacks),
            "left": self.left,
        }

    def to_json(self) -> dict[str, Any]:
        """Return the entries as a plain dictionary, for `from_json`."""
        return asdict(self)

    def save(self, path: Path) -> None:
        """Write the account as JSON, whole or not at all."""
        write_json(path, {"format": _FORMAT, **self.summary(), "account": self.to_json()})

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read what `save` wrote, and check that it adds up.

        Args:
            path: A JSON file.

        Returns:
            The account.

        Raises:
            IntegrityError: If the file is not there, is no such account, or its numbers contradict each other.
        """
        try:
            status = path.lstat()
            if not stat.S_ISREG(status.st_mode) or status.st_size > _MOST_BYTES:
                raise ValueError("not a regular file of the usual size")
            value = json.loads(path.read_text(encoding="utf-8"))
            if value["format"] != _FORMAT:
                raise ValueError("another format")
            account = cls.from_json(value["account"])
            if any(value[name] != number for name, number in account.summary().items()):
                raise ValueError("its sums are not those of its entries")
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise IntegrityError(f"{path}: no step account ({error}); resume from an older checkpoint") from None
        return account

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Self:
        """Make the account again from its entries; `ValueError` for what `step` and `roll_back` could not have made."""
        total, executed, refused = (value[name] for name in ("total", "executed", "refused"))
        checkpoints = {int(clock): kept for clock, kept in value["checkpoints"].items()}
        rollbacks = [Undone(**{**entry, "abandoned": tuple(entry["abandoned"])}) for entry in value["rollbacks"]]
        numbers: list[object] = [total, executed, *refused, *checkpoints.values()]
        numbers += [n for r in rollbacks for n in (r.clock, r.back_to, r.kept_there, *r.abandoned)]
        if not all(type(number) is int and number >= 0 for number in numbers):
            raise ValueError("a number is no count")
        clocks = [entry.clock for entry in rollbacks]
        if executed > total or clocks != sorted(clocks) or refused != sorted(set(refused)) or 0 in refused:
            raise ValueError("a step is out of order")
        if max([*clocks, *refused, *checkpoints, 0]) > executed:
            raise ValueError("something is of a step to come")
        for number, entry in enumerate(rollbacks):
            if entry.back_to > entry.clock or entry.kept_there != _kept(entry.back_to, rollbacks[:number]):
                raise ValueError(f"the rollback at step {entry.clock} is not possible")
        given_up = [range(entry.back_to + 1, entry.clock) for entry in rollbacks]
        if any(clock in gone for clock in checkpoints for gone in given_up):
            raise ValueError("an abandoned checkpoint is among those that may be gone back to")
        if checkpoints != {clock: _kept(clock, rollbacks) for clock in checkpoints}:
            raise ValueError("a checkpoint cannot hold that many steps")
        return cls(total, executed, list(refused), checkpoints, rollbacks)


def _kept(clock: int, rollbacks: Sequence[Undone]) -> int:
    """Return the steps that weights at this clock hold, given the rollbacks up to it."""
    before = [entry for entry in rollbacks if entry.clock <= clock]
    return clock if not before else before[-1].kept_there + clock - before[-1].clock


def _listed(clocks: Mapping[int, int]) -> str:
    return ", ".join(f"{clock:,}" for clock in sorted(clocks)) or "none"

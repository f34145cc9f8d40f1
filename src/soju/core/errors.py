"""Errors a user can act on: one sentence that names the place, what is wrong and the remedy."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module


class UserError(ValueError):
    """A mistake the user can fix. The command line prints its text and exits with `exit_code`."""

    exit_code = 2


class ConfigError(UserError):
    """One or several wrong settings, all listed at once."""


class IntegrityError(UserError):
    """A file is missing, truncated or altered since its manifest was written."""


class DiskFullError(UserError):
    """A file system has too few bytes for what must be written; what was there before is intact."""


class BadNumbersError(UserError):
    """Loss or gradient was not finite for too many steps in a row. `train_with_rollback` catches it."""


class RegressionError(UserError):
    """A quality gate did not pass. `train_with_rollback` catches it."""

    exit_code = 3


class StoppedError(UserError):
    """A signal ended a training run after a checkpoint. The exit code is 128 + the number of the signal."""

    def __init__(self, message: str, *, signal_number: int) -> None:
        super().__init__(message)
        self.exit_code = 128 + signal_number


class MissingExtraError(UserError):
    """An optional package is needed; the message is the line that installs it."""

    def __init__(self, what: str, extra: str) -> None:
        super().__init__(f"{what} needs an optional package; run: pip install 'soju[{extra}]'")


def require_extra(what: str, extra: str, *packages: str) -> None:
    """Raise `MissingExtraError` unless all packages of an extra can be imported."""
    for package in packages:
        try:
            import_module(package)
        except ImportError:
            raise MissingExtraError(what, extra) from None


@dataclass(frozen=True, slots=True)
class Problem:
    """Why one row of a file was refused.

    Prints as ``file:line: field: what; remedy``.
    """

    file: str
    line: int
    field: str
    what: str
    remedy: str
    reason: str
    """A short, stable name to count by, for example ``empty`` or ``wrong-type``."""

    def __str__(self) -> str:
        place = f"{self.file}:{self.line}: {self.field}" if self.field else f"{self.file}:{self.line}"
        return f"{place}: {self.what}; {self.remedy}"


class DataError(UserError):
    """Rows were refused. Shows the first `shown` problems and how many there are by reason."""

    def __init__(self, problems: list[Problem], *, count: int | None = None, shown: int = 20) -> None:
        self.problems = problems
        self.count = len(problems) if count is None else count
        lines = [str(problem) for problem in problems[:shown]]
        if self.count > len(lines):
            lines.append(f"... and {self.count - len(lines):,} more")
        super().__init__("\n".join(lines))

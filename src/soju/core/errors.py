"""Errors a user can act on: one sentence that names the place, what is wrong and the remedy."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec


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


EXTRAS: dict[str, tuple[str, ...]] = {
    "train": ("bm25s", "jinja2", "kiwipiepy", "matplotlib", "Stemmer"),
    "neural": ("accelerate", "sentence_transformers", "tensorboardX", "torch", "transformers"),
    "hub": ("datasets",),
    "engines": ("opensearchpy", "qdrant_client"),
    "explore": ("starlette", "uvicorn"),
    "export": ("onnx", "onnxruntime", "onnxscript"),
    "lora": ("peft",),
    "mteb": ("mteb",),
    "translation": ("ctranslate2", "sacrebleu"),
    "quantization": ("torchao",),
}
"""Modules that searching and indexing with a static model do without, by the extra that installs them first."""


class MissingExtraError(UserError):
    """An optional package is needed; the message is the line that installs it."""

    def __init__(self, what: str, extra: str, package: str = "an optional package") -> None:
        super().__init__(f"{what} needs {package}; run: pip install 'soju[{extra}]'")


def require_extra(what: str, extra: str, *packages: str) -> None:
    """Raise `MissingExtraError` unless some packages of an extra, or all without names, are installed.

    Nothing is imported, so that asking costs no time.
    """
    for package in packages or EXTRAS[extra]:
        if find_spec(package) is None:
            raise MissingExtraError(what, extra, package)


def missing_extra(error: Exception) -> MissingExtraError | None:
    """Return what to say of an import that failed because an extra is not installed; ``None`` for other errors."""
    if not isinstance(error, ModuleNotFoundError):
        return None
    package = (error.name or "").partition(".")[0]
    extra = next((extra for extra, packages in EXTRAS.items() if package in packages), None)
    return None if extra is None else MissingExtraError("this command", extra, package)


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

"""The folder of one run: what was asked for, where it ran, what came of it."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any

from soju.core import __version__
from soju.core.config import Settings, parse_yaml, to_yaml
from soju.core.errors import UserError
from soju.core.files import write_json, write_text
from soju.core.results import Score

_PACKAGES = (
    "numpy",
    "scipy",
    "numba",
    "tokenizers",
    "torch",
    "transformers",
    "sentence-transformers",
    "bm25s",
    "kiwipiepy",
    "kiwipiepy_model",
    "scikit-learn",
)
_FOLDERS = re.compile(r"""(?:(?<=[\s=,\["'])|^)(?:~|[A-Za-z]:)?[/\\](?:[^/\\,\]"']*[/\\])*""")
"""The folders of an absolute path, alone, after ``key=`` or in a list."""


_PATIENCE = 60.0
"""Seconds other processes wait for the first one to make the run folder."""


@dataclass(frozen=True)
class Run:
    """A run folder: what was asked for, and what came of it.

    Example:
        >>> import soju
        >>> soju.Run(folder / "no-run").scores
        Traceback (most recent call last):
        soju.core.errors.UserError: ...: no scores.json; is this the folder of a finished run?
    """

    folder: Path

    def __post_init__(self) -> None:
        object.__setattr__(self, "folder", Path(self.folder))  # a caller may name it by a string

    @classmethod
    def create(cls, folder: Path, *, config_text: str, config: Settings, seed: int) -> Run:
        """Make the folder with ``config.yaml`` as given, ``resolved.yaml`` and ``environment.json``.

        Raises `UserError` if the folder already holds a run.
        """
        if (folder / "config.yaml").exists():
            raise UserError(f"{folder}: holds a run already; choose another folder (--out), or remove it first")
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError):
            raise UserError(f"{folder}: a file is in the way; choose another folder with --out") from None
        write_text(folder / "resolved.yaml", to_yaml(config))
        write_json(folder / "environment.json", describe_environment(seed=seed))
        write_text(folder / "config.yaml", config_text)
        return cls(folder)

    @classmethod
    def reopen(cls, folder: Path, *, config: Settings) -> Run:
        """Open the folder of a run that is to be resumed.

        Raises `UserError` if there is no run, or it began with other settings.
        """
        resolved = folder / "resolved.yaml"
        if not resolved.is_file():
            raise UserError(f"{folder}: no run to resume; train without --resume, or give its folder with --out")
        if resolved.read_text(encoding="utf-8") != to_yaml(config):
            raise UserError(
                f"{folder}: began with other settings than these, see {resolved.name} in it; give the same, or choose "
                "a new folder with --out"
            )
        return cls(folder)

    @property
    def final(self) -> Path:
        """Folder of the finished model."""
        return self.folder / "final"

    @property
    def best(self) -> Path:
        """Folder of the model with the best validation score, for recipes that validate."""
        return self.folder / "best"

    @property
    def report(self) -> Path:
        """The HTML report."""
        return self.folder / "report.html"

    @property
    def model_folder(self) -> Path:
        """Folder of the model to use: the best, or the final one of a recipe that does not validate."""
        return self.best if self.best.is_dir() else self.final

    @property
    def recipe(self) -> str | None:
        """Name of the recipe, from ``resolved.yaml``; ``None`` when the folder is no run."""
        resolved = self.folder / "resolved.yaml"
        if not resolved.is_file():
            return None
        name = parse_yaml(resolved.read_text(encoding="utf-8"), place=str(resolved)).get("recipe")
        return name if isinstance(name, str) else None

    @cached_property
    def model(self) -> Any:
        """The model, loaded: what `soju.load` returns, or a ``SentenceTransformer`` of recipe ``embedding``."""
        from soju.core.recipe import recipe_named

        return recipe_named(self.recipe, place=str(self.folder)).load(self.model_folder)

    @property
    def scores(self) -> list[Score]:
        """Everything that was measured, in the order it was written (`UserError` if the run has no scores)."""
        path = self.folder / "scores.json"
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise UserError(f"{self.folder}: no scores.json; is this the folder of a finished run?") from None
        except ValueError as error:
            raise UserError(f"{path}: unreadable ({error}); run the evaluation again") from None
        return [Score.from_json(value) for value in values]

    def write_scores(self, scores: Sequence[Score]) -> None:
        """Write ``scores.json``."""
        write_json(self.folder / "scores.json", [score.to_json() for score in scores])


def describe_environment(*, seed: int) -> dict[str, Any]:
    """Return versions, machine, commit and seed, without any path or name of the machine.

    Of absolute paths among the arguments only the last part is kept.
    """
    versions: dict[str, str | None] = {}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    return {
        "soju": __version__,
        "commit": _commit(),
        "seed": seed,
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "cpu_count": os.cpu_count(),
        "arguments": [_FOLDERS.sub("", argument) for argument in sys.argv[1:]],
        "packages": versions,
    }


def _commit() -> str | None:
    try:
        result = subprocess.run(
            # The second revision fails when another project's repository merely holds our environment.
            ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD", f"HEAD:./{Path(__file__).name}"],
            capture_output=True,
            text=True,
            timeout=5,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return result.stdout.split()[0]


def open_run_folder(folder: Path, settings: Any, text: str, *, resumes: bool) -> Run:
    """Make the run folder, or open the one to resume; under torchrun the first process makes it.

    `settings` have a ``seed``, `text` is the configuration as given, and `resumes` says whether a run must be there.
    After torchrun restarted its processes (``--max-restarts``), a run that is there is resumed. Raises `UserError` if
    there is a run and should not be, or the other way round, or its settings differ.
    """
    restarted = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0 and (folder / "config.yaml").is_file()
    if resumes or restarted:
        return Run.reopen(folder, config=settings)
    if is_first_process():
        return Run.create(folder, config_text=text, config=settings, seed=settings.seed)
    end = time.monotonic() + _PATIENCE
    while not (folder / "config.yaml").is_file():
        if time.monotonic() > end:
            raise UserError(f"{folder}: the first process made no run folder within {_PATIENCE:.0f} s; see its message")
        time.sleep(0.1)
    return Run(folder)


def is_first_process() -> bool:
    """Tell whether this is the process that writes and speaks, the only one without torchrun."""
    return int(os.environ.get("RANK", "0")) == 0

"""The folder of one run: what was asked, where it ran, what came out.

The run folder of any recipe: made by the first rank, or opened to go on.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import re
import subprocess
import sys
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from soju import __version__
from soju.core.config import Settings, to_yaml
from soju.core.errors import UserError
from soju.core.files import write_json, write_text
from soju.core.score import Score

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
    "pyseismic-lsr",
    "scikit-learn",
)
_FOLDERS = re.compile(r"""(?:(?<=[\s=,\["'])|^)(?:~|[A-Za-z]:)?[/\\](?:[^/\\,\]"']*[/\\])*""")
"""The folders of an absolute path, alone, after ``key=`` or in a list."""


@dataclass(frozen=True, slots=True)
class RunDirectory:
    """Paths of one run folder."""

    path: Path

    @classmethod
    def create(cls, path: Path, *, config_text: str, config: Settings, seed: int) -> RunDirectory:
        """Make the folder with ``config.yaml`` as given, ``resolved.yaml`` and ``environment.json``.

        Args:
            path: The run folder.
            config_text: The configuration as the user gave it.
            config: The same, resolved.
            seed: Seed of the run.

        Returns:
            The run folder.

        Raises:
            UserError: If the folder already holds a run.
        """
        if (path / "config.yaml").exists():
            raise UserError(f"{path}: holds a run already; choose another with --out, or remove it first")
        try:
            path.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError):
            raise UserError(f"{path}: a file is in the way; choose another folder with --out") from None
        write_text(path / "resolved.yaml", to_yaml(config))
        write_json(path / "environment.json", describe_environment(seed=seed))
        write_text(path / "config.yaml", config_text)
        return cls(path)

    @classmethod
    def reopen(cls, path: Path, *, config: Settings) -> RunDirectory:
        """Open the folder of a run that is to be resumed.

        Args:
            path: The run folder.
            config: The resolved configuration; it must be the one the run began with.

        Returns:
            The run folder.

        Raises:
            UserError: If there is no run, or it began with other settings.
        """
        resolved = path / "resolved.yaml"
        if not resolved.is_file():
            raise UserError(f"{path}: no run to resume; train without --resume, or give its folder with --out")
        if resolved.read_text(encoding="utf-8") != to_yaml(config):
            raise UserError(
                f"{path}: began with other settings than these, see {resolved.name} in it; give the same, or choose a "
                "new folder with --out"
            )
        return cls(path)

    @property
    def final(self) -> Path:
        """Folder of the finished model."""
        return self.path / "final"

    @property
    def best(self) -> Path:
        """Folder of the model with the best validation score, for recipes that validate."""
        return self.path / "best"

    def write_scores(self, scores: list[Score]) -> None:
        """Write ``scores.json``."""
        write_json(self.path / "scores.json", [score.to_json() for score in scores])

    def read_scores(self) -> list[Score]:
        """Read ``scores.json``.

        Returns:
            The scores in the order they were written.

        Raises:
            UserError: If the run has no scores.
        """
        try:
            values = json.loads((self.path / "scores.json").read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise UserError(f"{self.path}: no scores.json; is this the folder of a finished run?") from None
        except ValueError as error:
            raise UserError(f"{self.path / 'scores.json'}: unreadable ({error}); run the evaluation again") from None
        return [Score.from_json(value) for value in values]


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


_PATIENCE = 60.0
"""Seconds other ranks wait for the first one to make the run folder."""


def open_run_folder(folder: Path, settings: Any, text: str, *, resumes: bool) -> RunDirectory:
    """Make the run folder, or open the one to resume; under torchrun the first rank does it.

    After torchrun restarted its processes (``--max-restarts``), a run that is there is resumed.

    Args:
        folder: Where.
        settings: Of the run, with a ``seed``.
        text: The configuration as the user gave it.
        resumes: Whether a run must be there already.

    Returns:
        The run folder.

    Raises:
        UserError: If there is a run and should not be, or the other way round, or its settings differ.
    """
    restarted = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0 and (folder / "config.yaml").is_file()
    if resumes or restarted:
        return RunDirectory.reopen(folder, config=settings)
    if int(os.environ.get("RANK", "0")) == 0:
        return RunDirectory.create(folder, config_text=text, config=settings, seed=settings.seed)
    end = time.monotonic() + _PATIENCE
    while not (folder / "config.yaml").is_file():
        if time.monotonic() > end:
            raise UserError(f"{folder}: the first process made no run folder within {_PATIENCE:.0f} s; see its message")
        time.sleep(0.1)
    return RunDirectory(folder)

"""The run folder of any recipe: made by the first rank, or opened to go on."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

from soju.core.errors import UserError
from soju.core.run_directory import RunDirectory

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

"""Which mode of the recipe does a configuration ask for?"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from soju.core.config import validate
from soju.core.errors import ConfigError, UserError
from soju.core.run_directory import RunDirectory
from soju.recipes.splade.config import StaticConfig
from soju.recipes.splade.reading import RunData, SpladeConfig
from soju.recipes.splade.terms_config import TermsConfig
from soju.recipes.splade.triplets_config import TripletsConfig

MODES: dict[str, type[StaticConfig] | type[TermsConfig] | type[TripletsConfig]] = {
    "static": StaticConfig,
    "terms": TermsConfig,
    "triplets": TripletsConfig,
}
_PATIENCE = 60.0
"""Seconds other ranks wait for the first one to make the run folder."""


def validate_mode(values: Mapping[str, Any], *, place: str) -> SpladeConfig:
    """Check a configuration against the settings of its mode.

    Args:
        values: YAML with overrides applied.
        place: Named in errors.

    Returns:
        The settings.

    Raises:
        ConfigError: If the mode is unknown, or anything else is wrong; everything is listed.
    """
    kind = MODES.get(str(values.get("mode")))
    if kind is None:
        raise ConfigError(f"{place}: mode: {values.get('mode')!r} is unknown; choose one of {', '.join(MODES)}")
    settings: SpladeConfig = validate(values, kind, place=place)
    return settings


def open_run_folder(folder: Path, settings: SpladeConfig, text: str, *, resumes: bool) -> RunDirectory:
    """Make the run folder, or open the one to resume; under torchrun the first rank does it.

    After torchrun restarted its processes (``--max-restarts``), a run that is there is resumed.

    Args:
        folder: Where.
        settings: Of the run.
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


def run_mode(
    settings: SpladeConfig, run_dir: RunDirectory, *, data: RunData, resume: bool | Path = False, workers: int = 2
) -> Path:
    """Run the recipe in the mode of the settings; returns the report. See the modes' own ``run``."""
    start = resume if isinstance(resume, Path) else None
    if isinstance(settings, TermsConfig):
        from soju.recipes.splade.terms_recipe import run as run_terms

        return run_terms(settings, run_dir, data=data, resume=start, workers=workers)
    if isinstance(settings, TripletsConfig):
        from soju.recipes.splade.triplets_recipe import run as run_triplets

        return run_triplets(settings, run_dir, data=data, resume=start, workers=workers)
    from soju.recipes.splade.recipe import run as run_static

    if resume:
        raise UserError("mode static trains in minutes and has no checkpoints; train without --resume")
    return run_static(settings, run_dir, data=data, workers=workers)

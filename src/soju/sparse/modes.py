"""Which mode of the recipe does a configuration ask for?"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from soju.core.config import validate
from soju.core.errors import ConfigError, UserError
from soju.core.run_directory import RunDirectory
from soju.sparse.config import StaticConfig
from soju.sparse.reading import RunData, SpladeConfig
from soju.sparse.terms.config import TermsConfig
from soju.sparse.triplets.config import TripletsConfig

MODES: dict[str, type[StaticConfig] | type[TermsConfig] | type[TripletsConfig]] = {
    "static": StaticConfig,
    "terms": TermsConfig,
    "triplets": TripletsConfig,
}


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


def run_mode(
    settings: SpladeConfig, run_dir: RunDirectory, *, data: RunData, resume: bool | Path = False, workers: int = 2
) -> Path:
    """Run the recipe in the mode of the settings; returns the report. See the modes' own ``run``."""
    start = resume if isinstance(resume, Path) else None
    if isinstance(settings, TermsConfig):
        from soju.sparse.terms.recipe import run as run_terms

        return run_terms(settings, run_dir, data=data, resume=start, workers=workers)
    if isinstance(settings, TripletsConfig):
        from soju.sparse.triplets.recipe import run as run_triplets

        return run_triplets(settings, run_dir, data=data, resume=start, workers=workers)
    from soju.sparse.static.recipe import run as run_static

    if resume:
        raise UserError("mode static trains in minutes and has no checkpoints; train without --resume")
    return run_static(settings, run_dir, data=data, workers=workers)

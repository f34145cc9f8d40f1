"""Which mode of the recipe does a configuration ask for?

The whole recipe on our own samples, a static encoder and then a neural student, and a search anyone can follow.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from soju.core.config import parse_yaml, validate
from soju.core.errors import ConfigError, UserError
from soju.core.run import RunDirectory
from soju.presets import preset_text
from soju.report.contents import RunContents, Search, read_run
from soju.search.index import SparseIndex
from soju.sparse.config import StaticConfig
from soju.sparse.data import RunData
from soju.sparse.indexing import open_index, search_index
from soju.sparse.model import TermEncoder
from soju.sparse.terms.config import TermsConfig
from soju.sparse.triplets.config import TripletsConfig

SpladeConfig = StaticConfig | TermsConfig | TripletsConfig

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


def read_run_data(settings: SpladeConfig) -> RunData:
    """Read what a run learns from and is measured on, as its mode does."""
    data: RunData = import_module(f"soju.sparse.{settings.mode}.recipe").read(settings)
    return data


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


STATIC, STUDENT = "splade-static-samples", "splade-pico"
QUERY = "심장 혈관이 막혔을 때 가슴 통증"


@dataclass(frozen=True, slots=True)
class Demo:
    """What the demo leaves."""

    report: Path
    contents: RunContents
    index: SparseIndex
    encoder: TermEncoder

    def search(self, queries: Sequence[str], *, k: int = 3) -> list[Search]:
        """Search the held-out English passages."""
        return search_index(self.index, self.encoder, queries, k=k)


def run_demo(preset: str, folder: Path, *, workers: int = 2) -> Demo:
    """Run a preset that needs nothing but our samples into a new run folder."""
    text = preset_text(preset)
    config = validate_mode(parse_yaml(text, place=preset), place=preset)
    run_dir = RunDirectory.create(folder, config_text=text, config=config, seed=config.seed)
    report = run_mode(config, run_dir, data=read_run_data(config), workers=workers)
    index, encoder = open_index(folder / "index")
    return Demo(report=report, contents=read_run(folder), index=index, encoder=encoder)

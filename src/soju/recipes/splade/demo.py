"""The whole recipe on our own samples, then a search anyone can follow."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from soju.core.config import parse_yaml, validate
from soju.core.run_directory import RunDirectory
from soju.models.static_encoder import StaticEncoder
from soju.presets import preset_text
from soju.recipes.splade.config import StaticConfig
from soju.recipes.splade.indexing import search_index
from soju.recipes.splade.recipe import run
from soju.report.run_contents import RunContents, Search, read_run
from soju.search.index import SparseIndex

PRESET = "splade-static-samples"
QUERY = "심장 혈관이 막혔을 때 가슴 통증"


@dataclass(frozen=True, slots=True)
class Demo:
    """What the demo leaves."""

    report: Path
    contents: RunContents
    index: SparseIndex
    encoder: StaticEncoder

    def search(self, queries: Sequence[str], *, k: int = 3) -> list[Search]:
        """Search the held-out English passages."""
        return search_index(self.index, self.encoder, queries, k=k)


def run_demo(folder: Path, *, workers: int = 2) -> Demo:
    """Run the preset `splade-static-samples` into a new run folder."""
    text = preset_text(PRESET)
    config = validate(parse_yaml(text, place=PRESET), StaticConfig, place=PRESET)
    run_dir = RunDirectory.create(folder, config_text=text, config=config, seed=config.seed)
    report = run(config, run_dir, workers=workers)
    return Demo(
        report=report,
        contents=read_run(folder),
        index=SparseIndex.open(folder / "index"),
        encoder=StaticEncoder.load(run_dir.final),
    )

"""The whole recipe on our own samples, a static encoder and then a neural student, and a search anyone can follow."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from soju.core.config import parse_yaml
from soju.core.run_directory import RunDirectory
from soju.presets import preset_text
from soju.report.run_contents import RunContents, Search, read_run
from soju.search.index import SparseIndex
from soju.sparse.encoders import TermEncoder
from soju.sparse.indexing import open_index, search_index
from soju.sparse.modes import run_mode, validate_mode
from soju.sparse.reading import read_run_data

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

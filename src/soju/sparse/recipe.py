"""Recipe ``splade``: what the command line and `soju.train` do with sparse encoders.

Each mode is a row of `MODES`: its settings, and the module whose ``run`` trains.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from soju.core.config import validate
from soju.core.errors import ConfigError, UserError
from soju.core.model_folder import module_names
from soju.core.recipe import Answer, DataReport, Evaluation, MtebModel, Recipe, Show
from soju.core.run import Run
from soju.sparse.config import StaticConfig, TermsConfig
from soju.sparse.data import RunData
from soju.sparse.triplets.config import TripletsConfig

SpladeConfig = StaticConfig | TermsConfig | TripletsConfig


@dataclass(frozen=True, slots=True)
class Mode:
    """A way to train a sparse encoder."""

    settings: type[StaticConfig] | type[TermsConfig] | type[TripletsConfig]
    module: str
    resumes: bool = True
    """Whether it writes checkpoints to go on from."""


MODES: dict[str, Mode] = {
    "static": Mode(StaticConfig, "soju.sparse.static.recipe", resumes=False),
    "terms": Mode(TermsConfig, "soju.sparse.terms.recipe"),
    "triplets": Mode(TripletsConfig, "soju.sparse.triplets.recipe"),
}


def read_run_data(config: SpladeConfig) -> RunData:
    """Read what a run learns from and is measured on, as its mode does."""
    data: RunData = import_module(MODES[config.mode].module).read(config)
    return data


_DEMO = (
    ("splade-static-samples", "static", "1/2  Distilling a static Korean–English searcher from our own samples ..."),
    ("splade-pico", "student", "2/2  Training a neural student that starts as such a searcher ..."),
)
"""Preset, folder and heading of each part of the demo."""
_DEMO_QUERY = "심장 혈관이 막혔을 때 가슴 통증"


class SpladeRecipe(Recipe[SpladeConfig, RunData]):
    """See `soju.core.recipe.Recipe`."""

    def configure(self, values: Mapping[str, Any], *, place: str) -> SpladeConfig:
        """Check a configuration against the settings of its mode."""
        mode = MODES.get(str(values.get("mode")))
        if mode is None:
            raise ConfigError(f"{place}: mode: {values.get('mode')!r} is unknown; choose one of {', '.join(MODES)}")
        settings: SpladeConfig = validate(values, mode.settings, place=place)
        return settings

    def check(self, config: SpladeConfig) -> DataReport[RunData]:
        """Read training and evaluation data."""
        from soju.data.statistics import format_statistics

        data = read_run_data(config)
        training = data.training
        parts = [part for part in ("pairs", "passages", "terms", "triplets") if part in training.statistics]
        sizes = {
            texts.name: ", ".join(f"{name} {len(one.queries):,} queries" for name, one in texts.directions.items())
            for texts in data.evaluation
        }
        return DataReport(
            data=data,
            tables=[format_statistics(training.statistics[part], title=part) for part in parts],
            facts=[f"{name}: {size}" for name, size in sizes.items()],
            refused=training.log.refused,
            reasons=training.log.reasons,
        )

    def train(
        self,
        config: SpladeConfig,
        run: Run,
        *,
        data: RunData | None = None,
        resume: bool | Path = False,
        workers: int = 2,
    ) -> Run:
        """Train in the mode of the settings."""
        mode = MODES[config.mode]
        if resume and not mode.resumes:
            raise UserError(f"mode {config.mode} trains in minutes and has no checkpoints; train without --resume")
        start = resume if isinstance(resume, Path) else None
        data = data if data is not None else read_run_data(config)
        trained: Run = import_module(mode.module).run(config, run, data=data, resume=start, workers=workers)
        return trained

    def evaluate(
        self,
        models: Sequence[str],
        values: Mapping[str, Any],
        *,
        place: str,
        samples: int | None = None,
        seed: int | None = None,
    ) -> Evaluation:
        """Measure models against each other, BM25 and dictionary look-up."""
        from soju.report.terminal import measured_tables
        from soju.sparse.evaluate import Subject, score
        from soju.sparse.model import load

        changed = {} if samples is None else {"bootstrap_samples": samples}
        values = {**values, "evaluation": {**(values.get("evaluation") or {}), **changed}}
        config = self.configure(values if seed is None else {**values, "seed": seed}, place=place)
        loaded = [load(model) for model in models]
        names = _names([model.folder for model in loaded])
        subjects = [Subject(name, model.encoder, model.search) for name, model in zip(names, loaded, strict=True)]
        measured = score(subjects, read_run_data(config), config, loaded[0].folder)
        record = [item.to_json() for item in measured.scores]
        return Evaluation([measured_tables(measured.scores, measured.comparisons)], record=record)

    def compare(self, subject: Path, baseline: Path, *, samples: int | None, seed: int | None) -> Evaluation:
        """Compare two runs query by query, and what two models activate for the probe words."""
        from soju.report.terminal import differences_table, probes_table
        from soju.sparse.evaluate import FILE, compare_runs
        from soju.sparse.term_activation import probe_models

        tables = []
        if (subject / FILE).is_file() or (baseline / FILE).is_file():
            differences = compare_runs(subject, baseline, samples=samples or 2000, seed=seed or 0)
            tables.append(differences_table(differences, title=f"{subject} minus {baseline}"))
        return Evaluation([*tables, probes_table(probe_models([str(subject), str(baseline)]))])

    def demo(self, folder: Path, show: Show) -> Answer | None:
        """Train a static encoder and then a neural student; answer with the student."""
        from rich.console import RenderableType

        from soju.core.recipe import train
        from soju.report.terminal import hits_table, run_tables
        from soju.sparse.indexing import Index, search_index

        def answer(query: str) -> RenderableType:
            return hits_table(search_index(index.vectors, index.model.encoder, [query], k=3)[0])

        for preset, name, heading in _DEMO:
            show(heading)
            run = train(preset, out=folder / name)
            show(run_tables(run.folder))
            index = Index.open(run.folder / "index")
            show(answer(_DEMO_QUERY))
        show("\n".join(f"Report  {folder / name / 'report.html'}" for _, name, _ in _DEMO))
        return answer

    def owns(self, model: str) -> bool:
        """Tell whether a folder is a run of this recipe, a static encoder, or a SPLADE model."""
        from soju.sparse.model import model_folder
        from soju.sparse.static.encoder import MODEL_TYPE, read_model_config

        if (recipe := Run(Path(model)).recipe) is not None:
            return recipe == "splade"
        folder = model_folder(model)
        if modules := module_names(folder):
            return "Pooling" not in modules
        return (folder / "config.json").is_file() and read_model_config(folder).get("model_type") == MODEL_TYPE

    def load(self, folder: Path) -> Any:
        """Load a model; see `soju.load`."""
        from soju.sparse.model import load

        return load(folder)

    def mteb(self, model: str) -> MtebModel:
        """Wrap a model in the index that ``soju index`` would make."""
        from soju.sparse.evaluate import MtebSearcher

        searcher = MtebSearcher.of(model)
        return MtebModel(searcher, searcher.name, retrieval_only=True)


def _names(folders: Sequence[Path]) -> list[str]:
    """Name models by their folders, the best or final one of a run by the run's; by the whole path when alike."""
    short = [folder.parent.name if folder.name in ("best", "final") else folder.name for folder in folders]
    return [f"soju {name if short.count(name) == 1 else folder}" for name, folder in zip(short, folders, strict=True)]


RECIPE = SpladeRecipe()

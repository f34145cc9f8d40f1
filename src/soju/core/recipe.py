"""The table of recipes, what a row of it does, and training by the name of a configuration.

A recipe is a folder with an object that implements `Recipe`, and a row of `RECIPES`. The command line and
`soju.train` ask the table; nothing else knows the recipes by name.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, Protocol, TypeVar

import yaml

from soju.core.config import Overrides, Settings, apply_overrides, read_config
from soju.core.errors import ConfigError, UserError
from soju.core.run import Run, open_run_folder

if TYPE_CHECKING:
    from rich.console import RenderableType


RECIPES: dict[str, str] = {
    "splade": "soju.sparse.recipe:RECIPE",
    "embedding": "soju.embedding.recipe:RECIPE",
    "speculative_kd": "soju.speculative_kd.recipe:RECIPE",
    "translation": "soju.translation.recipe:RECIPE",
}
"""Where the object of each recipe is; it is imported when it is asked for."""

ConfigT = TypeVar("ConfigT", bound=Settings)
DataT = TypeVar("DataT")
Show = Callable[["RenderableType"], None]
"""Shows one thing to the user at once."""
Answer = Callable[[str], "RenderableType"]
"""Answers a text that the user typed."""


@dataclass(frozen=True, slots=True)
class DataReport(Generic[DataT]):
    """What a run would read."""

    data: DataT
    """Everything that was read, for `Recipe.train`."""
    tables: Sequence[RenderableType] = ()
    """Statistics of the training rows."""
    facts: Sequence[str] = ()
    """Sizes of test sets and the like, a line each."""
    refused: int = 0
    """Broken rows that were left out."""
    reasons: Counter[str] = field(default_factory=Counter)
    """Their number by reason."""


@dataclass(frozen=True, slots=True)
class Evaluation:
    """What was measured of one or several models."""

    tables: Sequence[RenderableType]
    notes: Sequence[str] = ()
    """What could not be compared and why, a sentence each."""
    record: Any = None
    """Everything, as JSON."""


class MtebModel(NamedTuple):
    """A model as mteb asks it."""

    model: Any
    name: str
    retrieval_only: bool


class Recipe(Protocol[ConfigT, DataT]):
    """A way to distil a model. Inherit from it: what only some recipes do has a default that refuses."""

    def configure(self, values: Mapping[str, Any], *, place: str) -> ConfigT:
        """Check plain values; `ConfigError` lists all that is wrong, `place` names their source."""

    def check(self, config: ConfigT) -> DataReport[DataT]:
        """Read and check all data of a run; load no model. `DataError` lists broken rows."""

    def train(
        self, config: ConfigT, run: Run, *, data: DataT | None = None, resume: bool | Path = False, workers: int = 2
    ) -> Run:
        """Train, score and report into the folder of `run`; returns it.

        `data` is what `check` read, `resume` a checkpoint or ``True`` for the newest one that verifies, `workers` the
        threads of whatever analyses text. Raises `RegressionError` when a quality gate did not pass.
        """

    def evaluate(
        self,
        models: Sequence[str],
        values: Mapping[str, Any],
        *,
        place: str,
        samples: int | None = None,
        seed: int | None = None,
    ) -> Evaluation:
        """Measure models on the test sets of a configuration, each compared with the first.

        `samples` and `seed` of the paired bootstrap replace those of the configuration.
        """

    def demo(self, folder: Path, show: Show) -> Answer | None:
        """Run on our own samples, offline, into a new folder; returns what answers the user, if anything does."""

    def owns(self, model: str) -> bool:
        """Tell from its files alone whether a model or run is of this recipe."""

    def load(self, folder: Path) -> Any:
        """Load a model that this recipe made, ready to use."""

    def from_environment(self, values: Mapping[str, Any], given: frozenset[str]) -> tuple[dict[str, Any], list[str]]:
        """Return the settings with what environment variables say, and a sentence for each that was changed.

        `given` are the settings of the command line, to which the environment yields.
        """
        return dict(values), []

    def resume_from_environment(self) -> Path | None:
        """Return the checkpoint that an environment variable names, if the recipe knows one."""
        return None

    def compare(self, subject: Path, baseline: Path, *, samples: int | None, seed: int | None) -> Evaluation:
        """Compare what two runs or models recorded, without measuring again."""
        raise UserError(f"{subject}: its recipe records nothing to compare; measure both with --config")

    def mteb(self, model: str) -> MtebModel:
        """Wrap a model for mteb."""
        raise UserError(f"{model}: mteb has no task for models of this recipe")


def recipe_named(name: object, *, place: str) -> Recipe[Any, Any]:
    """Return the recipe of a name (`ConfigError` if there is none; `place` says where the name stands)."""
    if name is None:
        raise ConfigError(f"{place}: recipe: missing; add one of {', '.join(RECIPES)}")
    if not isinstance(name, str) or name not in RECIPES:
        raise ConfigError(f"{place}: recipe: {name!r} is unknown; choose one of {', '.join(RECIPES)}")
    module, _, attribute = RECIPES[name].partition(":")
    recipe: Recipe[Any, Any] = getattr(import_module(module), attribute)
    return recipe


def recipe_of_model(model: str) -> Recipe[Any, Any]:
    """Return the recipe that made a model or run, told by its files (`UserError` if none knows it)."""
    for name in RECIPES:
        recipe = recipe_named(name, place=model)
        if recipe.owns(model):
            return recipe
    raise UserError(f"{model}: not a model folder or a run of a recipe ({', '.join(RECIPES)}); check the path")


def train(
    config: str | Path | Mapping[str, Any],
    *,
    out: str | Path | None = None,
    overrides: Overrides = (),
    resume: bool | str | Path = False,
    workers: int = 2,
    on_data: Callable[[DataReport[Any]], None] | None = None,
) -> Run:
    """Train, score, export and report: what ``soju train`` does.

    Args:
        config: A YAML file, the name of a preset (``soju presets`` lists them), or the settings themselves.
        out: Run folder; ``runs/NAME`` when not given.
        overrides: Settings to change: ``{"data.seed": 7}`` or ``["data.seed=7"]``.
        resume: Go on with the run in `out`: ``True`` from its newest checkpoint that verifies, or the folder of one.
        workers: Threads of the Korean analyser.
        on_data: Called with what was read, before anything is trained.

    Returns:
        The run: ``run.model``, ``run.scores``, ``run.report``, ``run.folder``.

    Raises:
        ConfigError: If a setting is wrong; all are listed.
        DataError: If rows are broken; no run folder is made then.
        RegressionError: If a quality gate did not pass; what was accepted so far is kept.
        UserError: If the folder is taken, or data and models cannot be used.

    Example:
        >>> import soju
        >>> run = soju.train("splade-static-samples", out=folder / "run", overrides={"evaluation.sets": []})
        >>> run.model.expand("심장", k=2)[0].term
        '심장'
    """
    place = "the configuration" if isinstance(config, Mapping) else str(config)
    if isinstance(config, Mapping):
        values = apply_overrides(config, overrides)
        text = yaml.safe_dump(values, allow_unicode=True, sort_keys=False)
    else:
        values, text = read_config(config, overrides)
    recipe = recipe_named(values.get("recipe"), place=place)
    given = frozenset(overrides if isinstance(overrides, Mapping) else (one.partition("=")[0] for one in overrides))
    values, changed = recipe.from_environment(values, given)
    text += "".join(f"# environment: {sentence}\n" for sentence in changed)
    settings = recipe.configure(values, place=place)
    report = recipe.check(settings)
    if on_data is not None:
        on_data(replace(report, facts=[*changed, *report.facts]))
    start = Path(resume) if isinstance(resume, str) else resume
    if start is False:
        start = recipe.resume_from_environment() or False
    folder = Path(out) if out is not None else Path("runs") / settings.name
    run = open_run_folder(folder, settings, text, resumes=start is not False)
    return recipe.train(settings, run, data=report.data, resume=start, workers=workers)

"""What a run folder says: its generic files, read and checked."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, model_validator

from soju.core.errors import UserError
from soju.core.results import Comparison, Hit, Score, TermWeight

_CHECKED = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class Row(BaseModel):
    """Base of what the files hold: frozen, unknown keys and non-finite numbers refused, nothing coerced."""

    model_config = _CHECKED


class Series(Row):
    """One line, group of bars or cloud of points; `low` and `high` bound each `y`."""

    name: str
    x: Annotated[tuple[float | str, ...], Field(min_length=1)]
    y: tuple[float, ...]
    low: tuple[float, ...] | None = None
    high: tuple[float, ...] | None = None

    @model_validator(mode="after")
    def _same_length(self) -> Self:
        for name, values in (("y", self.y), ("low", self.low), ("high", self.high)):
            if values is not None and len(values) != len(self.x):
                raise ValueError(f"{name} has {len(values)} values, x has {len(self.x)}")
        if (self.low is None) != (self.high is None):
            raise ValueError("low and high come together")
        return self


class FigureSpec(Row):
    """A figure to draw; `id` is its file name."""

    id: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]{0,63}$")]
    title: str
    caption: str = ""
    kind: Literal["line", "bar", "scatter", "grid"]
    """``grid`` draws each series as a line in a panel of its own, four in a row, each with its own vertical axis."""
    x_label: str = ""
    y_label: str = ""
    log_x: bool = False
    log_y: bool = False
    series: Annotated[tuple[Series, ...], Field(min_length=1)]

    @model_validator(mode="after")
    def _drawable(self) -> Self:
        for series in self.series:
            numbers = [x for x in series.x if not isinstance(x, str)]
            if self.kind != "bar" and len(numbers) < len(series.x):
                raise ValueError(f'series "{series.name}": x of a {self.kind} figure must be numbers')
            if self.log_x and self.kind != "bar" and min(numbers) <= 0:
                raise ValueError(f'series "{series.name}": a logarithmic axis needs x > 0')
            if self.log_y and min(series.y) <= 0:
                raise ValueError(f'series "{series.name}": a logarithmic axis needs y > 0')
        return self


class Expansion(Row):
    """The terms a text activates."""

    text: str
    terms: tuple[TermWeight, ...]
    """Heaviest first."""


class Search(Row):
    """What one engine found for one query, best first."""

    query: str
    engine: str
    hits: tuple[Hit, ...]


class Step(Row):
    """One step of the recipe, as it was taken."""

    title: str
    text: str = ""
    seconds: Annotated[float, Field(ge=0)] | None = None


class Story(Row):
    """The run in plain words."""

    title: str = ""
    summary: tuple[str, ...] = ()
    steps: tuple[Step, ...] = ()


class RunContents(Row):
    """Everything a report shows. Only the scores must be there."""

    name: str
    scores: tuple[Score, ...]
    comparisons: tuple[Comparison, ...] = ()
    figures: tuple[FigureSpec, ...] = ()
    expansions: tuple[Expansion, ...] = ()
    searches: tuple[Search, ...] = ()
    story: Story = Story()
    data: dict[str, Any] = {}
    environment: dict[str, Any] = {}
    resolved_yaml: str = ""
    config_yaml: str = ""


ValueT = TypeVar("ValueT")


def read_run(folder: Path) -> RunContents:
    """Read the files of a run folder that a report needs; only ``scores.json`` must be in it.

    Raises `UserError` if it is missing, or a file is malformed; the message names the file and each wrong place.
    """
    if not (folder / "scores.json").is_file():
        raise UserError(f"{folder}: no scores.json; is this the folder of a finished run?")
    scores = _read(folder / "scores.json", tuple[Score, ...], ())
    _check_scores(scores, folder / "scores.json")
    figures = _read(folder / "figures.json", tuple[FigureSpec, ...], ())
    _check_figures(figures, folder / "figures.json")
    return RunContents(
        name=folder.resolve().name,
        scores=scores,
        comparisons=_read(folder / "comparisons.json", tuple[Comparison, ...], (), _CHECKED),
        figures=figures,
        expansions=_read(folder / "expansions.json", tuple[Expansion, ...], ()),
        searches=_read(folder / "searches.json", tuple[Search, ...], ()),
        story=_read(folder / "story.json", Story, Story()),
        data=_read(folder / "data.json", dict[str, Any], {}),
        environment=_read(folder / "environment.json", dict[str, Any], {}),
        resolved_yaml=_read_text(folder / "resolved.yaml"),
        config_yaml=_read_text(folder / "config.yaml"),
    )


def _read(path: Path, kind: type[ValueT], missing: ValueT, config: ConfigDict | None = None) -> ValueT:
    try:
        return TypeAdapter(kind, config=config).validate_json(path.read_bytes(), strict=True)
    except FileNotFoundError:
        return missing
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}; the report needs to read it") from None
    except ValidationError as error:
        lines = [_explain(path, item) for item in error.errors(include_url=False)[:20]]
        if error.error_count() > len(lines):
            lines.append(f"... and {error.error_count() - len(lines):,} more")
        raise UserError("\n".join(lines)) from None


def _explain(path: Path, item: Any) -> str:
    place = ".".join(str(part) for part in item["loc"])
    message = str(item["msg"]).removeprefix("Value error, ")
    message = message[0].lower() + message[1:]
    remedy = "write it again with the recipe, or remove it if it is optional"
    return f"{path}: {place}: {message}; {remedy}" if place else f"{path}: {message}; {remedy}"


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        return ""
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}; the report needs to read it") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: not UTF-8; save the file as UTF-8") from None


def _check_scores(scores: Sequence[Score], path: Path) -> None:
    seen: dict[tuple[str, ...], float] = {}
    for index, score in enumerate(scores):
        bounds = () if score.interval is None else (score.interval.low, score.interval.high, score.interval.level)
        if not all(math.isfinite(number) for number in (score.value, *bounds)):
            raise UserError(f"{path}: {index}: {score.name} of {score.subject} is not a finite number; evaluate again")
        key = (score.name, score.subject, score.test_set, score.unit, score.signature)
        if seen.setdefault(key, score.value) != score.value:
            raise UserError(
                f"{path}: {index}: {score.name} of {score.subject} on {score.test_set} has two values for one"
                " signature; evaluate again"
            )


def _check_figures(figures: Sequence[FigureSpec], path: Path) -> None:
    ids = [figure.id.lower() for figure in figures]
    for index, name in enumerate(ids):
        if name in ids[:index]:
            raise UserError(f"{path}: {index}.id: {name!r} is given twice; each figure needs its own")

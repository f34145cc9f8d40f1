"""The application, what every verb shares, and how things are printed."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console

from soju.core.errors import UserError
from soju.core.progress import set_quiet

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from soju.core.score import Score
    from soju.data.log import ReadLog
    from soju.evaluation import significance
    from soju.report.contents import Comparison
    from soju.sparse.recipe import SpladeConfig


app = typer.Typer(
    name="soju",
    help="Distil large multilingual language models into small Korean–English ones.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
console = Console()
errors = Console(stderr=True, highlight=False, soft_wrap=True)

Config = Annotated[str, typer.Argument(help="A YAML file or the name of a preset.", show_default=False)]
Overrides = Annotated[list[str] | None, typer.Argument(help="Settings to change: key=value.", show_default=False)]
AnyEngine = Literal["auto", "exact", "block-max", "seismic", "opensearch", "qdrant"]
OnError = Literal["stop", "skip"]
ExportFormat = Literal["tsv", "query-tokens", "stock-static", "low-rank", "onnx", "inference-free"]


@app.callback()
def _options(
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress bars.")] = False,
    offline: Annotated[bool, typer.Option("--offline", help="Never ask a hub for anything.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
) -> None:
    set_quiet(quiet)
    if offline:
        os.environ["HF_HUB_OFFLINE"] = "1"
    if debug:
        os.environ["SOJU_DEBUG"] = "1"


def main() -> None:
    """Run one verb; exit with 2 for a user's mistake, 1 for ours."""
    try:
        app(standalone_mode=True)
    except UserError as error:
        if os.environ.get("SOJU_DEBUG"):
            raise
        errors.print(str(error), markup=False)
        sys.exit(error.exit_code)
    except OSError as error:
        if os.environ.get("SOJU_DEBUG"):
            raise
        errors.print(
            f"{error.filename or 'soju'}: {error.strerror or error}; free space or choose another place", markup=False
        )
        sys.exit(2)
    except Exception as error:  # the last line of defence: one sentence instead of a traceback
        if os.environ.get("SOJU_DEBUG"):
            raise
        errors.print(
            f"soju failed: {type(error).__name__}: {error}. Run again with --debug and report it.", markup=False
        )
        sys.exit(1)


def read_config(name: str, overrides: list[str] | None) -> tuple[SpladeConfig, str]:
    """Read a YAML file or a preset with overrides; also return its text, for the run folder."""
    from soju.sparse.recipe import validate_mode

    values, text = read_values(name, overrides)
    return validate_mode(values, place=name), text


def read_values(name: str, overrides: list[str] | None) -> tuple[dict[str, Any], str]:
    """Read a YAML file or a preset with overrides, not yet checked, and its text; `recipe_of` says whose it is."""
    from soju.core.config import apply_overrides, parse_yaml
    from soju.presets import preset_names, preset_text

    path = Path(name)
    if path.suffix in (".yaml", ".yml") or path.is_file():
        from soju.core.config import read_yaml

        values: dict[str, Any] = read_yaml(path)
        text = path.read_text(encoding="utf-8-sig")
    elif name in preset_names():
        text = preset_text(name)
        values = parse_yaml(text, place=name)
    else:
        raise UserError(f'"{name}" is neither a YAML file nor a preset; presets: {", ".join(preset_names())}')
    text += "".join(f"# override: {override}\n" for override in overrides or [])
    return apply_overrides(values, overrides or []), text


def recipe_of(values: Mapping[str, Any]) -> str:
    """Return which recipe a configuration names; one that names none is checked as ``splade``, which says so."""
    recipe = values.get("recipe", "splade")
    return recipe if isinstance(recipe, str) else "splade"


def say(text: str, *, style: str | None = None) -> None:
    """Print one line as it is: no markup in names of files, no breaks in paths."""
    console.print(text, style=style, markup=False, highlight=False, soft_wrap=True)


def tell_skipped(log: ReadLog) -> bool:
    """Tell what was left out; return whether there was any."""
    if not log.refused:
        return False
    reasons = ", ".join(f"{reason} {count:,}" for reason, count in log.reasons.most_common())
    say(f"{log.refused:,} broken rows were left out: {reasons}", style="yellow")
    return True


def readable(text: str) -> str:
    """Refuse what is no text (`UserError`)."""
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise UserError("the text on the command line is not valid UTF-8; set the terminal to UTF-8 and type it again")
    return text


def print_scores(folder: Path) -> None:
    """Print the scores of a run folder."""
    from soju.report.contents import read_run

    contents = read_run(folder)
    print_tables(contents.scores, contents.comparisons)


def as_reported(comparisons: Sequence[significance.Comparison]) -> list[Comparison]:
    """Return what a report reads of comparisons, without the values of every query."""
    from soju.report.contents import Comparison

    return [Comparison.model_validate_json(json.dumps(comparison.to_json())) for comparison in comparisons]


def print_tables(scores: Sequence[Score], comparisons: Sequence[Comparison]) -> None:
    """Print scores: systems side by side where there are several, plain figures where there is one."""
    from soju.report.terminal import figures_table, scores_table

    systems: dict[str, set[str]] = {}
    for score in scores:
        systems.setdefault(score.test_set, set()).add(score.subject)
    compared = [score for score in scores if len(systems[score.test_set]) > 1]
    alone = [score for score in scores if len(systems[score.test_set]) == 1]
    if compared:
        console.print(scores_table(compared, comparisons))
    if alone:
        console.print(figures_table(alone))


def free_folder(folder: Path) -> Path:
    """Return the folder, with a number behind it when it is taken."""
    candidate, number = folder, 2
    while candidate.exists():
        candidate, number = folder.with_name(f"{folder.name}-{number}"), number + 1
    return candidate

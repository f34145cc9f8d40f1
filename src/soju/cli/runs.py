"""Verbs about runs: presets, check, train, evaluate, compare, mteb, report, verify, demo."""

from __future__ import annotations

import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from soju.cli.console import (
    Config,
    ModelName,
    Overrides,
    app,
    console,
    free_folder,
    print_evaluation,
    say,
    tell_skipped,
)
from soju.core import __version__
from soju.core.errors import BadNumbersError, DataError, RegressionError, UserError

if TYPE_CHECKING:
    from rich.console import RenderableType

    from soju.core.recipe import DataReport


@app.command(rich_help_panel="Runs")
def version() -> None:
    """Print the version."""
    console.print(__version__, highlight=False)


@app.command(rich_help_panel="Runs")
def presets(name: Annotated[str | None, typer.Argument(help="Print this one.")] = None) -> None:
    """List the presets, or print one to start from."""
    from soju.core.config import preset_names, preset_text

    if name is not None:
        typer.echo(preset_text(name), nl=False)
        return
    for known in preset_names():
        console.print(f"[bold]{known}[/]  {preset_text(known).splitlines()[0].removeprefix('# ')}")


@app.command(rich_help_panel="Runs")
def check(config: Config, overrides: Overrides = None) -> None:
    """Check configuration and data; train nothing."""
    from soju.core.config import read_config
    from soju.core.recipe import recipe_named

    values, _ = read_config(config, overrides or ())
    recipe = recipe_named(values.get("recipe"), place=config)
    try:
        report = recipe.check(recipe.configure(values, place=config))
    except DataError as error:  # a check lists everything, a run that stops only the beginning
        raise DataError(error.problems, count=error.count, shown=len(error.problems)) from None
    for table in report.tables:
        console.print(table)
    for fact in report.facts:
        say(fact)
    if not tell_skipped(report):
        say("No problem found.", style="green")


@app.command(rich_help_panel="Runs")
def train(
    config: Config,
    overrides: Overrides = None,
    out: Annotated[Path | None, typer.Option(help="Run folder; runs/NAME when not given.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the newest checkpoint that verifies.")] = False,
    resume_from: Annotated[Path | None, typer.Option(help="Go on from this checkpoint.")] = None,
    workers: Annotated[int, typer.Option(min=1, help="Threads of the Korean analyser.")] = 2,
) -> None:
    """Train, score, export and report."""
    from soju.core.config import read_config
    from soju.core.recipe import train
    from soju.core.run import Run, is_first_process

    speaks = is_first_process()

    def tell_data(report: DataReport[Any]) -> None:
        if speaks:
            tell_skipped(report)

    def tell_run(run: Run) -> None:
        from soju.report.terminal import run_tables

        if speaks and run.report.is_file():
            console.print(run_tables(run.folder))
            say(f"Model   {run.model_folder}\nReport  {run.report}")

    try:
        run = train(
            config, out=out, overrides=overrides or (), resume=resume_from or resume, workers=workers, on_data=tell_data
        )
    except (RegressionError, BadNumbersError):  # what was accepted before may have a report
        tell_run(Run(out or Path("runs") / read_config(config, overrides or ())[0]["name"]))
        raise
    tell_run(run)


@app.command(rich_help_panel="Runs")
def evaluate(
    model: ModelName,
    config: Config,
    overrides: Overrides = None,
    out: Annotated[Path | None, typer.Option(help="Write the scores to this JSON file as well.")] = None,
) -> None:
    """Score a model on the test sets of a configuration: a sparse one against BM25 and dictionary look-up."""
    from soju.core.config import read_config
    from soju.core.recipe import recipe_named

    values, _ = read_config(config, overrides or ())
    recipe = recipe_named(values.get("recipe"), place=config)
    print_evaluation(recipe.evaluate([model], values, place=config), out)


@app.command(rich_help_panel="Runs")
def compare(
    models: Annotated[
        list[str],
        typer.Argument(
            metavar="RUN BASELINE",
            help="Two runs or models; with --config as many models as wanted, the first the baseline.",
        ),
    ],
    config: Annotated[str | None, typer.Option(help="Measure the models on the test sets of this one.")] = None,
    samples: Annotated[
        int | None, typer.Option(min=100, help="Resamples of the paired bootstrap; 2,000, or as in --config.")
    ] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Their seed; 0, or as in --config.")] = None,
    out: Annotated[Path | None, typer.Option(help="With --config: write everything to this JSON file as well.")] = None,
) -> None:
    """Compare two runs query by query, with intervals, and what their models activate for the probe words.

    With --config: measure models of any recipe, each compared with the first.
    """
    from soju.core.config import read_config
    from soju.core.recipe import recipe_named, recipe_of_model

    if config is not None:
        values, _ = read_config(config)
        recipe = recipe_named(values.get("recipe"), place=config)
        print_evaluation(recipe.evaluate(models, values, place=config, samples=samples, seed=seed), out)
        return
    if len(models) != 2:
        raise UserError(f"{len(models)} runs; give two, or more models with --config")
    if out is not None:
        raise UserError("--out: goes with --config; differences of two runs are printed only")
    subject, baseline = models
    recipe = recipe_of_model(subject)
    print_evaluation(recipe.compare(Path(subject), Path(baseline), samples=samples, seed=seed), None)


@app.command(rich_help_panel="Runs")
def mteb(
    model: ModelName,
    tasks: Annotated[
        list[str], typer.Argument(metavar="TASK...", help="mteb's name (Ko-StrategyQA), or a folder of BEIR's layout.")
    ],
    language: Annotated[
        list[str] | None, typer.Option(help="Of multilingual tasks (ISO 639-3); repeat for more; kor and eng.")
    ] = None,
    split: Annotated[str, typer.Option(help="Which judgements of a folder to ask for.")] = "test",
    out: Annotated[Path | None, typer.Option(help="Write the scores to this JSON file as well.")] = None,
) -> None:
    """Measure a model with mteb on tasks of the hub or on local folders; a sparse one on retrieval alone."""
    from soju.core.recipe import Evaluation, recipe_of_model
    from soju.evaluation.mteb_tasks import refuse_without_mteb, run_tasks

    refuse_without_mteb()
    from soju.report.terminal import measured_tables

    subject, name, retrieval_only = recipe_of_model(model).mteb(model)
    languages = language or ("kor", "eng")
    scores = run_tasks(subject, tasks, name=name, languages=languages, split=split, retrieval_only=retrieval_only)
    print_evaluation(Evaluation([measured_tables(scores)], record=[score.to_json() for score in scores]), out)


@app.command(rich_help_panel="Runs")
def report(run_folder: Annotated[Path, typer.Argument(metavar="RUN")]) -> None:
    """Write the report of a run again."""
    from soju.report import write_report

    say(str(write_report(run_folder)))


@app.command(rich_help_panel="Runs")
def verify(folder: Annotated[Path, typer.Argument(metavar="RUN", help="A run, model or index folder.")]) -> None:
    """Check every file against the manifests written with it."""
    from soju.core.files import MANIFEST, check_tree

    total = broken = 0
    for checked in check_tree(folder):
        total += 1
        if checked.problem is None:
            say(f"intact  {checked.path}", style="green")
        else:
            broken += 1
            say(f"broken  {checked.problem}", style="red")
    if not total:
        raise UserError(
            f"{folder}: no {MANIFEST} in it, so there is nothing to check; give a run, model or index folder"
        )
    if broken:
        raise UserError(f"{folder}: {broken} of {total} folders are not as they were written; see the lines above")


@app.command(rich_help_panel="Runs")
def demo(
    recipe: Annotated[str | None, typer.Argument(help="The recipe to show; the first of all when not given.")] = None,
    out: Annotated[Path | None, typer.Option(help="Run folder; a new one below runs/ when not given.")] = None,
) -> None:
    """Run a recipe on our own samples, offline, and show what it made."""
    from soju.core.recipe import RECIPES, recipe_named

    name = recipe or next(iter(RECIPES))

    def show(found: RenderableType) -> None:
        if isinstance(found, str):
            say(found)
        else:
            console.print(found)

    folder = out or free_folder(Path("runs") / f"demo-{name}")
    answer = recipe_named(name, place="soju demo").demo(folder, show)
    if answer is not None and sys.stdin.isatty():
        console.print("Ask in Korean or English; an empty line ends.")
        with suppress(EOFError):
            while query := console.input("? ").strip():
                console.print(answer(query))

"""What ``evaluate`` and ``compare`` do with embedding models: one table, a column for each model.

What ``check``, ``train`` and ``demo`` do with recipe ``embedding``.

Verbs about runs: presets, check, train, evaluate, compare, report, verify, demo.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from soju import __version__
from soju.cli.console import (
    Config,
    Overrides,
    app,
    as_reported,
    console,
    free_folder,
    print_scores,
    print_tables,
    read_config,
    read_values,
    recipe_of,
    say,
    tell_skipped,
)
from soju.core.errors import DataError, UserError

if TYPE_CHECKING:
    from soju.embedding.config import EmbeddingConfig


def compare_embedding_models(
    models: Sequence[str], config: str, *, samples: int | None, seed: int | None, out: Path | None = None
) -> None:
    """Print models against the first on a configuration's sets; its resamples and seed hold where none is given."""
    values, _ = read_values(config, None)
    if recipe_of(values) != "embedding":
        raise UserError(f"{config}: --config measures embedding models; give a configuration with recipe: embedding")
    evaluation = values.get("evaluation")
    if isinstance(evaluation, Mapping):
        given = {name: value for name, value in (("resamples", samples), ("seed", seed)) if value is not None}
        values = {**values, "evaluation": {**evaluation, **given}}
    measure_embedding_models(models, values, place=config, out=out)


def measure_embedding_models(
    models: Sequence[str], values: Mapping[str, Any], *, place: str, out: Path | None = None
) -> None:
    """Measure models on the sets of a configuration, print one table, and write everything to `out`."""
    from soju.core.files import write_json
    from soju.embedding.evaluate import compare_models
    from soju.report.tables import model_rows
    from soju.report.terminal import models_table

    measured = compare_models(models, values, place=place)
    rows = model_rows(measured.subjects, measured.scores, as_reported(measured.comparisons))
    console.print(models_table(measured.subjects, rows))
    for why in measured.not_compared:
        say(why, style="yellow")
    if out is not None:
        write_json(out, {**measured.to_json(), "rows": [row.to_json() for row in rows]})


DEMO = "embedding-pico"
QUERY = "김치를 담그는 방법"


def check_embedding(values: Mapping[str, Any], *, place: str) -> None:
    """Check configuration and data; train nothing, ask no hub for a model."""
    from soju.data.statistics import format_statistics
    from soju.embedding.recipe import read_run

    try:
        data, evaluation = read_run(_settings(values, place))
    except DataError as error:  # a check lists everything, a run that stops only the beginning
        raise DataError(error.problems, count=error.count, shown=len(error.problems)) from None
    for part in ("korean", "english", "pairs", "passages"):
        if part in data.statistics:
            console.print(format_statistics(data.statistics[part], title=part))
    for name, count in data.statistics["stage_texts"].items():
        say(f"{name}: {count:,} Korean texts")
    watched = data.statistics["watched_pairs"]
    say(f"watched: {watched['korean']:,} Korean pairs, {watched['english']:,} English pairs")
    for name, pairs in evaluation.sts.items():
        say(f"{name}: {len(pairs):,} scored pairs")
    if not tell_skipped(data.log):
        say("No problem found.", style="green")


def train_embedding(
    values: Mapping[str, Any], text: str, *, place: str, out: Path | None, resume: bool, resume_from: Path | None
) -> None:
    """Expand, train, measure and report."""
    from soju.core.errors import BadNumbersError, RegressionError
    from soju.core.run import open_run_folder
    from soju.embedding.recipe import read_run, run

    settings = _settings(values, place)
    data, evaluation = read_run(settings)
    speaks = int(os.environ.get("RANK", "0")) == 0
    if speaks:
        tell_skipped(data.log)
    folder = out or Path("runs") / settings.name
    run_dir = open_run_folder(folder, settings, text, resumes=resume or resume_from is not None)
    try:
        run(settings, run_dir, data=data, evaluation=evaluation, resume=resume_from)
    except (RegressionError, BadNumbersError):
        if speaks and (folder / "report.html").is_file():
            _tell(folder)
        raise
    if speaks:
        _tell(folder)


def demo_embedding(folder: Path) -> None:
    """Train a pico model on our own samples and show what changed."""
    from sentence_transformers import SentenceTransformer

    from soju.core.config import parse_yaml
    from soju.presets import preset_text

    text = preset_text(DEMO)
    console.print("Making a small English embedding model, giving it Korean, stage by stage ...")
    train_embedding(parse_yaml(text, place=DEMO), text, place=DEMO, out=folder, resume=False, resume_from=None)
    for name in ("base", "stage0"):
        tokens = SentenceTransformer(str(folder / name), device="cpu").tokenizer.tokenize(QUERY)
        say(f"{name}: {QUERY!r} has {len(tokens)} tokens")


def _tell(folder: Path) -> None:
    print_scores(folder)
    say(f"Model   {folder / 'best'}\nReport  {folder / 'report.html'}")


def _settings(values: Mapping[str, Any], place: str) -> EmbeddingConfig:
    from soju.core.config import validate
    from soju.embedding.config import EmbeddingConfig

    settings: EmbeddingConfig = validate(values, EmbeddingConfig, place=place)
    return settings


@app.command(rich_help_panel="Runs")
def version() -> None:
    """Print the version."""
    console.print(__version__)


@app.command(rich_help_panel="Runs")
def presets(name: Annotated[str | None, typer.Argument(help="Print this one.")] = None) -> None:
    """List the presets, or print one to start from."""
    from soju.presets import preset_names, preset_text

    if name is not None:
        typer.echo(preset_text(name), nl=False)
        return
    for known in preset_names():
        console.print(f"[bold]{known}[/]  {preset_text(known).splitlines()[0].removeprefix('# ')}")


@app.command(rich_help_panel="Runs")
def check(config: Config, overrides: Overrides = None) -> None:
    """Check configuration and data; train nothing."""
    values, _ = read_values(config, overrides)
    if recipe_of(values) == "embedding":
        check_embedding(values, place=config)
        return
    from soju.data.statistics import format_statistics
    from soju.sparse.recipe import read_run_data

    settings, _ = read_config(config, overrides)
    try:
        data = read_run_data(settings)
    except DataError as error:  # a check lists everything, a run that stops only the beginning
        raise DataError(error.problems, count=error.count, shown=len(error.problems)) from None
    for part in ("pairs", "passages", "terms", "triplets"):
        if part in data.training.statistics:
            console.print(format_statistics(data.training.statistics[part], title=part))
    for texts in data.evaluation:
        sizes = ", ".join(f"{name} {len(one.queries):,} queries" for name, one in texts.directions.items())
        say(f"{texts.name}: {sizes}")
    if not tell_skipped(data.training.log):
        say("No problem found.", style="green")


@app.command(rich_help_panel="Runs")
def train(
    config: Config,
    overrides: Overrides = None,
    out: Annotated[Path | None, typer.Option(help="Run folder; runs/NAME when not given.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the newest checkpoint that verifies.")] = False,
    resume_from: Annotated[Path | None, typer.Option(help="Go on from this checkpoint.")] = None,
    workers: Annotated[int, typer.Option(min=1, help="Threads.")] = 2,
) -> None:
    """Train, score, export and report."""
    values, given = read_values(config, overrides)
    if recipe_of(values) == "embedding":
        train_embedding(values, given, place=config, out=out, resume=resume, resume_from=resume_from)
        return
    from soju.core.run import open_run_folder
    from soju.sparse.recipe import read_run_data, run_mode

    settings, text = read_config(config, overrides)
    data = read_run_data(settings)
    speaks = int(os.environ.get("RANK", "0")) == 0
    if speaks:
        tell_skipped(data.training.log)
    folder = out or Path("runs") / settings.name
    run_dir = open_run_folder(folder, settings, text, resumes=resume or resume_from is not None)
    report_page = run_mode(settings, run_dir, data=data, resume=resume_from or resume, workers=workers)
    if speaks:
        print_scores(folder)
        say(f"Model   {report_page.parent / ('best' if run_dir.best.is_dir() else 'final')}\nReport  {report_page}")


@app.command(rich_help_panel="Runs")
def evaluate(
    model: Annotated[str, typer.Argument(help="A model folder, a run folder or ko-en-static.")],
    config: Config,
    overrides: Overrides = None,
    out: Annotated[Path | None, typer.Option(help="Write the scores to this JSON file as well.")] = None,
) -> None:
    """Score a model on the test sets of a configuration: a sparse one against BM25 and dictionary look-up."""
    from soju.core.files import write_json

    values, _ = read_values(config, overrides)
    if recipe_of(values) == "embedding":
        measure_embedding_models([model], values, place=config, out=out)
        return
    from soju.sparse.evaluate import Subject, score
    from soju.sparse.indexing import model_folder, open_model, search_settings_of
    from soju.sparse.recipe import read_run_data

    settings, _ = read_config(config, overrides)
    encoder, _ = open_model(model)
    folder = model_folder(model)
    subject = Subject(
        f"soju {folder.parent.name if folder.name in ('best', 'final') else folder.name}",
        encoder,
        search_settings_of(folder),
    )
    measured = score([subject], read_run_data(settings), settings, folder)
    comparisons = as_reported(measured.comparisons)
    print_tables(measured.scores, comparisons)
    if out is not None:
        write_json(out, [item.to_json() for item in measured.scores])


@app.command(rich_help_panel="Runs")
def compare(
    models: Annotated[
        list[Path],
        typer.Argument(
            metavar="RUN BASELINE",
            help="Two runs or models; with --config embedding models, as many as wanted, the first the baseline.",
        ),
    ],
    config: Annotated[
        str | None, typer.Option(help="Measure embedding models on the test sets of this configuration.")
    ] = None,
    samples: Annotated[
        int | None, typer.Option(min=100, help="Resamples of the paired bootstrap; 2,000, or as in --config.")
    ] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Their seed; 0, or as in --config.")] = None,
    out: Annotated[Path | None, typer.Option(help="With --config: write everything to this JSON file as well.")] = None,
) -> None:
    """Compare two runs query by query, with intervals, and what their models light up for the probe words.

    With --config, which must be of recipe embedding: measure the models side by side, each against the first.
    """
    if config is not None:
        compare_embedding_models([str(model) for model in models], config, samples=samples, seed=seed, out=out)
        return
    if len(models) != 2:
        raise UserError(f"{len(models)} runs; give two, or embedding models with --config")
    if out is not None:
        raise UserError("--out: goes with --config; differences of two runs are printed only")
    from soju.report.terminal import differences_table, probes_table
    from soju.sparse.evaluate import compare_runs, probe_models

    subject, baseline = models
    if (subject / "query_scores.json").is_file() or (baseline / "query_scores.json").is_file():
        differences = compare_runs(subject, baseline, samples=samples or 2000, seed=seed or 0)
        console.print(differences_table(as_reported(differences), title=f"{subject} minus {baseline}"))
    console.print(probes_table(probe_models([str(subject), str(baseline)])))


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
    recipe: Annotated[Literal["splade", "embedding"], typer.Argument(help="The recipe to show.")] = "splade",
    out: Annotated[Path | None, typer.Option(help="Run folder; a new one below runs/ when not given.")] = None,
) -> None:
    """Run a recipe on our own samples, offline, and show what it made."""
    if recipe == "embedding":
        demo_embedding(out or free_folder(Path("runs") / f"demo-{recipe}"))
        return
    from soju.report.terminal import hits_table
    from soju.sparse.recipe import QUERY, STATIC, STUDENT, run_demo

    folder = out or free_folder(Path("runs") / f"demo-{recipe}")
    console.print("1/2  Distilling a static Korean–English searcher from our own samples ...")
    static = run_demo(STATIC, folder / "static")
    print_scores(folder / "static")
    (found,) = static.search([QUERY])
    console.print(hits_table(found))
    console.print("2/2  Training a neural student that starts as such a searcher ...")
    student = run_demo(STUDENT, folder / "student")
    print_scores(folder / "student")
    (found,) = student.search([QUERY])
    console.print(hits_table(found))
    say(f"Reports  {static.report}\n         {student.report}")
    if sys.stdin.isatty():
        console.print("Ask the student in Korean or English; an empty line ends.")
        with suppress(EOFError):
            while query := console.input("? ").strip():
                console.print(hits_table(student.search([query])[0]))

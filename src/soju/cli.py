"""The command line: parses, calls, exits. Imports lazily so that ``soju --help`` loads no torch."""

from __future__ import annotations

import json
import os
import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console

from soju import __version__
from soju.core.errors import DataError, UserError
from soju.core.progress import set_quiet

if TYPE_CHECKING:
    from collections.abc import Sequence

    from soju.core.score import Score
    from soju.data.log import ReadLog
    from soju.evaluation import significance
    from soju.recipes.splade.reading import SpladeConfig
    from soju.report.run_contents import Comparison

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
Engine = Literal["auto", "exact", "seismic"]
OnError = Literal["stop", "skip"]
ExportFormat = Literal["tsv", "query-tokens", "stock-static", "low-rank"]


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


@app.command()
def version() -> None:
    """Print the version."""
    console.print(__version__)


@app.command()
def presets(name: Annotated[str | None, typer.Argument(help="Print this one.")] = None) -> None:
    """List the presets, or print one to start from."""
    from soju.presets import preset_names, preset_text

    if name is not None:
        typer.echo(preset_text(name), nl=False)
        return
    for known in preset_names():
        console.print(f"[bold]{known}[/]  {preset_text(known).splitlines()[0].removeprefix('# ')}")


@app.command()
def check(config: Config, overrides: Overrides = None) -> None:
    """Check configuration and data; train nothing."""
    from soju.data.statistics import format_statistics
    from soju.recipes.splade.reading import read_run_data

    settings, _ = _read_config(config, overrides)
    try:
        data = read_run_data(settings)
    except DataError as error:  # a check lists everything, a run that stops only the beginning
        raise DataError(error.problems, count=error.count, shown=len(error.problems)) from None
    for part in ("pairs", "passages", "terms"):
        if part in data.training.statistics:
            console.print(format_statistics(data.training.statistics[part], title=part))
    for texts in data.evaluation:
        sizes = ", ".join(f"{name} {len(queries):,} queries" for name, (queries, _) in texts.directions.items())
        _say(f"{texts.name}: {sizes}")
    if not _tell_skipped(data.training.log):
        _say("No problem found.", style="green")


@app.command()
def train(
    config: Config,
    overrides: Overrides = None,
    out: Annotated[Path | None, typer.Option(help="Run folder; runs/NAME when not given.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the newest checkpoint that verifies.")] = False,
    resume_from: Annotated[Path | None, typer.Option(help="Go on from this checkpoint.")] = None,
    workers: Annotated[int, typer.Option(min=1, help="Threads.")] = 2,
) -> None:
    """Train, score, export and report."""
    from soju.recipes.splade.modes import open_run_folder, run_mode
    from soju.recipes.splade.reading import read_run_data

    settings, text = _read_config(config, overrides)
    data = read_run_data(settings)
    speaks = int(os.environ.get("RANK", "0")) == 0
    if speaks:
        _tell_skipped(data.training.log)
    folder = out or Path("runs") / settings.name
    run_dir = open_run_folder(folder, settings, text, resumes=resume or resume_from is not None)
    report_page = run_mode(settings, run_dir, data=data, resume=resume_from or resume, workers=workers)
    if speaks:
        _print_scores(folder)
        _say(f"Model   {report_page.parent / ('best' if run_dir.best.is_dir() else 'final')}\nReport  {report_page}")


@app.command()
def evaluate(
    model: Annotated[str, typer.Argument(help="A model folder, a run folder or ko-en-static.")],
    config: Config,
    overrides: Overrides = None,
    out: Annotated[Path | None, typer.Option(help="Write the scores to this JSON file as well.")] = None,
) -> None:
    """Score a model on the test sets of a configuration, against BM25 and dictionary look-up."""
    from soju.core.files import write_json
    from soju.recipes.splade.indexing import model_folder, open_model, search_settings_of
    from soju.recipes.splade.reading import read_run_data
    from soju.recipes.splade.scoring import Subject, score

    settings, _ = _read_config(config, overrides)
    encoder, _ = open_model(model)
    folder = model_folder(model)
    subject = Subject(
        f"soju {folder.parent.name if folder.name in ('best', 'final') else folder.name}",
        encoder,
        search_settings_of(folder),
    )
    measured = score([subject], read_run_data(settings), settings, folder)
    comparisons = _as_reported(measured.comparisons)
    _print_tables(measured.scores, comparisons)
    if out is not None:
        write_json(out, [item.to_json() for item in measured.scores])


@app.command()
def index(
    model: Annotated[str, typer.Argument(help="A model folder, a run folder or ko-en-static.")],
    corpus: Annotated[list[str], typer.Argument(help="CORPUS... INDEX: .jsonl, .tsv or .txt files, then the folder.")],
    engine: Annotated[Engine, typer.Option(help="auto builds Seismic from 100,000 passages on.")] = "auto",
    add: Annotated[bool, typer.Option("--add", help="Add to the index instead of making a new one.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the index that is there.")] = False,
    on_error: Annotated[OnError, typer.Option(help="Stop at broken rows, or skip and count them.")] = "stop",
) -> None:
    """Index documents: soju index MODEL CORPUS... INDEX."""
    from soju.recipes.splade.indexing import add_to_index, build_index

    *files, last = corpus
    folder = Path(last)
    if not files or folder.is_file():
        raise UserError(f"{last}: the last argument is the index folder: soju index MODEL CORPUS... INDEX")
    if add and (overwrite or engine != "auto"):
        raise UserError("--add keeps the index as it was made; leave out --overwrite and --engine")
    if add:
        made, added, log = add_to_index(model, files, folder, on_error=on_error)
        _say(f"{added:,} documents added")
    else:
        made, log = build_index(model, files, folder, engine=engine, on_error=on_error, overwrite=overwrite)
    _tell_skipped(log)
    empty, names = made.empty_documents
    _say(f"{folder}: {made.documents:,} documents, {made.chunks:,} passages")
    if empty:
        _say(f"{empty:,} documents hold no known term and cannot be found: {', '.join(names)}", style="yellow")


@app.command()
def search(
    index_folder: Annotated[Path, typer.Argument(metavar="INDEX", help="An index made with soju index.")],
    query: Annotated[str, typer.Argument(help="Korean or English.")],
    k: Annotated[int, typer.Option("--top", "-k", min=1, help="Documents to show.")] = 10,
    engine: Annotated[Engine, typer.Option(help="exact never misses; seismic is faster on large indexes.")] = "auto",
    model: Annotated[str | None, typer.Option(help="Where the model is, if not inside the index.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Search an index; show which terms matched, in both languages."""
    from soju.recipes.splade.indexing import open_index, search_index
    from soju.report.terminal import hits_table

    opened, encoder = open_index(index_folder, model)
    (found,) = search_index(opened, encoder, [_readable(query)], k=k, engine=engine)
    if as_json:
        typer.echo(found.model_dump_json(indent=2))
    elif found.hits:
        console.print(hits_table(found))
    else:
        console.print("Nothing shares a term with this query.")


@app.command("expand-text")
def expand_text(
    model: Annotated[str, typer.Argument(help="A model folder, a run folder or ko-en-static.")],
    text: Annotated[str, typer.Argument(help="Korean or English.")],
    k: Annotated[int, typer.Option("--top", "-k", min=1, help="Terms to show.")] = 20,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show the terms a text lights up, with weight and language."""
    from soju.recipes.splade.indexing import expand, open_model
    from soju.report.terminal import expansion_table

    encoder, _ = open_model(model)
    (expansion,) = expand(encoder, [_readable(text)], k=k)
    if as_json:
        typer.echo(expansion.model_dump_json(indent=2))
    else:
        console.print(expansion_table(expansion))


@app.command()
def export(
    model: Annotated[str, typer.Argument(help="A model folder, a run folder or ko-en-static.")],
    target: Annotated[Path, typer.Argument(help="File or folder to write.")],
    to: Annotated[ExportFormat, typer.Option(help="low-rank is approximate, the others are exact.")],
    hidden_size: Annotated[int, typer.Option(min=16, help="Width of the low-rank form.")] = 512,
) -> None:
    """Write a model for programs that do not know soju."""
    from soju.recipes.splade.exporting import FORMATS
    from soju.recipes.splade.exporting import export as write
    from soju.recipes.splade.indexing import model_folder, open_model, search_settings_of

    encoder, _ = open_model(model)
    prior = search_settings_of(model_folder(model)).prior_documents
    write(encoder, target, to, prior_documents=prior, hidden_size=hidden_size)
    _say(f"{target}: {FORMATS[to]}")


@app.command()
def trim(
    model: Annotated[str, typer.Argument(help="A masked language model: a folder, package:NAME or a hub id.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to write.")],
    corpus: Annotated[list[str], typer.Option(help="Rows of any kind, .txt or a pattern; repeat for more.")],
    max_size: Annotated[int, typer.Option(min=1, help="Ids to keep at most.")] = 65_535,
    on_error: Annotated[OnError, typer.Option(help="Stop at broken rows, or skip and count them.")] = "stop",
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub id.")] = None,
) -> None:
    """Keep only the part of a model's vocabulary that a corpus needs."""
    from soju.recipes.splade.trimming import trim as trim_model

    result, log = trim_model(model, out, corpus, max_size=max_size, on_error=on_error, revision=revision)
    _tell_skipped(log)
    _say(f"{out}: {result.ids_after:,} of {result.ids_before:,} ids")
    _say(f"head {result.head_megabytes_before:,.1f} -> {result.head_megabytes_after:,.1f} MB")
    _say(f"{result.covered_share:.2%} of {result.corpus_tokens:,} tokens keep their piece")
    if result.ids_left_out:
        _say(f"{result.ids_left_out:,} ids of the corpus did not fit in --max-size {max_size:,}", style="yellow")


@app.command()
def compare(
    subject: Annotated[Path, typer.Argument(metavar="RUN", help="The run or model in question.")],
    baseline: Annotated[Path, typer.Argument(metavar="BASELINE", help="The run or model it is compared with.")],
    samples: Annotated[int, typer.Option(min=100, help="Resamples of the paired bootstrap.")] = 2000,
    seed: Annotated[int, typer.Option(min=0, help="Their seed.")] = 0,
) -> None:
    """Compare two runs query by query, with intervals, and what their models light up for the probe words."""
    from soju.recipes.splade.comparing import compare_runs, probe_models
    from soju.report.terminal import differences_table, probes_table

    if (subject / "query_scores.json").is_file() or (baseline / "query_scores.json").is_file():
        differences = compare_runs(subject, baseline, samples=samples, seed=seed)
        console.print(differences_table(_as_reported(differences), title=f"{subject} minus {baseline}"))
    console.print(probes_table(probe_models([str(subject), str(baseline)])))


@app.command()
def report(run_folder: Annotated[Path, typer.Argument(metavar="RUN")]) -> None:
    """Write the report of a run again."""
    from soju.report.run_report import write_report

    _say(str(write_report(run_folder)))


@app.command()
def verify(folder: Annotated[Path, typer.Argument(metavar="RUN", help="A run, model or index folder.")]) -> None:
    """Check every file against the manifests written with it."""
    from soju.core.files import MANIFEST
    from soju.quality.integrity import check_tree

    total = broken = 0
    for checked in check_tree(folder):
        total += 1
        if checked.problem is None:
            _say(f"intact  {checked.path}", style="green")
        else:
            broken += 1
            _say(f"broken  {checked.problem}", style="red")
    if not total:
        raise UserError(
            f"{folder}: no {MANIFEST} in it, so there is nothing to check; give a run, model or index folder"
        )
    if broken:
        raise UserError(f"{folder}: {broken} of {total} folders are not as they were written; see the lines above")


@app.command()
def demo(
    recipe: Annotated[Literal["splade"], typer.Argument(help="The recipe to show.")] = "splade",
    out: Annotated[Path | None, typer.Option(help="Run folder; a new one below runs/ when not given.")] = None,
) -> None:
    """Run a recipe on our own samples, offline, and search what it made."""
    from soju.recipes.splade.demo import QUERY, STATIC, STUDENT, run_demo
    from soju.report.terminal import hits_table

    folder = out or _free_folder(Path("runs") / f"demo-{recipe}")
    console.print("1/2  Distilling a static Korean–English searcher from our own samples ...")
    static = run_demo(STATIC, folder / "static")
    _print_scores(folder / "static")
    (found,) = static.search([QUERY])
    console.print(hits_table(found))
    console.print("2/2  Training a neural student that starts as such a searcher ...")
    student = run_demo(STUDENT, folder / "student")
    _print_scores(folder / "student")
    (found,) = student.search([QUERY])
    console.print(hits_table(found))
    _say(f"Reports  {static.report}\n         {student.report}")
    if sys.stdin.isatty():
        console.print("Ask the student in Korean or English; an empty line ends.")
        with suppress(EOFError):
            while query := console.input("? ").strip():
                console.print(hits_table(student.search([query])[0]))


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


def _read_config(name: str, overrides: list[str] | None) -> tuple[SpladeConfig, str]:
    from soju.core.config import apply_overrides, parse_yaml
    from soju.presets import preset_names, preset_text
    from soju.recipes.splade.modes import validate_mode

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
    settings = validate_mode(apply_overrides(values, overrides or []), place=name)
    return settings, text + "".join(f"# override: {override}\n" for override in overrides or [])


def _say(text: str, *, style: str | None = None) -> None:
    """Print one line as it is: no markup in names of files, no breaks in paths."""
    console.print(text, style=style, markup=False, highlight=False, soft_wrap=True)


def _tell_skipped(log: ReadLog) -> bool:
    if not log.refused:
        return False
    reasons = ", ".join(f"{reason} {count:,}" for reason, count in log.reasons.most_common())
    _say(f"{log.refused:,} broken rows were left out: {reasons}", style="yellow")
    return True


def _readable(text: str) -> str:
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise UserError("the text on the command line is not valid UTF-8; set the terminal to UTF-8 and type it again")
    return text


def _print_scores(folder: Path) -> None:
    from soju.report.run_contents import read_run

    contents = read_run(folder)
    _print_tables(contents.scores, contents.comparisons)


def _as_reported(comparisons: Sequence[significance.Comparison]) -> list[Comparison]:
    """Return what a report reads of comparisons, without the values of every query."""
    from soju.report.run_contents import Comparison

    return [Comparison.model_validate_json(json.dumps(comparison.to_json())) for comparison in comparisons]


def _print_tables(scores: Sequence[Score], comparisons: Sequence[Comparison]) -> None:
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


def _free_folder(folder: Path) -> Path:
    candidate, number = folder, 2
    while candidate.exists():
        candidate, number = folder.with_name(f"{folder.name}-{number}"), number + 1
    return candidate

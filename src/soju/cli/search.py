"""Verbs about searching: index, search, expand-text, explore; and vectors, which writes a corpus for other engines."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Annotated

import typer

from soju.cli.console import ModelName, OnError, OnErrorOption, app, console, readable, say, tell_skipped
from soju.core.errors import UserError, require_extra
from soju.search.engines import ENGINES, SERVERS
from soju.sparse.export import VectorFormat

_SERVERS = " and ".join(SERVERS)


def _known_engine(name: str) -> str:
    if name not in ENGINES:
        raise typer.BadParameter(f"{name!r} is not one of {', '.join(ENGINES)}")
    return name


def _engine_option(text: str) -> typer.models.OptionInfo:
    option: typer.models.OptionInfo = typer.Option(
        help=f"{text} Known: {', '.join(ENGINES)}.", metavar="ENGINE", callback=_known_engine
    )
    return option


Url = Annotated[str | None, typer.Option(help=f"{_SERVERS}: the server, or a local folder of Qdrant.")]
Set = Annotated[list[str] | None, typer.Option("--set", help=f"{_SERVERS}: key=value; repeat for more.")]


@app.command(rich_help_panel="Search")
def index(
    model: ModelName,
    corpus: Annotated[list[str], typer.Argument(help="CORPUS... INDEX: .jsonl, .tsv or .txt files, then the folder.")],
    engine: Annotated[str, _engine_option("auto adds block-max from 20,000 passages on.")] = "auto",
    add: Annotated[bool, typer.Option("--add", help="Add to the index instead of making a new one.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the index that is there.")] = False,
    on_error: OnErrorOption = "stop",
    url: Url = None,
    settings: Set = None,
    dead_letters: Annotated[Path | None, typer.Option(help="Where passages go that the engine refuses.")] = None,
) -> None:
    """Index documents: soju index MODEL CORPUS... INDEX."""
    from soju.data.log import ReadLog
    from soju.sparse.indexing import Index, read_documents
    from soju.sparse.model import load

    *files, last = corpus
    if engine in SERVERS:
        if add or not files:
            raise UserError(f"soju index MODEL CORPUS... NAME --engine {engine} makes a whole index; leave out --add")
        _load(model, files, last, engine, url, settings, dead_letters, on_error=on_error, overwrite=overwrite)
        return
    _refuse_remote(url, settings, dead_letters)
    folder = Path(last)
    if not files or folder.is_file():
        raise UserError(f"{last}: the last argument is the index folder: soju index MODEL CORPUS... INDEX")
    if add and (overwrite or engine != "auto"):
        raise UserError("--add keeps the index as it was made; leave out --overwrite and --engine")
    log = ReadLog()
    documents = read_documents(files, on_error, log)
    if add:
        made = Index.open(folder, model)
        say(f"{made.add(documents):,} documents added")
    else:
        made = Index.build(documents, load(model), folder, engine=engine, overwrite=overwrite)
    tell_skipped(log)
    say(f"{folder}: {made.documents:,} documents, {made.passages:,} passages")
    _tell_empty(*made.vectors.empty_documents)


@app.command(rich_help_panel="Search")
def search(
    index: Annotated[str, typer.Argument(metavar="INDEX", help="A folder made with soju index, or a name.")],
    query: Annotated[str, typer.Argument(help="Korean or English.")],
    k: Annotated[int, typer.Option("--top", "-k", min=1, help="Documents to show.")] = 10,
    engine: Annotated[str, _engine_option("Which one searches; all of ours find the same.")] = "auto",
    model: Annotated[str | None, typer.Option(help="Where the model is, if not inside the index.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    url: Url = None,
    settings: Set = None,
) -> None:
    """Search an index; show which terms matched, in both languages."""
    from soju.report.terminal import hits_table
    from soju.sparse.indexing import Index, search_index, search_url

    if engine in SERVERS:
        found = search_url(engine, url, index, readable(query), model, k=k, settings=settings or ())
    else:
        _refuse_remote(url, settings, None)
        opened = Index.open(index, model)
        (found,) = search_index(opened.vectors, opened.model.encoder, [readable(query)], k=k, engine=engine)
    if as_json:
        typer.echo(found.model_dump_json(indent=2))
    elif found.hits:
        console.print(hits_table(found))
    else:
        console.print("Nothing shares a term with this query.")


def _load(
    model: str,
    files: list[str],
    name: str,
    engine: str,
    url: str | None,
    settings: list[str] | None,
    dead_letters: Path | None,
    *,
    on_error: OnError,
    overwrite: bool,
) -> None:
    """Index in another engine; a passage that was refused makes the exit code 2."""
    from soju.sparse.indexing import connect, load_index

    with closing(connect(engine, url)) as target:
        loaded = load_index(
            model,
            files,
            name,
            target,
            on_error=on_error,
            overwrite=overwrite,
            settings=settings or (),
            dead_letters=dead_letters,
        )
    tell_skipped(loaded.log)
    facts, report = loaded.facts, loaded.report
    say(f"{name}: {facts.documents:,} documents, {report.stored:,} of {facts.passages:,} passages stored")
    _tell_empty(*loaded.empty)
    if report.failed:
        raise UserError(
            f"{report.failed:,} passages were refused ({', '.join(report.first_failed)}, ...); why is in "
            f"{loaded.dead_letters}; fix them and index again with --overwrite"
        )


def _tell_empty(empty: int, names: Sequence[str]) -> None:
    if empty:
        say(f"{empty:,} documents hold no known term and cannot be found: {', '.join(names)}", style="yellow")


def _refuse_remote(url: str | None, settings: list[str] | None, dead_letters: Path | None) -> None:
    if url is not None or settings or dead_letters is not None:
        raise UserError(f"--url, --set and --dead-letters belong to --engine {_SERVERS}; leave them out")


@app.command("expand-text", rich_help_panel="Search")
def expand_text(
    model: ModelName,
    text: Annotated[str, typer.Argument(help="Korean or English.")],
    k: Annotated[int, typer.Option("--top", "-k", min=1, help="Terms to show.")] = 20,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show the terms a text activates, with weight and language."""
    from soju.report.contents import Expansion
    from soju.report.terminal import expansion_table
    from soju.sparse.model import load

    expansion = Expansion(text=readable(text), terms=tuple(load(model).expand(text, k)))
    if as_json:
        typer.echo(expansion.model_dump_json(indent=2))
    elif expansion.terms:
        console.print(expansion_table(expansion))
    else:
        console.print("This text activates no term.")


@app.command(rich_help_panel="Search")
def explore(
    model: ModelName,
    index: Annotated[
        list[Path] | None, typer.Option(help="An index made with the model; once more for the other model's.")
    ] = None,
    against: Annotated[str | None, typer.Option(metavar="MODEL2", help="A second model to compare with.")] = None,
    port: Annotated[int, typer.Option(min=0, max=65_535, help="0 takes any that is free.")] = 8765,
    browser: Annotated[bool, typer.Option("--browser/--no-browser", help="Open the page in a browser.")] = True,
) -> None:
    """Open a page on this machine: type a text, see its terms, the hits, and why they matched."""
    require_extra("soju explore", "explore", "starlette", "uvicorn")
    from soju.sparse.explore import listen, serve, url_of

    listening = listen(port)  # before models load, so that a taken port is told at once
    from soju.sparse.explore import Explorer, create_app, open_models

    models = open_models(model, against=against, indexes=index or [])
    explorer = Explorer(models)
    page = create_app([item.label for item in models], explorer.expand, explorer.search if explorer.searches else None)
    say(f"{url_of(listening)} shows {' and '.join(item.name for item in models)}; Ctrl-C ends it")
    serve(page, listening, browser=browser)
    say("Ended.")


@app.command(rich_help_panel="Search")
def vectors(
    model: ModelName,
    corpus: Annotated[list[str], typer.Argument(help="CORPUS... OUT: .jsonl, .tsv or .txt files, then the folder.")],
    to: Annotated[VectorFormat, typer.Option(help="Whose files to write.")],
    queries: Annotated[list[str] | None, typer.Option(help="Queries to write as well; repeat for more.")] = None,
    index_name: Annotated[str | None, typer.Option(help="Index the bulk files name; else that of OUT.")] = None,
    quantisation: Annotated[float, typer.Option(min=1e-3, help="anserini: factor before rounding.")] = 100.0,
    on_error: OnErrorOption = "stop",
) -> None:
    """Write the weighted terms of a corpus: soju vectors MODEL CORPUS... OUT --to FORMAT."""
    from soju.sparse.export.vectors import VECTOR_FORMATS, write_vectors

    *files, last = corpus
    folder = Path(last)
    if not files or folder.is_file():
        raise UserError(f"{last}: the last argument is the folder to write: soju vectors MODEL CORPUS... OUT")
    about, log = write_vectors(
        model, files, folder, to,
        queries=queries or (), name=index_name, quantisation=quantisation, on_error=on_error,
    )  # fmt: skip
    tell_skipped(log)
    say(f"{folder}: {about['documents']:,} documents, {about['passages']:,} passages: {VECTOR_FORMATS[to]}")
    if about["empty_documents"]:
        say(f"{about['empty_documents']:,} documents hold no known term and cannot be found", style="yellow")
    if dropped := about.get("dropped_weights"):
        say(
            f"{dropped:,} of {about['weights']:,} weights round to 0; raise --quantisation to keep them", style="yellow"
        )
    if asked := about.get("queries"):
        say(f"{asked['written']:,} queries")
        if asked["without_terms"]:
            names = ", ".join(asked["without_terms"][:10])
            say(f"{len(asked['without_terms']):,} queries hold no known term: {names}", style="yellow")

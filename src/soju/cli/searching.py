"""Verbs about searching: index, search, expand-text."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from soju.cli.console import AnyEngine, OnError, app, console, readable, say, tell_skipped
from soju.core.errors import UserError

if TYPE_CHECKING:
    from soju.sparse.engines import RemoteEngine


Url = Annotated[str | None, typer.Option(help="opensearch and qdrant: the server, or a local folder of Qdrant.")]
Set = Annotated[list[str] | None, typer.Option("--set", help="opensearch and qdrant: key=value; repeat for more.")]


@app.command(rich_help_panel="Search")
def index(
    model: Annotated[str, typer.Argument(help="A model folder, a run folder or ko-en-static.")],
    corpus: Annotated[list[str], typer.Argument(help="CORPUS... INDEX: .jsonl, .tsv or .txt files, then the folder.")],
    engine: Annotated[AnyEngine, typer.Option(help="auto adds block-max from 20,000 passages on.")] = "auto",
    add: Annotated[bool, typer.Option("--add", help="Add to the index instead of making a new one.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the index that is there.")] = False,
    on_error: Annotated[OnError, typer.Option(help="Stop at broken rows, or skip and count them.")] = "stop",
    url: Url = None,
    settings: Set = None,
    dead_letters: Annotated[Path | None, typer.Option(help="Where passages go that the engine refuses.")] = None,
) -> None:
    """Index documents: soju index MODEL CORPUS... INDEX."""
    from soju.sparse.indexing import add_to_index, build_index

    *files, last = corpus
    match engine:
        case "opensearch" | "qdrant":
            if add or not files:
                raise UserError(
                    f"soju index MODEL CORPUS... NAME --engine {engine} makes a whole index; leave out --add"
                )
            _load(model, files, last, engine, url, settings, dead_letters, on_error=on_error, overwrite=overwrite)
            return
        case own:
            _refuse_remote(url, settings, dead_letters)
    folder = Path(last)
    if not files or folder.is_file():
        raise UserError(f"{last}: the last argument is the index folder: soju index MODEL CORPUS... INDEX")
    if add and (overwrite or own != "auto"):
        raise UserError("--add keeps the index as it was made; leave out --overwrite and --engine")
    if add:
        made, added, log = add_to_index(model, files, folder, on_error=on_error)
        say(f"{added:,} documents added")
    else:
        made, log = build_index(model, files, folder, engine=own, on_error=on_error, overwrite=overwrite)
    tell_skipped(log)
    say(f"{folder}: {made.documents:,} documents, {made.chunks:,} passages")
    _tell_empty(*made.empty_documents)


@app.command(rich_help_panel="Search")
def search(
    index: Annotated[str, typer.Argument(metavar="INDEX", help="A folder made with soju index, or a name.")],
    query: Annotated[str, typer.Argument(help="Korean or English.")],
    k: Annotated[int, typer.Option("--top", "-k", min=1, help="Documents to show.")] = 10,
    engine: Annotated[AnyEngine, typer.Option(help="Only seismic may miss documents.")] = "auto",
    model: Annotated[str | None, typer.Option(help="Where the model is, if not inside the index.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    url: Url = None,
    settings: Set = None,
) -> None:
    """Search an index; show which terms matched, in both languages."""
    from soju.report.terminal import hits_table
    from soju.sparse.indexing import open_index, search_index

    match engine:
        case "opensearch" | "qdrant":
            from soju.sparse.engines import search_url

            found = search_url(engine, url, index, readable(query), model, k=k, settings=settings or ())
        case own:
            _refuse_remote(url, settings, None)
            opened, encoder = open_index(Path(index), model)
            (found,) = search_index(opened, encoder, [readable(query)], k=k, engine=own)
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
    engine: RemoteEngine,
    url: str | None,
    settings: list[str] | None,
    dead_letters: Path | None,
    *,
    on_error: OnError,
    overwrite: bool,
) -> None:
    """Index in another engine; a passage that was refused makes the exit code 2."""
    from soju.sparse.engines import connect, load_index

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
            f"{loaded.dead_letters}; mend them and index again with --overwrite"
        )


def _tell_empty(empty: int, names: Sequence[str]) -> None:
    if empty:
        say(f"{empty:,} documents hold no known term and cannot be found: {', '.join(names)}", style="yellow")


def _refuse_remote(url: str | None, settings: list[str] | None, dead_letters: Path | None) -> None:
    if url is not None or settings or dead_letters is not None:
        raise UserError("--url, --set and --dead-letters belong to --engine opensearch and qdrant; leave them out")


@app.command("expand-text", rich_help_panel="Search")
def expand_text(
    model: Annotated[str, typer.Argument(help="A model folder, a run folder or ko-en-static.")],
    text: Annotated[str, typer.Argument(help="Korean or English.")],
    k: Annotated[int, typer.Option("--top", "-k", min=1, help="Terms to show.")] = 20,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show the terms a text lights up, with weight and language."""
    from soju.report.terminal import expansion_table
    from soju.sparse.indexing import expand, open_model

    encoder, _ = open_model(model)
    (expansion,) = expand(encoder, [readable(text)], k=k)
    if as_json:
        typer.echo(expansion.model_dump_json(indent=2))
    elif expansion.terms:
        console.print(expansion_table(expansion))
    else:
        console.print("This text lights up no term.")

"""Verbs about searching: index, search, expand-text."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from soju.cli.console import Engine, OnError, app, console, readable, say, tell_skipped
from soju.core.errors import UserError


@app.command(rich_help_panel="Search")
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
        say(f"{added:,} documents added")
    else:
        made, log = build_index(model, files, folder, engine=engine, on_error=on_error, overwrite=overwrite)
    tell_skipped(log)
    empty, names = made.empty_documents
    say(f"{folder}: {made.documents:,} documents, {made.chunks:,} passages")
    if empty:
        say(f"{empty:,} documents hold no known term and cannot be found: {', '.join(names)}", style="yellow")


@app.command(rich_help_panel="Search")
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
    (found,) = search_index(opened, encoder, [readable(query)], k=k, engine=engine)
    if as_json:
        typer.echo(found.model_dump_json(indent=2))
    elif found.hits:
        console.print(hits_table(found))
    else:
        console.print("Nothing shares a term with this query.")


@app.command("expand-text", rich_help_panel="Search")
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
    (expansion,) = expand(encoder, [readable(text)], k=k)
    if as_json:
        typer.echo(expansion.model_dump_json(indent=2))
    else:
        console.print(expansion_table(expansion))

"""The verb that writes a corpus as vectors for engines soju does not talk to: vectors."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from soju.cli.console import OnError, app, say, tell_skipped
from soju.core.errors import UserError


@app.command(rich_help_panel="Search")
def vectors(
    model: Annotated[str, typer.Argument(help="A model folder, a run folder or ko-en-static.")],
    corpus: Annotated[list[str], typer.Argument(help="CORPUS... OUT: .jsonl, .tsv or .txt files, then the folder.")],
    to: Annotated[Literal["opensearch", "elasticsearch", "anserini"], typer.Option(help="Whose files to write.")],
    queries: Annotated[list[str] | None, typer.Option(help="Queries to write as well; repeat for more.")] = None,
    index_name: Annotated[str | None, typer.Option(help="Index the bulk files name; else that of OUT.")] = None,
    quantisation: Annotated[float, typer.Option(min=1e-3, help="anserini: factor before rounding.")] = 100.0,
    on_error: Annotated[OnError, typer.Option(help="Stop at broken rows, or skip and count them.")] = "stop",
) -> None:
    """Write the weighted terms of a corpus: soju vectors MODEL CORPUS... OUT --to FORMAT."""
    from soju.sparse.export.vectors import FORMATS, write_vectors

    *files, last = corpus
    folder = Path(last)
    if not files or folder.is_file():
        raise UserError(f"{last}: the last argument is the folder to write: soju vectors MODEL CORPUS... OUT")
    about, log = write_vectors(
        model, files, folder, to,
        queries=queries or (), name=index_name, quantisation=quantisation, on_error=on_error,
    )  # fmt: skip
    tell_skipped(log)
    say(f"{folder}: {about['documents']:,} documents, {about['passages']:,} passages: {FORMATS[to]}")
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

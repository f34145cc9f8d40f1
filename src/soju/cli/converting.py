"""Verbs that write a model in another form: export, trim."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from soju.cli.console import ExportFormat, OnError, app, say, tell_skipped


@app.command(rich_help_panel="Models")
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
    say(f"{target}: {FORMATS[to]}")


@app.command(rich_help_panel="Models")
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
    tell_skipped(log)
    say(f"{out}: {result.ids_after:,} of {result.ids_before:,} ids")
    say(f"head {result.head_megabytes_before:,.1f} -> {result.head_megabytes_after:,.1f} MB")
    say(f"{result.covered_share:.2%} of {result.corpus_tokens:,} tokens keep their piece")
    if result.ids_left_out:
        say(f"{result.ids_left_out:,} ids of the corpus did not fit in --max-size {max_size:,}", style="yellow")

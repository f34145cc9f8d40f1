"""Verbs that write a model in another form: export, trim."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from soju.cli.console import ExportFormat, OnError, app, say, tell_skipped
from soju.core.errors import UserError


@app.command(rich_help_panel="Models")
def export(
    model: Annotated[str, typer.Argument(help="A model folder, a run folder or ko-en-static.")],
    target: Annotated[Path, typer.Argument(help="File or folder to write.")],
    to: Annotated[ExportFormat, typer.Option(help="onnx and inference-free are for neural models, others for static.")],
    hidden_size: Annotated[int, typer.Option(min=16, help="Width of the low-rank form, which is approximate.")] = 512,
    top_terms: Annotated[int, typer.Option(min=1, help="onnx: terms the graph gives of each text.")] = 128,
    int8: Annotated[
        bool, typer.Option("--int8", help="onnx: also write int8 weights, and how close they are.")
    ] = False,
    corpus: Annotated[list[str] | None, typer.Option(help="inference-free: documents to count; repeat.")] = None,
    on_error: Annotated[OnError, typer.Option(help="Stop at broken rows, or skip and count them.")] = "stop",
) -> None:
    """Write a model for programs that do not know soju."""
    from soju.sparse.export.exporting import FORMATS, export_graph
    from soju.sparse.export.exporting import export as write
    from soju.sparse.indexing import model_folder, open_model, search_settings_of

    if to == "inference-free":
        from soju.sparse.export.make_inference_free import make_inference_free

        tell_skipped(make_inference_free(model, corpus or (), target, on_error=on_error))
        say(f"{target}: {FORMATS[to]}")
        return
    if corpus:
        raise UserError("--corpus belongs to --to inference-free; leave it out")
    encoder, fingerprint = open_model(model)
    if to == "onnx":
        written = export_graph(encoder, target, top_terms=top_terms, int8=int8, fingerprint=fingerprint)
        say(f"{target}: {FORMATS[to]}")
        say(f"largest difference of a weight: {written['parity']['largest_difference']:.1e}")
        for name, value in written.get("int8", {}).items():
            say(f"int8 {name}: {value if isinstance(value, int | str) else format(value, '.4f')}")
        return
    if int8:
        raise UserError("--int8 belongs to --to onnx; leave it out")
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
    from soju.sparse.trimming import trim as trim_model

    result, log = trim_model(model, out, corpus, max_size=max_size, on_error=on_error, revision=revision)
    tell_skipped(log)
    say(f"{out}: {result.ids_after:,} of {result.ids_before:,} ids")
    say(f"head {result.head_megabytes_before:,.1f} -> {result.head_megabytes_after:,.1f} MB")
    say(f"{result.covered_share:.2%} of {result.corpus_tokens:,} tokens keep their piece")
    if result.ids_left_out:
        say(f"{result.ids_left_out:,} ids of the corpus did not fit in --max-size {max_size:,}", style="yellow")

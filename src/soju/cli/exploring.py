"""The verb that opens a page: explore."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from soju.cli.console import app, say


@app.command(rich_help_panel="Search")
def explore(
    model: Annotated[str, typer.Argument(help="A model folder, a run folder or ko-en-static.")],
    index: Annotated[
        list[Path] | None, typer.Option(help="An index made with the model; once more for the other model's.")
    ] = None,
    against: Annotated[str | None, typer.Option(metavar="MODEL2", help="A second model beside the first.")] = None,
    port: Annotated[int, typer.Option(min=0, max=65_535, help="0 takes any that is free.")] = 8765,
    browser: Annotated[bool, typer.Option("--browser/--no-browser", help="Open the page in a browser.")] = True,
) -> None:
    """Open a page on this machine: type a text, see its terms, the hits, and why they matched."""
    from soju.sparse.explore.serving import listen, serve, url_of

    listening = listen(port)  # before models load, so that a taken port is told at once
    from soju.sparse.explore.app import create_app
    from soju.sparse.explore.exploring import Explorer, open_models

    models = open_models(model, against=against, indexes=index or [])
    explorer = Explorer(models)
    page = create_app([item.label for item in models], explorer.expand, explorer.search if explorer.searches else None)
    say(f"{url_of(listening)} shows {' and '.join(item.name for item in models)}; Ctrl-C ends it")
    serve(page, listening, browser=browser)
    say("Ended.")

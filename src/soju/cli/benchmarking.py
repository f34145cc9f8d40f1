"""The verb that measures with another program's tasks: mteb."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from soju.cli.console import app, print_tables


@app.command(rich_help_panel="Runs")
def mteb(
    model: Annotated[str, typer.Argument(help="A model folder, a run folder or ko-en-static.")],
    tasks: Annotated[
        list[str], typer.Argument(metavar="TASK...", help="mteb's name (Ko-StrategyQA), or a folder of BEIR's layout.")
    ],
    language: Annotated[
        list[str] | None, typer.Option(help="Of multilingual tasks (ISO 639-3); repeat for more; kor and eng.")
    ] = None,
    split: Annotated[str, typer.Option(help="Which judgements of a folder to ask for.")] = "test",
    out: Annotated[Path | None, typer.Option(help="Write the scores to this JSON file as well.")] = None,
) -> None:
    """Measure a model with mteb on retrieval tasks of the hub or on local folders."""
    from soju.core.files import write_json
    from soju.recipes.splade.mteb_tasks import run_tasks

    scores = run_tasks(model, tasks, languages=language or ("kor", "eng"), split=split)
    print_tables(scores, [])
    if out is not None:
        write_json(out, [score.to_json() for score in scores])

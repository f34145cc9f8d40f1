"""The verb that measures with another program's tasks: mteb."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from soju.cli.console import app, print_tables


@app.command(rich_help_panel="Runs")
def mteb(
    model: Annotated[str, typer.Argument(help="Sparse or embedding model: its folder, a run folder or ko-en-static.")],
    tasks: Annotated[
        list[str], typer.Argument(metavar="TASK...", help="mteb's name (Ko-StrategyQA), or a folder of BEIR's layout.")
    ],
    language: Annotated[
        list[str] | None, typer.Option(help="Of multilingual tasks (ISO 639-3); repeat for more; kor and eng.")
    ] = None,
    split: Annotated[str, typer.Option(help="Which judgements of a folder to ask for.")] = "test",
    out: Annotated[Path | None, typer.Option(help="Write the scores to this JSON file as well.")] = None,
) -> None:
    """Measure a model with mteb on tasks of the hub or on local folders; a sparse one on retrieval alone."""
    from soju.core.files import write_json
    from soju.evaluation.mteb_tasks import refuse_without_mteb, run_tasks

    refuse_without_mteb()
    subject, name, sparse = _model_for_mteb(model)
    languages = language or ("kor", "eng")
    scores = run_tasks(subject, tasks, name=name, languages=languages, split=split, retrieval_only=sparse)
    print_tables(scores, [])
    if out is not None:
        write_json(out, [score.to_json() for score in scores])


def _model_for_mteb(model: str) -> tuple[Any, str, bool]:
    """Return a model as mteb asks it, its name, and whether it is sparse."""
    from soju.embedding.comparing import is_embedding_model, mteb_model

    if is_embedding_model(model):
        return *mteb_model(model), False
    from soju.sparse.mteb_searcher import MtebSearcher

    searcher = MtebSearcher.of(model)
    return searcher, searcher.name, True

"""The verb that finds hard negatives: mine."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Annotated, Literal

import typer

from soju.cli.console import OnError, app, say, tell_skipped
from soju.core.errors import StoppedError, UserError


@app.command(rich_help_panel="Models")
def mine(
    rows: Annotated[list[str], typer.Argument(help="ROWS... OUT: pairs, passages, terms or triplets; OUT.jsonl last.")],
    miner: Annotated[str, typer.Option(help="bm25, or a sparse or dense model.")] = "ko-en-static",
    corpus: Annotated[
        list[str] | None, typer.Option(help="Documents to mine besides the rows' positives; repeat for more.")
    ] = None,
    depth: Annotated[int, typer.Option(min=1, help="Candidates of a query.")] = 100,
    per_query: Annotated[int, typer.Option(min=1, help="Negatives of a query.")] = 1,
    skip: Annotated[int, typer.Option(min=0, help="Best ranks to leave out.")] = 0,
    pick: Annotated[Literal["best", "sample"], typer.Option(help="The best that pass, or any, drawn.")] = "best",
    filter_model: Annotated[
        str | None, typer.Option(help="Model that tells false negatives; else the miner, for bm25 ko-en-static.")
    ] = None,
    relative: Annotated[float, typer.Option(help="Highest score of a negative as a share of the positive's.")] = 0.95,
    max_score: Annotated[float | None, typer.Option(help="Highest score of a negative.")] = None,
    no_filter: Annotated[bool, typer.Option("--no-filter", help="Let no score decide.")] = False,
    terms: Annotated[
        list[str] | None, typer.Option(help="Term rows, for related terms and the dictionary of bm25.")
    ] = None,
    prompt: Annotated[str | None, typer.Option(help="Put before every text of a dense model.")] = None,
    cache: Annotated[Path, typer.Option(help="Keeps vectors of dense models.")] = Path("runs/teacher-vectors"),
    seed: Annotated[int, typer.Option(help="Of --pick sample.")] = 0,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with an interrupted run.")] = False,
    on_error: Annotated[OnError, typer.Option(help="Stop at broken rows, or skip and count them.")] = "stop",
) -> None:
    """Find hard negatives: soju mine ROWS... OUT.jsonl."""
    from soju.core.config import validate
    from soju.sparse.mining import mine as mine_negatives
    from soju.sparse.negatives import Choice

    *files, last = rows
    if not files:
        raise UserError(f"{last}: name the rows and then the file to write: soju mine ROWS... OUT.jsonl")
    if no_filter and max_score is not None:
        raise UserError("--no-filter and --max-score contradict each other; leave one out")
    values = {"per_query": per_query, "skip": skip, "pick": pick, "max_score": max_score, "seed": seed}
    choice = validate({**values, "relative": None if no_filter else relative}, Choice, place="soju mine")
    try:
        report, log = mine_negatives(
            files,
            Path(last),
            miner=miner,
            filter_model=filter_model,
            corpus=corpus or (),
            terms=terms or (),
            choice=choice,
            depth=depth,
            prompt=prompt,
            cache=cache,
            resume=resume,
            on_error=on_error,
        )
    except KeyboardInterrupt:
        message = f"{last}: stopped; what is finished stays, go on with --resume"
        raise StoppedError(message, signal_number=signal.SIGINT) from None
    tell_skipped(log)
    say(f"{last}: {report.negatives:,} negatives for {report.mined:,} of {report.questions:,} questions")
    for source, counts in report.sources.items():
        left = ", ".join(f"{reason} {n:,}" for reason, n in counts.items() if reason not in ("questions", "mined"))
        say(f"  {source}: {counts['mined']:,} of {counts['questions']:,}" + (f"; without: {left}" if left else ""))
    say("candidates dropped: " + (", ".join(f"{reason} {n:,}" for reason, n in report.dropped.most_common()) or "none"))
    say("rows: " + ", ".join(f"{kind} {n:,}" for kind, n in report.kinds.most_common()))

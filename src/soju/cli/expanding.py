"""The verb that gives a model a Korean vocabulary: expand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from soju.cli.console import OnError, app, console, say


@app.command(rich_help_panel="Models")
def expand(
    base: Annotated[str, typer.Option(help="Embedding model with a byte-level BPE: a folder or a hub id.")],
    donor: Annotated[str, typer.Option(help="Korean tokenizer: a folder, tokenizer.json or a hub id.")],
    out: Annotated[Path, typer.Option(help="Folder to write.")],
    corpus: Annotated[
        list[str] | None, typer.Option(help="Korean text that decides the order of merges; repeat for more.")
    ] = None,
    pairs: Annotated[
        list[str] | None, typer.Option(help="Korean and English sentence pairs, for --init aligned; repeat for more.")
    ] = None,
    method: Annotated[
        Literal["merges", "added-tokens"], typer.Option(help="added-tokens is for comparison, not for use.")
    ] = "merges",
    init: Annotated[
        str, typer.Option(help="Where new rows start: mean, weighted_mean, omp, focus, aligned or noise.")
    ] = "mean",
    limit: Annotated[int | None, typer.Option(min=1, help="New tokens at most.")] = None,
    max_intermediates: Annotated[
        int | None, typer.Option(min=0, help="New tokens at most that are only parts of others.")
    ] = None,
    on_error: Annotated[OnError, typer.Option(help="Stop at broken rows, or skip and count them.")] = "stop",
    seed: Annotated[int, typer.Option(help="Of initialisers that draw.")] = 0,
) -> None:
    """Give an embedding model a donor's Korean tokens, with a certificate that nothing else changed."""
    from soju.embedding.expansion.certificate import CertificateError
    from soju.embedding.expansion.expanding import expand_model, read_pairs

    try:
        expand_model(
            base,
            donor,
            out,
            corpus=corpus,
            pairs=read_pairs(pairs or (), on_error),
            method=method,
            initialiser=init,
            limit=limit,
            max_intermediates=max_intermediates,
            on_error=on_error,
            seed=seed,
        )
    except CertificateError:
        _show(out)
        raise
    _show(out)
    say(str(out))


def _show(out: Path) -> None:
    statistics, certificate = (
        json.loads((out / name).read_text(encoding="utf-8")) for name in ("vocab_diff_stats.json", "certificate.json")
    )
    console.print(_tokens_table(statistics))
    console.print(_certificate_table(certificate))
    sizes = statistics["sizes"]
    say(f"vocabulary {sizes['base']:,} -> {sizes['expanded']:,}, {statistics['intermediates']:,} of it parts of others")
    if statistics["unreachable"]:
        reasons = ", ".join(f"{reason} {count:,}" for reason, count in statistics["unreachable"].items())
        say(f"candidates left out: {reasons}", style="yellow")


def _tokens_table(statistics: dict[str, Any]) -> Any:
    from rich import box
    from rich.table import Table

    table = Table(title="Tokens per text", title_justify="left", box=box.SIMPLE_HEAD)
    table.add_column("language")
    for column in ("texts", "base", "expanded", "change", "donor"):
        table.add_column(column, justify="right")
    for language, found in statistics["fertility"].items():
        base, expanded, donor = (found[name]["tokens_per_text"] for name in ("base", "expanded", "donor"))
        change = f"{expanded / base - 1:+.1%}" if base else "–"
        table.add_row(language, f"{found['base']['texts']:,}", f"{base:.1f}", f"{expanded:.1f}", change, f"{donor:.1f}")
    return table


def _certificate_table(certificate: dict[str, Any]) -> Any:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(title="Certificate", title_justify="left", box=box.SIMPLE_HEAD)
    table.add_column("check")
    table.add_column("checked on", justify="right")
    table.add_column("")
    for check in certificate["checks"]:
        passed = Text("passed", style="green") if check["passed"] else Text(f"FAILED {check['failure']}", style="red")
        table.add_row(check["name"].replace("_", " "), f"{check['texts']:,}", passed)
    for name, found in certificate["measurements"].get("speed", {}).items():
        speed = f"loads in {found['load_seconds']:.2f} s, {found['characters_per_second']:,} characters/s"
        table.add_row(f"speed of {name.replace('_', ' ')}", "", speed)
    return table

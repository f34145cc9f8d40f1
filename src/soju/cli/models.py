"""Verbs about models: export, trim, expand; and mine, which finds hard negatives for training."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from soju.cli.console import ModelName, OnErrorOption, app, console, say, tell_skipped
from soju.core.errors import StoppedError, UserError
from soju.sparse.export import Format

if TYPE_CHECKING:
    from rich.table import Table


@app.command(rich_help_panel="Models")
def export(
    model: ModelName,
    target: Annotated[Path, typer.Argument(help="File or folder to write.")],
    to: Annotated[Format, typer.Option(help="onnx and inference-free are for neural models, others for static.")],
    hidden_size: Annotated[int, typer.Option(min=16, help="Width of the low-rank form, which is approximate.")] = 512,
    top_terms: Annotated[int, typer.Option(min=1, help="onnx: terms the graph gives of each text.")] = 128,
    int8: Annotated[
        bool, typer.Option("--int8", help="onnx: also write int8 weights, and how close they are.")
    ] = False,
    corpus: Annotated[list[str] | None, typer.Option(help="inference-free: documents to count; repeat.")] = None,
    on_error: OnErrorOption = "stop",
) -> None:
    """Write a model for programs that do not know soju."""
    from soju.sparse.export.formats import FORMATS, export_graph
    from soju.sparse.export.formats import export as write
    from soju.sparse.model import load

    if to == "inference-free":
        from soju.sparse.export.stock import make_inference_free

        tell_skipped(make_inference_free(model, corpus or (), target, on_error=on_error))
        say(f"{target}: {FORMATS[to]}")
        return
    if corpus:
        raise UserError("--corpus belongs to --to inference-free; leave it out")
    loaded = load(model)
    if to == "onnx":
        written = export_graph(loaded.encoder, target, top_terms=top_terms, int8=int8, fingerprint=loaded.fingerprint)
        say(f"{target}: {FORMATS[to]}")
        say(f"largest difference of a weight: {written['parity']['largest_difference']:.1e}")
        for name, value in written.get("int8", {}).items():
            say(f"int8 {name}: {value if isinstance(value, int | str) else format(value, '.4f')}")
        return
    if int8:
        raise UserError("--int8 belongs to --to onnx; leave it out")
    prior = loaded.search.prior_documents
    write(loaded.encoder, target, to, prior_documents=prior, hidden_size=hidden_size)
    say(f"{target}: {FORMATS[to]}")


@app.command(rich_help_panel="Models")
def trim(
    model: Annotated[str, typer.Argument(help="A masked language model: a folder, package:NAME or a hub id.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to write.")],
    corpus: Annotated[list[str], typer.Option(help="Rows of any kind, .txt or a pattern; repeat for more.")],
    max_size: Annotated[int, typer.Option(min=1, help="Ids to keep at most.")] = 65_535,
    on_error: OnErrorOption = "stop",
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub id.")] = None,
) -> None:
    """Keep only the part of a model's vocabulary that a corpus needs."""
    from soju.sparse.trim import trim as trim_model

    result, log = trim_model(model, out, corpus, max_size=max_size, on_error=on_error, revision=revision)
    tell_skipped(log)
    say(f"{out}: {result.ids_after:,} of {result.ids_before:,} ids")
    say(f"head {result.head_megabytes_before:,.1f} -> {result.head_megabytes_after:,.1f} MB")
    say(f"{result.covered_share:.2%} of {result.corpus_tokens:,} tokens keep their piece")
    if result.ids_left_out:
        say(f"{result.ids_left_out:,} ids of the corpus did not fit in --max-size {max_size:,}", style="yellow")


@app.command(rich_help_panel="Models")
def ask(
    model: Annotated[str, typer.Argument(metavar="RUN", help="A run of speculative_kd, or a chat model.")],
    question: Annotated[str, typer.Argument(help="What to answer.")],
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens of the answer at most.")] = 256,
) -> None:
    """Let a distilled chat model answer a question."""
    from soju.core.run import Run
    from soju.speculative_kd.recipe import ask as answer
    from soju.speculative_kd.recipe import load_chat

    run = Run(Path(model))
    loaded, chat = load_chat(run.model_folder if run.recipe else Path(model))
    say(answer(loaded, chat, question, max_new_tokens=max_new_tokens))


@app.command(rich_help_panel="Models")
def rollout(
    config: Annotated[str, typer.Argument(metavar="CONFIG", help="A file or preset of recipe speculative_kd.")],
    row: Annotated[str, typer.Argument(metavar="ID", help="Id of a row of its data.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value ...")] = None,
) -> None:
    """Write one text with student and teacher and show how each token came about."""
    from soju.core.config import read_config
    from soju.speculative_kd.recipe import RECIPE, describe_rollout

    values, _ = read_config(config, overrides or ())
    for line in describe_rollout(RECIPE.configure(values, place=config), row):
        say(line)


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
    init: Annotated[str, typer.Option(help="Where new rows start: mean, omp, aligned or noise.")] = "mean",
    limit: Annotated[int | None, typer.Option(min=1, help="New tokens at most.")] = None,
    max_intermediates: Annotated[
        int | None, typer.Option(min=0, help="New tokens at most that are only parts of others.")
    ] = None,
    on_error: OnErrorOption = "stop",
    seed: Annotated[int, typer.Option(help="Of initialisers that draw.")] = 0,
) -> None:
    """Give an embedding model a donor's Korean tokens, with a certificate that nothing else changed."""
    from soju.embedding.expansion.certificate import CertificateError
    from soju.embedding.expansion.expand import expand_model, read_pairs

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


def _tokens_table(statistics: dict[str, Any]) -> Table:
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


def _certificate_table(certificate: dict[str, Any]) -> Table:
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
    on_error: OnErrorOption = "stop",
) -> None:
    """Find hard negatives: soju mine ROWS... OUT.jsonl."""
    from soju.core.config import validate
    from soju.sparse.mine import mine as mine_negatives
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


@app.command(rich_help_panel="Models")
def translate(
    model: Annotated[str, typer.Argument(help="A run of recipe translation, or a model folder of one.")],
    texts: Annotated[list[str] | None, typer.Argument(help="Texts; without them and --file, standard input.")] = None,
    file: Annotated[Path | None, typer.Option(help="A text on each line; empty lines stay empty.")] = None,
    to: Annotated[Literal["ko", "en"] | None, typer.Option(help="Language to write; the other one of each.")] = None,
) -> None:
    """Translate Korean into English and English into Korean."""
    import sys

    from soju.core.run import Run
    from soju.translation.recipe import Translator

    if texts and file is not None:
        raise UserError("--file: texts are given as well; give one of the two")
    folder = Run(Path(model)).model_folder if Run(Path(model)).recipe else Path(model)
    if file is not None:
        try:
            lines = file.read_text(encoding="utf-8-sig").splitlines()
        except UnicodeDecodeError:
            raise UserError(f"{file}: not UTF-8; save the file as UTF-8") from None
    else:
        lines = list(texts) if texts else sys.stdin.read().splitlines()
    for line in Translator(folder).translate(lines, target=to):
        typer.echo(line)

"""The application, what every verb shares, and how things are printed."""

from __future__ import annotations

import os
import sys
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, NoReturn, Protocol

import typer
from rich.console import Console

from soju.core import __version__
from soju.core.errors import UserError, missing_extra
from soju.core.progress import set_quiet

if TYPE_CHECKING:
    from soju.core.recipe import Evaluation


app = typer.Typer(
    name="soju",
    help="Distil large multilingual language models into small Korean–English ones.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
console = Console()
errors = Console(stderr=True, highlight=False, soft_wrap=True)

Config = Annotated[str, typer.Argument(help="A YAML file or the name of a preset.", show_default=False)]
Overrides = Annotated[list[str] | None, typer.Argument(help="Settings to change: key=value.", show_default=False)]
ModelName = Annotated[str, typer.Argument(help="A model folder, a run folder, a hub id or ko-en-static.")]
OnError = Literal["stop", "skip"]
OnErrorOption = Annotated[OnError, typer.Option(help="Stop at broken rows, or skip and count them.")]


def _print_version(wanted: bool) -> None:
    if wanted:
        console.print(__version__, highlight=False)
        raise typer.Exit


@app.callback()
def _options(
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress bars.")] = False,
    offline: Annotated[bool, typer.Option("--offline", help="Never ask a hub for anything.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    set_quiet(quiet)
    if offline:
        os.environ["HF_HUB_OFFLINE"] = "1"
    if debug:
        os.environ["SOJU_DEBUG"] = "1"


def main() -> None:
    """Run one verb. Exit codes: 2 for a user's mistake, 3 for a failed quality gate, 1 for ours."""
    try:
        app(standalone_mode=True)
    except UserError as error:
        _exit(str(error), error.exit_code)
    except OSError as error:
        _exit(f"{error.filename or 'soju'}: {error.strerror or error}; free space or choose another place", 2)
    except Exception as error:  # the last line of defence: one sentence instead of a traceback
        if missing := missing_extra(error):
            _exit(str(missing), missing.exit_code)
        _exit(f"soju failed: {type(error).__name__}: {error}. Run again with --debug and report it.", 1)


def _exit(message: str, code: int) -> NoReturn:
    if os.environ.get("SOJU_DEBUG"):
        raise
    errors.print(message, markup=False)
    sys.exit(code)


def say(text: str, *, style: str | None = None) -> None:
    """Print one line as it is: no markup in names of files, no breaks in paths."""
    console.print(text, style=style, markup=False, highlight=False, soft_wrap=True)


class Skipped(Protocol):
    """Counts of broken rows."""

    @property
    def refused(self) -> int:
        """Rows that were left out."""

    @property
    def reasons(self) -> Counter[str]:
        """Their number by reason."""


def tell_skipped(log: Skipped) -> bool:
    """Tell what was left out; return whether there was any."""
    if not log.refused:
        return False
    reasons = ", ".join(f"{reason} {count:,}" for reason, count in log.reasons.most_common())
    say(f"{log.refused:,} broken rows were left out: {reasons}", style="yellow")
    return True


def readable(text: str) -> str:
    """Refuse what is no text (`UserError`)."""
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise UserError("the text on the command line is not valid UTF-8; set the terminal to UTF-8 and type it again")
    return text


def print_evaluation(found: Evaluation, out: Path | None) -> None:
    """Print what was measured, and write everything to `out`."""
    from soju.core.files import write_json

    for table in found.tables:
        console.print(table)
    for note in found.notes:
        say(note, style="yellow")
    if out is not None:
        write_json(out, found.record)


def free_folder(folder: Path) -> Path:
    """Return the folder, with a number behind it when it is taken."""
    candidate, number = folder, 2
    while candidate.exists():
        candidate, number = folder.with_name(f"{folder.name}-{number}"), number + 1
    return candidate

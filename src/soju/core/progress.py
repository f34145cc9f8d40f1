"""Progress bars with an ETA on a terminal, silence elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sized
from typing import TypeVar

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

ItemT = TypeVar("ItemT")

_quiet = False


def set_quiet(quiet: bool) -> None:
    """Turn all progress bars of this process off (``--quiet``) or on again."""
    global _quiet
    _quiet = quiet


def is_shown() -> bool:
    """Tell whether progress is shown: on a terminal, unless ``--quiet``."""
    return not _quiet and sys.stderr.isatty()


def track(items: Iterable[ItemT], description: str, *, total: int | None = None) -> Iterator[ItemT]:
    """Yield `items` while a bar with count, elapsed time and ETA is drawn on standard error.

    `total` is the number of items when `items` has no length.
    """
    if not is_shown():
        yield from items
        return
    if total is None and isinstance(items, Sized):
        total = len(items)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("ETA"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(description, total=total)
        for item in items:
            yield item
            progress.advance(task)

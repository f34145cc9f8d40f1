"""A file made part by part: whatever stops the work, finished parts stay, and going on gives the same bytes.

While ``OUT`` is in the making, ``OUT.parts`` holds ``settings.json`` and one JSON file a finished part. The file itself
appears whole, at the end.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from soju.core.errors import IntegrityError, UserError
from soju.core.files import write_json, write_text

SETTINGS = "settings.json"


class Parts:
    """The finished parts of one output file."""

    def __init__(self, out: Path, settings: Mapping[str, Any], *, resume: bool) -> None:
        """Begin, or go on.

        Args:
            out: The file in the making.
            settings: All that its content depends on, as JSON; going on with other settings would mix two results.
            resume: Go on when parts are there.

        Raises:
            UserError: If the file is there already, parts are there without `resume`, or were made with other settings.
        """
        self.folder = parts_folder(out)
        refuse_taken(out, resume=resume)
        if self.folder.exists():
            _refuse_others(self.folder, dict(settings))
        else:
            write_json(self.folder / SETTINGS, dict(settings))

    def __contains__(self, number: int) -> bool:
        return self._path(number).is_file()

    def write(self, number: int, value: Any) -> None:
        """Keep a finished part, finite JSON, atomically."""
        write_text(self._path(number), json.dumps(value, ensure_ascii=False, allow_nan=False) + "\n")

    def read(self, count: int) -> Iterator[Any]:
        """Yield the first `count` parts in order.

        Args:
            count: How many there are.

        Yields:
            What `write` was given.

        Raises:
            IntegrityError: If one is not there or not JSON.
        """
        for number in range(count):
            path = self._path(number)
            try:
                yield json.loads(path.read_text(encoding="utf-8"))
            except (FileNotFoundError, ValueError) as error:
                raise IntegrityError(f"{path}: unreadable ({error}); remove it and go on with --resume") from None

    def remove(self) -> None:
        """Remove all parts, once the file is written."""
        shutil.rmtree(self.folder)

    def _path(self, number: int) -> Path:
        return self.folder / f"{number:06d}.json"


def parts_folder(out: Path) -> Path:
    """Return the folder that holds the parts of a file in the making."""
    return out.with_name(f"{out.name}.parts")


def refuse_taken(out: Path, *, resume: bool) -> None:
    """Refuse an output that is there, and parts of one unless `resume` (`UserError`); before anything long is done."""
    if out.exists():
        raise UserError(f"{out}: is there already; remove it or choose another name")
    folder = parts_folder(out)
    if folder.exists() and not resume:
        raise UserError(f"{folder}: holds an unfinished run; go on with --resume, or remove the folder")


def _refuse_others(folder: Path, settings: dict[str, Any]) -> None:
    path = folder / SETTINGS
    try:
        before = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError) as error:
        raise IntegrityError(f"{path}: unreadable ({error}); remove the folder and begin again") from None
    now = json.loads(json.dumps(settings))
    names = [name for name in {**before, **now} if before.get(name) != now.get(name)]
    if names:
        changed = ", ".join(f"{name} was {_short(before.get(name))}, is {_short(now.get(name))}" for name in names)
        raise UserError(
            f"{folder}: was begun with other settings ({changed}); go on with the same ones, or remove the folder"
        )


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."

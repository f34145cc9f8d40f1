"""Whether everything below a folder is as it was written."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from soju.core.errors import IntegrityError
from soju.core.files import MANIFEST, verify_manifest

_CHECKPOINT = re.compile(r"checkpoint-\d+")


@dataclass(frozen=True, slots=True)
class Checked:
    """One folder, and what is wrong with it."""

    path: Path
    problem: str | None = None
    """``None`` when every file agrees with the manifest."""


def check_tree(root: Path) -> Iterator[Checked]:
    """Check every folder below `root` that has a manifest or should have one.

    Checkpoints and folders with weights should. Hidden folders are unfinished by definition and left out.

    Args:
        root: A run, model or index folder.

    Yields:
        Each folder once, in the order of names.
    """
    covered: set[Path] = set()
    for folder in sorted({root, *(path for path in root.rglob("*") if path.is_dir())}):
        if any(part.startswith(".") for part in folder.relative_to(root).parts):
            continue
        if (folder / MANIFEST).is_file():
            covered.add(folder)
            yield Checked(folder, _problem(folder))
        elif covered.isdisjoint((folder, *folder.parents)) and _should_have_manifest(folder):
            yield Checked(
                folder, f"{folder}: no {MANIFEST}, so nothing proves that it is whole; nothing resumes from it"
            )


def _problem(folder: Path) -> str | None:
    try:
        verify_manifest(folder)
    except IntegrityError as error:
        return str(error)
    return None


def _should_have_manifest(folder: Path) -> bool:
    return bool(_CHECKPOINT.fullmatch(folder.name)) or any(folder.glob("*.safetensors"))

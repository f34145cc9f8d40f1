"""Checkpoint folders: published whole, found by verification, never lost.

A folder ``checkpoint-N`` without a valid manifest does not exist. Everything unfinished has a hidden name.
"""

from __future__ import annotations

import errno
import logging
import os
import re
import shutil
from collections.abc import Container, Iterable
from dataclasses import dataclass
from pathlib import Path

from soju.core.errors import DiskFullError, IntegrityError, UserError
from soju.core.files import check_sizes, sync_folder, sync_tree, verify_manifest, write_manifest

logger = logging.getLogger(__name__)

_CHECKPOINT = re.compile(r"checkpoint-(\d+)")
_ABANDONED = "abandoned-"
"""Before the name of a checkpoint that a rollback or the user went back behind."""


@dataclass(frozen=True, slots=True)
class Found:
    """The newest checkpoint that verifies, and the newer ones that do not."""

    path: Path | None
    """``None`` when no checkpoint verifies."""
    skipped: tuple[tuple[Path, str], ...] = ()
    """Newer checkpoints and why they were passed over, newest first."""

    def __str__(self) -> str:
        lines = [f"skipped {path.name}: {reason}" for path, reason in self.skipped]
        return "\n".join([*lines, f"resuming from {self.path}" if self.path else "no checkpoint to resume from"])


def checkpoint_path(folder: Path, step: int) -> Path:
    """Return the folder of an optimiser step's checkpoint."""
    return folder / f"checkpoint-{step}"


def checkpoint_step(path: Path) -> int:
    """Return N of a folder named ``checkpoint-N`` or ``abandoned-checkpoint-N``; `UserError` for another name."""
    match = _CHECKPOINT.fullmatch(path.name.removeprefix(_ABANDONED))
    if not match:
        raise UserError(f"{path}: not a checkpoint; name a folder like {checkpoint_path(path.parent, 1000)}")
    return int(match[1])


def list_checkpoints(folder: Path) -> list[Path]:
    """Return the folders named ``checkpoint-N``, oldest step first, verified or not."""
    if not folder.is_dir():
        return []
    paths = (path for path in folder.iterdir() if path.is_dir() and _CHECKPOINT.fullmatch(path.name))
    return sorted(paths, key=checkpoint_step)


def newest_verified(folder: Path, *, steps: Container[int] | None = None) -> Found:
    """Find the newest checkpoint whose every byte agrees with its manifest.

    Args:
        folder: The ``checkpoints`` folder of a run; it may be missing.
        steps: Consider only checkpoints of these steps, for example those that passed a gate.

    Returns:
        The checkpoint and what was passed over on the way.
    """
    skipped: list[tuple[Path, str]] = []
    for path in reversed(list_checkpoints(folder)):
        if steps is not None and checkpoint_step(path) not in steps:
            continue
        try:
            verify_manifest(path)
        except IntegrityError as error:
            skipped.append((path, str(error)))
        else:
            return Found(path, tuple(skipped))
    return Found(None, tuple(skipped))


def resume_path(folder: Path) -> Found:
    """Clear what an interruption left half done, find the newest verified checkpoint, and log which were skipped."""
    tidy(folder)
    found = newest_verified(folder)
    for path, reason in found.skipped:
        logger.warning("skipped %s: %s", path.name, reason)
    return found


def tidy(folder: Path) -> None:
    """Put back a checkpoint whose replacement was interrupted; remove unfinished and half-removed ones."""
    if not folder.is_dir():
        return
    for path in folder.glob(".checkpoint-*.replaced"):
        original = folder / path.name.removeprefix(".").removesuffix(".replaced")
        if not original.exists():
            os.replace(path, original)
    for path in folder.glob(".checkpoint-*"):
        shutil.rmtree(path, ignore_errors=True)


def staging_path(folder: Path, step: int) -> Path:
    """Return the hidden folder in which a checkpoint is written; the same on every rank."""
    return folder / f".checkpoint-{step}.saving"


def publish(staged: Path, final: Path) -> None:
    """Give a finished folder its name: bytes on the disk, manifest last, one rename.

    Args:
        staged: The folder as written, on the same file system.
        final: Its name from now on. A folder that is there already is replaced.
    """
    sync_tree(staged)
    write_manifest(staged)
    sync_folder(staged)
    replaced = final.with_name(f".{final.name}.replaced")
    if final.exists():
        shutil.rmtree(replaced, ignore_errors=True)
        os.replace(final, replaced)
    os.replace(staged, final)
    sync_folder(final.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def remove(path: Path) -> None:
    """Remove a checkpoint: first its name, then its bytes, so that no half of it can be taken for a whole."""
    hidden = path.with_name(f".{path.name}.removed")
    shutil.rmtree(hidden, ignore_errors=True)
    os.replace(path, hidden)
    sync_folder(path.parent)
    shutil.rmtree(hidden, ignore_errors=True)


def rotate(folder: Path, *, keep_last: int | None, protected: Iterable[Path] = ()) -> list[Path]:
    """Remove all but the newest whole checkpoints and the protected ones.

    Only checkpoints whose files are all there in their right sizes count, so a damaged one never displaces a good
    one. Damaged ones stay as well: `soju verify` names them, and only their owner knows what they are worth.

    Args:
        folder: The ``checkpoints`` folder.
        keep_last: How many to keep besides the protected ones, >= 1; ``None`` keeps all.
        protected: Never removed, for example the best one.

    Returns:
        What was removed.
    """
    if keep_last is None:
        return []
    kept = {path.resolve() for path in protected}
    whole = [path for path in list_checkpoints(folder) if _is_whole(path)]
    gone = [path for path in whole[: -max(1, keep_last)] if path.resolve() not in kept]
    for path in gone:
        remove(path)
    return gone


def set_aside_after(folder: Path, step: int) -> list[Path]:
    """Rename checkpoints later than `step` to ``abandoned-checkpoint-N``, so that no resume takes them."""
    renamed = []
    for path in list_checkpoints(folder):
        if checkpoint_step(path) > step:
            aside = path.with_name(_ABANDONED + path.name)
            shutil.rmtree(aside, ignore_errors=True)
            os.replace(path, aside)
            renamed.append(aside)
    if renamed:
        sync_folder(folder)
    return renamed


def require_space(folder: Path, needed: int) -> None:
    """Refuse to write ``needed`` bytes to a folder whose file system has less room (`DiskFullError`)."""
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise disk_full(folder, needed=needed, free=free)


def disk_full(folder: Path, *, needed: int, free: int) -> DiskFullError:
    """Return the error of a full disk, naming the checkpoint that is left."""
    checkpoints = [path.name for path in list_checkpoints(folder) if _is_whole(path)]
    left = f"{checkpoints[-1]} is intact" if checkpoints else "no checkpoint was written yet"
    return DiskFullError(
        f"{folder}: a checkpoint needs {needed:,} bytes and {free:,} are free, so {max(1, needed - free):,} bytes are "
        f"missing; {left}; free space and train again with --resume"
    )


def explain_failure(error: Exception, folder: Path, *, staging: Path, needed: int) -> DiskFullError | None:
    """Tell whether writing failed because the disk is full, and clear away what was written.

    Args:
        error: What was raised. PyTorch and safetensors raise no `OSError` for it.
        folder: The ``checkpoints`` folder.
        staging: The unfinished folder; it is removed.
        needed: Bytes that the whole checkpoint was estimated at.

    Returns:
        The error for the user, or ``None`` when something else went wrong.
    """
    written = folder_bytes(staging) if staging.exists() else 0
    full = _names_full_disk(error) or shutil.disk_usage(folder).free < needed - written
    shutil.rmtree(staging, ignore_errors=True)
    if not full:
        return None
    return disk_full(folder, needed=max(needed, written), free=shutil.disk_usage(folder).free)


def _names_full_disk(error: BaseException | None) -> bool:
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        if "no space left on device" in str(error).lower():
            return True
        error = error.__cause__ or error.__context__
    return False


def folder_bytes(folder: Path) -> int:
    """Return the bytes of all files below a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _is_whole(path: Path) -> bool:
    try:
        check_sizes(path)
    except IntegrityError:
        return False
    return True

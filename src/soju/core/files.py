"""Files that are either whole or absent, and manifests that prove it."""

from __future__ import annotations

import hashlib
import json
import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from soju.core.errors import IntegrityError

MANIFEST = "manifest.json"


@contextmanager
def atomic_writer(path: Path, *, encoding: str | None = "utf-8") -> Iterator[IO[Any]]:
    """Open a temporary file beside `path` and rename it into place when the block ends well.

    The folder is made when it is missing; ``encoding=None`` writes bytes. When the block raises, `path` keeps its old
    content.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    try:
        mode = "wb" if encoding is None else "w"
        with os.fdopen(descriptor, mode, encoding=encoding, newline="" if encoding else None) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically."""
    with atomic_writer(path) as file:
        file.write(text)


def write_json(path: Path, value: Any) -> None:
    """Write JSON atomically, Korean readable, keys in the given order."""
    write_text(path, json.dumps(value, ensure_ascii=False, indent=2) + "\n")


def append_json_line(path: Path, value: Any) -> None:
    """Append one JSON line and wait until it is on the disk; a line that a crash cut short is removed first.

    The file has one writer and is made when it is missing. ``NaN`` and infinity are refused (``ValueError``): no other
    program reads them.
    """
    line = json.dumps(value, ensure_ascii=False, allow_nan=False) + "\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab+") as file:
        file.truncate(_whole_lines(path))
        file.write(line.encode("utf-8"))
        file.flush()
        os.fsync(file.fileno())


def read_json_lines(path: Path) -> list[Any]:
    """Read what `append_json_line` wrote; no file is no lines, and a last line that a crash cut short is left out.

    Raises `IntegrityError` if a whole line is not JSON.
    """
    if not path.exists():
        return []
    values = []
    for number, line in enumerate(path.read_bytes()[: _whole_lines(path)].splitlines(), start=1):
        try:
            values.append(json.loads(line))
        except ValueError as error:
            raise IntegrityError(f"{path}:{number}: not JSON ({error}); restore the file or remove the line") from None
    return values


def _whole_lines(path: Path) -> int:
    """Return the length in bytes up to and with the last line break."""
    with path.open("rb") as file:
        end = file.seek(0, os.SEEK_END)
        while end > 0:
            start = max(0, end - 4096)
            file.seek(start)
            found = file.read(end - start).rfind(b"\n")
            if found >= 0:
                return start + found + 1
            end = start
    return 0


def sync_folder(folder: Path) -> None:
    """Wait until the names inside `folder` are on the disk: files made, renamed and removed."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(folder: Path) -> None:
    """Wait until every file and name below `folder` is on the disk."""
    for path in sorted(folder.rglob("*"), reverse=True):
        if path.is_dir():
            sync_folder(path)
        elif path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
    sync_folder(folder)


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file's bytes in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def tensor_names(path: Path) -> list[str]:
    """Read the names of a safetensors file's tensors from its header, sorted, without their values.

    Raises `IntegrityError` if the header is cut off or is not JSON.
    """
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > path.stat().st_size:
            raise IntegrityError(f"{path}: cut off inside its header; write it again")
        header = file.read(length)
    try:
        return sorted(name for name in json.loads(header) if name != "__metadata__")
    except ValueError as error:
        raise IntegrityError(f"{path}: not a safetensors file ({error}); write it again") from None


def write_manifest(folder: Path) -> None:
    """Record size, SHA-256 and tensor names of every file below `folder` in ``manifest.json``, written last."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST)
    write_json(folder / MANIFEST, {"files": {path.relative_to(folder).as_posix(): _entry(path) for path in files}})


def _entry(path: Path) -> dict[str, Any]:
    entry: dict[str, Any] = {"bytes": path.stat().st_size, "sha256": sha256(path)}
    if path.suffix == ".safetensors":
        entry["tensors"] = tensor_names(path)
    return entry


def verify_manifest(folder: Path) -> None:
    """Check every file of `folder` against its manifest.

    Raises `IntegrityError`, which lists all faults, if the manifest or a file is missing, or a file has other bytes.
    """
    _check(folder, contents=True)


def check_sizes(folder: Path) -> None:
    """Check like `verify_manifest`, but only that every file is there in its right size."""
    _check(folder, contents=False)


def _check(folder: Path, *, contents: bool) -> None:
    manifest = folder / MANIFEST
    try:
        entries = {
            name: (int(entry["bytes"]), str(entry["sha256"]))
            for name, entry in json.loads(manifest.read_text(encoding="utf-8"))["files"].items()
        }
    except FileNotFoundError:
        raise IntegrityError(f"{manifest}: missing, so the folder was not written completely; build it again") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise IntegrityError(f"{manifest}: unreadable ({error}); build the folder again") from None
    faults = [fault for name, entry in entries.items() if (fault := _fault(folder / name, *entry, contents))]
    if faults:
        raise IntegrityError("\n".join(faults))


def _fault(path: Path, expected_bytes: int, expected_sha256: str, contents: bool) -> str | None:
    if not path.is_file():
        return f"{path}: missing since the manifest was written; restore it or build the folder again"
    size = path.stat().st_size
    if size != expected_bytes:
        return f"{path}: {size:,} bytes instead of {expected_bytes:,}; restore it or build the folder again"
    if contents and sha256(path) != expected_sha256:
        return f"{path}: its content changed since the manifest was written; restore it or build the folder again"
    return None


_CHECKPOINT = re.compile(r"checkpoint-\d+")


@dataclass(frozen=True, slots=True)
class Checked:
    """One folder, and what is wrong with it."""

    path: Path
    problem: str | None = None
    """``None`` when every file agrees with the manifest."""


def check_tree(root: Path) -> Iterator[Checked]:
    """Check every folder below `root` that has a manifest or should have one, each once, in the order of names.

    Checkpoints and folders with weights should. Hidden folders are unfinished by definition and left out.
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

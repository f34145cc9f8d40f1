"""Files that are either whole or absent, and manifests that prove it."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from soju.core.errors import IntegrityError

MANIFEST = "manifest.json"


@contextmanager
def atomic_writer(path: Path, *, encoding: str | None = "utf-8") -> Iterator[IO[Any]]:
    """Open a temporary file beside `path` and rename it into place when the block ends well.

    Args:
        path: Final name. Its folder is made when it is missing.
        encoding: Text encoding, or ``None`` to write bytes.

    Yields:
        The open file. When the block raises, `path` keeps its old content.
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


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file's bytes in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def write_manifest(folder: Path) -> None:
    """Record size and SHA-256 of every file below `folder` in ``manifest.json``, written last."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST)
    entries = {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": sha256(path)} for path in files
    }
    write_json(folder / MANIFEST, {"files": entries})


def verify_manifest(folder: Path) -> None:
    """Check every file of `folder` against its manifest.

    Args:
        folder: A folder that `write_manifest` finished.

    Raises:
        IntegrityError: If the manifest or a file is missing, or a file has other bytes. All faults are listed.
    """
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
    faults = [fault for name, entry in entries.items() if (fault := _fault(folder / name, *entry))]
    if faults:
        raise IntegrityError("\n".join(faults))


def _fault(path: Path, expected_bytes: int, expected_sha256: str) -> str | None:
    if not path.is_file():
        return f"{path}: missing since the manifest was written; restore it or build the folder again"
    size = path.stat().st_size
    if size != expected_bytes:
        return f"{path}: {size:,} bytes instead of {expected_bytes:,}; restore it or build the folder again"
    if sha256(path) != expected_sha256:
        return f"{path}: its content changed since the manifest was written; restore it or build the folder again"
    return None

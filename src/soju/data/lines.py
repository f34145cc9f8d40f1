"""Lines of files, compressed or not, with a bound on memory whatever a file holds."""

from __future__ import annotations

import gzip
import os
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from typing import IO

from soju.data.log import SKIP, Place, ReadLog

MAX_LINE_BYTES = 1_000_000
"""Longest line that is read, in bytes without its end; a longer one is refused without being held in memory."""

_CHUNK_BYTES = 1 << 18
_BOM = b"\xef\xbb\xbf"
_UTF16_BOMS = (b"\xff\xfe", b"\xfe\xff")
_GZIP_MAGIC = b"\x1f\x8b"
_CONTROL_BYTES = bytes(code for code in range(0x20) if code not in b"\t\n\r")
_HANGUL_SYLLABLE = re.compile("[가-힣]")


class FileBrokenError(Exception):
    """Reading a file cannot go on. Caught inside this part and recorded in the `ReadLog`."""

    def __init__(self, what: str, remedy: str, reason: str) -> None:
        super().__init__(what)
        self.what = what
        self.remedy = remedy
        self.reason = reason


def read_lines(
    name: str, open_file: Callable[[], IO[bytes]], *, gzipped: bool, max_line_bytes: int, log: ReadLog
) -> Iterator[bytes | None]:
    r"""Yield the lines of one file without their ends (``\n``, ``\r\n`` or a lone ``\r``).

    Args:
        name: The file in problems.
        open_file: Opens it for bytes.
        gzipped: Whether its name ends in ``.gz``.
        max_line_bytes: Lines longer than this are yielded as ``None``.
        log: Gets at most one problem of the file: at line 0 when nothing could be read, else at the line that is
            broken; an incomplete last line of a broken file is not yielded.

    Yields:
        One line, or ``None`` for a line that is too long.
    """
    number = 0
    try:
        with open_file() as file:
            chunks = _chunks(file, name, gzipped=gzipped)
            for line in split_lines(chunks, max_line_bytes):
                number += 1
                yield line
    except FileBrokenError as error:
        log.refuse_file(name, number + 1 if number else 0, error.what, error.remedy, error.reason)
    except (OSError, ValueError) as error:
        broken = _explain_os_error(error, name)
        log.refuse_file(name, number + 1 if number else 0, broken.what, broken.remedy, broken.reason)


def _explain_os_error(error: OSError | ValueError, name: str) -> FileBrokenError:
    if isinstance(error, FileNotFoundError | NotADirectoryError | ValueError):
        looked_for = str(getattr(error, "filename", None) or name)
        elsewhere = os.path.normpath(looked_for) != os.path.normpath(name)
        return FileBrokenError(
            "no such file" + (f" (looked for {looked_for})" if elsewhere else ""),
            "check the path; relative paths start at data.root, or at the working folder",
            "missing-file",
        )
    if isinstance(error, IsADirectoryError):
        return FileBrokenError(
            "a folder, not a file", "name a file in it, or a pattern such as FOLDER/*.jsonl", "folder"
        )
    if isinstance(error, PermissionError):
        return FileBrokenError("no permission to read it", "run: chmod u+r FILE, or ask its owner", "no-permission")
    return FileBrokenError(
        f"cannot be read ({error.strerror or error})", "check the disk and copy the file again", "unreadable"
    )


def _chunks(file: IO[bytes], name: str, *, gzipped: bool) -> Iterator[bytes]:
    if file.read(2) == _GZIP_MAGIC:
        if not gzipped:
            raise FileBrokenError(
                "gzip data in a file that is not named .gz", "add .gz to its name", "gzip-without-ending"
            )
    elif gzipped:
        remedy = "remove .gz from its name, or compress it: gzip FILE"
        raise FileBrokenError("named .gz but not gzip data", remedy, "not-gzip")
    file.seek(0)
    first = True
    for chunk in _decompress(file) if gzipped else iter(lambda: file.read(_CHUNK_BYTES), b""):
        if first:
            _refuse_utf16(chunk[:4096], name)
            first = False
        yield chunk


def _decompress(file: IO[bytes]) -> Iterator[bytes]:
    again = "copy or download the file again; test it with: gzip -t FILE"
    try:
        with gzip.GzipFile(fileobj=file, mode="rb") as stream:
            while chunk := stream.read1(_CHUNK_BYTES):
                yield chunk
    except EOFError:
        raise FileBrokenError("the gzip data end too early", again, "truncated-gzip") from None
    except (zlib.error, gzip.BadGzipFile) as error:
        raise FileBrokenError(f"the gzip data are broken ({error})", again, "broken-gzip") from None


def _refuse_utf16(head: bytes, name: str) -> None:
    if head.startswith(_UTF16_BOMS) or head.count(b"\0") * 10 > len(head):
        remedy = f"save the file as UTF-8: iconv -f UTF-16 -t UTF-8 {name} > NEW_FILE"
        raise FileBrokenError("UTF-16 text", remedy, "utf-16")


def split_lines(chunks: Iterable[bytes], max_line_bytes: int) -> Iterator[bytes | None]:
    """Join `chunks` and split them at line ends of any kind. Lines beyond `max_line_bytes` come out as ``None``."""
    pending = b""
    too_long = False
    after_cr = False
    for chunk in filter(None, chunks):
        piece = chunk[1:] if after_cr and chunk.startswith(b"\n") else chunk
        after_cr = chunk.endswith(b"\r")
        if b"\r" in piece:
            piece = piece.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
        lines = piece.split(b"\n")
        lines[0] = pending + lines[0]
        pending = lines.pop()
        for line in lines:
            yield None if too_long or len(line) > max_line_bytes else line
            too_long = False
        if len(pending) > max_line_bytes:
            too_long = True
        if too_long:
            pending = b""
    if too_long:
        yield None
    elif pending:
        yield pending


def decode_line(line: bytes | None, place: Place, max_line_bytes: int) -> str | None:
    """Return a line as text, a byte order mark at its start removed.

    Args:
        line: What `read_lines` gave.
        place: Gets ``too-long``, ``nul-byte``, ``control-character``, ``cp949`` or ``invalid-utf8``.
        max_line_bytes: The bound, for the message.

    Returns:
        The text, or ``None`` when a problem was added.
    """
    if line is None:
        what = f"the line is longer than {max_line_bytes:,} bytes"
        place.refuse("", what, f"split the text, raise data.max_line_bytes, {SKIP}", "too-long")
        return None
    if line.startswith(_BOM):
        line = line[3:]
    if len(line.translate(None, _CONTROL_BYTES)) < len(line):
        position = next(position for position, byte in enumerate(line) if byte in _CONTROL_BYTES)
        code = line[position]
        what, reason = ("NUL byte", "nul-byte") if code == 0 else (f"control byte 0x{code:02X}", "control-character")
        place.refuse("", f"{what} at byte {position + 1}", f"remove the byte, {SKIP}", reason)
        return None
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        _refuse_encoding(line, error, place)
        return None


def _refuse_encoding(line: bytes, error: UnicodeDecodeError, place: Place) -> None:
    if _looks_like_cp949(line):
        remedy = f"save the file as UTF-8: iconv -f CP949 -t UTF-8 {place.file} > NEW_FILE"
        place.refuse("", "CP949 (EUC-KR) bytes", remedy, "cp949")
    else:
        what = f"byte 0x{line[error.start]:02X} at byte {error.start + 1} is not UTF-8"
        place.refuse("", what, f"save the row as UTF-8, {SKIP}", "invalid-utf8")


def _looks_like_cp949(line: bytes) -> bool:
    lenient = line.decode("utf-8", "replace")
    if len(_HANGUL_SYLLABLE.findall(lenient)) >= lenient.count("\ufffd"):
        return False
    try:
        return _HANGUL_SYLLABLE.search(line.decode("cp949")) is not None
    except UnicodeDecodeError:
        return False

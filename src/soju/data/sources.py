"""Where rows come from: source strings become files, samples and hub data sets, and their lines become raw objects.

Files may be compressed; whatever a file holds, reading it has a bound on memory.
"""

from __future__ import annotations

import glob
import gzip
import importlib.resources
import json
import os
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from soju.core.language import language_of
from soju.data.log import SKIP, Place, ReadLog, describe, show
from soju.data.rows import DOCUMENTS, JUDGEMENTS, KINDS, PAIRS, Format, Kind

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


ENDINGS: dict[str, Format] = {
    ".jsonl": "jsonl",
    ".json-lines": "jsonl",
    ".ndjson": "jsonl",
    ".tsv": "tsv",
    ".txt": "txt",
    ".json": "json",
}
"""File endings by format; each may be followed by ``.gz``."""

SAMPLES = "samples:"
HUB = "hub:"


@dataclass(frozen=True, slots=True)
class FileSource:
    """One file to read."""

    name: str
    """As the user wrote it; a match of a pattern relative to the same folder."""
    format: Format
    gzipped: bool
    open: Callable[[], IO[bytes]]


@dataclass(frozen=True, slots=True)
class HubSource:
    """One split of a data set of the Hugging Face hub, or of a local folder in the same layout."""

    name: str
    dataset: str
    configuration: str | None
    split: str
    columns: dict[str, str]
    """Column by field, for fields whose column has another name. A dot goes into a nested column."""


def resolve(
    sources: Sequence[str], kind: Kind[Any], *, root: Path | None, log: ReadLog
) -> list[FileSource | HubSource]:
    """Turn source strings into what can be opened, in the given order; matches of a pattern are sorted by name.

    Args:
        sources: Paths, patterns, ``samples:NAME`` or ``hub:OWNER/NAME[/CONFIGURATION]:SPLIT[:FIELD=COLUMN,...]``.
        kind: The kind of rows wanted, which decides the file formats allowed.
        root: Folder that relative paths start from; the working folder when ``None``.
        log: Gets the problems of sources that name nothing readable.

    Returns:
        The sources without those that were refused.
    """
    if not sources:
        log.refuse_file(
            "data", 0, "no source is named", "name at least one file, samples:NAME or hub:NAME", "no-source"
        )
    found: list[FileSource | HubSource] = []
    for source in sources:
        if source.startswith(SAMPLES):
            one: FileSource | HubSource | None = _sample(source, log)
            found += [one] if one else []
        elif source.startswith(HUB):
            one = _hub(source, log)
            found += [one] if one else []
        else:
            files = (_file(name, kind, root, log) for name in _match(source, root, log))
            found += [file for file in files if file]
    return found


def _match(source: str, root: Path | None, log: ReadLog) -> list[str]:
    base = root or Path()
    if "\0" in source or not re.search(r"[*?\[]", source) or os.path.exists(base / source):
        return [source]
    matches = sorted(glob.glob(source, root_dir=base, recursive=True))
    names = [match for match in matches if not os.path.isdir(base / match)]
    if not names:
        remedy = 'check the pattern and the folder it starts from; "**/" goes into sub-folders'
        log.refuse_file(source, 0, "no file matches", remedy, "no-match")
    return names


def _file(name: str, kind: Kind[Any], root: Path | None, log: ReadLog) -> FileSource | None:
    """Return one file with the format its ending names; whether it exists is seen when it is opened."""
    path = (root or Path()) / name
    gzipped = name.endswith(".gz")
    ending = Path(name.removesuffix(".gz")).suffix
    found = ENDINGS.get(ending)
    allowed = ", ".join(key for key, value in ENDINGS.items() if value in kind.formats)
    if os.path.isdir(path):  # unlike Path.is_dir, False for what may not be looked at
        remedy = f"name a file in it, or a pattern such as {name.rstrip('/')}/*.jsonl"
        log.refuse_file(name, 0, "a folder, not a file", remedy, "folder")
    elif found is None or (found == "json" and "json" not in kind.formats):
        remedy = f"name it with one of {allowed}, each also with .gz"
        if ending == ".json":
            remedy = f"write one object a line: jq -c '.[]' {name} > {name}l"
        log.refuse_file(name, 0, f'the ending "{ending}" names no format that is read', remedy, "unknown-ending")
    elif found not in kind.formats:
        remedy = f"store them as one of {allowed}; docs/data_formats.md has an example row"
        log.refuse_file(name, 0, f"{kind.name} cannot be read from {ending} files", remedy, "wrong-format")
    else:
        return FileSource(name, found, gzipped, lambda: path.open("rb"))
    return None


def _sample(source: str, log: ReadLog) -> FileSource | None:
    name = source.removeprefix(SAMPLES)
    folder = importlib.resources.files("soju") / "samples"
    known = sorted(entry.name.removesuffix(".jsonl") for entry in folder.iterdir() if entry.name.endswith(".jsonl"))
    if name not in known:
        log.refuse_file(source, 0, "no such sample", f"write one of {', '.join(known) or '(none)'}", "unknown-sample")
        return None
    file = folder / f"{name}.jsonl"
    return FileSource(source, "jsonl", False, lambda: file.open("rb"))


def _hub(source: str, log: ReadLog) -> HubSource | None:
    place, _, rest = source.removeprefix(HUB).partition(":")
    split, _, mapping = rest.partition(":")
    columns = dict(part.partition("=")[::2] for part in mapping.split(",") if part)
    if not place or not split or not all(field and column for field, column in columns.items()):
        remedy = "write hub:OWNER/NAME:SPLIT or hub:OWNER/NAME:SPLIT:FIELD=COLUMN,FIELD=COLUMN"
        log.refuse_file(source, 0, "not a hub source", remedy, "hub-syntax")
        return None
    configuration = None
    if place.count("/") == 2 and not place.startswith((".", "/")):
        place, _, configuration = place.rpartition("/")
    return HubSource(source, place, configuration, split, columns)


def kind_of(source: FileSource, log: ReadLog) -> Kind[Any] | None:
    """Tell by its first row what a file holds; ``None`` when a problem was added to the log."""
    first = _first_line(source)
    if source.format == "txt" or first is None:
        return DOCUMENTS  # whose reader says what is wrong and where
    if source.format == "jsonl":
        try:
            names = set(json.loads(first))
        except (ValueError, TypeError):
            return DOCUMENTS
        return next((kind for kind in KINDS.values() if kind.telling and kind.telling <= names), DOCUMENTS)
    found = _kind_of_tsv(first)
    if found is None:
        remedy = "name them there, for example ko<TAB>en or id<TAB>text"
        log.refuse_file(source.name, 1, "neither names nor number of the columns say what they are", remedy, "no-kind")
    return found


def _kind_of_tsv(line: str) -> Kind[Any] | None:
    """Tell by the header, or without one by the number of columns; of two, the Korean side of a pair comes first."""
    # Judgements hold no text; kinds that need a header are read only where they are asked for.
    known = [kind for kind in KINDS.values() if kind.columns and not kind.headed and kind is not JUDGEMENTS]
    columns = line.split("\t")
    named = next((kind for kind in known if kind.header(line)), None)
    if named is not None or len(columns) != 2:
        return named or next((kind for kind in known if len(kind.columns) == len(columns)), None)
    return PAIRS if language_of(columns[0]) == "ko" else DOCUMENTS


def _first_line(source: FileSource) -> str | None:
    """Return the first line with something in it, or ``None`` when there is none or the file cannot be read."""
    try:
        with source.open() as raw, gzip.open(raw) if source.gzipped else raw as file:
            lines = (line.decode("utf-8", "replace").strip("\ufeff\r\n") for line in file)
            return next((line for line in lines if line.strip()), None)
    except (OSError, EOFError, zlib.error):
        return None


class _DuplicateKeyError(Exception):
    pass


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        keys = [key for key, _ in pairs]
        raise _DuplicateKeyError(next(key for key in value if keys.count(key) > 1))
    return value


_DECODER = json.JSONDecoder(object_pairs_hook=_unique)


def parse_json(text: str, place: Place) -> dict[str, Any] | None:
    """Read one JSON object.

    ``NaN`` and ``Infinity`` are read as Python does and refused where they are used.

    Args:
        text: One line.
        place: Gets ``not-json``, ``not-an-object`` or ``duplicate-key``.

    Returns:
        The object, or ``None`` when a problem was added.
    """
    try:
        value = _DECODER.decode(text)
    except _DuplicateKeyError as error:
        key = str(error)
        place.refuse("", f"the key {show(key)} stands twice", f"keep one of them, {SKIP}", "duplicate-key")
        return None
    except json.JSONDecodeError as error:
        what = f"not JSON: {error.msg} at character {error.pos + 1}"
        place.refuse("", what, f"write one JSON object a line, {SKIP}", "not-json")
        return None
    except (ValueError, RecursionError):
        what = "not usable JSON: nested too deeply or a number with too many digits"
        place.refuse("", what, f"write one flat JSON object a line, {SKIP}", "not-json")
        return None
    if not isinstance(value, dict):
        remedy = f'write one object a line, as {{"ko": ...}}, {SKIP}'
        place.refuse("", f"expected a JSON object, got {describe(value)}", remedy, "not-an-object")
        return None
    return value


_SPACE = re.compile(r"[ \t\n\r]*")


def parse_json_array(text: str, place: Place) -> Iterator[dict[str, Any] | None]:
    r"""Read a JSON array of objects one by one, each at the line where it begins.

    Args:
        text: The whole file, lines ending in ``\n``.
        place: Its line is set before each object; gets ``not-an-array``, and what `parse_json` adds.

    Yields:
        An object, or ``None`` when a problem was added; what is no JSON ends the array.
    """
    remedy = "write [{...}, {...}], or one object a line in a file named .jsonl"
    position = _next_token(text, 0)
    place.line = 1 + text.count("\n", 0, position)
    if text[position : position + 1] != "[":
        place.refuse("", "no JSON array begins here", remedy, "not-an-array")
        yield None
        return
    before, position = position, _next_token(text, position + 1)
    more = text[position : position + 1] != "]"
    while more:
        place.line += text.count("\n", before, position)
        value, end = _decode_object(text, position, place, remedy)
        yield value
        if end is None:
            return
        before, position = position, _next_token(text, end)
        more = text[position : position + 1] == ","
        if more:
            position = _next_token(text, position + 1)
    place.line += text.count("\n", before, position)
    if text[position : position + 1] != "]" or _next_token(text, position + 1) < len(text):
        place.refuse("", "the array does not end with ] here, or something follows it", remedy, "not-an-array")
        yield None


def _next_token(text: str, position: int) -> int:
    match = _SPACE.match(text, position)
    return position if match is None else match.end()


def _decode_object(text: str, position: int, place: Place, remedy: str) -> tuple[dict[str, Any] | None, int | None]:
    """Return the object that begins somewhere, ``None`` for what is none, and its end, ``None`` for what is no JSON."""
    try:
        value, end = _DECODER.raw_decode(text, position)
    except _DuplicateKeyError as error:
        place.refuse("", f"the key {show(str(error))} stands twice", "keep one of them", "duplicate-key")
        return None, None
    except (ValueError, RecursionError) as error:
        what = error.msg if isinstance(error, json.JSONDecodeError) else "nested too deeply or too many digits"
        place.refuse("", f"not JSON in the object that begins here: {what}", remedy, "not-json")
        return None, None
    if not isinstance(value, dict):
        place.refuse("", f"expected a JSON object, got {describe(value)}", remedy, "not-an-object")
        return None, end
    return value, end


def parse_tsv(text: str, columns: tuple[str, ...], place: Place) -> dict[str, str] | None:
    """Read one line of tab-separated columns, without any quoting.

    Args:
        text: One line.
        columns: Their names in order.
        place: Gets ``wrong-columns``.

    Returns:
        The values by name, or ``None`` when a problem was added.
    """
    values = text.split("\t")
    if len(values) != len(columns):
        what = f"{len(values)} column{'s' if len(values) != 1 else ''} instead of {len(columns)}"
        remedy = f"write {'<TAB>'.join(columns)} without tabs inside a text, {SKIP}"
        place.refuse("", what, remedy, "wrong-columns")
        return None
    return dict(zip(columns, values, strict=True))

"""The expansion matrix as a table that any program reads.

Shape letter: V = terms in the vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import coo_array, csr_array

from soju.core.errors import DataError, Problem, UserError
from soju.core.files import atomic_writer
from soju.core.language import language_of

HEADER = ("source", "source_language", "target", "target_language", "weight")

_ESCAPES = {"\\": "\\\\", "\t": "\\t", "\n": "\\n", "\r": "\\r"}
_CHARACTERS = {"\\": "\\", "t": "\t", "n": "\n", "r": "\r"}
_TRANSLATION = str.maketrans(_ESCAPES)


def write_term_table(
    path: Path,
    weights_VV: csr_array,
    terms: Sequence[str],
    *,
    language: Callable[[str], str] = language_of,
) -> int:
    r"""Write every non-zero weight as one line ``source, source_language, target, target_language, weight``.

    Lines are sorted by source (code point order), then by falling weight, then by target. A backslash, tab, line
    feed or carriage return in a name becomes two characters: ``\\``, ``\t``, ``\n``, ``\r``. Weights are the shortest
    decimals that read back as the same float32.

    Args:
        path: Replaced as a whole when the last line is written.
        weights_VV: Row = source, column = target, ``(V, V)``, unitless.
        terms: Name of every term, ``V`` different strings.
        language: Tells the language of a name.

    Returns:
        Number of lines below the header.

    Raises:
        UserError: If the names do not fit the matrix or two terms share a name.
    """
    _check_names(weights_VV, terms)
    table = coo_array(weights_VV)
    weights = table.data.astype(np.float32)
    rank_V = np.empty(len(terms), np.int64)
    rank_V[sorted(range(len(terms)), key=terms.__getitem__)] = np.arange(len(terms))
    order = np.lexsort((rank_V[table.col], -weights, rank_V[table.row]))
    cells = [f"{_escape(term)}\t{language(term)}" for term in terms]
    count = 0
    with atomic_writer(path) as file:
        file.write("\t".join(HEADER) + "\n")
        for source, target, weight in zip(table.row[order], table.col[order], weights[order], strict=True):
            if weight != 0:
                file.write(f"{cells[source]}\t{cells[target]}\t{np.format_float_positional(weight, trim='-')}\n")
                count += 1
    return count


def read_term_table(path: Path, terms: Sequence[str]) -> csr_array:
    """Read what `write_term_table` wrote.

    Args:
        path: The table.
        terms: Name of every term in the order of the ids.

    Returns:
        ``(V, V)`` float32, row = source, column = target.

    Raises:
        DataError: If a line is not five cells, has a weight that is no number or names an unknown term.
        UserError: If two terms share a name or the header is another.
    """
    ids = {term: index for index, term in enumerate(terms)}
    if len(ids) != len(terms):
        raise UserError("two terms have the same name, so a name does not tell the id; make the names different")
    entries: list[tuple[int, int, float]] = []
    problems: list[Problem] = []
    for number, line in _lines(path):
        cells = line.split("\t")
        try:
            if len(cells) != len(HEADER):
                raise ValueError(f"{len(cells)} cells instead of {len(HEADER)}")
            entries.append((ids[_unescape(cells[0])], ids[_unescape(cells[2])], float(cells[4])))
        except KeyError as error:
            problems.append(Problem(str(path), number, "", f"unknown term {error}", "use the model's names", "unknown"))
        except ValueError as error:
            problems.append(Problem(str(path), number, "", str(error), "write the table again", "malformed"))
    if problems:
        raise DataError(problems)
    rows, columns, weights = zip(*entries, strict=True) if entries else ((), (), ())
    data: NDArray[np.float32] = np.array(weights, np.float32)
    table = coo_array((data, (np.array(rows, np.int64), np.array(columns, np.int64))), shape=(len(terms), len(terms)))
    return csr_array(table)


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    with path.open(encoding="utf-8", newline="\n") as file:
        header = file.readline().rstrip("\n")
        if header != (expected := "\t".join(HEADER)):
            raise UserError(f"{path}:1: the header is {header!r}, expected {expected!r}; write the table again")
        for number, line in enumerate(file, start=2):
            yield number, line.rstrip("\n")


def _check_names(weights_VV: csr_array, terms: Sequence[str]) -> None:
    if weights_VV.shape != (len(terms), len(terms)):
        raise UserError(
            f"{len(terms):,} names for a matrix of {weights_VV.shape}; give one name for each row and column"
        )
    if len(set(terms)) != len(terms):
        raise UserError("two terms have the same name, so the table could not be read back; make the names different")


def _escape(name: str) -> str:
    return name.translate(_TRANSLATION)


def _unescape(cell: str) -> str:
    characters = iter(cell)
    result = []
    for character in characters:
        if character == "\\":
            escape = next(characters, "")
            if escape not in _CHARACTERS:
                raise ValueError(f"unknown escape \\{escape}")
            character = _CHARACTERS[escape]
        result.append(character)
    return "".join(result)

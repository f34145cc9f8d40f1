"""What the data hold, counted while rows pass, and which rows are kept apart: held out, spread, overlapping a test."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from hashlib import blake2b
from typing import Any, TypeVar

import numpy as np
from rich.table import Table

from soju.core.errors import UserError
from soju.core.language import Language
from soju.data.log import HANGUL
from soju.data.rows import Document, PairRow, PassageRow, Row, RowT, TermRow, TripletRow

_NOT_LETTER_OR_DIGIT = re.compile(r"[\W_]+")


def normalise_for_overlap(text: str) -> str:
    """Return the letters and digits of `text`, case-folded, in Unicode NFC.

    >>> normalise_for_overlap("Hello,  World 2!")
    'helloworld2'
    """
    return _NOT_LETTER_OR_DIGIT.sub("", unicodedata.normalize("NFC", text.casefold()))


def find_overlap(train_texts: Iterable[str], evaluation_texts: Iterable[str]) -> list[str]:
    """Return the evaluation texts that also stand in training, in evaluation order.

    Texts are compared after `normalise_for_overlap`; those without a letter or digit never overlap. Only the evaluation
    side is held in memory.

    Args:
        train_texts: Streamed once, and no further than the last overlap that is possible.
        evaluation_texts: The texts that must be unseen.

    Returns:
        Each overlapping evaluation text as it was given; repeated ones are repeated.
    """
    waiting: dict[str, list[int]] = {}
    texts = list(evaluation_texts)
    for position, text in enumerate(texts):
        key = normalise_for_overlap(text)
        if key:
            waiting.setdefault(key, []).append(position)
    found: list[int] = []
    for text in train_texts:
        if not waiting:
            break
        found += waiting.pop(normalise_for_overlap(text), [])
    return [texts[position] for position in sorted(found)]


def refuse_overlap(
    train_texts: Iterable[str],
    evaluation_texts: Iterable[str],
    *,
    evaluation: str = "the evaluation set",
    shown: int = 3,
) -> None:
    """Stop when an evaluation text stands in training, because the scores would flatter the model."""
    overlap = find_overlap(train_texts, evaluation_texts)
    if not overlap:
        return
    examples = ", ".join(repr(text if len(text) <= 60 else text[:60] + "...") for text in overlap[:shown])
    more = f" and {len(overlap) - shown:,} more" if len(overlap) > shown else ""
    raise UserError(
        f"{len(overlap):,} text{'s' if len(overlap) > 1 else ''} of {evaluation} also stand in the training data "
        f"(compared by letters and digits, case ignored): {examples}{more}; remove them from the training files"
    )


def held_out(key: str, *, seed: int, share: float) -> bool:
    """Tell whether the row with this key belongs to the held-out part.

    ``blake2b(f"{seed}:{key}")`` read as a 64-bit fraction in [0, 1) is compared with `share`; a larger share keeps
    every row a smaller one held out.

    Args:
        key: What must not stand on both sides: an id, a text, the name of a group.
        seed: Another seed gives another, independent split.
        share: Expected share held out, in [0, 1], unitless.

    Returns:
        ``True`` for held out, ``False`` for training.

    Raises:
        ValueError: If `share` is not in [0, 1].
    """
    if not 0 <= share <= 1:
        raise ValueError(f"share must be in [0, 1], got {share}")
    digest = blake2b(f"{seed}:{key}".encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "big") < share * 2**64


ItemT = TypeVar("ItemT")


def spread(items: Sequence[ItemT], most: int) -> list[ItemT]:
    """Return at most `most` items, spread evenly over all.

    >>> spread("abcde", 3)
    ['a', 'c', 'e']
    """
    if len(items) <= most:
        return list(items)
    return [items[place] for place in np.linspace(0, len(items) - 1, most).round().astype(int)]


QUANTILES = (("p5", 0.05), ("p50", 0.5), ("p95", 0.95), ("p99", 0.99))
BINS = 10
"""Bins of the similarity histogram, each a tenth wide, open below and closed above: (0.9, 1.0] is the last."""

_NOT_LETTERS = re.compile(r"[\W\d_]+")
_HANGUL_RUN = re.compile(f"{HANGUL.pattern}+")
_LATIN = re.compile("[A-Za-z\u00aa\u00b5\u00ba\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u024f]+")

UNITS = {
    "rows": "rows",
    "texts.*.count": "texts",
    "texts.*.characters": "Unicode code points of one text (NFC)",
    "texts.*.words": "words of one text, split at white space",
    "texts.*.scripts": "share of the letters, 0 to 1",
    "terms_per_row": "terms of one row",
    "similarity": "terms in the interval, open below and closed above",
    "triplets": "rows by pair_type and difficulty",
    "domains": "passages by domain",
}


class Lengths:
    """Exact distribution of whole numbers; memory grows with the number of different values only."""

    def __init__(self) -> None:
        self.counts: Counter[int] = Counter()

    def add(self, length: int) -> None:
        """Count one value."""
        self.counts[length] += 1

    def to_json(self) -> dict[str, float]:
        """Return min, quantiles, max and mean; a quantile q is the smallest value that q of all do not exceed."""
        if not self.counts:
            return {}
        total = self.counts.total()
        values = sorted(self.counts)
        result: dict[str, float] = {"min": values[0]}
        for name, share in QUANTILES:
            below = 0
            for value in values:
                below += self.counts[value]
                if below >= share * total:
                    result[name] = value
                    break
        result["max"] = values[-1]
        result["mean"] = round(sum(value * count for value, count in self.counts.items()) / total, 2)
        return result


class TextStatistics:
    """Lengths and scripts of the texts of one field."""

    def __init__(self) -> None:
        self.characters = Lengths()
        self.words = Lengths()
        self.letters = 0
        self.hangul = 0
        self.latin = 0

    def add(self, text: str) -> None:
        """Count one text."""
        self.characters.add(len(text))
        self.words.add(len(text.split()))
        letters = _NOT_LETTERS.sub("", text)
        self.letters += len(letters)
        if letters.isascii():
            self.latin += len(letters)
            return
        rest = _HANGUL_RUN.sub("", letters)
        self.hangul += len(letters) - len(rest)
        self.latin += len(rest) if rest.isascii() else len(rest) - len(_LATIN.sub("", rest))

    def to_json(self) -> dict[str, Any]:
        """Return counts in the units of `UNITS`."""
        letters = max(self.letters, 1)
        hangul, latin = self.hangul / letters, self.latin / letters
        other = (self.letters - self.hangul - self.latin) / letters
        return {
            "count": self.characters.counts.total(),
            "characters": self.characters.to_json(),
            "words": self.words.to_json(),
            "scripts": {"hangul": round(hangul, 4), "latin": round(latin, 4), "other": round(max(other, 0.0), 4)},
        }


class RowStatistics:
    """Statistics of rows of any kind, in one pass."""

    def __init__(self) -> None:
        self.rows = 0
        self.texts: dict[str, TextStatistics] = {}
        self.terms_per_row = Lengths()
        self.similarities: Counter[int] = Counter()
        self.triplets: dict[str, Counter[str]] = {}
        self.domains: Counter[str] = Counter()

    def add(self, row: Row) -> None:
        """Count one row.

        Texts whose field does not tell the language are counted under ``field.ko``, ``field.en`` or ``field.other``.
        """
        self.rows += 1
        if isinstance(row, PairRow):
            self._add_texts({"ko": row.ko, "en": row.en})
        elif isinstance(row, TermRow):
            self._add_terms(row)
        elif isinstance(row, TripletRow):
            for field, text in (("query", row.query), ("positive", row.positive), ("negative", row.negative)):
                self._add_text(f"{field}.{_language(text)}", text)
            self.triplets.setdefault(row.pair_type, Counter())[row.difficulty] += 1
        elif isinstance(row, Document):
            self._add_text(f"document.{_language(row.text)}", row.text)
        elif isinstance(row, PassageRow):
            self._add_passage(row)

    def _add_terms(self, row: TermRow) -> None:
        self._add_text("ko", row.ko)
        self.terms_per_row.add(len(row.terms))
        for term in row.terms:
            self._add_text(f"term.{_language(term.text)}", term.text)
            self.similarities[_bin(term.similarity)] += 1

    def _add_passage(self, row: PassageRow) -> None:
        self._add_texts({"ko": row.ko, "en": row.en, "query_ko": row.query_ko, "query_en": row.query_en})
        self.domains[row.domain] += 1

    def _add_texts(self, texts: Mapping[str, str]) -> None:
        for field, text in texts.items():
            self._add_text(field, text)

    def _add_text(self, field: str, text: str) -> None:
        statistics = self.texts.get(field)
        if statistics is None:
            statistics = self.texts[field] = TextStatistics()
        statistics.add(text)

    def to_json(self) -> dict[str, Any]:
        """Return plain values for ``data.json``, with their units; parts that do not apply are left out."""
        result: dict[str, Any] = {
            "rows": self.rows,
            "texts": {field: self.texts[field].to_json() for field in sorted(self.texts)},
        }
        if self.similarities:
            result["terms_per_row"] = self.terms_per_row.to_json()
            result["similarity"] = {
                f"({number / BINS:.1f}, {(number + 1) / BINS:.1f}]": self.similarities[number] for number in range(BINS)
            }
        if self.triplets:
            result["triplets"] = {name: dict(counts) for name, counts in sorted(self.triplets.items())}
        if self.domains:
            result["domains"] = dict(self.domains.most_common())
        result["units"] = {name: unit for name, unit in UNITS.items() if name.split(".")[0] in result}
        return result


def _language(text: str) -> Language:
    """`soju.core.language.language_of`, fast enough for every text of a corpus."""
    if not text.isascii() and HANGUL.search(text):
        return "ko"
    return "en" if _LATIN.search(text) else "other"


def _bin(similarity: float) -> int:
    number = min(int(similarity * BINS), BINS - 1)
    return number - 1 if number and similarity <= number / BINS else number


def counted(rows: Iterable[RowT], statistics: RowStatistics) -> Iterator[RowT]:
    """Yield `rows` unchanged while `statistics` counts them."""
    for row in rows:
        statistics.add(row)
        yield row


def format_statistics(statistics: Mapping[str, Any], *, title: str) -> Table:
    """Return a terminal table of what `RowStatistics.to_json` gave: one line a field, then the distributions."""
    table = Table(title=f"{title}: {statistics['rows']:,} rows", title_justify="left")
    table.add_column("what")
    for name in ("count", "characters p50", "p95", "max", "words p50", "p95", "Hangul", "Latin"):
        table.add_column(name, justify="right")
    for field, text in statistics["texts"].items():
        characters, words, scripts = text["characters"], text["words"], text["scripts"]
        lengths = [f"{characters[name]:,}" for name in ("p50", "p95", "max")] + [
            f"{words[n]:,}" for n in ("p50", "p95")
        ]
        table.add_row(field, f"{text['count']:,}", *lengths, f"{scripts['hangul']:.0%}", f"{scripts['latin']:.0%}")
    for name, count in _distribution(statistics):
        table.add_row(name, f"{count:,}")
    return table


def _distribution(statistics: Mapping[str, Any]) -> Iterator[tuple[str, int]]:
    for interval, count in statistics.get("similarity", {}).items():
        if count:
            yield f"similarity {interval}", count
    for pair_type, counts in statistics.get("triplets", {}).items():
        for difficulty, count in counts.items():
            yield f"{pair_type}, {difficulty}", count
    for domain, count in statistics.get("domains", {}).items():
        yield f"domain {domain}", count

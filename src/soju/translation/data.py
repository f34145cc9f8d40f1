"""Sentence pairs for translation: read, cleaned, split by document, with placeholders in place of what must not change.

A pair whose document is not named is a document of its own. Texts of test and validation documents are taken out of
training, whatever their document, so that no sentence is trained on and judged.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from soju.core.config import Settings
from soju.core.errors import DataError, UserError
from soju.data.log import HANGUL, SKIP, OnError, Place, ReadLog, clean_text, describe, show
from soju.data.readers import read_rows
from soju.data.rows import Kind, PairRow, RawRow, column_names, mostly_hangul
from soju.data.statistics import held_out, normalise_for_overlap

Language = Literal["ko", "en"]
DIRECTIONS: tuple[tuple[Language, Language], ...] = (("ko", "en"), ("en", "ko"))
"""Source and target of both directions, in the order of all tables."""
PLACEHOLDERS = 16
"""Strings of one sentence that can be protected."""
GLOSSARY_MARKS = ("__g__", "__t__", "__/g__")
"""Before a term of the source, before its translation, behind it."""

_RESERVED = re.compile(r"__(?:ko|en|p\d+|g|t|/g)__")
_PROTECTED = re.compile(
    r"https?://[^\s가-힣<>\"']*[^\s가-힣<>\"'.,;:!?)]"  # a URL; Hangul right after one is a particle
    r"|[\w.+-]+@[\w-]+(?:\.[A-Za-z0-9-]+)+"
    r"|`[^`\n]+`"
    r"|\{[A-Za-z_][A-Za-z0-9_.]*\}"
    r"|%(?:\([A-Za-z_]\w*\))?[sdifgx](?![A-Za-z])"
    r"|</?[A-Za-z][^<>\n]*>",
    re.ASCII,
)
_PLACEHOLDER = re.compile(r"__p(\d+)__")


@dataclass(frozen=True, slots=True)
class TranslationPair(PairRow):
    """A Korean text and its English translation."""

    domain: str = ""
    """What the text is about, for intervals by domain; empty when not said."""
    document: str = ""
    """Where it stands; pairs of one document are never split."""

    def text(self, language: Language) -> str:
        """Return one side."""
        return self.ko if language == "ko" else self.en


class _TranslationKind(Kind[TranslationPair]):
    """Pairs whose TSV header may name `domain` and `document` too."""

    def header(self, text: str) -> tuple[str, ...] | None:
        """Return the columns when a line names both languages and nothing unknown."""
        names = column_names(text)
        known = {"ko", "en", "domain", "document"}
        return names if len(set(names)) == len(names) and {"ko", "en"} <= set(names) <= known else None


def parse_translation(row: RawRow, place: Place) -> TranslationPair | None:
    """Read ``{"ko": ..., "en": ..., "domain": ..., "document": ...}``, the last two optional.

    An empty side is no problem here: cleaning drops and counts it. A mark that the vocabulary reserves is one.
    """
    sides = {}
    for name in ("ko", "en"):
        value = row.get(name)
        sides[name] = "" if isinstance(value, str) and not value.strip() else clean_text(value, name, place)
        if found := _RESERVED.search(sides[name] or ""):
            what = f"{show(found[0])} is a mark that the vocabulary reserves"
            place.refuse(name, what, f"write it otherwise, {SKIP}", "reserved-mark")
    extras = {}
    for name in ("domain", "document"):
        value = row.get(name)
        if value is not None and type(value) not in (str, int):
            what = f"expected a string, got {describe(value)}"
            place.refuse(name, what, f"write a string or leave it out, {SKIP}", "wrong-type")
        extras[name] = "" if value is None else str(value).strip()
    ko, en = sides["ko"], sides["en"]
    return None if ko is None or en is None or place.problems else TranslationPair(ko, en, **extras)


TRANSLATIONS = _TranslationKind("translations", parse_translation, ("jsonl", "tsv"), ("ko", "en"))


class CleaningSettings(Settings):
    """Which pairs teach nothing. All counts are in `Cleaned.dropped`."""

    max_length_ratio: float = Field(4.0, gt=1)
    """Longest English characters for one of Korean; Korean is written in fewer."""
    min_length_ratio: float = Field(0.5, gt=0)
    """Fewest English characters for one of Korean."""
    length_slack: int = Field(15, ge=0)
    """Characters by which either side may miss a ratio: short sentences vary more."""
    max_characters: int = Field(500, ge=1)
    """Longer texts are dropped."""
    min_hangul: float = Field(0.3, ge=0, le=1)
    """Least share of Hangul among the letters of the Korean side."""


@dataclass(slots=True)
class Cleaned:
    """What cleaning kept, and why it dropped the rest."""

    pairs: list[TranslationPair]
    dropped: Counter[str] = field(default_factory=Counter)


def clean(pairs: Iterable[TranslationPair], settings: CleaningSettings | None = None) -> Cleaned:
    """Drop pairs that teach nothing and count them by reason; the first of equal pairs is kept."""
    settings = settings or CleaningSettings()
    result, seen = Cleaned([]), set[tuple[str, str]]()
    for pair in pairs:
        folded = replace(pair, ko=fold_spaces(pair.ko), en=fold_spaces(pair.en))
        reason = _fault(folded, settings)
        key = (folded.ko, folded.en)
        if reason is None and key in seen:
            reason = "duplicate"
        if reason is not None:
            result.dropped[reason] += 1
            continue
        seen.add(key)
        result.pairs.append(folded)
    return result


def fold_spaces(text: str) -> str:
    """Return a text with one space for each run of white space and none at its ends."""
    return " ".join(text.split())


def _fault(pair: TranslationPair, settings: CleaningSettings) -> str | None:
    if not pair.ko or not pair.en:
        return "empty"
    if pair.ko == pair.en:
        return "identical-sides"
    if max(len(pair.ko), len(pair.en)) > settings.max_characters:
        return "too-long"
    letters = sum(character.isalpha() for character in pair.ko)
    if len(HANGUL.findall(pair.ko)) < max(settings.min_hangul * letters, 1) or mostly_hangul(pair.en):
        return "script"
    shortest = settings.min_length_ratio * len(pair.ko) - settings.length_slack
    longest = settings.max_length_ratio * len(pair.ko) + settings.length_slack
    return None if shortest <= len(pair.en) <= longest else "length-ratio"


@dataclass(frozen=True, slots=True)
class Split:
    """Pairs by what they are for."""

    train: list[TranslationPair]
    validation: list[TranslationPair]
    test: list[TranslationPair]
    dropped: Counter[str] = field(default_factory=Counter)
    """Pairs taken out because a text of theirs is judged elsewhere, by where."""


def split_by_document(pairs: Sequence[TranslationPair], *, seed: int, validation: float, test: float) -> Split:
    """Split pairs so that each document is on one side alone; the shares are expected ones, of documents.

    Raises `UserError` when a side stays empty.
    """
    parts: dict[str, list[TranslationPair]] = {"train": [], "validation": [], "test": []}
    for pair in pairs:
        key = f"document {pair.document}" if pair.document else f"text {normalise_for_overlap(pair.en)}"
        if held_out(key, seed=seed, share=test):
            parts["test"].append(pair)
        elif held_out(key, seed=seed + 1, share=validation / (1 - test)):
            parts["validation"].append(pair)
        else:
            parts["train"].append(pair)
    dropped: Counter[str] = Counter()
    judged = _texts(parts["test"])
    parts["validation"] = _without(parts["validation"], judged, "validation text stands in test", dropped)
    judged |= _texts(parts["validation"])
    parts["train"] = _without(parts["train"], judged, "training text is judged", dropped)
    for name, rows in parts.items():
        if not rows:
            raise UserError(
                f"data: {len(pairs):,} pairs leave none for {name}; give more pairs, or a larger share or a file for it"
            )
    return Split(parts["train"], parts["validation"], parts["test"], dropped)


def refuse_shared(split: Split) -> None:
    """Refuse documents, and texts with letters or digits, that stand on two sides (`UserError`)."""
    sides = {"training": split.train, "validation": split.validation, "test": split.test}
    names = list(sides)
    for number, first in enumerate(names):
        for second in names[number + 1 :]:
            for what, of in (("document", _documents), ("text", _texts)):
                shared = sorted(of(sides[first]) & of(sides[second]))
                if shared:
                    raise UserError(
                        f"data: {len(shared):,} {what}{'s' * (len(shared) > 1)} of {second} also stand in {first}, for "
                        f"example {show(shared[0])}; move each to one side"
                    )


def _documents(pairs: Iterable[TranslationPair]) -> set[str]:
    return {pair.document for pair in pairs if pair.document}


def _texts(pairs: Iterable[TranslationPair]) -> set[str]:
    """Return the texts as they are compared; Korean and English never meet, as they differ in script."""
    texts = {normalise_for_overlap(text) for pair in pairs for text in (pair.ko, pair.en)}
    return texts - {""}


def _without(
    pairs: list[TranslationPair], judged: set[str], reason: str, dropped: Counter[str]
) -> list[TranslationPair]:
    kept = [pair for pair in pairs if _texts([pair]).isdisjoint(judged)]
    if len(kept) < len(pairs):
        dropped[reason] += len(pairs) - len(kept)
    return kept


class DataSettings(Settings):
    """Where the pairs come from."""

    files: tuple[str, ...] = ()
    """TSV or JSONL pairs with ``ko`` and ``en``, and ``domain`` and ``document`` where known."""
    toy_pairs: int | None = Field(None, ge=200)
    """Instead of files: so many sentences of a generated toy language."""
    validation: tuple[str, ...] = ()
    """Files of validation pairs; a share of `files` when not given."""
    test: tuple[str, ...] = ()
    """Files of test pairs; a share of `files` when not given."""
    validation_share: float = Field(0.05, gt=0, lt=0.5)
    """Share of the documents."""
    test_share: float = Field(0.05, gt=0, lt=0.5)
    """Share of the documents."""
    root: Path | None = None
    """Folder that relative paths start from."""
    on_error: OnError = "stop"
    """What becomes of broken rows."""
    cleaning: CleaningSettings = CleaningSettings()


@dataclass(slots=True)
class TranslationData:
    """Everything a run reads."""

    split: Split
    dropped: Counter[str]
    log: ReadLog

    @property
    def statistics(self) -> dict[str, Any]:
        """Counts for ``data.json``."""
        sides = {"train": self.split.train, "validation": self.split.validation, "test": self.split.test}
        return {
            "read": self.log.to_json(),
            "dropped": dict(sorted(self.dropped.items())),
            **{
                name: {
                    "pairs": len(pairs),
                    "documents": len(_documents(pairs)) + sum(not pair.document for pair in pairs),
                    "domains": dict(sorted(Counter(pair.domain for pair in pairs).items())),
                }
                for name, pairs in sides.items()
            },
        }


def read_translation_data(settings: DataSettings, *, seed: int) -> TranslationData:
    """Read, clean and split.

    Args:
        settings: Files and shares.
        seed: Of the split.

    Returns:
        The pairs and what became of the others.

    Raises:
        DataError: If rows are broken.
        UserError: If there are no pairs, a side is empty, or documents or texts stand on two sides.
    """
    from soju.translation.toy import toy_pairs

    if bool(settings.files) == (settings.toy_pairs is not None):
        raise UserError("data: give files with sentence pairs, or toy_pairs; one of the two")
    log, dropped = ReadLog(), Counter[str]()

    def read(files: Sequence[str]) -> list[TranslationPair]:
        rows = list(read_rows(files, TRANSLATIONS, log=log, root=settings.root))
        if rows and not any(HANGUL.search(row.ko) for row in rows):
            raise UserError(f"{files[0]}: no Hangul in any Korean text; exchange the columns, or name the right file")
        found = clean(rows, settings.cleaning)
        dropped.update(found.dropped)
        return found.pairs

    pairs = toy_pairs(settings.toy_pairs, seed=seed) if settings.toy_pairs else read(settings.files)
    given = {name: read(files) for name in ("validation", "test") if (files := getattr(settings, name))}
    log.raise_if_broken(settings.on_error) if settings.files else None
    for name, found in {"files": pairs, **given}.items():
        if not found:
            raise DataError([]) if log.problems else UserError(f"data.{name}: no pair left after cleaning; see dropped")
    if len(given) == 2:
        split = Split(pairs, given["validation"], given["test"])
    elif given:
        raise UserError("data: validation and test go together; give files for both, or for neither")
    else:
        split = split_by_document(pairs, seed=seed, validation=settings.validation_share, test=settings.test_share)
        dropped.update(split.dropped)
    refuse_shared(split)
    return TranslationData(split, dropped, log)


def protect(source: str, target: str) -> tuple[str, str, list[str]]:
    """Put ``__p1__`` … on both sides for each string that stands on both: URLs, code, format fields and the like.

    Returns both texts and the strings, the first of them behind ``__p1__``.

    >>> protect("`ls`를 치세요", "Type `ls`")
    ('__p1__를 치세요', 'Type __p1__', ['`ls`'])
    """
    common = Counter(_PROTECTED.findall(source)) & Counter(_PROTECTED.findall(target))
    strings = list(dict.fromkeys(found for found in _PROTECTED.findall(source) if found in common))[:PLACEHOLDERS]
    return _put(source, strings), _put(target, strings), strings


def protect_source(source: str) -> tuple[str, list[str]]:
    """Put placeholders into a text that is to be translated; the strings are for `restore`."""
    strings = list(dict.fromkeys(_PROTECTED.findall(source)))[:PLACEHOLDERS]
    return _put(source, strings), strings


def _put(text: str, strings: Sequence[str]) -> str:
    numbers = {string: number for number, string in enumerate(strings, start=1)}
    return _PROTECTED.sub(lambda found: f"__p{numbers[found[0]]}__" if found[0] in numbers else found[0], text)


def restore(text: str, strings: Sequence[str]) -> tuple[str, int]:
    """Put the protected strings back into a translation.

    A placeholder that was never given out is removed.

    Args:
        text: What the model wrote.
        strings: What `protect_source` returned.

    Returns:
        The text, and how many of the strings it lost.
    """
    present = {int(number) for number in _PLACEHOLDER.findall(text)}

    def back(found: re.Match[str]) -> str:
        number = int(found[1])
        return strings[number - 1] if 1 <= number <= len(strings) else ""

    lost = sum(number not in present for number in range(1, len(strings) + 1))
    return _PLACEHOLDER.sub(back, text), lost

"""Term mappings and sentence pairs become training rows: token ids, the terms each text should activate, teacher texts.

Shape letters: B = texts in the batch, S = tokens of the longest, D = dimensions of the teacher, V = terms in the
vocabulary.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from soju.core.language import language_of
from soju.core.progress import track
from soju.data.rows import PairRow, TermRow
from soju.data.splits import normalise_for_overlap
from soju.sparse.initial import Vocabulary, padded
from soju.sparse.losses import RowTargets, TermTargets
from soju.sparse.terms.config import TermsConfig
from soju.teachers.cache import Embeddings

NO_TEACHER_TEXT = -1
_CHUNK = 4096

Weighted = list[tuple[int, float]]


@dataclass(frozen=True, slots=True)
class TextExample:
    """One text of a row: what the student reads, what it should activate, what the teacher reads."""

    text: str
    targets: RowTargets
    teacher_text: str | None
    """None leaves the text out of the distillation."""


@dataclass(slots=True)
class RowCounts:
    """What became of the rows, for the log and ``data.json``."""

    kept: int = 0
    texts: int = 0
    without_source: int = 0
    """Texts whose own tokens are all special or unknown; rejected."""
    without_target: int = 0
    """Term rows of which no target token is left; rejected."""
    banned: int = 0
    """Term rows of probe words, which are for display and must not be trained on."""
    with_english: int = 0
    """Texts with at least one English target."""
    korean_targets: int = 0
    english_targets: int = 0
    """Target tokens over all texts."""


class TermExamples:
    """Turns term mappings and pairs into examples over one vocabulary."""

    def __init__(self, vocabulary: Vocabulary, *, reads_translation: bool, both_directions: bool) -> None:
        self._vocabulary = vocabulary
        self._reads_translation = reads_translation
        self._both_directions = both_directions
        self.counts = RowCounts()

    def of_terms(self, rows: Sequence[TermRow], *, banned: Iterable[str] = ()) -> Iterator[list[TextExample]]:
        """Yield the texts of each usable head word; see the published rules in `splade_terms.md`."""
        stop = {normalise_for_overlap(word) for word in banned}
        for start in range(0, len(rows), _CHUNK):
            chunk = rows[start : start + _CHUNK]
            texts = [text for row in chunk for text in (row.ko, *(term.text.lower() for term in row.terms))]
            ids = iter(self._vocabulary.terms(texts))
            for row in chunk:
                own, of_terms = next(ids), [next(ids) for _ in row.terms]
                if normalise_for_overlap(row.ko) in stop:
                    self.counts.banned += 1
                    continue
                yield from self._counted(self._term_row(row, own, of_terms))

    def _term_row(self, row: TermRow, own: list[int], of_terms: list[list[int]]) -> list[TextExample]:
        korean: Weighted = []
        english: Weighted = []
        for term, ids in zip(row.terms, of_terms, strict=True):
            side = korean if language_of(term.text) == "ko" else english
            side += [(index, term.similarity) for index in ids]
        translations = [term.text for term in row.terms if language_of(term.text) != "ko"]
        if not own:
            self.counts.without_source += 1
            return []
        if not korean and not english:
            self.counts.without_target += 1
            return []
        english_text = ", ".join(translations) or None
        heard = english_text if self._reads_translation else row.ko
        examples = [TextExample(row.ko, RowTargets(own, korean, english), heard)]
        if self._both_directions and translations:
            best = next(ids for term, ids in zip(row.terms, of_terms, strict=True) if term.text == translations[0])
            if best:
                back = RowTargets(best, [(index, 1.0) for index in own], [])
                heard = translations[0]
                examples.append(TextExample(translations[0], back, heard))
        return examples

    def of_pairs(self, pairs: Sequence[PairRow]) -> Iterator[list[TextExample]]:
        """Yield both sides of each pair; each should activate the other's terms, rare ones most."""
        frequency: Counter[int] = Counter()
        sides: list[tuple[list[int], list[int]]] = []
        for start in range(0, len(pairs), _CHUNK):
            chunk = pairs[start : start + _CHUNK]
            ids = self._vocabulary.terms([text for pair in chunk for text in (pair.ko, pair.en)])
            sides += zip(ids[0::2], ids[1::2], strict=True)
        for korean, english in sides:
            frequency.update((*korean, *english))
        most = math.log1p(len(pairs))
        share = {term: math.log1p(len(pairs) / count) / most for term, count in frequency.items()}
        for pair, (korean, english) in zip(pairs, sides, strict=True):
            if not korean or not english:
                self.counts.without_source += 1
                continue
            in_korean = [(index, share[index]) for index in korean]
            in_english = [(index, share[index]) for index in english]
            heard = pair.en if self._reads_translation else pair.ko
            examples = [TextExample(pair.ko, RowTargets(korean, [], in_english), heard)]
            if self._both_directions:
                examples.append(TextExample(pair.en, RowTargets(english, in_korean, []), pair.en))
            yield from self._counted(examples)

    def _counted(self, examples: list[TextExample]) -> Iterator[list[TextExample]]:
        if not examples:
            return
        self.counts.kept += 1
        for example in examples:
            self.counts.texts += 1
            self.counts.with_english += bool(example.targets.english)
            self.counts.korean_targets += len({index for index, _ in example.targets.korean})
            self.counts.english_targets += len({index for index, _ in example.targets.english})
        yield examples


@dataclass(frozen=True, slots=True)
class TrainingRows:
    """All rows in memory. A row has one text or two, which always share a batch."""

    input_ids: list[list[list[int]]]
    targets: list[list[RowTargets]]
    teacher: list[list[int]]
    """Number of each text's vector, or `NO_TEACHER_TEXT`."""
    teacher_texts: list[str]
    """What the teacher must embed, each text once."""
    counts: RowCounts = field(default_factory=RowCounts)

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def lengths(self) -> list[int]:
        """Tokens of each row's texts together."""
        return [sum(map(len, row)) for row in self.input_ids]

    def texts_with_term(self, size: int) -> NDArray[np.int64]:
        """Count the texts that hold each term themselves, ``(V,)``."""
        counts_V = np.zeros(size, np.int64)
        for row in self.targets:
            for target in row:
                counts_V[list(target.source)] += 1
        return counts_V


def training_rows(
    terms: Sequence[TermRow],
    pairs: Sequence[PairRow],
    vocabulary: Vocabulary,
    config: TermsConfig,
    *,
    banned: Iterable[str] = (),
) -> TrainingRows:
    """Make the training rows of term mappings, and of sentence pairs when ``data.pairs_as_rows``.

    Head words that are `banned` are left out; the rows count what was kept and rejected.
    """
    reads_translation = config.teacher is not None and config.teacher.text == "translation"
    examples = TermExamples(
        vocabulary, reads_translation=reads_translation, both_directions=config.data.both_directions
    )
    made = list(track(examples.of_terms(terms, banned=banned), "term rows", total=len(terms)))
    if config.data.pairs_as_rows:
        made += track(examples.of_pairs(pairs), "pair rows", total=len(pairs))
    texts = [example.text for row in made for example in row]
    encoded = iter(vocabulary.input_ids(texts, max_length=config.student.max_length))
    number = {
        text: n for n, text in enumerate(dict.fromkeys(e.teacher_text for row in made for e in row if e.teacher_text))
    }
    return TrainingRows(
        input_ids=[[next(encoded) for _ in row] for row in made],
        targets=[[example.targets for example in row] for row in made],
        teacher=[[number.get(example.teacher_text or "", NO_TEACHER_TEXT) for example in row] for row in made],
        teacher_texts=list(number),
        counts=examples.counts,
    )


def partners(sizes: Sequence[int]) -> Tensor:
    """Return the place of each text's translation in a batch of rows of one or two texts, -1 for none.

    >>> partners([2, 1, 2]).tolist()
    [1, 0, -1, 4, 3]
    """
    places: list[int] = []
    for size in sizes:
        start = len(places)
        places += [start + 1, start] if size == 2 else [-1]
    return torch.tensor(places)


class TermsCollator:
    """Makes a batch of rows: padded tokens, targets, teacher vectors."""

    valid_label_columns = ("label",)

    def __init__(self, rows: TrainingRows, vectors: Embeddings | None, *, pad_id: int) -> None:
        self._rows = rows
        self._vectors = vectors
        self._pad_id = pad_id

    def __call__(self, batch: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Return ``text_input_ids`` and ``text_attention_mask`` ``(B, S)``, and the labels of `TermsLoss`."""
        rows = [item["row"] for item in batch]
        ids = [text for row in rows for text in self._rows.input_ids[row]]
        targets = TermTargets.from_rows([target for row in rows for target in self._rows.targets[row]])
        return {
            **padded(ids, pad_id=self._pad_id),
            "label": {
                "targets": targets,
                "partner": partners([len(self._rows.input_ids[row]) for row in rows]),
                **self._teacher([n for row in rows for n in self._rows.teacher[row]]),
            },
        }

    def _teacher(self, numbers: Sequence[int]) -> dict[str, Tensor]:
        if self._vectors is None:
            return {}
        heard = [place for place, number in enumerate(numbers) if number != NO_TEACHER_TEXT]
        vectors = self._vectors[np.array([numbers[place] for place in heard], np.int64)]
        return {"taught": torch.tensor(heard, dtype=torch.long), "teacher": torch.from_numpy(vectors)}

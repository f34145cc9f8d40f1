"""What mode ``terms`` teaches: rows made of term mappings and sentence pairs, judged by development words.

A row holds token ids, the terms each text should activate, and the texts the teacher embeds.

Shape letters: B = texts in the batch, S = tokens of the longest, D = dimensions of the teacher, V = terms in the
vocabulary.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from numpy.typing import NDArray
from scipy.sparse import csr_array
from sentence_transformers.base.evaluation import BaseEvaluator
from torch import Tensor

from soju.core.errors import UserError
from soju.core.files import append_json_line
from soju.core.language import language_of
from soju.core.progress import track
from soju.core.results import Score, Setting
from soju.data.rows import PairRow, TermRow
from soju.data.statistics import normalise_for_overlap
from soju.sparse.config import TermsConfig
from soju.sparse.data import TrainingData
from soju.sparse.initial import Vocabulary, padded, teacher_embeddings
from soju.sparse.losses import RowTargets, TermTargets
from soju.sparse.neural import Lesson
from soju.sparse.neural_encoders import spelled_pieces
from soju.sparse.static.encoder import readable_terms
from soju.sparse.term_activation import FUNCTION_WORDS, PROBES, evaluate_terms, expected_terms, probe_report
from soju.sparse.terms.losses import TermsLoss
from soju.teachers.dense import Embeddings
from soju.training.sampling import LengthBuckets

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


class TermsLesson(Lesson[TermsConfig]):
    """Head words and the terms they should activate; see `Lesson`."""

    losses = TermsLoss
    rows: TrainingRows
    vectors: Embeddings | None = None
    """What the teacher says of ``rows.teacher_texts``."""

    def __init__(self, config: TermsConfig, data: TrainingData, vocabulary: Vocabulary, folder: Path) -> None:
        super().__init__(config, data, vocabulary, folder)
        banned = [probe.source for probe in PROBES]
        self.rows = training_rows(data.terms, data.pairs, vocabulary, config, banned=banned)
        self.validation = Validation(data.dev_terms, vocabulary, folder / "probes.jsonl")

    def batches(self) -> int:
        """Return the batches of an epoch on one rank."""
        return -(-len(self.rows) // (self.config.training.batches[0] * PartialState().num_processes))

    def ask_teacher(self) -> None:
        """Embed what the teacher reads."""
        if self.dense_teacher is not None:
            self.vectors = teacher_embeddings(self.dense_teacher, self.rows.teacher_texts)

    def collator(self) -> TermsCollator:
        """Return what makes a batch."""
        return TermsCollator(self.rows, self.vectors, pad_id=self.pad_id)

    def sampler(self, data_order: int) -> LengthBuckets:
        """Return batches of similar lengths."""
        return LengthBuckets(self.rows.lengths, seed=self.config.seed + data_order)


CHOSEN_BY = "ko + 2 en"
"""The best checkpoint has the highest preservation.ko@50 + 2 × activation.en@50 on the development words."""


class Validation(BaseEvaluator):
    """Scores a student on development words and writes down what the probes activate.

    Args:
        rows: Development words, none of them trained on.
        vocabulary: The student's.
        probes: ``probes.jsonl`` of the run.

    Raises:
        UserError: If no development word has a term of one of the languages, so that nothing could be chosen by it.
    """

    def __init__(self, rows: Sequence[TermRow], vocabulary: Vocabulary, probes: Path) -> None:
        super().__init__()
        self.primary_metric = CHOSEN_BY
        self._words = [row.ko for row in rows]
        self._english, self._korean = expected_terms(rows, vocabulary.terms)
        for language, expected in (("English", self._english), ("Korean", self._korean)):
            if not any(expected):
                raise UserError(
                    f"data.dev_terms: none of the {len(rows):,} development words has a term in {language} that "
                    "the vocabulary can spell; set a larger share"
                )
        self._vocabulary = vocabulary
        self._probes = probes
        self._setting = Setting.of_texts(
            [f"{row.ko}\t{[term.text for term in row.terms]}" for row in rows], subject="student", test_set="dev terms"
        )

    def __call__(
        self, model: Any, output_path: str | None = None, epoch: float = -1, steps: int = -1, **_: Any
    ) -> dict[str, float]:
        """Return the metrics of the development words."""
        vectors = model.encode_sparse(self._words)
        terms = readable_terms(spelled_pieces(model.tokenizer, vectors.shape[1]))
        scores = evaluate_terms(
            vectors,
            english=self._english,
            korean=self._korean,
            vocabulary=terms,
            function_words=FUNCTION_WORDS,
            setting=self._setting,
        )
        found = {score.name: score.value for score in scores}
        found[CHOSEN_BY] = found["preservation.ko@50"] + 2 * found["activation.en@50"]
        self._watch_probes(model.encode_sparse([probe.source for probe in PROBES]), terms, epoch=epoch, step=steps)
        return {**found, "active_terms": vectors.nnz / len(self._words)}

    @property
    def chosen_by(self) -> str:
        """Name of the score that checkpoints are judged and chosen by."""
        return CHOSEN_BY

    def judged(self, value: float) -> Score:
        """Return the score that checkpoints are judged and chosen by."""
        return self._setting.score(CHOSEN_BY, value, unit="", higher_is_better=True, texts=len(self._words))

    def _watch_probes(self, vectors: csr_array, terms: Sequence[str], *, epoch: float, step: int) -> None:
        report = probe_report(vectors, self._vocabulary.terms, terms, function_words=FUNCTION_WORDS)
        if PartialState().is_main_process:
            append_json_line(self._probes, {"epoch": epoch, "step": step, **report})

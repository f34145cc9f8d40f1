"""What a run of recipe `embedding` learns from: reading, rows of a stage, batches.

Shape letters: N = vectors, D = dimensions, B = rows in the batch, S = tokens of the longest, T = its new tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from accelerate import PartialState
from numpy.typing import NDArray
from torch import Tensor

from soju.core.errors import UserError
from soju.data.log import ReadLog
from soju.data.readers import read_rows
from soju.data.rows import (
    DOCUMENTS,
    HIGHEST,
    INFERENCE,
    PAIRS,
    PASSAGES,
    SIMILARITY,
    Kind,
    PairRow,
    PassageRow,
    RowT,
    SimilarityPair,
)
from soju.data.statistics import RowStatistics, counted, held_out, normalise_for_overlap, refuse_overlap, spread
from soju.embedding.config import EmbeddingConfig, EmbeddingDataSettings, SupervisedSettings, UnsupervisedSettings
from soju.embedding.losses import last_old_positions
from soju.teachers.dense import SentenceTransformerTeacher, cached_embeddings


@dataclass(slots=True)
class EmbeddingData:
    """Everything a run learns from, and what the retention check watches."""

    korean: list[str]
    english: list[str]
    pairs: list[PairRow]
    stage_texts: dict[int, list[str]]
    """Korean texts of each training stage."""
    watched_korean: list[SimilarityPair]
    watched_english: list[SimilarityPair]
    labelled: list[tuple[str, str, float]]
    """Pairs of the supervised phase: a score in [0, 1], or 1 for entailment and 0 for contradiction."""
    log: ReadLog
    source_rows: dict[str, int] = field(default_factory=dict)
    """Rows read for training by source."""
    statistics: dict[str, Any] = field(default_factory=dict)
    """For ``data.json``."""


def read_embedding_data(config: EmbeddingConfig, *, measured: Sequence[str] = ()) -> EmbeddingData:
    """Read training texts, watched pairs and labelled pairs.

    Args:
        config: Settings of the run.
        measured: Texts that the run will be measured on; none of them may be trained on.

    Returns:
        All rows, checked.

    Raises:
        DataError: If rows are broken, all problems of all files listed at once.
        UserError: If measured or watched texts stand in the training data, or nothing is left to train on.
    """
    settings, log = config.data, ReadLog()
    reading = _Reading(settings, log)
    counts = {name: RowStatistics() for name in ("korean", "english", "pairs", "passages")}
    pairs = list(reading.rows(settings.pairs, PAIRS, counts["pairs"]))
    kept_out: list[PassageRow] = []
    for passage in reading.rows(settings.passages, PASSAGES, counts["passages"]):
        if held_out(passage.id, seed=config.seed, share=config.retention.held_out):
            kept_out.append(passage)
        else:
            pairs += [PairRow(passage.ko, passage.en), PairRow(passage.query_ko, passage.query_en)]
    english = [row.text for row in reading.rows(settings.english, DOCUMENTS, counts["english"])]
    korean = [row.text for row in reading.rows(settings.korean, DOCUMENTS, counts["korean"])]
    own = {
        stage: [row.text for row in reading.rows(of_stage.texts, DOCUMENTS)]
        for stage, of_stage in stage_settings(config).items()
    }
    watched = {side: list(reading.rows(getattr(config.retention, side), SIMILARITY)) for side in ("korean", "english")}
    watched["korean"] += _alike_or_not([(row.ko, row.query_ko) for row in kept_out])
    watched["english"] += _alike_or_not([(row.en, row.query_en) for row in kept_out])
    labelled = _labelled(config.supervised, reading)
    log.raise_if_broken(settings.on_error)
    data = EmbeddingData(
        korean=list(dict.fromkeys(korean or (pair.ko for pair in pairs))),
        english=list(dict.fromkeys([*english, *(pair.en for pair in pairs)])),
        pairs=pairs,
        stage_texts=own,
        watched_korean=spread(watched["korean"], config.retention.max_pairs),
        watched_english=spread(watched["english"], config.retention.max_pairs),
        labelled=labelled,
        log=log,
        source_rows=dict(reading.source_rows),
        statistics={name: count.to_json() for name, count in counts.items() if count.rows},
    )
    _keep_apart(data, config, measured)
    for stage, of_stage in stage_settings(config).items():
        texts = list(dict.fromkeys(own[stage])) if of_stage.texts else data.korean
        data.stage_texts[stage] = spread(texts, of_stage.max_texts or len(texts))
        if len(data.stage_texts[stage]) < 2:
            raise UserError(f"stage{stage}: fewer than two Korean texts are left; give more in data.korean")
    data.statistics |= {
        "korean_texts": len(data.korean),
        "english_texts": len(data.english),
        "stage_texts": {f"stage{stage}": len(texts) for stage, texts in data.stage_texts.items()},
        "watched_pairs": {"korean": len(data.watched_korean), "english": len(data.watched_english)},
        "labelled_pairs": len(data.labelled),
        "reading": log.to_json(),
    }
    return data


def stage_settings(config: EmbeddingConfig) -> dict[int, UnsupervisedSettings]:
    """Return the settings of the training stages that are to run, by number."""
    known: dict[int, UnsupervisedSettings] = {1: config.stage1, 2: config.stage2, 3: config.stage3}
    return {stage: known[stage] for stage in config.stages if stage in known}


class _Reading:
    """Rows of sources with the settings of the run, counted by source."""

    def __init__(self, settings: EmbeddingDataSettings, log: ReadLog) -> None:
        self._settings = settings
        self._log = log
        self.source_rows: dict[str, int] = {}

    def rows(self, sources: Iterable[str], kind: Kind[RowT], counts: RowStatistics | None = None) -> Iterator[RowT]:
        """Yield the good rows of the sources."""
        for source in sources:
            rows = read_rows(
                [source],
                kind,
                log=self._log,
                root=self._settings.root,
                max_line_bytes=self._settings.max_line_bytes,
            )
            for row in rows if counts is None else counted(rows, counts):
                self.source_rows[source] = self.source_rows.get(source, 0) + 1
                yield row


def _alike_or_not(texts: Sequence[tuple[str, str]]) -> list[SimilarityPair]:
    """Pair each passage with its own query, and with that of the next passage."""
    own = [SimilarityPair(passage, query, HIGHEST) for passage, query in texts]
    others = [SimilarityPair(texts[place - 1][0], query, 0.0) for place, (_, query) in enumerate(texts)]
    return [pair for both in zip(own, others, strict=True) for pair in both] if len(texts) > 1 else []


def _labelled(settings: SupervisedSettings | None, reading: _Reading) -> list[tuple[str, str, float]]:
    if settings is None:
        return []
    if settings.similarity:
        return [(row.first, row.second, row.score / HIGHEST) for row in reading.rows(settings.similarity, SIMILARITY)]
    kept = {"entailment": 1.0, "contradiction": 0.0}
    rows = reading.rows(settings.inference, INFERENCE)
    return [(row.premise, row.hypothesis, kept[row.label]) for row in rows if row.label in kept]


def _keep_apart(data: EmbeddingData, config: EmbeddingConfig, measured: Sequence[str]) -> None:
    """Leave out, or refuse, training texts that are measured or watched."""
    watched = [text for pair in (*data.watched_korean, *data.watched_english) for text in (pair.first, pair.second)]
    unseen = {normalise_for_overlap(text) for text in (*measured, *watched)} - {""}

    def seen(*texts: str) -> bool:
        return any(normalise_for_overlap(text) in unseen for text in texts)

    if config.data.drop_overlap:
        before = _sizes(data)
        data.korean = [text for text in data.korean if not seen(text)]
        data.english = [text for text in data.english if not seen(text)]
        data.pairs = [pair for pair in data.pairs if not seen(pair.ko, pair.en)]
        data.labelled = [row for row in data.labelled if not seen(row[0], row[1])]
        for texts in data.stage_texts.values():
            texts[:] = [text for text in texts if not seen(text)]
        data.statistics["left_out_for_overlap"] = {
            name: count - _sizes(data)[name] for name, count in before.items() if count > _sizes(data)[name]
        }
    for name, texts in (("evaluation", list(measured)), ("retention", watched)):
        refuse_overlap(_training_texts(data), texts, evaluation=name)


def _sizes(data: EmbeddingData) -> dict[str, int]:
    sizes = {name: len(getattr(data, name)) for name in ("korean", "english", "pairs", "labelled")}
    return sizes | {f"stage{stage}": len(texts) for stage, texts in data.stage_texts.items()}


def _training_texts(data: EmbeddingData) -> Iterable[str]:
    yield from data.korean
    yield from data.english
    for pair in data.pairs:
        yield from (pair.ko, pair.en)
    for texts in data.stage_texts.values():
        yield from texts
    for first, second, _ in data.labelled:
        yield from (first, second)


Encode = Callable[[Sequence[str]], list[list[int]]]
"""Token ids of texts, cut and with what ends a text."""


class Rows(Protocol):
    """What a stage learns from, by place."""

    def __len__(self) -> int: ...

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Characters of each row: rows of a batch should be of similar length."""

    def texts_at(self, places: Sequence[int]) -> list[str]:
        """Return the texts of a batch."""

    def labels_at(self, places: Sequence[int]) -> dict[str, Tensor]:
        """Return what the loss compares them with."""


@dataclass(frozen=True, slots=True)
class TextRows:
    """Texts to train on; some have a vector to be pulled to."""

    texts: Sequence[str]
    targets_ND: NDArray[np.float32] | None = None
    """Vectors of length 1."""
    target_of: NDArray[np.int64] | None = None
    """For each text its row in `targets_ND`; -1 for none. All texts in order when not given."""

    def __len__(self) -> int:
        return len(self.texts)

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Characters of each text."""
        return np.array([len(text) for text in self.texts], np.int64)

    def texts_at(self, places: Sequence[int]) -> list[str]:
        """Return the texts, B of them."""
        return [self.texts[place] for place in places]

    def labels_at(self, places: Sequence[int]) -> dict[str, Tensor]:
        """Return ``target`` ``(B, D)`` and ``has_target`` ``(B,)``; nothing where no text has a target."""
        if self.targets_ND is None:
            return {}
        numbers = np.array(places) if self.target_of is None else self.target_of[list(places)]
        return {
            "target": torch.from_numpy(np.asarray(self.targets_ND[numbers.clip(min=0)])),
            "has_target": torch.from_numpy(numbers >= 0),
        }


@dataclass(frozen=True, slots=True)
class LabelledPairs:
    """Pairs of texts with a number: a score in [0, 1], or 1 for entailment and 0 for contradiction."""

    firsts: Sequence[str]
    seconds: Sequence[str]
    labels: Sequence[float]

    def __len__(self) -> int:
        return len(self.firsts)

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Characters of both texts."""
        return np.array([len(a) + len(b) for a, b in zip(self.firsts, self.seconds, strict=True)], np.int64)

    def texts_at(self, places: Sequence[int]) -> list[str]:
        """Return the first texts, then the second ones, 2 B in all."""
        return [side[place] for side in (self.firsts, self.seconds) for place in places]

    def labels_at(self, places: Sequence[int]) -> dict[str, Tensor]:
        """Return ``score`` ``(B,)``."""
        return {"score": torch.tensor([self.labels[place] for place in places])}


def pad(ids: Sequence[Sequence[int]], *, pad_id: int, left: bool) -> dict[str, Tensor]:
    """Return ``input_ids`` and ``attention_mask``, ``(B, S)``.

    >>> pad([[5, 6], [7]], pad_id=0, left=True)["input_ids"].tolist()
    [[5, 6], [0, 7]]
    """
    input_ids = torch.full((len(ids), max(map(len, ids))), pad_id, dtype=torch.long)
    mask = torch.zeros_like(input_ids)
    for place, text in enumerate(ids):
        columns = slice(-len(text), None) if left else slice(0, len(text))
        input_ids[place, columns] = torch.tensor(text)
        mask[place, columns] = 1
    return {"input_ids": input_ids, "attention_mask": mask}


class Collator:
    """Makes a batch of rows: padded tokens, labels, and the old tokens below new ones for self-distillation.

    Args:
        rows: The rows.
        model: Whose tokenizer and prompt are used.
        max_length: Tokens after which a text is cut; the model's own limit when not given.
        decompositions: Old ids of a new id, for self-distillation.
    """

    valid_label_columns = ("label",)

    def __init__(
        self,
        rows: Rows,
        model: Any,
        *,
        max_length: int | None = None,
        decompositions: Callable[[int], Sequence[int]] | None = None,
    ) -> None:
        self._rows = rows
        self._encode = encoder_of(model, max_length=max_length)
        self._pad_id: int = model.tokenizer.pad_token_id
        self._left = model.tokenizer.padding_side == "left"
        self._decompositions = decompositions

    def __call__(self, batch: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Return ``text_input_ids`` and ``text_attention_mask`` ``(B, S)``, and ``label``."""
        places = [int(item["row"]) for item in batch]
        ids = self._encode(self._rows.texts_at(places))
        label = self._rows.labels_at(places) | self._alignment(ids)
        padded = pad(ids, pad_id=self._pad_id, left=self._left)
        return {**{f"text_{name}": value for name, value in padded.items()}, "label": label}

    def _alignment(self, ids: list[list[int]]) -> dict[str, Tensor]:
        """Pad the old tokens and say where the last old token of each new one lies; see `last_old_positions`."""
        if self._decompositions is None:
            return {}
        pieces = [[self._decompositions(token) for token in text] for text in ids]
        old = pad(
            [[piece for token in text for piece in token] for text in pieces], pad_id=self._pad_id, left=self._left
        )
        counts = pad([[len(token) for token in text] for text in pieces], pad_id=0, left=self._left)
        first_B = old["attention_mask"].argmax(dim=1)
        return {
            "old_input_ids": old["input_ids"],
            "old_attention_mask": old["attention_mask"],
            "last_old_BT": last_old_positions(counts["input_ids"], start_B=first_B),
        }


def encoder_of(model: Any, *, max_length: int | None) -> Encode:
    """Return the tokenizer of a sentence-transformers model with its own prompt, as a function of texts."""
    tokenizer = model.tokenizer
    prompt = (model.prompts or {}).get(model.default_prompt_name or "", "")
    length = min(max_length or model.max_seq_length, model.max_seq_length or 512)

    def encode(texts: Sequence[str]) -> list[list[int]]:
        ids: list[list[int]] = tokenizer(
            [prompt + text for text in texts], truncation=True, max_length=length, padding=False
        )["input_ids"]
        return ids

    return encode


CACHE = "anchor-vectors"
"""Folder below ``training`` that keeps the vectors."""


def anchored_rows(
    texts: Sequence[str], pairs: Sequence[PairRow], base: Path, *, weight: float, cache: Path
) -> TextRows:
    """Return the texts of a stage, and behind them Korean sides to pull to the base's vectors of their English sides.

    A `weight` of 0 reads no pairs. `cache` is a folder that keeps vectors by content.
    """
    if not weight or not pairs:
        return TextRows(list(texts))
    english = list(dict.fromkeys(pair.en for pair in pairs))
    with PartialState().main_process_first():
        vectors_ND = np.asarray(cached_embeddings(SentenceTransformerTeacher(str(base)), english, cache), np.float32)
    place = {text: number for number, text in enumerate(english)}
    target_of = [-1] * len(texts) + [place[pair.en] for pair in pairs]
    return TextRows([*texts, *(pair.ko for pair in pairs)], vectors_ND, np.array(target_of, np.int64))

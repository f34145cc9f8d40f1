"""Translation quality from integer statistics a sentence: BLEU, chrF++, TER, ROUGE and their weighted mean.

A corpus score is a function of sums over its sentences, so the scores of every subset and every bootstrap draw come
from one matrix product; see `soju.evaluation.translation_bootstrap`. Shape letters: N = sentences, K = counts,
A = additive columns, D = draws.
"""

from __future__ import annotations

import stat
import zipfile
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray
from pydantic import Field, model_validator

from soju.core.config import Settings
from soju.core.errors import ConfigError, IntegrityError, UserError, require_extra
from soju.core.files import atomic_writer
from soju.core.language import shared_kiwi

Floats = NDArray[np.float64]

BLEU_ORDER, CHARACTERS, WORDS = 4, 6, 2
"""Longest n-grams: of tokens in BLEU, of characters and of words in chrF++ (``nc:6 nw:2``)."""
COUNTS = (
    *("hypothesis_tokens", "reference_tokens"),
    *(f"bleu_{what}_{n}" for what in ("match", "total") for n in range(1, BLEU_ORDER + 1)),
    *(f"chrf_{what}_{n}" for n in range(1, CHARACTERS + WORDS + 1) for what in ("hypothesis", "reference", "match")),
    *("ter_edits", "ter_reference"),
    *(f"rouge_{n}_{what}" for n in (1, 2) for what in ("match", "hypothesis", "reference")),
    *("rouge_l_match", "hypothesis_characters", "reference_characters"),
)
"""The K integers kept a sentence. Characters are those that are not spaces."""
_ROUGE = ("rouge-1", "rouge-2", "rouge-l")
_PUNCTUATION = frozenset("!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~")
_MOST_BYTES = 1 << 28
_FILE_FORMAT = "soju-translation-statistics-1"


@dataclass(frozen=True, slots=True)
class Tokens:
    """How a text becomes tokens. BLEU, TER and ROUGE of one run read the same ones."""

    name: str
    """Goes into the signature, with the versions that decide the result."""
    split: Callable[[str], list[str]]


@cache
def english_tokens() -> Tokens:
    """Return the tokens of ``mteval-v13a``, sacrebleu's default."""
    require_extra("translation scores", "translation", "sacrebleu")
    tokenize: Callable[[str], str] = import_module("sacrebleu.tokenizers.tokenizer_13a").Tokenizer13a()
    return Tokens("13a", lambda text: tokenize(text.rstrip()).split())


@cache
def korean_tokens(kind: Literal["auto", "ko-mecab", "kiwi"] = "auto") -> Tokens:
    """Return morphemes of Korean text.

    Args:
        kind: ``ko-mecab`` is sacrebleu's own and comparable with published scores; ``kiwi`` needs no further package;
            ``auto`` takes ko-mecab where it is installed.

    Returns:
        The tokens; their name says which analyser made them.

    Raises:
        ConfigError: If ko-mecab is asked for and not installed.
    """
    if kind != "kiwi":
        try:
            tokenize = import_module("sacrebleu.tokenizers.tokenizer_ko_mecab").TokenizerKoMecab()
        except RuntimeError:
            if kind == "ko-mecab":
                raise ConfigError(
                    "Korean tokens: ko-mecab is not installed; run: pip install 'sacrebleu[ko]'"
                ) from None
        else:
            return Tokens(tokenize.signature(), lambda text: tokenize(text).split())
    kiwi = shared_kiwi()
    return Tokens(
        f"kiwi-{version('kiwipiepy')}",
        lambda text: [piece for token in kiwi.tokenize(text) for piece in token.form.split()],
    )


class QualityWeights(Settings):
    """Share of each metric, as a fraction in [0, 1], in the quality of a translation. They add up to 1."""

    chrf: float = Field(0.4, ge=0, le=1)
    """chrF++."""
    bleu: float = Field(0.3, ge=0, le=1)
    """BLEU."""
    ter: float = Field(0.2, ge=0, le=1)
    """1 − TER, at least 0."""
    rouge_l: float = Field(0.1, ge=0, le=1)
    """Mean ROUGE-L F1 of the sentences."""
    bertscore: float = Field(0.0, ge=0, le=1)
    """Mean BERTScore F1, which must then be given to `measure`."""
    comet: float = Field(0.0, ge=0, le=1)
    """Mean COMET, which must then be given to `measure`."""

    @model_validator(mode="after")
    def _adds_up(self) -> Self:
        total = sum(self.by_metric.values())
        if abs(total - 1) > 1e-9:
            raise ValueError(f"the weights add up to {total:.6g}; make them add up to 1")
        return self

    @cached_property
    def by_metric(self) -> dict[str, float]:
        """Name of the metric, as in `SentenceStatistics.scores`, -> weight."""
        names = {"chrf": "chrf++", "ter": "1-ter", "rouge_l": "rouge-l"}
        return {names.get(field, field): float(getattr(self, field)) for field in type(self).model_fields}

    @property
    def signature(self) -> str:
        """The weights above 0, sorted by metric."""
        return ",".join(f"{metric}={weight:g}" for metric, weight in sorted(self.by_metric.items()) if weight)


@dataclass(frozen=True, slots=True, eq=False)
class SentenceStatistics:
    """What the scores of one system in one direction are made of. Made by `measure`."""

    counts_NK: NDArray[np.int32]
    """`COUNTS` of each sentence."""
    given: Mapping[str, Floats]
    """Further metrics by name, one fraction in [0, 1] a sentence; their corpus score is the mean."""
    signature: str
    """Everything that decides the scores except the texts and the weights."""

    def __len__(self) -> int:
        return len(self.counts_NK)

    def subset(self, sentences: ArrayLike) -> SentenceStatistics:
        """Return the statistics of these sentences, by position or by truth value, for example those of one domain."""
        chosen = np.asarray(sentences)
        given = {name: values[chosen] for name, values in self.given.items()}
        return SentenceStatistics(self.counts_NK[chosen], given, self.signature)

    def scores(self, weights: QualityWeights | None = None) -> dict[str, float]:
        """Return the corpus scores, all fractions with higher better, but for ``length-ratio``.

        Args:
            weights: Those of ``quality``; the defaults of `QualityWeights` when not given.

        Returns:
            Metric -> value. ``1-ter`` is at least 0, ``length-ratio`` is characters over those of the reference.

        Raises:
            ConfigError: If a metric with a weight was not measured.
            UserError: If there is no sentence.
        """
        if not len(self):
            raise UserError("translation scores: no sentence; give at least one")
        values = corpus_scores(self.additive_NA.sum(axis=0, keepdims=True), tuple(self.given), weights)
        return {name: float(value_D[0]) for name, value_D in values.items()}

    def sentence_quality(self, weights: QualityWeights | None = None) -> Floats:
        """Return the quality of each sentence alone, ``(N,)``, to find examples by; their mean is not the corpus's."""
        return corpus_scores(self.additive_NA, tuple(self.given), weights)["quality"]

    @property
    def additive_NA(self) -> Floats:
        """What may be added up over sentences: the counts, a one, ROUGE F1, then what was given."""
        f1 = [self._rouge_f1(metric) for metric in _ROUGE]
        columns = [np.ones(len(self)), *f1, *self.given.values()]
        return np.concatenate([self.counts_NK.astype(np.float64), np.stack(columns, axis=1)], axis=1)

    def _rouge_f1(self, metric: str) -> Floats:
        key = metric.replace("-", "_")
        lengths = "rouge_1" if metric == "rouge-l" else key
        match_N, ours_N, theirs_N = (
            self.counts_NK[:, COUNTS.index(name)].astype(np.float64)
            for name in (f"{key}_match", f"{lengths}_hypothesis", f"{lengths}_reference")
        )
        return 2 * match_N / np.maximum(ours_N + theirs_N, 1)

    def save(self, path: Path) -> None:
        """Write an ``.npz`` without pickles; equal statistics give equal bytes."""
        arrays: dict[str, Any] = {f"given_{name}": values for name, values in self.given.items()}
        with atomic_writer(path, encoding=None) as file:
            np.savez(
                file, format=np.array(_FILE_FORMAT), signature=np.array(self.signature), counts=self.counts_NK, **arrays
            )

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read what `save` wrote.

        Args:
            path: An ``.npz`` file.

        Returns:
            The statistics.

        Raises:
            IntegrityError: If the file is not there, is a link, is too large or holds anything else.
        """
        try:
            arrays = _read_arrays(path)
            if str(arrays.pop("format")) != _FILE_FORMAT:
                raise ValueError("another format")
            signature, counts_NK = str(arrays.pop("signature")), arrays.pop("counts")
            _check_counts(counts_NK)
            given = {name.removeprefix("given_"): _fractions(name, arrays[name], len(counts_NK)) for name in arrays}
        except (OSError, ValueError, KeyError, EOFError, UserError, zipfile.BadZipFile) as error:
            raise IntegrityError(f"{path}: no translation statistics ({error}); validate that step again") from None
        return cls(counts_NK, given, signature)


def measure(
    hypotheses: Sequence[str],
    references: Sequence[str],
    tokens: Tokens,
    *,
    given: Mapping[str, ArrayLike] | None = None,
) -> SentenceStatistics:
    """Count what the scores of one system in one direction need.

    BLEU keeps the case; TER and ROUGE fold it. chrF++ reads the raw text.

    Args:
        hypotheses: Translations, ``(N,)``; an empty one counts as written.
        references: ``(N,)``.
        tokens: Those of the target language.
        given: Scores that other tools made, for example ``bertscore``: fractions in [0, 1], one a sentence.

    Returns:
        The statistics.

    Raises:
        UserError: If the numbers of texts differ or a given score is no fraction.
    """
    if len(hypotheses) != len(references):
        raise UserError(f"{len(hypotheses):,} hypotheses for {len(references):,} references; give one each")
    require_extra("translation scores", "translation", "sacrebleu")
    sacrebleu = import_module("sacrebleu")
    ter = import_module("sacrebleu.metrics.ter").TER()
    rows = [_count(*pair, tokens, ter) for pair in zip(hypotheses, references, strict=True)]
    counts_NK = np.array(rows, dtype=np.int32).reshape(-1, len(COUNTS))
    checked = {name: _fractions(name, values, len(counts_NK)) for name, values in (given or {}).items()}
    signature = (
        f"bleu:case.mixed,smooth.exp,order.{BLEU_ORDER}|chrf++:nc.{CHARACTERS},nw.{WORDS},space.no|rouge:case.lower|"
        f"ter:case.lower|tokens:{tokens.name}|version:sacrebleu-{sacrebleu.__version__}"
    )
    return SentenceStatistics(counts_NK, checked, signature)


def _count(hypothesis: str, reference: str, tokens: Tokens, ter: Any) -> list[int]:
    ours, theirs = tokens.split(hypothesis), tokens.split(reference)
    bleu = [_overlap(_ngrams(ours, n), _ngrams(theirs, n)) for n in range(1, BLEU_ORDER + 1)]
    lower, lower_theirs = [token.lower() for token in ours], [token.lower() for token in theirs]
    edits = ter.sentence_score(" ".join(lower), [" ".join(lower_theirs)])
    rouge = [_overlap(_ngrams(lower, n), _ngrams(lower_theirs, n)) for n in (1, 2)]
    characters, characters_theirs = "".join(hypothesis.split()), "".join(reference.split())
    return [
        *(len(ours), len(theirs)),
        *(match for match, _, _ in bleu),
        *(total for _, total, _ in bleu),
        *_chrf_counts(hypothesis, reference, characters, characters_theirs),
        *(int(edits.num_edits), int(edits.ref_length)),
        *(number for counts in rouge for number in counts),
        *(longest_common_subsequence(lower, lower_theirs), len(characters), len(characters_theirs)),
    ]


def _ngrams(tokens: Sequence[str], n: int) -> Counter[tuple[str, ...]]:
    return Counter(zip(*(tokens[start:] for start in range(n)), strict=False))


def _overlap(ours: Counter[Any], theirs: Counter[Any]) -> tuple[int, int, int]:
    """Return matches, size of ours, size of theirs."""
    match = sum(min(count, theirs[ngram]) for ngram, count in ours.items() if ngram in theirs)
    return match, ours.total(), theirs.total()


def _chrf_counts(hypothesis: str, reference: str, characters: str, characters_theirs: str) -> Iterable[int]:
    words, words_theirs = _chrf_words(hypothesis), _chrf_words(reference)
    for n in range(1, CHARACTERS + WORDS + 1):
        if n <= CHARACTERS:
            pair = [
                Counter(text[i : i + n] for i in range(len(text) - n + 1)) for text in (characters, characters_theirs)
            ]
            match, ours, theirs = _overlap(*pair)
        else:
            match, ours, theirs = _overlap(_ngrams(words, n - CHARACTERS), _ngrams(words_theirs, n - CHARACTERS))
        # An order that the reference is too short for does not count against the precision.
        yield from (ours if theirs else 0, theirs, match)


def _chrf_words(text: str) -> list[str]:
    """Split off one punctuation mark a word: the last, else the first, as chrF++ does."""
    words: list[str] = []
    for word in text.split():
        if len(word) > 1 and word[-1] in _PUNCTUATION:
            words += [word[:-1], word[-1]]
        elif len(word) > 1 and word[0] in _PUNCTUATION:
            words += [word[0], word[1:]]
        else:
            words.append(word)
    return words


def longest_common_subsequence(ours: Sequence[Hashable], theirs: Sequence[Hashable]) -> int:
    """Return the length of the longest common subsequence, 64 tokens of `ours` a machine step.

    Bit i of `rows` is 0 where the length grows at token i; the addition carries a match up to the next growing place.

    References:
        Hyyrö 2004, "Bit-parallel LCS-length computation revisited".
    """
    places: dict[Hashable, int] = {}
    for index, token in enumerate(ours):
        places[token] = places.get(token, 0) | 1 << index
    all_ones = (1 << len(ours)) - 1
    rows = all_ones
    for token in theirs:
        matches = rows & places.get(token, 0)
        rows = ((rows + matches) | (rows - matches)) & all_ones
    return len(ours) - rows.bit_count()


def corpus_scores(sums_DA: Floats, given: Sequence[str], weights: QualityWeights | None) -> dict[str, Floats]:
    """Turn sums over sentences of `SentenceStatistics.additive_NA`, one row a draw, into corpus scores.

    Args:
        sums_DA: ``(D, A)``.
        given: Names of the metrics that other tools made, in their order.
        weights: Those of ``quality``.

    Returns:
        Metric -> ``(D,)``; see `SentenceStatistics.scores`.

    Raises:
        ConfigError: If a metric with a weight was not measured.
    """
    column = {name: sums_DA[:, index] for index, name in enumerate((*COUNTS, "sentences", *_ROUGE, *given))}
    scores = {
        "bleu": _bleu(column),
        "chrf++": _chrf(column),
        "1-ter": np.maximum(0.0, 1 - _ter(column)),
        **{name: column[name] / column["sentences"] for name in (*_ROUGE, *given)},
    }
    parts = (weights or QualityWeights()).by_metric
    if missing := [name for name, weight in parts.items() if weight and name not in scores]:
        raise ConfigError(
            f"quality: {missing[0]} has weight {parts[missing[0]]:g} and was not measured; set it up, or weight "
            "other metrics"
        )
    quality = sum((weight * scores[name] for name, weight in parts.items() if weight), np.zeros(len(sums_DA)))
    ratio = column["hypothesis_characters"] / np.maximum(column["reference_characters"], 1)
    return {"quality": quality, **scores, "length-ratio": ratio}


def _bleu(column: Mapping[str, Floats]) -> Floats:
    ours, theirs = column["hypothesis_tokens"], column["reference_tokens"]
    halvings = np.ones_like(ours)  # exponential smoothing: the k-th order without a match counts 2 ** -k matches
    logarithms = np.zeros_like(ours)
    any_match = np.zeros(len(ours), dtype=bool)
    for n in range(1, BLEU_ORDER + 1):
        match, total = column[f"bleu_match_{n}"], column[f"bleu_total_{n}"]
        any_match |= match > 0
        halvings = np.where(match > 0, halvings, halvings / 2)
        precision = np.where(match > 0, match, halvings) / np.maximum(total, 1)
        logarithms += np.where(total > 0, np.log(precision), -np.inf)  # too short for this order: BLEU is 0
    penalty = np.exp(np.minimum(0.0, 1 - theirs / np.maximum(ours, 1)))
    return np.where(any_match, penalty * np.exp(logarithms / BLEU_ORDER), 0.0)


def _chrf(column: Mapping[str, Floats]) -> Floats:
    precision, recall, orders = (np.zeros_like(column["sentences"]) for _ in range(3))
    for n in range(1, CHARACTERS + WORDS + 1):
        ours, theirs, match = (column[f"chrf_{what}_{n}"] for what in ("hypothesis", "reference", "match"))
        usable = (ours > 0) & (theirs > 0)
        precision += np.where(usable, match / np.maximum(ours, 1), 0)
        recall += np.where(usable, match / np.maximum(theirs, 1), 0)
        orders += usable
    precision, recall = precision / np.maximum(orders, 1), recall / np.maximum(orders, 1)
    below = 4 * precision + recall  # beta 2: recall counts twice as much
    return np.where(below > 0, 5 * precision * recall / np.where(below > 0, below, 1), 0.0)


def _ter(column: Mapping[str, Floats]) -> Floats:
    edits, length = column["ter_edits"], column["ter_reference"]
    return np.where(length > 0, edits / np.maximum(length, 1), np.where(edits > 0, 1.0, 0.0))


def _fractions(name: str, values: ArrayLike, sentences: int) -> Floats:
    array = np.asarray(values, dtype=np.float64)
    if array.shape != (sentences,) or not bool(((array >= 0) & (array <= 1)).all()):
        raise UserError(
            f"{name}: {sentences:,} fractions between 0 and 1 were expected, one a sentence; measure it again"
        )
    return array


def _read_arrays(path: Path) -> dict[str, Any]:
    if not stat.S_ISREG(path.lstat().st_mode):
        raise ValueError("not a regular file")
    with zipfile.ZipFile(path) as archive:
        if sum(member.file_size for member in archive.infolist()) > _MOST_BYTES:
            raise ValueError(f"more than {_MOST_BYTES:,} bytes")
    with np.load(path, allow_pickle=False) as file:
        return {name: file[name] for name in file.files}


def _check_counts(counts_NK: Any) -> None:
    if counts_NK.dtype != np.int32 or counts_NK.ndim != 2 or counts_NK.shape[1] != len(COUNTS):
        raise ValueError(f"counts are {counts_NK.dtype} {counts_NK.shape}, not int32 (N, {len(COUNTS)})")
    if (counts_NK < 0).any():
        raise ValueError("a count is negative")

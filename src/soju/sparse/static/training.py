"""Distil sentence pairs and a term list into a static encoder. Works on objects; nothing is read or written here."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array, diags_array
from tokenizers import Tokenizer

from soju.alignment.bitext import Bitext, average, dictionary_table, expansion_weights, make_bitext, mix, prune_by_mass
from soju.alignment.ibm1 import TranslationTable, train_ibm1
from soju.core.errors import UserError
from soju.core.language import language_of
from soju.core.progress import track
from soju.data.rows import PairRow, TermRow
from soju.search.lexical import ENGLISH_STOP_WORDS
from soju.sparse.config import AlignmentSettings, ExpansionSettings, StaticConfig, StaticSettings, TokenizerSettings
from soju.sparse.static.encoder import StaticEncoder
from soju.sparse.static.lexicon import (
    LexiconCounts,
    PieceReadings,
    Stretch,
    analyse,
    build_tokenizer,
    canonical_terms,
    strongest_terms,
)

Ids = NDArray[np.int32]


@dataclass(slots=True)
class TrainingLog:
    """What happened on the way, for the report."""

    seconds: dict[str, float] = field(default_factory=dict)
    """Wall time of each step."""
    log_likelihood: dict[str, list[float]] = field(default_factory=lambda: {"ko-en": [], "en-ko": []})
    """Mean log-likelihood per target token in nats, before each iteration, per direction."""
    counts: dict[str, int] = field(default_factory=dict)
    """Pieces, token pairs, weights."""


def train_static(
    pairs: Sequence[PairRow],
    terms: Sequence[TermRow] = (),
    config: StaticConfig | StaticSettings | None = None,
    *,
    log: TrainingLog | None = None,
    workers: int = 2,
    analysed: Sequence[list[Stretch]] | None = None,
) -> StaticEncoder:
    """Distil sentence pairs and a term list into a static encoder, on the CPU; nothing is read or written.

    Args:
        pairs: Sentence pairs, at least one.
        terms: Korean head words with English translations; it may be empty.
        config: Tokenizer, alignment and expansion; the defaults when ``None``.
        log: Filled with times in seconds, likelihoods in nats and counts.
        workers: Threads of the Korean analyser.
        analysed: What the analyser sees in `texts_to_analyse`, when that is known already.

    Returns:
        The encoder. The same rows in the same order give the same encoder.

    Raises:
        UserError: If there is no sentence pair.

    Example:
        >>> import soju
        >>> pairs = [soju.PairRow("물을 마신다", "drinks water"), soju.PairRow("물이 끓는다", "water boils")]
        >>> terms = [soju.TermRow("물", (soju.Term("water", similarity=1.0),))]
        >>> config = soju.sparse.StaticSettings(tokenizer={"min_count": 1, "sub_words": 500})
        >>> encoder = soju.sparse.train_static(pairs, terms, config)
        >>> isinstance(encoder, soju.sparse.StaticEncoder), encoder.encode_queries(["물"]).shape[0]
        (True, 1)
        >>> index = soju.Index.build(["cold water", "a house"], encoder, folder / "water")
        >>> [hit.passage for hit in index.search("물")]
        ['cold water']
    """
    if not pairs:
        raise UserError("no sentence pair to train on; give at least one")
    config = config or StaticSettings()
    log = log if log is not None else TrainingLog()

    # 1. Let the analyser read Korean text once; its knowledge goes into the tokenizer.
    with _timed(log, "analyse"):
        korean, heads_from = texts_to_analyse(pairs, terms, config.tokenizer)
        if analysed is None:
            analysed = list(track(analyse(korean, workers=workers), "analyse", total=len(korean)))

    # 2. A tokenizer whose pieces are words, and the matrix from pieces to terms.
    with _timed(log, "tokenizer"):
        counts = _count(korean, analysed, pairs, terms, heads_from=heads_from)
        tokenizer = build_tokenizer(counts, min_count=config.tokenizer.min_count, sub_words=config.tokenizer.sub_words)
        readings = PieceReadings(tokenizer.get_vocab())
        for encoding, stretches in zip(tokenizer.encode_batch(korean, add_special_tokens=False), analysed, strict=True):
            readings.add(encoding.ids, encoding.offsets, stretches)
        canonical = canonical_terms(
            tokenizer.get_vocab(),
            readings,
            counts.latin,
            sub_word_weight=config.tokenizer.sub_word_weight,
            function_words=ENGLISH_STOP_WORDS,
            function_word_weight=config.tokenizer.function_word_weight,
        )

    # 3. Align both directions over pairs and terms, and average what they say.
    with _timed(log, "alignment"):
        term_of = strongest_terms(canonical)
        sides = list(
            zip(
                _encode_terms(tokenizer, term_of, [pair.ko for pair in pairs]),
                _encode_terms(tokenizer, term_of, [pair.en for pair in pairs]),
                strict=True,
            )
        )
        entries = _entries(terms, tokenizer, term_of)
        size = tokenizer.get_vocab_size()
        rows = [(ko, en, 1.0) for ko, en in sides]
        rows += [(head, term, similarity) for head, term, similarity in entries if not _is_korean(term, tokenizer)]
        bitext = make_bitext(rows, source_size=size, target_size=size)
        forward, backward = _align_both(bitext, config.alignment, log)

    # 4. Mix with the term list, turn probabilities into weights, prune.
    with _timed(log, "expansion"):
        korean_V = np.array([language_of(piece) == "ko" for piece in _pieces(tokenizer)])
        translations = _translations(forward, backward, entries, korean_V, config.expansion)
        shares = np.maximum(
            _document_share([ko for ko, _ in sides], size), _document_share([en for _, en in sides], size)
        )
    log.counts.update(
        pieces=size,
        pairs=len(pairs),
        terms=len(terms),
        token_pairs=bitext.token_pairs,
        canonical_weights=canonical.nnz,
        translation_weights=translations.nnz,
    )
    return StaticEncoder(tokenizer, canonical, translations, shares)


def texts_to_analyse(
    pairs: Sequence[PairRow], terms: Sequence[TermRow], settings: TokenizerSettings
) -> tuple[list[str], int]:
    """Return the Korean texts the analyser reads, sentences first, and how many sentences there are."""
    sample = _evenly(len(pairs), settings.analysed_pairs)
    heads = [
        text for row in terms for text in (row.ko, *(term.text for term in row.terms)) if language_of(text) == "ko"
    ]
    return [*(pairs[index].ko for index in sample), *heads], len(sample)


@contextmanager
def _timed(log: TrainingLog, step: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    log.seconds[step] = time.perf_counter() - start


def _evenly(count: int, most: int | None) -> list[int]:
    if most is None or most >= count:
        return list(range(count))
    return [index * count // most for index in range(most)]


def _count(
    korean: Sequence[str],
    analysed: Sequence[list[Stretch]],
    pairs: Sequence[PairRow],
    terms: Sequence[TermRow],
    *,
    heads_from: int,
) -> LexiconCounts:
    counts = LexiconCounts()
    for index, (text, stretches) in enumerate(zip(korean, analysed, strict=True)):
        counts.add_korean(text, stretches, always=index >= heads_from)
    for pair in pairs:
        counts.add_latin(pair.en)
    for row in terms:
        for term in row.terms:
            if language_of(term.text) == "en":
                counts.add_latin(term.text, always=True)
    return counts


def _encode_terms(tokenizer: Tokenizer, term_of: Ids, texts: list[str]) -> list[Ids]:
    encodings = tokenizer.encode_batch_fast(texts, add_special_tokens=False)
    return [_terms(term_of, encoding.ids) for encoding in encodings]


def _terms(term_of: Ids, pieces: Sequence[int]) -> Ids:
    terms = term_of[np.asarray(pieces, np.int64)]
    return terms[terms > 0]


def _entries(terms: Sequence[TermRow], tokenizer: Tokenizer, term_of: Ids) -> list[tuple[Ids, Ids, float]]:
    found = []
    for row in terms:
        head = _terms(term_of, tokenizer.encode(row.ko, add_special_tokens=False).ids)
        for term in row.terms:
            target = _terms(term_of, tokenizer.encode(term.text, add_special_tokens=False).ids)
            if len(head) and len(target):
                found.append((head, target, term.similarity))
    return found


def _pieces(tokenizer: Tokenizer) -> list[str]:
    vocabulary = tokenizer.get_vocab()
    return sorted(vocabulary, key=vocabulary.__getitem__)


def _is_korean(terms: Ids, tokenizer: Tokenizer) -> bool:
    return any(language_of(tokenizer.id_to_token(int(term)) or "") == "ko" for term in terms)


def _align_both(bitext: Bitext, settings: AlignmentSettings, log: TrainingLog) -> tuple[csr_array, csr_array]:
    """Train both directions, one thread each; returns the averaged table from Korean and from English."""

    def train(direction: str, side: Bitext) -> TranslationTable:
        def remember(_: int, log_likelihood: float) -> None:
            log.log_likelihood[direction].append(log_likelihood)

        return train_ibm1(side, iterations=settings.iterations, prior=settings.prior, on_iteration=remember)

    with ThreadPoolExecutor(2) as threads:
        ahead = threads.submit(train, "ko-en", bitext)
        back = threads.submit(train, "en-ko", bitext.reversed())
        forward, backward = ahead.result(), back.result()
    mean = average(forward.to_csr(), backward.to_csr())
    mean.data[mean.data < settings.min_probability] = 0
    mean.eliminate_zeros()
    return mean, mean.T.tocsr()


def _translations(
    forward: csr_array,
    backward: csr_array,
    entries: Iterable[tuple[Ids, Ids, float]],
    korean_V: NDArray[np.bool_],
    settings: ExpansionSettings,
) -> csr_array:
    entries = list(entries)
    across = [entry for entry in entries if not korean_V[entry[1]].any()]
    synonyms = [entry for entry in entries if korean_V[entry[1]].any()]
    size = len(korean_V)
    dictionary = dictionary_table(across, size=size)
    total: Any = csr_array((size, size), dtype=np.float32)
    for aligned, listed, rows_V in (
        (forward, dictionary, korean_V),
        (backward, dictionary.T.tocsr(), ~korean_V),
    ):
        mixed = mix(aligned, listed, share=settings.dictionary_share)
        weights = expansion_weights(mixed, power=settings.power, confidence=settings.confidence)
        total = total + _only(weights, rows_V, ~rows_V)
    total = total + _only(dictionary_table(synonyms, size=size) * settings.synonym_weight, korean_V, korean_V)
    total = csr_array(total)
    total.setdiag(0)
    total.eliminate_zeros()
    return prune_by_mass(
        csr_array(total), mass=settings.mass, min_weight=settings.min_weight, max_terms=settings.max_terms
    )


def _only(table: csr_array, rows_V: NDArray[np.bool_], columns_V: NDArray[np.bool_]) -> csr_array:
    rows = diags_array(rows_V.astype(np.float32), format="csr")
    columns = diags_array(columns_V.astype(np.float32), format="csr")
    kept = csr_array(rows @ table @ columns)
    kept.eliminate_zeros()
    return kept


def _document_share(documents: Sequence[Ids], size: int) -> NDArray[np.float32]:
    frequency = np.zeros(size, np.int64)
    for terms in documents:
        frequency[np.unique(terms)] += 1
    return (frequency / len(documents)).astype(np.float32)

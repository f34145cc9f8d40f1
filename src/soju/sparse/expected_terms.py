"""Which terms should a head word light up? Its own and its synonyms' in Korean, its translations' in English."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise

from soju.core.language import language_of
from soju.data.records import TermRow
from soju.search.lexical import ENGLISH_STOP_WORDS
from soju.sparse.encoders import TermEncoder
from soju.sparse.static.static_encoder import StaticEncoder
from soju.sparse.unseen_terms import KOREAN_FUNCTION_WORDS

FUNCTION_WORDS = ENGLISH_STOP_WORDS | KOREAN_FUNCTION_WORDS
TermsOf = Callable[[Sequence[str]], list[list[int]]]
"""From texts to the ids of their terms, unexpanded."""


def expected_terms(rows: Sequence[TermRow], terms_of: TermsOf) -> tuple[list[set[int]], list[set[int]]]:
    """Collect what each head word should light up.

    Args:
        rows: Head words with their terms.
        terms_of: From texts to the ids of their terms, unexpanded.

    Returns:
        For each row the expected English term ids, and for each row the expected Korean ones, its own included.
    """
    texts = [text for row in rows for text in (row.ko, *(term.text.lower() for term in row.terms))]
    ids = iter(terms_of(texts))
    english: list[set[int]] = []
    korean: list[set[int]] = []
    for row in rows:
        sides: dict[str, set[int]] = {"ko": set(next(ids)), "en": set()}
        for term in row.terms:
            sides["ko" if language_of(term.text) == "ko" else "en"] |= set(next(ids))
        english.append(sides["en"])
        korean.append(sides["ko"])
    return english, korean


def terms_of(encoder: TermEncoder) -> TermsOf:
    """Return how an encoder alone tells which terms a text holds: a static one by its documents, others by pieces."""
    if isinstance(encoder, StaticEncoder):
        return partial(_counted_terms, encoder)
    from soju.sparse.initial_models import plain_vocabulary
    from soju.sparse.neural_encoders import NeuralEncoder  # seconds; not for static ones

    assert isinstance(encoder, NeuralEncoder)
    return plain_vocabulary(encoder.model.tokenizer).terms


def _counted_terms(encoder: StaticEncoder, texts: Sequence[str]) -> list[list[int]]:
    vectors = encoder.encode_documents(texts)
    return [vectors.indices[start:stop].tolist() for start, stop in pairwise(vectors.indptr)]

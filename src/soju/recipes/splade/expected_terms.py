"""Which terms should a head word light up? Its own and its synonyms' in Korean, its translations' in English."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from soju.core.language import language_of
from soju.core.records import TermRow


def expected_terms(
    rows: Sequence[TermRow], terms_of: Callable[[Sequence[str]], list[list[int]]]
) -> tuple[list[set[int]], list[set[int]]]:
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

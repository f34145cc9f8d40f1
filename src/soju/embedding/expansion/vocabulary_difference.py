"""Which Korean tokens does the donor have that the base lacks and could use?"""

from __future__ import annotations

import unicodedata
from collections import Counter
from dataclasses import dataclass

from soju.core.errors import UserError
from soju.core.language import is_hangul
from soju.core.progress import track
from soju.embedding.expansion.byte_bpe import ByteBpe
from soju.embedding.expansion.byte_level import is_spelling, token_text

REASONS = {
    "added-token": "an added token of the donor, matched in plain text",
    "not-bytes": "not spelled in the byte alphabet",
    "not-utf8": "a part of a character",
    "no-hangul": "holds no Hangul",
    "in-base": "the base has it",
    "not-normal": "changed by NFC or by the base's normaliser",
    "split": "cut apart by the base's pre-tokenizer",
    "holds-added-token": "holds an added token of the base",
}
"""Why a token of the donor is no candidate, in the order of the tests."""


@dataclass(frozen=True, slots=True)
class VocabularyDifference:
    """The candidates for an expansion and what was refused."""

    candidates: tuple[str, ...]
    """Byte-level spellings in the donor's order of ids."""
    refused: Counter[str]
    """Number of the donor's tokens by the first reason of `REASONS` that holds."""


def find_candidates(base: ByteBpe, donor: ByteBpe) -> VocabularyDifference:
    """Sort the donor's tokens into candidates and refusals.

    A candidate is valid UTF-8, holds Hangul, is NFC-stable and left alone by the base's normaliser, stays in one piece
    in the base's pre-tokenizer, and is not in the base.

    Args:
        base: The tokenizer to expand.
        donor: The tokenizer that has the tokens.

    Returns:
        Candidates and counts; together they are all tokens of the donor.

    Raises:
        UserError: If the base puts a space before every text, or there is no candidate.
    """
    if base.adds_prefix_space:
        raise UserError(
            f"{base.name}: its pre-tokenizer puts a space before every text (add_prefix_space), so that tokens without "
            f"one cannot be told apart; give a base that does not"
        )
    refused: Counter[str] = Counter()
    candidates: list[str] = []
    every = donor.added_tokens | donor.vocabulary
    for token in track(sorted(every, key=lambda token: every[token]), "difference"):
        reason = "added-token" if token in donor.added_tokens else _why_not(token, base)
        if reason is None:
            candidates.append(token)
        else:
            refused[reason] += 1
    if not candidates:
        raise UserError(
            f"{donor.name}: no Korean token that {base.name} lacks; give a donor with a larger Korean vocabulary"
        )
    return VocabularyDifference(tuple(candidates), refused)


def _why_not(token: str, base: ByteBpe) -> str | None:
    if not is_spelling(token):
        return "not-bytes"
    text = token_text(token)
    if text is None:
        return "not-utf8"
    if not any(is_hangul(character) for character in text):
        return "no-hangul"
    if token in base.vocabulary or text in base.added_tokens:
        return "in-base"
    return _why_not_reachable(token, text, base)


def _why_not_reachable(token: str, text: str, base: ByteBpe) -> str | None:
    if not unicodedata.is_normalized("NFC", text) or base.normalise(text) != text:
        return "not-normal"
    if base.pre_tokens(text) != [token]:
        return "split"
    if any(content in text for content in base.added_tokens):
        return "holds-added-token"
    return None

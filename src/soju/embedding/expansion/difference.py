"""What a donor's tokenizer has that the base lacks, and how the two differ in scripts and in tokens per word."""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from soju.core.errors import UserError
from soju.core.language import is_hangul, is_latin
from soju.core.progress import track
from soju.embedding.expansion.byte_bpe import ByteBpe, is_spelling, token_text
from soju.embedding.expansion.merges import Expansion

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


SCRIPTS = ("hangul", "latin", "han", "kana", "number", "other letters", "other", "part of a character", "added")


@dataclass(frozen=True, slots=True)
class Fertility:
    """How many tokens a tokenizer needs for texts."""

    texts: int
    characters: int
    eojeols: int
    """Stretches between white space."""
    tokens: int

    @property
    def per_text(self) -> float:
        """Tokens per text."""
        return self.tokens / max(1, self.texts)

    def to_json(self) -> dict[str, float]:
        """Return the counts and the ratios."""
        return asdict(self) | {
            "tokens_per_text": round(self.per_text, 4),
            "tokens_per_eojeol": round(self.tokens / max(1, self.eojeols), 4),
            "tokens_per_character": round(self.tokens / max(1, self.characters), 4),
        }


def fertility(tokenizer: ByteBpe, texts: Sequence[str]) -> Fertility:
    """Count the tokens of texts, special tokens around them not counted."""
    return Fertility(
        texts=len(texts),
        characters=sum(map(len, texts)),
        eojeols=sum(len(text.split()) for text in texts),
        tokens=sum(map(len, tokenizer.encode(texts))),
    )


def script_of(text: str | None) -> str:
    """Return the script of a token: that of its letters, Hangul before all others.

    >>> script_of(" 한a"), script_of("the"), script_of("漢"), script_of(" 1"), script_of(None)
    ('hangul', 'latin', 'han', 'number', 'part of a character')
    """
    if text is None:
        return "part of a character"
    if any(map(is_hangul, text)):
        return "hangul"
    letters = [character for character in text if character.isalpha()]
    if not letters:
        return "number" if any(map(str.isnumeric, text)) else "other"
    if all(map(is_latin, letters)):
        return "latin"
    names = {unicodedata.name(letter, "").split(" ")[0] for letter in letters}
    if names & {"HIRAGANA", "KATAKANA", "HALFWIDTH"}:
        return "kana"
    return "han" if "CJK" in names else "other letters"


def script_shares(tokenizer: ByteBpe) -> dict[str, float]:
    """Return the share of each script of `SCRIPTS` among all tokens; they sum to 1."""
    counts: Counter[str] = Counter(
        script_of(token_text(token)) for token in tokenizer.vocabulary if token not in tokenizer.added_tokens
    )
    counts["added"] = len(tokenizer.added_tokens)
    return {script: counts[script] / counts.total() for script in SCRIPTS}


def difference_statistics(
    tokenizers: Mapping[str, ByteBpe],
    difference: VocabularyDifference,
    expansion: Expansion,
    texts: Mapping[str, Sequence[str]],
) -> dict[str, Any]:
    """Return what ``vocab_diff_stats.json`` holds.

    Returns sizes, scripts, refusals, lengths of the candidates in characters and fertility; for Korean also the
    expanded tokenizer's tokens relative to base and donor.
    """
    lengths = Counter(len(token_text(token) or "") for token in difference.candidates)
    measured = {
        language: {name: fertility(tokenizer, some) for name, tokenizer in tokenizers.items()}
        for language, some in texts.items()
    }
    korean = measured.get("ko", {})
    relative = {
        f"expanded / {name}": round(korean["expanded"].tokens / korean[name].tokens, 4)
        for name in ("base", "donor")
        if korean and korean[name].tokens
    }
    return {
        "sizes": {name: tokenizer.size for name, tokenizer in tokenizers.items()},
        "candidates": len(difference.candidates),
        "new_tokens": len(expansion.tokens),
        "new_merges": len(expansion.merges),
        "intermediates": len(expansion.intermediates),
        "unreachable": dict(Counter(reason for _, reason in expansion.unreachable)),
        "refused": {reason: difference.refused[reason] for reason in REASONS if difference.refused[reason]},
        "candidate_lengths": {str(length): lengths[length] for length in sorted(lengths)},
        "scripts": {
            name: {script: round(share, 6) for script, share in script_shares(tokenizer).items()}
            for name, tokenizer in tokenizers.items()
        },
        "fertility": {
            language: {name: found.to_json() for name, found in by_name.items()}
            for language, by_name in measured.items()
        },
        "korean_tokens": relative,
    }


def difference_rows(difference: VocabularyDifference, donor: ByteBpe, expansion: Expansion) -> list[dict[str, Any]]:
    """Return what ``vocab_diff.json`` holds: each candidate with its ids; ``id`` is ``None`` when it was left out."""
    ids = {token: expansion.first_id + place for place, token in enumerate(expansion.tokens)}
    reasons = dict(expansion.unreachable)
    rows = []
    for token in difference.candidates:
        row: dict[str, Any] = {"token": token_text(token), "donor_id": donor.vocabulary[token], "id": ids.get(token)}
        if token in ids:
            row["old_ids"] = list(expansion.decompositions[ids[token] - expansion.first_id])
        else:
            row["left_out"] = reasons.get(token, "limit")
        rows.append(row)
    return rows

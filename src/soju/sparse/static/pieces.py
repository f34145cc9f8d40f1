"""How does a person read a tokenizer's pieces? ``▁program`` is a word, ``##ing`` the rest of one."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.pre_tokenizers import ByteLevel

from soju.sparse.static.lexicon_tokenizer import BOUNDARY

WORD_PIECE = "##"
_BYTE_LEVEL_SPACE = "Ġ"
_BYTE_LEVEL = set(ByteLevel.alphabet())


def readable_terms(pieces: Sequence[str]) -> tuple[str, ...]:
    """Name every piece of a vocabulary; ``…`` shows where it is cut from its word.

    The convention is read off the vocabulary: soju's own lexicon (``▁word▁``), word pieces (``##``), byte-level pairs
    (``Ġ``) or SentencePiece (``▁``).

    Args:
        pieces: The whole vocabulary, by id.

    Returns:
        One name a piece, not necessarily unique.
    """
    name = _convention(pieces)
    return tuple(name(piece) for piece in pieces)


def _convention(pieces: Sequence[str]) -> Callable[[str], str]:
    if any(len(piece) > 2 and piece[0] == piece[-1] == BOUNDARY for piece in pieces):
        return lexicon_term
    if any(piece.startswith(WORD_PIECE) for piece in pieces):
        return _word_piece
    if any(piece.startswith(_BYTE_LEVEL_SPACE) for piece in pieces):
        return _byte_level
    return _sentence_piece


def lexicon_term(piece: str) -> str:
    """Name a piece of soju's own lexicon tokenizer."""
    if len(piece) > 2 and piece[0] == piece[-1] == BOUNDARY:
        return piece[1:-1]
    if piece.isascii() and piece.isalnum():
        return f"…{piece}…"
    if len(piece) > 1 and piece[0] == BOUNDARY:
        return piece[1:] + "…"
    if len(piece) > 1 and piece[-1] == BOUNDARY:
        return "…" + piece[:-1]
    return piece


def _word_piece(piece: str) -> str:
    return "…" + piece.removeprefix(WORD_PIECE) if piece.startswith(WORD_PIECE) and piece != WORD_PIECE else piece


def _sentence_piece(piece: str) -> str:
    if piece.startswith("<") and piece.endswith(">"):
        return piece
    return piece[1:] or piece if piece.startswith(BOUNDARY) else "…" + piece


def _byte_level(piece: str) -> str:
    if not set(piece) <= _BYTE_LEVEL:
        return piece  # added as a whole: special tokens
    text = ByteLevelDecoder().decode([piece])
    return text[1:] or piece if text.startswith(" ") else "…" + text

"""Which pieces does a corpus need? Counts them and chooses. Shape letters: V = ids of the whole vocabulary."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence, Set
from itertools import islice
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer, pre_tokenizers

from soju.core.errors import UserError
from soju.core.language import is_hangul
from soju.sparse.tokenizer_trim import Spec, indispensable_ids, merge_parts, unknown_word_pieces

BATCH = 1024
_BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")
_BOUNDARIES = ("▁", "##")


def tokenizer_spec(tokenizer: Any) -> Spec:
    """Return the parsed ``tokenizer.json`` of a fast tokenizer of transformers.

    Args:
        tokenizer: The tokenizer.

    Returns:
        The JSON.

    Raises:
        UserError: If the tokenizer is not backed by the tokenizers library.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if not isinstance(backend, Tokenizer):
        raise UserError(f"{type(tokenizer).__name__} has no tokenizer.json; save the model with a fast tokenizer")
    return json.loads(backend.to_str())


def count_ids(spec: Spec, texts: Iterable[str]) -> NDArray[np.int64]:
    """Count how often each id stands in texts, special tokens around them not counted.

    Args:
        spec: Content of ``tokenizer.json``.
        texts: Any number.

    Returns:
        Counts, ``(V,)``. A piece that WordPiece only tried on a word before it called it unknown counts 1, see
        `unknown_word_pieces`.
    """
    backend = Tokenizer.from_str(json.dumps(spec | {"truncation": None, "padding": None}))
    vocabulary = backend.get_vocab()
    counts_V = np.zeros(max(vocabulary.values()) + 1, np.int64)
    tried: set[int] = set()
    unknown = spec["model"].get("unk_token")
    stream = iter(texts)
    while batch := list(islice(stream, BATCH)):
        for text, encoding in zip(batch, backend.encode_batch(batch, add_special_tokens=False), strict=True):
            np.add.at(counts_V, np.asarray(encoding.ids, np.int64), 1)
            if unknown is not None and vocabulary.get(unknown) in encoding.ids:
                tried.update(vocabulary[p] for word in _words(backend, text) for p in unknown_word_pieces(spec, word))
    for number in tried:
        counts_V[number] = max(counts_V[number], 1)
    return counts_V


def choose_ids(
    spec: Spec, counts_V: NDArray[np.int64], *, max_size: int, required: Set[int] = frozenset()
) -> NDArray[np.int64]:
    """Choose the ids to keep: what cannot be spared, what unseen text falls back to, then what is needed most.

    The fall-back is every byte, ASCII character, Hangul syllable and jamo that is a piece of its own. With BPE, the
    pieces that a kept piece is merged from are kept too; they count as often as it.

    Args:
        spec: Content of ``tokenizer.json``.
        counts_V: Result of `count_ids`.
        max_size: Ids to keep at most.
        required: More ids that cannot be spared, such as those the model's configuration names.

    Returns:
        Ids, ascending. Ids of count 0 are only kept when they cannot be spared or are part of the fall-back.

    Raises:
        UserError: If `max_size` does not hold the special tokens and the fall-back.
    """
    vocabulary = _vocabulary(spec)
    names = {number: piece for piece, number in vocabulary.items()}
    parts = {
        vocabulary[piece]: sorted({vocabulary[part] for part in made_of if part in vocabulary})
        for piece, made_of in merge_parts(spec).items()
        if piece in vocabulary
    }
    fallback = {number for piece, number in vocabulary.items() if _is_fallback(piece, _is_byte_level(spec))}
    kept = _with_parts((required | indispensable_ids(spec) | fallback) & names.keys(), parts)
    if len(kept) > max_size:
        raise UserError(
            f"max-size {max_size:,} is too small: special tokens and single characters alone are {len(kept):,} ids; "
            f"allow at least that many"
        )
    needs = {number: int(counts_V[number]) for number in names}
    prefix = spec["model"].get("continuing_subword_prefix") or ""
    lengths = {number: len(piece.removeprefix(prefix)) for number, piece in names.items()}
    # Longest first: a part, always shorter than the whole, then has its own count and those of all wholes.
    for number in sorted(needs, key=lambda number: -lengths[number]):
        for part in parts.get(number, ()):
            needs[part] += needs[number]
    # Shorter first among equals, so that a cut never parts a piece from what it is merged from.
    ranked = sorted(
        (number for number, need in needs.items() if need and number not in kept),
        key=lambda number: (-needs[number], lengths[number], number),
    )
    return np.array(sorted(kept | set(ranked[: max_size - len(kept)])), np.int64)


def _vocabulary(spec: Spec) -> dict[str, int]:
    """Return piece to id, added tokens included."""
    stored = spec["model"]["vocab"]
    pieces = dict(stored) if isinstance(stored, dict) else {piece: number for number, (piece, _) in enumerate(stored)}
    return pieces | {token["content"]: token["id"] for token in spec["added_tokens"]}


def _words(backend: Tokenizer, text: str) -> list[str]:
    normalised = backend.normalizer.normalize_str(text) if backend.normalizer else text
    if backend.pre_tokenizer is None:
        return [normalised]
    return [word for word, _ in backend.pre_tokenizer.pre_tokenize_str(normalised)]


def _with_parts(numbers: Iterable[int], parts: dict[int, list[int]]) -> set[int]:
    found: set[int] = set()
    waiting = list(numbers)
    while waiting:
        number = waiting.pop()
        if number not in found:
            found.add(number)
            waiting += parts.get(number, ())
    return found


def _is_byte_level(spec: Spec) -> bool:
    return '"ByteLevel"' in json.dumps([spec.get("pre_tokenizer"), spec.get("decoder")])


def _is_fallback(piece: str, byte_level: bool) -> bool:
    if _BYTE.fullmatch(piece):
        return True
    if byte_level:
        if len(piece) == 1:
            return piece in _BYTE_VALUES
        piece = bytes(_BYTE_VALUES.get(character, 0) for character in piece).decode("utf-8", "replace").strip(" ")
    for boundary in _BOUNDARIES:
        piece = piece.removeprefix(boundary) or piece
    return len(piece) == 1 and (piece.isascii() or is_hangul(piece) or piece in _BOUNDARIES)


def _byte_values() -> dict[str, int]:
    """Return the byte that each letter of the byte-level alphabet stands for.

    Bytes that are printable in Latin-1 stand for themselves; the others are the alphabet's remaining letters in order.
    """
    alphabet: Sequence[str] = sorted(pre_tokenizers.ByteLevel.alphabet())
    plain = {letter: ord(letter) for letter in alphabet if ord(letter) < 256}
    others = sorted(set(range(256)) - set(plain.values()))
    shifted = [letter for letter in alphabet if ord(letter) >= 256]
    return plain | dict(zip(shifted, others, strict=True))


_BYTE_VALUES = _byte_values()

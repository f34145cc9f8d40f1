"""Which rows go where: texts that stand in training and evaluation, held-out rows, samples from all over a file."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Sequence
from hashlib import blake2b
from typing import TypeVar

import numpy as np

from soju.core.errors import UserError

_NOT_LETTER_OR_DIGIT = re.compile(r"[\W_]+")


def normalise_for_overlap(text: str) -> str:
    """Return the letters and digits of `text`, case-folded, in Unicode NFC.

    >>> normalise_for_overlap("Hello,  World 2!")
    'helloworld2'
    """
    return _NOT_LETTER_OR_DIGIT.sub("", unicodedata.normalize("NFC", text.casefold()))


def find_overlap(train_texts: Iterable[str], evaluation_texts: Iterable[str]) -> list[str]:
    """Return the evaluation texts that also stand in training, in evaluation order.

    Texts are compared after `normalise_for_overlap`; those without a letter or digit never overlap. Only the evaluation
    side is held in memory.

    Args:
        train_texts: Streamed once, and no further than the last overlap that is possible.
        evaluation_texts: The texts that must be unseen.

    Returns:
        Each overlapping evaluation text as it was given; repeated ones are repeated.
    """
    waiting: dict[str, list[int]] = {}
    texts = list(evaluation_texts)
    for position, text in enumerate(texts):
        key = normalise_for_overlap(text)
        if key:
            waiting.setdefault(key, []).append(position)
    found: list[int] = []
    for text in train_texts:
        if not waiting:
            break
        found += waiting.pop(normalise_for_overlap(text), [])
    return [texts[position] for position in sorted(found)]


def refuse_overlap(
    train_texts: Iterable[str],
    evaluation_texts: Iterable[str],
    *,
    evaluation: str = "the evaluation set",
    shown: int = 3,
) -> None:
    """Stop when an evaluation text stands in training, because the scores would flatter the model."""
    overlap = find_overlap(train_texts, evaluation_texts)
    if not overlap:
        return
    examples = ", ".join(repr(text if len(text) <= 60 else text[:60] + "...") for text in overlap[:shown])
    more = f" and {len(overlap) - shown:,} more" if len(overlap) > shown else ""
    raise UserError(
        f"{len(overlap):,} text{'s' if len(overlap) > 1 else ''} of {evaluation} also stand in the training data "
        f"(compared by letters and digits, case ignored): {examples}{more}; remove them from the training files"
    )


def held_out(key: str, *, seed: int, share: float) -> bool:
    """Tell whether the row with this key belongs to the held-out part.

    ``blake2b(f"{seed}:{key}")`` read as a 64-bit fraction in [0, 1) is compared with `share`; a larger share keeps
    every row a smaller one held out.

    Args:
        key: What must not stand on both sides: an id, a text, the name of a group.
        seed: Another seed gives another, independent split.
        share: Expected share held out, in [0, 1], unitless.

    Returns:
        ``True`` for held out, ``False`` for training.

    Raises:
        ValueError: If `share` is not in [0, 1].
    """
    if not 0 <= share <= 1:
        raise ValueError(f"share must be in [0, 1], got {share}")
    digest = blake2b(f"{seed}:{key}".encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "big") < share * 2**64


ItemT = TypeVar("ItemT")


def spread(items: Sequence[ItemT], most: int) -> list[ItemT]:
    """Return at most `most` items, spread evenly over all.

    >>> spread("abcde", 3)
    ['a', 'c', 'e']
    """
    if len(items) <= most:
        return list(items)
    return [items[place] for place in np.linspace(0, len(items) - 1, most).round().astype(int)]

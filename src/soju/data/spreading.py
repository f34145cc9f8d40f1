"""Fewer rows of a file, still from all over it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import numpy as np

ItemT = TypeVar("ItemT")


def spread(items: Sequence[ItemT], most: int) -> list[ItemT]:
    """Return at most `most` items, spread evenly over all.

    >>> spread("abcde", 3)
    ['a', 'c', 'e']
    """
    if len(items) <= most:
        return list(items)
    return [items[place] for place in np.linspace(0, len(items) - 1, most).round().astype(int)]

"""Which rows are held out: a decision of the key alone, so it never moves when data are added or reordered."""

from __future__ import annotations

from hashlib import blake2b


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

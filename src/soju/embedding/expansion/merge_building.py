"""How are merges appended to a BPE so that every new encoding is a coarsening of the old one?

New merges rank after all old ones and make tokens that occur in no old merge, so BPE first reaches its old result and
then joins neighbours. Three refusals keep that exact:

* a merge that makes an *old* token: an old id would stand where the old encoding had others;
* a merge that makes a piece no Hangul is in: other languages would change;
* a merge beyond the budget of tokens.

A new token stands for one old encoding wherever it is made: no merge crossed its edges, so BPE went on between them as
it does when it is given the token alone.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import pairwise

from soju.embedding.expansion.byte_bpe import ByteBpe
from soju.embedding.expansion.byte_level import token_bytes
from soju.embedding.expansion.hangul_pieces import is_hangul_piece, starts_whole

Pair = tuple[int, int]
"""Ids of two neighbours."""


class MergeBuilder:
    """New tokens and merges on top of a base, made one by one."""

    def __init__(
        self,
        base: ByteBpe,
        candidates: Sequence[str],
        *,
        limit: int | None = None,
        max_intermediates: int | None = None,
    ) -> None:
        """Start with no merge.

        Args:
            base: The tokenizer to expand.
            candidates: Spellings that may become tokens.
            limit: New tokens at most, intermediates counted; ``None`` for no limit.
            max_intermediates: Tokens at most that are no candidates but parts of some; ``None`` for no limit.
        """
        self.first_id = base.size
        self.candidates = frozenset(candidates)
        self.limit = limit
        self.max_intermediates = max_intermediates
        self.tokens: list[str] = []
        self.decompositions: list[tuple[int, ...]] = []
        self.merges: list[tuple[str, str]] = []
        self.intermediates = 0
        self.new_ids: dict[str, int] = {}
        self._old = base.vocabulary
        self._spellings = {number: token for token, number in base.vocabulary.items()}
        self._ranks: dict[Pair, tuple[int, int]] = {}
        self._made: list[tuple[Pair, bool]] = []

    def spelling(self, number: int) -> str:
        """Return how a token, old or new, is spelled."""
        return self._spellings[number]

    def decomposition(self, number: int) -> tuple[int, ...]:
        """Return the old ids that a token stands for; an old one stands for itself."""
        return (number,) if number < self.first_id else self.decompositions[number - self.first_id]

    def settle(self, pieces: list[int]) -> list[int]:
        """Merge neighbours in place, the most urgent merge first and the leftmost of equals, until none applies.

        Args:
            pieces: Ids of neighbours, perhaps merged in part already.

        Returns:
            The same list.
        """
        ranks = self._ranks
        while len(pieces) > 1:
            best, place, made = len(ranks), -1, -1
            for position, pair in enumerate(pairwise(pieces)):
                found = ranks.get(pair)
                if found is not None and found[0] < best:
                    best, made = found
                    place = position
            if place < 0:
                break
            pieces[place : place + 2] = [made]
        return pieces

    def refusal(self, left: int, right: int) -> str | None:
        """Return why two neighbours must not be merged, or ``None`` when they may."""
        made = self._spellings[left] + self._spellings[right]
        if made in self._old:
            return "old-token"
        if made in self.new_ids:
            return None
        if not is_hangul_piece(token_bytes(made)):
            return "not-hangul"
        if self.limit is not None and len(self.tokens) >= self.limit:
            return "limit"
        if made not in self.candidates and self.intermediates == self.max_intermediates:
            return "intermediates"
        return None

    def append(self, left: int, right: int) -> int:
        """Append the merge of two neighbours, which must not be refused.

        Args:
            left: Id of the first.
            right: Id of the second.

        Returns:
            The id of the result, a new token unless another merge made it before.
        """
        parts = self._spellings[left], self._spellings[right]
        made = parts[0] + parts[1]
        old = self.decomposition(left) + self.decomposition(right)
        created = made not in self.new_ids
        if created:
            self.new_ids[made] = self.first_id + len(self.tokens)
            self._spellings[self.new_ids[made]] = made
            self.tokens.append(made)
            self.decompositions.append(old)
            self.intermediates += made not in self.candidates
        assert self.decomposition(self.new_ids[made]) == old, "a token stands for one old encoding"
        self._ranks[left, right] = (len(self.merges), self.new_ids[made])
        self.merges.append(parts)
        self._made.append(((left, right), created))
        return self.new_ids[made]

    def undo(self, merges: int) -> None:
        """Take back the last merges until `merges` are left, and the tokens they made."""
        while len(self.merges) > merges:
            pair, created = self._made.pop()
            self.merges.pop()
            _, number = self._ranks.pop(pair)
            if created:
                made = self.tokens.pop()
                self.decompositions.pop()
                self.intermediates -= made not in self.candidates
                del self.new_ids[made], self._spellings[number]


def reach_candidates(
    builder: MergeBuilder, candidates: Sequence[str], pieces: Sequence[Sequence[int]]
) -> list[tuple[str, str]]:
    """Append the merges that make each candidate one token, in the given order.

    Of a candidate's neighbours those are merged first whose result is a candidate or a token already, then the most
    frequent ones among all candidates, then the leftmost. A candidate that cannot be reached leaves nothing behind.

    Args:
        builder: Gets merges and tokens.
        candidates: Spellings, the most wanted first.
        pieces: The old ids of each candidate, same order.

    Returns:
        Unreachable candidates with the reason.
    """
    counts: Counter[Pair] = Counter()
    for old in pieces:
        counts.update(pairwise(old))
    unreachable = []
    for candidate, old in zip(candidates, pieces, strict=True):
        reason = _reach(builder, list(old), counts)
        if reason is not None:
            unreachable.append((candidate, reason))
    return unreachable


def _reach(builder: MergeBuilder, pieces: list[int], counts: Counter[Pair]) -> str | None:
    before = len(builder.merges)
    builder.settle(pieces)
    while len(pieces) > 1:
        best: tuple[tuple[bool, int, int], Pair] | None = None
        reasons = []
        for position, (left, right) in enumerate(pairwise(pieces)):
            reason = builder.refusal(left, right) or _why_no_part(builder, left, right)
            if reason is not None:
                reasons.append(reason)
                continue
            made = builder.spelling(left) + builder.spelling(right)
            wanted = made in builder.candidates or made in builder.new_ids
            key = (wanted, counts[left, right], -position)
            if best is None or key > best[0]:
                best = key, (left, right)
        if best is None:
            builder.undo(before)
            return _worst(reasons)
        builder.append(*best[1])
        builder.settle(pieces)
    return None


def _why_no_part(builder: MergeBuilder, left: int, right: int) -> str | None:
    """Refuse parts of candidates that start inside a character: they would be of little use to others."""
    made = builder.spelling(left) + builder.spelling(right)
    whole = made in builder.candidates or made in builder.new_ids or starts_whole(token_bytes(made))
    return None if whole else "inside-character"


def _worst(reasons: list[str]) -> str:
    """Return the reason that tells most: budgets before what no budget mends."""
    order = ("limit", "intermediates", "old-token", "not-hangul", "inside-character")
    return next(reason for reason in order if reason in reasons)

"""The tokens and merges that an expansion appends to a BPE, so that every new encoding is a coarsening of the old one.

New merges rank after all old ones and make tokens that occur in no old merge, so BPE first reaches its old result and
then joins neighbours. Three refusals keep that exact:

* a merge that makes an *old* token: an old id would stand where the old encoding had others;
* a merge that makes a piece no Hangul is in: other languages would change;
* a merge beyond the budget of tokens.

A new token stands for one old encoding wherever it is made: no merge crossed its edges, so BPE went on between them as
it does when it is given the token alone.

A corpus decides the order of merges as in BPE training (count neighbours, merge the most frequent pair, again and
again) that goes on from the base's own encoding and makes candidates only, and the first two bytes of their Hangul
characters, which a base without Korean needs on the way.

References:
    Sennrich, Haddow and Birch 2016, arXiv:1508.07909 (BPE). Purason et al. 2025, arXiv:2512.03989 (continued BPE).
"""

from __future__ import annotations

import heapq
import json
import shutil
from collections import Counter
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, Self

from soju.core.errors import UserError
from soju.core.files import write_json, write_text
from soju.core.language import is_hangul
from soju.core.progress import track
from soju.embedding.expansion.byte_bpe import (
    TOKENIZER_FILE,
    ByteBpe,
    is_hangul_piece,
    is_unfinished_syllable,
    starts_whole,
    token_bytes,
    token_text,
)

Method = Literal["merges", "added-tokens"]
EXPANSION_FILE = "expansion.json"


@dataclass(frozen=True)
class Expansion:
    """New tokens after the old ids. The id of token ``i`` is ``first_id + i``."""

    first_id: int
    """Number of ids of the base."""
    tokens: tuple[str, ...]
    """Byte-level spellings."""
    merges: tuple[tuple[str, str], ...]
    """To append to the base's, in this order."""
    decompositions: tuple[tuple[int, ...], ...]
    """The old ids that each new token stands for, same order as `tokens`."""
    intermediates: tuple[str, ...] = ()
    """Those of the tokens that are no candidates, only parts of some."""
    unreachable: tuple[tuple[str, str], ...] = ()
    """Candidates left out, each with the reason."""
    method: Method = "merges"
    """``added-tokens``: matched in plain text before BPE; no merges, and decompositions are of the token alone."""

    @property
    def size(self) -> int:
        """Number of ids, old and new."""
        return self.first_id + len(self.tokens)

    @cached_property
    def texts(self) -> tuple[str | None, ...]:
        """The text of each token, ``None`` for a part of a character."""
        return tuple(token_text(token) for token in self.tokens)

    def collapse(self, ids: Iterable[int]) -> list[int]:
        """Return the old ids that new ones stand for; the inverse of the expansion.

        >>> Expansion(10, ("ab",), (("a", "b"),), ((1, 2),)).collapse([3, 10, 1])
        [3, 1, 2, 1]
        """
        old: list[int] = []
        for number in ids:
            if number < self.first_id:
                old.append(number)
            else:
                old.extend(self.decompositions[number - self.first_id])
        return old

    def save(self, path: Path) -> None:
        """Write ``expansion.json``, or the file of this name in a folder."""
        write_text(_file(path), json.dumps(asdict(self), ensure_ascii=False) + "\n")

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read what `save` wrote.

        Raises `UserError` if it is missing or no expansion.
        """
        file = _file(path)
        try:
            value = json.loads(file.read_text(encoding="utf-8"))
            return cls(
                first_id=int(value["first_id"]),
                tokens=tuple(value["tokens"]),
                merges=tuple((left, right) for left, right in value["merges"]),
                decompositions=tuple(tuple(map(int, ids)) for ids in value["decompositions"]),
                intermediates=tuple(value["intermediates"]),
                unreachable=tuple((token, reason) for token, reason in value["unreachable"]),
                method=value["method"],
            )
        except OSError as error:
            raise UserError(f"{file}: {error.strerror or error}; give a folder that `soju expand` wrote") from None
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{file}: no expansion ({error}); run `soju expand` again") from None


def _file(path: Path) -> Path:
    return path / EXPANSION_FILE if path.is_dir() else path


def expand_by_merges(
    base: ByteBpe, candidates: Sequence[str], *, limit: int | None = None, max_intermediates: int | None = None
) -> Expansion:
    """Append the merges that make each candidate one token, in the given order."""
    builder = MergeBuilder(base, candidates, limit=limit, max_intermediates=max_intermediates)
    unreachable = reach_candidates(builder, candidates, _old_pieces(base, candidates))
    return _finish(builder, unreachable)


def expand_by_corpus(
    base: ByteBpe,
    candidates: Sequence[str],
    counts: Mapping[str, int],
    *,
    limit: int | None = None,
    max_intermediates: int | None = None,
    min_count: int = 2,
) -> Expansion:
    """Append merges in the order a corpus wants them, then those of the candidates it lacks, in the given order.

    Args:
        base: The tokenizer to expand.
        candidates: Byte-level spellings, the most wanted first; see `find_candidates`.
        counts: How often each pre-token occurs; see `count_pre_tokens`.
        limit: New tokens at most, intermediates counted.
        max_intermediates: Tokens at most that are only parts of candidates.
        min_count: Rarest pair of neighbours that the corpus decides about.

    Returns:
        The expansion.
    """
    builder = MergeBuilder(base, candidates, limit=limit, max_intermediates=max_intermediates)
    continue_bpe(builder, base, counts, min_count=min_count)
    unreachable = reach_candidates(builder, candidates, _old_pieces(base, candidates))
    return _finish(builder, unreachable)


def expand_by_added_tokens(base: ByteBpe, candidates: Sequence[str], *, limit: int | None = None) -> Expansion:
    """Make each candidate an added token, for comparison: that is no coarsening and cuts words apart."""
    tokens = tuple(candidates[:limit])
    decompositions = tuple(map(tuple, _old_pieces(base, tokens)))
    left_out = tuple((token, "limit") for token in candidates[len(tokens) :])
    return Expansion(base.size, tokens, (), decompositions, unreachable=left_out, method="added-tokens")


def _old_pieces(base: ByteBpe, candidates: Sequence[str]) -> list[list[int]]:
    texts = [token_text(candidate) for candidate in candidates]
    assert None not in texts, "candidates are whole characters"
    return list(base.encode([text for text in texts if text is not None]))


def _finish(builder: MergeBuilder, unreachable: Sequence[tuple[str, str]]) -> Expansion:
    return Expansion(
        first_id=builder.first_id,
        tokens=tuple(builder.tokens),
        merges=tuple(builder.merges),
        decompositions=tuple(builder.decompositions),
        intermediates=tuple(token for token in builder.tokens if token not in builder.candidates),
        unreachable=tuple(unreachable),
    )


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
        """Merge neighbours in place, the most urgent merge first and the leftmost of equals, until none applies."""
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
        """Append the merge of two neighbours, which must not be refused."""
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
    """Return the reason that tells most: budgets before what no budget could change."""
    order = ("limit", "intermediates", "old-token", "not-hangul", "inside-character")
    return next(reason for reason in order if reason in reasons)


def count_pre_tokens(base: ByteBpe, texts: Iterable[str]) -> Counter[str]:
    """Count the pre-tokens of texts that hold Hangul."""
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(base.pre_tokens(base.normalise(text)))
    read = {token_text(spelling): count for spelling, count in counts.items()}
    return Counter({text: count for text, count in read.items() if text is not None and any(map(is_hangul, text))})


def continue_bpe(builder: MergeBuilder, base: ByteBpe, counts: Mapping[str, int], *, min_count: int = 2) -> None:
    """Merge the most frequent allowed pair until none is left that occurs `min_count` times."""
    texts = sorted(text for text, count in counts.items() if count >= min_count)
    words = list(track(base.encode(texts), "corpus", total=len(texts)))
    pairs = _PairCounts(builder, words, [counts[text] for text in texts])
    while (pair := pairs.pop(min_count)) is not None:
        if builder.refusal(*pair) is None:  # a token that another merge made meanwhile may stand in its way
            builder.append(*pair)
            pairs.merge(pair)


class _PairCounts:
    """How often each allowed pair of neighbours is in the words, kept current."""

    def __init__(self, builder: MergeBuilder, words: list[list[int]], frequencies: list[int]) -> None:
        self._builder = builder
        self._words = words
        self._frequencies = frequencies
        self._counts: dict[Pair, int] = {}
        self._places: dict[Pair, list[int]] = {}
        self._allowed: dict[Pair, bool] = {}
        self._candidates = "\n".join(builder.candidates)
        for number in range(len(words)):
            self._add(number)
        self._heap = [(-count, pair) for pair, count in self._counts.items()]
        heapq.heapify(self._heap)

    def pop(self, min_count: int) -> Pair | None:
        """Return the most frequent pair, of equals the one with the lowest ids, and forget it."""
        while self._heap:
            stored, pair = heapq.heappop(self._heap)
            count = self._counts.get(pair, 0)
            if -stored == count >= min_count:
                return pair
            if count >= min_count:  # it changed since it was pushed
                heapq.heappush(self._heap, (-count, pair))
        return None

    def merge(self, pair: Pair) -> None:
        """Bring the words with a pair up to date with the builder's merges."""
        counts, grown = self._counts, set()
        for number in sorted(set(self._places.pop(pair))):
            word = self._words[number]
            before = list(pairwise(word))
            if pair not in before:  # another merge took it since
                continue
            for gone in before:
                if gone in counts:
                    counts[gone] -= self._frequencies[number]
            self._builder.settle(word)
            grown.update(self._add(number, set(before)))
        del counts[pair]
        for new in grown:
            heapq.heappush(self._heap, (-counts[new], new))

    def _add(self, number: int, known: Container[Pair] = ()) -> list[Pair]:
        """Count the pairs of a word; return those that are allowed and were not known to be in it."""
        counts, allowed, added = self._counts, self._allowed, []
        for pair in pairwise(self._words[number]):
            if pair not in allowed:
                allowed[pair] = self._is_allowed(pair)
            if allowed[pair]:
                counts[pair] = counts.get(pair, 0) + self._frequencies[number]
                if pair not in known:
                    self._places.setdefault(pair, []).append(number)
                    added.append(pair)
        return added

    def _is_allowed(self, pair: Pair) -> bool:
        made = self._builder.spelling(pair[0]) + self._builder.spelling(pair[1])
        if made in self._builder.candidates:
            return True
        is_part = made in self._candidates and is_unfinished_syllable(token_bytes(made))
        return is_part and self._builder.refusal(*pair) is None


CONFIG_FILE = "tokenizer_config.json"
KEPT_FILES = (
    CONFIG_FILE,
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "additional_chat_templates",
)
"""Copied as they are: special tokens, padding side, chat template. All ids they name keep their meaning."""
_STALE_FILES = ("vocab.json", "merges.txt", "vocab.txt")


def write_tokenizer(base: ByteBpe, expansion: Expansion, folder: Path) -> None:
    """Write ``tokenizer.json`` and the base's other tokenizer files.

    The base's added tokens enter the model's vocabulary with their ids: on loading, the library ignores the stored ids
    of added tokens and numbers those on that the vocabulary lacks, which would put special tokens behind the new ones.

    Raises `UserError` if the expansion belongs to another base.
    """
    if expansion.first_id != base.size:
        raise UserError(
            f"the expansion starts at id {expansion.first_id:,}, but {base.name} has {base.size:,} ids; give the base "
            f"it was made for"
        )
    folder.mkdir(parents=True, exist_ok=True)
    for name in KEPT_FILES:
        if base.folder is not None:
            _copy(base.folder / name, folder / name)
    for name in _STALE_FILES:
        (folder / name).unlink(missing_ok=True)
    if expansion.method == "added-tokens":
        _list_added_tokens(expansion, folder / CONFIG_FILE)
    write_text(folder / TOKENIZER_FILE, json.dumps(expanded_spec(base, expansion), ensure_ascii=False))


def expanded_spec(base: ByteBpe, expansion: Expansion) -> dict[str, Any]:
    """Return the ``tokenizer.json`` of the expanded tokenizer; everything but vocabulary and merges is the base's."""
    model = base.spec["model"]
    vocabulary = {**base.vocabulary, **base.added_tokens}
    merges = list(model["merges"])
    added = list(base.spec.get("added_tokens") or ())
    if expansion.method == "merges":
        vocabulary |= {token: expansion.first_id + place for place, token in enumerate(expansion.tokens)}
        as_text = bool(merges) and isinstance(merges[0], str)
        merges += [" ".join(pair) if as_text else list(pair) for pair in expansion.merges]
    else:
        added += [_added_token(text, expansion.first_id + place) for place, text in enumerate(expansion.texts)]
    vocabulary = dict(sorted(vocabulary.items(), key=lambda item: item[1]))
    return base.spec | {"added_tokens": added, "model": model | {"vocab": vocabulary, "merges": merges}}


def _added_token(text: str | None, number: int) -> dict[str, Any]:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
    return {"id": number, "content": text, **flags}


def _list_added_tokens(expansion: Expansion, config: Path) -> None:
    """Add new added tokens to the list in ``tokenizer_config.json``, which transformers prefers where there is one."""
    values = json.loads(config.read_text(encoding="utf-8")) if config.is_file() else {}
    if "added_tokens_decoder" in values:
        for place, text in enumerate(expansion.texts):
            token = _added_token(text, expansion.first_id + place)
            values["added_tokens_decoder"][str(token.pop("id"))] = token
        write_json(config, values)


def _copy(source: Path, target: Path) -> None:
    if source.is_dir():
        shutil.copytree(source, target, dirs_exist_ok=True)
    elif source.is_file():
        shutil.copyfile(source, target)

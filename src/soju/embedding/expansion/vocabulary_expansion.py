"""Which tokens and merges does an expansion add, and what did each new token use to be?"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal, Self

from soju.core.errors import UserError
from soju.core.files import write_text
from soju.embedding.expansion.byte_bpe import ByteBpe
from soju.embedding.expansion.byte_level import token_text
from soju.embedding.expansion.continued_bpe import continue_bpe
from soju.embedding.expansion.merge_building import MergeBuilder, reach_candidates

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

        Args:
            path: The file, or the folder it is in.

        Returns:
            The expansion.

        Raises:
            UserError: If it is missing or no expansion.
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
    """Append the merges that make each candidate one token, in the given order.

    Args:
        base: The tokenizer to expand.
        candidates: Byte-level spellings, the most wanted first; see `find_candidates`.
        limit: New tokens at most, intermediates counted.
        max_intermediates: Tokens at most that are only parts of candidates.

    Returns:
        The expansion.
    """
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
    """Make each candidate an added token, for comparison: that is no coarsening and cuts words apart.

    Args:
        base: The tokenizer to expand.
        candidates: Byte-level spellings, the most wanted first.
        limit: New tokens at most.

    Returns:
        The expansion.
    """
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

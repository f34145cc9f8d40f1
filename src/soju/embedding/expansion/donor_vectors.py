"""What does another model know about the new tokens? Its vectors, and the tokens it shares with the base.

Shape letters: T = tokens of the donor, A = anchors (tokens of both models), N = new tokens, F = width of the vectors.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from soju.core.errors import UserError


@dataclass(frozen=True)
class DonorVectors:
    """Vectors of new tokens and of anchors in one space, which may be a model's embedding or made from a corpus.

    Tokens are the same when their bytes are. Decoding them to text first would turn every token that is a part of a
    character into the same replacement character, and so make anchors of tokens that have nothing in common.
    """

    new_NF: Tensor
    """Of the new tokens, in their order; zeros where the donor has no vector."""
    known_N: Tensor
    """Bool: does the donor have a vector? It lacks the intermediates of merges, and what its corpus does not hold."""
    anchor_AF: Tensor
    anchor_ids_A: Tensor
    """Ids of the anchors in the base, ascending."""

    @classmethod
    def match(
        cls,
        vectors_TF: Tensor,
        tokens: Sequence[bytes | None],
        *,
        base_tokens: Sequence[bytes | None],
        new_tokens: Sequence[bytes],
        limit: int | None = None,
    ) -> Self:
        """Find the new tokens and the anchors among the donor's tokens.

        Args:
            vectors_TF: One row for each of the donor's tokens, any float type; a row of zeros counts as none.
            tokens: The bytes of each of them; ``None`` for special and added tokens, which match nothing.
            base_tokens: The same for the base, by id.
            new_tokens: The bytes of each new token.
            limit: How many anchors at most: those with the lowest ids of the base, which in a BPE are its commonest.

        Returns:
            The vectors, float32.

        Raises:
            UserError: If there are more tokens than rows, or the two share no token.
        """
        if len(vectors_TF) < len(tokens):
            raise UserError(
                f"the donor's tokenizer has {len(tokens):,} ids and its model {len(vectors_TF):,} rows; give a donor "
                f"whose tokenizer and model belong together"
            )
        has_vector_T = vectors_TF.abs().amax(dim=1) > 0
        row = {token: place for place, token in enumerate(tokens) if token is not None and has_vector_T[place]}
        shared = [(number, row[token]) for number, token in enumerate(base_tokens) if token and token in row]
        if not shared:
            raise UserError("the donor shares no token with the base; choose another donor, or an initialiser without")
        ids, rows = zip(*shared[:limit], strict=True)
        known_N = torch.tensor([token in row for token in new_tokens], dtype=torch.bool)
        new_NF = vectors_TF[[row.get(token, 0) for token in new_tokens]].float()
        return cls(new_NF * known_N[:, None], known_N, vectors_TF[list(rows)].float(), torch.tensor(ids))

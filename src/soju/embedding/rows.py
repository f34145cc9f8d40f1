"""Rows that stages learn from, and the batches that are made of them.

Shape letters: N = vectors, D = dimensions, B = rows in the batch, S = tokens of the longest, T = its new tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from soju.embedding.losses import last_old_positions

Encode = Callable[[Sequence[str]], list[list[int]]]
"""Token ids of texts, cut and with what ends a text."""


class Rows(Protocol):
    """What a stage learns from, by place."""

    def __len__(self) -> int: ...

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Characters of each row: rows of a batch should be of similar length."""

    def texts_at(self, places: Sequence[int]) -> list[str]:
        """Return the texts of a batch."""

    def labels_at(self, places: Sequence[int]) -> dict[str, Tensor]:
        """Return what the loss compares them with."""


@dataclass(frozen=True, slots=True)
class TextRows:
    """Texts to train on; some have a vector to be pulled to."""

    texts: Sequence[str]
    targets_ND: NDArray[np.float32] | None = None
    """Vectors of length 1."""
    target_of: NDArray[np.int64] | None = None
    """For each text its row in `targets_ND`; -1 for none. All texts in order when not given."""

    def __len__(self) -> int:
        return len(self.texts)

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Characters of each text."""
        return np.array([len(text) for text in self.texts], np.int64)

    def texts_at(self, places: Sequence[int]) -> list[str]:
        """Return the texts, B of them."""
        return [self.texts[place] for place in places]

    def labels_at(self, places: Sequence[int]) -> dict[str, Tensor]:
        """Return ``target`` ``(B, D)`` and ``has_target`` ``(B,)``; nothing where no text has a target."""
        if self.targets_ND is None:
            return {}
        numbers = np.array(places) if self.target_of is None else self.target_of[list(places)]
        return {
            "target": torch.from_numpy(np.asarray(self.targets_ND[numbers.clip(min=0)])),
            "has_target": torch.from_numpy(numbers >= 0),
        }


@dataclass(frozen=True, slots=True)
class LabelledPairs:
    """Pairs of texts with a number: a score in [0, 1], or 1 for entailment and 0 for contradiction."""

    firsts: Sequence[str]
    seconds: Sequence[str]
    labels: Sequence[float]

    def __len__(self) -> int:
        return len(self.firsts)

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Characters of both texts."""
        return np.array([len(a) + len(b) for a, b in zip(self.firsts, self.seconds, strict=True)], np.int64)

    def texts_at(self, places: Sequence[int]) -> list[str]:
        """Return the first texts, then the second ones, 2 B in all."""
        return [side[place] for side in (self.firsts, self.seconds) for place in places]

    def labels_at(self, places: Sequence[int]) -> dict[str, Tensor]:
        """Return ``score`` ``(B,)``."""
        return {"score": torch.tensor([self.labels[place] for place in places])}


def pad(ids: Sequence[Sequence[int]], *, pad_id: int, left: bool) -> dict[str, Tensor]:
    """Return ``input_ids`` and ``attention_mask``, ``(B, S)``.

    >>> pad([[5, 6], [7]], pad_id=0, left=True)["input_ids"].tolist()
    [[5, 6], [0, 7]]
    """
    input_ids = torch.full((len(ids), max(map(len, ids))), pad_id, dtype=torch.long)
    mask = torch.zeros_like(input_ids)
    for place, text in enumerate(ids):
        columns = slice(-len(text), None) if left else slice(0, len(text))
        input_ids[place, columns] = torch.tensor(text)
        mask[place, columns] = 1
    return {"input_ids": input_ids, "attention_mask": mask}


class Collator:
    """Makes a batch of rows: padded tokens, labels, and the old tokens below new ones for self-distillation.

    Args:
        rows: The rows.
        model: Whose tokenizer and prompt are used.
        max_length: Tokens after which a text is cut; the model's own limit when not given.
        decompositions: Old ids of a new id, for self-distillation.
    """

    valid_label_columns = ("label",)

    def __init__(
        self,
        rows: Rows,
        model: Any,
        *,
        max_length: int | None = None,
        decompositions: Callable[[int], Sequence[int]] | None = None,
    ) -> None:
        self._rows = rows
        self._encode = encoder_of(model, max_length=max_length)
        self._pad_id: int = model.tokenizer.pad_token_id
        self._left = model.tokenizer.padding_side == "left"
        self._decompositions = decompositions

    def __call__(self, batch: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Return ``text_input_ids`` and ``text_attention_mask`` ``(B, S)``, and ``label``."""
        places = [int(item["row"]) for item in batch]
        ids = self._encode(self._rows.texts_at(places))
        label = self._rows.labels_at(places) | self._alignment(ids)
        padded = pad(ids, pad_id=self._pad_id, left=self._left)
        return {**{f"text_{name}": value for name, value in padded.items()}, "label": label}

    def _alignment(self, ids: list[list[int]]) -> dict[str, Tensor]:
        """Pad the old tokens and say where the last old token of each new one lies; see `last_old_positions`."""
        if self._decompositions is None:
            return {}
        pieces = [[self._decompositions(token) for token in text] for text in ids]
        old = pad(
            [[piece for token in text for piece in token] for text in pieces], pad_id=self._pad_id, left=self._left
        )
        counts = pad([[len(token) for token in text] for text in pieces], pad_id=0, left=self._left)
        first_B = old["attention_mask"].argmax(dim=1)
        return {
            "old_input_ids": old["input_ids"],
            "old_attention_mask": old["attention_mask"],
            "last_old_BT": last_old_positions(counts["input_ids"], start_B=first_B),
        }


def encoder_of(model: Any, *, max_length: int | None) -> Encode:
    """Return the tokenizer of a sentence-transformers model with its own prompt, as a function of texts."""
    tokenizer = model.tokenizer
    prompt = (model.prompts or {}).get(model.default_prompt_name or "", "")
    length = min(max_length or model.max_seq_length, model.max_seq_length or 512)

    def encode(texts: Sequence[str]) -> list[list[int]]:
        ids: list[list[int]] = tokenizer(
            [prompt + text for text in texts], truncation=True, max_length=length, padding=False
        )["input_ids"]
        return ids

    return encode

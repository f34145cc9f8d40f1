"""Batches of the training stages: padded tokens, the old tokens below them, vectors to be pulled to.

Shape letters: N = vectors, D = dimensions, B = texts in the batch, S = tokens of the longest, T = its new tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypedDict

import numpy as np
import torch
from datasets import Dataset
from numpy.typing import NDArray
from torch import Tensor

from soju.embedding.losses import last_old_positions

Encode = Callable[[Sequence[str]], list[list[int]]]
"""Token ids of texts, cut and with what ends a text."""


class _Padding(TypedDict):
    pad_id: int
    left: bool


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
        """Characters of each text: texts of a batch should be of similar length."""
        return np.array([len(text) for text in self.texts], np.int64)

    def dataset(self) -> Dataset:
        """Return what the trainer counts and shuffles: places of texts."""
        return Dataset.from_dict({"row": list(range(len(self)))})


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

    def dataset(self) -> Dataset:
        """Return what the trainer counts and shuffles: places of pairs."""
        return Dataset.from_dict({"row": list(range(len(self)))})


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


class TextCollator:
    """Makes a batch of `TextRows`.

    Args:
        rows: The texts.
        encode: The student's tokenizer.
        pad_id: Token that pads.
        left: Whether texts are padded on the left.
        decompositions: Old ids of a new id, for self-distillation.
    """

    valid_label_columns = ("label",)

    def __init__(
        self,
        rows: TextRows,
        encode: Encode,
        *,
        pad_id: int,
        left: bool,
        decompositions: Callable[[int], Sequence[int]] | None = None,
    ) -> None:
        self._rows = rows
        self._encode = encode
        self._pad: _Padding = {"pad_id": pad_id, "left": left}
        self._decompositions = decompositions

    def __call__(self, batch: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Return ``text_input_ids`` and ``text_attention_mask`` ``(B, S)``, and ``label``."""
        places = [int(item["row"]) for item in batch]
        ids = self._encode([self._rows.texts[place] for place in places])
        label: dict[str, Tensor] = self._targets(places)
        if self._decompositions is not None:
            label |= self._alignment(ids)
        padded = pad(ids, **self._pad)
        return {**{f"text_{name}": value for name, value in padded.items()}, "label": label}

    def _targets(self, places: list[int]) -> dict[str, Tensor]:
        targets = self._rows.targets_ND
        if targets is None:
            return {}
        numbers = np.array(places) if self._rows.target_of is None else self._rows.target_of[places]
        return {
            "target": torch.from_numpy(np.asarray(targets[numbers.clip(min=0)])),
            "has_target": torch.from_numpy(numbers >= 0),
        }

    def _alignment(self, ids: list[list[int]]) -> dict[str, Tensor]:
        """Pad the old tokens and say where the last old token of each new one lies; see `last_old_positions`."""
        assert self._decompositions is not None
        pieces = [[self._decompositions(token) for token in text] for text in ids]
        old = pad([[piece for token in text for piece in token] for text in pieces], **self._pad)
        counts = pad([[len(token) for token in text] for text in pieces], pad_id=0, left=self._pad["left"])
        first_B = old["attention_mask"].argmax(dim=1)
        return {
            "old_input_ids": old["input_ids"],
            "old_attention_mask": old["attention_mask"],
            "last_old_BT": last_old_positions(counts["input_ids"], start_B=first_B),
        }


class PairCollator:
    """Makes a batch of `LabelledPairs`: first texts, then second texts, in one matrix."""

    valid_label_columns = ("label",)

    def __init__(self, rows: LabelledPairs, encode: Encode, *, pad_id: int, left: bool) -> None:
        self._rows = rows
        self._encode = encode
        self._pad_id = pad_id
        self._left = left

    def __call__(self, batch: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Return ``text_input_ids`` and ``text_attention_mask`` ``(2 B, S)``, and ``label``."""
        places = [int(item["row"]) for item in batch]
        texts = [side[place] for side in (self._rows.firsts, self._rows.seconds) for place in places]
        padded = pad(self._encode(texts), pad_id=self._pad_id, left=self._left)
        label = {"score": torch.tensor([self._rows.labels[place] for place in places])}
        return {**{f"text_{name}": value for name, value in padded.items()}, "label": label}


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

"""Fewer pieces in a fast tokenizer's JSON, the same pieces for every text that needs none of the others.

Works on the parsed ``tokenizer.json`` of the tokenizers library. New ids are the places of the kept old ids in
ascending order, so that special tokens with the lowest ids keep theirs.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from soju.core.errors import UserError

Spec = dict[str, Any]
NewId = Callable[[int], int]
BPE, UNIGRAM, WORD_PIECE, WORD_LEVEL = "BPE", "Unigram", "WordPiece", "WordLevel"


def trim_tokenizer_json(spec: Spec, old_ids: NDArray[np.int64]) -> Spec:
    """Drop pieces.

    - Unigram: the kept pieces keep their scores.
    - BPE: merges whose parts or result are gone go too.
    - WordPiece and word level: pieces only.

    Added tokens, the post-processor and padding get the new ids.

    Args:
        spec: Content of ``tokenizer.json``; not changed.
        old_ids: Ids to keep, ascending; `indispensable_ids` among them.

    Returns:
        The new content.

    Raises:
        UserError: If it holds a kind of model or post-processor not known here.
        ValueError: If an id that cannot be spared is missing.
    """
    places = {int(old): new for new, old in enumerate(old_ids)}
    if missing := sorted(indispensable_ids(spec) - places.keys()):
        raise ValueError(f"ids {missing[:5]} cannot be spared by the tokenizer and are not among old_ids")
    trimmed = copy.deepcopy(spec)
    trimmed["model"] = _trim_model(trimmed["model"], places)
    trimmed["added_tokens"] = [
        token | {"id": places[token["id"]]} for token in trimmed["added_tokens"] if token["id"] in places
    ]
    for place in _post_processor_ids(trimmed.get("post_processor")):
        place.renumber(places.__getitem__)
    if trimmed.get("padding"):
        trimmed["padding"]["pad_id"] = places[trimmed["padding"]["pad_id"]]
    return trimmed


def indispensable_ids(spec: Spec) -> set[int]:
    """Return the ids a tokenizer cannot work without: special and unknown tokens, those of post-processor and padding.

    A Unigram model's least likely piece is one of them: the price of an unknown character is set by its score, so
    without it other pieces could win.
    """
    model, ids = spec["model"], {token["id"] for token in spec["added_tokens"] if token["special"]}
    for place in _post_processor_ids(spec.get("post_processor")):
        ids.update(place.ids())
    if spec.get("padding"):
        ids.add(spec["padding"]["pad_id"])
    if _kind(model) == UNIGRAM:
        scores = [score for _, score in model["vocab"]]
        ids.add(scores.index(min(scores)))
        ids.update(() if model.get("unk_id") is None else (model["unk_id"],))
    elif model.get("unk_token") in model["vocab"]:
        ids.add(model["vocab"][model["unk_token"]])
    return ids


def merge_parts(spec: Spec) -> dict[str, list[str]]:
    """Return, for each piece that BPE merges can make, the pieces they make it of; empty for other models."""
    parts: defaultdict[str, list[str]] = defaultdict(list)
    if _kind(spec["model"]) == BPE:
        for left, right, result in _merges(spec["model"]):
            parts[result] += [left, right]
    return dict(parts)


def unknown_word_pieces(spec: Spec, word: str) -> list[str]:
    """Return the pieces WordPiece tries on a word before it gives up; without them it might try others and succeed.

    Args:
        spec: Content of ``tokenizer.json``.
        word: A word after normalisation and pre-tokenisation.

    Returns:
        Pieces; none for other models and for words that WordPiece knows.
    """
    model = spec["model"]
    if _kind(model) != WORD_PIECE or len(word) > model.get("max_input_chars_per_word", 100):
        return []
    found: list[str] = []
    start = 0
    while start < len(word):
        prefix = model.get("continuing_subword_prefix", "##") if start else ""
        ends = (end for end in range(len(word), start, -1) if prefix + word[start:end] in model["vocab"])
        end = next(ends, None)
        if end is None:
            return found
        found.append(prefix + word[start:end])
        start = end
    return []


def _kind(model: Spec) -> str:
    kind = model.get("type")
    if kind not in (BPE, UNIGRAM, WORD_PIECE, WORD_LEVEL):
        raise UserError(f"the tokenizer's model is {kind}; only BPE, Unigram, WordPiece and WordLevel can be trimmed")
    return str(kind)


def _trim_model(model: Spec, places: dict[int, int]) -> Spec:
    if _kind(model) == UNIGRAM:
        model["vocab"] = [entry for old, entry in enumerate(model["vocab"]) if old in places]
        if model.get("unk_id") is not None:
            model["unk_id"] = places[model["unk_id"]]
        return model
    model["vocab"] = {piece: places[old] for piece, old in model["vocab"].items() if old in places}
    if _kind(model) == BPE:
        kept = set(model["vocab"])
        model["merges"] = [[left, right] for left, right, result in _merges(model) if {left, right, result} <= kept]
    return model


def _merges(model: Spec) -> Iterator[tuple[str, str, str]]:
    prefix = model.get("continuing_subword_prefix") or ""
    for merge in model["merges"]:
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        yield left, right, left + right[len(prefix) :]


class _Ids:
    """A list of a post-processor in which some entries are ids."""

    def __init__(self, values: list[Any], at: Sequence[int]) -> None:
        self._values, self._at = values, at

    def ids(self) -> list[int]:
        return [self._values[place] for place in self._at]

    def renumber(self, new_id: NewId) -> None:
        for place in self._at:
            self._values[place] = new_id(self._values[place])


def _post_processor_ids(processor: Spec | None) -> Iterator[_Ids]:
    kind = None if processor is None else processor["type"]
    if processor is None or kind == "ByteLevel":
        return
    if kind == "Sequence":
        for part in processor["processors"]:
            yield from _post_processor_ids(part)
    elif kind == "TemplateProcessing":
        for token in processor["special_tokens"].values():
            yield _Ids(token["ids"], range(len(token["ids"])))
    elif kind in ("BertProcessing", "RobertaProcessing"):
        yield from (_Ids(processor[name], [1]) for name in ("sep", "cls"))
    else:
        raise UserError(f"the tokenizer's post-processor is {kind}, which is not known here; it cannot be trimmed")

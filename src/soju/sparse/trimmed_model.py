"""A masked language model with fewer terms: fewer pieces in its tokenizer, smaller embeddings, a smaller head.

`count_ids` and `choose_ids` say which pieces a corpus needs; `trim_vocabulary` keeps them and copies every other
weight; `check_trimmed` proves on texts that the rest says what it said. Texts that need none of the dropped pieces keep
their pieces and their numbers. The tokenizer is edited as the parsed ``tokenizer.json`` of the tokenizers library. New
ids are the places of the kept old ids in ascending order, so that special tokens with the lowest ids keep theirs.

Shape letters: V = ids before, K = ids kept.
"""

from __future__ import annotations

import copy
import json
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence, Set
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from tokenizers import Tokenizer, pre_tokenizers
from torch import Tensor

from soju.core.errors import UserError
from soju.core.language import is_hangul

Spec = dict[str, Any]
NewId = Callable[[int], int]
BPE, UNIGRAM, WORD_PIECE, WORD_LEVEL = "BPE", "Unigram", "WordPiece", "WordLevel"


TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")


class Trimmed(NamedTuple):
    """A model and its tokenizer with a smaller vocabulary."""

    model: Any
    """Of the same class as before."""
    tokenizer: Any
    old_ids: NDArray[np.int64]
    """``(K,)``, ascending: the id that each new id had before."""


def special_ids(model: Any, tokenizer: Any) -> set[int]:
    """Return the ids with a piece that a model's configuration, its tokenizer or the tokenizer's JSON name."""
    named = {number for config in _configs(model) for numbers in _named_ids(config).values() for number in numbers}
    found = named | set(tokenizer.all_special_ids) | indispensable_ids(tokenizer_spec(tokenizer))
    return found & set(tokenizer.get_vocab().values())


def trim_vocabulary(model: Any, tokenizer: Any, keep_ids: ArrayLike) -> Trimmed:
    """Keep some ids of a masked language model and forget the others.

    New ids are the places of the kept ones in ascending order. Input embeddings, output weights and bias, ids in the
    configuration and the whole tokenizer follow; every other weight is copied.

    Args:
        model: A ``*ForMaskedLM`` of transformers; not changed.
        tokenizer: Its fast tokenizer; not changed.
        keep_ids: Ids to keep, in any order, those of `special_ids` among them; usually from `choose_ids`.

    Returns:
        New objects; the model in the same mode, type and device.

    Raises:
        ValueError: If an id does not exist or a special one is missing.
        UserError: If the tokenizer or the model cannot be taken apart.
    """
    if max(tokenizer.get_vocab().values()) >= model.config.vocab_size:
        raise UserError(
            f"the tokenizer has ids beyond the {model.config.vocab_size:,} of the model; resize the model's embeddings"
        )
    old_ids = np.unique(np.asarray(keep_ids, np.int64))
    if not len(old_ids) or old_ids[0] < 0 or old_ids[-1] >= model.config.vocab_size:
        raise ValueError(f"keep_ids must be ids in [0, {model.config.vocab_size})")
    if missing := sorted(special_ids(model, tokenizer) - set(old_ids.tolist())):
        raise ValueError(f"ids {missing[:5]} are special tokens and not among keep_ids")
    return Trimmed(_trim_model(model, old_ids), _trim_tokenizer(tokenizer, old_ids), old_ids)


def _trim_model(model: Any, old_ids: NDArray[np.int64]) -> Any:
    places = {int(old): new for new, old in enumerate(old_ids)}
    config = copy.deepcopy(model.config)
    config.vocab_size = len(old_ids)
    _renumber(config, places)
    with torch.random.fork_rng(devices=[]):  # random weights are drawn and overwritten; the caller's dice stay
        trimmed = type(model)(config)
    if getattr(model, "generation_config", None) is not None:
        trimmed.generation_config = copy.deepcopy(model.generation_config)
        _renumber(trimmed.generation_config, places)
    new_shapes = {name: tensor.shape for name, tensor in trimmed.state_dict().items()}
    taken = {name: _take(name, tensor, new_shapes[name], old_ids) for name, tensor in model.state_dict().items()}
    trimmed.to(dtype=model.dtype).load_state_dict(taken)
    trimmed.tie_weights()
    return trimmed.to(device=model.device).train(model.training)


def _take(name: str, tensor: Tensor, shape: torch.Size, old_ids: NDArray[np.int64]) -> Tensor:
    """Return the kept rows of a tensor that has one for each id, other tensors whole."""
    if tensor.shape == shape:
        return tensor
    if tensor.shape[1:] != shape[1:] or shape[0] != len(old_ids):
        raise UserError(
            f"{name} goes from {tuple(tensor.shape)} to {tuple(shape)}: this architecture cannot be trimmed"
        )
    return tensor[torch.as_tensor(old_ids, device=tensor.device)]


def _configs(model: Any) -> list[Any]:
    return [config for config in (model.config, getattr(model, "generation_config", None)) if config is not None]


def _named_ids(config: Any) -> dict[str, list[int]]:
    values = {name: value for name, value in config.to_dict().items() if name.endswith("_token_id")}
    return {name: value if isinstance(value, list) else [value] for name, value in values.items() if value is not None}


def _renumber(config: Any, places: dict[int, int]) -> None:
    for name, numbers in _named_ids(config).items():
        new = [places[number] for number in numbers if number in places]  # an id without a piece was never usable
        several = isinstance(getattr(config, name), list)
        setattr(config, name, new if several else next(iter(new), None))


def _trim_tokenizer(tokenizer: Any, old_ids: NDArray[np.int64]) -> Any:
    spec = trim_tokenizer_json(tokenizer_spec(tokenizer), old_ids)
    names = {number: piece for piece, number in tokenizer.get_vocab().items()}
    expected = {names[int(old)]: new for new, old in enumerate(old_ids) if int(old) in names}
    # By way of a folder, because that is how it will be read; files of slow tokenizers would bring the old pieces back.
    with TemporaryDirectory() as temporary:
        folder = Path(temporary)
        tokenizer.save_pretrained(folder)
        for path in folder.iterdir():
            if path.name not in TOKENIZER_FILES:
                path.unlink()
        (folder / "tokenizer.json").write_text(json.dumps(spec, ensure_ascii=False), encoding="utf-8")
        settings_file = folder / "tokenizer_config.json"
        settings = json.loads(settings_file.read_text(encoding="utf-8"))
        settings.pop("added_tokens_decoder", None)  # repeats tokenizer.json, with the old ids
        settings_file.write_text(json.dumps(settings, ensure_ascii=False), encoding="utf-8")
        trimmed = type(tokenizer).from_pretrained(folder)
        trimmed.name_or_path = tokenizer.name_or_path
    if trimmed.get_vocab() != expected:
        raise UserError(f"{type(tokenizer).__name__} does not read its trimmed pieces back; it cannot be trimmed")
    return trimmed


def check_trimmed(model: Any, tokenizer: Any, trimmed: Trimmed, texts: Sequence[str], *, tolerance: float) -> int:
    """Prove on texts that the trimmed model says what the whole one said.

    Texts that need a piece that is gone are passed over: they have other pieces now.

    Args:
        model: The whole model.
        tokenizer: Its tokenizer.
        trimmed: Result of `trim_vocabulary`.
        texts: A few texts; their logits over the whole vocabulary must fit in memory.
        tolerance: Largest difference of a logit allowed.

    Returns:
        Number of texts compared.

    Raises:
        UserError: If pieces or logits differ.
    """
    kept = set(trimmed.old_ids.tolist())
    limits = {"truncation": True, "max_length": 32}
    compared = 0
    for text in texts:
        old = tokenizer(text, return_tensors="pt", **limits)
        if not kept.issuperset(old["input_ids"][0].tolist()):
            continue
        new = trimmed.tokenizer(text, return_tensors="pt", **limits)
        before, after = (
            owner.convert_ids_to_tokens(inputs["input_ids"][0].tolist())
            for owner, inputs in ((tokenizer, old), (trimmed.tokenizer, new))
        )
        if before != after:
            raise UserError(
                f'"{text[:80]}" had the pieces {before} and now has {after}: this tokenizer cannot be trimmed'
            )
        difference = float((_logits(model, old)[:, trimmed.old_ids] - _logits(trimmed.model, new)).abs().max())
        if not difference <= tolerance:
            raise UserError(f'"{text[:80]}": logits differ by {difference:.3g}: this architecture cannot be trimmed')
        compared += 1
    return compared


@torch.no_grad()
def _logits(model: Any, inputs: Any) -> Tensor:
    mode = model.training
    logits = model.eval()(**inputs.to(model.device)).logits[0].float().cpu()
    model.train(mode)
    return logits


BATCH = 1024
_BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")
_BOUNDARIES = ("▁", "##")


def tokenizer_spec(tokenizer: Any) -> Spec:
    """Return the parsed ``tokenizer.json`` of a fast tokenizer of transformers."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if not isinstance(backend, Tokenizer):
        raise UserError(f"{type(tokenizer).__name__} has no tokenizer.json; save the model with a fast tokenizer")
    return json.loads(backend.to_str())


def count_ids(spec: Spec, texts: Iterable[str]) -> NDArray[np.int64]:
    """Count how often each id stands in texts, special tokens around them not counted.

    Args:
        spec: Content of ``tokenizer.json``.
        texts: Any number.

    Returns:
        Counts, ``(V,)``. A piece that WordPiece only tried on a word before it called it unknown counts 1, see
        `unknown_word_pieces`.
    """
    backend = Tokenizer.from_str(json.dumps(spec | {"truncation": None, "padding": None}))
    vocabulary = backend.get_vocab()
    counts_V = np.zeros(max(vocabulary.values()) + 1, np.int64)
    tried: set[int] = set()
    unknown = spec["model"].get("unk_token")
    stream = iter(texts)
    while batch := list(islice(stream, BATCH)):
        for text, encoding in zip(batch, backend.encode_batch(batch, add_special_tokens=False), strict=True):
            np.add.at(counts_V, np.asarray(encoding.ids, np.int64), 1)
            if unknown is not None and vocabulary.get(unknown) in encoding.ids:
                tried.update(vocabulary[p] for word in _words(backend, text) for p in unknown_word_pieces(spec, word))
    for number in tried:
        counts_V[number] = max(counts_V[number], 1)
    return counts_V


def choose_ids(
    spec: Spec, counts_V: NDArray[np.int64], *, max_size: int, required: Set[int] = frozenset()
) -> NDArray[np.int64]:
    """Choose the ids to keep: what cannot be spared, what unseen text falls back to, then what is needed most.

    The fall-back is every byte, ASCII character, Hangul syllable and jamo that is a piece of its own. With BPE, the
    pieces that a kept piece is merged from are kept too; they count as often as it.

    Args:
        spec: Content of ``tokenizer.json``.
        counts_V: Result of `count_ids`.
        max_size: Ids to keep at most.
        required: More ids that cannot be spared, such as those the model's configuration names.

    Returns:
        Ids, ascending. Ids of count 0 are only kept when they cannot be spared or are part of the fall-back.

    Raises:
        UserError: If `max_size` does not hold the special tokens and the fall-back.
    """
    vocabulary = _vocabulary(spec)
    names = {number: piece for piece, number in vocabulary.items()}
    parts = {
        vocabulary[piece]: sorted({vocabulary[part] for part in made_of if part in vocabulary})
        for piece, made_of in merge_parts(spec).items()
        if piece in vocabulary
    }
    fallback = {number for piece, number in vocabulary.items() if _is_fallback(piece, _is_byte_level(spec))}
    kept = _with_parts((required | indispensable_ids(spec) | fallback) & names.keys(), parts)
    if len(kept) > max_size:
        raise UserError(
            f"max-size {max_size:,} is too small: special tokens and single characters alone are {len(kept):,} ids; "
            f"allow at least that many"
        )
    needs = {number: int(counts_V[number]) for number in names}
    prefix = spec["model"].get("continuing_subword_prefix") or ""
    lengths = {number: len(piece.removeprefix(prefix)) for number, piece in names.items()}
    # Longest first: a part, always shorter than the whole, then has its own count and those of all wholes.
    for number in sorted(needs, key=lambda number: -lengths[number]):
        for part in parts.get(number, ()):
            needs[part] += needs[number]
    # Shorter first among equals, so that a cut never parts a piece from what it is merged from.
    ranked = sorted(
        (number for number, need in needs.items() if need and number not in kept),
        key=lambda number: (-needs[number], lengths[number], number),
    )
    return np.array(sorted(kept | set(ranked[: max_size - len(kept)])), np.int64)


def _vocabulary(spec: Spec) -> dict[str, int]:
    """Return piece to id, added tokens included."""
    stored = spec["model"]["vocab"]
    pieces = dict(stored) if isinstance(stored, dict) else {piece: number for number, (piece, _) in enumerate(stored)}
    return pieces | {token["content"]: token["id"] for token in spec["added_tokens"]}


def _words(backend: Tokenizer, text: str) -> list[str]:
    normalised = backend.normalizer.normalize_str(text) if backend.normalizer else text
    if backend.pre_tokenizer is None:
        return [normalised]
    return [word for word, _ in backend.pre_tokenizer.pre_tokenize_str(normalised)]


def _with_parts(numbers: Iterable[int], parts: dict[int, list[int]]) -> set[int]:
    found: set[int] = set()
    waiting = list(numbers)
    while waiting:
        number = waiting.pop()
        if number not in found:
            found.add(number)
            waiting += parts.get(number, ())
    return found


def _is_byte_level(spec: Spec) -> bool:
    return '"ByteLevel"' in json.dumps([spec.get("pre_tokenizer"), spec.get("decoder")])


def _is_fallback(piece: str, byte_level: bool) -> bool:
    if _BYTE.fullmatch(piece):
        return True
    if byte_level:
        if len(piece) == 1:
            return piece in _BYTE_VALUES
        piece = bytes(_BYTE_VALUES.get(character, 0) for character in piece).decode("utf-8", "replace").strip(" ")
    for boundary in _BOUNDARIES:
        piece = piece.removeprefix(boundary) or piece
    return len(piece) == 1 and (piece.isascii() or is_hangul(piece) or piece in _BOUNDARIES)


def _byte_values() -> dict[str, int]:
    """Return the byte that each letter of the byte-level alphabet stands for.

    Bytes that are printable in Latin-1 stand for themselves; the others are the alphabet's remaining letters in order.
    """
    alphabet: Sequence[str] = sorted(pre_tokenizers.ByteLevel.alphabet())
    plain = {letter: ord(letter) for letter in alphabet if ord(letter) < 256}
    others = sorted(set(range(256)) - set(plain.values()))
    shifted = [letter for letter in alphabet if ord(letter) >= 256]
    return plain | dict(zip(shifted, others, strict=True))


_BYTE_VALUES = _byte_values()


def trim_tokenizer_json(spec: Spec, old_ids: NDArray[np.int64]) -> Spec:
    """Drop pieces.

    - Unigram: the kept pieces keep their scores.
    - BPE: merges whose parts or result are gone go too.
    - WordPiece and word level: pieces only.

    Added tokens, the post-processor and padding get the new ids.
    """
    places = {int(old): new for new, old in enumerate(old_ids)}
    if missing := sorted(indispensable_ids(spec) - places.keys()):
        raise ValueError(f"ids {missing[:5]} cannot be spared by the tokenizer and are not among old_ids")
    trimmed = copy.deepcopy(spec)
    trimmed["model"] = _trim_pieces(trimmed["model"], places)
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
    """Return the pieces WordPiece tries on a word before it gives up; without them it might try others and succeed."""
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


def _trim_pieces(model: Spec, places: dict[int, int]) -> Spec:
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

"""A masked language model with fewer terms: smaller embeddings, a smaller head, the same numbers for the rest.

Shape letters: V = ids before, K = ids kept.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from soju.core.errors import UserError
from soju.sparse.tokenizer_trim import indispensable_ids, trim_tokenizer_json
from soju.sparse.vocabulary_choice import tokenizer_spec

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

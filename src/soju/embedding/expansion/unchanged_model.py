"""What of an expanded model is not its base's? Only new rows may differ: weights, settings, vectors are looked at."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from soju.embedding.expansion.vocabulary_expansion import Expansion

_NEW_VALUES = ("vocab_size", "_name_or_path", "transformers_version", "text_config")
"""Of a configuration: what an expansion may change."""


def embedding_rows(model: Any) -> tuple[int, int]:
    """Return the rows of a model's embedding and the number its configuration states."""
    transformer = model[0].auto_model
    return len(transformer.get_input_embeddings().weight), transformer.config.get_text_config().vocab_size


def changed_weights(models: tuple[Any, Any], expansion: Expansion) -> Iterator[str]:
    """Say which weights differ in any bit, rows of new tokens aside, and which of these rows are no numbers.

    Args:
        models: Base and expanded model, as SentenceTransformer loaded them.
        expansion: Which rows are new.

    Yields:
        A sentence for each tensor.
    """
    before, after = (model.state_dict() for model in models)
    for name in sorted(before.keys() ^ after.keys()):
        yield f"{name} is in one of the models only"
    embedding = models[1][0].auto_model.get_input_embeddings().weight
    for name, old in before.items():
        if name not in after:
            continue
        new = after[name]
        kept: list[Any] = [...]
        if new.data_ptr() == embedding.data_ptr():
            kept = [slice(expansion.first_id), slice(expansion.size, None)]
            if not new[expansion.first_id : expansion.size].isfinite().all():
                yield f"{name}: new rows are not finite"
        if old.dtype != new.dtype or any(not torch.equal(old[rows], new[rows]) for rows in kept):
            yield f"{name} differs"


def model_settings(model: Any) -> dict[str, Any]:
    """Return prompts, length, modules with their settings and the transformer's configuration, by name."""
    found = {name: getattr(model, name) for name in ("prompts", "default_prompt_name", "similarity_fn_name")}
    found["max_seq_length"] = model.max_seq_length
    for place, module in enumerate(model):
        found[f"module {place}"] = type(module).__name__
        settings: dict[str, Any] = getattr(module, "get_config_dict", dict)()
        found |= {f"module {place}: {name}": value for name, value in settings.items()}
    configuration = model[0].auto_model.config.to_dict()
    return found | {name: value for name, value in configuration.items() if name not in _NEW_VALUES}


def changed_settings(before: Mapping[str, Any], after: Mapping[str, Any]) -> Iterator[str]:
    """Say which settings differ."""
    for name in {**before, **after}:
        if before.get(name) != after.get(name):
            yield f"{name} is {after.get(name)!r} instead of {before.get(name)!r}"


def changed_vectors(texts: Sequence[str], models: tuple[Any, Any]) -> Iterator[str]:
    """Say which texts have another vector, in any bit."""
    before, after = (
        np.asarray(found.float().cpu())
        for found in (
            model.encode(list(texts), batch_size=16, show_progress_bar=False, convert_to_tensor=True)
            for model in models
        )
    )
    for text, old, new in zip(texts, before, after, strict=True):
        if not np.array_equal(old, new):
            yield f"{text[:60]!r} has another vector"

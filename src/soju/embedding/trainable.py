"""What does each stage train? Rows of the embedding, adapters, the last layers; everything else stands still."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from soju.core.errors import UserError

TRAINABLE_FILE = "trainable.safetensors"


@dataclass(frozen=True, slots=True)
class Group:
    """Parameters that join in at the same time."""

    name: str
    parameters: dict[str, nn.Parameter] = field(default_factory=dict)
    joins_at: float = 0.0
    """Share of the steps after which its learning rate leaves 0."""


def transformer_of(model: Any) -> nn.Module:
    """Return the Hugging Face model inside a sentence-transformers model."""
    module: nn.Module = model[0].model
    return module


def layers_of(model: Any) -> nn.ModuleList:
    """Return the transformer layers, first to last.

    Args:
        model: A sentence-transformers model.

    Returns:
        The layers.

    Raises:
        UserError: If they cannot be found.
    """
    transformer = transformer_of(model)
    for holder in (transformer, getattr(transformer, "model", None), getattr(transformer, "encoder", None)):
        for name in ("layers", "layer"):
            layers = getattr(holder, name, None)
            if isinstance(layers, nn.ModuleList):
                return layers
    raise UserError(f"{type(transformer).__name__}: its layers cannot be found; train stage 1 alone")


def freeze(model: Any) -> None:
    """Let nothing move."""
    model.requires_grad_(False)


def set_dropout(model: Any, share: float) -> None:
    """Give attention, and dropout layers that are there, this dropout in training; configuration stays as it is."""
    for module in transformer_of(model).modules():
        if isinstance(getattr(module, "attention_dropout", None), float):
            module.attention_dropout = share  # type: ignore[assignment]  # read at each pass in training
        elif isinstance(module, nn.Dropout):
            module.p = share


def embedding_group(model: Any) -> Group:
    """Let all rows of the embedding move."""
    embedding = transformer_of(model).get_input_embeddings()  # type: ignore[operator]
    return _group("rows", model, embedding)


def block_group(model: Any, count: int) -> Group:
    """Let the last layers move, with what they carry.

    Args:
        model: A sentence-transformers model.
        count: How many.

    Returns:
        Their parameters.

    Raises:
        UserError: If there are fewer.
    """
    layers = layers_of(model)
    if count > len(layers):
        raise UserError(f"blocks: {count} of {len(layers)} layers; give at most {len(layers)}")
    return _group("blocks", model, *layers[len(layers) - count :])


def all_group(model: Any) -> Group:
    """Let everything move: a base from scratch."""
    return _group("all", model, model)


def _group(name: str, model: Any, *modules: nn.Module) -> Group:
    chosen = {id(parameter) for module in modules for parameter in module.parameters()}
    found = {key: parameter for key, parameter in model.named_parameters() if id(parameter) in chosen}
    return Group(name, _moving(found))


def _moving(parameters: dict[str, nn.Parameter]) -> dict[str, nn.Parameter]:
    for name, parameter in parameters.items():
        if parameter.dtype != torch.float32:
            raise ValueError(f"{name} is {parameter.dtype}; small steps would round away, load the model in float32")
        parameter.requires_grad_(True)
    return parameters


def gradual(groups_of_layers: dict[int, dict[str, nn.Parameter]], over: float) -> list[Group]:
    """Let the parameters of layers join in from the top down.

    Args:
        groups_of_layers: Parameters by number of layer.
        over: Share of the steps after which the lowest one has joined in; 0 starts all at once.

    Returns:
        A group for each layer, the top one first.
    """
    numbers = sorted(groups_of_layers, reverse=True)
    return [
        Group(f"layer {number}", _moving(groups_of_layers[number]), joins_at=over * place / len(numbers))
        for place, number in enumerate(numbers)
    ]


def tensors_of(groups: list[Group]) -> dict[str, nn.Parameter]:
    """Return everything that moves, by name."""
    return {name: parameter for group in groups for name, parameter in group.parameters.items()}


def save_trainable(groups: list[Group], folder: Path) -> None:
    """Write what moves; the rest is where the stage started."""
    tensors = {name: value.detach().cpu().contiguous() for name, value in tensors_of(groups).items()}
    save_file(tensors, folder / TRAINABLE_FILE)


@torch.no_grad()
def load_trainable(groups: list[Group], folder: Path) -> None:
    """Read what `save_trainable` wrote.

    Args:
        groups: Of a model prepared in the same way.
        folder: A verified checkpoint.

    Raises:
        UserError: If other parameters were trained.
    """
    saved, ours = load_file(folder / TRAINABLE_FILE), tensors_of(groups)
    if differing := sorted(_differing(saved, ours)):
        raise UserError(
            f"{folder}: was trained with other parameters ({differing[0]} and {len(differing) - 1} more differ); "
            "resume with the settings it was started with"
        )
    for name, parameter in ours.items():
        parameter.copy_(saved[name])


def _differing(saved: dict[str, torch.Tensor], ours: dict[str, nn.Parameter]) -> Iterator[str]:
    yield from saved.keys() ^ ours.keys()
    yield from (name for name in saved.keys() & ours.keys() if saved[name].shape != ours[name].shape)

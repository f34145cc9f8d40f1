"""Small trained modules in the feed-forward blocks of a frozen transformers model, and how a model folder loads them.

A copy of this file goes into every model folder whose adapters cannot be folded, so that it loads without soju: it
imports nothing but torch, safetensors and sentence-transformers.

An adapter is a child named ``adapter`` of a linear layer that the model has anyway: no name of the model's own weights
changes, and those that have ``.adapter.`` in their name are the adapters'. Every adapter looks at one token at a time,
so neither the other texts of a batch nor padding can change an embedding.

Shape letters: T = tokens in any arrangement, D = width of the model, I = neurons of a feed-forward block, H = hidden
width of an adapter.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, Self

import torch
from safetensors.torch import load_file, save_file
from sentence_transformers.base.modules import Transformer
from sentence_transformers.util import load_file_path
from torch import Tensor, nn

WEIGHTS, SETTINGS, SHIPPED = "adapters.safetensors", "adapters.json", "soju_adapters.py"
MARK = ".adapter."

Kind = Literal["bottleneck", "gated", "parallel", "linear"]


@dataclass(frozen=True)
class AdapterSettings:
    """What adapters a model has, and where."""

    kind: Kind = "bottleneck"
    """``bottleneck``: after the feed-forward block, non-linear, one trained gate a layer. ``gated``: the same with a
    gate for each token. ``parallel``: more neurons in the block; folds. ``linear``: a low-rank map after
    the block; folds."""
    hidden: int = 256
    """Hidden width of an adapter."""
    dropout: float = 0.0
    """Share of an adapter's hidden units that is dropped in training, in [0, 1)."""
    layers: tuple[int, ...] | None = None
    """Which layers have one, from 0; ``None`` for all."""

    def __post_init__(self) -> None:
        if self.kind not in ("bottleneck", "gated", "parallel", "linear"):
            raise ValueError(f"adapter kind {self.kind!r} is none of bottleneck, gated, parallel, linear")
        if self.hidden < 1 or not 0 <= self.dropout < 1:
            raise ValueError(
                f"an adapter needs hidden >= 1 and dropout in [0, 1), got {self.hidden} and {self.dropout}"
            )


class Bottleneck(nn.Module):
    """``h + gate * up(dropout(gelu(down(h))))``; it starts as the identity, as ``up`` starts with zeros.

    The gate of ``bottleneck`` is one number. That of ``gated`` is ``2 * sigmoid(w h + b)`` for each token, from the
    token alone: a mean over the text would hold its padding. Both start at 1. ``linear`` has no gate, gelu or bias.
    """

    def __init__(self, width: int, settings: AdapterSettings) -> None:
        super().__init__()
        self.kind, bias = settings.kind, settings.kind != "linear"
        self.down = nn.Linear(width, settings.hidden, bias=bias)
        self.up = _zeros(nn.Linear(settings.hidden, width, bias=bias))
        self.dropout = nn.Dropout(settings.dropout)
        if self.kind == "bottleneck":
            self.gate = nn.Parameter(torch.ones(1))
        elif self.kind == "gated":
            self.token_gate = _zeros(nn.Linear(width, 1))

    def forward(self, hidden_TD: Tensor) -> Tensor:
        """Return ``(T, D)`` in the type that comes in."""
        given_TD = hidden_TD.to(self.down.weight.dtype)
        inner_TH = self.down(given_TD)
        if self.kind == "linear":
            return hidden_TD + self.up(self.dropout(inner_TH)).to(hidden_TD.dtype)
        change_TD = self.up(self.dropout(nn.functional.gelu(inner_TH)))
        gate = self.gate if self.kind == "bottleneck" else 2 * self.token_gate(given_TD).sigmoid()
        return hidden_TD + (gate * change_TD).to(hidden_TD.dtype)


class _FromLinear(nn.Linear):
    """A linear layer that takes over the weights of another, under the same names, and has an adapter."""

    def __init__(self, plain: nn.Linear, adapter: nn.Module) -> None:
        # On the meta device nothing is allocated and no number is drawn for weights that are replaced at once.
        super().__init__(plain.in_features, plain.out_features, bias=plain.bias is not None, device="meta")
        self.weight, self.bias = plain.weight, plain.bias
        self.adapter: Any = adapter.to(plain.weight.device)
        self.train(plain.training)


class AdaptedLinear(_FromLinear):
    """The last layer of a feed-forward block, with a `Bottleneck` after it."""

    def forward(self, input: Tensor) -> Tensor:
        """Return ``(T, D)``."""
        adapted_TD: Tensor = self.adapter(super().forward(input))
        return adapted_TD


class WiderLinear(_FromLinear):
    """A first layer of a feed-forward block that makes ``(T, I + H)``, for more neurons of the same kind.

    Where one layer makes neurons and their gates, the new ones of each stand behind the old ones of each.
    """

    def __init__(self, plain: nn.Linear, adapter: nn.Module, parts: int) -> None:
        super().__init__(plain, adapter)
        self.parts = parts

    def forward(self, input: Tensor) -> Tensor:
        """Return old and new neurons, or for each part of the output its old and new ones."""
        old = super().forward(input)
        new = self.adapter(input.to(self.adapter.weight.dtype)).to(old.dtype)
        pieces = zip(old.chunk(self.parts, dim=-1), new.chunk(self.parts, dim=-1), strict=True)
        return torch.cat([part for pair in pieces for part in pair], dim=-1)


class NarrowingLinear(_FromLinear):
    """The last layer of a feed-forward block, for more neurons; the weights of the new ones start with zeros."""

    def forward(self, input: Tensor) -> Tensor:
        """Take ``(T, I + H)``, return ``(T, D)``."""
        old_TD = super().forward(input[..., : self.in_features])
        new_TH = self.adapter.dropout(input[..., self.in_features :])
        change_TD: Tensor = self.adapter.up(new_TH.to(self.adapter.up.weight.dtype))
        return old_TD + change_TD.to(old_TD.dtype)


@dataclass(frozen=True)
class FeedForward:
    """The linear layers of one feed-forward block, plain or with adapters, as they are in the model now."""

    layer: nn.Module
    first_names: tuple[str, ...]
    parts: int
    """Into how many pieces the output of the first layers is cut: 2 where one layer makes neurons and their gates."""
    last_name: str

    @property
    def first(self) -> tuple[Any, ...]:
        """The layers that make neurons, and gates for them."""
        return tuple(_at(self.layer, name) for name in self.first_names)

    @property
    def last(self) -> Any:
        """The layer that reads the neurons."""
        return _at(self.layer, self.last_name)

    def put(self, name: str, linear: nn.Linear) -> None:
        """Put a linear layer in the place of the one with this name."""
        path, _, child = name.rpartition(".")
        setattr(self.layer.get_submodule(path), child, linear)


_PLACES = {  # by family: first layers, parts of each, last layer
    "Qwen3, Llama": (("mlp.gate_proj", "mlp.up_proj"), 1, "mlp.down_proj"),
    "ModernBERT": (("mlp.Wi",), 2, "mlp.Wo"),
    "BERT": (("intermediate.dense",), 1, "output.dense"),
}


def feed_forwards(model: Any) -> list[FeedForward]:
    """Find the feed-forward blocks of a transformers model, by the names that their layers are known to have.

    Args:
        model: Of any architecture that names its layers like Qwen3, Llama, ModernBERT or BERT.

    Returns:
        One for each layer, from the first to the last.

    Raises:
        ValueError: If the layers have other names.
    """
    return [_feed_forward(layer, model) for layer in layers_of(model)]


def layers_of(model: Any) -> nn.ModuleList:
    """Return the layers of a transformers model, first to last; `ValueError` if they have other names."""
    for prefix in ("layers", "encoder.layer", "model.layers", "encoder.layers", "layer", "model.layer"):
        layers = _at(model, prefix)
        if isinstance(layers, nn.ModuleList) and len(layers):
            return layers
    raise ValueError(f"{type(model).__name__} has no list of layers named as in {'; '.join(_PLACES)}")


def _feed_forward(layer: nn.Module, model: Any) -> FeedForward:
    for first, parts, last in _PLACES.values():
        found = [_at(layer, name) for name in (*first, last)]
        if all(isinstance(linear, nn.Linear) for linear in found):
            return FeedForward(layer, first, parts, last)
    names = "; ".join(f"{family}: {', '.join((*first, last))}" for family, (first, _, last) in _PLACES.items())
    raise ValueError(f"{type(model).__name__} has layers without linear layers of these names: {names}")


def _at(module: Any, path: str) -> Any:
    for name in path.split("."):
        module = getattr(module, name, None)
    return module


def _zeros(linear: nn.Linear) -> nn.Linear:
    for parameter in linear.parameters():
        nn.init.zeros_(parameter)
    return linear


def insert_adapters(model: Any, settings: AdapterSettings) -> None:
    """Put adapters into a transformers model, in place, on the device of its layers, in float32.

    Args:
        model: See `feed_forwards`; without adapters.
        settings: Which and where.

    Raises:
        ValueError: If the model is of another architecture, has adapters already, or lacks a layer that is named.
    """
    blocks = feed_forwards(model)
    if any(MARK in name for name, _ in model.named_parameters()):
        raise ValueError(f"{type(model).__name__} has adapters already; fold them or start from a model without")
    chosen = tuple(range(len(blocks))) if settings.layers is None else settings.layers
    if not chosen or not set(chosen) <= set(range(len(blocks))) or len(set(chosen)) < len(chosen):
        raise ValueError(f"layers {chosen} must be different ones of 0 to {len(blocks) - 1}")
    for number in chosen:
        block = blocks[number]
        if settings.kind == "parallel":
            _widen(block, settings)
        else:
            block.put(block.last_name, AdaptedLinear(block.last, Bottleneck(block.last.out_features, settings)))


def _widen(block: FeedForward, settings: AdapterSettings) -> None:
    for name, linear in zip(block.first_names, block.first, strict=True):
        extra = nn.Linear(linear.in_features, block.parts * settings.hidden, bias=linear.bias is not None)
        block.put(name, WiderLinear(linear, extra, block.parts))
    up = _zeros(nn.Linear(settings.hidden, block.last.out_features, bias=False))
    new = nn.ModuleDict({"dropout": nn.Dropout(settings.dropout), "up": up})
    block.put(block.last_name, NarrowingLinear(block.last, new))


class AdaptedTransformer(Transformer):
    """sentence-transformers' `Transformer` with adapters in its model.

    Its folder has the model without them in the usual files, and them in ``adapters.safetensors`` and
    ``adapters.json``.
    """

    adapter_settings: AdapterSettings

    @classmethod
    def around(cls, plain: Transformer, settings: AdapterSettings) -> Self:
        """Take over the parts of a module whose model has these adapters already; `plain` is not used afterwards."""
        adapted = cls.__new__(cls)
        adapted.__dict__.update(plain.__dict__, adapter_settings=settings)
        return adapted

    def plain(self) -> Transformer:
        """Return the stock module with these parts, for a model whose adapters have been folded."""
        stock = Transformer.__new__(Transformer)
        stock.__dict__.update({name: part for name, part in self.__dict__.items() if name != "adapter_settings"})
        return stock

    def save(self, output_path: str, *args: Any, **kwargs: Any) -> None:
        """Write the model, its adapters and this file."""
        folder = Path(output_path)
        state = self.model.state_dict()
        adapters = {name: tensor.contiguous() for name, tensor in state.items() if MARK in name}
        self.model.save_pretrained(folder, state_dict={name: state[name] for name in state if name not in adapters})
        self.processor.save_pretrained(folder)
        self.save_config(output_path)
        save_file(adapters, folder / WEIGHTS)
        settings = json.dumps(asdict(self.adapter_settings), indent=2)
        (folder / SETTINGS).write_text(settings + "\n", encoding="utf-8")
        if Path(__file__).resolve() != (folder / SHIPPED).resolve():
            shutil.copyfile(__file__, folder / SHIPPED)

    @classmethod
    def load(cls, model_name_or_path: str, **kwargs: Any) -> Self:
        """Load the model, then its adapters."""
        loaded = super().load(model_name_or_path, **kwargs)
        names = ("subfolder", "token", "cache_folder", "revision", "local_files_only")
        where = {name: kwargs[name] for name in names if name in kwargs}
        settings, weights = (load_file_path(model_name_or_path, name, **where) for name in (SETTINGS, WEIGHTS))
        if settings is None or weights is None:
            raise ValueError(f"{model_name_or_path}: {SETTINGS} or {WEIGHTS} is missing; fetch the whole folder again")
        given = json.loads(Path(settings).read_text(encoding="utf-8"))
        layers = None if given["layers"] is None else tuple(given["layers"])
        adapters = AdapterSettings(**(given | {"layers": layers}))
        insert_adapters(loaded.model, adapters)
        load_adapters(loaded.model, load_file(weights))
        return cls.around(loaded, adapters)


def load_adapters(model: Any, weights: dict[str, Tensor]) -> None:
    """Load the weights of the adapters a model has.

    Args:
        model: With adapters.
        weights: All of them, by name.

    Raises:
        ValueError: If there are more or fewer than the model has.
    """
    result = model.load_state_dict(weights, strict=False)
    wrong = [name for name in result.missing_keys if MARK in name] + list(result.unexpected_keys)
    if wrong:
        raise ValueError(f"{WEIGHTS} is not of these adapters: {wrong[0]} and {len(wrong) - 1} more do not match")

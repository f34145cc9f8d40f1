"""Adapters and LoRA of an embedding model: put in, trained while all else is frozen, folded where exact, saved, loaded.

Shape letters: see `soju.embedding.adapter_modules`.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Transformer
from torch import Tensor, nn

from soju.core.errors import MissingExtraError, UserError
from soju.embedding.adapter_modules import (
    MARK,
    SHIPPED,
    AdaptedLinear,
    AdaptedTransformer,
    AdapterSettings,
    FeedForward,
    NarrowingLinear,
    WiderLinear,
    feed_forwards,
    insert_adapters,
    layers_of,
)

FOLDABLE = ("linear", "parallel")
LORA_MARK = "lora_"
"""In the names of what `add_lora` adds."""
_SHIPPED_CLASS = f"{Path(SHIPPED).stem}.{AdaptedTransformer.__name__}"
_OUR_CLASS = f"{AdaptedTransformer.__module__}.{AdaptedTransformer.__name__}"
_NOTE = f"""
## Adapters

This model has adapters that are no part of its architecture and cannot be folded into its weights. They are in
`adapters.safetensors`, and `{SHIPPED}` is the code that puts them in place. sentence-transformers runs
it only when told:

```python
SentenceTransformer("...", trust_remote_code=True)
```

With soju installed, `soju.embedding.adapters.load_adapted("...")` runs none of the folder's code. Plain transformers
loads the model without its adapters.
"""


def add_adapters(model: Any, settings: AdapterSettings, *, seed: int = 0) -> list[nn.Parameter]:
    """Put adapters into a model, in place, and freeze everything else. The model's embeddings stay the same bits.

    Args:
        model: A sentence-transformers model, which then saves and loads its adapters with it; or a transformers model.
        settings: Which and where.
        seed: Of the adapters' weights; the caller's dice stay where they are.

    Returns:
        The adapters' parameters: what is left to train.

    Raises:
        UserError: If the architecture is not a known one, there are adapters already, or a layer does not exist.
    """
    backbone = _backbone(model)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            insert_adapters(backbone, settings)
        except ValueError as error:
            raise UserError(f"adapters: {error}") from None
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(MARK in name)
    if isinstance(model, SentenceTransformer):
        model[0] = AdaptedTransformer.around(model[0], settings)
    return adapter_parameters(model)


def _backbone(model: Any) -> Any:
    if not isinstance(model, SentenceTransformer):
        return model
    if not isinstance(model[0], Transformer):
        raise UserError(f"adapters: the model starts with a {type(model[0]).__name__}, not with a Transformer")
    return model[0].model


def adapter_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Return the parameters of all adapters, from the first layer to the last."""
    return [parameter for name, parameter in model.named_parameters() if MARK in name]


def parameters_by_layer(model: Any, mark: str = MARK) -> dict[int, dict[str, nn.Parameter]]:
    """Return the parameters by name that have a mark in it, of each layer that has any: `MARK`, or `LORA_MARK`."""
    names = {id(parameter): name for name, parameter in model.named_parameters() if mark in name}
    found = {
        number: {names[id(value)]: value for value in layer.parameters() if id(value) in names}
        for number, layer in enumerate(layers_of(_backbone(model)))
    }
    return {number: parameters for number, parameters in found.items() if parameters}


def describe_adapters(model: Any) -> str:
    """Say how many parameters the adapters have, in how many layers, and what share of all that is."""
    layers = parameters_by_layer(model)
    count = sum(parameter.numel() for parameter in adapter_parameters(model))
    whole = sum(parameter.numel() for parameter in model.parameters())
    blocks = len(feed_forwards(_backbone(model)))
    return f"adapters in {len(layers)} of {blocks} layers: {count:,} of {whole:,} parameters ({count / whole:.2%})"


@torch.no_grad()
def fold_adapters(model: Any) -> None:
    """Make a plain model of one with ``linear`` or ``parallel`` adapters, in place; what it computes stays.

    A linear adapter after ``W x + b`` is ``(1 + U D) W x + (1 + U D) b``, a matrix again. Parallel adapters are neurons
    like those of the block, so the block becomes wider; layers without adapters get neurons with zero weights, as all
    layers of a configuration have one ``intermediate_size``.

    Args:
        model: What `add_adapters` was given. All its parameters are trainable afterwards.

    Raises:
        UserError: If there are no adapters, or they are of a kind that has no plain form.
    """
    backbone = _backbone(model)
    blocks = feed_forwards(backbone)
    linear = [block for block in blocks if isinstance(block.last, AdaptedLinear)]
    if any(block.last.adapter.kind != "linear" for block in linear):
        raise UserError(f"only {' and '.join(FOLDABLE)} adapters can be folded; save this model with its adapters")
    if not adapter_parameters(backbone):
        raise UserError("the model has no adapters to fold")
    for block in linear:
        _fold_linear(block)
    hidden = {block.last.adapter.up.in_features for block in blocks if isinstance(block.last, NarrowingLinear)}
    if hidden:
        for block in blocks:
            _fold_parallel(block, max(hidden))
        backbone.config.intermediate_size += max(hidden)
    model.requires_grad_(True)
    if isinstance(model, SentenceTransformer):
        model[0] = model[0].plain()


def _fold_linear(block: FeedForward) -> None:
    last = block.last
    product_DD = last.adapter.up.weight.double() @ last.adapter.down.weight.double()
    last.weight.add_((product_DD @ last.weight.double()).to(last.weight.dtype))
    if last.bias is not None:
        last.bias.add_((product_DD @ last.bias.double()).to(last.bias.dtype))
    block.put(block.last_name, _plain(last, last.weight, last.bias))


def _fold_parallel(block: FeedForward, hidden: int) -> None:
    rows = block.parts * hidden
    for name, linear in zip(block.first_names, block.first, strict=True):
        extra = linear.adapter if isinstance(linear, WiderLinear) else None
        weight = linear.weight.new_zeros(rows, linear.in_features) if extra is None else extra.weight
        bias = linear.bias
        if bias is not None:
            bias = _interleave(bias, bias.new_zeros(rows) if extra is None else extra.bias, block.parts)
        block.put(name, _plain(linear, _interleave(linear.weight, weight, block.parts), bias))
    last = block.last
    new = (
        last.adapter.up.weight if isinstance(last, NarrowingLinear) else last.weight.new_zeros(len(last.weight), hidden)
    )
    block.put(block.last_name, _plain(last, torch.cat([last.weight, new.to(last.weight.dtype)], dim=1), last.bias))


def _interleave(old: Tensor, new: Tensor, parts: int) -> Tensor:
    pieces = zip(old.chunk(parts), new.to(old.dtype).chunk(parts), strict=True)
    return torch.cat([part for pair in pieces for part in pair])


def _plain(like: nn.Linear, weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """Return a stock linear layer with these weights; parameters are taken over as they are."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    linear.weight = weight if isinstance(weight, nn.Parameter) else nn.Parameter(weight)
    linear.bias = bias if bias is None or isinstance(bias, nn.Parameter) else nn.Parameter(bias)  # type: ignore[assignment]
    return linear.train(like.training)


def save_adapted(model: SentenceTransformer, folder: Path) -> None:
    """Save a model with its adapters, the code that loads them, and a README that says so.

    Args:
        model: From `add_adapters`. Fold adapters first where that is possible: the folder then needs no code.
        folder: Made when it is missing.

    Raises:
        UserError: If the model has no adapters.
    """
    if not has_adapters(model):
        raise UserError("the model has no adapters; save it with save_pretrained")
    model.save_pretrained(str(folder))
    listed = folder / "modules.json"
    modules = json.loads(listed.read_text(encoding="utf-8"))
    modules[0]["type"] = _SHIPPED_CLASS
    listed.write_text(json.dumps(modules, indent=2) + "\n", encoding="utf-8")
    with (folder / "README.md").open("a", encoding="utf-8") as readme:
        readme.write(_NOTE)


def load_adapted(folder: str | Path, **options: Any) -> SentenceTransformer:
    """Load a model with adapters and run none of its folder's code.

    Args:
        folder: From `save_adapted`, or a trainer's checkpoint; a model without adapters loads as always.
        **options: Of `SentenceTransformer`.

    Returns:
        The model.
    """
    classes = {_SHIPPED_CLASS: AdaptedTransformer, _OUR_CLASS: AdaptedTransformer}
    return SentenceTransformer._load_with_module_classes(str(folder), classes, **options)


def load_float32(folder: Path) -> SentenceTransformer:
    """Load a model for training: float32, so that small steps do not round away; no code of its folder is run."""
    return load_adapted(folder, model_kwargs={"dtype": "float32"}, local_files_only=True)


def has_adapters(model: SentenceTransformer) -> bool:
    """Tell whether a model has adapters that are not part of its architecture."""
    return isinstance(model[0], AdaptedTransformer)


def save_model(model: SentenceTransformer, folder: Path) -> None:
    """Save a model so that stock sentence-transformers loads it; with adapters, as `save_adapted` explains in it."""
    if has_adapters(model):
        save_adapted(model, folder)
    else:
        model.save(str(folder), create_model_card=False)


def settle_adapters(model: SentenceTransformer) -> str | None:
    """Describe the adapters or the LoRA of a trained model, and make a plain model of it where that is exact."""
    if has_adapters(model):
        described = describe_adapters(model)
        if model[0].adapter_settings.kind in FOLDABLE:
            fold_adapters(model)
        return described
    merged = describe_lora(model[0].model)
    if merged is not None:
        merge_lora(model[0].model)
    return merged


def add_lora(
    model: Any,
    *,
    r: int = 16,
    lora_alpha: float | None = None,
    lora_dropout: float = 0.0,
    layers: Sequence[int] | None = None,
    seed: int = 0,
) -> list[nn.Parameter]:
    """Put LoRA on the linear layers of the feed-forward blocks, in place, and freeze everything else.

    Args:
        model: A transformers model of an architecture that `feed_forwards` knows. For a sentence-transformers model its
            first module's ``model``.
        r: Rank of each update.
        lora_alpha: An update is multiplied with ``lora_alpha / r``; 2 r when not given.
        lora_dropout: Before an update, in training.
        layers: Which layers get it, from 0; all when not given.
        seed: Of the weights; the caller's dice stay where they are.

    Returns:
        The parameters to train. Their updates start at zero, so the model starts as it was.

    Raises:
        UserError: If the architecture is not a known one, or peft is not installed.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError:
        raise MissingExtraError("LoRA", "lora") from None
    try:
        blocks = feed_forwards(model)
    except ValueError as error:
        raise UserError(f"LoRA: {error}") from None
    chosen = range(len(blocks)) if layers is None else layers
    if not set(chosen) <= set(range(len(blocks))):
        raise UserError(f"LoRA: layers {tuple(chosen)} must be among 0 to {len(blocks) - 1}")
    wanted = {id(linear) for number in chosen for linear in (*blocks[number].first, blocks[number].last)}
    names = [name for name, module in model.named_modules() if id(module) in wanted]
    alpha = 2.0 * r if lora_alpha is None else lora_alpha
    settings = LoraConfig(r=r, lora_alpha=alpha, lora_dropout=lora_dropout, target_modules=names, bias="none")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        inject_adapter_in_model(settings, model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(LORA_MARK in name)
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def describe_lora(model: Any) -> str | None:
    """Say how many parameters the updates have, and what share of all that is; nothing where there are none."""
    updates = sum(parameter.numel() for name, parameter in model.named_parameters() if LORA_MARK in name)
    whole = sum(parameter.numel() for parameter in model.parameters())
    return f"LoRA: {updates:,} of {whole:,} parameters ({updates / whole:.2%})" if updates else None


def merge_lora(model: Any) -> None:
    """Add the updates to the weights and take peft's layers out, in place; all parameters are trainable afterwards.

    Raises `UserError` if there are no updates to merge.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [(name, module) for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)]
    if not layers:
        raise UserError("the model has no LoRA to merge")
    for name, layer in layers:
        layer.merge()
        path, _, child = name.rpartition(".")
        setattr(model.get_submodule(path), child, layer.get_base_layer())
    with contextlib.suppress(AttributeError):
        del model.peft_config
    model.requires_grad_(True)

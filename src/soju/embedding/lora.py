"""LoRA through peft, for who prefers it to our adapters: put in, train, merge, and the model is a plain one again."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from soju.core.errors import MissingExtraError, UserError
from soju.embedding.adapter_modules import feed_forwards


def add_lora(
    model: Any,
    *,
    rank: int = 16,
    scale: float = 2.0,
    dropout: float = 0.0,
    layers: Sequence[int] | None = None,
    seed: int = 0,
) -> list[nn.Parameter]:
    """Put LoRA beside the linear layers of the feed-forward blocks, in place, and freeze everything else.

    Args:
        model: A transformers model of an architecture that `feed_forwards` knows. For a sentence-transformers model its
            first module's ``model``.
        rank: Of each update.
        scale: What an update is multiplied with, peft's ``lora_alpha / r``.
        dropout: Before an update, in training.
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
    settings = LoraConfig(r=rank, lora_alpha=scale * rank, lora_dropout=dropout, target_modules=names, bias="none")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        inject_adapter_in_model(settings, model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def describe_lora(model: Any) -> str | None:
    """Say how many parameters the updates have, and what share of all that is; nothing where there are none."""
    updates = sum(parameter.numel() for name, parameter in model.named_parameters() if "lora_" in name)
    whole = sum(parameter.numel() for parameter in model.parameters())
    return f"LoRA: {updates:,} of {whole:,} parameters ({updates / whole:.2%})" if updates else None


def merge_lora(model: Any) -> None:
    """Add the updates to the weights and take peft's layers out, in place; all parameters are trainable afterwards.

    Args:
        model: What `add_lora` was given.

    Raises:
        UserError: If there are no updates to merge.
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

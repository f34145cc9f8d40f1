"""Quantisation of a whole model by kind: what torch alone can do. CTranslate2's forms are made by the recipe."""

from __future__ import annotations

import copy
from typing import Literal

import torch
from torch import nn

from soju.core.errors import UserError
from soju.quantization.four_bit import GROUP, FourBitLinear

Kind = Literal["bits_16", "bits_4"]
KINDS: tuple[Kind, ...] = ("bits_16", "bits_4")


def quantize(model: nn.Module, kind: Kind, *, group_size: int = GROUP) -> nn.Module:
    """Return a quantised copy of a model, in evaluation mode.

    Args:
        model: Is left as it is.
        kind: ``bits_16`` turns all weights into bfloat16. ``bits_4`` packs the weights of linear layers, rounded to the
            nearest code; embeddings stay, and so does an output layer that shares its table with one.
        group_size: Inputs that share a scale and a minimum, for ``bits_4``.

    Returns:
        The copy.

    Raises:
        UserError: If the kind is unknown or no layer can be quantised.
    """
    if kind not in KINDS:
        raise UserError(f"quantize: kind {kind!r} is unknown; choose one of {', '.join(KINDS)}")
    result = copy.deepcopy(model).eval()
    if kind == "bits_16":
        return result.to(torch.bfloat16)
    tables = {module.weight.data_ptr() for module in result.modules() if isinstance(module, nn.Embedding)}
    replaced = 0
    for parent in list(result.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear and child.weight.data_ptr() not in tables:
                setattr(parent, name, FourBitLinear.from_linear(child, group_size=group_size))
                replaced += 1
    if not replaced:
        raise UserError("quantize: the model has no linear layer of its own to pack; choose another kind")
    return result

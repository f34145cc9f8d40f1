"""What torchao and CTranslate2 lack: a packed four-bit layer, and training on the grid that is shipped."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from soju.quantization.four_bit import FourBitLinear
    from soju.quantization.quantizer import quantize

__all__ = ["FourBitLinear", "quantize"]


def __getattr__(name: str) -> Any:
    homes = {"FourBitLinear": "four_bit", "quantize": "quantizer"}
    if name in homes:
        return getattr(import_module(f"soju.quantization.{homes[name]}"), name)
    raise AttributeError(f"module 'soju.quantization' has no attribute {name!r}; it has {', '.join(__all__)}")

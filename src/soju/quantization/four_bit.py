"""A linear layer whose weights take four bits, in memory and on disk.

Two values share a byte; each group of 64 inputs of an output has a scale and a minimum in float16, so a weight takes
4.5 bits. A product makes the weight again and multiplies.

Shape letters: M = outputs, K = inputs, P = K filled up to whole groups, G = groups, S = inputs of a group, N = rows of
calibration inputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Self

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, pad

from soju.core.errors import UserError

LARGEST = 15
"""The largest of the 16 codes."""
GROUP = 64
_MOST = torch.finfo(torch.float16).max

Rounding = Literal["nearest", "compensated"]


class FourBitLinear(nn.Module):
    """`nn.Linear` with packed four-bit weights; made by `from_linear`, or empty to load a state into."""

    codes_MB: Tensor
    """Input 2 i in the low half of byte i, input 2 i + 1 in the high half; ``(M, P / 2)`` uint8."""
    scale_MG: Tensor
    minimum_MG: Tensor
    bias_M: Tensor | None

    def __init__(self, in_features: int, out_features: int, *, bias: bool = True, group_size: int = GROUP) -> None:
        super().__init__()
        if group_size < 2 or group_size % 2:
            raise UserError(f"four-bit layer: group_size is {group_size}; give an even number, 64 is usual")
        self.in_features, self.out_features, self.group_size = in_features, out_features, group_size
        groups = -(-in_features // group_size)
        self.register_buffer("codes_MB", torch.zeros(out_features, groups * group_size // 2, dtype=torch.uint8))
        self.register_buffer("scale_MG", torch.zeros(out_features, groups, dtype=torch.float16))
        self.register_buffer("minimum_MG", torch.zeros(out_features, groups, dtype=torch.float16))
        self.register_buffer("bias_M", torch.zeros(out_features) if bias else None)

    @classmethod
    def from_linear(
        cls,
        layer: nn.Linear,
        *,
        rounding: Rounding = "nearest",
        inputs: Sequence[Tensor] = (),
        group_size: int = GROUP,
        damping: float = 0.01,
    ) -> Self:
        """Quantise a layer.

        Args:
            layer: Is left as it is.
            rounding: ``nearest`` takes the nearest code of each weight. ``compensated`` rounds input by input and moves
                what that costs onto the inputs that are not rounded yet, so that the outputs change least (GPTQ).
            inputs: What the layer reads on calibration texts, ``(..., K)`` each; for ``compensated`` only.
            group_size: Inputs that share a scale and a minimum, even.
            damping: Added to the diagonal of the inputs' second moments, as a share of its mean.

        Returns:
            The quantised layer, on the device of the layer.

        Raises:
            UserError: If a weight is not finite or too large for float16, or ``compensated`` has no inputs.

        References:
            Frantar et al. 2022, arXiv:2210.17323 (GPTQ).
        """
        weight_MK = layer.weight.detach().double()
        if not bool((weight_MK.abs() <= _MOST).all()):
            raise UserError(f"four-bit layer: a weight is not finite or above {_MOST:g}; check the model")
        result = cls(layer.in_features, layer.out_features, bias=layer.bias is not None, group_size=group_size)
        result.to(layer.weight.device)
        if rounding == "nearest":
            grid, codes_MK = _round_nearest(weight_MK, group_size)
        else:
            if not inputs:
                raise UserError(
                    'four-bit layer: rounding "compensated" needs calibration inputs; give some or "nearest"'
                )
            moments_KK = sum(
                (rows.flatten(0, -2).double().T @ rows.flatten(0, -2).double() for rows in inputs),
                torch.zeros(layer.in_features, layer.in_features, dtype=torch.float64, device=weight_MK.device),
            )
            grid, codes_MK = _round_compensated(weight_MK, moments_KK, group_size, damping)
        result.scale_MG.copy_(grid[0])
        result.minimum_MG.copy_(grid[1])
        result.codes_MB.copy_(_pack(codes_MK, result.codes_MB.shape[1] * 2))
        if result.bias_M is not None:
            result.bias_M = layer.bias.detach().clone()
        return result

    def weight(self) -> Tensor:
        """Return the weights as the products see them, ``(M, K)`` float32."""
        codes_MP = torch.stack([self.codes_MB & LARGEST, self.codes_MB >> 4], dim=2).flatten(1)
        codes_MGS = codes_MP.view(self.out_features, -1, self.group_size).float()
        weight_MGS = torch.addcmul(self.minimum_MG.float()[:, :, None], codes_MGS, self.scale_MG.float()[:, :, None])
        return weight_MGS.flatten(1)[:, : self.in_features]

    def forward(self, inputs: Tensor) -> Tensor:
        """Return the layer's outputs, in the dtype of the inputs."""
        bias_M = None if self.bias_M is None else self.bias_M.to(inputs.dtype)
        return linear(inputs, self.weight().to(inputs.dtype), bias_M)

    def extra_repr(self) -> str:
        """Name the sizes."""
        return f"in_features={self.in_features}, out_features={self.out_features}, group_size={self.group_size}"


Grid = tuple[Tensor, Tensor]
"""Scale and minimum of groups, in float16."""


def _grid(weight_MGS: Tensor) -> Grid:
    """Return the grid that reaches from the smallest to the largest weight of each group.

    Codes are chosen for the numbers that float16 keeps, not for the exact ones, or each would be off by that rounding.
    """
    smallest, largest = weight_MGS.amin(dim=-1), weight_MGS.amax(dim=-1)
    return ((largest - smallest) / LARGEST).half(), smallest.half()


def _code(weights: Tensor, scale: Tensor, minimum: Tensor) -> Tensor:
    """Return the nearest codes; where all weights of a group are alike the scale is 0, and so is the code."""
    scale, minimum = scale.double(), minimum.double()
    return torch.where(scale > 0, ((weights - minimum) / scale.clamp_min(1e-30)).round(), 0.0).clamp(0, LARGEST)


def _round_nearest(weight_MK: Tensor, group_size: int) -> tuple[Grid, Tensor]:
    outputs, inputs = weight_MK.shape
    missing = -inputs % group_size
    # The last weight again in place of what is missing: it changes neither end of its group.
    filled_MP = pad(weight_MK[None], (0, missing), mode="replicate")[0] if missing else weight_MK
    groups_MGS = filled_MP.view(outputs, -1, group_size)
    scale_MG, minimum_MG = _grid(groups_MGS)
    codes_MGS = _code(groups_MGS, scale_MG[:, :, None], minimum_MG[:, :, None])
    return (scale_MG, minimum_MG), codes_MGS.flatten(1)[:, :inputs]


def _round_compensated(weight_MK: Tensor, moments_KK: Tensor, group_size: int, damping: float) -> tuple[Grid, Tensor]:
    """Round the inputs in order; see `FourBitLinear.from_linear`.

    The upper Cholesky factor U of the inverse moments holds in row j what the rounding error of input j, divided by
    U_jj, must change in each later input; earlier ones are fixed. Within a group this is done at once, for the inputs
    after it in one product.
    """
    inputs = weight_MK.shape[1]
    diagonal_K = moments_KK.diagonal()
    mean = float(diagonal_K.mean())
    # An input that is always 0 has no say; any positive number keeps the matrix invertible.
    ridge_K = torch.full_like(diagonal_K, damping * mean if mean > 0 else 1.0)
    factor_KK = torch.linalg.cholesky(moments_KK + torch.diag(ridge_K))
    upper_KK = torch.linalg.cholesky(torch.cholesky_inverse(factor_KK), upper=True)
    left_MK, codes_MK = weight_MK.clone(), torch.zeros_like(weight_MK)
    grids: list[Grid] = []
    for start in range(0, inputs, group_size):
        end = min(start + group_size, inputs)
        scale_M, minimum_M = _grid(left_MK[:, start:end])
        grids.append((scale_M, minimum_M))
        errors_MS = torch.zeros_like(left_MK[:, start:end])
        for column in range(start, end):
            codes_MK[:, column] = _code(left_MK[:, column], scale_M, minimum_M)
            rounded_M = codes_MK[:, column] * scale_M.double() + minimum_M.double()
            error_M = (left_MK[:, column] - rounded_M) / upper_KK[column, column]
            left_MK[:, column:end] -= error_M[:, None] * upper_KK[column, column:end]
            errors_MS[:, column - start] = error_M
        left_MK[:, end:] -= errors_MS @ upper_KK[start:end, end:]
    scales, minima = zip(*grids, strict=True)
    return (torch.stack(scales, dim=1), torch.stack(minima, dim=1)), codes_MK


def _pack(codes_MK: Tensor, width: int) -> Tensor:
    """Put two codes into a byte; codes that are missing are 0."""
    codes_MP = pad(codes_MK, (0, width - codes_MK.shape[1])).to(torch.uint8)
    return codes_MP[:, 0::2] | (codes_MP[:, 1::2] << 4)

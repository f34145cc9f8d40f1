"""Losses over a large batch with the memory of a small one: gradient caching.

A loss that compares all texts of a batch needs all their representations, but not all their activations at once. So the
texts are encoded in mini-batches without activations; the loss is taken, and its gradient with respect to the
representations kept; in the backward pass each mini-batch is encoded again and given its part of that gradient. Loss
and gradients are those of one large batch; the price is a second forward pass.

Shape letters: N = texts, S = tokens of the longest text, V = terms in the vocabulary.

References:
    Gao et al. 2021, arXiv:2101.06983 (GradCache).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

Features = Mapping[str, Tensor]
Losses = dict[str, Tensor]


def cached_losses(
    encode: Callable[[dict[str, Tensor]], Tensor],
    features: Features,
    losses_of: Callable[[Tensor], Losses],
    *,
    mini_batch: int,
) -> Losses:
    """Compute losses over all texts, whose gradients flow in mini-batches when their sum is differentiated.

    Dropout and other draws are the same in both passes.

    Args:
        encode: Representations ``(n, V)`` of some texts.
        features: ``input_ids`` and ``attention_mask``, ``(N, S)``.
        losses_of: The weighted losses of all representations ``(N, V)``; their sum is what is minimised.
        mini_batch: Texts that are encoded at a time, >= 1.

    Returns:
        The losses. They may only be summed, all of them, before the backward pass.
    """
    parts = list(_parts(features, mini_batch))
    states: list[tuple[Tensor, Tensor | None]] = []
    encoded: list[Tensor] = []
    with torch.no_grad():
        for part in parts:
            states.append(_random_state(part["input_ids"].device))
            encoded.append(encode(dict(part)))
    representations_NV = torch.cat(encoded).requires_grad_()
    if not torch.is_grad_enabled():
        return losses_of(representations_NV)
    losses = losses_of(representations_NV)
    total = torch.stack(list(losses.values())).sum()
    (gradient_NV,) = torch.autograd.grad(total, [representations_NV])
    device = representations_NV.device.type
    autocast = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)

    # By the chain rule the sum over mini-batches is the gradient of the loss, up to the order in which they are added.
    # Each must draw the same dropout as before, or its gradient would belong to representations that the loss was not
    # taken of; and it runs under the caller's autocast, which a backward pass does not inherit.
    def replay(scale: Tensor) -> None:
        start = 0
        for part, state in zip(parts, states, strict=True):
            with (
                _drawing_again(state, representations_NV.device),
                torch.enable_grad(),
                torch.autocast(device, dtype=autocast[1], enabled=autocast[0]),
            ):
                again = encode(dict(part))
            torch.autograd.backward(again, gradient_NV[start : start + len(again)].to(again.dtype) * scale)
            start += len(again)

    # The replay hangs on one loss, because it is made of the gradient of the sum of all and must run once.
    detached = {name: value.detach() for name, value in losses.items()}
    first = next(iter(detached))
    detached[first] = _Replay.apply(detached[first].clone().requires_grad_(), replay)  # type: ignore[no-untyped-call]
    return detached


class _Replay(torch.autograd.Function):
    """Hands a value through; its backward pass runs `replay` with the gradient of the total."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, replay: Callable[[Tensor], None]) -> Tensor:
        ctx.replay = replay
        return value.clone()

    @staticmethod
    def backward(ctx: Any, scale: Tensor) -> tuple[None, None]:
        ctx.replay(scale)
        return None, None


def _random_state(device: torch.device) -> tuple[Tensor, Tensor | None]:
    return torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None


@contextmanager
def _drawing_again(state: tuple[Tensor, Tensor | None], device: torch.device) -> Iterator[None]:
    """Repeat what was drawn after `state`; afterwards the generators are where they were before."""
    cpu, gpu = state
    with torch.random.fork_rng(devices=[] if gpu is None else [device]):
        torch.set_rng_state(cpu)
        if gpu is not None:
            torch.cuda.set_rng_state(gpu, device)
        yield


def _parts(features: Features, mini_batch: int) -> Iterator[Features]:
    """Cut the texts into mini-batches without columns that only pad, on whichever side."""
    mask = features["attention_mask"]
    for start in range(0, len(mask), mini_batch):
        texts = slice(start, start + mini_batch)
        used = mask[texts].any(dim=0)
        yield {name: value[texts][:, used] for name, value in features.items()}

"""Reading texts that are already written, after a prompt: hidden states, and log-likelihoods.

Shape letters: B = rows, L = tokens of a padded row, H = hidden width, N = tokens of all texts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

IGNORED = -100
"""Label of a position that is not learnt; the stock trainer counts the others."""
_AT_ONCE = 256
"""Tokens whose logits exist at a time."""


class Packed(NamedTuple):
    """Prompts with their texts, padded behind; a label is what its position predicts."""

    ids_BL: Tensor
    mask_BL: Tensor
    labels_BL: Tensor


def pack(prompts: Sequence[Sequence[int]], texts: Sequence[Sequence[int]]) -> Packed:
    """Put prompts and texts, neither of them empty, into tensors; labels are `IGNORED` at prompts and padding.

    >>> pack([[5, 6], [7]], [[8], [9]]).labels_BL.tolist()
    [[-100, 8, -100], [9, -100, -100]]
    """
    longest = max(len(prompt) + len(text) for prompt, text in zip(prompts, texts, strict=True))
    ids_BL = torch.zeros(len(prompts), longest, dtype=torch.long)
    mask_BL, labels_BL = torch.zeros_like(ids_BL), torch.full_like(ids_BL, IGNORED)
    for row, (prompt, text) in enumerate(zip(prompts, texts, strict=True)):
        end = len(prompt) + len(text)
        ids_BL[row, :end] = torch.tensor([*prompt, *text])
        mask_BL[row, :end] = 1
        labels_BL[row, len(prompt) - 1 : end - 1] = torch.tensor(list(text))
    return Packed(ids_BL, mask_BL, labels_BL)


def parts_of(model: Any) -> tuple[Any, Any]:
    """Return what reads tokens and what makes logits of a decoder of transformers, alone or under PEFT."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return base.base_model, base.get_output_embeddings()


def hidden_at_labels(model: Any, ids_BL: Tensor, mask_BL: Tensor, labels_BL: Tensor) -> Tensor:
    """Return the hidden states that predict the labels, ``(N, H)``, row by row."""
    body, _ = parts_of(model)
    hidden_BLH = body(input_ids=ids_BL, attention_mask=mask_BL, use_cache=False).last_hidden_state
    hidden_NH: Tensor = hidden_BLH[labels_BL != IGNORED]
    return hidden_NH


@torch.no_grad()
def read_texts(
    model: Any, prompts: Sequence[Sequence[int]], texts: Sequence[Sequence[int]], *, batch_size: int = 16
) -> list[Tensor]:
    """Return the hidden states that predict each text, ``(tokens, H)`` a row, without dropout and gradient."""
    device = model.get_input_embeddings().weight.device
    result: list[Tensor] = []
    with evaluating(model):
        for start in range(0, len(prompts), batch_size):
            part = slice(start, start + batch_size)
            packed = pack(prompts[part], texts[part])
            hidden_NH = hidden_at_labels(model, *(tensor.to(device) for tensor in packed))
            result += torch.split(hidden_NH, [len(text) for text in texts[part]])
    return result


@torch.no_grad()
def log_likelihoods(model: Any, hidden: Sequence[Tensor], texts: Sequence[Sequence[int]]) -> list[float]:
    """Return the log-likelihood of each text in nats, from what `read_texts` returned."""
    _, head = parts_of(model)
    ids_N = torch.tensor([token for text in texts for token in text], device=head.weight.device)
    hidden_NH = torch.cat(list(hidden))
    parts = [
        head(hidden_NH[start : start + _AT_ONCE])
        .float()
        .log_softmax(-1)
        .gather(1, ids_N[start : start + _AT_ONCE, None])
        .squeeze(1)
        for start in range(0, len(ids_N), _AT_ONCE)
    ]
    return [float(part.double().sum()) for part in torch.split(torch.cat(parts), [len(text) for text in texts])]


def likelihoods_after(
    model: Any, prompts: Sequence[Sequence[int]], texts: Sequence[Sequence[int]], *, batch_size: int = 16
) -> list[float]:
    """Return the log-likelihood of each text after its prompt, in nats; rows of similar length are read together."""
    order = sorted(range(len(prompts)), key=lambda row: len(prompts[row]) + len(texts[row]))
    result = [0.0] * len(prompts)
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        asked, told = [prompts[row] for row in rows], [texts[row] for row in rows]
        hidden = read_texts(model, asked, told, batch_size=batch_size)
        for row, value in zip(rows, log_likelihoods(model, hidden, told), strict=True):
            result[row] = value
    return result


@contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """Switch dropout off, and back on afterwards where it was on."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)

"""What the losses of every mode share: rows that name and weigh them, the sparsity penalty, the targets of a text.

A mode lists its losses as rows (`LossComponent`). The sum, the log, the shares and the labels of the report follow from
them, so that a new loss is a function, a setting and a row.

Shape letters: B = texts in the batch, V = terms in the vocabulary, T = (text, term) entries of one kind in the batch,
P = parts of a loss.

A weight is ``w = log1p(relu(m))`` with ``m`` the largest logit of a term over the tokens of a text: its signed maximum.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, Literal, NamedTuple, TypeVar

import torch
from torch import Tensor, distributed, nn

from soju.sparse.splade import SpladeEncoder

SettingsT = TypeVar("SettingsT")
StageT = TypeVar("StageT")
BatchT = TypeVar("BatchT")

Position = Callable[[], tuple[int, int]]
"""Returns the optimiser steps done and planned: all that a schedule may depend on."""


@dataclass(frozen=True)
class LossComponent(Generic[SettingsT, StageT, BatchT]):
    """One loss of a mode."""

    name: str
    """``loss_NAME`` in the history, ``train/loss_NAME`` in TensorBoard."""
    label: str
    """What the report calls it."""
    weight: Callable[[SettingsT, StageT], float | Sequence[float]]
    """Its weight by the settings and by what holds at this step; a number for each part where it has parts."""
    compute: Callable[[BatchT], Tensor | None]
    """Its value on a batch, unweighted, a scalar or ``(P,)``; ``None`` where the batch has nothing to compute it of."""
    watched: bool = True
    """Whether it is computed and logged although its weight is 0."""

    def of(self, batch: BatchT, settings: SettingsT, stage: StageT) -> tuple[Tensor, Tensor | None] | None:
        """Return its value, and its weighted value unless the weight is 0; ``None`` if it is left out altogether."""
        weight = self.weight(settings, stage)
        value = self.compute(batch) if weight or self.watched else None
        if value is None:
            return None
        if isinstance(weight, Sequence):
            return value.detach().sum(), torch.stack([w * v for w, v in zip(weight, value, strict=True)]).sum()
        return value.detach(), weight * value if weight else None


class NamedLosses(nn.Module):
    """The losses of a mode in the shape a sentence-transformers trainer takes: a dictionary whose sum is minimised.

    Args:
        model: The student.
        config: Settings of the run.
        position: Where the training stands.
        term_cost_V: For the sparsity penalty; all terms alike when ``None``.
    """

    rows: ClassVar[tuple[LossComponent[Any, Any, Any], ...]]
    """The losses, in the order in which they are added up."""
    watched: ClassVar[Mapping[str, str]] = {}
    """What is logged and drawn with them, with its label."""
    term_cost_V: Tensor | None
    loss_components: dict[str, Tensor]
    """Of the last batch, detached: unweighted losses by name, and whatever else is logged."""

    def __init__(
        self, model: SpladeEncoder, config: Any, *, position: Position, term_cost_V: Tensor | None = None
    ) -> None:
        super().__init__()
        self.model = model
        self.config = config
        self.position = position
        self.register_buffer("term_cost_V", term_cost_V, persistent=False)
        self.loss_components = {}

    def weighed(self, batch: Any, stage: Any) -> dict[str, Tensor]:
        """Return the weighted losses of a batch by name; keep the unweighted ones in `loss_components`."""
        found = {row.name: row.of(batch, self.config.losses, stage) for row in self.rows}
        self.loss_components = {name: values[0] for name, values in found.items() if values}
        return {name: values[1] for name, values in found.items() if values and values[1] is not None}


def shares(weighted: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the share of each weighted loss in the sum of their sizes, as ``share_NAME``, detached."""
    sizes = {name: value.detach().abs() for name, value in weighted.items()}
    total = sum(sizes.values()) + 1e-12
    return {f"share_{name}": size / total for name, size in sizes.items()}


NEVER = -1e4
"""A logit whose probability is 0; finite, because 0 times the logarithm of 0 must stay 0."""
SHORTEST = 1e-6
"""Vectors shorter than this count as zero: their direction is noise and its gradient, 1 / length, has no bound."""
TILE = 8192
"""Terms summed at a time; their (B, TILE) is small enough to be taken from memory already at hand."""


def flops(weights_BV: Tensor, *, term_cost_V: Tensor | None = None, across_ranks: bool = False) -> Tensor:
    """Penalise terms that many texts of a batch activate.

    ``sum over v of (c_v * mean over b of |w_bv|) ** 2``, all ``c_v = 1`` when no cost is given. A weight is pushed down
    in proportion to its term's mean, so common terms go first and posting lists even out.

    Args:
        weights_BV: Term weights after pooling, ``(B, V)``, any float dtype.
        term_cost_V: Relative cost of each term, ``(V,)``, unitless, >= 0, from `idf_term_cost`.
        across_ranks: Take the mean over the texts of all ranks, which must all call this. The value is then the same
            on every rank, and the average of their gradients, which is what DDP takes, is its exact gradient.

    Returns:
        Scalar, in squared weight units: what scoring one text of the batch against another costs, weighted. Summed in
        float32 at least.

    Raises:
        ValueError: If ``weights_BV`` is not ``(B, V)`` with B >= 1, or ``term_cost_V`` is not ``(V,)``.

    References:
        Paria et al. 2020, arXiv:2004.05665 (FLOPS). Geng et al. 2024, arXiv:2411.04403 (IDF-aware).
    """
    if weights_BV.ndim != 2 or len(weights_BV) == 0:
        raise ValueError(f"weights_BV must be (B, V) with B >= 1, got {tuple(weights_BV.shape)}")
    mean_V: Tensor = _MeanActivity.apply(weights_BV)  # type: ignore[no-untyped-call]
    if across_ranks and distributed.is_available() and distributed.is_initialized():
        mean_V = _mean_over_ranks(mean_V, len(weights_BV))
    if term_cost_V is not None:
        if term_cost_V.shape != mean_V.shape:
            raise ValueError(f"term_cost_V must be {tuple(mean_V.shape)}, got {tuple(term_cost_V.shape)}")
        mean_V = mean_V * term_cost_V
    return mean_V.square().sum()


def _mean_over_ranks(mean_V: Tensor, texts: int) -> Tensor:
    """Return the mean over all texts of all R ranks.

    A rank with n of the N texts contributes n / N of its mean; times R, because DDP divides the sum of the gradients by
    R. What the other ranks contribute, and that factor, are in the value alone.
    """
    totals = torch.cat([mean_V.detach() * texts, mean_V.new_tensor([texts])])
    distributed.all_reduce(totals)
    all_texts = totals[-1]
    own_V = mean_V * (distributed.get_world_size() * texts / all_texts)
    return own_V + (totals[:-1] / all_texts - own_V).detach()


class _MeanActivity(torch.autograd.Function):
    """The mean of |w| over the texts, ``(B, V)`` to ``(V,)``, with one (B, V) allocated: the gradient.

    At V 250,000 new memory is what a penalty costs, not arithmetic; plain autograd takes four of them.
    """

    @staticmethod
    def forward(ctx: Any, weights_BV: Tensor) -> Tensor:
        ctx.save_for_backward(weights_BV)
        dtype = torch.promote_types(weights_BV.dtype, torch.float32)
        tiles = torch.split(weights_BV, TILE, dim=1)
        return torch.cat([tile.abs().sum(dim=0, dtype=dtype) for tile in tiles]) / len(weights_BV)

    @staticmethod
    def backward(ctx: Any, gradient_V: Tensor) -> Tensor:
        (weights_BV,) = ctx.saved_tensors
        return weights_BV.sgn().mul_((gradient_V / len(weights_BV)).to(weights_BV.dtype))


def idf_term_cost(idf_V: Tensor, *, form: Literal["inverse", "direct"] = "inverse") -> Tensor:
    """Turn inverse document frequencies into costs for `flops`, with mean 1 so that its scale stays.

    Args:
        idf_V: ``(V,)``, > 0 and finite; high for rare terms.
        form: ``inverse`` costs 1/idf: common terms, which make long posting lists and say little, are punished.
            ``direct`` costs idf, as one published snippet does, and punishes rare terms; for comparison.

    Returns:
        Costs, ``(V,)`` float32, mean 1.

    Raises:
        ValueError: If an idf is not a finite number > 0, the shape is not ``(V,)`` with V >= 1, or `form` is unknown.
    """
    if form not in ("inverse", "direct"):
        raise ValueError(f'form must be "inverse" or "direct", got "{form}"')
    if idf_V.ndim != 1 or len(idf_V) == 0:
        raise ValueError(f"idf_V must be (V,) with V >= 1, got {tuple(idf_V.shape)}")
    usable_V = torch.isfinite(idf_V) & (idf_V > 0)
    if not bool(usable_V.all()):
        first = int((~usable_V).nonzero()[0])
        raise ValueError(f"idf of term {first} is {float(idf_V[first])}, not finite and > 0; smooth it first")
    cost_V = idf_V.double() if form == "direct" else 1 / idf_V.double()
    return (cost_V / cost_V.mean()).float()


class RowTargets(NamedTuple):
    """Term ids one text should activate; the collator makes one a row."""

    source: Sequence[int]
    """Ids of the text's own tokens."""
    korean: Sequence[tuple[int, float]]
    """Ids of Korean target terms, each with its similarity, > 0."""
    english: Sequence[tuple[int, float]]
    """Ids of English target terms, each with its similarity, > 0."""


@dataclass(frozen=True, slots=True)
class TermEntries:
    """The targets of one kind in a batch. A (row, id) stands once."""

    rows_T: Tensor
    """Row of the batch, ``(T,)`` int64, ascending."""
    ids_T: Tensor
    """Term, ``(T,)`` int64."""
    similarities_T: Tensor
    """``(T,)`` float32, > 0, unitless."""

    def to(self, device: torch.device | str) -> TermEntries:
        """Return a copy on `device`."""
        return TermEntries(self.rows_T.to(device), self.ids_T.to(device), self.similarities_T.to(device))


@dataclass(frozen=True, slots=True)
class TermTargets:
    """The targets of a batch, flat, so that a loss needs no loop over rows."""

    source: TermEntries
    """Own tokens, all with similarity 1."""
    korean: TermEntries
    english: TermEntries
    rows: int
    """Texts in the batch, those without any target included."""

    @classmethod
    def from_rows(cls, rows: Sequence[RowTargets]) -> TermTargets:
        """Flatten the targets of a batch on the CPU; an id named twice counts once, with its largest similarity.

        It is a `ValueError` if a similarity is not a finite number > 0, or an id is negative.
        """
        return cls(
            source=_flatten([(token, 1.0) for token in row.source] for row in rows),
            korean=_flatten(row.korean for row in rows),
            english=_flatten(row.english for row in rows),
            rows=len(rows),
        )

    def to(self, device: torch.device | str) -> TermTargets:
        """Return a copy on `device`."""
        return TermTargets(self.source.to(device), self.korean.to(device), self.english.to(device), self.rows)


def signed_weights(maxima: Tensor) -> Tensor:
    """Return log1p(m) where m > 0 and m elsewhere; both branches stay finite, so neither's gradient is NaN."""
    return torch.where(maxima > 0, torch.log1p(maxima.clamp_min(0)), maxima)


def _flatten(rows: Iterable[Iterable[tuple[int, float]]]) -> TermEntries:
    places: list[int] = []
    ids: list[int] = []
    similarities: list[float] = []
    for place, row in enumerate(rows):
        best: dict[int, float] = {}
        for term, similarity in row:
            if term < 0 or not (math.isfinite(similarity) and similarity > 0):
                raise ValueError(f"row {place}: term {term} has similarity {similarity}; need an id >= 0, finite > 0")
            best[term] = max(similarity, best.get(term, 0.0))
        places += [place] * len(best)
        ids += best.keys()
        similarities += best.values()
    return TermEntries(
        torch.tensor(places, dtype=torch.int64),
        torch.tensor(ids, dtype=torch.int64),
        torch.tensor(similarities, dtype=torch.float32),
    )

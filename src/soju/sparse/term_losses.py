"""How brightly does a text light up the terms it should? The losses of training from term mappings.

Shape letters: B = texts in the batch, V = terms in the vocabulary, T = (text, term) entries of one kind in the batch.

A weight is ``w = log1p(relu(m))`` with ``m`` the largest logit of a term over the tokens of a text. `v19_terms` reads
the weights, as published; `signed_terms` reads ``m`` itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import softplus

EPSILON = 1e-8
"""Keeps log(w) finite for a dark term (18.4 at most) and a row without similarity mass from dividing by zero."""


class RowTargets(NamedTuple):
    """Term ids one text should light up; the collator makes one a row."""

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
        """Flatten the targets of a batch on the CPU.

        Args:
            rows: Targets of each text. An id named twice in one list counts once, with its largest similarity.

        Returns:
            Flat tensors.

        Raises:
            ValueError: If a similarity is not a finite number > 0, or an id is negative.
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


class TermLosses(NamedTuple):
    """The four losses, float32 scalars, unweighted; activation losses of v19 are negative for weights above 1."""

    self_: Tensor
    korean: Tensor
    english: Tensor
    margin: Tensor

    def named(self) -> dict[str, Tensor]:
        """Return them by their published names: ``self``, ``korean``, ``english``, ``margin``."""
        return {name.rstrip("_"): value for name, value in self._asdict().items()}


def v19_terms(
    weights_BV: Tensor, targets: TermTargets, *, margin: float = 2.0, english_margin_factor: float = 1.5
) -> TermLosses:
    """Compute the published losses on the weights.

    With ``a = -log(w + 1e-8)`` and ``h(t) = relu(t - w)``, each text's entries of one kind are averaged by similarity
    (``sim / (sum of sim + 1e-8)``; own tokens evenly), then texts are summed:

    - ``self``: a + h(margin) over own tokens, divided by all rows of the batch;
    - ``korean``: a over Korean targets, divided by all rows;
    - ``english``: a over English targets, divided by the rows that have any;
    - ``margin``: h(margin) over Korean plus h(1.5 margin) over English targets, divided by all rows.

    Known flaw: a term with w = 0 came out of a ReLU, so **its logit gets no gradient** however large the loss is, and a
    dark target never wakes. `signed_terms` is the same without it.

    Args:
        weights_BV: Term weights after pooling, ``(B, V)``, >= 0. Pass float32: at w = 0 the gradient is -1e8 before the
            ReLU removes it, which float16 cannot hold.
        targets: Targets of the same B texts.
        margin: Weight a target should reach, in weight units.
        english_margin_factor: English targets should reach this many times `margin`.

    Returns:
        The four losses. A kind that no row has is 0.

    Raises:
        ValueError: If ``weights_BV`` is not ``(B, V)`` with B the number of rows of `targets`.
    """
    return _four_losses(
        weights_BV, targets, lambda w_T: w_T, lambda w_T: -torch.log(w_T + EPSILON), margin, english_margin_factor
    )


def signed_terms(
    maxima_BV: Tensor, targets: TermTargets, *, margin: float = 2.0, english_margin_factor: float = 1.5
) -> TermLosses:
    """Compute the same four losses on the signed maxima, so that dark targets get a gradient.

    The two ingredients of `v19_terms` become functions of a *signed weight* s: log1p(m) for m > 0, which is the weight,
    and m for m <= 0; s and its slope, 1 at 0, are continuous. -log(w + 1e-8) becomes ``softplus(-s)`` and the hinge
    ``relu(margin - s)``. So a target below its margin, dark or not, is pulled up with a slope between 0 and 2 of m,
    steepest where it is darkest.

    Args:
        maxima_BV: Largest logit of each term over the tokens of a text, before ReLU and log1p, ``(B, V)``, finite.
        targets: Targets of the same B texts.
        margin: Weight a target should reach, in weight units; a maximum of ``exp(margin) - 1``.
        english_margin_factor: English targets should reach this many times `margin`.

    Returns:
        The four losses. A kind that no row has is 0.

    Raises:
        ValueError: If ``maxima_BV`` is not ``(B, V)`` with B the number of rows of `targets`.
    """
    return _four_losses(maxima_BV, targets, signed_weights, lambda s_T: softplus(-s_T), margin, english_margin_factor)


def signed_weights(maxima: Tensor) -> Tensor:
    """Return log1p(m) where m > 0 and m elsewhere; both branches stay finite, so neither's gradient is NaN."""
    return torch.where(maxima > 0, torch.log1p(maxima.clamp_min(0)), maxima)


def _four_losses(
    values_BV: Tensor,
    targets: TermTargets,
    score: Callable[[Tensor], Tensor],
    activation_loss: Callable[[Tensor], Tensor],
    margin: float,
    english_margin_factor: float,
) -> TermLosses:
    if values_BV.ndim != 2 or len(values_BV) != targets.rows or targets.rows == 0:
        raise ValueError(f"targets of {targets.rows} texts need (B, V) of as many, >= 1; got {tuple(values_BV.shape)}")
    kinds = (targets.source, targets.korean, targets.english)
    # One look-up for all kinds: its backward fills one (B, V), three would fill three.
    rows = torch.cat([kind.rows_T for kind in kinds])
    ids = torch.cat([kind.ids_T for kind in kinds])
    scores = score(values_BV[rows, ids].float())
    margins = (margin, margin, margin * english_margin_factor)
    sizes = [len(kind.rows_T) for kind in kinds]
    activation, hinge = [], []
    for kind, scores_T, wanted in zip(kinds, torch.split(scores, sizes), margins, strict=True):
        shares_T = _shares(kind, targets.rows)
        activation.append(shares_T @ activation_loss(scores_T))
        hinge.append(shares_T @ torch.relu(wanted - scores_T))
    own, korean, english = activation
    return TermLosses(
        self_=(own + hinge[0]) / targets.rows,
        korean=korean / targets.rows,
        english=english / _rows_with_any(targets.english, targets.rows),
        margin=(hinge[1] + hinge[2]) / targets.rows,
    )


def _shares(entries: TermEntries, rows: int) -> Tensor:
    """Return each entry's similarity as a share of its row's."""
    totals_B = entries.similarities_T.new_zeros(rows).index_add_(0, entries.rows_T, entries.similarities_T)
    return entries.similarities_T / (totals_B[entries.rows_T] + EPSILON)


def _rows_with_any(entries: TermEntries, rows: int) -> Tensor:
    """Return the number of rows with an entry, at least 1, without waiting for a GPU."""
    return entries.similarities_T.new_zeros(rows).index_fill_(0, entries.rows_T, 1.0).sum().clamp_min(1.0)


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

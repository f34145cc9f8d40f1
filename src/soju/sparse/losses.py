"""How far is one distribution from another? Shape letters: B = texts, V = vocabulary, D = teacher's dimensions.

Does a text find its translation among the others? Shape letters: B = texts, V = vocabulary.

Sparsity penalties. Shape letters: B = texts in the batch, V = terms in the vocabulary.

How brightly does a text light up the terms it should? The losses of training from term mappings.

Shape letters: B = texts in the batch, V = terms in the vocabulary, T = (text, term) entries of one kind in the batch.

A weight is ``w = log1p(relu(m))`` with ``m`` the largest logit of a term over the tokens of a text. `v19_terms` reads
the weights, as published; `signed_terms` reads ``m`` itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, distributed
from torch.nn.functional import cross_entropy, kl_div, log_softmax, softplus

NEVER = -1e4
"""A logit whose probability is 0; finite, because 0 times the logarithm of 0 must stay 0."""
SHORTEST = 1e-6
"""Vectors shorter than this count as zero: their direction is noise and its gradient, 1 / length, has no bound."""


def in_batch_distillation(
    student_BV: Tensor, teacher_BD: Tensor, *, temperature: float = 0.05, with_self: bool = True
) -> Tensor:
    """Teach the student which texts of a batch are alike.

    ``KL(softmax(cos_T / temperature) || softmax(cos_S / temperature))``, row by row over the ``(B, B)`` cosines of each
    side, averaged over rows. Direction: forward, the teacher is the reference.

    Args:
        student_BV: Student vectors, ``(B, V)``. A zero vector (a text that lights no term) has cosine 0 with every
            text, itself too, and gets no gradient.
        teacher_BD: Teacher vectors of the same texts, ``(B, D)``, any length; no gradient flows into them.
        temperature: Cosines are divided by it, > 0.
        with_self: Whether a text is compared with itself too, as published. Where a batch holds translations, whose
            teacher vectors are equal, half of each row's mass then lies on the text itself, and its translation must
            come as close as that; without, the translation only has to come before all others.

    Returns:
        Scalar float32 >= 0, in nats; 0 for a batch of one.

    Raises:
        ValueError: If the shapes do not fit or `temperature` is not > 0.

    References:
        Hinton et al. 2015, arXiv:1503.02531 (distillation).
        Tung and Mori 2019, arXiv:1907.09682 (similarities within a batch).
    """
    if student_BV.ndim != 2 or teacher_BD.ndim != 2 or len(student_BV) != len(teacher_BD) or len(student_BV) == 0:
        shapes = f"{tuple(student_BV.shape)} and {tuple(teacher_BD.shape)}"
        raise ValueError(f"student and teacher must be (B, V) and (B, D) of the same B >= 1 texts, got {shapes}")
    if not temperature > 0:
        raise ValueError(f"temperature must be > 0, got {temperature}")
    # Half precision is no good for numbers that are divided by 0.05 and exponentiated.
    with torch.autocast(student_BV.device.type, enabled=False):
        student_BB = cosines(student_BV) / temperature
        teacher_BB = cosines(teacher_BD.detach()) / temperature
        if not with_self:
            itself_BB = torch.eye(len(student_BB), dtype=torch.bool, device=student_BB.device)
            student_BB = student_BB.masked_fill(itself_BB, NEVER)
            teacher_BB = teacher_BB.masked_fill(itself_BB, NEVER)
        target_BB = log_softmax(teacher_BB, dim=1).to(student_BB.dtype)
        return kl_div(log_softmax(student_BB, dim=1), target_BB, log_target=True, reduction="batchmean")


def cosines(vectors: Tensor) -> Tensor:
    """Return the ``(B, B)`` cosines without a normalised copy of the vectors; float64 stays float64."""
    if vectors.dtype != torch.float64:
        vectors = vectors.float()
    # Differentiate one side and mirror it: one matrix product backward instead of two and their sum.
    half_BB = vectors @ vectors.detach().T
    gram_BB = half_BB + half_BB.T - half_BB.detach()
    squares_B = gram_BB.diagonal()
    usable_B = squares_B > SHORTEST**2
    # Inside the square root as well, or a zero's infinite slope times 0 is NaN.
    inverse_B = torch.where(usable_B, squares_B, 1.0).rsqrt() * usable_B
    return gram_BB * inverse_B[:, None] * inverse_B[None, :]


def in_batch_translation(weights_BV: Tensor, partner_B: Tensor, *, temperature: float = 0.05) -> Tensor:
    """Let each text tell its translation from every other text of the batch, in both languages.

    ``-log softmax(cos / temperature)[partner]``, averaged over the texts that have a partner; a text is no candidate
    for itself. It is InfoNCE with the cosine, both directions at once.

    Args:
        weights_BV: Vectors, ``(B, V)``.
        partner_B: Row of each text's translation, ``(B,)`` int64, -1 for texts without one.
        temperature: Cosines are divided by it, > 0.

    Returns:
        Scalar float32 >= 0, in nats; 0 when no text has a partner.

    Raises:
        ValueError: If the shapes do not fit, a text is its own partner, or `temperature` is not > 0.

    References:
        van den Oord et al. 2018, arXiv:1807.03748 (InfoNCE).
    """
    if weights_BV.ndim != 2 or partner_B.shape != weights_BV.shape[:1] or len(weights_BV) == 0:
        shapes = f"{tuple(weights_BV.shape)} and {tuple(partner_B.shape)}"
        raise ValueError(f"vectors and partners must be (B, V) and (B,) of the same B >= 1 texts, got {shapes}")
    if not temperature > 0:
        raise ValueError(f"temperature must be > 0, got {temperature}")
    places_B = torch.arange(len(partner_B), device=partner_B.device)
    if bool((partner_B == places_B).any()):
        raise ValueError("a text is its own partner; give the row of its translation, or -1")
    paired = partner_B >= 0
    if not bool(paired.any()):
        return weights_BV.sum() * 0.0
    with torch.autocast(weights_BV.device.type, enabled=False):
        logits_BB = cosines(weights_BV) / temperature
        itself_BB = places_B[:, None] == places_B[None, :]
        return cross_entropy(logits_BB.masked_fill(itself_BB, NEVER)[paired], partner_B[paired])


TILE = 8192
"""Terms summed at a time; their (B, TILE) is small enough to be taken from memory already at hand."""


def flops(weights_BV: Tensor, *, term_cost_V: Tensor | None = None, across_ranks: bool = False) -> Tensor:
    """Penalise terms that many texts of a batch light up.

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

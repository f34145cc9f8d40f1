"""The losses of mode ``terms``: activate given terms, compare texts as a teacher does, tell translations apart.

Shape letters: B = texts in the batch, V = terms in the vocabulary, T = (text, term) entries of one kind in the batch,
D = dimensions of the teacher.

`v19_terms` reads the weights, as published; `signed_terms` reads the signed maxima.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div, log_softmax, softplus

from soju.sparse.config import LossSettings
from soju.sparse.losses import (
    NEVER,
    SHORTEST,
    LossComponent,
    NamedLosses,
    TermEntries,
    TermTargets,
    flops,
    signed_weights,
)

EPSILON = 1e-8
"""Keeps log(w) finite for an inactive term (18.4 at most) and a row without similarity mass from dividing by zero."""


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
    inactive target never becomes active. `signed_terms` is the same without it.

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
    """Compute the same four losses on the signed maxima, so that inactive targets get a gradient.

    The two ingredients of `v19_terms` become functions of a *signed weight* s: log1p(m) for m > 0, which is the weight,
    and m for m <= 0; s and its slope, 1 at 0, are continuous. -log(w + 1e-8) becomes ``softplus(-s)`` and the hinge
    ``relu(margin - s)``. So a target below its margin, active or not, is pulled up with a slope between 0 and 2 of
    m, steepest where m is lowest.

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


def in_batch_distillation(
    student_BV: Tensor, teacher_BD: Tensor, *, temperature: float = 0.05, with_self: bool = True
) -> Tensor:
    """Teach the student which texts of a batch are alike.

    ``KL(softmax(cos_T / temperature) || softmax(cos_S / temperature))``, row by row over the ``(B, B)`` cosines of each
    side, averaged over rows. Direction: forward, the teacher is the reference.

    Args:
        student_BV: Student vectors, ``(B, V)``. A zero vector (a text without active terms) has cosine 0 with every
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


@dataclass(frozen=True)
class TermsBatch:
    """What the losses of a batch look at."""

    settings: LossSettings
    weights_BV: Tensor
    maxima_BV: Tensor
    labels: Mapping[str, Any]
    """What `TermsCollator` says of the texts."""
    term_cost_V: Tensor | None

    @cached_property
    def activation(self) -> TermLosses:
        """The four term losses, computed together."""
        settings = self.settings
        values_BV, form = (self.weights_BV, v19_terms) if settings.terms == "v19" else (self.maxima_BV, signed_terms)
        return form(
            values_BV,
            self.labels["targets"].to(values_BV.device),
            margin=settings.target_margin,
            english_margin_factor=settings.english_margin_factor,
        )


def _distillation(batch: TermsBatch) -> Tensor | None:
    """Compare the texts that the teacher read; nothing in a batch of which it read none."""
    settings, read = batch.settings, batch.labels["taught"]
    if not len(read):
        return None
    return in_batch_distillation(
        batch.weights_BV[read],
        batch.labels["teacher"],
        temperature=settings.temperature,
        with_self=settings.with_self,
    )


def _translation(batch: TermsBatch) -> Tensor:
    partner_B = batch.labels["partner"].to(batch.weights_BV.device)
    return in_batch_translation(batch.weights_BV, partner_B, temperature=batch.settings.temperature)


def _flops(batch: TermsBatch) -> Tensor:
    return flops(batch.weights_BV, term_cost_V=batch.term_cost_V, across_ranks=True)


def _flops_weight(settings: LossSettings, done: float) -> float:
    return settings.flops if done >= settings.flops_from else 0.0


Row = LossComponent[LossSettings, float, TermsBatch]
LOSSES = (
    Row("self", "self", lambda settings, done: settings.self_terms, lambda batch: batch.activation.self_),
    Row(
        "korean", "Korean targets", lambda settings, done: settings.korean_terms, lambda batch: batch.activation.korean
    ),
    Row(
        "english",
        "English targets",
        lambda settings, done: settings.english_terms,
        lambda batch: batch.activation.english,
    ),
    Row("margin", "margin", lambda settings, done: settings.margin, lambda batch: batch.activation.margin),
    Row("distillation", "distillation", lambda settings, done: settings.distillation, _distillation, watched=False),
    Row("translation", "translation", lambda settings, done: settings.translation, _translation, watched=False),
    Row("flops", "FLOPS", _flops_weight, _flops),
)
"""The losses of the mode; a weight depends on the settings and on the share of the training that is done."""


class TermsLoss(NamedLosses):
    """Weighted sum of `LOSSES`; see `NamedLosses`."""

    rows = LOSSES
    watched: ClassVar[Mapping[str, str]] = {"active_terms": "active terms a text"}

    def forward(self, features: Sequence[dict[str, Tensor]], labels: Mapping[str, Any]) -> dict[str, Tensor]:
        """Return the weighted losses by name; their sum is what is minimised."""
        (texts,) = features
        output = self.model(texts)
        weights_BV = output["sentence_embedding"]
        batch = TermsBatch(self.config.losses, weights_BV, output["signed_maxima"], labels, self.term_cost_V)
        step, planned = self.position()
        weighted = self.weighed(batch, step / max(1, planned))
        self.loss_components["active_terms"] = (weights_BV.detach() > 0).sum(dim=1, dtype=torch.float32).mean()
        return weighted

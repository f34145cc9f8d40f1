"""The losses of training from triplets: a query, a text that answers it, a text that does not.

Shape letters: B = triplets in the batch, C = candidates (the B positives, then the B negatives), V = terms in the
vocabulary, T = (text, term) entries in the batch, K = heaviest terms of a text.

The named losses of mode ``triplets`` in the shape a sentence-transformers trainer takes.

Shape letters: B = triplets in the batch, C = candidates (B positives, B negatives), N = the 3 B texts of a batch
(queries, positives, negatives), V = terms in the vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, kl_div, log_softmax

from soju.sparse.controllers import SparsityController
from soju.sparse.curriculum import Stage, stage_at
from soju.sparse.losses import NEVER, SHORTEST, TermEntries, flops, signed_weights
from soju.sparse.splade import SpladeEncoder
from soju.sparse.triplets.config import StageSettings, TripletsConfig
from soju.training.cached_gradients import cached_losses

Similarity = Literal["cosine", "dot"]
Form = Literal["published", "signed"]
"""``published``: on the weights, after ReLU; ``signed``: on the signed maxima, where a dark term has a gradient too."""


class InfoNce(NamedTuple):
    """The loss, and how hard its negatives were."""

    loss: Tensor
    """Scalar float32 >= 0, in nats."""
    effective_negatives: Tensor
    """Scalar: mean perplexity of the softmax over candidates, minus the answer itself; 0 when nothing competes."""


def similarities(queries_BV: Tensor, candidates_CV: Tensor, *, similarity: Similarity) -> Tensor:
    """Return the cosines or dot products of queries and candidates, ``(B, C)``; a zero vector has 0 with everything."""
    if queries_BV.dtype != torch.float64:
        queries_BV, candidates_CV = queries_BV.float(), candidates_CV.float()
    products_BC = queries_BV @ candidates_CV.T
    if similarity == "dot":
        return products_BC
    return products_BC * _inverse_lengths(queries_BV)[:, None] * _inverse_lengths(candidates_CV)[None, :]


def info_nce(scores_BC: Tensor, same_BC: Tensor, *, temperature: float, symmetric: bool = False) -> InfoNce:
    """Find each query's positive among all positives and negatives of the batch.

    ``-log softmax(scores / temperature)[own positive]``, averaged over queries.

    Args:
        scores_BC: Similarities, ``(B, 2 B)``; column i is the positive of query i, column B + i its negative.
        same_BC: True where a candidate is no negative although it is not the positive of this row: it equals the
            positive or the query itself. Left out of the softmax. ``(B, 2 B)`` bool.
        temperature: Scores are divided by it, > 0.
        symmetric: Also find each positive's query among all queries, and average the two.

    Returns:
        The loss, and the effective number of negatives of the direction from the query.

    Raises:
        ValueError: If the shapes do not fit or `temperature` is not > 0.

    References:
        van den Oord et al. 2018, arXiv:1807.03748 (InfoNCE). Karpukhin et al. 2020, arXiv:2004.04906 (with hard
        negatives).
    """
    rows = len(scores_BC)
    if scores_BC.ndim != 2 or rows == 0 or scores_BC.shape != (rows, 2 * rows) or same_BC.shape != scores_BC.shape:
        shapes = f"{tuple(scores_BC.shape)} and {tuple(same_BC.shape)}"
        raise ValueError(f"scores and mask must be (B, 2 B) with B >= 1, got {shapes}")
    if not temperature > 0:
        raise ValueError(f"temperature must be > 0, got {temperature}")
    own_B = torch.arange(rows, device=scores_BC.device)
    keep_BC = ~same_BC
    keep_BC[own_B, own_B] = True
    logits_BC = (scores_BC / temperature).masked_fill(~keep_BC, NEVER)
    loss = cross_entropy(logits_BC, own_B)
    if symmetric:
        loss = (loss + cross_entropy(logits_BC[:, :rows].T, own_B)) / 2
    with torch.no_grad():
        log_BC = log_softmax(logits_BC, dim=1)
        perplexity_B = torch.exp(-(log_BC.exp() * log_BC).sum(dim=1))
    return InfoNce(loss, perplexity_B.mean() - 1)


def triplet_margin(scores_BC: Tensor, *, margin: float) -> Tensor:
    """Return the mean of ``relu(margin - s(q, p) + s(q, n))``; a margin above 1 is out of reach for cosines >= 0."""
    rows = len(scores_BC)
    positive_B, negative_B = scores_BC[:, :rows].diagonal(), scores_BC[:, rows:].diagonal()
    return torch.relu(margin - positive_B + negative_B).mean()


def term_activation(maxima_BV: Tensor, terms: TermEntries, *, form: Form, target: float) -> Tensor:
    """Ask a text to light up given terms.

    ``published``: minus the mean weight over the terms, which has no bound and no gradient for a dark term.
    ``signed``: the mean of ``relu(target - s)`` with the signed weight s (`signed_weights`): 0 once all are lit as far
    as asked.

    Args:
        maxima_BV: Signed maxima, ``(B, V)``.
        terms: Own terms of the same texts (*self-reconstruction*), or those of their positives (*positive activation*).
        form: See above.
        target: Weight to reach, in weight units; ``signed`` only.

    Returns:
        Scalar float32, the mean over the texts that have any term; 0 when none has.
    """
    s_T = signed_weights(maxima_BV[terms.rows_T, terms.ids_T].float())
    loss_T = -s_T.clamp_min(0) if form == "published" else torch.relu(target - s_T)
    counts_B = loss_T.new_zeros(len(maxima_BV)).index_add_(0, terms.rows_T, torch.ones_like(loss_T))
    texts = (counts_B > 0).sum().clamp_min(1)
    return (loss_T / counts_B[terms.rows_T]).sum() / texts


def minimum_activation(maxima_BV: Tensor, *, form: Form, k: int = 5, threshold: float = 0.5) -> Tensor:
    """Return the mean of ``relu(threshold - mean of the k heaviest terms)``: a guard against collapse to nothing.

    On the weights (``published``) a text that lights nothing gets no gradient; on the signed ones it does.
    """
    top_BK = signed_weights(maxima_BV.float().topk(min(k, maxima_BV.shape[1]), dim=1).values)
    if form == "published":
        top_BK = top_BK.clamp_min(0)
    return torch.relu(threshold - top_BK.mean(dim=1)).mean()


def listwise_distillation(
    scores_BC: Tensor, teacher_BC: Tensor, known_BC: Tensor, *, temperature: float, teacher_temperature: float
) -> Tensor:
    """Teach the student how a teacher ranks the candidates of each query, in-batch and hard negatives alike.

    ``KL(softmax(teacher / teacher_temperature) || softmax(student / temperature))`` over the known candidates, averaged
    over the queries that know at least two. Direction: forward, the teacher is the reference.

    Args:
        scores_BC: The student's similarities, ``(B, C)``.
        teacher_BC: The teacher's scores of the same pairs, calibrated; no gradient flows into them.
        known_BC: Where the teacher has a score, bool.
        temperature: The student's scores are divided by it, > 0.
        teacher_temperature: The teacher's, > 0.

    Returns:
        Scalar float32 >= 0, in nats; 0 when no query knows two candidates.
    """
    rows_B = known_BC.sum(dim=1) >= 2
    if not bool(rows_B.any()):
        return scores_BC.sum() * 0.0
    known_BC = known_BC[rows_B]
    student_BC = (scores_BC[rows_B] / temperature).masked_fill(~known_BC, NEVER)
    target_BC = (teacher_BC[rows_B].detach() / teacher_temperature).masked_fill(~known_BC, NEVER)
    target_BC = log_softmax(target_BC, dim=1).to(student_BC.dtype)
    return kl_div(log_softmax(student_BC, dim=1), target_BC, log_target=True, reduction="batchmean")


def margin_mse(scores_BC: Tensor, teacher_margin_B: Tensor, known_B: Tensor) -> Tensor:
    """Return the mean squared difference of the student's margin s(q, p) - s(q, n) and the teacher's.

    Args:
        scores_BC: The student's similarities, ``(B, 2 B)`` as in `info_nce`.
        teacher_margin_B: The teacher's margins in the unit of the student's scores, ``(B,)``.
        known_B: Where the teacher has one, bool; 0 is returned when nowhere.

    Returns:
        Scalar float32 >= 0, in squared score units.

    References:
        Hofstätter et al. 2020, arXiv:2010.02666 (MarginMSE).
    """
    rows = len(scores_BC)
    margin_B = scores_BC[:, :rows].diagonal() - scores_BC[:, rows:].diagonal()
    if not bool(known_B.any()):
        return margin_B.sum() * 0.0
    return (margin_B - teacher_margin_B.detach())[known_B].square().mean()


def _inverse_lengths(vectors: Tensor) -> Tensor:
    squares = vectors.square().sum(dim=1)
    usable = squares > SHORTEST**2
    # Inside the square root as well, or a zero's infinite slope times 0 is NaN.
    return torch.where(usable, squares, 1.0).rsqrt() * usable


FIRST = 1e-3
"""Where a penalty begins that is to be steered although its weight is 0."""
FLOOR = 0.01
"""Lowest weight of a steered penalty, as a share of the first: from further down it would not be back in time."""


class TripletsLoss(nn.Module):
    """Weighted sum of InfoNCE, term losses, margin, distillation, sparsity penalty and guard against collapse.

    Args:
        model: The student.
        config: Settings of the run.
        term_cost_V: For the penalty; all terms alike when ``None``.
    """

    term_cost_V: Tensor | None
    raw_terms: dict[str, Tensor]
    """Of the last batch, detached: unweighted losses, the share of each in the total (``share_NAME``), effective
    negatives, active terms and the weights of the penalty."""

    def __init__(self, model: SpladeEncoder, config: TripletsConfig, *, term_cost_V: Tensor | None = None) -> None:
        super().__init__()
        self.model = model
        self.config = config
        self.position: Callable[[], tuple[int, int]] = lambda: (0, 1)
        """Returns the optimiser steps done and planned: all that a schedule may depend on."""
        self._weights_of: Callable[[Tensor], Tensor] = model[1].weights
        self.register_buffer("term_cost_V", term_cost_V, persistent=False)
        sparsity, first = config.sparsity, config.losses.flops or FIRST
        self.controllers = {
            side: SparsityController(
                wanted,
                weight=first if wanted else config.losses.flops,
                rate=sparsity.rate,
                bounds=(FLOOR * first, max(first, sparsity.highest)),
            )
            for side, wanted in (("query", sparsity.query_terms), ("document", sparsity.document_terms))
        }
        self.raw_terms = {}

    @property
    def stage(self) -> StageSettings:
        """The stage of the curriculum that the step in progress belongs to."""
        return self.config.curriculum[stage_at(stages_of(self.config), *self.position())]

    @property
    def ramp(self) -> float:
        """The factor on the penalty: 0 until it starts, then rising with the square of the steps to 1."""
        done, planned = self.position()
        settings = self.config.losses
        over = done / max(1, planned) - settings.flops_from
        if over < 0:
            return 0.0
        return 1.0 if settings.flops_rise == 0 else min(1.0, over / settings.flops_rise) ** 2

    def forward(self, features: Sequence[dict[str, Tensor]], labels: Mapping[str, Any]) -> dict[str, Tensor]:
        """Return the weighted losses by name; their sum is what is minimised."""
        (texts,) = features
        if self.config.training.cached and torch.is_grad_enabled():
            inputs = {name: texts[name] for name in ("input_ids", "attention_mask")}
            return cached_losses(
                lambda part: self.model(part)["signed_maxima"],
                inputs,
                lambda maxima_NV: self._losses(maxima_NV, self._weights_of(maxima_NV), labels),
                mini_batch=3 * self.config.training.per_device_train_batch_size,
            )
        output = self.model(texts)
        return self._losses(output["signed_maxima"], output["sentence_embedding"], labels)

    def _losses(self, maxima_NV: Tensor, weights_NV: Tensor, labels: Mapping[str, Any]) -> dict[str, Tensor]:
        settings, stage = self.config.losses, self.stage
        rows = len(maxima_NV) // 3
        queries_BV, documents_CV = weights_NV[:rows], weights_NV[rows:]
        maxima_BV = maxima_NV[:rows]
        terms = labels["terms"].to(weights_NV.device)
        with torch.autocast(weights_NV.device.type, enabled=False):
            scores_BC = similarities(queries_BV, documents_CV, similarity=self.config.similarity)
            found = info_nce(
                scores_BC, labels["same"].to(weights_NV.device), temperature=stage.temperature,
                symmetric=settings.symmetric,
            )  # fmt: skip
        raw = {
            "infonce": found.loss,
            "self": term_activation(maxima_BV, terms.source, form=settings.form, target=settings.target),
            "positive": term_activation(maxima_BV, terms.english, form=settings.form, target=settings.target),
            "margin": triplet_margin(scores_BC, margin=settings.triplet_margin),
            "minimum": minimum_activation(
                maxima_NV if settings.regularize == "all" else maxima_BV,
                form=settings.form, k=settings.minimum_terms, threshold=settings.minimum_weight,
            ),
        }  # fmt: skip
        weights = {
            "infonce": settings.infonce * stage.infonce,
            "self": settings.self_terms,
            "positive": settings.positive_terms,
            "margin": settings.margin,
            "minimum": settings.minimum_activation,
        }
        if settings.distillation > 0 and (self.training or "teacher" in labels):  # it did not read the dev rows
            raw["distillation"] = self._distillation(scores_BC, labels, stage)
            weights["distillation"] = settings.distillation
        weighted = {name: weights[name] * raw[name] for name in raw if weights[name] > 0}
        raw["flops"], weighted["flops"] = self._penalty(queries_BV, documents_CV)
        self._note(raw, weighted, found.effective_negatives, weights_NV, rows)
        return weighted

    def _distillation(self, scores_BC: Tensor, labels: Mapping[str, Any], stage: StageSettings) -> Tensor:
        settings = self.config.losses
        teacher_BC, known_BC = labels["teacher"].to(scores_BC.device), labels["known"].to(scores_BC.device)
        if settings.distillation_form == "listwise":
            return listwise_distillation(
                scores_BC, teacher_BC, known_BC,
                temperature=stage.temperature, teacher_temperature=settings.teacher_temperature,
            )  # fmt: skip
        rows = len(scores_BC)
        own, hard = (slice(0, rows), slice(rows, None))
        margin_B = teacher_BC[:, own].diagonal() - teacher_BC[:, hard].diagonal()
        return margin_mse(scores_BC, margin_B, known_BC[:, own].diagonal() & known_BC[:, hard].diagonal())

    def _penalty(self, queries_BV: Tensor, documents_CV: Tensor) -> tuple[Tensor, Tensor]:
        """Return the penalty on all that is penalised, raw and weighted."""
        sides = {"query": queries_BV, "document": documents_CV}
        if self.config.losses.regularize == "query":
            del sides["document"]
        raw = {
            side: flops(weights, term_cost_V=self.term_cost_V, across_ranks=self.training)
            for side, weights in sides.items()
        }
        weighted = [self.ramp * self.controllers[side].weight * value for side, value in raw.items()]
        return torch.stack(list(raw.values())).sum(), torch.stack(weighted).sum()

    @torch.no_grad()
    def _note(
        self,
        raw: Mapping[str, Tensor],
        weighted: Mapping[str, Tensor],
        effective_negatives: Tensor,
        weights_NV: Tensor,
        rows: int,
    ) -> None:
        total = sum(value.detach().abs() for value in weighted.values()) + 1e-12
        active_N = (weights_NV > 0).sum(dim=1)
        sides = {"query": active_N[:rows], "document": active_N[rows:]}
        self.raw_terms = {name: value.detach() for name, value in raw.items()}
        self.raw_terms |= {f"share_{name}": value.detach().abs() / total for name, value in weighted.items()}
        self.raw_terms["effective_negatives"] = effective_negatives
        for side, active in sides.items():
            self.raw_terms[f"active_{side}"] = active.float().mean()
            self.raw_terms[f"flops_weight_{side}"] = active.new_tensor(
                self.ramp * self.controllers[side].weight, dtype=torch.float32
            )
            if self.training:
                self.controllers[side].observe(active)


def stages_of(config: TripletsConfig) -> list[Stage]:
    """Return the curriculum as the sampler and the schedule take it."""
    return [Stage(share=stage.share, learning_rate=stage.learning_rate, mix=stage.mix) for stage in config.curriculum]

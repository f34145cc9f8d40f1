"""The losses of mode ``triplets``: a query, a text that answers it, a text that does not.

Pure functions first; then the rows that name and weigh them (`LOSSES`), and the module that the trainer calls. To add
a loss: write its function, a setting in `TripletLossSettings` and a row.

Shape letters: B = triplets in the batch, C = candidates (the B positives, then the B negatives), N = the 3 B texts of a
batch (queries, positives, negatives), V = terms in the vocabulary, T = (text, term) entries in the batch, K = heaviest
terms of a text.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div, log_softmax

from soju.sparse.curriculum import SparsityController, Stage, stage_at
from soju.sparse.losses import (
    NEVER,
    SHORTEST,
    LossComponent,
    NamedLosses,
    Position,
    TermEntries,
    flops,
    shares,
    signed_weights,
)
from soju.sparse.splade import SpladeEncoder
from soju.sparse.triplets.config import StageSettings, TripletLossSettings, TripletsConfig
from soju.training.cached_gradients import cached_losses

Similarity = Literal["cosine", "dot"]
Form = Literal["published", "signed"]
"""``published``: on the weights, after ReLU; ``signed``: on the signed maxima, where an inactive term has a gradient
too."""


def similarities(queries_BV: Tensor, candidates_CV: Tensor, *, similarity: Similarity) -> Tensor:
    """Return the cosines or dot products of queries and candidates, ``(B, C)``; a zero vector has 0 with everything."""
    if queries_BV.dtype != torch.float64:
        queries_BV, candidates_CV = queries_BV.float(), candidates_CV.float()
    # Half precision is no good for numbers that are divided by a temperature of 0.05 and exponentiated.
    with torch.autocast(queries_BV.device.type, enabled=False):
        products_BC = queries_BV @ candidates_CV.T
        if similarity == "dot":
            return products_BC
        return products_BC * _inverse_lengths(queries_BV)[:, None] * _inverse_lengths(candidates_CV)[None, :]


def info_nce(scores_BC: Tensor, same_BC: Tensor, *, temperature: float, symmetric: bool = False) -> Tensor:
    """Find each query's positive among all positives and negatives of the batch.

    ``-log softmax(scores / temperature)[own positive]``, averaged over queries.

    Args:
        scores_BC: Similarities, ``(B, 2 B)``; column i is the positive of query i, column B + i its negative.
        same_BC: True where a candidate is no negative although it is not the positive of this row: it equals the
            positive or the query itself. Left out of the softmax. ``(B, 2 B)`` bool.
        temperature: Scores are divided by it, > 0.
        symmetric: Also find each positive's query among all queries, and average the two.

    Returns:
        Scalar float32 >= 0, in nats.

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
    logits_BC = _logits(scores_BC, same_BC, temperature)
    own_B = torch.arange(rows, device=scores_BC.device)
    loss = cross_entropy(logits_BC, own_B)
    if symmetric:
        loss = (loss + cross_entropy(logits_BC[:, :rows].T, own_B)) / 2
    return loss


@torch.no_grad()
def effective_negatives(scores_BC: Tensor, same_BC: Tensor, *, temperature: float) -> Tensor:
    """Return how hard the negatives of `info_nce` are, for the log.

    Mean perplexity of the softmax over candidates, minus the answer itself; 0 when nothing competes.
    """
    log_BC = log_softmax(_logits(scores_BC, same_BC, temperature), dim=1)
    return torch.exp(-(log_BC.exp() * log_BC).sum(dim=1)).mean() - 1


def _logits(scores_BC: Tensor, same_BC: Tensor, temperature: float) -> Tensor:
    own_B = torch.arange(len(scores_BC), device=scores_BC.device)
    keep_BC = ~same_BC
    keep_BC[own_B, own_B] = True
    return (scores_BC / temperature).masked_fill(~keep_BC, NEVER)


def triplet_margin(scores_BC: Tensor, *, margin: float) -> Tensor:
    """Return the mean of ``relu(margin - s(q, p) + s(q, n))``; a margin above 1 is out of reach for cosines >= 0."""
    rows = len(scores_BC)
    positive_B, negative_B = scores_BC[:, :rows].diagonal(), scores_BC[:, rows:].diagonal()
    return torch.relu(margin - positive_B + negative_B).mean()


def term_activation(maxima_BV: Tensor, terms: TermEntries, *, form: Form, target: float) -> Tensor:
    """Ask a text to activate given terms.

    ``published``: minus the mean weight over the terms, which has no bound and no gradient for an inactive term.
    ``signed``: the mean of ``relu(target - s)`` with the signed weight s (`signed_weights`): 0 once all are as heavy as
    asked.

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
    """Return the mean of ``relu(threshold - mean of the k heaviest terms)``, which keeps texts from losing all terms.

    On the weights (``published``) a text without active terms gets no gradient; on the signed ones it does.
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


@dataclass(frozen=True, slots=True)
class Step:
    """What curriculum, schedules and controllers say at one optimiser step."""

    stage: StageSettings
    penalty: tuple[float, ...]
    """Weights of the sparsity penalty on queries and, when they are penalised, on documents."""


class TripletsBatch:
    """What the losses of a batch read."""

    def __init__(self, loss: TripletsLoss, maxima_NV: Tensor, weights_NV: Tensor, labels: Mapping[str, Any]) -> None:
        rows = len(maxima_NV) // 3
        self.settings: TripletLossSettings = loss.config.losses
        self.stage = loss.stage
        self.maxima_NV = maxima_NV
        self.queries_BV, self.documents_CV = weights_NV[:rows], weights_NV[rows:]
        self.query_maxima_BV = maxima_NV[:rows]
        self.terms = labels["terms"].to(weights_NV.device)
        self.same_BC = labels["same"].to(weights_NV.device)
        self.scores_BC = similarities(self.queries_BV, self.documents_CV, similarity=loss.config.similarity)
        self.labels = labels
        self.is_trained_on = loss.training
        self.term_cost_V = loss.term_cost_V

    @property
    def reads_documents(self) -> bool:
        """Whether penalty and minimum activation read documents too."""
        return self.settings.regularize == "all"


def _info_nce(batch: TripletsBatch) -> Tensor:
    return info_nce(
        batch.scores_BC, batch.same_BC, temperature=batch.stage.temperature, symmetric=batch.settings.symmetric
    )


def _own_terms(batch: TripletsBatch) -> Tensor:
    settings = batch.settings
    return term_activation(batch.query_maxima_BV, batch.terms.source, form=settings.form, target=settings.target)


def _positive_terms(batch: TripletsBatch) -> Tensor:
    settings = batch.settings
    return term_activation(batch.query_maxima_BV, batch.terms.english, form=settings.form, target=settings.target)


def _margin(batch: TripletsBatch) -> Tensor:
    return triplet_margin(batch.scores_BC, margin=batch.settings.triplet_margin)


def _minimum(batch: TripletsBatch) -> Tensor:
    settings = batch.settings
    maxima = batch.maxima_NV if batch.reads_documents else batch.query_maxima_BV
    return minimum_activation(maxima, form=settings.form, k=settings.minimum_terms, threshold=settings.minimum_weight)


def _distillation(batch: TripletsBatch) -> Tensor | None:
    if not batch.is_trained_on and "teacher" not in batch.labels:
        return None  # the teacher did not read the development rows
    settings, scores_BC = batch.settings, batch.scores_BC
    teacher_BC, known_BC = (batch.labels[name].to(scores_BC.device) for name in ("teacher", "known"))
    if settings.distillation_form == "listwise":
        return listwise_distillation(
            scores_BC,
            teacher_BC,
            known_BC,
            temperature=batch.stage.temperature,
            teacher_temperature=settings.teacher_temperature,
        )
    rows = len(scores_BC)
    own, hard = (slice(0, rows), slice(rows, None))
    margin_B = teacher_BC[:, own].diagonal() - teacher_BC[:, hard].diagonal()
    return margin_mse(scores_BC, margin_B, known_BC[:, own].diagonal() & known_BC[:, hard].diagonal())


def _flops(batch: TripletsBatch) -> Tensor:
    """Return the penalty on each side that is penalised, ``(P,)``."""
    sides = (batch.queries_BV, batch.documents_CV) if batch.reads_documents else (batch.queries_BV,)
    # Only the first rank validates, so a validation must not wait for the others.
    found = [flops(side, term_cost_V=batch.term_cost_V, across_ranks=batch.is_trained_on) for side in sides]
    return torch.stack(found)


Row = LossComponent[TripletLossSettings, Step, TripletsBatch]
LOSSES = (
    Row("infonce", "InfoNCE", lambda settings, step: settings.infonce * step.stage.infonce, _info_nce),
    Row("self", "own terms", lambda settings, step: settings.self_terms, _own_terms),
    Row("positive", "terms of the positive", lambda settings, step: settings.positive_terms, _positive_terms),
    Row("margin", "triplet margin", lambda settings, step: settings.margin, _margin),
    Row("minimum", "minimum activation", lambda settings, step: settings.minimum_activation, _minimum),
    Row("distillation", "distillation", lambda settings, step: settings.distillation, _distillation, watched=False),
    Row("flops", "FLOPS", lambda settings, step: step.penalty, _flops),
)
"""The losses of the mode; a weight depends on the settings and on what holds at the step."""

FIRST = 1e-3
"""Where a penalty begins that is to be steered although its weight is 0."""
FLOOR = 0.01
"""Lowest weight of a steered penalty, as a share of the first: from further down it would not be back in time."""


class TripletsLoss(NamedLosses):
    """Weighted sum of `LOSSES`, with a controller for the penalty of each side; see `NamedLosses`."""

    rows = LOSSES
    watched: ClassVar[Mapping[str, str]] = {"effective_negatives": "effective negatives"}
    config: TripletsConfig

    def __init__(
        self, model: SpladeEncoder, config: TripletsConfig, *, position: Position, term_cost_V: Tensor | None = None
    ) -> None:
        super().__init__(model, config, position=position, term_cost_V=term_cost_V)
        self._weights_of: Callable[[Tensor], Tensor] = model.term_weights
        sparsity, first = config.sparsity, config.losses.flops or FIRST
        self.controllers = {
            side: SparsityController(
                target,
                weight=first if target else config.losses.flops,
                rate=sparsity.rate,
                bounds=(FLOOR * first, max(first, sparsity.highest)),
            )
            for side, target in (("query", sparsity.query_terms), ("document", sparsity.document_terms))
        }

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
                lambda maxima_NV: self.of_vectors(maxima_NV, self._weights_of(maxima_NV), labels),
                mini_batch=3 * self.config.training.per_device_train_batch_size,
            )
        output = self.model(texts)
        return self.of_vectors(output["signed_maxima"], output["sentence_embedding"], labels)

    def of_vectors(self, maxima_NV: Tensor, weights_NV: Tensor, labels: Mapping[str, Any]) -> dict[str, Tensor]:
        """Return the weighted losses of texts that are encoded already."""
        batch = TripletsBatch(self, maxima_NV, weights_NV, labels)
        penalty = {side: self.ramp * controller.weight for side, controller in self.controllers.items()}
        penalised = tuple(penalty.values()) if batch.reads_documents else (penalty["query"],)
        weighted = self.weighed(batch, Step(batch.stage, penalised))
        self.loss_components |= shares(weighted)
        self.loss_components["effective_negatives"] = effective_negatives(
            batch.scores_BC, batch.same_BC, temperature=batch.stage.temperature
        )
        self._note_sparsity(batch, penalty)
        return weighted

    @torch.no_grad()
    def _note_sparsity(self, batch: TripletsBatch, penalty: Mapping[str, float]) -> None:
        for side, weights in (("query", batch.queries_BV), ("document", batch.documents_CV)):
            active = (weights > 0).sum(dim=1)
            self.loss_components[f"active_{side}"] = active.float().mean()
            self.loss_components[f"flops_weight_{side}"] = active.new_tensor(penalty[side], dtype=torch.float32)
            if self.training:
                self.controllers[side].observe(active)


def stages_of(config: TripletsConfig) -> list[Stage]:
    """Return the curriculum as the sampler and the schedule take it."""
    return [Stage(share=stage.share, learning_rate=stage.learning_rate, mix=stage.mix) for stage in config.curriculum]

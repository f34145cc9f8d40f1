"""The named losses of mode ``triplets`` in the shape a sentence-transformers trainer takes.

Shape letters: B = triplets in the batch, C = candidates (B positives, B negatives), N = the 3 B texts of a batch
(queries, positives, negatives), V = terms in the vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from soju.sparse.controllers import SparsityController
from soju.sparse.curriculum import Stage, stage_at
from soju.sparse.sparsity import flops
from soju.sparse.splade_encoder import SpladeEncoder
from soju.sparse.triplets.config import StageSettings, TripletsConfig
from soju.sparse.triplets.triplet_losses import (
    info_nce,
    listwise_distillation,
    margin_mse,
    minimum_activation,
    similarities,
    term_activation,
    triplet_margin,
)
from soju.training.cached_gradients import cached_losses

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
                mini_batch=3 * self.config.training.batch_size,
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

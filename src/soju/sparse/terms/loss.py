"""The named losses of mode ``terms`` in the shape a sentence-transformers trainer takes.

Shape letters: B = texts in the batch, V = terms in the vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from soju.sparse.contrastive import in_batch_translation
from soju.sparse.divergence import in_batch_distillation
from soju.sparse.sparsity import flops
from soju.sparse.splade_encoder import SpladeEncoder
from soju.sparse.term_losses import signed_terms, v19_terms
from soju.sparse.terms.config import LossSettings


class TermsLoss(nn.Module):
    """Weighted sum of the term losses, the in-batch distillation and the sparsity penalty.

    Args:
        model: The student.
        settings: Weights and forms.
        term_cost_V: For the penalty; all terms alike when ``None``.
        progress: Returns the share of the training that is done, in [0, 1]; a pure function of the step.
    """

    term_cost_V: Tensor | None
    raw_terms: dict[str, Tensor]
    """Unweighted losses of the last batch, detached."""

    def __init__(
        self,
        model: SpladeEncoder,
        settings: LossSettings,
        *,
        term_cost_V: Tensor | None = None,
        progress: Callable[[], float] = lambda: 1.0,
    ) -> None:
        super().__init__()
        self.model = model
        self.settings = settings
        self.progress = progress
        self.register_buffer("term_cost_V", term_cost_V, persistent=False)
        self.raw_terms = {}

    def forward(self, features: Sequence[dict[str, Tensor]], labels: Mapping[str, Any]) -> dict[str, Tensor]:
        """Return the weighted losses by name; their sum is what is minimised."""
        settings = self.settings
        (texts,) = features
        output = self.model(texts)
        weights_BV, maxima_BV = output["sentence_embedding"], output["signed_maxima"]
        targets = labels["targets"].to(weights_BV.device)
        values_BV, form = (weights_BV, v19_terms) if settings.terms == "v19" else (maxima_BV, signed_terms)
        terms = form(
            values_BV, targets, margin=settings.target_margin, english_margin_factor=settings.english_margin_factor
        )
        raw = terms.named()
        weights = {
            "self": settings.self_terms,
            "korean": settings.korean_terms,
            "english": settings.english_terms,
            "margin": settings.margin,
        }
        if settings.distillation > 0 and len(labels["taught"]):
            raw["distillation"] = in_batch_distillation(
                weights_BV[labels["taught"]],
                labels["teacher"],
                temperature=settings.temperature,
                with_self=settings.with_self,
            )
            weights["distillation"] = settings.distillation
        if settings.translation > 0:
            raw["translation"] = in_batch_translation(
                weights_BV, labels["partner"].to(weights_BV.device), temperature=settings.temperature
            )
            weights["translation"] = settings.translation
        raw["flops"] = flops(weights_BV, term_cost_V=self.term_cost_V, across_ranks=True)
        weights["flops"] = settings.flops if self.progress() >= settings.flops_from else 0.0
        self.raw_terms = {name: value.detach() for name, value in raw.items()}
        self.raw_terms["active_terms"] = (weights_BV.detach() > 0).sum(dim=1, dtype=torch.float32).mean()
        return {name: weights[name] * value for name, value in raw.items() if weights[name] > 0}

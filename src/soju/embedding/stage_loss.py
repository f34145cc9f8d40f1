"""What the stages minimise, in the shape a sentence-transformers trainer takes.

Shape letters: B = texts in the batch, O = old tokens of the longest, T = new tokens of the longest, D = dimensions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from soju.core.errors import UserError
from soju.embedding.config import SupervisedSettings, UnsupervisedSettings
from soju.embedding.losses import (
    L2ToStart,
    anchor,
    cosent,
    cosine_score,
    cosines,
    entailment_contrast,
    gathered,
    passes_are_equal,
    pooled_distillation,
    simcse,
    state_distillation,
)
from soju.training.cached_gradients import cached_losses
from soju.training.ranks import from_all
from soju.training.state import seeded

Features = Mapping[str, Tensor]
Weighted = dict[str, tuple[float, Tensor]]
"""Weight and unweighted loss by name."""


class NamedTerms(nn.Module):
    """Base of the losses: notes unweighted terms, adds the distance to the start where one is asked for.

    Args:
        model: The student.
        l2_sp_weight: Strength of the penalty on the distance to the start.
        moving: What is trained, by name.
    """

    raw_terms: dict[str, Tensor]
    """Of the last batch, detached and unweighted."""

    def __init__(
        self, model: Any, *, l2_sp_weight: float = 0.0, moving: Mapping[str, nn.Parameter] | None = None
    ) -> None:
        super().__init__()
        self.model = model
        self._l2_sp_weight = l2_sp_weight
        self._to_start = L2ToStart(moving.items(), strength=1.0) if moving and l2_sp_weight else None
        self.raw_terms = {}

    def finish(self, terms: Weighted) -> dict[str, Tensor]:
        """Return the weighted losses; their sum is what is minimised."""
        if self._to_start is not None:
            terms = {**terms, "start": (self._l2_sp_weight, self._to_start())}
        self.raw_terms = {name: value.detach() for name, (_, value) in terms.items()}
        return {name: weight * value for name, (weight, value) in terms.items() if weight > 0}


class SimCseLoss(NamedTerms):
    """Two passes under dropout find each other among all texts of the batch; Korean sides are anchored to English ones.

    Args:
        model: The student.
        settings: Of the stage.
        **more: See `NamedTerms`.
    """

    def __init__(self, model: Any, settings: UnsupervisedSettings, **more: Any) -> None:
        super().__init__(model, **more)
        self._settings = settings

    def forward(self, features: Sequence[Features], labels: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the weighted losses by name."""
        (texts,) = features
        both = {name: torch.cat([texts[name], texts[name]]) for name in ("input_ids", "attention_mask")}
        if self._settings.mini_batch_size is None or not torch.is_grad_enabled():
            return self._losses(self.model(both)["sentence_embedding"], labels)
        return cached_losses(
            lambda part: self.model(part)["sentence_embedding"],
            both,
            lambda vectors: self._losses(vectors, labels),
            mini_batch=self._settings.mini_batch_size,
        )

    def _losses(self, vectors: Tensor, labels: Mapping[str, Tensor]) -> dict[str, Tensor]:
        first_BD, second_BD = vectors.chunk(2)
        each = []
        for width in (*self._settings.matryoshka, vectors.shape[1]):
            candidates_ND, rank = gathered(second_BD[:, :width])
            each.append(
                simcse(
                    first_BD[:, :width],
                    second_BD[:, :width],
                    temperature=self._settings.temperature,
                    negatives_ND=candidates_ND,
                    rank=rank,
                )
            )
        terms: Weighted = {"simcse": (1.0, torch.stack(each).mean())}
        return self.finish(terms | anchored(first_BD, labels, self._settings.anchor_weight))


class SelfDistillationLoss(NamedTerms):
    """The model under its new tokens learns what the untouched model makes of the old ones.

    Args:
        model: The student.
        teach: The untouched model: features to token states ``(B, O, D)`` and text vectors ``(B, D)``.
        settings: Of the stage.
        **more: See `NamedTerms`.
    """

    def __init__(
        self,
        model: Any,
        teach: Callable[[dict[str, Tensor]], tuple[Tensor, Tensor]],
        settings: UnsupervisedSettings,
        **more: Any,
    ) -> None:
        super().__init__(model, **more)
        self._teach = teach
        self._settings = settings

    def forward(self, features: Sequence[Features], labels: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the weighted losses by name."""
        (texts,) = features
        with torch.no_grad():
            taught_BOD, taught_BD = self._teach(
                {name: labels[f"old_{name}"] for name in ("input_ids", "attention_mask")}
            )
        output = self.model(dict(texts))
        pooled_BD = output["sentence_embedding"]
        widths = (*self._settings.matryoshka, pooled_BD.shape[1])
        pooled = [pooled_distillation(pooled_BD[:, :width], taught_BD[:, :width]) for width in widths]
        terms: Weighted = {
            "hidden": (
                self._settings.hidden_weight,
                state_distillation(output["token_embeddings"], taught_BOD, labels["last_old_BT"]),
            ),
            "pooled": (self._settings.pooled_weight, torch.stack(pooled).mean()),
        }
        return self.finish(terms | anchored(pooled_BD, labels, self._settings.anchor_weight))


class TargetLoss(NamedTerms):
    """Vectors of texts are pulled to given ones: how a base from scratch learns from a teacher.

    Args:
        model: The student, of width D.
        project_DT: What turns the teacher's vectors into such of width D; none when they have it.
    """

    project_DT: Tensor | None

    def __init__(self, model: Any, project_DT: Tensor | None) -> None:
        super().__init__(model)
        self.register_buffer("project_DT", project_DT, persistent=False)

    def forward(self, features: Sequence[Features], labels: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the loss by name."""
        (texts,) = features
        vectors_BD = self.model(dict(texts))["sentence_embedding"]
        target_BD = labels["target"] if self.project_DT is None else labels["target"] @ self.project_DT.T
        return self.finish({"target": (1.0, pooled_distillation(vectors_BD, target_BD))})


class PairLoss(NamedTerms):
    """Labelled pairs; see `soju.embedding.losses`.

    Args:
        model: The student.
        kind: What the labels are, and what is made of them.
        temperature: Divides cosines.
        **more: See `NamedTerms`.
    """

    def __init__(
        self, model: Any, kind: Literal["cosent", "cosine", "inference"], temperature: float, **more: Any
    ) -> None:
        super().__init__(model, **more)
        self._kind = kind
        self._temperature = temperature

    @classmethod
    def of(cls, model: Any, settings: SupervisedSettings, **more: Any) -> PairLoss:
        """Make the loss that the settings ask for."""
        return cls(model, "inference" if settings.inference else settings.loss, settings.temperature, **more)

    def forward(self, features: Sequence[Features], labels: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the weighted losses by name."""
        (texts,) = features
        first_BD, second_BD = self.model(dict(texts))["sentence_embedding"].chunk(2)
        score_B = labels["score"]
        if self._kind == "inference":
            value = entailment_contrast(first_BD, second_BD, score_B > 0, temperature=self._temperature)
        elif self._kind == "cosent":
            value = cosent(cosines(first_BD, second_BD), score_B, temperature=self._temperature)
        else:
            value = cosine_score(cosines(first_BD, second_BD), score_B)
        return self.finish({self._kind: (1.0, value)})


def anchored(vectors_BD: Tensor, labels: Mapping[str, Tensor], weight: float) -> Weighted:
    """Pull the texts that have a target to it; 0 when no text of the batch has one."""
    if not weight or "target" not in labels:
        return {}
    has_B = labels["has_target"]
    if not bool(has_B.any()):
        return {"anchor": (weight, vectors_BD.sum() * 0.0)}
    return {"anchor": (weight, anchor(vectors_BD[has_B], labels["target"][has_B]))}


def refuse_mini_batch_on_several(settings: UnsupervisedSettings, place: str) -> None:
    """Refuse cached gradients on several processes, whose averaging would happen once a mini-batch (`UserError`)."""
    if settings.mini_batch_size is not None and len(from_all(0)) > 1:
        raise UserError(
            f"{place}.mini_batch_size: works on one process; leave it out, or lower per_device_train_batch_size"
        )


def refuse_equal_passes(model: Any, features: Features, *, setting: str) -> None:
    """Refuse SimCSE on a model whose two passes of a batch are equal: only the repulsion of other texts would be left.

    Args:
        model: The student, dropout set.
        features: One batch.
        setting: What to change, in the message.

    Raises:
        UserError: If the passes are equal.
    """
    training = model.training
    model.train()
    device = next(model.parameters()).device
    both = {name: torch.cat([value, value]).to(device) for name, value in features.items()}
    with torch.no_grad(), seeded(0):
        first_BD, second_BD = model(both)["sentence_embedding"].chunk(2)
    model.train(training)
    if passes_are_equal(first_BD, second_BD):
        raise UserError(
            f"{setting}: two passes of a batch come out equal, so SimCSE has nothing to learn from; raise the dropout, "
            "or take objective self_distillation"
        )

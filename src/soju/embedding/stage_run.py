"""One training stage: what moves, what it learns from, what is minimised, how its model is loaded and saved."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from sentence_transformers import SentenceTransformer

from soju.core.errors import UserError
from soju.data.spreading import spread
from soju.embedding.adapter_modules import MARK, AdaptedTransformer, AdapterSettings, Kind
from soju.embedding.adapters import adapter_parameters_by_layer, add_adapters, load_adapted, save_adapted
from soju.embedding.anchors import CACHE, anchored_rows
from soju.embedding.config import (
    EmbeddingConfig,
    OptimiserSettings,
    Stage1Settings,
    Stage2Settings,
    Stage3Settings,
    StageAdapterSettings,
    SupervisedSettings,
    UnsupervisedSettings,
)
from soju.embedding.expansion.vocabulary_expansion import EXPANSION_FILE, Expansion
from soju.embedding.lora import add_lora
from soju.embedding.partitioned_embedding import partition_embedding
from soju.embedding.reading import EmbeddingData
from soju.embedding.retention import CHOSEN_BY, RetentionGuard
from soju.embedding.scratch_base import load_float32
from soju.embedding.stage_loss import (
    NamedTerms,
    PairLoss,
    SelfDistillationLoss,
    SimCseLoss,
    refuse_equal_passes,
    refuse_mini_batch_on_several,
)
from soju.embedding.stage_trainer import StageTrainer, refuse_few_rows, stage_arguments
from soju.embedding.trainable import (
    Group,
    block_group,
    embedding_group,
    freeze,
    gradual,
    layers_of,
    set_dropout,
    tensors_of,
    transformer_of,
)
from soju.embedding.training_rows import LabelledPairs, PairCollator, TextCollator, TextRows, encoder_of
from soju.training.rollback import Attempt


@dataclass(frozen=True)
class StageRun:
    """One stage with everything it needs."""

    name: str
    settings: OptimiserSettings
    config: EmbeddingConfig
    data: EmbeddingData
    start: Path
    """The accepted model that it starts from."""
    base: Path
    """The untouched model."""
    run_folder: Path

    @property
    def folder(self) -> Path:
        """Where checkpoints, history and verdicts of the stage lie."""
        return self.run_folder / "training" / self.name

    @property
    def result(self) -> Path:
        """Where the accepted model lies."""
        return self.run_folder / self.name

    @cached_property
    def expansion(self) -> Expansion | None:
        """What stage 0 added; none for a model that was not expanded."""
        return Expansion.load(self.start) if (self.start / EXPANSION_FILE).is_file() else None

    # What moves.

    def prepared(self) -> tuple[SentenceTransformer, list[Group]]:
        """Return a fresh copy of the start, and what the stage trains of it.

        Returns:
            Model and groups of parameters.

        Raises:
            UserError: If the model lacks what is to be trained.
        """
        model = load_stage(self.start)
        freeze(model)
        groups = self._groups(model)
        return model, groups

    def _groups(self, model: SentenceTransformer) -> list[Group]:
        settings = self.settings
        if isinstance(settings, Stage1Settings):
            if settings.train_rows == "all":
                return [embedding_group(model)]
            if self.expansion is None:
                raise UserError(
                    f"{self.start}: no {EXPANSION_FILE}, so there are no new rows to train; run stage 0 first, or set "
                    "stage1.train_rows to all"
                )
            rows = partition_embedding(transformer_of(model), self.expansion.first_id)
            name = next(name for name, value in model.named_parameters() if value is rows.tail)
            return [Group("new rows", {name: rows.tail})]
        if isinstance(settings, Stage2Settings):
            if settings.adapters.kind == "lora":
                return gradual(self._lora(model, settings.adapters), settings.unfreeze_over)
            if not has_adapters(model):
                self._add_adapters(model, settings.adapters, settings.adapters.kind)
            return gradual(_adapters_of(model), settings.unfreeze_over)
        if isinstance(settings, SupervisedSettings) and settings.trains == "adapters":
            if not has_adapters(model):
                raise UserError(
                    f"supervised.trains adapters: {self.start} has none of its own; take a kind that is not folded "
                    "(bottleneck, gated) in stage2.adapters, or train blocks"
                )
            return gradual(_adapters_of(model), 0)
        assert isinstance(settings, Stage3Settings | SupervisedSettings)
        return [block_group(model, settings.blocks)]

    def _add_adapters(self, model: SentenceTransformer, ours: StageAdapterSettings, kind: Kind) -> None:
        layers = _adapted_layers(model, ours.top_layers)
        wanted = AdapterSettings(kind=kind, hidden=ours.hidden, dropout=ours.dropout, layers=layers)
        add_adapters(model, wanted, seed=self.config.seed)

    def _lora(self, model: SentenceTransformer, ours: StageAdapterSettings) -> dict[int, dict[str, torch.nn.Parameter]]:
        layers, seed = _adapted_layers(model, ours.top_layers), self.config.seed
        updates = add_lora(transformer_of(model), rank=ours.hidden, dropout=ours.dropout, layers=layers, seed=seed)
        moving = {id(update) for update in updates}
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        by_layer = {
            number: {names[id(value)]: value for value in layer.parameters() if id(value) in moving}
            for number, layer in enumerate(layers_of(model))
        }
        return {number: found for number, found in by_layer.items() if found}

    # What it learns from, and what is minimised.

    @cached_property
    def rows(self) -> TextRows | LabelledPairs:
        """What the stage learns from."""
        if isinstance(self.settings, SupervisedSettings):
            firsts, seconds, labels = zip(*self.data.labelled, strict=True) if self.data.labelled else ((), (), ())
            return LabelledPairs(firsts, seconds, labels)
        assert isinstance(self.settings, UnsupervisedSettings)
        texts = self.data.stage_texts[int(self.name.removeprefix("stage"))]
        return anchored_rows(
            texts,
            spread(self.data.pairs, self.settings.max_anchors or len(self.data.pairs)),
            self.base,
            weight=self.settings.anchor_weight,
            cache=self.run_folder / "training" / CACHE,
        )

    def loss(self, model: SentenceTransformer, groups: list[Group]) -> NamedTerms:
        """Return what is minimised."""
        settings = self.settings
        more: dict[str, Any] = {
            "start_weight": getattr(settings, "start_weight", 0.0),
            "moving": tensors_of(groups),
        }
        if isinstance(settings, SupervisedSettings):
            return PairLoss.of(model, settings, **more)
        assert isinstance(settings, UnsupervisedSettings)
        if settings.objective == "simcse":
            return SimCseLoss(model, settings, **more)
        teacher = load_float32(self.base).to(model.device).eval().requires_grad_(False)

        def teach(features: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
            output = teacher(features)
            return output["token_embeddings"], output["sentence_embedding"]

        return SelfDistillationLoss(model, teach, settings, **more)

    def collator(self, model: SentenceTransformer) -> Any:
        """Return what makes batches."""
        encode = encoder_of(model, max_length=self.settings.max_length)
        pad: dict[str, Any] = {
            "pad_id": model.tokenizer.pad_token_id,
            "left": model.tokenizer.padding_side == "left",
        }
        if isinstance(self.rows, LabelledPairs):
            return PairCollator(self.rows, encode, **pad)
        distils = isinstance(self.settings, UnsupervisedSettings) and self.settings.objective == "self_distillation"
        return TextCollator(self.rows, encode, **pad, decompositions=self._old_ids if distils else None)

    def _old_ids(self, token: int) -> list[int]:
        return [token] if self.expansion is None else self.expansion.collapse([token])

    def trainer(self, attempt: Attempt, guard: RetentionGuard | None) -> StageTrainer:
        """Put model, rows, loss and arguments into a trainer."""
        model, groups = self.prepared()
        collator = self.collator(model)
        if isinstance(self.settings, UnsupervisedSettings):
            set_dropout(model, self.settings.dropout if self.settings.objective == "simcse" else 0.0)
            refuse_mini_batch_on_several(self.settings, self.name)
            if self.settings.objective == "simcse":
                batch = collator([{"row": row} for row in range(min(2, len(self.rows)))])
                features = {name: batch[f"text_{name}"] for name in ("input_ids", "attention_mask")}
                refuse_equal_passes(model, features, setting=f"{self.name}.dropout")
        refuse_few_rows(len(self.rows), self.settings, place=self.name, ranks=PartialState().num_processes)
        return StageTrainer(
            groups=groups,
            warm_up=self.settings.warm_up,
            model=model,
            args=stage_arguments(
                self.settings,
                self.folder,
                self.rows.lengths,
                seed=self.config.seed,
                data_order=attempt.data_order,
                chosen_by=CHOSEN_BY if guard else None,
            ),
            train_dataset=self.rows.dataset(),
            loss=self.loss(model, groups),
            evaluator=guard,
            data_collator=collator,
            history=self.folder / "history.jsonl",
            learning_rate_scale=attempt.learning_rate_scale,
        )


def load_stage(folder: Path) -> SentenceTransformer:
    """Load the model of a stage in float32, adapters included, running no code from its folder."""
    return load_adapted(folder, model_kwargs={"dtype": "float32"}, local_files_only=True)


def save_stage(model: SentenceTransformer, folder: Path) -> None:
    """Save a model so that stock sentence-transformers loads it; with adapters, as `save_adapted` explains in it."""
    if has_adapters(model):
        save_adapted(model, folder)
    else:
        model.save(str(folder), create_model_card=False)


def has_adapters(model: SentenceTransformer) -> bool:
    """Tell whether a model has adapters beside its own weights."""
    return isinstance(model[0], AdaptedTransformer)


def adapter_kind(model: SentenceTransformer) -> str:
    """Return the kind of a model's adapters."""
    kind: str = model[0].adapter_settings.kind
    return kind


def _adapted_layers(model: SentenceTransformer, top: int | None) -> tuple[int, ...] | None:
    """Return the numbers of the layers from the top that get adapters, ``None`` for all."""
    count = len(layers_of(model))
    if top is not None and top > count:
        raise UserError(f"stage2.adapters.top_layers: {top} of {count} layers; give at most {count}")
    return None if top is None else tuple(range(count - top, count))


def _adapters_of(model: SentenceTransformer) -> dict[int, dict[str, torch.nn.Parameter]]:
    names = {id(value): name for name, value in model.named_parameters() if MARK in name}
    return {
        layer: {names[id(parameter)]: parameter for parameter in parameters}
        for layer, parameters in adapter_parameters_by_layer(model).items()
    }

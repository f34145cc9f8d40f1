"""Settings that the modes with a neural student share: the student, its teacher, the training."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, field_validator, model_validator

from soju.core.config import Settings
from soju.sparse.config import (
    AlignmentSettings,
    CardSettings,
    DataSettings,
    EvaluationSettings,
    ExpansionSettings,
    SearchSettings,
    TokenizerSettings,
)


class StaticSettings(Settings):
    """The static encoder trained first; a student from scratch gets its tokenizer, with ``lexical`` its table too."""

    tokenizer: TokenizerSettings = TokenizerSettings()
    alignment: AlignmentSettings = AlignmentSettings()
    expansion: ExpansionSettings = ExpansionSettings()
    search: SearchSettings = SearchSettings()


class PretrainedStudent(Settings):
    """Start from a masked language model."""

    init: Literal["pretrained"]
    model: str
    """Folder or hub id of any ``*ForMaskedLM`` checkpoint, or a run of ours to go on from (its best model)."""
    dropout: float | None = Field(default=None, ge=0, lt=1)
    """Dropout of layers and attention in training; the checkpoint's own when not given."""
    max_length: int = Field(default=64, ge=4)
    """Tokens after which a text is cut."""


class WarmUpSettings(Settings):
    """Masked-language-model warm-up of a student from scratch, on the training texts."""

    steps: int = Field(default=500, ge=1)
    """Optimiser steps."""
    learning_rate: float = Field(default=5e-4, gt=0)
    """Peak of a linear schedule."""
    masked: float = Field(default=0.3, gt=0, lt=1)
    """Share of the pieces that are masked."""


class ScratchStudent(Settings):
    """Start without any pretrained model: a small ModernBERT over the static encoder's vocabulary."""

    init: Literal["lexical", "random"]
    """``lexical`` starts as the static encoder, its table factorised into embeddings and head, and its layers adding
    nothing yet; ``random`` starts from noise."""
    hidden_size: int = Field(default=384, ge=32, multiple_of=32)
    """Width of embeddings and layers; with ``lexical`` also what the table must fit into: a wider one keeps more."""
    layers: int = Field(default=2, ge=1)
    """Transformer layers."""
    heads: int = Field(default=6, ge=1)
    """Attention heads; they divide `hidden_size`."""
    intermediate_size: int = Field(default=768, ge=32)
    """Width of the feed-forward layers."""
    max_length: int = Field(default=64, ge=4)
    """Pieces after which a text is cut, the start piece included."""
    translation_share: float = Field(default=0.7, gt=0, le=1)
    """Share of the static encoder's translation weights that ``lexical`` starts with: queries and documents both
    expand, so that full weights would count translations twice."""
    warm_up: WarmUpSettings | None = None
    """Masked-language-model training before anything else, meant for ``random``; none when not given."""
    static_model: str | None = None
    """A static encoder to start from: a model or run folder, or ko-en-static; one is trained first when not given."""
    static: StaticSettings = StaticSettings()
    """How it is trained, and how its documents are weighted."""

    @model_validator(mode="after")
    def _heads_fit(self) -> Self:
        if self.hidden_size % self.heads or (self.hidden_size // self.heads) % 2:
            raise ValueError(f"hidden_size {self.hidden_size} / heads {self.heads} must be an even number")
        return self


StudentSettings = Annotated[PretrainedStudent | ScratchStudent, Field(discriminator="init")]


class TeacherSettings(Settings):
    """The dense teacher of the in-batch distillation; give either a model or vectors."""

    model: str | None = None
    """Folder, hub id or ``package:NAME`` of a sentence-transformers model."""
    revision: str | None = None
    """Branch, tag or commit of a hub id; a model without safetensors on its main branch may have them elsewhere."""
    vectors: Path | None = None
    """Precomputed vectors, see `docs/data_formats.md`."""
    text: Literal["source", "translation"] = "source"
    """What it reads: the text itself (a multilingual teacher), or its English side (an English-only teacher)."""
    max_length: int | None = Field(default=None, ge=4)
    """Tokens a text is cut to; the model's own limit when not given."""
    prompt: str | None = None
    """Put before every text, for example ``"query: "`` for the e5 family."""
    batch_size: int = Field(default=64, ge=1)
    """Texts embedded at a time."""
    cache: Path = Path("runs/teacher-vectors")
    """Folder that keeps vectors by the content of model and text; runs may share it."""

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if (self.model is None) == (self.vectors is None):
            raise ValueError("give either model or vectors")
        return self


class TrainingSettings(Settings):
    """The optimiser, its schedule and what is kept. The defaults are the published ones."""

    batch_size: int = Field(default=64, ge=1)
    """Rows of a micro-batch on each process; with `both_directions` a row can have two texts."""
    accumulation: int = Field(default=2, ge=1)
    """Micro-batches that make an optimiser step; the in-batch losses, distillation and FLOPS, see one at a time."""
    epochs: float = Field(default=15, gt=0)
    """Passes over the rows."""
    max_steps: int | None = Field(default=None, ge=1)
    """Optimiser steps; overrides `epochs`."""
    learning_rate: float = Field(default=3e-6, gt=0)
    """Peak of the linear schedule."""
    layers_learning_rate: float | None = Field(default=None, gt=0)
    """Peak for the transformer layers alone, which with ``lexical`` add nothing at first while the table is finished;
    `learning_rate` when not given."""
    weight_decay: float = Field(default=0.01, ge=0)
    """Of AdamW."""
    warm_up: float = Field(default=0.1, ge=0, lt=1)
    """Share of the steps in which the learning rate rises."""
    max_gradient_norm: float = Field(default=1.0, gt=0)
    """Gradients are clipped to it."""
    mixed_precision: Literal["fp16", "bf16", "off"] = "fp16"
    """``fp16``, the published one, needs a GPU. Write ``"off"``, float32, in quotes: a bare off is false in YAML."""
    gradient_checkpointing: bool = False
    """Compute the layers' activations twice to save memory."""
    validate_every: int | None = Field(default=None, ge=1)
    """Optimiser steps between validations, each of which writes a checkpoint; every epoch when not given."""
    log_every: int = Field(default=25, ge=1)
    """Optimiser steps between rows of the history."""
    keep_checkpoints: int = Field(default=2, ge=1)
    """Last checkpoints to keep; the best one is kept too."""
    max_drop: float = Field(default=0.1, gt=0)
    """Largest fall of the validation score below the best so far, as a fraction of it; the run rolls back beyond it."""
    max_rollbacks: int = Field(default=2, ge=0)
    """How often the run may go back after a regression or after numbers that are not finite, before it gives up."""

    @field_validator("mixed_precision", mode="before")
    @classmethod
    def _off_is_a_word(cls, value: object) -> object:
        return "off" if value is False else value  # YAML reads a bare off as false


class NeuralConfig(Settings):
    """What every mode with a neural student sets."""

    recipe: Literal["splade"]
    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")
    """Name of the run and of the model."""
    seed: int = Field(default=13, ge=0)
    """Seed of everything that is drawn."""
    data: DataSettings
    student: StudentSettings
    teacher: TeacherSettings | None = None
    similarity: Literal["dot", "cosine"] = "dot"
    """How vectors are compared: ``cosine`` divides document vectors by their length in the index, so that long texts
    gain nothing from their length."""
    training: TrainingSettings = TrainingSettings()
    evaluation: EvaluationSettings = EvaluationSettings()
    card: CardSettings = CardSettings()

    @model_validator(mode="after")
    def _table_has_data(self) -> Self:
        trains_table = isinstance(self.student, ScratchStudent) and self.student.static_model is None
        if trains_table and not (self.data.pairs or self.data.passages):
            raise ValueError(
                "a student from scratch needs data.pairs or data.passages for its tokenizer and table, or a "
                "student.static_model that has both"
            )
        return self

"""Settings of recipe ``translation``. The defaults are those of preset ``translation-cvm``.

`DistillationConfig` also takes the published flat names (``num_iterations``, ``quality_threshold`` …), which stand for
settings of the sections; `FLAT` says for which.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, ValidationError, model_validator
from transformers import M2M100Config

from soju.core.config import Settings, explain, read_config, validate
from soju.core.errors import ConfigError
from soju.evaluation.translation import QualityWeights
from soju.training.settings import TrainingSettings
from soju.translation.data import DataSettings
from soju.translation.degradation import DegradationSettings
from soju.translation.loss import LossSettings
from soju.translation.shrink import StudentShape
from soju.translation.vocabulary import BOS, EOS, PAD

FLAT: Mapping[str, str] = {
    "num_iterations": "training.max_steps",
    "validation_frequency": "training.eval_steps",
    "quality_threshold": "gate.retention",
    "temperature": "loss.temperature",
    "alpha": "loss.alpha",
    "beta": "loss.beta",
    "batch_size": "training.per_device_train_batch_size",
    "learning_rate": "training.learning_rate",
    "warmup_steps": "training.warmup_steps",
    "gradient_accumulation_steps": "training.gradient_accumulation_steps",
    "max_grad_norm": "training.max_grad_norm",
    "mixed_precision": "training.mixed_precision",
    "max_quality_drop": "degradation.max_drop",
    "teacher_model_path": "teacher.path",
    "train_files": "data.files",
    "vocab_size": "vocabulary_size",
}
"""Published flat names and the settings they stand for."""


class ClockedTraining(TrainingSettings):
    """Training for an exact number of optimiser steps, validated at equal distances."""

    max_steps: int = Field(default=10_000, ge=1)
    """Optimiser steps, undone ones included."""
    per_device_train_batch_size: int = Field(default=32, ge=1)
    """Pairs of a batch."""
    learning_rate: float = Field(default=5e-5, gt=0)
    """The highest; it falls linearly to 0."""
    warmup_steps: float = Field(default=1_000, ge=0)
    """Steps in which it rises; a number below 1 is a share of the run."""
    eval_steps: int = Field(default=1_000, ge=1)
    """Steps between validations; it divides `max_steps`."""
    logging_steps: int = Field(default=100, ge=1)
    """Steps between lines of ``history.jsonl``; it divides `eval_steps`, so that no line spans a rollback."""
    mixed_precision: Literal["auto", "fp16", "bf16", "off"] = "auto"  # type: ignore[assignment]
    """Autocast type. ``auto``: bf16 on CUDA or a CPU that has it (AVX512-BF16, AMX), else off."""

    @model_validator(mode="after")
    def _adds_up(self) -> Self:
        if self.max_steps % self.eval_steps:
            raise ValueError(
                f"eval_steps {self.eval_steps:,} does not divide max_steps {self.max_steps:,}; the last step is "
                "validated too, so give a divisor"
            )
        if self.eval_steps % self.logging_steps:
            raise ValueError(f"logging_steps {self.logging_steps} does not divide eval_steps {self.eval_steps:,}")
        return self


class TeacherTraining(ClockedTraining):
    """How a teacher is trained from scratch."""

    learning_rate: float = Field(default=1e-3, gt=0)
    """The highest; it falls linearly to 0."""
    label_smoothing: float = Field(0.1, ge=0, lt=1)
    """Share of the reference's probability that is spread over the vocabulary."""


class TeacherSettings(Settings):
    """What the student learns from: a model that is there, or one that the run trains first."""

    path: Path | None = None
    """Folder of an M2M100 model and the ``tokenizer.json`` that it was trained with."""
    shape: StudentShape | None = None
    """Sizes of a teacher to train from scratch, instead of `path`."""
    dropout: float = Field(0.1, ge=0, lt=1)
    """Of a teacher trained from scratch."""
    training: TeacherTraining = TeacherTraining()
    """Of a teacher trained from scratch."""

    @model_validator(mode="after")
    def _one_of_two(self) -> Self:
        if self.path is not None and self.shape is not None:
            raise ValueError("path and shape are both given; keep the one that is meant")
        return self


class StudentSettings(Settings):
    """The model that is kept."""

    shape: StudentShape = StudentShape()
    init: Literal["shrunk", "truncated", "random"] = "shrunk"
    """Where its weights start; the last two are controls."""
    init_pairs: int = Field(512, ge=1)
    """Training pairs whose activations decide what of the teacher is kept."""
    dropout: float = Field(0.1, ge=0, lt=1)


class ValidationConfig(Settings):
    """How translations are validated while training, and what the gate reads at the end."""

    pairs: int = Field(500, ge=2)
    """Validation pairs of a direction, spread over all."""
    test_pairs: int = Field(2_000, ge=2)
    """Test pairs of a direction at most."""
    weights: QualityWeights = QualityWeights()
    korean_tokens: Literal["auto", "ko-mecab", "kiwi"] = "auto"
    """Analyser whose tokens BLEU, TER and ROUGE read."""
    decoder: Literal["auto", "ctranslate2", "generate"] = "auto"
    """What translates, greedily: ``auto`` takes CTranslate2 where it is installed."""
    max_length: int = Field(128, ge=4)
    """Longest translation in ids; training pairs with a longer side are left out."""
    draws: int = Field(1_000, ge=100)
    """Paired bootstrap draws."""
    batch_size: int = Field(64, ge=1)


class GateSettings(Settings):
    """What the student must keep."""

    retention: float = Field(0.90, gt=0, le=1)
    """Share of the teacher's quality above chance that the lower bound of the student's must reach."""
    teacher_margin: float = Field(0.10, ge=0)
    """Quality above chance that the lower bound of the teacher's must reach, or retention means nothing."""
    allow_weak_teacher: bool = False
    """Go on with a weaker teacher; every verdict then says that it is not meaningful."""
    domain_pairs: int = Field(100, ge=2)
    """Test pairs from which a domain is judged for itself."""


class DistillationConfig(Settings):
    """Everything a run does."""

    recipe: Literal["translation"] = "translation"
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]+$")] = "translation-cvm"
    seed: int = Field(13, ge=0)
    task: Literal["distil", "teacher"] = "distil"
    """``teacher`` trains a teacher alone and leaves it in ``best/``."""
    data: DataSettings = DataSettings()
    vocabulary_size: int = Field(32_000, ge=100)
    """Ids; read when a teacher is trained from scratch, else the teacher's vocabulary is used."""
    teacher: TeacherSettings = TeacherSettings()
    student: StudentSettings = StudentSettings()
    loss: LossSettings = LossSettings()
    training: ClockedTraining = ClockedTraining()
    validation: ValidationConfig = ValidationConfig()
    degradation: DegradationSettings = DegradationSettings()
    gate: GateSettings = GateSettings()

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            # Without a place: where there is one, a file or a preset, `validate` puts it before.
            lines = [explain("", item, type(self)).removeprefix(": ") for item in error.errors()]
            raise ConfigError("\n".join(lines)) from None

    @model_validator(mode="before")
    @classmethod
    def _flat_names(cls, values: Any) -> Any:
        if not isinstance(values, Mapping):
            return values
        result = {name: value for name, value in values.items() if name not in FLAT}
        for name in values.keys() - set(cls.model_fields) - FLAT.keys():
            close = difflib.get_close_matches(name, [*FLAT, *cls.model_fields], n=1)
            remedy = f'did you mean "{close[0]}"?' if close else f"known: {', '.join([*cls.model_fields, *FLAT])}"
            raise ValueError(f"{name}: unknown setting; {remedy}")
        for name in FLAT.keys() & values.keys():
            section, _, setting = FLAT[name].rpartition(".")
            if not section:
                result[setting] = values[name]
                continue
            given = result.get(section, {})
            given = given.model_dump() if isinstance(given, Settings) else dict(given)
            if setting in given:
                raise ValueError(f"{name} and {FLAT[name]} are the same setting; give one of them")
            result[section] = {**given, setting: [values[name]] if name == "train_files" else values[name]}
        return result

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if self.loss.hidden_weight:
            raise ValueError("loss.hidden_weight: its projection is not trained by this recipe; leave it at 0")
        if self.task == "teacher" and self.teacher.shape is None:
            raise ValueError("task teacher needs teacher.shape, the sizes of the model to train")
        return self

    @classmethod
    def from_preset(cls, name: str, **changes: Any) -> DistillationConfig:
        """Return the settings of a preset, with flat names or sections changed; `ConfigError` lists what is wrong."""
        values, _ = read_config(name)
        for flat in FLAT.keys() & changes.keys():
            *sections, setting = FLAT[flat].split(".")
            target = values
            for section in sections:
                target = target.setdefault(section, {})
            target.pop(setting, None)
        return validate({**values, **changes}, cls, place=name)


def model_config(shape: StudentShape, vocabulary: int, *, dropout: float, max_length: int) -> M2M100Config:
    """Return the configuration of an M2M100 of our family: both layer-drops 0, tied embeddings, our ids."""
    sides = {
        f"{side}_{name}": getattr(shape, name)
        for side in ("encoder", "decoder")
        for name in ("layers", "attention_heads", "ffn_dim")
    }
    return M2M100Config(
        vocab_size=vocabulary,
        d_model=shape.d_model,
        num_hidden_layers=shape.layers,
        **sides,
        dropout=dropout,
        attention_dropout=0.0,
        activation_dropout=0.0,
        encoder_layerdrop=0.0,
        decoder_layerdrop=0.0,
        max_position_embeddings=max(2 * max_length, 64),
        scale_embedding=True,
        tie_word_embeddings=True,
        bos_token_id=BOS,
        pad_token_id=PAD,
        eos_token_id=EOS,
        decoder_start_token_id=EOS,
    )

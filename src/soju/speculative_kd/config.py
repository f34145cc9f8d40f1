"""Settings of recipe ``speculative_kd``: rollout, divergence, their schedules, data and training. Loads no torch."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from soju.core.config import Settings
from soju.training.settings import TrainingSettings

Implementation = Literal["adaptive", "sequential", "parallel", "compiled", "debug"]
Replacement = Literal["full", "accept_set", "argmax"]
DivergenceName = Literal["forward_kl", "reverse_kl", "generalized_jsd", "skew_kl", "top_k"]

MOST_AUTO_TOP_K = 25
"""`top_k: auto` allows no more tokens than this."""

TopK = Annotated[int, Field(ge=1)]
Probability = Annotated[float, Field(ge=0, le=1)]


@dataclass(frozen=True, slots=True)
class AcceptRule:
    """What the teacher lets pass and how it replaces, at one training step."""

    top_k: int | None
    """A proposal must be among this many most probable tokens; None: min(25, ceil(exp entropy)) at each position."""
    min_prob: float
    replacement: Replacement
    temperature: float
    """The teacher's."""


class RolloutSettings(Settings):
    """How student and teacher write a text together."""

    top_k: TopK | tuple[TopK, TopK] | Literal["auto"] = 5
    """A proposal must be among this many of the teacher's most probable tokens. ``[from, to]`` moves over the training
    steps; ``auto`` takes min(25, ceil(exp entropy)) of the teacher's distribution at each position."""

    min_prob: Probability | tuple[Probability, Probability] = 0.05
    """A proposal must have at least this probability under the teacher, unless it is the teacher's most probable token.
    ``[from, to]`` moves over the training steps."""

    replacement: Replacement = "full"
    """The teacher replaces a rejected proposal with a draw from all tokens, with a draw from those that would pass, or
    with its most probable token."""

    implementation: Implementation = "adaptive"
    """All write the same texts. ``adaptive`` chooses the block length from acceptance and measured costs; ``parallel``
    keeps it; ``compiled`` is ``parallel`` in `torch.compile`; ``sequential`` asks the teacher token by token;
    ``debug`` is ``parallel`` with a log of every decision."""

    gamma: int = Field(default=20, ge=1, le=1024)
    """Tokens the student proposes before the teacher reads them; the most of them under ``adaptive``."""

    teacher_temperature: float = Field(default=0.7, ge=0, le=100)
    """Of the teacher's distribution in `min_prob` and replacements; 0 is greedy."""

    student_temperature: float = Field(default=0.7, ge=0, le=100)
    """Of the student's draws; 0 is greedy."""

    max_new_tokens: int = Field(default=4096, ge=1)
    """Budget of a text, its end token included."""

    eos: tuple[Annotated[int, Field(ge=0)], ...] = ()
    """Ids of all tokens that end a text."""

    seed: int = Field(default=0, ge=0, lt=2**63)
    """Of the draws, together with the epoch, the id of the row and the position."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if len(set(self.eos)) < len(self.eos):
            raise ValueError("eos lists a token twice; list each once")
        return self

    @property
    def scheduled(self) -> bool:
        """Whether a setting moves over the training steps."""
        return isinstance(self.top_k, tuple) or isinstance(self.min_prob, tuple)

    def rule(self, progress: float) -> AcceptRule:
        """Return what holds at a point of the run.

        Args:
            progress: Share of the run that is done, 0 to 1; see `progress_at`.

        Returns:
            `top_k` rounded to the nearest whole number, half upwards; `min_prob` unrounded.
        """
        top_k = None if self.top_k == "auto" else math.floor(_between(self.top_k, progress) + 0.5)
        min_prob = _between(self.min_prob, progress)
        return AcceptRule(top_k, min_prob, self.replacement, self.teacher_temperature)


class DivergenceSettings(Settings):
    """What the student's distribution is pulled towards the teacher's with."""

    divergence: DivergenceName = "forward_kl"
    """With teacher T and student S: ``forward_kl`` KL(T‖S); ``reverse_kl`` KL(S‖T); ``generalized_jsd`` between them;
    ``skew_kl`` KL(T‖αT + (1-α)S); ``top_k`` KL(T‖S) over the teacher's most probable tokens and a bucket of the
    rest."""

    beta: float = Field(default=0.5, gt=0, lt=1)
    """Of ``generalized_jsd``: weight of the teacher in the mixture."""

    alpha: float = Field(default=0.1, ge=0, lt=1)
    """Of ``skew_kl``: share of the teacher that is mixed into the student's distribution."""

    top_k: int = Field(default=50, ge=1)
    """Of ``top_k``: tokens that are compared one by one."""

    temperature: float = Field(default=1.0, gt=0, le=100)
    """Divides both sides' logits. Not squared into the loss."""


SELF = "self"
"""As ``teacher.model``: the student as it was before training."""
SCRATCH = "scratch"
"""As a model: one with random weights and a vocabulary of bytes, made from `ScratchSettings`."""
QUERY, KNOWLEDGE = "{query}", "{knowledge}"

Language = Literal["ko", "en"]
Method = Literal["lupi_skd", "skd", "opd", "kd", "sft"]
Sources = tuple[str, ...]

ENVIRONMENT = {"TEACHER_MODEL": ("teacher", "model"), "STUDENT_MODEL": ("student", "model")}
"""Names of the published scripts, and the setting each stands for."""


class KnowledgeDataSettings(Settings):
    """What to teach. Sources are files, patterns, ``samples:NAME`` or ``hub:OWNER/NAME:SPLIT``."""

    root: Path | None = None
    """Folder that relative files are looked up in; the working folder when it is not given."""
    ko: Sources = ()
    """Korean rows of kind ``knowledge``."""
    en: Sources = ()
    """English rows; with Korean ones, both have the same ids."""
    general: Sources = ("samples:general",)
    """Questions of kind ``questions``, to see what is forgotten, and to mix in; none switches both off."""
    control_share: float = Field(default=0.1, ge=0, lt=1)
    """Share of each category that is never trained on: what improves there is style, not knowledge."""
    max_facts: int | None = Field(default=None, ge=4)
    """Ids to use at most, spread evenly over all."""
    on_error: Literal["stop", "skip"] = "stop"
    """What to do when rows are broken: stop and list them, or leave them out and count them."""

    @model_validator(mode="after")
    def _some_rows(self) -> Self:
        if not (self.ko or self.en):
            raise ValueError("no knowledge; give ko or en, for example samples:culture.ko")
        return self


class StudentSettings(Settings):
    """The model that learns."""

    model: str = "Qwen/Qwen3-4B"
    """Folder, ``package:NAME``, hub id, or ``scratch``."""
    revision: str | None = None
    """Of a hub id."""
    thinking: bool = False
    """Let the chat template open a part for thinking."""
    system: str | None = None
    """System message; the template's own when it is not given."""


class TeacherSettings(StudentSettings):
    """The model that reads the knowledge; it is never trained."""

    model: str = "Qwen/Qwen3-32B"
    """Folder, ``package:NAME``, hub id, ``scratch``, or ``self``: the student before training."""
    template: dict[Language, str] = Field(default={})
    """Message with ``{knowledge}`` and ``{query}``, by language; ours, text before question, where none is given."""
    placement: Literal["same"] = "same"
    """``same``: on the student's device."""

    @model_validator(mode="after")
    def _template_has_both(self) -> Self:
        for language, template in self.template.items():
            if template.count(QUERY) != 1 or template.count(KNOWLEDGE) != 1:
                raise ValueError(f"template.{language}: needs {KNOWLEDGE} and {QUERY}, each once")
        return self


class ScratchSettings(Settings):
    """Models that are made from their config, to try everything in seconds; they know nothing."""

    hidden_size: int = Field(default=32, ge=16, multiple_of=16)
    """Width; there are heads of width 8."""
    student_layers: int = Field(default=1, ge=1)
    """Transformer layers of the student."""
    teacher_layers: int = Field(default=2, ge=1)
    """Transformer layers of the teacher."""
    sharpness: float = Field(default=6.0, gt=0)
    """Standard deviation of logits: random heads as they come are too flat for `min_prob`."""
    mix: float = Field(default=0.7, ge=0, le=1)
    """Share of the teacher's head in the student's: how often proposals pass."""


class MixingSettings(Settings):
    """General questions among the knowledge, against forgetting."""

    share: float = Field(default=0.0, ge=0, lt=1)
    """Share of the rows of an epoch that are general questions. Half of the questions are then kept for measuring."""
    target: Literal["start", "teacher"] = "start"
    """Whose distribution is learnt on them: the student's before training, or the teacher's."""


class SkdTrainingSettings(TrainingSettings):
    """How the student is trained."""

    per_device_train_batch_size: int = Field(default=4, ge=1)
    """Texts a device reads in one forward pass; all texts of an optimiser step are written at once."""
    num_train_epochs: float = Field(default=5, gt=0)
    """Passes over the rows, unless `max_steps` is given; each writes new texts."""
    learning_rate: float = Field(default=1e-5, gt=0)
    """The highest learning rate; it falls linearly to 0."""
    weight_decay: float = Field(default=0.0, ge=0)
    """Of AdamW."""
    logging_steps: int = Field(default=5, ge=1)
    """Steps between lines of ``history.jsonl``; privileged gain is measured on the texts of the last of them."""
    max_drop: float = Field(default=0.5, ge=0)
    """Largest fall of ``knowledge`` below the best so far, in nats a byte; beyond it training is rolled back."""
    max_rollbacks: int = Field(default=2, ge=0)
    """How often training may be rolled back."""


class KnowledgeEvaluationSettings(Settings):
    """What to measure."""

    batch_size: int = Field(default=16, ge=1)
    """Texts at a time."""
    max_new_tokens: int = Field(default=64, ge=1)
    """Budget of a greedy answer."""
    max_answers: int | None = Field(default=None, ge=0)
    """Greedy answers a model and language at most, spread evenly; 0 writes none, all when not given."""
    bootstrap_samples: int = Field(default=2000, ge=1)
    """Resamples of the facts for each interval."""
    max_forgetting: float | None = Field(default=0.1, gt=0)
    """Most divergence from the start on general questions, in nats a token, that a finished run may have."""
    shown: int = Field(default=10, ge=0)
    """Questions whose answers the report shows."""


class SpeculativeKdConfig(Settings):
    """Recipe ``speculative_kd``: knowledge that the teacher reads goes into the weights of the student."""

    recipe: Literal["speculative_kd"]
    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")
    """Name of the run and of the model."""
    seed: int = Field(default=13, ge=0)
    """Seed of everything that is drawn."""
    method: Method = "lupi_skd"
    """``lupi_skd``: the student proposes, a teacher that reads the knowledge replaces. ``skd``: the teacher does not
    read it. ``opd``: the student's text, judged by the teacher that reads. ``kd``: that teacher's texts and
    distributions. ``sft``: the same texts, without distributions."""
    data: KnowledgeDataSettings
    student: StudentSettings = StudentSettings()
    teacher: TeacherSettings = TeacherSettings()
    scratch: ScratchSettings = ScratchSettings()
    rollout: RolloutSettings = RolloutSettings()
    loss: DivergenceSettings = DivergenceSettings()
    mixing: MixingSettings = MixingSettings()
    training: SkdTrainingSettings = SkdTrainingSettings()
    evaluation: KnowledgeEvaluationSettings = KnowledgeEvaluationSettings()

    @model_validator(mode="after")
    def _sides_match(self) -> Self:
        if self.teacher.thinking != self.student.thinking:
            raise ValueError("teacher.thinking and student.thinking differ, so texts begin differently; set both alike")
        if self.mixing.share and not self.data.general:
            raise ValueError("mixing.share needs data.general")
        if self.rollout.eos:
            raise ValueError("rollout.eos is read from the models; leave it out")
        if self.student.model == SELF:
            raise ValueError('student.model: "self" is for the teacher; name a model')
        if self.teacher.model == SCRATCH != self.student.model:
            raise ValueError("teacher.model scratch needs student.model scratch: they share a vocabulary of bytes")
        return self


def from_environment(
    values: Mapping[str, Any], environment: Mapping[str, str] = os.environ, *, keep: frozenset[str] = frozenset()
) -> tuple[dict[str, Any], list[str]]:
    """Let ``TEACHER_MODEL`` and ``STUDENT_MODEL`` override a file.

    Args:
        values: Settings of the file, with what the command line says.
        environment: Variables.
        keep: Settings the command line gives, such as ``teacher.model``, to which the environment yields.

    Returns:
        The settings, and a sentence for each that was overridden.
    """
    result, said = dict(values), []
    for name, (section, field) in ENVIRONMENT.items():
        if (value := environment.get(name)) and f"{section}.{field}" not in keep:
            result[section] = {**(result.get(section) or {}), field: value}
            said.append(f"{section}.{field} is {value}, from {name}")
    return result, said


def progress_at(step: int, total_steps: int) -> float:
    """Return the share of a run that is done: 0 at its first step, 1 at its last and after."""
    return min(1.0, max(0.0, step / max(1, total_steps - 1)))


def _between(value: float | tuple[float, float], progress: float) -> float:
    if isinstance(value, tuple):
        return value[0] + (value[1] - value[0]) * progress
    return value

"""Settings of mode ``triplets``: a neural student from queries with good and bad answers."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from soju.core.config import Settings
from soju.data.rows import DIFFICULTIES, PAIR_TYPES
from soju.sparse.config import DataSettings, NeuralConfig, NeuralLossSettings, NeuralTrainingSettings, TeacherSettings


class TripletsDataSettings(DataSettings):
    """`DataSettings` with triplets, which make the rows; pairs and terms train the static encoder of a new student."""

    triplets: tuple[str, ...] = Field(min_length=1)
    """Rows of query, positive, negative, pair_type and difficulty."""
    dev_triplets: tuple[str, ...] = ()
    """Triplets to validate on."""
    dev_share: float = Field(default=0.02, gt=0, lt=0.5)
    """Share of the queries kept out of training to validate on, chosen by a hash, when `dev_triplets` are not given."""
    dev_rows: int = Field(default=1000, ge=2)
    """Most triplets to validate on, spread evenly; their texts are searched among one another."""
    dev_distractors: int = Field(default=0, ge=0)
    """Texts of training triplets, spread evenly, that are searched too: among few texts every student is perfect."""


class TripletsTeacherSettings(TeacherSettings):
    """Whose scores the student learns; give a model, or vectors of a bi-encoder, or neither with kind ``scores``."""

    kind: Literal["bi_encoder", "cross_encoder", "scores"] = "bi_encoder"
    """``bi_encoder`` scores all pairs of a batch; ``cross_encoder`` each query with its own two texts; ``scores`` are
    read from the rows (positive_score, negative_score)."""
    calibrate: bool = True
    """Map its scores by a line so that over the training rows positives have the median 1 and texts of other rows
    (with kind cross_encoder or scores: negatives) the median 0, the range of a cosine."""

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if self.kind == "scores":
            if self.model is not None or self.vectors is not None:
                raise ValueError("kind scores reads positive_score and negative_score; leave out model and vectors")
        elif (self.model is None) == (self.vectors is None):
            raise ValueError("give either model or vectors")
        elif self.kind == "cross_encoder" and self.model is None:
            raise ValueError("a cross-encoder has no vectors; give its model, or its scores in the rows (kind: scores)")
        return self


class SparsitySettings(Settings):
    """Sparsity targets: the weight of the penalty is steered so that texts have that many active terms."""

    query_terms: float | None = Field(default=None, gt=0)
    """Active terms of a query; its penalty has the fixed weight `flops` when not given."""
    document_terms: float | None = Field(default=None, gt=0)
    """The same for positives and negatives."""
    rate: float = Field(default=0.05, gt=0, le=1)
    """How fast the logarithm of the weight moves; it never moves by more than this a step."""
    highest: float = Field(default=100.0, gt=0)
    """Highest weight of the penalty."""


class TripletLossSettings(NeuralLossSettings):
    """Weights of the named losses. The defaults are those of v23."""

    form: Literal["signed", "published"] = "signed"
    """``published``: the term losses on the weights, the positive activation without bound. ``signed``: on the signed
    maxima, each up to `target`, so that inactive terms have a gradient and weights have a bound."""
    infonce: float = Field(default=2.5, ge=0)
    """Weight of finding the positive among all positives and negatives of the batch; stages multiply it."""
    symmetric: bool = False
    """Find the query of each positive, too."""
    self_terms: float = Field(default=1.0, ge=0)
    """Weight of a query activating its own terms."""
    positive_terms: float = Field(default=3.0, ge=0)
    """Weight of a query activating the terms of its positive: the cross-lingual alignment."""
    target: float = Field(default=1.0, gt=0)
    """Weight those terms should reach, in units of log(1 + logit); form signed only."""
    margin: float = Field(default=0.0, ge=0)
    """Weight of the triplet margin."""
    triplet_margin: float = Field(default=0.3, gt=0)
    """The positive should be this much more similar than the negative. Cosines of non-negative vectors lie in [0, 1]:
    the published 1.5 of v22 cannot be reached."""
    flops: float = Field(default=0.003, ge=0)
    """Weight of the sparsity penalty, or where its controller begins."""
    flops_cost: Literal["inverse", "direct"] | None = "inverse"
    """Weigh the penalty by 1/idf, which punishes common terms, or by idf, as the published snippet; or all alike."""
    flops_rise: float = Field(default=0.0, ge=0, le=1)
    """Share of the training over which the penalty then rises to its weight, with the square of the steps."""
    regularize: Literal["query", "all"] = "all"
    """Which texts the penalty and the minimum activation read; published: the query only."""
    minimum_activation: float = Field(default=1.0, ge=0)
    """Weight of the loss that keeps texts from losing all terms."""
    minimum_terms: int = Field(default=5, ge=1)
    """Heaviest terms that loss averages."""
    minimum_weight: float = Field(default=0.5, gt=0)
    """What they should weigh on average."""
    distillation_form: Literal["listwise", "margin_mse"] = "listwise"
    """``listwise``: KL of the rankings of a query's candidates; ``margin_mse``: squared difference of margins."""
    teacher_temperature: float = Field(default=0.05, gt=0)
    """The listwise form divides the teacher's scores by it; the student's by the temperature of the stage."""


class StageSettings(Settings):
    """One stage of the curriculum."""

    share: float = Field(gt=0, le=1)
    """Share of the training."""
    temperature: float = Field(gt=0)
    """InfoNCE divides similarities by it."""
    infonce: float = Field(default=1.0, ge=0)
    """Factor on its weight."""
    learning_rate: float = Field(default=1.0, gt=0)
    """Factor on the learning rate, on top of the cosine schedule."""
    mix: dict[str, float] = Field(default_factory=dict)
    """Share of the rows by pair_type or by difficulty; what is not named divides the rest evenly. Empty: as it is."""

    @model_validator(mode="after")
    def _one_grouping(self) -> Self:
        names = set(self.mix)
        if not (names <= set(PAIR_TYPES) or names <= set(DIFFICULTIES)):
            raise ValueError(
                f"mix names {', '.join(sorted(names))}; use only {', '.join(PAIR_TYPES)}, or only "
                f"{', '.join(DIFFICULTIES)}"
            )
        total = sum(self.mix.values())
        everything = names in (set(PAIR_TYPES), set(DIFFICULTIES))
        if any(value < 0 for value in self.mix.values()) or total > 1 + 1e-6 or (everything and abs(total - 1) > 1e-6):
            raise ValueError(f"the shares of mix add up to {total:g}; they are parts of 1, and 1 when all are named")
        return self


V23_STAGES = (
    StageSettings(share=0.35, temperature=0.08, infonce=0.5, mix={"single_term": 0.5}),
    StageSettings(
        share=0.35,
        temperature=0.05,
        infonce=0.75,
        learning_rate=0.5,
        mix={"single_term": 1 / 3, "monolingual": 1 / 3, "cross_lingual": 1 / 3},
    ),
    StageSettings(share=0.3, temperature=0.04, learning_rate=0.25, mix={"hard": 0.5}),
)


class TripletsTrainingSettings(NeuralTrainingSettings):
    """`NeuralTrainingSettings` with the defaults of v23."""

    gradient_accumulation_steps: int = Field(default=1, ge=1)
    """Micro-batches that make an optimiser step. Losses that compare texts of a batch (InfoNCE, listwise distillation,
    FLOPS) see one micro-batch, or all of them when `cached`; the others are exact either way."""
    cached: bool = False
    """Let losses see all texts of an optimiser step at once with the memory of a micro-batch, for a second forward
    pass (GradCache); on one process."""
    num_train_epochs: float = Field(default=20, gt=0)
    """Passes over the rows, unless `max_steps` is given."""
    learning_rate: float = Field(default=2e-5, gt=0)
    """The highest learning rate; it falls along a cosine to 0."""
    patience: int | None = Field(default=3, ge=1)
    """Validations without a new best score after which training ends early; never when null."""

    @property
    def batches(self) -> tuple[int, int]:
        """Rows of a batch, and batches of a step; `cached` makes one batch of those of a step."""
        size, accumulation = super().batches
        return (size * accumulation, 1) if self.cached else (size, accumulation)


class TripletsConfig(NeuralConfig):
    """Recipe ``splade``, mode ``triplets``: a neural sparse encoder from triplets with a curriculum (v22, v23)."""

    mode: Literal["triplets"]
    data: TripletsDataSettings
    teacher: TripletsTeacherSettings | None = None
    losses: TripletLossSettings = TripletLossSettings()
    sparsity: SparsitySettings = SparsitySettings()
    curriculum: tuple[StageSettings, ...] = Field(default=V23_STAGES, min_length=1)
    training: TripletsTrainingSettings = TripletsTrainingSettings()

    @model_validator(mode="after")
    def _parts_fit(self) -> Self:
        total = sum(stage.share for stage in self.curriculum)
        if abs(total - 1) > 1e-6:
            raise ValueError(f"the shares of the curriculum's stages add up to {total:g}; they must add up to 1")
        if self.losses.distillation > 0 and self.teacher is None:
            raise ValueError("losses.distillation needs a teacher; give one, or set losses.distillation to 0")
        listwise = self.losses.distillation_form == "listwise"
        if self.losses.distillation > 0 and listwise and self.teacher and self.teacher.kind != "bi_encoder":
            raise ValueError("listwise distillation scores all pairs of a batch; use a bi_encoder, or margin_mse")
        if self.losses.regularize == "query" and self.sparsity.document_terms is not None:
            raise ValueError("sparsity.document_terms needs losses.regularize all")
        return self

"""Settings of mode ``terms``: a neural student of a dense teacher, from term mappings."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from soju.sparse.config import DataSettings, NeuralConfig, NeuralLossSettings


class TermsDataSettings(DataSettings):
    """`DataSettings` with term mappings, which make the rows; sentence pairs may join them."""

    dev_terms: float = Field(default=0.02, gt=0, lt=0.5)
    """Share of the head words kept out of training, chosen by a hash of the word; they choose the best checkpoint."""
    pairs_as_rows: bool = False
    """Train on sentence pairs too: the Korean side should activate the terms of the English one, rare ones most; with
    `both_directions` the other way round as well."""
    both_directions: bool = False
    """Train rows in reverse too: the most similar English term of a row should activate its head word."""

    @model_validator(mode="after")
    def _rows_to_learn_from(self) -> Self:
        if not self.terms:
            raise ValueError("terms are needed; mode terms learns from term mappings")
        if self.pairs_as_rows and not (self.pairs or self.passages):
            raise ValueError("pairs_as_rows needs pairs or passages")
        return self


class LossSettings(NeuralLossSettings):
    """Weights of the named losses, and what they are made of. All defaults but `terms` are the published ones."""

    terms: Literal["signed", "v19"] = "signed"
    """``v19``: the published form, on the weights; an inactive target gets no gradient and stays inactive.
    ``signed``: the same losses on the signed maxima of the logits, where it is pulled up."""
    self_terms: float = Field(default=3.0, ge=0)
    """Weight of keeping a text's own terms."""
    korean_terms: float = Field(default=2.0, ge=0)
    """Weight of activating Korean targets."""
    english_terms: float = Field(default=12.0, ge=0)
    """Weight of activating English targets."""
    margin: float = Field(default=2.0, ge=0)
    """Weight of the hinge that pulls up targets below `target_margin`."""
    distillation: float = Field(default=1.5, ge=0)
    """Weight of the in-batch distillation; 0 needs no teacher."""
    translation: float = Field(default=0.0, ge=0)
    """Weight of telling a text's translation from the other texts of the batch (InfoNCE); needs `both_directions`, but
    no teacher."""
    flops: float = Field(default=5e-5, ge=0)
    """Weight of the sparsity penalty."""
    target_margin: float = Field(default=2.0, gt=0)
    """Weight a Korean target should reach, in units of log(1 + logit)."""
    english_margin_factor: float = Field(default=1.5, gt=0)
    """English targets should reach this many times `target_margin`."""
    temperature: float = Field(default=0.05, gt=0)
    """The distillation divides cosines by it; lower looks at the nearest texts only."""
    with_self: bool = True
    """Whether the distillation compares a text with itself too, as published. Set it to false where a batch holds texts
    and their translations: see `soju.sparse.losses`."""


class TermsConfig(NeuralConfig):
    """Recipe ``splade``, mode ``terms``: a neural sparse encoder from term mappings (the published v19)."""

    mode: Literal["terms"]
    data: TermsDataSettings
    losses: LossSettings = LossSettings()

    @model_validator(mode="after")
    def _losses_fit(self) -> Self:
        if self.losses.distillation > 0 and self.teacher is None:
            raise ValueError("losses.distillation needs a teacher; give teacher.model, or set losses.distillation to 0")
        if self.losses.translation > 0 and not self.data.both_directions:
            raise ValueError("losses.translation needs both texts of a row; set data.both_directions to true")
        return self

"""What an embedding model is measured on, and how every model is asked."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, Self

from pydantic import Field, model_validator

from soju.core.config import Settings

NAME = r"^[A-Za-z0-9_.-]+$"
Language = Literal["ko", "en"]


class SimilaritySet(Settings):
    """Pairs of texts with scores of people: KorSTS, KLUE-STS, STS-B."""

    name: str = Field(pattern=NAME)
    """What tables call it."""
    file: str
    """File, pattern, ``samples:NAME`` or ``hub:OWNER/NAME:SPLIT`` of kind ``similarity``."""
    language: Language
    """Language of its texts; a set of ``samples:similarity.heldout`` takes the rows of this language."""


class BitextSelect(Settings):
    """Which lines of a bitext to take, by the source that a companion file names for each line."""

    file: str
    """Line-aligned companion file (``.src.gz``)."""
    keep: tuple[str, ...] = Field(min_length=1)
    """Names of the sources to keep."""


class BitextSet(Settings):
    """Sentence pairs, each to be found among all others."""

    name: str = Field(pattern=NAME)
    """What tables call it."""
    file: str
    """File, pattern, sample or hub source of kind ``pairs``."""
    select: BitextSelect | None = None
    """Take only some sources, for example the Tatoeba lines of a mixed file."""


class ChoiceSet(Settings):
    """Multiple choice, scored by cosine: KoBEST, KMMLU."""

    name: str = Field(pattern=NAME)
    """What tables call it."""
    file: str
    """File, pattern, sample or hub source of kind ``choices``."""


class RetrievalTestSet(Settings):
    """Queries and documents; give ``beir`` or ``passages``."""

    name: str = Field(pattern=NAME)
    """What tables call it."""
    beir: str | None = None
    """Folder in the layout of BEIR."""
    split: str = Field(default="test", pattern=NAME)
    """Which judgements of the folder to ask for."""
    passages: tuple[str, ...] = ()
    """Files or samples of kind ``passages``; measured in four directions."""

    @model_validator(mode="after")
    def _one_kind(self) -> Self:
        if (self.beir is not None) + bool(self.passages) != 1:
            raise ValueError("give either beir or passages")
        return self


class EvaluationSettings(Settings):
    """What to measure. Every model is asked through the same wrapper, with its own pooling and padding."""

    root: Path | None = None
    """Folder that relative files are looked up in; ``data.root`` of the configuration when it is not given."""
    sts: tuple[SimilaritySet, ...] = ()
    """Correlation of cosines with scores of people."""
    bitext: tuple[BitextSet, ...] = ()
    """Accuracy of finding translations, both ways."""
    choices: tuple[ChoiceSet, ...] = ()
    """Accuracy of multiple choice."""
    retrieval: tuple[RetrievalTestSet, ...] = ()
    """Dense retrieval, searched exactly."""
    prompt: str | None = None
    """Put before every text of every model but documents; each model's own default prompt when it is not given."""
    query_prompt: str | None = None
    """Put before the queries of retrieval; each model's own ``query`` prompt, or else `prompt`, otherwise."""
    document_prompt: str | None = None
    """Put before documents; each model's own ``document`` prompt, or else its default one, when it is not given."""
    max_length: int | None = Field(default=None, ge=2)
    """Tokens a text is cut to; each model's own limit when it is not given."""
    batch_size: int = Field(default=32, ge=1)
    """Texts at a time."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Precision that weights of folders are loaded in; models in memory are measured as they are."""
    limit: int | None = Field(default=None, ge=4)
    """Take only the first rows of each set, for a quick look; not of ``beir`` folders."""
    resamples: int | None = Field(default=2000, ge=100)
    """Draws for intervals and paired tests; neither is made when it is null."""
    seed: int = Field(default=0, ge=0)
    """Seed of these draws."""
    timed_texts: int | None = Field(default=256, ge=1)
    """Texts of the first set that encoding is timed on; it is not timed when this is null."""
    timings: int = Field(default=3, ge=3)
    """Times that they are encoded; the median counts."""

    @model_validator(mode="after")
    def _names_differ(self) -> Self:
        sets: tuple[SimilaritySet | BitextSet | ChoiceSet | RetrievalTestSet, ...]
        sets = (*self.sts, *self.bitext, *self.choices, *self.retrieval)
        names = [one.name for one in sets]
        if twice := [name for name in names if names.count(name) > 1]:
            raise ValueError(f'two sets are called "{twice[0]}"; give every set a name of its own')
        return self

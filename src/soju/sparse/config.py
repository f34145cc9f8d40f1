"""Settings of the recipe: data, evaluation and mode ``static``; what neural students share; then mode ``terms``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, field_validator, model_validator

from soju.core.config import Settings
from soju.evaluation.retrieval import cut_off
from soju.training.settings import TrainingSettings


class SelectSettings(Settings):
    """Which lines of the pair file to read, by the source that a companion file names for each line."""

    file: str
    """Line-aligned companion file (``.src.gz``), relative to ``data.root``."""
    keep: tuple[str, ...] = Field(min_length=1)
    """Names of the sources to keep."""


class DataSettings(Settings):
    """What to learn from. Sources are files, globs, ``samples:NAME`` or ``hub:OWNER/NAME:SPLIT``."""

    root: Path | None = None
    """Folder that relative files are looked up in; the working folder when it is not given. ``~`` is not expanded."""
    pairs: tuple[str, ...] = ()
    """Sentence pairs, Korean and English."""
    passages: tuple[str, ...] = ()
    """Passages with queries in both languages; both are read as sentence pairs."""
    terms: tuple[str, ...] = ()
    """Korean head words with English translations and Korean synonyms."""
    select: SelectSettings | None = None
    """Read only some sources of ``pairs``, which must then be a single file."""
    term_sources: tuple[str, ...] | None = None
    """Leave out head words with a source (``src`` of the row) that is not named here; rows that name none are kept."""
    held_out_terms: float = Field(default=0.0, ge=0, lt=0.5)
    """Share of the head words kept out of training to measure unseen-term activation on, chosen by hash."""
    on_error: Literal["stop", "skip"] = "stop"
    """What to do when rows are broken: stop and list them, or leave them out and count them."""
    drop_overlap: bool = False
    """Leave out and count pairs and triplets that hold a text of an evaluation set, instead of refusing to train; also
    head words that are one."""
    max_line_bytes: int = Field(default=1_000_000, ge=1_000)
    """Longer lines are refused."""

    @model_validator(mode="after")
    def _select_one_file(self) -> Self:
        if self.select is not None and len(self.pairs) != 1:
            raise ValueError("select needs exactly one file in pairs")
        return self


class AlignedDataSettings(DataSettings):
    """`DataSettings` with sentence pairs, which word alignment needs."""

    @model_validator(mode="after")
    def _something_to_align(self) -> Self:
        if not (self.pairs or self.passages):
            raise ValueError("pairs or passages are needed; terms alone cannot be aligned")
        return self


class TestSet(Settings):
    """One retrieval test set."""

    name: str = Field(pattern=r"^[A-Za-z0-9_.-]+$")
    """Name in tables and signatures."""
    pairs: tuple[str, ...] = ()
    """Sentence pairs: each Korean side asks for its English side among all of them, and the other way round."""
    passages: tuple[str, ...] = ()
    """Passages with queries in both languages: four directions."""
    triplets: tuple[str, ...] = ()
    """Triplets: each query asks for its positives among all texts of its pair type; a direction for each type."""
    beir: str | None = None
    """Folder with ``corpus.jsonl``, ``queries.jsonl`` and ``qrels/SPLIT.tsv``, relative to ``data.root``."""
    split: str = Field(default="test", pattern=r"^[A-Za-z0-9_.-]+$")
    """Which judgements of the folder `beir` to ask for."""

    @model_validator(mode="after")
    def _one_kind(self) -> TestSet:
        if sum(map(bool, (self.pairs, self.passages, self.triplets, self.beir))) != 1:
            raise ValueError("give one of pairs, passages, triplets and beir")
        if self.split != "test" and not self.beir:
            raise ValueError("split is about beir; leave it out")
        return self


class EvaluationSettings(Settings):
    """What to measure and against what."""

    sets: tuple[TestSet, ...] = ()
    """Retrieval test sets."""
    terms: tuple[str, ...] = ()
    """Head words kept out of the training data, for unseen-term activation."""
    more_metrics: tuple[str, ...] = ()
    """Measured with recall@10, nDCG@10, MRR@10, recall@1 and recall@100: ``ndcg@K``, ``mrr@K``, ``recall@K``. The
    deepest decides how many documents every system gives."""
    bootstrap_samples: int = Field(default=2000, ge=100)
    """Resamples of the paired bootstrap."""
    latency_queries: int = Field(default=200, ge=1)
    """Queries timed one at a time."""
    examples: tuple[str, ...] = ("인공지능이 병을 진단할 수 있나요?", "how do vaccines protect people")
    """Queries whose search results the report shows."""
    probes: tuple[str, ...] = ("머신러닝", "데이터베이스", "추천시스템", "음성인식", "artificial intelligence")
    """Texts whose expansion the report shows."""

    @field_validator("more_metrics")
    @classmethod
    def _known_metrics(cls, metrics: tuple[str, ...]) -> tuple[str, ...]:
        for metric in metrics:
            cut_off(metric)
        return metrics

    @model_validator(mode="after")
    def _names_differ(self) -> EvaluationSettings:
        names = [test_set.name for test_set in self.sets]
        if len(set(names)) < len(names):
            raise ValueError("two sets have the same name; scores would be mixed up")
        return self


class TokenizerSettings(Settings):
    """The shared Korean–English tokenizer."""

    analysed_pairs: int | None = Field(default=None, ge=1)
    """Most sentence pairs whose Korean is read by the morphological analyser, spread evenly; all when not given."""
    min_count: int = Field(default=2, ge=1)
    """Korean stretches and English words seen less often are left to sub-words, unless the term list has them."""
    sub_words: int = Field(default=4000, ge=100)
    """Sub-words for English words outside the lexicon."""
    sub_word_weight: float = Field(default=0.5, gt=0, le=1)
    """What a sub-word counts for, a whole word being 1; below 0.3 it is not aligned either."""
    function_word_weight: float = Field(default=0.4, ge=0, le=1)
    """What an English function word ("the", "how") counts for; below 0.3 it is not aligned either."""


class AlignmentSettings(Settings):
    """Word alignment over pairs and terms."""

    iterations: int = Field(default=6, ge=1, le=50)
    """Rounds of expectation maximisation of IBM Model 1."""
    prior: float = Field(default=0.01, ge=0, le=10)
    """Dirichlet prior over the targets of a word; 0 is maximum likelihood."""
    min_probability: float = Field(default=0.02, ge=0, lt=1)
    """Translations below this averaged probability are dropped before weighting."""


class ExpansionSettings(Settings):
    """From translation probabilities to query weights."""

    dictionary_share: float = Field(default=0.2, ge=0, le=1)
    """Share of the term list in the mix with the alignment."""
    power: float = Field(default=0.7, gt=0, le=2)
    """Exponent on the probability relative to the best translation; below 1 lifts alternatives."""
    confidence: float = Field(default=0.2, ge=0, le=2)
    """Exponent on the probability of the best translation."""
    synonym_weight: float = Field(default=0.3, ge=0, le=1)
    """Weight of a Korean synonym of the term list with similarity 1."""
    mass: float = Field(default=1.0, gt=0, le=1)
    """Share of each term's expansion weight to keep, largest first."""
    min_weight: float = Field(default=0.03, ge=0, le=1)
    """Weights below it are dropped."""
    max_terms: int = Field(default=32, ge=1)
    """Most translations of a term."""


class SearchSettings(Settings):
    """How documents are weighted in an index of this model."""

    k1: float = Field(default=1.2, ge=0)
    """BM25 saturation of term counts."""
    b: float = Field(default=0.75, ge=0, le=1)
    """BM25 length normalisation."""
    prior_documents: float = Field(default=10_000, ge=0)
    """Weight of the training text in document frequencies, in documents."""


class Credit(Settings):
    """What the model card says of one source of training data."""

    source: str
    """Name of the source as the companion file or the rows give it, or of the file."""
    licence: str
    """Its licence, as its owner names it."""
    attribution: str = ""
    """The words its licence asks for."""


class CardSettings(Settings):
    """What the model card says and nothing can compute."""

    licence: str = "other"
    """Licence of the weights by the hub's identifier."""
    licence_name: str | None = "as the training data"
    """Name of a licence the hub does not know."""
    command: str | None = None
    """Preset or file that trains the model; its name when not given."""
    credits: tuple[Credit, ...] = ()
    """One for each source; sources without one are listed as unknown."""


class StaticConfig(Settings):
    """Recipe ``splade``, mode ``static``: a sparse encoder from word alignment, no network."""

    recipe: Literal["splade"]
    mode: Literal["static"]
    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")
    """Name of the run and of the model."""
    seed: int = Field(default=13, ge=0)
    """Seed of the held-out split and of every resampling; the training itself draws nothing."""
    data: AlignedDataSettings
    tokenizer: TokenizerSettings = TokenizerSettings()
    alignment: AlignmentSettings = AlignmentSettings()
    expansion: ExpansionSettings = ExpansionSettings()
    search: SearchSettings = SearchSettings()
    evaluation: EvaluationSettings = EvaluationSettings()
    card: CardSettings = CardSettings()

    @property
    def aligns_words(self) -> bool:
        """Whether a static encoder is trained, which needs sentence pairs."""
        return True


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


class NeuralTrainingSettings(TrainingSettings):
    """`TrainingSettings` of a neural student; the defaults are those of the published v19."""

    per_device_train_batch_size: int = Field(default=64, ge=1)
    """Rows of a micro-batch on each process; with `both_directions` a row can have two texts."""
    gradient_accumulation_steps: int = Field(default=2, ge=1)
    """Micro-batches that make an optimiser step; the in-batch losses, distillation and FLOPS, see one at a time."""
    num_train_epochs: float = Field(default=15, gt=0)
    """Passes over the rows, unless `max_steps` is given."""
    learning_rate: float = Field(default=3e-6, gt=0)
    """The highest learning rate; it falls linearly to 0."""
    mixed_precision: Literal["fp16", "bf16", "off"] = "fp16"
    """``fp16``, the published one, needs a GPU. Write ``"off"``, float32, in quotes: a bare off is false in YAML."""
    layers_learning_rate: float | None = Field(default=None, gt=0)
    """The highest learning rate of the transformer layers alone, which with ``lexical`` add nothing at first while the
    table is finished; `learning_rate` when not given."""
    patience: int | None = Field(default=None, ge=1)
    """Validations without a new best score after which training ends early; never when null."""
    max_drop: float = Field(default=0.1, gt=0)
    """Largest fall of the validation score below the best so far, as a fraction of it; the run rolls back beyond it."""
    max_rollbacks: int = Field(default=2, ge=0)
    """How often the run may go back after a regression or after numbers that are not finite, before it gives up."""

    @property
    def batches(self) -> tuple[int, int]:
        """Rows of a batch on each process, and batches of an optimiser step."""
        return self.per_device_train_batch_size, self.gradient_accumulation_steps


class NeuralLossSettings(Settings):
    """What every mode with a neural student sets about its losses."""

    distillation: float = Field(default=0.0, ge=0)
    """Weight of learning from the teacher; 0 needs none."""
    flops: float = Field(default=0.0, ge=0)
    """Weight of the sparsity penalty."""
    flops_cost: Literal["inverse", "direct"] | None = None
    """Weigh the penalty by 1/idf, which punishes common terms, or by idf; all terms alike when not given."""
    flops_from: float = Field(default=0.0, ge=0, lt=1)
    """Share of the training after which the penalty starts: learn, then compress."""


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
    losses: NeuralLossSettings = NeuralLossSettings()
    training: NeuralTrainingSettings = NeuralTrainingSettings()
    evaluation: EvaluationSettings = EvaluationSettings()
    card: CardSettings = CardSettings()

    @model_validator(mode="after")
    def _table_has_data(self) -> Self:
        if self.aligns_words and not (self.data.pairs or self.data.passages):
            raise ValueError(
                "a student from scratch needs data.pairs or data.passages for its tokenizer and table, or a "
                "student.static_model that has both"
            )
        return self

    @property
    def aligns_words(self) -> bool:
        """Whether a static encoder is trained, which needs sentence pairs."""
        return isinstance(self.student, ScratchStudent) and self.student.static_model is None


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
    """The distillation divides cosines by it; a low one compares with the nearest texts only."""
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

"""Settings of recipe `embedding`: a base, its new vocabulary, training stages, what is kept, what is measured."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, field_validator, model_validator

from soju.core.config import Settings
from soju.training.settings import TrainingSettings

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


FilePart = tuple[str, ...]
Initialiser = Literal["mean", "omp", "aligned", "noise"]


class EmbeddingDataSettings(Settings):
    """What to learn from. Sources are files, globs, ``samples:NAME`` or ``hub:OWNER/NAME:SPLIT``."""

    root: Path | None = None
    """Folder that relative files are looked up in; the working folder when it is not given. ``~`` is not expanded."""
    korean: FilePart = ()
    """Korean texts, one a line or a row; the Korean sides of `pairs` and `passages` are used where there are none."""
    english: FilePart = ()
    """English texts; the English sides of `pairs` and `passages` are added."""
    pairs: FilePart = ()
    """Sentence pairs, Korean and English."""
    passages: FilePart = ()
    """Passages with queries in both languages; both are read as sentence pairs."""
    on_error: Literal["stop", "skip"] = "stop"
    """What to do when rows are broken: stop and list them, or leave them out and count them."""
    drop_overlap: bool = False
    """Leave out and count texts that stand in an evaluation or retention set, instead of refusing to train."""
    max_line_bytes: int = Field(default=1_000_000, ge=1_000)
    """Longer lines are refused."""

    @model_validator(mode="after")
    def _some_korean(self) -> Self:
        if not (self.korean or self.pairs or self.passages):
            raise ValueError("no Korean text; give korean, pairs or passages")
        return self


class PretrainedBase(Settings):
    """Start from an embedding model with a byte-level BPE tokenizer."""

    kind: Literal["pretrained"]
    model: str
    """Folder or hub id of a sentence-transformers model."""
    donor: str | None = None
    """Folder or hub id whose tokenizer lends the Korean vocabulary; needed by stage 0."""


class DistillationSettings(Settings):
    """How a base from scratch learns to embed."""

    renamed: ClassVar[Mapping[str, str]] = {"batch_size": "per_device_train_batch_size", "save_every": "save_steps"}

    teacher: str | None = None
    """Folder, hub id or ``package:NAME`` of a sentence-transformers model that reads English; without one the base
    learns from sentence pairs alone, by in-batch contrast."""
    cache: Path = Path("runs/teacher-vectors")
    """Folder that keeps the teacher's vectors by content; runs may share it."""
    texts: int = Field(default=20_000, ge=8)
    """English texts to learn from at most, spread evenly over all."""
    pair_share: float = Field(default=0.2, ge=0, le=1)
    """Share of the texts whose Korean side is learned as well, pulled to the vector of the English side."""
    rows_from_teacher: bool = False
    """Start from the teacher's vectors of the tokens, so that a text means something before the first step."""
    max_steps: int = Field(default=2000, ge=1)
    """Optimiser steps."""
    per_device_train_batch_size: int = Field(default=64, ge=2)
    """Texts of a batch on each process."""
    learning_rate: float = Field(default=1e-3, gt=0)
    """Peak of the schedule."""
    temperature: float = Field(default=0.05, gt=0)
    """Of the in-batch contrast without a teacher."""
    save_steps: int = Field(default=500, ge=1)
    """Optimiser steps between checkpoints."""


class ScratchBase(Settings):
    """Make a small base of the same architecture first, and a donor tokenizer, so that a run needs no hub."""

    kind: Literal["scratch"]
    vocabulary: int = Field(default=32_768, ge=300)
    """Tokens of the base's tokenizer without the special ones; it is trained on English and a share of Korean."""
    korean_share: float = Field(default=0.05, ge=0, le=1)
    """Share of the characters of the tokenizer's text that are Korean: how much Korean the base knows already."""
    donor_vocabulary: int = Field(default=16_384, ge=300)
    """Tokens of the donor's tokenizer, which is trained on the Korean texts."""
    tokenizer_texts: int | None = Field(default=None, ge=1)
    """Texts of each language that tokenizers are trained on at most; all when not given."""
    hidden_size: int = Field(default=128, ge=16, multiple_of=16)
    """Width of embeddings, layers and vectors."""
    layers: int = Field(default=4, ge=1)
    """Transformer layers."""
    heads: int = Field(default=4, ge=1)
    """Attention heads."""
    key_value_heads: int = Field(default=2, ge=1)
    """Heads of keys and values; they divide `heads`."""
    intermediate_size: int = Field(default=384, ge=16)
    """Width of the feed-forward layers."""
    max_length: int = Field(default=64, ge=4)
    """Tokens after which a text is cut."""
    pooling: Literal["lasttoken", "mean"] = "lasttoken"
    """The text's vector is that of its last token, as in Qwen3-Embedding, or the ``mean`` of all, which a small model
    learns in fewer steps."""
    distillation: DistillationSettings = DistillationSettings()

    @model_validator(mode="after")
    def _heads_fit(self) -> Self:
        if self.heads % self.key_value_heads:
            raise ValueError(f"heads {self.heads} is not a multiple of key_value_heads {self.key_value_heads}")
        if self.hidden_size % self.heads or (self.hidden_size // self.heads) % 2:
            raise ValueError(f"hidden_size {self.hidden_size} / heads {self.heads} must be an even number")
        return self


BaseSettings = Annotated[PretrainedBase | ScratchBase, Field(discriminator="kind")]


class ExpansionSettings(Settings):
    """Stage 0: which tokens of the donor, in which form, and where their vectors start."""

    method: Literal["merges", "added-tokens"] = "merges"
    """``merges`` makes every new encoding a coarsening of the old one; ``added-tokens`` is there for comparison."""
    order: Literal["donor", "corpus"] = "donor"
    """Which tokens come first: as the donor ranks them, or as often as the Korean texts of the run use them."""
    initialiser: Initialiser = "mean"
    """Where new vectors start, see `soju.embedding.expansion.initialise`."""
    init_probe: tuple[Initialiser, ...] = ()
    """Initialisers to choose from, in place of `initialiser`: each gets a short stage 1, and the one whose model scores
    highest on the watched Korean pairs afterwards is taken."""
    probe_steps: int = Field(default=50, ge=1)
    """Optimiser steps of that stage 1."""
    limit: int | None = Field(default=None, ge=1)
    """New tokens at most; all candidates when not given."""
    speed: bool = True
    """Measure how fast base and expanded tokenizer load and encode, some seconds for large ones."""


class StageSettings(TrainingSettings):
    """How a stage is optimised, watched and kept."""

    renamed: ClassVar[Mapping[str, str]] = {
        **TrainingSettings.renamed,
        "mini_batch": "mini_batch_size",
        "start_weight": "l2_sp_weight",
    }

    per_device_train_batch_size: int = Field(default=48, ge=2)
    """Texts of a batch on each process; each is contrasted with all others of all processes."""
    mini_batch_size: int | None = Field(default=None, ge=1)
    """Texts encoded at a time (cached gradients: memory of few, contrast of all); the whole batch when not given."""
    gradient_accumulation_steps: int = Field(default=1, ge=1)
    """Batches that make an optimiser step; texts of different ones are not contrasted."""
    num_train_epochs: float = Field(default=1, gt=0)
    """Passes over the texts, unless `max_steps` is given."""
    mixed_precision: Literal["fp16", "bf16", "off"] = "bf16"
    """Computation under autocast; what is trained stays float32. Write ``"off"`` in quotes."""
    max_length: int | None = Field(default=None, ge=4)
    """Tokens after which a text is cut in training; the model's own limit when not given."""
    eval_steps: int | None = Field(default=500, ge=1)
    """Optimiser steps between retention checks, each with a checkpoint."""


class UnsupervisedSettings(StageSettings):
    """What the stages share: Korean texts without labels, and an objective."""

    objective: Literal["simcse", "self_distillation"] = "simcse"
    """``simcse`` contrasts two passes under dropout; ``self_distillation`` teaches the new tokens what the model makes
    of the old ones."""
    texts: FilePart = ()
    """Sources of this stage's Korean texts; `data.korean` when not given."""
    max_texts: int | None = Field(default=None, ge=2)
    """Texts at most, spread evenly over all."""
    temperature: float = Field(default=0.05, gt=0)
    """SimCSE divides cosines by it."""
    dropout: float = Field(default=0.1, ge=0, lt=1)
    """Of attention, in training only: models such as Qwen3 have none of their own, and SimCSE needs some."""
    hidden_weight: float = Field(default=1.0, ge=0)
    """Self-distillation: weight of the hidden states at the last old piece of each new token."""
    pooled_weight: float = Field(default=1.0, ge=0)
    """Self-distillation: weight of the text's vector."""
    matryoshka: tuple[int, ...] = ()
    """Shorter lengths of the vector that must work as well; their losses and that of the whole are averaged."""
    anchor_weight: float = Field(default=0.0, ge=0)
    """Weight of pulling the Korean side of `data.pairs` to the untouched model's vector of the English side; 0 reads no
    pairs."""
    max_anchors: int | None = Field(default=None, ge=1)
    """Pairs that are anchored at most, spread evenly over all."""

    @model_validator(mode="after")
    def _teaches_something(self) -> Self:
        if self.objective == "simcse" and self.dropout == 0:
            raise ValueError("objective simcse needs dropout above 0: two equal passes teach nothing")
        if self.objective == "self_distillation" and self.hidden_weight == self.pooled_weight == 0:
            raise ValueError("objective self_distillation needs hidden_weight or pooled_weight above 0")
        if self.objective == "self_distillation" and self.mini_batch_size is not None:
            raise ValueError(
                "mini_batch_size is about simcse, which contrasts a batch; lower per_device_train_batch_size, raise "
                "gradient_accumulation_steps"
            )
        if any(dimension < 1 for dimension in self.matryoshka):
            raise ValueError("matryoshka holds lengths of 1 or more")
        return self


class Stage1Settings(UnsupervisedSettings):
    """Stage 1 trains embedding rows."""

    num_train_epochs: float = Field(default=2, gt=0)
    """Passes over the texts, unless `max_steps` is given."""
    train_rows: Literal["new", "all"] = "new"
    """``new`` leaves English vectors as they are to the bit; ``all`` is the plain variant."""


class ModuleAdapterSettings(Settings):
    """Adapters of stage 2 in the feed-forward part of each layer, see `soju.embedding.adapter_modules`."""

    kind: Literal["bottleneck", "gated", "parallel", "linear"] = "bottleneck"
    """How they are attached and what opens them; ``parallel`` and ``linear`` are folded into a plain model afterwards,
    the others are shipped with it."""
    hidden: int = Field(default=256, ge=1)
    """Width inside; a bottleneck has about 2 · width of the model · this many parameters."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Inside the adapter, in training."""
    top_layers: int | None = Field(default=None, ge=1)
    """Only the last so many layers get one; all when not given."""


class LoraSettings(Settings):
    """LoRA of stage 2 on the feed-forward part of each layer, through peft; merged into a plain model afterwards."""

    renamed: ClassVar[Mapping[str, str]] = {"hidden": "r", "dropout": "lora_dropout"}

    kind: Literal["lora"]
    r: int = Field(default=256, ge=1)
    """Rank of each update."""
    lora_dropout: float = Field(default=0.0, ge=0, lt=1)
    """Before an update, in training."""
    top_layers: int | None = Field(default=None, ge=1)
    """Only the last so many layers get one; all when not given."""


StageAdapters = Annotated[ModuleAdapterSettings | LoraSettings, Field(discriminator="kind")]


class Stage2Settings(UnsupervisedSettings):
    """Stage 2 trains adapters alone."""

    learning_rate: float = Field(default=3e-5, gt=0)
    """Peak of the linear schedule."""
    adapters: StageAdapters = ModuleAdapterSettings()
    """Parameters that are trained."""
    unfreeze_over: float = Field(default=0.0, ge=0, le=1)
    """Share of the steps over which adapters join in from the top layer down; 0 starts all at once."""

    @field_validator("adapters", mode="before")
    @classmethod
    def _bottleneck_by_default(cls, value: Any) -> Any:
        return {"kind": "bottleneck", **value} if isinstance(value, Mapping) else value


class Stage3Settings(UnsupervisedSettings):
    """Stage 3 trains the last transformer layers, gently."""

    learning_rate: float = Field(default=1e-5, gt=0)
    """Peak of the linear schedule."""
    blocks: int = Field(default=2, ge=1)
    """Layers from the top, with what they carry."""
    l2_sp_weight: float = Field(default=0.1, ge=0)
    """Weight of the squared distance to the weights that the stage started from."""


class SupervisedSettings(StageSettings):
    """Labelled pairs after the last stage."""

    similarity: FilePart = ()
    """Pairs with a score, for example KorSTS."""
    inference: FilePart = ()
    """Pairs with a relation, for example KorNLI: entailment attracts, contradiction repels."""
    loss: Literal["cosent", "cosine"] = "cosent"
    """Of scored pairs: CoSENT orders them, ``cosine`` takes the score as the cosine wanted."""
    trains: Literal["adapters", "blocks"] = "blocks"
    """Adapters alone, which a stage 2 must have made, or the last `blocks` layers."""
    blocks: int = Field(default=2, ge=1)
    """Layers from the top."""
    temperature: float = Field(default=0.05, gt=0)
    """CoSENT and the contrast of inference pairs divide cosines by it."""
    l2_sp_weight: float = Field(default=0.0, ge=0)
    """Weight of the squared distance to the weights that the phase started from."""

    @model_validator(mode="after")
    def _one_kind(self) -> Self:
        if bool(self.similarity) == bool(self.inference):
            raise ValueError("give either similarity or inference")
        return self


class RetentionSettings(Settings):
    """What training must keep. Beyond the budget it goes back to the last good checkpoint and learns more slowly."""

    english: FilePart = ()
    """Scored English pairs to watch; not those of `evaluation`."""
    korean: FilePart = ()
    """Scored Korean pairs to watch; the best checkpoint has the highest Spearman correlation on them."""
    held_out: float = Field(default=0.0, ge=0, lt=1)
    """Share of `data.passages` to keep out of training and watch, for want of scored pairs: in each language, a passage
    and its own query are alike, a passage and the next one's query are not."""
    max_pairs: int = Field(default=1000, ge=10)
    """Pairs of each language at most, spread evenly over all."""
    max_sentences: int = Field(default=500, ge=2)
    """English sentences whose vectors are compared with those of the untouched model."""
    english_drop: float = Field(default=0.01, ge=0)
    """Largest loss of Spearman correlation on the English pairs against the untouched model."""
    min_cosine: float = Field(default=0.9, ge=-1, le=1)
    """Lowest mean cosine of old and new vectors of English sentences."""
    korean_drop: float = Field(default=0.02, ge=0)
    """Largest loss of Spearman correlation on the Korean pairs against the start of the stage, and the best so far."""
    max_rollbacks: int = Field(default=2, ge=0)
    """How often a stage may go back before it gives up."""


class EmbeddingCardSettings(Settings):
    """What the model card says and nothing can compute."""

    licence: str = "other"
    """Licence of the weights by the hub's identifier."""
    licence_name: str | None = "as base model and training data"
    """Name of a licence the hub does not know."""
    command: str | None = None
    """Preset or file that trains the model; its name when not given."""


class EmbeddingConfig(Settings):
    """Recipe ``embedding``: a Korean vocabulary, adapters and three training stages for an embedding model."""

    recipe: Literal["embedding"]
    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")
    """Name of the run and of the model."""
    seed: int = Field(default=13, ge=0)
    """Seed of everything that is drawn."""
    data: EmbeddingDataSettings
    base: BaseSettings
    stages: tuple[Literal[0, 1, 2, 3], ...] = Field(default=(0, 1, 2), min_length=1)
    """Which stages to run, in this order; each starts from the accepted result of the one before."""
    expansion: ExpansionSettings = ExpansionSettings()
    stage1: Stage1Settings = Stage1Settings()
    stage2: Stage2Settings = Stage2Settings()
    stage3: Stage3Settings = Stage3Settings()
    supervised: SupervisedSettings | None = None
    """A phase on labelled pairs after the last stage; none when not given."""
    retention: RetentionSettings
    evaluation: EvaluationSettings = EvaluationSettings()
    card: EmbeddingCardSettings = EmbeddingCardSettings()

    @model_validator(mode="after")
    def _stages_fit(self) -> Self:
        if list(self.stages) != sorted(set(self.stages)):
            raise ValueError(f"stages {list(self.stages)}: give each once, in rising order")
        if 0 in self.stages and isinstance(self.base, PretrainedBase) and self.base.donor is None:
            raise ValueError("stage 0 needs base.donor, a tokenizer with the Korean vocabulary")
        if "aligned" in (self.expansion.initialiser, *self.expansion.init_probe) and not (
            self.data.pairs or self.data.passages
        ):
            raise ValueError("expansion.initialiser aligned learns from sentence pairs; give data.pairs")
        if self.expansion.init_probe and not {0, 1} <= set(self.stages):
            raise ValueError("expansion.init_probe needs stages 0 and 1")
        if self.supervised is not None and self.supervised.trains == "adapters" and 2 not in self.stages:
            raise ValueError("supervised.trains adapters needs stage 2, which makes them")
        return self

    @model_validator(mode="after")
    def _check_has_pairs(self) -> Self:
        watched = (self.retention.english and self.retention.korean) or (self.retention.held_out and self.data.passages)
        if (set(self.stages) - {0} or self.supervised) and not watched:
            raise ValueError(
                "training needs retention.english and retention.korean to be judged by, or retention.held_out of "
                "data.passages"
            )
        return self

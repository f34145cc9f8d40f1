"""What the training of a neural student starts from: the student, the static encoder below it, its teacher's vectors.

A student starts as a masked language model, as the static encoder, or from noise.

Shape letters: V = pieces in the vocabulary (terms are pieces too), D = hidden size, B = texts, S = tokens.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import count, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from numpy.typing import NDArray
from scipy.sparse import diags_array, eye_array
from tokenizers import Tokenizer
from torch import Tensor
from transformers import (
    AutoConfig,
    DataCollatorForLanguageModeling,
    ModernBertConfig,
    ModernBertForMaskedLM,
    PreTrainedTokenizerBase,
    get_linear_schedule_with_warmup,
)

from soju.core.errors import IntegrityError, UserError
from soju.core.files import verify_manifest, write_manifest
from soju.core.progress import track
from soju.core.run import Run
from soju.search.folder import idf
from soju.sparse.config import (
    NeuralConfig,
    PretrainedStudent,
    ScratchStudent,
    SearchSettings,
    StaticConfig,
    TeacherSettings,
    WarmUpSettings,
)
from soju.sparse.data import TrainingData
from soju.sparse.export.stock import SLACK, factorise_codes, normalised_pieces, stock_tokenizer
from soju.sparse.model import model_folder, search_settings_of
from soju.sparse.splade import SpladeEncoder
from soju.sparse.static.encoder import StaticEncoder
from soju.sparse.static.lexicon import strongest_terms
from soju.sparse.static.training import train_static
from soju.teachers.dense import Embeddings, SentenceTransformerTeacher, cached_embeddings, precomputed_embeddings
from soju.training.sampling import length_batches

_PRIOR_DOCUMENTS = 10_000
_DROPOUTS = (
    "hidden_dropout_prob", "attention_probs_dropout_prob", "embedding_dropout", "mlp_dropout", "attention_dropout",
)  # fmt: skip
_SPREAD = 0.05
"""Standard deviation of embeddings and head of a lexical start."""


@dataclass(frozen=True)
class Vocabulary:
    """What the ids of a student's vocabulary mean."""

    tokenizer: PreTrainedTokenizerBase
    term_of_V: NDArray[np.int64]
    """The term each piece counts for, ``(V,)``; -1 for pieces that never count, such as special tokens."""

    @cached_property
    def _pieces(self) -> Tokenizer:
        """The tokenizer without padding, cutting and special tokens, and without a wrapper around every row."""
        pieces = Tokenizer.from_str(self.tokenizer.backend_tokenizer.to_str())
        pieces.no_truncation()
        pieces.no_padding()
        return pieces

    def terms(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the terms each text holds, each once, in order of appearance."""
        rows = [encoding.ids for encoding in self._pieces.encode_batch_fast(list(texts), add_special_tokens=False)]
        return [[t for t in dict.fromkeys(self.term_of_V[row].tolist()) if t >= 0] if row else [] for row in rows]

    def input_ids(self, texts: Sequence[str], *, max_length: int) -> list[list[int]]:
        """Return what a model reads of each text: pieces and special tokens, at most `max_length`."""
        pieces = Tokenizer.from_str(self._pieces.to_str())
        pieces.enable_truncation(max_length)
        return [encoding.ids for encoding in pieces.encode_batch_fast(list(texts))]


def padded(ids: Sequence[Sequence[int]], *, pad_id: int) -> dict[str, Tensor]:
    """Return ``text_input_ids`` and ``text_attention_mask``, ``(B, S)`` with S the tokens of the longest text."""
    input_ids = torch.full((len(ids), max(map(len, ids))), pad_id, dtype=torch.long)
    mask = torch.zeros_like(input_ids)
    for place, text in enumerate(ids):
        input_ids[place, : len(text)] = torch.tensor(text)
        mask[place, : len(text)] = 1
    return {"text_input_ids": input_ids, "text_attention_mask": mask}


def plain_vocabulary(tokenizer: PreTrainedTokenizerBase) -> Vocabulary:
    """Let every piece count for itself, except special and unknown ones."""
    term_of_V = np.arange(len(tokenizer), dtype=np.int64)
    term_of_V[list(tokenizer.all_special_ids)] = -1
    return Vocabulary(tokenizer, term_of_V)


def lexicon_vocabulary(tokenizer: PreTrainedTokenizerBase, static: StaticEncoder) -> Vocabulary:
    """Let a piece count for the term the static encoder most often takes it for; particles count for nothing."""
    term_of_V = strongest_terms(static.canonical_VV).astype(np.int64)
    term_of_V[term_of_V == 0] = -1
    return Vocabulary(tokenizer, term_of_V)


def pretrained_student(settings: PretrainedStudent, *, similarity: str) -> SpladeEncoder:
    """Load a masked language model, or the best model of a run, as a student."""
    best = Path(settings.model) / "best"
    source = str(best) if best.is_dir() else settings.model
    more: dict[str, Any] = {}
    if settings.dropout is not None:
        more["config_kwargs"] = _dropouts(source, settings.dropout)
    return SpladeEncoder(source, max_seq_length=settings.max_length, similarity_fn_name=similarity, **more)


def _dropouts(source: str, dropout: float) -> dict[str, float]:
    """Return the dropouts of embeddings, layers and attention under the names its architecture has for them."""
    config = AutoConfig.from_pretrained(source)
    names = [name for name in _DROPOUTS if hasattr(config, name)]
    if not names:
        raise UserError(f"student.dropout: {config.model_type} has none of {', '.join(_DROPOUTS)}; leave it out")
    return dict.fromkeys(names, dropout)


def scratch_student(
    static: StaticEncoder, settings: ScratchStudent, texts: Sequence[str], *, similarity: str, seed: int
) -> SpladeEncoder:
    """Build a student over the vocabulary of a static encoder.

    With ``lexical``, embeddings and head hold the factorised table of the static encoder (see
    `soju.sparse.export.stock`), and the layers' output projections are zero, so that before the first step a text
    activates what the table says. Idf is in the table, as its square root on either side, because a neural index has
    none.

    `texts` are what the warm-up reads; `similarity` is saved with the model.
    """
    torch.manual_seed(seed)
    tokenizer = stock_tokenizer(static.tokenizer, max_length=settings.max_length, start_token=True)
    model = ModernBertForMaskedLM(_shape(settings, size=len(static.pieces)))
    if settings.init == "lexical":
        _write_table(model, static, settings, seed=seed)
    if settings.warm_up is not None:
        warm_up(model, tokenizer, texts, settings.warm_up, max_length=settings.max_length, seed=seed)
    return SpladeEncoder.from_model(
        model, tokenizer, max_seq_length=settings.max_length, similarity_fn_name=similarity, device="cpu"
    )


def _shape(settings: ScratchStudent, *, size: int) -> ModernBertConfig:
    unknown = 0  # it also starts and pads texts, see `stock_tokenizer`
    return ModernBertConfig(
        vocab_size=size,
        hidden_size=settings.hidden_size,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads,
        intermediate_size=settings.intermediate_size,
        max_position_embeddings=max(512, settings.max_length),
        global_attn_every_n_layers=1,
        classifier_activation="linear",  # the head must hand a normalised row through
        tie_word_embeddings=settings.init == "random",
        pad_token_id=unknown,
        bos_token_id=unknown,
        eos_token_id=unknown,
        cls_token_id=unknown,
        sep_token_id=unknown,
    )


def _write_table(model: ModernBertForMaskedLM, static: StaticEncoder, settings: ScratchStudent, *, seed: int) -> None:
    size = len(static.pieces)
    idf_V = idf(
        np.zeros(size, np.int64), 0, prior_documents=_PRIOR_DOCUMENTS, prior_share_V=static.document_share_V
    )  # fmt: skip
    own_VV = eye_array(size, dtype=np.float32, format="csr")
    expansion_VV = own_VV + settings.translation_share * static.translations_VV
    weights_VV = (static.canonical_VV @ expansion_VV @ diags_array(np.sqrt(idf_V))).tocsr().astype(np.float32)
    factors = factorise_codes(weights_VV, hidden_size=settings.hidden_size, seed=seed)
    rows_VD, scale = normalised_pieces(factors.pieces_VC)
    terms_VC = factors.terms_VC / np.float32(scale)
    # Adam moves every weight by about the learning rate: embeddings of standard deviation 1 would stand still while a
    # head of 0.006 fell apart. Both get the usual one; a LayerNorm behind either takes the factor out again.
    head_factor = _SPREAD / float(terms_VC.std())
    with torch.no_grad():
        model.model.embeddings.tok_embeddings.weight.copy_(torch.from_numpy(rows_VD * np.float32(_SPREAD)))
        for layer in model.model.layers:
            layer.attn.Wo.weight.zero_()
            layer.mlp.Wo.weight.zero_()
        model.head.dense.weight.copy_(torch.eye(settings.hidden_size))
        model.decoder.weight.zero_()
        model.decoder.weight[:, :-SLACK] = torch.from_numpy(terms_VC * np.float32(head_factor))
        model.head.norm.weight.fill_(1 / head_factor)
        model.decoder.bias.copy_(torch.from_numpy(-factors.bias_V))


def warm_up(
    model: ModernBertForMaskedLM,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    settings: WarmUpSettings,
    *,
    max_length: int,
    seed: int,
    batch_size: int = 64,
) -> None:
    """Teach a model in place to guess masked pieces; the unknown piece stands for a masked one.

    A plain loop, because under torchrun only the first rank runs it, and a trainer would wait for the others.
    """
    tokenizer.mask_token = tokenizer.unk_token
    generator = np.random.default_rng(seed)
    chosen = generator.choice(len(texts), size=min(len(texts), settings.steps * batch_size), replace=False)
    rows = tokenizer([texts[index] for index in chosen], truncation=True, max_length=max_length)["input_ids"]
    collate = DataCollatorForLanguageModeling(tokenizer, mlm_probability=settings.masked, seed=seed)
    device = PartialState().device
    model.to(device).train()
    model.config.sparse_prediction = True  # logits of masked pieces alone
    optimiser = torch.optim.AdamW(model.parameters(), lr=settings.learning_rate, weight_decay=0.0)
    schedule = get_linear_schedule_with_warmup(optimiser, settings.steps // 10, settings.steps)
    batches = islice(_passes(rows, batch_size, seed=seed), settings.steps)
    for batch in track(batches, "warm-up", total=settings.steps):
        masked = collate([{"input_ids": row} for row in batch]).to(device)
        if (masked["labels"] >= 0).any():
            model(**masked).loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimiser.step()
            optimiser.zero_grad()
        schedule.step()
    model.to("cpu").eval()
    model.config.sparse_prediction = False
    tokenizer.mask_token = None


def _passes(rows: Sequence[list[int]], batch_size: int, *, seed: int) -> Iterator[list[list[int]]]:
    lengths = np.array([len(row) for row in rows], np.int64)
    for epoch in count():
        for batch in length_batches(lengths, batch_size, seed=seed, epoch=epoch):
            yield [rows[index] for index in batch]


STATIC = "static"
"""Folder in a run that holds the static encoder its student began as."""


class Start:
    """The student before its first step, and the static encoder below it; kept in the run folder.

    A student that goes on from a run of ours keeps the static encoder of that run, because the pieces of its vocabulary
    stand for the terms of that encoder.
    """

    def __init__(self, config: NeuralConfig, run_dir: Run, training: TrainingData, *, workers: int) -> None:
        self._config = config
        self._training = training
        self._workers = workers
        self._static_folder = run_dir.folder / STATIC
        self._student_folder = run_dir.folder / "untrained"

    def prepare(self) -> None:
        """Make whatever an earlier start of this run has not finished."""
        if not _is_whole(self._static_folder):
            self._prepare_static()
        if not _is_whole(self._student_folder):
            self._build().save(str(self._student_folder), create_model_card=False)
            write_manifest(self._student_folder)

    def _prepare_static(self) -> None:
        student = self._config.student
        if isinstance(student, PretrainedStudent):
            below = Path(student.model) / STATIC
            if _is_whole(below):
                shutil.copytree(below, self._static_folder, dirs_exist_ok=True)
        elif student.static_model is not None:
            source = model_folder(student.static_model)
            StaticEncoder.load(source)
            shutil.copytree(source, self._static_folder, dirs_exist_ok=True)
        else:
            settings = StaticConfig(
                recipe="splade",
                mode="static",
                name=self._config.name,
                seed=self._config.seed,
                data=self._config.data.model_dump(include={"root", "pairs", "passages", "select"}),
                **student.static.model_dump(),
            )
            train_static(self._training.pairs, self._training.terms, settings, workers=self._workers).save(
                self._static_folder
            )

    def _build(self) -> SpladeEncoder:
        student, similarity = self._config.student, self._config.similarity
        if isinstance(student, PretrainedStudent):
            return pretrained_student(student, similarity=similarity)
        assert self.static is not None
        texts = [text for pair in self._training.pairs for text in (pair.ko, pair.en)]
        return scratch_student(self.static, student, texts, similarity=similarity, seed=self._config.seed)

    @cached_property
    def static(self) -> StaticEncoder | None:
        """The static encoder; none below a pretrained student that is not ours."""
        return StaticEncoder.load(self._static_folder) if _is_whole(self._static_folder) else None

    @property
    def search(self) -> SearchSettings:
        """How the static encoder's documents are weighted."""
        student = self._config.student
        if isinstance(student, ScratchStudent) and student.static_model is None:
            return student.static.search
        return search_settings_of(self._static_folder)

    def student(self) -> SpladeEncoder:
        """Return a fresh copy of the student as it starts."""
        return SpladeEncoder(str(self._student_folder), max_seq_length=self._config.student.max_length)

    @cached_property
    def vocabulary(self) -> Vocabulary:
        """What the ids of its vocabulary mean."""
        tokenizer = self.student().tokenizer
        return plain_vocabulary(tokenizer) if self.static is None else lexicon_vocabulary(tokenizer, self.static)


def load_teacher(settings: TeacherSettings) -> SentenceTransformerTeacher:
    """Load a teacher that is given as a model."""
    assert settings.model is not None
    return SentenceTransformerTeacher(
        settings.model,
        revision=settings.revision,
        max_length=settings.max_length,
        prompt=settings.prompt,
        batch_size=settings.batch_size,
    )


def teacher_embeddings(settings: TeacherSettings, texts: Sequence[str]) -> Embeddings:
    """Embed what the teacher reads once, cached by content, or look it up in the user's own vectors."""
    if settings.vectors is not None:
        return precomputed_embeddings(settings.vectors, texts)
    return cached_embeddings(load_teacher(settings), texts, settings.cache)


def dense_searcher(teacher: TeacherSettings | None) -> Callable[[Sequence[str]], NDArray[np.float32]] | None:
    """Return the teacher as a dense searcher, when it is a model that reads both languages."""
    if teacher is None or teacher.model is None or teacher.text == "translation":
        return None

    def embed(texts: Sequence[str]) -> NDArray[np.float32]:
        return np.asarray(teacher_embeddings(teacher, texts))

    return embed


def _is_whole(folder: Path) -> bool:
    try:
        verify_manifest(folder)
    except IntegrityError:
        return False
    return True

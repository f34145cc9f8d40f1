"""A base made without a hub: a tokenizer that knows English, a small encoder like Qwen3, a donor tokenizer.

What comes out is the kind of folder that Qwen3-Embedding is: byte-level BPE, ``<|endoftext|>`` at the end of each text,
padding on the left, the vector of the last token (or the mean of all), length 1.

Shape letters: N = texts, V = tokens, T = width of the teacher's vectors, D = width of the student's.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState
from numpy.typing import NDArray
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Transformer
from sentence_transformers.sentence_transformer.modules import Normalize, Pooling
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch import Tensor
from transformers import Qwen3Config, Qwen3Model

from soju.core.errors import UserError
from soju.core.files import write_json, write_manifest, write_text
from soju.data.statistics import spread
from soju.embedding.adapters import load_float32
from soju.embedding.config import DistillationSettings, ScratchBase, StageSettings
from soju.embedding.data import Collator, EmbeddingData, LabelledPairs, Rows, TextRows, encoder_of
from soju.embedding.losses import StageLoss
from soju.embedding.trainer import (
    StageTrainer,
    all_group,
    is_whole,
    load_trainable,
    places_of,
    refuse_few_rows,
    stage_arguments,
    transformer_of,
)
from soju.teachers.dense import SentenceTransformerTeacher, cached_embeddings
from soju.training.checkpoints import newest_verified, publish, resume_path
from soju.training.ranks import on_main_process
from soju.training.state import seeded

PRE_TOKENIZER = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
END, TURN_END = "<|endoftext|>", "<|im_end|>"
SPECIALS = (
    END, "<|im_start|>", TURN_END, "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>", "<|box_end|>",
    "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>",
    "<|video_pad|>",
)  # fmt: skip
PLAIN = (
    "<tool_call>", "</tool_call>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>", "<|repo_name|>",
    "<|file_sep|>", "<tool_response>", "</tool_response>", "<think>", "</think>",
)  # fmt: skip
"""Added tokens that are no special ones; all ids lie behind the vocabulary, in this order."""
BYTES = 256


def train_byte_bpe(texts: Iterable[str], vocabulary: int, folder: Path, *, max_length: int = 512) -> Tokenizer:
    """Train a tokenizer and write what AutoTokenizer needs to read it again.

    Merges are chosen by counts alone, so equal texts give equal tokenizers.

    Args:
        texts: What to learn from.
        vocabulary: Tokens without the added ones; fewer when the texts hold no more.
        folder: Gets ``tokenizer.json`` and ``tokenizer_config.json``.
        max_length: Tokens that a model takes at most, for the configuration.

    Returns:
        The tokenizer. ``<|endoftext|>`` ends each text and pads on the left.

    Raises:
        UserError: If `vocabulary` has no room for more than the 256 bytes.
    """
    if vocabulary <= BYTES:
        raise UserError(f"vocabulary: {vocabulary} tokens; a byte-level tokenizer needs more than {BYTES}")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PRE_TOKENIZER), behavior="isolated", invert=False),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, min_frequency=2, initial_alphabet=sorted(alphabet), show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIALS])
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in PLAIN])
    tokenizer.post_processor = processors.Sequence(
        [
            processors.ByteLevel(add_prefix_space=False, trim_offsets=False, use_regex=False),
            processors.TemplateProcessing(
                single=f"$A {END}", pair=f"$A {END} $B:1 {END}:1", special_tokens=[(END, tokenizer.token_to_id(END))]
            ),
        ]
    )
    write_text(folder / "tokenizer.json", json.dumps(json.loads(tokenizer.to_str()), ensure_ascii=False))
    write_json(folder / "tokenizer_config.json", _configuration(tokenizer, max_length))
    return tokenizer


def _configuration(tokenizer: Tokenizer, max_length: int) -> dict[str, object]:
    """Return what Qwen3-Embedding's folder says of its tokenizer."""
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    return {
        "added_tokens_decoder": {
            str(tokenizer.token_to_id(token)): {"content": token, **flags, "special": token in SPECIALS}
            for token in (*SPECIALS, *PLAIN)
        },
        "additional_special_tokens": [token for token in SPECIALS if token not in (END, TURN_END)],
        "bos_token": None,
        "clean_up_tokenization_spaces": False,
        "eos_token": TURN_END,
        "errors": "replace",
        "model_max_length": max_length,
        "pad_token": END,
        "padding_side": "left",
        "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": None,
    }


BASE, DONOR = "base", "donor"
"""Folders of a run that hold them."""


def make_scratch_base(settings: ScratchBase, data: EmbeddingData, folder: Path, *, seed: int) -> tuple[Path, Path]:
    """Make base and donor below the run folder, or find what an earlier start of the run has finished.

    Raises `UserError` if there are no English texts, or too few rows.
    """
    if not data.english:
        raise UserError("base: kind scratch needs English texts; give data.english, data.pairs or data.passages")
    donor, base = folder / DONOR, folder / BASE
    untrained = folder / "training" / BASE / "untrained"
    with PartialState().main_process_first():
        # 1. A donor tokenizer on the Korean texts.
        if not is_whole(donor):
            texts = spread(data.korean, settings.tokenizer_texts or len(data.korean))
            train_byte_bpe(texts, settings.donor_vocabulary, _empty(donor))
            write_manifest(donor)
        if is_whole(base):
            return base, donor
        # 2. The untrained encoder with a tokenizer that is mostly English.
        if not is_whole(untrained):
            train_byte_bpe(
                _mixed(settings, data), settings.vocabulary, _empty(untrained), max_length=settings.max_length
            )
            _untrained(settings, untrained, seed=seed).save(str(untrained), create_model_card=False)
            write_manifest(untrained)
    # 3. Learn to embed, from a teacher or from pairs.
    trained = train_base(untrained, settings.distillation, data, folder / "training" / BASE, seed=seed)
    # 4. Publish it whole.
    on_main_process(lambda: _publish(trained, folder))
    return base, donor


def _publish(trained: SentenceTransformer, folder: Path) -> None:
    staged = _empty(folder / f".{BASE}.saving")
    trained.save(str(staged), create_model_card=False)
    publish(staged, folder / BASE)


def _empty(folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def _mixed(settings: ScratchBase, data: EmbeddingData) -> Iterator[str]:
    """Yield the texts of the base's tokenizer: English, and Korean until it has its share of the characters."""
    english = spread(data.english, settings.tokenizer_texts or len(data.english))
    yield from english
    share = settings.korean_share
    wanted = sum(map(len, english)) * share / (1 - share) if share < 1 else float("inf")
    given = 0
    for text in spread(data.korean, settings.tokenizer_texts or len(data.korean)) if share else ():
        if given >= wanted:
            return
        yield text
        given += len(text)


def _untrained(settings: ScratchBase, folder: Path, *, seed: int) -> SentenceTransformer:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(folder))
    configuration = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=settings.hidden_size,
        intermediate_size=settings.intermediate_size,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads,
        num_key_value_heads=settings.key_value_heads,
        head_dim=settings.hidden_size // settings.heads,
        max_position_embeddings=max(512, settings.max_length),
        pad_token_id=tokenizer.convert_tokens_to_ids(END),
        bos_token_id=tokenizer.convert_tokens_to_ids(END),
        eos_token_id=tokenizer.eos_token_id,
    )
    with seeded(seed):
        model = Qwen3Model(configuration).float()
    model.save_pretrained(folder)
    transformer = Transformer(str(folder), max_seq_length=settings.max_length, model_kwargs={"dtype": "float32"})
    return SentenceTransformer(
        modules=[transformer, Pooling(settings.hidden_size, settings.pooling), Normalize()], device="cpu"
    )


def train_base(
    start: Path, settings: DistillationSettings, data: EmbeddingData, folder: Path, *, seed: int
) -> SentenceTransformer:
    """Teach an untrained encoder to embed; a training that was begun goes on.

    Raises `UserError` if there are too few texts or pairs.
    """
    model = load_float32(start)
    groups = [all_group(model)]
    optimiser = StageSettings(
        per_device_train_batch_size=settings.per_device_train_batch_size,
        max_steps=settings.max_steps,
        learning_rate=settings.learning_rate,
        mixed_precision="bf16" if torch.cuda.is_available() else "off",
        eval_steps=settings.save_steps,
    )
    rows: Rows
    if settings.teacher is None:
        pairs = spread(data.pairs, settings.texts)
        rows = LabelledPairs([pair.ko for pair in pairs], [pair.en for pair in pairs], [1.0] * len(pairs))
        lengths, loss = rows.lengths, StageLoss(model, "inference", settings)
    else:
        with PartialState().main_process_first():
            rows = taught_rows(settings, data)
        # Tokens, not characters: a base that spells Korean in bytes needs far more for it than characters tell.
        lengths = np.array([len(ids) for ids in encoder_of(model, max_length=None)(rows.texts)], np.int64)
        assert rows.targets_ND is not None
        project_DT = projection(rows.targets_ND, model.get_embedding_dimension())
        if settings.rows_from_teacher:
            with PartialState().main_process_first():
                rows_from_teacher(model, settings, project_DT)
        loss = StageLoss(model, "target", settings, complete=partial(_projected, project_DT))
    refuse_few_rows(len(rows), optimiser, place="data.pairs", ranks=PartialState().num_processes)
    trainer = StageTrainer(
        groups=groups,
        model=model,
        args=stage_arguments(optimiser, folder, lengths, seed=seed, chosen_by=None),
        train_dataset=places_of(rows),
        loss=loss,
        data_collator=Collator(rows, model),
        history=folder / "history.jsonl",
    )
    begun = on_main_process(lambda: resume_path(folder / "checkpoints").path)
    trainer.train(begun)
    last = newest_verified(folder / "checkpoints").path
    if last is None:
        raise UserError(f"{folder}: no checkpoint verifies after training; look at the disk and train again")
    trained = load_float32(start)
    load_trainable([all_group(trained)], last)
    return trained


def _projected(project_DT: Tensor | None, labels: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Turn the teacher's vectors of a batch into such of the student's width."""
    if project_DT is None:
        return labels
    return {**labels, "target": labels["target"] @ project_DT.to(labels["target"].device).T}


def taught_rows(settings: DistillationSettings, data: EmbeddingData) -> TextRows:
    """Return English texts, and Korean sides of pairs, with the teacher's vectors of the English."""
    assert settings.teacher is not None
    english = spread(data.english, settings.texts)
    translated = {pair.en: pair.ko for pair in data.pairs}
    with_korean = [place for place, text in enumerate(english) if text in translated]
    with_korean = spread(with_korean, round(settings.pair_share * len(english)))
    targets_ND = np.asarray(
        cached_embeddings(SentenceTransformerTeacher(settings.teacher), english, settings.cache), np.float32
    )
    korean = [translated[english[place]] for place in with_korean]
    target_of = np.concatenate([np.arange(len(english)), np.array(with_korean, np.int64)])
    return TextRows([*english, *korean], targets_ND, target_of.astype(np.int64))


def projection(targets_ND: NDArray[np.float32], width: int) -> Tensor | None:
    """Return the directions in which the teacher's vectors differ most, ``(width, D)``; none when widths are equal.

    A narrower student learns the teacher's vectors in these directions (principal components without centring), which
    keeps cosines as well as so few numbers can.
    """
    if targets_ND.shape[1] == width:
        return None
    if targets_ND.shape[1] < width:
        raise UserError(
            f"base.hidden_size: {width} is wider than the teacher's vectors, {targets_ND.shape[1]}; give at most that"
        )
    second_DD = targets_ND.T.astype(np.float64) @ targets_ND
    _, vectors_DD = np.linalg.eigh(second_DD)
    leading_TD = vectors_DD[:, ::-1][:, :width].T
    signs_T = np.sign(leading_TD[np.arange(width), np.abs(leading_TD).argmax(axis=1)])
    return torch.from_numpy((leading_TD * signs_T[:, None]).astype(np.float32))


@torch.no_grad()
def rows_from_teacher(model: SentenceTransformer, settings: DistillationSettings, project_DT: Tensor | None) -> None:
    """Set a token's embedding to the teacher's vector of its text, as static embeddings are distilled (model2vec).

    Vectors are projected, centred and given the length of a normalised hidden state, so that the mean of a text's
    tokens means something before the first step. Tokens that are part of a character keep what they have.
    """
    assert settings.teacher is not None
    tokenizer, special = model.tokenizer, set(model.tokenizer.all_special_ids)
    texts = {token: tokenizer.decode([token]).strip() for token in range(len(tokenizer)) if token not in special}
    texts = {token: text for token, text in texts.items() if text and "\N{REPLACEMENT CHARACTER}" not in text}
    vectors_NT = torch.from_numpy(
        np.asarray(
            cached_embeddings(SentenceTransformerTeacher(settings.teacher), list(texts.values()), settings.cache),
            np.float32,
        )
    )
    vectors_ND = vectors_NT if project_DT is None else vectors_NT @ project_DT.T
    vectors_ND = torch.nn.functional.normalize(vectors_ND - vectors_ND.mean(dim=0), dim=1)
    embedding_VD = transformer_of(model).get_input_embeddings().weight  # type: ignore[operator]
    embedding_VD[torch.tensor(list(texts))] = (vectors_ND * vectors_ND.shape[1] ** 0.5).to(embedding_VD)

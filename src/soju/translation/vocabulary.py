"""The vocabulary both languages share: unigram pieces, with fixed ids for what is no text, and batches for M2M100.

Texts are brought to NFC and white space is folded; nothing else is normalised. NFKC, which SentencePiece applies by
default, would turn ㅋㅋ into conjoining jamo. Shape letters: B = pairs, S = source and T = target positions.
"""

from __future__ import annotations

import hashlib
import json
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch import Tensor

from soju.core.errors import IntegrityError, UserError
from soju.core.files import write_text
from soju.translation.data import (
    DIRECTIONS,
    GLOSSARY_MARKS,
    PLACEHOLDERS,
    Language,
    TranslationPair,
    fold_spaces,
    protect,
)
from soju.translation.loss import IGNORED

BOS, PAD, EOS, UNK = range(4)
CONTROLS = ("<s>", "<pad>", "</s>", "<unk>")
TAGS: Mapping[Language, str] = {"ko": "__ko__", "en": "__en__"}
PLACEHOLDER_MARKS = tuple(f"__p{number}__" for number in range(1, PLACEHOLDERS + 1))
RESERVED = (*CONTROLS, *TAGS.values(), *PLACEHOLDER_MARKS, *GLOSSARY_MARKS)
"""What has the first ids, in this order."""
BYTE_FALLBACK_FROM = 16_000
"""Vocabularies of this size and larger spell rare characters in bytes; in smaller ones 256 bytes cost too much."""
_BYTES = tuple(f"<0x{value:02X}>" for value in range(256))
_UNTRANSLATED = frozenset(range(len(CONTROLS) + len(TAGS)))
_MOST_BYTES = 1 << 26
FILE = "tokenizer.json"


class Vocabulary:
    """Texts to ids and back. Made by `train_vocabulary` or `load`."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        found = [tokenizer.id_to_token(number) for number in range(len(RESERVED))]
        if found != list(RESERVED):
            raise UserError(
                f"vocabulary: its first ids are {', '.join(map(str, found[:6]))} …; use one that soju made, with "
                f"{', '.join(RESERVED[:6])} … first"
            )

    def __len__(self) -> int:
        return int(self.tokenizer.get_vocab_size())

    @property
    def fingerprint(self) -> str:
        """Hash of everything that decides ids."""
        value = json.loads(self.tokenizer.to_str())
        return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]

    def tag(self, language: Language) -> int:
        """Return the id of a language's tag."""
        return len(CONTROLS) + list(TAGS).index(language)

    def encode(self, text: str) -> list[int]:
        """Return the pieces of a text alone."""
        folded = fold_spaces(unicodedata.normalize("NFC", text))
        return list(self.tokenizer.encode(folded, add_special_tokens=False).ids)

    def encode_tagged(self, text: str, language: Language) -> list[int]:
        """Return ``__ko__ x </s>``: what the encoder reads, and what the decoder must write."""
        return [self.tag(language), *self.encode(text), EOS]

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of ids up to the first ``</s>`` behind the start; tags and controls are left out."""
        kept: list[int] = []
        for number in ids:
            if number == EOS and kept:
                break
            if number not in _UNTRANSLATED:
                kept.append(number)
        return fold_spaces(self.tokenizer.decode(kept, skip_special_tokens=False))

    def save(self, folder: Path) -> None:
        """Write ``tokenizer.json`` and what transformers needs to load it as a fast tokenizer."""
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / FILE, self.tokenizer.to_str(pretty=True))
        value = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            **dict(zip(("bos_token", "pad_token", "eos_token", "unk_token"), CONTROLS, strict=True)),
            "clean_up_tokenization_spaces": False,
        }
        write_text(folder / "tokenizer_config.json", json.dumps(value, indent=2) + "\n")

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Read what `save` wrote (`IntegrityError` if it is missing or is no tokenizer)."""
        path = folder / FILE
        try:
            if path.is_symlink() or not path.is_file() or path.stat().st_size > _MOST_BYTES:
                raise OSError("no regular file of the usual size")
            tokenizer = Tokenizer.from_str(path.read_text(encoding="utf-8"))
        except Exception as error:  # tokenizers raises bare exceptions
            raise IntegrityError(f"{path}: no tokenizer ({error}); copy it from where the model was made") from None
        return cls(tokenizer)


def train_vocabulary(texts: Iterable[str], size: int) -> Vocabulary:
    """Learn unigram pieces.

    Args:
        texts: Training texts of both languages.
        size: Ids in all; fewer when the texts have not so many pieces.

    Returns:
        The vocabulary. Two calls may differ in a few pieces, as tokenizers prunes in the order of a hash table with a
        random seed: keep the one that a model was trained with.

    Raises:
        UserError: If the size leaves no room for pieces.
    """
    with_bytes = size >= BYTE_FALLBACK_FROM
    fixed = len(RESERVED) + len(_BYTES) * with_bytes
    if size < fixed + 64:
        raise UserError(
            f"vocabulary.size: {size:,} leaves no room beside {fixed} fixed ids; give at least {fixed + 64}"
        )
    # Bytes and reserved marks are put in place afterwards: pieces that the trainer learns are plain text.
    learner = _around(models.Unigram())
    learner.train_from_iterator(
        (fold_spaces(unicodedata.normalize("NFC", text)) for text in texts),
        trainers.UnigramTrainer(
            vocab_size=size - fixed + 1, special_tokens=["<unk>"], unk_token="<unk>", show_progress=False
        ),
    )
    learnt = [(piece, round(score, 4)) for piece, score in json.loads(learner.to_str())["model"]["vocab"][1:]]
    learnt = [entry for entry in learnt if entry[0] not in RESERVED and entry[0] not in _BYTES]
    learnt.sort(key=lambda entry: (-entry[1], entry[0]))
    if not learnt:
        raise UserError("vocabulary: the texts hold no character to learn pieces from; give training texts")
    least = learnt[-1][1]
    pieces = [*((mark, 0.0) for mark in RESERVED), *((byte, least) for byte in _BYTES if with_bytes), *learnt]
    return Vocabulary(_around(models.Unigram(pieces, unk_id=UNK, byte_fallback=with_bytes), marks=True))


def _around(model: Any, *, marks: bool = False) -> Tokenizer:
    tokenizer = Tokenizer(model)
    # No stripping here: it would eat the space before and behind a placeholder, where a text is cut.
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " ")])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.decoder = decoders.Sequence(
        [decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="first")]  # bytes first: they become pieces
    )
    if marks:
        special = [AddedToken(mark, special=True, normalized=False) for mark in (*CONTROLS, *TAGS.values())]
        tokenizer.add_special_tokens(special)
        tokenizer.add_tokens(
            [AddedToken(mark, special=False, normalized=False) for mark in (*PLACEHOLDER_MARKS, *GLOSSARY_MARKS)]
        )
    return tokenizer


@dataclass(frozen=True, slots=True)
class EncodedRow:
    """One pair in one direction."""

    source: list[int]
    target: list[int]


class EncodedPairs(torch.utils.data.Dataset[EncodedRow]):
    """Pairs in both directions as ids: row 2 i is the first direction of pair i, row 2 i + 1 the second."""

    def __init__(self, pairs: Sequence[TranslationPair], vocabulary: Vocabulary, *, max_length: int) -> None:
        self.rows: list[EncodedRow] = []
        self.too_long = 0
        """Pairs left out because a side has more ids than `max_length`."""
        for pair in pairs:
            ko, en, _ = protect(pair.ko, pair.en)
            sides = {"ko": vocabulary.encode_tagged(ko, "ko"), "en": vocabulary.encode_tagged(en, "en")}
            if max(map(len, sides.values())) > max_length:
                self.too_long += 1
                continue
            self.rows += [EncodedRow(sides[source], sides[target]) for source, target in DIRECTIONS]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> EncodedRow:
        return self.rows[index]

    @property
    def lengths(self) -> list[int]:
        """Length of each row by which batches are formed."""
        return [max(len(row.source), len(row.target)) for row in self.rows]


def collate(rows: Sequence[EncodedRow]) -> dict[str, Tensor]:
    """Pad rows to a batch for M2M100.

    The decoder reads ``</s>`` and then the labels without their last one. It is made here, as the stock trainer
    withholds the labels from a model whose loss is not its own.

    Args:
        rows: B rows.

    Returns:
        ``input_ids`` and ``attention_mask`` ``(B, S)``, ``labels`` and ``decoder_input_ids`` ``(B, T)``.
    """
    source = _padded([row.source for row in rows], PAD)
    labels = _padded([row.target for row in rows], IGNORED)
    inputs = torch.full_like(labels, EOS)
    inputs[:, 1:] = labels[:, :-1].masked_fill(labels[:, :-1] == IGNORED, PAD)
    return {
        "input_ids": source,
        "attention_mask": (source != PAD).long(),
        "decoder_input_ids": inputs,
        "labels": labels,
    }


def _padded(rows: Sequence[Sequence[int]], value: int) -> Tensor:
    longest = max(map(len, rows))
    return torch.tensor([[*row, *[value] * (longest - len(row))] for row in rows])

"""The three ways a user loads a tokenizer: the tokenizers library, AutoTokenizer, SentenceTransformer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from soju.embedding.expansion.byte_bpe import TOKENIZER_FILE

Encode = Callable[[Sequence[str], bool], list[list[int]]]


@dataclass(frozen=True, slots=True)
class Loaded:
    """A tokenizer as one way of loading gives it."""

    way: str
    encode: Encode
    """Texts, and whether special tokens go around them, to ids."""
    decode: Callable[[list[int]], str]
    backend: Tokenizer
    settings: Mapping[str, Any]
    """What else must survive: special tokens, padding side, chat template."""


def load_plain(folder: Path) -> Loaded:
    """Load ``tokenizer.json`` with the tokenizers library."""
    backend = Tokenizer.from_file(str(folder / TOKENIZER_FILE))
    backend.no_truncation()
    backend.no_padding()

    def encode(texts: Sequence[str], special: bool) -> list[list[int]]:
        return [found.ids for found in backend.encode_batch_fast(list(texts), add_special_tokens=special)]

    def decode(ids: list[int]) -> str:
        return backend.decode(ids, skip_special_tokens=False)

    return Loaded("tokenizers", encode, decode, backend, {})


def load_auto(folder: Path) -> Loaded:
    """Load a folder with AutoTokenizer, which builds some classes anew from vocabulary and merges."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    return of_transformers("AutoTokenizer", tokenizer)


def of_transformers(way: str, tokenizer: Any) -> Loaded:
    """Wrap a tokenizer of transformers."""

    def encode(texts: Sequence[str], special: bool) -> list[list[int]]:
        if not texts:
            return []
        return tokenizer(
            list(texts), add_special_tokens=special, truncation=False, return_attention_mask=False, verbose=False
        )["input_ids"]

    def decode(ids: list[int]) -> str:
        return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)

    settings = {
        "special_tokens": {name: str(token) for name, token in tokenizer.special_tokens_map.items()},
        "special_ids": sorted(tokenizer.all_special_ids),
        "padding_side": tokenizer.padding_side,
        "truncation_side": tokenizer.truncation_side,
        "model_max_length": tokenizer.model_max_length,
        "chat_template": tokenizer.chat_template,
        "class": type(tokenizer).__name__,
    }
    return Loaded(way, encode, decode, tokenizer.backend_tokenizer, settings)

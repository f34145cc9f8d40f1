"""Write an expanded tokenizer beside its model so that every loader reads the same ids.

The three ways a user loads a tokenizer: the tokenizers library, AutoTokenizer, SentenceTransformer.

How fast does an expanded tokenizer load and encode, beside its base and beside added tokens?
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from soju.core.errors import UserError
from soju.core.files import write_json, write_text
from soju.embedding.expansion.byte_bpe import TOKENIZER_FILE, ByteBpe
from soju.embedding.expansion.merges import Expansion, expand_by_added_tokens

CONFIG_FILE = "tokenizer_config.json"
KEPT_FILES = (
    CONFIG_FILE,
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "additional_chat_templates",
)
"""Copied as they are: special tokens, padding side, chat template. All ids they name keep their meaning."""
_STALE_FILES = ("vocab.json", "merges.txt", "vocab.txt")


def write_tokenizer(base: ByteBpe, expansion: Expansion, folder: Path) -> None:
    """Write ``tokenizer.json`` and the base's other tokenizer files.

    The base's added tokens enter the model's vocabulary with their ids: on loading, the library ignores the stored ids
    of added tokens and numbers those on that the vocabulary lacks, which would put special tokens behind the new ones.

    Args:
        base: The tokenizer that was expanded, loaded from a folder or made in memory.
        expansion: What it gets.
        folder: Where to write; files of an older vocabulary are removed from it.

    Raises:
        UserError: If the expansion belongs to another base.
    """
    if expansion.first_id != base.size:
        raise UserError(
            f"the expansion starts at id {expansion.first_id:,}, but {base.name} has {base.size:,} ids; give the base "
            f"it was made for"
        )
    folder.mkdir(parents=True, exist_ok=True)
    for name in KEPT_FILES:
        if base.folder is not None:
            _copy(base.folder / name, folder / name)
    for name in _STALE_FILES:
        (folder / name).unlink(missing_ok=True)
    if expansion.method == "added-tokens":
        _list_added_tokens(expansion, folder / CONFIG_FILE)
    write_text(folder / TOKENIZER_FILE, json.dumps(expanded_spec(base, expansion), ensure_ascii=False))


def expanded_spec(base: ByteBpe, expansion: Expansion) -> dict[str, Any]:
    """Return the ``tokenizer.json`` of the expanded tokenizer; everything but vocabulary and merges is the base's."""
    model = base.spec["model"]
    vocabulary = {**base.vocabulary, **base.added_tokens}
    merges = list(model["merges"])
    added = list(base.spec.get("added_tokens") or ())
    if expansion.method == "merges":
        vocabulary |= {token: expansion.first_id + place for place, token in enumerate(expansion.tokens)}
        as_text = bool(merges) and isinstance(merges[0], str)
        merges += [" ".join(pair) if as_text else list(pair) for pair in expansion.merges]
    else:
        added += [_added_token(text, expansion.first_id + place) for place, text in enumerate(expansion.texts)]
    vocabulary = dict(sorted(vocabulary.items(), key=lambda item: item[1]))
    return base.spec | {"added_tokens": added, "model": model | {"vocab": vocabulary, "merges": merges}}


def _added_token(text: str | None, number: int) -> dict[str, Any]:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
    return {"id": number, "content": text, **flags}


def _list_added_tokens(expansion: Expansion, config: Path) -> None:
    """Add new added tokens to the list in ``tokenizer_config.json``, which transformers prefers where there is one."""
    values = json.loads(config.read_text(encoding="utf-8")) if config.is_file() else {}
    if "added_tokens_decoder" in values:
        for place, text in enumerate(expansion.texts):
            token = _added_token(text, expansion.first_id + place)
            values["added_tokens_decoder"][str(token.pop("id"))] = token
        write_json(config, values)


def _copy(source: Path, target: Path) -> None:
    if source.is_dir():
        shutil.copytree(source, target, dirs_exist_ok=True)
    elif source.is_file():
        shutil.copyfile(source, target)


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


MAX_CHARACTERS = 200_000
REPETITIONS = 3


def measure_speed(base: ByteBpe, expansion: Expansion, folder: Path, texts: Sequence[str]) -> dict[str, Any]:
    """Load and encode with base, expansion and added tokens in turn; the best of three each.

    Args:
        base: The tokenizer that was expanded.
        expansion: What it got; the same tokens are added to the base for comparison.
        folder: Where the expanded ``tokenizer.json`` is.
        texts: Encoded one after another in one thread, 200,000 characters at most.

    Returns:
        Seconds to load, characters a second, and both relative to the base, for ``base``, ``expanded`` and
        ``added_tokens``. Of one run on this machine: noise is some per cent for the full 200,000 characters, and many
        times the figure for a few texts.
    """
    whole = [token for token, text in zip(expansion.tokens, expansion.texts, strict=True) if text is not None]
    files = {
        "base": json.dumps(base.spec),
        "expanded": (folder / TOKENIZER_FILE).read_text(encoding="utf-8"),
        "added_tokens": json.dumps(expanded_spec(base, expand_by_added_tokens(base, whole))),
    }
    sample = _sample(texts)
    load = dict.fromkeys(files, float("inf"))
    encode = dict.fromkeys(files, float("inf"))
    for _ in range(REPETITIONS):
        for name, content in files.items():
            tokenizer, seconds = _timed(partial(Tokenizer.from_str, content))
            load[name] = min(load[name], seconds)
            tokenizer.no_truncation()
            _, seconds = _timed(partial(_encode_all, tokenizer, sample))
            encode[name] = min(encode[name], seconds)
    characters = sum(map(len, sample))
    return {
        name: {
            "load_seconds": round(load[name], 4),
            "characters_per_second": round(characters / encode[name]),
            "encode_speed_over_base": round(encode["base"] / encode[name], 3),
            "load_time_over_base": round(load[name] / load["base"], 3),
        }
        for name in files
    }


def _timed(work: Callable[[], Any]) -> tuple[Any, float]:
    start = time.perf_counter()
    result = work()
    return result, time.perf_counter() - start


def _encode_all(tokenizer: Tokenizer, texts: Sequence[str]) -> None:
    for text in texts:
        tokenizer.encode(text)


def _sample(texts: Sequence[str]) -> list[str]:
    sample, characters = [], 0
    for text in texts:
        if characters >= MAX_CHARACTERS:
            break
        sample.append(text)
        characters += len(text)
    return sample

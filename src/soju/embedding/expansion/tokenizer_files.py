"""Write an expanded tokenizer beside its model so that every loader reads the same ids."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from soju.core.errors import UserError
from soju.core.files import write_json, write_text
from soju.embedding.expansion.byte_bpe import TOKENIZER_FILE, ByteBpe
from soju.embedding.expansion.vocabulary_expansion import Expansion

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

"""How fast does an expanded tokenizer load and encode, beside its base and beside added tokens?"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from soju.embedding.expansion.byte_bpe import TOKENIZER_FILE, ByteBpe
from soju.embedding.expansion.tokenizer_files import expanded_spec
from soju.embedding.expansion.vocabulary_expansion import Expansion, expand_by_added_tokens

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

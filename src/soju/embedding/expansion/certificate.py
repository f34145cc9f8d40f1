"""Proof that an expanded model keeps its promises, checked on the saved folder, loaded as users load it.

Texts of our own are checked whatever else is given, through the tokenizers library, AutoTokenizer and
SentenceTransformer: only new rows and new ids may differ from the base.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer

from soju.core.errors import UserError
from soju.core.files import write_json
from soju.embedding.expansion.byte_bpe import TOKENIZER_FILE, ByteBpe
from soju.embedding.expansion.merges import Expansion, expand_by_added_tokens, expanded_spec

CHECKED_TEXTS: dict[str, tuple[str, ...]] = {
    "en": (
        "The committee will meet on Thursday to discuss next year's budget.",
        "It's raining; she'll take the 7:45 train, won't she?",
        "A sparse index maps every term to the documents that contain it.",
        "Order #48213 was shipped to 12 Baker Street -- tracking: ZX-99/b.",
        "naïve café résumé façade, £3.50, 20 °C, 100 %",
        "Line one.\n\n\tIndented line two.   \nLine three…",
    ),
    "code": (
        "def add(a: int, b: int = 0) -> int:\n    return a + b  # sum\n",
        'for (let i = 0; i < items.length; ++i) { console.log(`${i}: "${items[i]}"`); }',
        "SELECT name, COUNT(*) FROM users WHERE age >= 18 GROUP BY name ORDER BY 2 DESC;",
        '{"id": 17, "tags": ["a", "b"], "nested": {"ok": true, "none": null}}\r\n',
        '#include <stdio.h>\nint main(void) {\n\tprintf("%d\\n", 0x2A << 3);\n\treturn 0;\n}',
    ),
    "ja": (
        "東京都の天気は、あしたも晴れるでしょう。",
        "コンピューターで日本語の文章を検索する。",
        "これはテストです!「引用」と（括弧）を含みます。",
    ),
    "zh": (
        "今天下午三点在图书馆开会，请准时参加。",
        "他們正在討論機器學習與資料檢索的問題。",
        "价格：￥128.00（含税），数量不限！",
    ),
    "ko": (
        "오늘 오후 세 시에 도서관에서 회의가 있으니 시간을 지켜 주세요.",
        "데이터베이스에서 문서를 빠르게 검색하는 방법을 알아봅시다.",
        "아니ㅋㅋㅋ 그게 뭐야ㅠㅠ 진짜 웃기다!!",
        "서울특별시 강남구 테헤란로 152, 2026년 3월 1일(일) 14:30",
        'API를 호출하면 JSON으로 응답합니다(예: `{"상태": "정상"}`).',
        "“그렇군요,” 그가 말했다. — 못 믿겠다는 듯이…",
        "뷁 쀍 꽒 힣 가각갂",
    ),
    "mixed": (
        "한국어와 English와 日本語、中文이 섞인 문장 😀👍🏽",
        "\u1112\u1161\u11ab\u1100\u116e\u11a8\u110b\u1165 (NFD)",
        "ㄱㄴㄷ ㅏㅑㅓ ꥠힰ",
        "  앞뒤 공백과\t탭 \n\n 줄바꿈  ",
        "<|endoftext|> 뒤에 오는 말과 <|im_start|>user\n안녕<|im_end|>",
        "",
        "가",
    ),
}
"""By language; ``en``, ``code``, ``ja`` and ``zh`` must keep their ids, the others must be coarsenings."""

UNCHANGED = ("en", "code", "ja", "zh")

CERTIFICATE_FILE = "certificate.json"


class CertificateError(UserError):
    """An expanded model broke a promise; the checks are named."""


@dataclass(frozen=True, slots=True)
class Check:
    """One promise."""

    name: str
    passed: bool
    texts: int
    """On how many texts it was checked, or tokens, tensors, settings, where the promise is about these."""
    figures: dict[str, Any] = field(default_factory=dict)
    failure: str | None = None
    """The first case that broke it."""


@dataclass(frozen=True, slots=True)
class Certificate:
    """All checks of one expanded model, and what was measured."""

    checks: tuple[Check, ...]
    measurements: dict[str, Any]

    @property
    def failed(self) -> list[Check]:
        """The checks that did not pass."""
        return [check for check in self.checks if not check.passed]

    def save(self, folder: Path) -> None:
        """Write ``certificate.json``."""
        write_json(
            folder / CERTIFICATE_FILE,
            {
                "passed": not self.failed,
                "checks": [asdict(check) for check in self.checks],
                "measurements": self.measurements,
            },
        )

    def raise_if_failed(self, folder: Path) -> None:
        """Raise `CertificateError` with the failed checks named."""
        if self.failed:
            named = "; ".join(f"{check.name}: {check.failure}" for check in self.failed)
            raise CertificateError(
                f"{folder / CERTIFICATE_FILE}: the expanded model broke {len(self.failed)} of "
                f"{len(self.checks)} checks "
                f"({named}); do not use it"
            )


def certify(
    base: ByteBpe,
    expansion: Expansion,
    folder: Path,
    *,
    texts: Mapping[str, Sequence[str]] | None = None,
    models: tuple[Any, Any] | None = None,
    speed: bool = True,
) -> Certificate:
    """Check an expanded folder against its base.

    Args:
        base: The tokenizer that was expanded, loaded from its folder.
        expansion: What it was given.
        folder: The saved model, or a tokenizer alone.
        texts: More texts by language: ``en``, ``code``, ``ja`` and ``zh`` must keep their ids, others be coarsenings.
        models: Base and expanded model as SentenceTransformer loaded them from their folders.
        speed: Measure load time and throughput, compared with the base and with added tokens.

    Returns:
        The certificate; `Certificate.raise_if_failed` judges it.
    """
    samples = _samples(texts or {})
    pairs = _loaders(base, folder, models)
    every = [text for some in samples.values() for text in some]
    unchanged = [text for language in UNCHANGED for text in samples.get(language, ())]
    old, new = pairs[0]
    old_ids, new_ids = old.encode(every, False), new.encode(every, False)
    checks = [
        _special_tokens(base, pairs),
        _id_range(expansion, pairs, models),
        _round_trip(base, every, pairs),
        _same_ids(unchanged, pairs),
        _coarsening(expansion, every, pairs),
        _surroundings(expansion, every[:200], pairs),
        _reachable(expansion, pairs),
        _loaders_agree(every, pairs),
    ]
    if models is not None:
        checks += _same_model(expansion, samples.get("en", ()), models)
    measurements = _measurements(expansion, old_ids, new_ids)
    if speed:
        measurements["speed"] = measure_speed(base, expansion, folder, every)
    return Certificate(tuple(checks), measurements)


def _samples(texts: Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
    names = dict.fromkeys([*CHECKED_TEXTS, *texts])
    return {name: [*CHECKED_TEXTS.get(name, ()), *texts.get(name, ())] for name in names}


def _loaders(base: ByteBpe, folder: Path, models: tuple[Any, Any] | None) -> list[tuple[Loaded, Loaded]]:
    """Return base and expanded tokenizer by each way of loading."""
    assert base.folder is not None, "a certificate is about folders"
    pairs = [(load_plain(base.folder), load_plain(folder)), (load_auto(base.folder), load_auto(folder))]
    if models is not None:
        old, new = (of_transformers("SentenceTransformer", model.tokenizer) for model in models)
        pairs.append((old, new))
    return pairs


def _check(
    name: str, texts: int, failures: Iterable[str], figures: Callable[[], dict[str, Any]] | None = None
) -> Check:
    failure = next(iter(failures), None)
    return Check(name, failure is None, texts, figures() if figures else {}, failure)


def _special_tokens(base: ByteBpe, pairs: Sequence[tuple[Loaded, Loaded]]) -> Check:
    def failures() -> Iterable[str]:
        for old, new in pairs:
            for content in base.added_tokens:
                before, after = old.backend.token_to_id(content), new.backend.token_to_id(content)
                if before != after:
                    yield f"{new.way}: {content!r} has id {after} instead of {before}"
            kept = old.backend.get_added_tokens_decoder()
            found = new.backend.get_added_tokens_decoder()
            for number, token in kept.items():
                if repr(found.get(number)) != repr(token):
                    yield f"{new.way}: id {number} is {found.get(number)!r} instead of {token!r}"
            for name, value in old.settings.items():
                if new.settings[name] != value:
                    yield f"{new.way}: {name} is {new.settings[name]!r} instead of {value!r}"

    return _check("special_tokens_unchanged", len(base.added_tokens), failures())


def _id_range(expansion: Expansion, pairs: Sequence[tuple[Loaded, Loaded]], models: tuple[Any, Any] | None) -> Check:
    def failures() -> Iterable[str]:
        texts = expansion.texts
        for old, new in pairs:
            vocabulary = new.backend.get_vocab(with_added_tokens=True)
            for place, token in enumerate(expansion.tokens):
                name = token if expansion.method == "merges" else str(texts[place])
                if vocabulary.get(name) != expansion.first_id + place:
                    yield f"{new.way}: {name!r} has id {vocabulary.get(name)} instead of {expansion.first_id + place}"
            moved = old.backend.get_vocab(with_added_tokens=True).items() - vocabulary.items()
            if moved:
                yield f"{new.way}: {len(moved):,} old tokens moved, such as {min(moved)}"
            if max(vocabulary.values()) + 1 != expansion.size:
                yield f"{new.way}: {max(vocabulary.values()) + 1:,} ids instead of {expansion.size:,}"
        if models is not None:
            rows, stated = embedding_rows(models[1])
            if not expansion.size <= rows == stated:
                yield f"{rows:,} embedding rows and config vocab_size {stated:,} for {expansion.size:,} ids"

    return _check("id_range", len(expansion.tokens), failures())


def _round_trip(base: ByteBpe, texts: Sequence[str], pairs: Sequence[tuple[Loaded, Loaded]]) -> Check:
    wanted = [base.normalise(text) for text in texts]
    lossy = {
        text
        for text, ids in zip(texts, pairs[0][0].encode(texts, False), strict=True)
        if pairs[0][0].decode(ids) != base.normalise(text)
    }

    def failures() -> Iterable[str]:
        for _, new in pairs:
            for text, ids, expected in zip(texts, new.encode(texts, False), wanted, strict=True):
                if text not in lossy and new.decode(ids) != expected:
                    yield f"{new.way}: {text[:60]!r} comes back as {new.decode(ids)[:60]!r}"

    # A base whose special tokens swallow white space loses some texts itself.
    return _check("decoding_gives_the_text_back", len(texts), failures(), lambda: {"lost_by_the_base": len(lossy)})


def _same_ids(texts: Sequence[str], pairs: Sequence[tuple[Loaded, Loaded]]) -> Check:
    def failures() -> Iterable[str]:
        for old, new in pairs:
            for text, before, after in zip(texts, old.encode(texts, False), new.encode(texts, False), strict=True):
                if before != after:
                    yield f"{new.way}: {text[:60]!r} has other ids"

    return _check("other_languages_keep_their_ids", len(texts), failures())


def _coarsening(expansion: Expansion, texts: Sequence[str], pairs: Sequence[tuple[Loaded, Loaded]]) -> Check:
    def failures() -> Iterable[str]:
        for old, new in pairs:
            for text, before, after in zip(texts, old.encode(texts, False), new.encode(texts, False), strict=True):
                if _collapse(expansion, after) != before:
                    yield f"{new.way}: the new tokens of {text[:60]!r} do not stand for its old ones"

    return _check("encodings_are_coarsenings", len(texts), failures())


def _surroundings(expansion: Expansion, texts: Sequence[str], pairs: Sequence[tuple[Loaded, Loaded]]) -> Check:
    def failures() -> Iterable[str]:
        for old, new in pairs:
            for text, before, after in zip(texts, old.encode(texts, True), new.encode(texts, True), strict=True):
                if _collapse(expansion, after) != before:
                    yield f"{new.way}: {text[:60]!r} gets other special tokens"

    return _check("special_tokens_around_texts_are_the_same", len(texts), failures())


def _collapse(expansion: Expansion, ids: Sequence[int]) -> list[int] | None:
    return expansion.collapse(ids) if max(ids, default=0) < expansion.size else None


def _reachable(expansion: Expansion, pairs: Sequence[tuple[Loaded, Loaded]]) -> Check:
    whole = [(expansion.first_id + place, text) for place, text in enumerate(expansion.texts) if text is not None]

    def failures() -> Iterable[str]:
        for _, new in pairs:
            encoded = new.encode([text for _, text in whole], False)
            for (number, text), ids in zip(whole, encoded, strict=True):
                if ids != [number]:
                    yield f"{new.way}: {text!r} is encoded as {ids} instead of [{number}]"

    return _check(
        "every_new_token_is_reached",
        len(whole),
        failures(),
        lambda: {"left_out": len(expansion.unreachable), "parts_of_characters": len(expansion.tokens) - len(whole)},
    )


def _loaders_agree(texts: Sequence[str], pairs: Sequence[tuple[Loaded, Loaded]]) -> Check:
    def failures() -> Iterable[str]:
        expected = pairs[0][1].encode(texts, False)
        for _, new in pairs[1:]:
            for text, ids, wanted in zip(texts, new.encode(texts, False), expected, strict=True):
                if ids != wanted:
                    yield f"{new.way} encodes {text[:60]!r} otherwise than the tokenizers library"

    return _check("loaders_agree", len(texts), failures(), lambda: {"loaders": [new.way for _, new in pairs]})


def _same_model(expansion: Expansion, texts: Sequence[str], models: tuple[Any, Any]) -> list[Check]:
    some = [text for text in texts if text.strip()][:64]
    before, after = map(model_settings, models)
    return [
        _check("old_weights_are_bit_identical", len(models[0].state_dict()), changed_weights(models, expansion)),
        _check("settings_are_unchanged", len(before), changed_settings(before, after)),
        _check("english_embeddings_are_bit_identical", len(some), changed_vectors(some, models)),
    ]


def _measurements(expansion: Expansion, old_ids: Sequence[list[int]], new_ids: Sequence[list[int]]) -> dict[str, Any]:
    used = {number for ids in new_ids for number in ids if number >= expansion.first_id}
    before, after = sum(map(len, old_ids)), sum(map(len, new_ids))
    return {
        "new_tokens_used": len(used) / max(1, len(expansion.tokens)),
        "tokens_before": before,
        "tokens_after": after,
        "longest_growth": max((len(new) - len(old) for old, new in zip(old_ids, new_ids, strict=True)), default=0),
    }


_NEW_VALUES = ("vocab_size", "_name_or_path", "transformers_version", "text_config")
"""Of a configuration: what an expansion may change."""


def embedding_rows(model: Any) -> tuple[int, int]:
    """Return the rows of a model's embedding and the number its configuration states."""
    transformer = model[0].auto_model
    return len(transformer.get_input_embeddings().weight), transformer.config.get_text_config().vocab_size


def changed_weights(models: tuple[Any, Any], expansion: Expansion) -> Iterator[str]:
    """Say which weights differ in any bit, rows of new tokens aside, and which of these rows are no numbers."""
    before, after = (model.state_dict() for model in models)
    for name in sorted(before.keys() ^ after.keys()):
        yield f"{name} is in one of the models only"
    embedding = models[1][0].auto_model.get_input_embeddings().weight
    for name, old in before.items():
        if name not in after:
            continue
        new = after[name]
        kept: list[Any] = [...]
        if new.data_ptr() == embedding.data_ptr():
            kept = [slice(expansion.first_id), slice(expansion.size, None)]
            if not new[expansion.first_id : expansion.size].isfinite().all():
                yield f"{name}: new rows are not finite"
        if old.dtype != new.dtype or any(not torch.equal(old[rows], new[rows]) for rows in kept):
            yield f"{name} differs"


def model_settings(model: Any) -> dict[str, Any]:
    """Return prompts, length, modules with their settings and the transformer's configuration, by name."""
    found = {name: getattr(model, name) for name in ("prompts", "default_prompt_name", "similarity_fn_name")}
    found["max_seq_length"] = model.max_seq_length
    for place, module in enumerate(model):
        found[f"module {place}"] = type(module).__name__
        settings: dict[str, Any] = getattr(module, "get_config_dict", dict)()
        found |= {f"module {place}: {name}": value for name, value in settings.items()}
    configuration = model[0].auto_model.config.to_dict()
    return found | {name: value for name, value in configuration.items() if name not in _NEW_VALUES}


def changed_settings(before: Mapping[str, Any], after: Mapping[str, Any]) -> Iterator[str]:
    """Say which settings differ."""
    for name in {**before, **after}:
        if before.get(name) != after.get(name):
            yield f"{name} is {after.get(name)!r} instead of {before.get(name)!r}"


def changed_vectors(texts: Sequence[str], models: tuple[Any, Any]) -> Iterator[str]:
    """Say which texts have another vector, in any bit."""
    before, after = (
        np.asarray(found.float().cpu())
        for found in (
            model.encode(list(texts), batch_size=16, show_progress_bar=False, convert_to_tensor=True)
            for model in models
        )
    )
    for text, old, new in zip(texts, before, after, strict=True):
        if not np.array_equal(old, new):
            yield f"{text[:60]!r} has another vector"


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

"""Byte-level BPE tokenizers, read from their ``tokenizer.json``; other kinds are refused.

Such a vocabulary spells bytes in GPT-2's alphabet, one printable character for each of the 256 bytes. A piece with
bytes that only Hangul has can change no text without Hangul.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, Self

from tokenizers import Tokenizer

from soju.core.errors import UserError


def _alphabet() -> str:
    """Return the character of each byte, in order of the bytes.

    Bytes that are printable in Latin-1 stand for themselves; the others take the characters from U+0100 on, in order.
    """
    shifted = iter(range(0x100, 0x200))
    return "".join(chr(byte) if _is_printable(byte) else chr(next(shifted)) for byte in range(256))


def _is_printable(byte: int) -> bool:
    return 0x21 <= byte <= 0x7E or 0xA1 <= byte <= 0xAC or 0xAE <= byte <= 0xFF


ALPHABET = _alphabet()
"""The character that stands for byte ``i`` is ``ALPHABET[i]``."""

_BYTES = {ord(character): byte for byte, character in enumerate(ALPHABET)}
_LATIN_1 = {byte: ord(character) for byte, character in enumerate(ALPHABET)}


def is_spelling(token: str) -> bool:
    """Tell whether every character of a token stands for a byte."""
    return all(ord(character) in _BYTES for character in token)


def token_bytes(token: str) -> bytes:
    """Return the bytes that a token of a byte-level vocabulary stands for.

    >>> token_bytes("Ġíķľ").decode()
    ' 한'

    Args:
        token: A token as the vocabulary spells it; never an added token, whose content is plain text.

    Returns:
        The bytes, perhaps only a part of a character.

    Raises:
        UserError: If a character stands for no byte.
    """
    try:
        return bytes(_BYTES[ord(character)] for character in token)
    except KeyError as error:
        character = chr(error.args[0])
        raise UserError(
            f"{token!r} is no byte-level token: {character!r} stands for no byte; give a byte-level BPE vocabulary"
        ) from None


def token_spelling(text: str | bytes) -> str:
    """Return how a byte-level vocabulary spells a text or bytes; the inverse of `token_bytes`.

    >>> token_spelling(" 한")
    'Ġíķľ'
    """
    raw = text.encode("utf-8") if isinstance(text, str) else text
    return raw.decode("latin-1").translate(_LATIN_1)


def token_text(token: str) -> str | None:
    """Return the text of a token, or ``None`` when its bytes are not whole characters or no bytes at all."""
    if not is_spelling(token):
        return None
    try:
        return token_bytes(token).decode("utf-8")
    except UnicodeDecodeError:
        return None


_HANGUL_ONLY = re.compile(
    rb"[\xeb-\xed]"  # U+B000-U+D7FF: syllables and old jamo, the rest is unassigned
    rb"|\xea[\xb0-\xbf]"  # U+AC00-U+AFFF
    rb"|\xe1[\x84-\x87]"  # U+1100-U+11FF: jamo
    rb"|\xe3\x85"  # U+3140-U+317F: compatibility jamo; E3 84 and E3 86 are shared with other scripts
    rb"|\xe3\x84[\xb0-\xbf]|\xe3\x86[\x80-\x8f]|\xea\xa5[\xa0-\xbf]"  # whole characters of the shared ones
)
_UNFINISHED = re.compile(rb"(?: ?)(?:[\xeb-\xed][\x80-\xbf]|\xea[\xb0-\xbf]|\xe1[\x84-\x87]|\xe3\x85)")


def is_hangul_piece(piece: bytes) -> bool:
    """Tell whether a piece holds bytes that valid UTF-8 has in Hangul characters only.

    Every lead byte is followed by its own character in valid UTF-8, so a text with these bytes holds Hangul. The lead
    bytes EA, E1 and E3 alone are shared with Yi, Vai, Ethiopic, kana and others and do not count.

    >>> is_hangul_piece("한".encode()[:2]), is_hangul_piece("あ".encode())
    (True, False)
    """
    return _HANGUL_ONLY.search(piece) is not None


def is_unfinished_syllable(piece: bytes) -> bool:
    """Tell whether a piece is the first two bytes of one Hangul character, with or without a space before it."""
    return _UNFINISHED.fullmatch(piece) is not None


def starts_whole(piece: bytes) -> bool:
    """Tell whether a piece starts with a whole character and only its last one may be cut off."""
    try:
        piece.decode("utf-8")
    except UnicodeDecodeError as error:
        return error.reason == "unexpected end of data"
    return True


TOKENIZER_FILE = "tokenizer.json"
SUPPORTED = "byte-level BPE tokenizers (GPT-2, Qwen, Llama 3 and their like) are supported"
_BATCH = 1024


@dataclass(frozen=True, eq=False)
class ByteBpe:
    """Vocabulary, merges and added tokens of a byte-level BPE, and what it makes of texts."""

    name: str
    """As the user wrote it."""
    spec: dict[str, Any] = field(repr=False)
    """The parsed ``tokenizer.json``."""
    folder: Path | None = None
    """Where its files are; ``None`` when it was made in memory."""

    @classmethod
    def load(cls, name: str) -> Self:
        """Read a tokenizer from a folder, its ``tokenizer.json``, or a hub id (only tokenizer files are fetched).

        Raises `UserError` if there is none, or it is not a byte-level BPE.
        """
        folder = _tokenizer_folder(name)
        file = folder / TOKENIZER_FILE
        try:
            spec = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UserError(f"{name}: {TOKENIZER_FILE} cannot be read ({error}); save the tokenizer again") from None
        if not isinstance(spec, dict):
            raise UserError(f"{name}: {TOKENIZER_FILE} holds no tokenizer; save the tokenizer again")
        return cls.from_spec(spec, name=name, folder=folder)

    @classmethod
    def from_spec(cls, spec: dict[str, Any], *, name: str, folder: Path | None = None) -> Self:
        """Check the kind of a parsed ``tokenizer.json``.

        Raises `UserError` if it is not a byte-level BPE, or does not load with the ids it stores.
        """
        fault = _why_not_byte_level(spec)
        if fault is not None:
            raise UserError(f"{name}: {fault}; only {SUPPORTED}")
        found = cls(name, spec, folder)
        found._check_ids()
        return found

    @cached_property
    def vocabulary(self) -> dict[str, int]:
        """Spelling to id, without added tokens unless the model's vocabulary holds them too."""
        return dict(self.spec["model"]["vocab"])

    @cached_property
    def merges(self) -> list[tuple[str, str]]:
        """The merges, most urgent first."""
        return [_pair(merge) for merge in self.spec["model"]["merges"]]

    @cached_property
    def added_tokens(self) -> dict[str, int]:
        """Content to id of the tokens that are matched in plain text: special and other added ones."""
        return {token["content"]: token["id"] for token in self.spec.get("added_tokens") or ()}

    @cached_property
    def size(self) -> int:
        """One more than the largest id."""
        return 1 + max([*self.vocabulary.values(), *self.added_tokens.values()])

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer in its library, without truncation and padding."""
        return Tokenizer.from_str(json.dumps(self.spec | {"truncation": None, "padding": None}))

    @property
    def adds_prefix_space(self) -> bool:
        """Whether it puts a space before every text, so that no text starts without one."""
        return '"add_prefix_space": true' in json.dumps(self.spec.get("pre_tokenizer"))

    def normalise(self, text: str) -> str:
        """Return the text that decoding gives back: what the normaliser makes of it."""
        normalizer = self.tokenizer.normalizer
        return text if normalizer is None else normalizer.normalize_str(text)

    def pre_tokens(self, text: str) -> list[str]:
        """Return the spellings of the stretches of a normalised text that BPE works on one by one."""
        return [spelling for spelling, _ in self.tokenizer.pre_tokenizer.pre_tokenize_str(text)]

    def encode(self, texts: Iterable[str]) -> Iterator[list[int]]:
        """Yield the ids of each text, no special tokens around them."""
        stream = iter(texts)
        while batch := list(islice(stream, _BATCH)):
            for encoding in self.tokenizer.encode_batch_fast(batch, add_special_tokens=False):
                yield encoding.ids

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ids, special tokens shown."""
        return self.tokenizer.decode(list(ids), skip_special_tokens=False)

    def _check_ids(self) -> None:
        """Compare stored ids of added tokens with those the library gives them: it numbers them itself on loading."""
        try:
            added = self.tokenizer.get_added_tokens_decoder()
        except Exception as error:  # the library has no exception of its own
            raise UserError(
                f"{self.name}: {TOKENIZER_FILE} does not load ({error}); save the tokenizer again"
            ) from None
        loaded = {token.content: number for number, token in added.items()}
        for content, stored in self.added_tokens.items():
            if loaded.get(content) != stored:
                raise UserError(
                    f"{self.name}: the added token {content!r} is stored as id {stored} but loads as "
                    f"{loaded.get(content)}; put it into the model's vocabulary with its id"
                )


def _pair(merge: str | list[str]) -> tuple[str, str]:
    left, right = merge.split(" ") if isinstance(merge, str) else merge
    return left, right


def _why_not_byte_level(spec: dict[str, Any]) -> str | None:
    model = spec.get("model") or {}
    kind = model.get("type") or ("BPE" if "merges" in model else None)
    if kind != "BPE":
        return f"its tokenizer is of the kind {kind}"
    if model.get("byte_fallback") or '"ByteLevel"' not in json.dumps(spec.get("pre_tokenizer")):
        return "its tokenizer is a BPE over characters (SentencePiece), not over bytes"
    if model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
        return "its BPE marks pieces inside or at the end of a word"
    if model.get("dropout"):
        return "its BPE drops merges at random"
    missing = sum(1 for character in ALPHABET if character not in model.get("vocab", ()))
    if missing:
        return f"its vocabulary lacks {missing} of the 256 bytes"
    return None


def _tokenizer_folder(name: str) -> Path:
    path = Path(name).expanduser()
    if path.name == TOKENIZER_FILE and path.is_file():
        return path.parent
    if path.is_dir():
        if (path / TOKENIZER_FILE).is_file():
            return path
        inside = [found.parent for found in sorted(path.glob(f"*/{TOKENIZER_FILE}"))]
        if len(inside) == 1:  # the transformer of older sentence-transformers folders
            return inside[0]
        raise UserError(
            f"{name}: no {TOKENIZER_FILE} in the folder; save the tokenizer in its fast form; only {SUPPORTED}"
        )
    if name.startswith("package:"):
        from soju.core.model_folder import find_model_folder

        return _tokenizer_folder(str(find_model_folder(name).path))
    if path.exists() or path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1:
        raise UserError(f"{name}: no such folder; check the path, or give a hub id such as Qwen/Qwen3-Embedding-0.6B")
    return _from_hub(name)


def _from_hub(name: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(name, allow_patterns=["tokenizer*.json", "special_tokens_map.json", "*.jinja"]))
    except Exception as error:  # the hub client raises errors of a dozen unrelated families
        cause = str(error).strip().split("\n")[0] or type(error).__name__
        raise UserError(
            f"{name}: neither a folder nor a repository of the hub ({cause}); check the name and the network, or give "
            f"a folder"
        ) from None
    return _tokenizer_folder(str(folder))

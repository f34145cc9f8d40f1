"""Train a byte-level BPE tokenizer in the layout of Qwen: pre-tokenizer, special tokens, end of text."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from soju.core.errors import UserError
from soju.core.files import write_json, write_text

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
        UserError: If `vocabulary` has no room beside the 256 bytes.
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

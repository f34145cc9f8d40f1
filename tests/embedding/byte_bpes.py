"""Tiny byte-level BPE tokenizers with Qwen's normaliser, pre-tokenizer and special-token layout."""

import json

from soju.embedding.expansion.byte_bpe import ALPHABET, ByteBpe, token_spelling

QWEN_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")


def byte_bpe_spec(merges=(), *, specials=SPECIALS, plain=("<think>",), more=()):
    """Return a ``tokenizer.json``; `merges` are pairs of text or bytes, `more` vocabulary that no merge makes."""
    pairs = [[token_spelling(left), token_spelling(right)] for left, right in merges]
    names = [*ALPHABET, *dict.fromkeys(left + right for left, right in pairs), *map(token_spelling, more)]
    vocabulary = {token: number for number, token in enumerate(names)}
    assert len(vocabulary) == len(names)
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    added = [
        {"id": len(names) + place, "content": content, **flags, "special": place < len(specials)}
        for place, content in enumerate([*specials, *plain])
    ]
    end = {"id": specials[0], "ids": [len(names)], "tokens": [specials[0]]} if specials else None
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": QWEN_PATTERN}, "behavior": "Isolated", "invert": False},
                {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False},
            ],
        },
        "post_processor": end
        and {
            "type": "Sequence",
            "processors": [
                {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False},
                {
                    "type": "TemplateProcessing",
                    "single": [
                        {"Sequence": {"id": "A", "type_id": 0}},
                        {"SpecialToken": {"id": end["id"], "type_id": 0}},
                    ],
                    "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
                    "special_tokens": {end["id"]: end},
                },
            ],
        },
        "decoder": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": "",
            "end_of_word_suffix": "",
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": vocabulary,
            "merges": pairs,
        },
    }


def byte_bpe(merges=(), **options):
    return ByteBpe.from_spec(byte_bpe_spec(merges, **options), name="pico")


def write_base_folder(folder, merges=(), **options):
    """Write what the hub's Qwen3-Embedding folders hold of a tokenizer."""
    spec = byte_bpe_spec(merges, **options)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(spec), encoding="utf-8")
    ids = {token["content"]: token["id"] for token in spec["added_tokens"]}
    config = {
        "added_tokens_decoder": {
            str(token["id"]): {k: v for k, v in token.items() if k != "id"} for token in spec["added_tokens"]
        },
        "additional_special_tokens": ["<|im_start|>", "<|im_end|>"],
        "bos_token": None,
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "padding_side": "left",
        "chat_template": "{% for message in messages %}<|im_start|>{{ message.content }}<|im_end|>{% endfor %}",
        "model_max_length": 512,
        "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": None,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    (folder / "vocab.json").write_text(json.dumps(spec["model"]["vocab"]), encoding="utf-8")
    (folder / "merges.txt").write_text("\n".join(" ".join(pair) for pair in spec["model"]["merges"]), encoding="utf-8")
    return ByteBpe.load(str(folder)), ids

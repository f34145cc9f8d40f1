"""A Qwen3-Embedding folder of two tiny layers and a donor tokenizer with some Korean."""

import json

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Transformer
from sentence_transformers.sentence_transformer.modules import Normalize, Pooling
from transformers import Qwen3Config, Qwen3Model

from embedding.byte_bpes import byte_bpe_spec, write_base_folder

KOREAN = ("오늘", "회의", " 오늘", " 회의", "데이터", " 데이터베이스", "검색", "서울", "ㅋㅋ", "국어", " 한국", "한국")


def parts_of(*texts):
    merges = {}
    for character in "".join(texts):
        raw = character.encode()
        for end in range(1, len(raw)):
            merges[raw[:end], raw[end : end + 1]] = None
    return list(merges)


MERGES = [*parts_of("한국어오늘검"), ("t", "h"), ("th", "e"), ("국", "어")]


def save_pico_base(folder, merges=MERGES, *, padding_rows=0, dtype=torch.float32, **options):
    plain = folder.parent / f"{folder.name}-plain"
    tokenizer, _ = write_base_folder(plain, merges, **options)
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=tokenizer.size + padding_rows, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, head_dim=8, max_position_embeddings=512,
    )  # fmt: skip
    Qwen3Model(config).to(dtype).eval().save_pretrained(plain)
    modules = [Transformer(str(plain)), Pooling(16, pooling_mode="lasttoken"), Normalize()]
    SentenceTransformer(modules=modules, device="cpu").save_pretrained(str(folder))
    write_base_folder(folder, merges, **options)
    return folder


def save_pico_donor(folder, tokens=KOREAN):
    folder.mkdir(parents=True)
    single = dict.fromkeys(character for token in tokens for character in token.strip())
    spec = byte_bpe_spec(more=[*single, *(token for token in tokens if token not in single)], plain=())
    (folder / "tokenizer.json").write_text(json.dumps(spec), encoding="utf-8")
    return folder

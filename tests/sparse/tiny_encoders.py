"""Encoders of two layers, built from configurations; random weights."""

import torch
from transformers import (
    BertConfig,
    BertModel,
    LlamaConfig,
    LlamaModel,
    ModernBertConfig,
    ModernBertModel,
    Qwen3Config,
    Qwen3Model,
)

VOCABULARY = 30
SIZES = {"vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
DECODERS = {
    **SIZES,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
}
KINDS = {
    "qwen3": lambda: Qwen3Model(Qwen3Config(**DECODERS, head_dim=8, use_cache=False)),
    "llama": lambda: LlamaModel(LlamaConfig(**DECODERS, use_cache=False)),
    "bert": lambda: BertModel(BertConfig(**SIZES, num_attention_heads=2, max_position_embeddings=32)),
    "modernbert": lambda: ModernBertModel(
        ModernBertConfig(
            **SIZES,
            num_attention_heads=2,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            cls_token_id=1,
            sep_token_id=2,
        )
    ),
}


def tiny_encoder(kind="qwen3", *, seed=0):
    torch.manual_seed(seed)
    model = KINDS[kind]().eval()
    with torch.no_grad():  # larger weights than a fresh model's, so that a difference shows
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.3)
    return model


def batch(texts, *, width=None, left=True):
    """Pad ids to one width; returns ids and mask."""
    width = width or max(map(len, texts))
    ids, mask = torch.zeros(len(texts), width, dtype=torch.long), torch.zeros(len(texts), width, dtype=torch.long)
    for row, text in enumerate(texts):
        place = slice(width - len(text), width) if left else slice(0, len(text))
        ids[row, place], mask[row, place] = torch.tensor(text), 1
    return {"input_ids": ids, "attention_mask": mask}

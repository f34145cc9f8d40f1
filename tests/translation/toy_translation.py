"""A toy language pair and a pico M2M100 that learns it in seconds: tokens are renamed and neighbours change places."""

from __future__ import annotations

import torch
from torch.nn.functional import cross_entropy
from transformers import M2M100Config, M2M100ForConditionalGeneration

WORDS, FIRST, PAD, END = 12, 4, 1, 2
VOCABULARY = FIRST + 2 * WORDS


def pico_config(**changes):
    sizes = {
        "d_model": 48,
        "encoder_layers": 2,
        "decoder_layers": 2,
        "encoder_attention_heads": 3,
        "decoder_attention_heads": 3,
        "encoder_ffn_dim": 96,
        "decoder_ffn_dim": 96,
    }
    return M2M100Config(
        **(sizes | changes),
        vocab_size=VOCABULARY,
        max_position_embeddings=32,
        dropout=0.0,
        attention_dropout=0.0,
        activation_dropout=0.0,
        encoder_layerdrop=0.0,
        decoder_layerdrop=0.0,
        pad_token_id=PAD,
        bos_token_id=0,
        eos_token_id=END,
        decoder_start_token_id=END,
    )


def pico_model(*, seed=0, **changes):
    torch.manual_seed(seed)
    return M2M100ForConditionalGeneration(pico_config(**changes)).eval()


def batch(count, *, seed):
    """Source ``w1 w2 … </s>`` and target with each pair of neighbours swapped, in the other half of the vocabulary."""
    generator = torch.Generator().manual_seed(seed)
    source = torch.full((count, 9), PAD)
    target = torch.full((count, 9), -100)
    for row in range(count):
        length = 2 * int(torch.randint(2, 5, (1,), generator=generator))
        words = torch.randint(WORDS, (length,), generator=generator)
        source[row, :length], source[row, length] = FIRST + words, END
        swapped = words.view(-1, 2).flip(1).flatten()
        target[row, :length], target[row, length] = FIRST + WORDS + swapped, END
    start = torch.full((count, 1), END)
    decoder_input = torch.cat([start, target[:, :-1].masked_fill(target[:, :-1] == -100, PAD)], dim=1)
    mask = (source != PAD).long()
    return {"input_ids": source, "attention_mask": mask, "decoder_input_ids": decoder_input, "labels": target}


def logits(model, rows):
    """Return the logits at real target positions, ``(N, V)``."""
    inputs = {name: rows[name] for name in ("input_ids", "attention_mask", "decoder_input_ids")}
    return model(**inputs, use_cache=False).logits[rows["labels"] != -100]


def trained_teacher(*, steps=160, seed=0):
    """Return a teacher that translates nearly every token of unseen sentences right."""
    model = pico_model(seed=seed, init_std=0.05).train()
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-2, betas=(0.9, 0.98), fused=True)
    for step in range(steps):
        for group in optimiser.param_groups:
            group["lr"] = 1e-2 * min(1, (step + 1) / 30) * (1 - step / steps)
        rows = batch(24, seed=10_000 + step)
        optimiser.zero_grad()
        cross_entropy(logits(model, rows), rows["labels"][rows["labels"] != -100]).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
    return model.eval()

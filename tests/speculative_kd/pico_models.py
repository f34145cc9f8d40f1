"""Decoders from config, small enough for seconds, whose acceptance spreads: heads are scaled and mixed."""

from __future__ import annotations

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

VOCABULARY = 96
CLASSES = {"qwen3": (Qwen3Config, Qwen3ForCausalLM), "llama": (LlamaConfig, LlamaForCausalLM)}


def pico(kind="qwen3", *, layers=2, seed=0, sharp=6.0, vocabulary=VOCABULARY, dtype=torch.float64, **changes):
    """Return a decoder of hidden width 32; `sharp` is the standard deviation of its logits."""
    config, model = CLASSES[kind]
    torch.manual_seed(seed)
    settings = {
        "vocab_size": vocabulary,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "tie_word_embeddings": False,
        "max_position_embeddings": 512,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }
    decoder = model(config(**(settings | changes))).to(dtype).eval()
    with torch.no_grad():
        decoder.lm_head.weight.normal_(std=sharp / 32**0.5)
    return decoder


def pair(mix=0.7, *, kind="qwen3", seed=0, dtype=torch.float64, teacher_layers=2):
    """Return student and teacher; `mix` is how much of the teacher's head the student has."""
    teacher = pico(kind, layers=teacher_layers, seed=seed + 1, dtype=dtype)
    student = pico(kind, layers=1, seed=seed + 2, dtype=dtype)
    with torch.no_grad():
        student.model.embed_tokens.weight.copy_(teacher.model.embed_tokens.weight)
    mix_head(student, teacher, mix, seed=seed + 3)
    return student, teacher


def mix_head(student, teacher, mix, *, seed=3):
    """Set the student's head to `mix` of the teacher's and the rest of another."""
    generator = torch.Generator().manual_seed(seed)
    head = teacher.lm_head.weight
    other = torch.randn(head.shape, generator=generator, dtype=torch.float64).to(head.dtype) * head.std()
    with torch.no_grad():
        student.lm_head.weight.copy_(mix * head + (1 - mix) * other)


def alone(model, prompt, *, seed, epoch, row, role, temperature, budget, eos):
    """Write with one model and plain forward passes over the whole text: the reference for pure texts."""
    from soju.speculative_kd.noise import draw, keyed_uniform, row_keys

    text = []
    while len(text) < budget and (not text or text[-1] not in eos):
        with torch.no_grad():
            logits = model(torch.tensor([[*prompt, *text]]), use_cache=False).logits[:, -1]
        uniform = torch.from_numpy(keyed_uniform(seed, epoch, row_keys([row]), [len(text)], role))
        text.append(int(draw(logits, temperature, uniform)))
    return text

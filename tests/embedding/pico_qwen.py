"""A sentence-transformers model like Qwen3-Embedding: byte-level BPE, left padding, last token; random weights."""

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as Decoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3Model

from fixtures.tiny_encoders import DECODERS

END = "<|endoftext|>"


def save_pico_qwen(folder, *, seed=0):
    """Save the model and return its folder; it reads single bytes."""
    vocabulary = {END: 0} | {letter: number for number, letter in enumerate(sorted(ByteLevel.alphabet()), start=1)}
    backend = Tokenizer(BPE(vocabulary, []))
    backend.pre_tokenizer, backend.decoder = ByteLevel(add_prefix_space=False), Decoder()
    backend.post_processor = TemplateProcessing(single=f"$A {END}", special_tokens=[(END, 0)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token=END, eos_token=END, padding_side="left", model_max_length=32
    )
    torch.manual_seed(seed)
    config = Qwen3Config(**DECODERS | {"vocab_size": len(vocabulary)}, head_dim=8, use_cache=False)
    plain = folder.parent / f"{folder.name}-plain"
    Qwen3Model(config).eval().save_pretrained(plain)
    tokenizer.save_pretrained(plain)
    modules = [Transformer(str(plain)), Pooling(16, pooling_mode="lasttoken"), Normalize()]
    SentenceTransformer(modules=modules, device="cpu").save_pretrained(str(folder))
    return folder

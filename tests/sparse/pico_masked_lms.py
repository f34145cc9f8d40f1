"""Masked language models of one or two layers with real tokenizers of every kind, trained on a few sentences."""

import json

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertTokenizer,
    ModernBertConfig,
    ModernBertForMaskedLM,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaForMaskedLM,
    RobertaTokenizer,
    XLMRobertaConfig,
    XLMRobertaForMaskedLM,
    XLMRobertaTokenizer,
)

NEEDED = [
    "검색 엔진은 문서를 빠르게 찾는다",
    "a search engine finds documents quickly",
    "신경망으로 한국어와 영어를 배운다",
    "machine learning models learn from data",
    "검색엔진 search-engine 42",
]
OTHERS = [
    "지구는 태양 주위를 공전한다",
    "the kitchen smells of garlic and pepper",
    "오늘 저녁에는 김치찌개를 끓였다",
    "several whales swam along the northern coast",
    "東京 Москва Ελλάδα naïve",
]
SPECIAL = ["<s>", "<pad>", "</s>", "<unk>"]
SIZES = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "max_position_embeddings": 64,
}


def _trained(backend, trainer):
    backend.train_from_iterator((NEEDED + OTHERS) * 4, trainer)
    return json.loads(backend.to_str())["model"]


def unigram():
    """XLM-R: Unigram with its unknown token at 3, the mask added behind the pieces."""
    backend = Tokenizer(models.Unigram())
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=220, special_tokens=SPECIAL, unk_token="<unk>", show_progress=False)
    tokenizer = XLMRobertaTokenizer(vocab=[tuple(entry) for entry in _trained(backend, trainer)["vocab"]])
    config = XLMRobertaConfig(vocab_size=len(tokenizer), pad_token_id=1, bos_token_id=0, eos_token_id=2, **SIZES)
    return XLMRobertaForMaskedLM(config), tokenizer


def byte_bpe():
    """RoBERTa: byte-level BPE, an untied head."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = [*SPECIAL, "<mask>"]
    trainer = trainers.BpeTrainer(
        vocab_size=420, initial_alphabet=alphabet, special_tokens=special, show_progress=False
    )
    model = _trained(backend, trainer)
    tokenizer = RobertaTokenizer(vocab=model["vocab"], merges=[tuple(merge) for merge in model["merges"]])
    config = RobertaConfig(
        vocab_size=len(tokenizer), pad_token_id=1, bos_token_id=0, eos_token_id=2, tie_word_embeddings=False, **SIZES
    )
    return RobertaForMaskedLM(config), tokenizer


def word_piece():
    """BERT: WordPiece with an unknown token."""
    backend = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=False, strip_accents=False)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    trainer = trainers.WordPieceTrainer(vocab_size=220, special_tokens=special, show_progress=False)
    tokenizer = BertTokenizer(vocab=_trained(backend, trainer)["vocab"], do_lower_case=False, strip_accents=False)
    return BertForMaskedLM(BertConfig(vocab_size=len(tokenizer), pad_token_id=0, **SIZES)), tokenizer


def modern_bpe():
    """ModernBERT: byte-level BPE with special and other tokens added behind the pieces, and spare embeddings."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.train_from_iterator(
        (NEEDED + OTHERS) * 4,
        trainers.BpeTrainer(vocab_size=420, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False),
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        pad_token="[PAD]",
        mask_token="[MASK]",
    )
    tokenizer.add_tokens(["whales", "engine"])
    named = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("pad", "cls", "sep")}
    named |= {"bos_token_id": named["cls_token_id"], "eos_token_id": named["sep_token_id"]}
    return ModernBertForMaskedLM(ModernBertConfig(vocab_size=len(tokenizer) + 6, **named, **SIZES)), tokenizer


KINDS = {"unigram": unigram, "byte-bpe": byte_bpe, "word-piece": word_piece, "modern-bpe": modern_bpe}


def build(kind, *, seed=0):
    """Return a model with random weights and biases, and its tokenizer."""
    torch.manual_seed(seed)
    model, tokenizer = KINDS[kind]()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.uniform_(-1, 1)
    return model.eval(), tokenizer

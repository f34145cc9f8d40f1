"""A tokenizer trained here is one that AutoTokenizer reads as Qwen's."""

import json

import pytest
from transformers import AutoTokenizer, Qwen2Tokenizer

from soju.core.errors import UserError
from soju.embedding.expansion.byte_bpe import ByteBpe
from soju.embedding.scratch_base import PLAIN, SPECIALS, train_byte_bpe

TEXTS = ["the cat sat on the mat", "the dog sat on the log", "a cat and a dog"] * 3
PROBES = ["the cat", "한국어 텍스트", "def f(x):\n    return x+1", "<|im_start|>user <think>", " ", "I'll go 2024"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    train_byte_bpe(TEXTS, 300, folder, max_length=32)
    return folder


def test_transformers_reads_the_same_ids_as_the_tokenizers_library(folder):
    trained = ByteBpe.load(str(folder))
    loaded = AutoTokenizer.from_pretrained(str(folder))
    assert isinstance(loaded, Qwen2Tokenizer)
    for text in PROBES:
        ids = loaded(text)["input_ids"]
        assert ids[:-1] == next(iter(trained.encode([text]))), text
        assert loaded.decode(ids[:-1]) == text


def test_a_text_ends_with_the_token_that_pads_on_the_left(folder):
    loaded = AutoTokenizer.from_pretrained(str(folder))
    end = loaded.convert_tokens_to_ids("<|endoftext|>")
    rows = loaded(["the cat", "the cat sat on the mat"], padding=True)
    assert all(row[-1] == end for row in rows["input_ids"])
    assert rows["attention_mask"][0][0] == 0
    assert rows["input_ids"][0][0] == end
    assert loaded("the cat sat", truncation=True, max_length=2)["input_ids"][-1] == end


def test_added_tokens_lie_behind_the_vocabulary_in_qwens_order(folder):
    trained = ByteBpe.load(str(folder))
    first = len(trained.vocabulary)
    assert list(trained.added_tokens.items()) == [
        (token, first + place) for place, token in enumerate((*SPECIALS, *PLAIN))
    ]
    assert trained.size == first + 26


def test_equal_texts_give_equal_files(folder, tmp_path):
    train_byte_bpe(TEXTS, 300, tmp_path, max_length=32)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert json.loads((tmp_path / name).read_text()) == json.loads((folder / name).read_text())


def test_a_vocabulary_of_bytes_alone_is_refused(tmp_path):
    with pytest.raises(UserError, match="needs more than 256"):
        train_byte_bpe(TEXTS, 256, tmp_path)

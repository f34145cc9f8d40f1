import pytest
from tokenizers import Tokenizer
from tokenizers.models import Unigram, WordLevel
from transformers import AutoTokenizer

from fixtures.tiny_models import PIECES, tiny_tokenizer
from soju.core.errors import UserError
from soju.sparse.export.stock import stock_tokenizer

TEXTS = ["서버 쌀", "<unk> 서버", "없는 server rice", ""]


def test_auto_tokenizer_reloads_the_same_pieces_and_ids(tmp_path):
    tokenizer = tiny_tokenizer()
    stock_tokenizer(tokenizer, max_length=7).save_pretrained(tmp_path)
    reloaded = AutoTokenizer.from_pretrained(tmp_path)
    assert reloaded.get_vocab() == tokenizer.get_vocab()
    assert len(reloaded) == len(PIECES)
    assert reloaded.model_max_length == 7
    assert [reloaded(text)["input_ids"] for text in TEXTS] == [tokenizer.encode(text).ids for text in TEXTS]


def test_padding_is_masked_and_adds_no_id():
    batch = stock_tokenizer(tiny_tokenizer())(["서버", "서버 쌀 없는"], padding=True)
    assert batch["input_ids"] == [[1, 0, 0], [1, 3, 0]]
    assert batch["attention_mask"] == [[1, 0, 0], [1, 1, 1]]


def test_the_start_piece_makes_an_empty_text_one_piece_long():
    stock = stock_tokenizer(tiny_tokenizer(), start_token=True)
    assert stock("")["input_ids"] == [0]
    assert stock("서버")["input_ids"] == [0, 1]
    assert stock("서버", add_special_tokens=False)["input_ids"] == [1]


def test_the_tokenizer_given_is_left_as_it_was():
    tokenizer = tiny_tokenizer()
    before = tokenizer.to_str()
    stock_tokenizer(tokenizer, start_token=True)
    assert tokenizer.to_str() == before


def test_a_word_level_tokenizer_works_as_well():
    tokenizer = Tokenizer(WordLevel({"[UNK]": 0, "a": 1}, unk_token="[UNK]"))
    assert stock_tokenizer(tokenizer).pad_token == "[UNK]"


def test_a_tokenizer_without_an_unknown_piece_is_refused():
    with pytest.raises(UserError, match="no unknown token"):
        stock_tokenizer(Tokenizer(Unigram([("a", 0.0)])))


def test_a_length_that_holds_no_text_is_refused():
    with pytest.raises(UserError, match="2 or more"):
        stock_tokenizer(tiny_tokenizer(), max_length=1)

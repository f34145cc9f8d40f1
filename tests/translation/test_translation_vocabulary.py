import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import AutoTokenizer

from soju.core.errors import IntegrityError, UserError
from soju.translation.toy import toy_pairs
from soju.translation.vocabulary import (
    EOS,
    PAD,
    RESERVED,
    EncodedPairs,
    EncodedRow,
    Vocabulary,
    collate,
    train_vocabulary,
)

PAIRS = toy_pairs(600)
TEXTS = [text for pair in PAIRS for text in (pair.ko, pair.en)] + ["ㅋㅋㅋ 정말?", "abcdefghijklmnopqrstuvwxyz"] * 5


@pytest.fixture(scope="module")
def vocabulary():
    return train_vocabulary(TEXTS, 400)


def test_reserved_marks_have_the_first_ids(vocabulary):
    assert [vocabulary.tokenizer.token_to_id(mark) for mark in RESERVED] == list(range(25))
    assert RESERVED[:6] == ("<s>", "<pad>", "</s>", "<unk>", "__ko__", "__en__")
    assert RESERVED[6] == "__p1__"
    assert RESERVED[21:] == ("__p16__", "__g__", "__t__", "__/g__")


@pytest.mark.parametrize("text", ["학생은 책을 읽었다.", "the student read the book.", "ㅋㅋㅋ 정말?"])
def test_texts_come_back(vocabulary, text):
    ids = vocabulary.encode(text)
    assert 3 not in ids
    assert vocabulary.decode(ids) == text


def test_jamo_stay_whole_and_spaces_are_folded(vocabulary):
    assert "".join(vocabulary.tokenizer.id_to_token(number) for number in vocabulary.encode("ㅋㅋㅋ")) == "▁ㅋㅋㅋ"
    assert vocabulary.encode("  학생은\u3000 책을\t읽었다. ") == vocabulary.encode("학생은 책을 읽었다.")
    assert vocabulary.encode("학생") == vocabulary.encode("학생")  # decomposed


@pytest.mark.parametrize("text", ["__p1__에서 책을", "책을 __p2__ 학생은", "책을__p16__"])
def test_placeholders_are_one_id_and_keep_their_spaces(vocabulary, text):
    ids = vocabulary.encode(text)
    assert sum(6 <= number < 22 for number in ids) == 1
    assert vocabulary.decode(ids) == text


def test_tags_and_end_surround_a_text_and_decoding_drops_them(vocabulary):
    ids = vocabulary.encode_tagged("책", "en")
    assert (ids[0], ids[-1]) == (5, EOS)
    assert vocabulary.decode([EOS, *ids, PAD, PAD]) == "책"


def test_a_saved_vocabulary_is_the_same_and_transformers_loads_it(vocabulary, tmp_path):
    vocabulary.save(tmp_path)
    assert Vocabulary.load(tmp_path).fingerprint == vocabulary.fingerprint
    stock = AutoTokenizer.from_pretrained(tmp_path)
    text = "학생은 책을 읽었다."
    assert stock(text, add_special_tokens=False)["input_ids"] == vocabulary.encode(text)
    assert stock(f"__ko__ {text}", add_special_tokens=False)["input_ids"] == vocabulary.encode_tagged(text, "ko")[:-1]
    assert (stock.pad_token_id, stock.eos_token_id) == (PAD, EOS)


def test_large_vocabularies_spell_rare_characters_in_bytes():
    large = train_vocabulary(TEXTS, 16_000)
    ids = large.encode("학생은 뷁 읽었다.")
    assert 3 not in ids
    assert large.decode(ids) == "학생은 뷁 읽었다."
    small = train_vocabulary(TEXTS, 400)
    assert 3 in small.encode("뷁")


def test_a_size_without_room_and_a_foreign_tokenizer_are_refused(tmp_path):
    with pytest.raises(UserError, match="leaves no room"):
        train_vocabulary(TEXTS, 60)
    with pytest.raises(UserError, match="its first ids are a"):
        Vocabulary(Tokenizer(models.WordLevel({"a": 0}, unk_token="a")))
    with pytest.raises(IntegrityError, match="no tokenizer"):
        Vocabulary.load(tmp_path)


def test_batches_are_padded_and_the_decoder_reads_the_labels_one_later():
    rows = [EncodedRow([4, 30, 2], [5, 31, 32, 2]), EncodedRow([5, 33, 34, 2], [4, 2])]
    batch = collate(rows)
    assert batch["input_ids"].tolist() == [[4, 30, 2, 1], [5, 33, 34, 2]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0], [1, 1, 1, 1]]
    assert batch["labels"].tolist() == [[5, 31, 32, 2], [4, 2, -100, -100]]
    assert batch["decoder_input_ids"].tolist() == [[2, 5, 31, 32], [2, 4, 2, 1]]
    assert batch["labels"].dtype == torch.int64


def test_pairs_are_encoded_in_both_directions_and_long_ones_counted(vocabulary):
    encoded = EncodedPairs(PAIRS[:10], vocabulary, max_length=64)
    assert len(encoded) == 20
    assert encoded[0].source == encoded[1].target == vocabulary.encode_tagged(PAIRS[0].ko, "ko")
    assert EncodedPairs(PAIRS[:10], vocabulary, max_length=3).too_long == 10

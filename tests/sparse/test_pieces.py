import pytest
from tokenizers.pre_tokenizers import ByteLevel

from fixtures.pico_masked_lms import build
from soju.sparse.static.encoder import lexicon_term, readable_terms


@pytest.mark.parametrize(
    ("pieces", "names"),
    [
        (["<unk>", "▁물▁", "▁vaccine▁", "▁학교", "를▁", "ing"], ["<unk>", "물", "vaccine", "학교…", "…를", "…ing…"]),
        (["[PAD]", "machine", "##ing", "##를", "##"], ["[PAD]", "machine", "…ing", "…를", "##"]),
        (["<s>", "▁program", "ing", "▁", "프로그램"], ["<s>", "program", "…ing", "▁", "…프로그램"]),
    ],
    ids=["lexicon", "word pieces", "sentence pieces"],
)
def test_a_piece_is_named_as_its_vocabulary_spells_it(pieces, names):
    assert readable_terms(pieces) == tuple(names)


def spelled(text):
    ((piece, _),) = ByteLevel(add_prefix_space=False).pre_tokenize_str(text)
    return piece


def test_byte_level_pieces_become_text_and_half_a_syllable_stays_half():
    pieces = [spelled(" 물"), spelled("물"), spelled(" sea"), spelled("물")[:2], "[CLS] x", spelled(" ")]
    whole, rest, sea, half, special, space = readable_terms(pieces)
    assert (whole, rest, sea, special) == ("물", "…물", "sea", "[CLS] x")
    assert half == "…\ufffd"
    assert space == "Ġ"


@pytest.mark.parametrize("kind", ["unigram", "byte-bpe", "word-piece", "modern-bpe"])
def test_every_piece_of_a_real_tokenizer_has_a_name(kind):
    _, tokenizer = build(kind)
    names = readable_terms(tokenizer.convert_ids_to_tokens(range(len(tokenizer))))
    assert len(names) == len(tokenizer)
    assert all(names)


def test_a_whole_word_of_the_lexicon_keeps_nothing_of_its_marks():
    assert [lexicon_term(piece) for piece in ("▁a▁", "▁", "▁▁", "7")] == ["a", "▁", "▁…", "…7…"]

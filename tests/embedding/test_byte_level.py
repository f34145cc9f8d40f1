import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import pre_tokenizers

from soju.core.errors import UserError
from soju.core.language import is_hangul
from soju.embedding.expansion.byte_bpe import (
    ALPHABET,
    is_hangul_piece,
    is_spelling,
    is_unfinished_syllable,
    starts_whole,
    token_bytes,
    token_spelling,
    token_text,
)


def test_the_alphabet_is_that_of_the_tokenizers_library():
    assert len(set(ALPHABET)) == 256
    assert set(ALPHABET) == set(pre_tokenizers.ByteLevel.alphabet())
    assert ALPHABET[0x20] == "Ġ"
    assert ALPHABET[ord("A")] == "A"


@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=20))
def test_a_text_is_spelled_as_the_library_spells_it_and_read_back(text):
    library = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    assert token_spelling(text) == "".join(piece for piece, _ in library.pre_tokenize_str(text))
    assert token_text(token_spelling(text)) == text


def test_a_part_of_a_character_has_bytes_but_no_text():
    part = "한".encode()[:2]
    assert token_bytes(token_spelling(part)) == part
    assert token_text(token_spelling(part)) is None


def test_plain_korean_is_no_spelling():
    assert not is_spelling("한")
    assert token_text("한") is None
    with pytest.raises(UserError, match="'한' stands for no byte"):
        token_bytes("한")


def test_every_piece_taken_for_hangul_occurs_in_hangul_only():
    for code in range(0x80, 0x110000):
        character = chr(code)
        if 0xD800 <= code <= 0xDFFF or is_hangul(character) or unicodedata.category(character) == "Cn":
            continue
        assert not is_hangul_piece(character.encode()), hex(code)


def test_every_hangul_character_and_the_exclusive_halves_are_hangul_pieces():
    characters = [chr(code) for code in range(0x110000) if is_hangul(chr(code))]
    assert all(is_hangul_piece(character.encode()) for character in characters)
    halves = {character.encode()[:2] for character in characters}
    shared = {half for half in halves if not is_hangul_piece(half)}
    assert shared == {b"\xe3\x84", b"\xe3\x86", b"\xea\xa5"}
    assert {half for half in halves if not is_unfinished_syllable(half)} == shared


def test_a_lead_byte_that_other_scripts_share_is_no_hangul_piece():
    assert [is_hangul_piece(bytes([lead])) for lead in (0xE1, 0xE3, 0xEA, 0xEB, 0xEC, 0xED)] == [False] * 3 + [True] * 3


@pytest.mark.parametrize(
    ("piece", "unfinished", "whole"),
    [
        ("한".encode()[:2], True, True),
        (" 한".encode()[:3], True, True),
        ("한".encode(), False, True),
        ("한국".encode()[:5], False, True),
        ("한국".encode()[2:], False, False),
        ("한".encode()[1:], False, False),
    ],
)
def test_unfinished_syllables_and_pieces_that_start_whole(piece, unfinished, whole):
    assert is_unfinished_syllable(piece) is unfinished
    assert starts_whole(piece) is whole

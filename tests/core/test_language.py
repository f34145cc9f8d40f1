import unicodedata

import pytest

from soju.core.language import is_hangul, is_latin, is_syllable, language_of


@pytest.mark.parametrize(
    ("text", "language"),
    [
        ("학교", "ko"),
        ("API를", "ko"),
        ("ㅋㅋ", "ko"),
        (unicodedata.normalize("NFD", "각"), "ko"),
        ("school", "en"),
        ("café", "en"),
        ("v2", "en"),
        ("", "other"),
        ("2026!", "other"),
        ("漢字", "other"),
        ("ひらがな", "other"),
        ("Ж", "other"),
        ("×÷", "other"),
        ("😀", "other"),
    ],
)
def test_the_language_of_a_text_is_told_by_its_script(text, language):
    assert language_of(text) == language


def test_jamo_are_hangul_but_no_syllables():
    assert [is_hangul(character) for character in "가힣ㄱᄀꥠힰ"] == [True] * 6
    assert [is_syllable(character) for character in "가힣ㄱᄀꥠힰ"] == [True, True, False, False, False, False]
    assert not is_hangul(chr(0xABFF))
    assert not is_hangul(chr(0xD7A4))


def test_letters_beyond_latin_extended_are_not_latin():
    assert [is_latin(character) for character in "aZéɏɐЖ1_"] == [True, True, True, True, False, False, False, False]

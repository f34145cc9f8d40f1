from itertools import pairwise

import pytest

from soju.sparse.static.lexicon import analyse


def marked(text):
    """Surface and words of each stretch of one text."""
    (stretches,) = analyse([text], workers=1)
    return [(text[stretch.start : stretch.end], stretch.words) for stretch in stretches]


def test_nouns_keep_their_form_and_particles_have_no_words():
    assert marked("검색을 엔진이") == [("검색", ("검색",)), ("을", ()), ("엔진", ("엔진",)), ("이", ())]


def test_verbs_and_adjectives_come_as_dictionary_forms():
    assert marked("빠르고 먹는") == [("빠르", ("빠르다",)), ("고", ()), ("먹", ("먹다",)), ("는", ())]


def test_a_contracted_syllable_stays_one_stretch():
    assert marked("공부를 했다")[2:] == [("했", ("하다",)), ("다", ())]
    assert marked("만든다") == [("만든다", ("만들다",))]


def test_irregular_verbs_come_as_dictionary_forms():
    assert ("도", ("돕다",)) in marked("친구를 도와 했다")
    assert ("아름다운", ("아름답다",)) in marked("아름다운 꽃")


def test_an_elided_copula_has_no_stretch():
    assert marked("사과다") == [("사과", ("사과",)), ("다", ())]


def test_foreign_words_and_symbols_have_no_words():
    assert marked("API를 漢字 3!") == [("API", ()), ("를", ()), ("漢字", ()), ("3", ()), ("!", ())]


@pytest.mark.parametrize(
    "text",
    [
        "나는 학교에 갔다.",
        "😀 학교에\t갔다 👩‍👩‍👧",
        "漢字와 한자",
        "a\0b 나무",
        "ㅋㅋㅋ 좋아",
        "이건 뭐니? 난 널 봤어",
        "Don't use API를 v2",
    ],
)
def test_stretches_in_order_restore_the_text_but_its_spaces(text):
    (stretches,) = analyse([text], workers=1)
    assert all(a.end <= b.start for a, b in pairwise(stretches))
    assert all(stretch.start < stretch.end for stretch in stretches)
    covered = {position for stretch in stretches for position in range(stretch.start, stretch.end)}
    left = "".join(character for position, character in enumerate(text) if position not in covered)
    assert left.strip() == ""


def test_texts_are_answered_in_order_and_empty_ones_have_no_stretches():
    texts = ["검색", "", "엔진", " "]
    found = [
        [text[s.start : s.end] for s in stretches]
        for text, stretches in zip(texts, analyse(texts, workers=1), strict=True)
    ]
    assert found == [["검색"], [], ["엔진"], []]


def test_texts_may_come_from_a_generator():
    assert len(list(analyse((text for text in ("검색", "엔진")), workers=1))) == 2

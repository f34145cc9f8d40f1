from collections import Counter

import pytest

from soju.core.errors import DataError, UserError
from soju.translation.data import (
    DataSettings,
    Split,
    TranslationPair,
    clean,
    protect,
    protect_source,
    read_translation_data,
    refuse_shared,
    restore,
    split_by_document,
)
from soju.translation.toy import toy_pairs


def pair(ko, en, **extras):
    return TranslationPair(ko, en, **extras)


def test_cleaning_counts_each_reason_and_keeps_the_first_of_equal_pairs():
    good = pair("물을 끓인다.", "Boil the water.")
    rows = [
        good,
        pair("물을  끓인다.", "Boil the water."),  # equal after folding spaces
        pair("", "Nothing."),
        pair("wwe 는", "wwe 는"),
        pair("only latin letters", "another text"),
        pair("한국어", "한국어로 쓴 영어"),
        pair("물", "A sentence of far more than nineteen characters."),
        pair("가" * 501, "a" * 501),
    ]
    found = clean(rows)
    assert found.pairs == [good]
    assert found.dropped == Counter(
        {"duplicate": 1, "empty": 1, "identical-sides": 1, "script": 2, "length-ratio": 1, "too-long": 1}
    )


def test_pairs_of_a_document_stay_together_and_judged_texts_leave_training():
    pairs = [pair(f"문장 {n}번", f"sentence number {n}", document=f"d{n // 5}") for n in range(400)]
    pairs += [pair("문장 3번", "another translation", document="elsewhere")]
    split = split_by_document(pairs, seed=1, validation=0.2, test=0.2)
    places = {}
    for name in ("train", "validation", "test"):
        for row in getattr(split, name):
            places.setdefault(row.document, set()).add(name)
    assert all(len(names) == 1 for names in places.values())
    refuse_shared(split)
    assert len(split.train) + len(split.validation) + len(split.test) + split.dropped.total() == 401
    assert 0.1 < len(split.test) / 401 < 0.3


def test_a_document_on_two_sides_is_refused_and_so_is_a_text():
    one, other = pair("하나 둘", "one two", document="d"), pair("셋 넷", "three four", document="d")
    with pytest.raises(UserError, match="1 document of test also stand in training"):
        refuse_shared(Split([one], [pair("가", "a")], [other]))
    with pytest.raises(UserError, match="1 text of validation also stand in training"):
        refuse_shared(Split([one], [pair("하나, 둘!", "something else")], [pair("셋", "three")]))


def test_protected_strings_stand_on_both_sides_and_come_back():
    ko = "https://a.kr/x?y=1에서 `ls`를 {name} 님께 %s개 <b>보내요</b> me@x.org"
    en = "Send {name} %s `ls` from https://a.kr/x?y=1 to me@x.org <b>now</b>"
    source, target, strings = protect(ko, en)
    assert strings == ["https://a.kr/x?y=1", "`ls`", "{name}", "%s", "<b>", "</b>", "me@x.org"]
    assert source == "__p1__에서 __p2__를 __p3__ 님께 __p4__개 __p5__보내요__p6__ __p7__"
    assert restore(target, strings) == (en, 0)


def test_a_string_of_one_side_alone_is_left():
    assert protect("`ls` 명령", "The ls command") == ("`ls` 명령", "The ls command", [])


def test_lost_placeholders_are_counted_and_invented_ones_removed():
    source, strings = protect_source("`a`와 `b`")
    assert source == "__p1__와 __p2__"
    assert restore("__p2__ and __p9__", strings) == ("`b` and ", 1)


def test_toy_pairs_are_many_different_and_the_same_for_a_seed():
    pairs = toy_pairs(3_000, seed=4)
    assert len({p.ko for p in pairs}) == len({p.en for p in pairs}) == 3_000
    assert pairs == toy_pairs(3_000, seed=4)
    assert clean(pairs).pairs == pairs
    with pytest.raises(UserError, match="toy_pairs"):
        toy_pairs(1_000_000)


def test_files_are_read_with_optional_columns(tmp_path):
    rows = "".join(f"{n}번째 문장이다.\tThis is sentence {n}.\tnews\tdoc{n}\n" for n in range(200))
    (tmp_path / "a.tsv").write_text("ko\ten\tdomain\tdocument\n" + rows, encoding="utf-8")
    data = read_translation_data(DataSettings(files=["a.tsv"], root=tmp_path, test_share=0.2), seed=0)
    sizes = [len(getattr(data.split, name)) for name in ("train", "validation", "test")]
    assert sum(sizes) == 200
    assert data.statistics["train"]["domains"] == {"news": sizes[0]}


def test_a_reserved_mark_is_refused_with_its_place(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"ko": "가 __p1__", "en": "a"}\n', encoding="utf-8")
    with pytest.raises(DataError, match=r"a\.jsonl:1: ko: '__p1__' is a mark that the vocabulary reserves"):
        read_translation_data(DataSettings(files=["a.jsonl"], root=tmp_path), seed=0)


def test_swapped_columns_are_refused(tmp_path):
    (tmp_path / "a.tsv").write_text("Boil the water.\t물을 끓인다.\n" * 3, encoding="utf-8")
    with pytest.raises(UserError, match="no Hangul in any Korean text; exchange the columns"):
        read_translation_data(DataSettings(files=["a.tsv"], root=tmp_path), seed=0)


def test_files_or_toy_pairs_must_be_given():
    with pytest.raises(UserError, match="give files with sentence pairs, or toy_pairs"):
        read_translation_data(DataSettings(), seed=0)

import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from fixtures.lexicons import small_counts, small_tokenizer, stretches_of
from soju.core.errors import UserError
from soju.sparse.static.lexicon import BOUNDARY, UNKNOWN, LexiconCounts, build_tokenizer, latin_words


@pytest.fixture(scope="module")
def tokenizer():
    return small_tokenizer()


def pieces(tokenizer, text):
    return tokenizer.encode(text, add_special_tokens=False).tokens


def words_seen(tokenizer, text):
    """The Latin words the tokenizer delimits, before it looks at its vocabulary."""
    normal = tokenizer.normalizer.normalize_str(text)
    return [part.strip(BOUNDARY) for part, _ in tokenizer.pre_tokenizer.pre_tokenize_str(normal) if BOUNDARY in part]


def test_words_are_whole_pieces_and_unknown_ones_fall_to_sub_words(tokenizer):
    assert pieces(tokenizer, "Don't use API를 v2")[:4] == ["▁don't▁", "▁use▁", "▁api▁", "를"]
    rest = pieces(tokenizer, "Don't use API를 v2")[4:]
    assert len(rest) > 1
    assert "".join(rest) == "▁v2▁"


def test_a_known_word_is_never_cut(tokenizer):
    for word in small_counts().latin:
        assert pieces(tokenizer, word) == [BOUNDARY + word + BOUNDARY]


def test_a_korean_compound_is_split_into_known_nouns(tokenizer):
    assert pieces(tokenizer, "검색엔진을 네트워크를") == ["검색", "엔진", "을", "네트워크", "를"]
    assert pieces(tokenizer, "네트워크검색이") == ["네트워크", "검색", "이"]


def test_a_contracted_form_is_one_piece(tokenizer):
    assert pieces(tokenizer, "엔진을 만든다") == ["엔진", "을", "만든다"]


@pytest.mark.parametrize(
    ("text", "same"),
    [
        ("ＡＰＩ Search", "api search"),
        ("검색", "검색"),  # composed from jamo
        ("ﬁnd", "find"),
        ("SEARCH​", "search​"),
    ],
)
def test_case_width_and_composition_do_not_matter(tokenizer, text, same):
    assert pieces(tokenizer, text) == pieces(tokenizer, same)
    assert latin_words(text) == latin_words(same)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("'search'", ["'", "▁search▁", "'"]),
        ("the engines' api", ["▁the▁", "▁engines▁", "'", "▁api▁"]),
        ("use'", ["▁use▁", "'"]),
        ("search_engine", ["▁search▁", "_", "▁engine▁"]),
        ("검색API엔진", ["검색", "▁api▁", "엔진"]),
        ("▁ search ▁api▁", ["▁search▁", "▁api▁"]),
    ],
)
def test_quotes_joins_and_the_boundary_sign_itself_do_not_hide_words(tokenizer, text, expected):
    assert pieces(tokenizer, text) == expected


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("Don't use API를 v2", ["don't", "use", "api", "v2"]),
        ("'tis the dogs' rock'n'roll", ["tis", "the", "dogs", "rock'n'roll"]),
        ("a''b a'1 a'b1", ["a", "b", "a", "1", "a'b1"]),
        ("café 1,000.5 e-mail", ["caf", "1", "000", "5", "e", "mail"]),
        ("ＡＰＩ", ["api"]),
        ("검색", []),
        ("", []),
    ],
)
def test_latin_words_are_those_the_tokenizer_delimits(tokenizer, text, words):
    assert latin_words(text) == words
    assert words_seen(tokenizer, text) == words


@given(st.text(st.sampled_from("aZ09' '’_▁é가ㄱＡ.\n"), max_size=20))
def test_latin_words_and_the_tokenizer_agree_on_any_text(tokenizer, text):
    assert words_seen(tokenizer, text) == latin_words(text)


@given(st.text(max_size=30))
def test_any_text_is_cut_into_pieces_that_lie_in_it(tokenizer, text):
    encoding = tokenizer.encode(text, add_special_tokens=False)
    assert all(0 <= start <= end <= len(text) for start, end in encoding.offsets)
    assert all(0 <= piece < tokenizer.get_vocab_size() for piece in encoding.ids)


@pytest.mark.parametrize("text", ["...!?", "😀", "👩‍👩‍👧", "ㅋㅋ ㄱ", "漢字", "\0", "힣", "﷽"])
def test_what_the_lexicon_does_not_know_is_unknown(tokenizer, text):
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    assert ids
    assert set(ids) == {tokenizer.token_to_id(UNKNOWN)} == {0}


@pytest.mark.parametrize("text", ["", " ", "\t\r\n", "　", "▁"])
def test_no_text_has_no_pieces(tokenizer, text):
    assert tokenizer.encode(text, add_special_tokens=False).ids == []


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    ("text", "at_least"),
    [("a" * 100_000, 50_000), ("힣" * 100_000, 1), ("검색엔진" * 25_000, 50_000), ("!" * 100_000, 100_000)],
    ids=["Latin", "unknown syllables", "Korean", "punctuation"],
)
def test_a_string_of_100000_characters_without_spaces_is_cut_in_linear_time(tokenizer, text, at_least):
    assert len(tokenizer.encode(text, add_special_tokens=False).ids) >= at_least


def test_the_saved_tokenizer_gives_identical_ids(tokenizer, tmp_path):
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    read = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    texts = ["Don't use API를 v2", "검색엔진을 만든다", "'unknown' words▁", "", "😀ㅋ漢\0", "ＡＰＩ를"]
    assert [read.encode(text).ids for text in texts] == [tokenizer.encode(text).ids for text in texts]
    assert read.get_vocab() == tokenizer.get_vocab()


def test_rare_words_are_left_to_sub_words_unless_the_term_list_has_them():
    counts = small_counts()
    counts.add_latin("quagga")
    counts.add_latin("okapi", always=True)
    counts.add_korean(*stretches_of("기린|기린"))
    counts.add_korean(*stretches_of("얼룩말|얼룩말"), always=True)
    vocabulary = build_tokenizer(counts, min_count=2, sub_words=100).get_vocab()
    assert "▁okapi▁" in vocabulary
    assert "얼룩말" in vocabulary
    assert "▁quagga▁" not in vocabulary
    assert "기린" not in vocabulary
    assert {"기", "린"} <= set(vocabulary)  # every syllable that was seen can be read


def test_dictionary_forms_are_terms_even_when_no_text_holds_them(tokenizer):
    assert {"하다", "만들다", "좋다"} <= set(tokenizer.get_vocab())


def test_the_unknown_piece_comes_first_and_no_piece_is_empty(tokenizer):
    vocabulary = tokenizer.get_vocab()
    assert vocabulary[UNKNOWN] == 0
    assert sorted(vocabulary.values()) == list(range(len(vocabulary)))
    assert "" not in vocabulary


def test_stretches_that_are_not_all_syllables_are_not_counted_as_korean():
    counts = LexiconCounts()
    counts.add_korean(*stretches_of("API 를 ㅋㅋ 漢字 검색|검색"))
    assert dict(counts.stretches) == {"를": 1, "검색": 1}
    assert dict(counts.latin) == {"api": 1}


def test_two_builds_are_byte_identical():
    assert len({small_tokenizer().to_str() for _ in range(6)}) == 1


def test_builds_in_other_processes_are_byte_identical():
    code = (
        "import sys; from fixtures.lexicons import small_tokenizer; "
        "sys.stdout.buffer.write(small_tokenizer().to_str().encode())"
    )
    here = small_tokenizer().to_str().encode()
    for seed, threads in (("1", "1"), ("2", "2")):
        environment = {
            **os.environ,
            "PYTHONHASHSEED": seed,
            "RAYON_NUM_THREADS": threads,
            "PYTHONPATH": str(Path(__file__).parents[1]),
        }
        result = subprocess.run([sys.executable, "-c", code], env=environment, check=True, capture_output=True)
        assert result.stdout == here


def test_the_order_of_the_texts_does_not_matter():
    counts = LexiconCounts()
    small = small_counts()
    for name in ("stretches", "words", "latin"):
        getattr(counts, name).update(dict(reversed(getattr(small, name).items())))
    assert build_tokenizer(counts, sub_words=100).to_str() == small_tokenizer().to_str()


@pytest.mark.parametrize("missing", ["stretches", "latin"])
def test_a_tokenizer_of_one_language_is_refused(missing):
    counts = small_counts()
    getattr(counts, missing).clear()
    with pytest.raises(UserError, match="both Korean and English text are needed"):
        build_tokenizer(counts)


@pytest.mark.parametrize(("name", "language"), [("stretches", "Korean"), ("latin", "English")])
def test_counts_that_are_all_too_small_are_refused(name, language):
    counts = small_counts()
    once = dict.fromkeys(getattr(counts, name), 1)
    getattr(counts, name).clear()
    getattr(counts, name).update(once)
    with pytest.raises(UserError, match=rf"no {language} word occurs 2 times; lower tokenizer\.min_count"):
        build_tokenizer(counts, min_count=2)

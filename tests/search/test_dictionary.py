import gzip
import json
import math

import pytest

from fixtures.needs import DATA, needs_data
from soju.core.errors import UserError
from soju.data.rows import Term, TermRow
from soju.search.lexical import Dictionary, DictionarySearcher, KoreanEnglishAnalyzer


class SplitAnalyzer:
    """Words are what spaces separate."""

    def analyze(self, texts):
        return [text.split() for text in texts]


def row(ko, **terms):
    return TermRow(ko, tuple(Term(text.replace("_", " "), similarity) for text, similarity in terms.items()))


ROWS = [
    row("기계", machine=1.0),
    row("학습", learning=1.0, study=0.5, 공부=0.9),
    row("기계 학습", machine_learning=0.8),
]
DICTIONARY = Dictionary(ROWS, SplitAnalyzer())


def test_a_word_brings_its_translations_by_similarity():
    (weights,) = DICTIONARY.expand(["학습"])
    norm = math.sqrt(1.0 + 0.25)
    assert weights == pytest.approx({"학습": 0.7, "learning": 1 / norm, "study": 0.25 / norm})


def test_the_longest_entry_wins_and_its_words_follow_at_half_weight():
    (weights,) = DICTIONARY.expand(["기계 학습"])
    norm = math.sqrt(1.25)
    assert weights == pytest.approx(
        {
            "기계": 0.7,
            "학습": 0.7,
            "machine": 0.4 + 0.5,  # half of 0.8 for the compound, half of 1 for 기계
            "learning": 0.4 + 0.5 / norm,
            "study": 0.5 * 0.25 / norm,
        }
    )


def test_english_words_lead_back_to_korean_heads():
    (weights,) = DICTIONARY.expand(["machine learning today"])
    assert weights["기계"] == pytest.approx(0.4 + 0.5)
    assert weights["학습"] == pytest.approx(0.4 + 0.5)
    assert weights["today"] == 0.7


def test_unknown_words_stay_and_repeated_words_add_up():
    assert DICTIONARY.expand(["2018 2018", ""]) == [{"2018": 1.4}, {}]
    (weights,) = DICTIONARY.expand(["기계 기계"])
    assert weights == pytest.approx({"기계": 1.4, "machine": 2.0})


def test_a_word_in_several_translations_of_one_entry_counts_once():
    dictionary = Dictionary([row("값", price=1.0, unit_price=1.0)], SplitAnalyzer())
    (weights,) = dictionary.expand(["값"])
    assert weights == pytest.approx({"값": 0.7, "price": 1 / math.sqrt(2), "unit": 0.5 / math.sqrt(2)})


def test_only_the_ten_most_similar_translations_are_used():
    terms = {f"t{letter}": 1.0 - index / 100 for index, letter in enumerate("abcdefghijkl")}
    (weights,) = Dictionary([row("단어", **terms)], SplitAnalyzer()).expand(["단어"])
    assert set(weights) == {"단어", *(f"t{letter}" for letter in "abcdefghij")}


def test_the_largest_similarity_of_a_repeated_pair_counts_and_remarks_do_not():
    dictionary = Dictionary([row("배", ship=0.2), TermRow("배", (Term("ship (vessel)", 0.9),))], SplitAnalyzer())
    assert dictionary.expand(["배"]) == [pytest.approx({"배": 0.7, "ship": 0.9})]


def test_a_korean_query_finds_an_english_document_and_the_other_way_round():
    rows = [row("당뇨병", diabetes=1.0), row("치료", treatment=1.0, cure=0.9), row("예방", prevention=1.0)]
    dictionary = Dictionary(rows, KoreanEnglishAnalyzer())
    english = DictionarySearcher(["Prevention of floods", "treatments of diabetes", "soju"], dictionary)
    indices, scores = english.search(["당뇨병을 치료하는 방법", "소주"], 10)
    assert [found.tolist() for found in indices] == [[1], []]
    assert scores[0][0] > 0
    korean = DictionarySearcher(["홍수의 예방", "당뇨병 치료"], dictionary)
    assert korean.search(["How are diabetes cures made?"], 10)[0][0].tolist() == [1]


def test_names_and_numbers_are_found_without_an_entry():
    searcher = DictionarySearcher(["nothing", "WWE 2018"], Dictionary(ROWS, KoreanEnglishAnalyzer()))
    assert searcher.search(["2018년 wwe 우승자"], 10)[0][0].tolist() == [1]


@pytest.mark.parametrize("rows", [[], [row("학습", 공부=1.0)], [row("(학습)", study=1.0)]])
def test_rows_without_a_translation_are_refused(rows):
    with pytest.raises(UserError, match="no Korean–English pair"):
        Dictionary(rows, SplitAnalyzer())


def read_lines(name):
    with gzip.open(DATA / name, "rt", encoding="utf-8") as file:
        return [line.rstrip("\n") for line in file]


def sentence_pairs():
    return [tuple(line.split("\t")) for line in read_lines("parallel.dev.tsv.gz")]


def question_pairs():
    return [(question["ko"], question["en"]) for question in map(json.loads, read_lines("mkqa.dev_half.jsonl.gz"))]


@pytest.mark.slow
@needs_data
def test_the_baseline_stays_as_strong_as_it_was_measured():
    entries = [(row["ko"], row["terms"]) for row in map(json.loads, read_lines("terms.jsonl.gz"))]
    rows = [TermRow(ko, tuple(Term(term["term"], term["sim"]) for term in terms)) for ko, terms in entries]
    dictionary = Dictionary(rows, KoreanEnglishAnalyzer())

    def recall_at_10(queries, documents):
        indices, _ = DictionarySearcher(documents, dictionary).search(queries, 10)
        return sum(index in found for index, found in enumerate(indices)) / len(queries)

    for pairs, ko_en, en_ko in ((sentence_pairs(), 0.89, 0.88), (question_pairs(), 0.75, 0.70)):
        korean, english = map(list, zip(*pairs, strict=True))
        assert recall_at_10(korean, english) >= ko_en
        assert recall_at_10(english, korean) >= en_ko

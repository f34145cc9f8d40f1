import math
import unicodedata
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from soju.core.errors import UserError
from soju.search.lexical import K1, B, Bm25Searcher, EnglishAnalyzer, KoreanEnglishAnalyzer, best_first

KOREAN = KoreanEnglishAnalyzer()


class SplitAnalyzer:
    """Words are what spaces separate, so that the numbers below can be worked by hand."""

    def analyze(self, texts):
        return [text.split() for text in texts]


def hand_bm25(documents, query):
    """Score every document by the textbook formula."""
    documents = [text.split() for text in documents]
    mean_length = sum(map(len, documents)) / len(documents)
    scores = []
    for document in documents:
        score = 0.0
        for word in query.split():
            containing = sum(word in other for other in documents)
            idf = math.log(1 + (len(documents) - containing + 0.5) / (containing + 0.5))
            count = document.count(word)
            score += idf * count / (count + K1 * (1 - B + B * len(document) / mean_length))
        scores.append(score)
    return scores


def ranked(searcher, query, k=10):
    indices, scores = searcher.search([query], k)
    return indices[0].tolist(), scores[0].tolist()


def test_korean_is_cut_into_content_morphemes():
    assert KOREAN.analyze(["아름다운 학교에서 열심히 공부했던 글을 썼지만 잊었다."]) == [
        ["아름답다", "학교", "열심히", "공부", "글", "쓰다", "잊다"]
    ]


def test_english_is_lower_cased_stemmed_and_without_stop_words():
    words = ["search", "engin", "index", "3.5", "million", "page"]
    assert EnglishAnalyzer().analyze(["The Search engines aren't indexing 3.5 million pages"]) == [
        [*words[:2], "aren", *words[2:]]
    ]


@pytest.mark.parametrize("text", ["mp3", "iPhone 12 Engines", "COVID-19", "don't stop", "1,000 words", "h2o"])
def test_an_english_text_has_the_same_words_inside_korean(text):
    (alone,), (inside,) = EnglishAnalyzer().analyze([text]), KOREAN.analyze([f"{text} 검색"])
    assert [*alone, "검색"] == inside
    assert KOREAN.analyze([text]) == [alone]


def test_compounds_that_kiwi_joins_by_a_space_are_two_words():
    assert KOREAN.analyze(["자연어처리를"]) == KOREAN.analyze(["자연어 처리를"]) == [["자연어", "처리"]]


def test_decomposed_hangul_is_the_same_text():
    text = "검색 엔진"
    assert KOREAN.analyze([unicodedata.normalize("NFD", text)]) == KOREAN.analyze([text])


@pytest.mark.parametrize("text", ["", " ", "?!", "\ud800", "\0", "the of"])
def test_a_text_may_have_no_word_at_all(text):
    assert KOREAN.analyze([text]) == [[]]


def test_a_lone_surrogate_is_a_space():
    assert KOREAN.analyze(["검색\ud800엔진"]) == [["검색", "엔진"]]


def test_words_do_not_depend_on_the_batch_or_the_thread():
    texts = ["검색 엔진은 빠르다", "search engines", "GPU로 학습한다", "", "음성 인식"] * 10
    together = KOREAN.analyze(texts)
    assert together == [KOREAN.analyze([text])[0] for text in texts]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(lambda _: KOREAN.analyze(texts), range(8))) == [together] * 8


def test_no_worker_is_refused():
    with pytest.raises(UserError, match="workers: got 0"):
        KoreanEnglishAnalyzer(workers=0)


def test_bm25_by_hand():
    # Lengths 1 and 3, mean 2; "a" is in both: ln(1 + 0.5 / 2.5). Norms: 1.2 * (0.25 + 0.75 * 1/2) = 0.75 and 1.65.
    indices, scores = ranked(Bm25Searcher(["a", "a a b"], SplitAnalyzer()), "a")
    idf = math.log(1.2)
    assert indices == [0, 1]
    assert scores == pytest.approx([idf / (1 + 0.75), idf * 2 / (2 + 1.65)])


def test_bm25_is_the_textbook_formula():
    generator = np.random.default_rng(3)
    words = [f"w{i}" for i in range(30)]
    documents = [" ".join(generator.choice(words, size=generator.integers(0, 15))) for _ in range(40)]
    queries = [" ".join(generator.choice([*words, "unknown"], size=generator.integers(0, 6))) for _ in range(25)]
    indices, scores = Bm25Searcher(documents, SplitAnalyzer()).search(queries, 40)
    for query, found, found_scores in zip(queries, indices, scores, strict=True):
        expected = hand_bm25(documents, query)
        assert set(found.tolist()) == {index for index, score in enumerate(expected) if score > 0}
        np.testing.assert_allclose(found_scores, np.array(expected)[found], rtol=1e-5)
        assert np.all(np.diff(found_scores) <= 0)


def test_documents_without_a_common_word_are_not_returned():
    searcher = Bm25Searcher(["a b", "", "c"], SplitAnalyzer())
    assert ranked(searcher, "a")[0] == [0]
    assert ranked(searcher, "x") == ([], [])
    assert ranked(searcher, "") == ([], [])


def test_a_collection_without_any_word_finds_nothing():
    assert ranked(Bm25Searcher(["", ""], SplitAnalyzer()), "a") == ([], [])
    assert Bm25Searcher(["a"], SplitAnalyzer()).search([], 5) == ([], [])


def test_ties_go_by_document_order_also_at_the_cut():
    searcher = Bm25Searcher(["b", "a", "b", "a", "a", "a"], SplitAnalyzer())
    assert ranked(searcher, "a", k=3)[0] == [1, 3, 4]
    assert ranked(searcher, "a b", k=4)[0] == [0, 2, 1, 3]


def test_a_repeated_query_word_counts_twice_and_weights_scale():
    searcher = Bm25Searcher(["a b", "b c", "c"], SplitAnalyzer())
    once, twice = ranked(searcher, "a")[1], ranked(searcher, "a a")[1]
    assert twice == pytest.approx([2 * once[0]])
    (indices,), (scores,) = searcher.search_weighted([{"a": 0.5, "unknown": 3.0, "c": 0.0}], 10)
    assert indices.tolist() == [0]
    assert scores == pytest.approx([once[0] / 2])


def test_many_queries_are_answered_in_blocks():
    searcher = Bm25Searcher([f"w{i}" for i in range(600)], SplitAnalyzer())
    indices, _ = searcher.search([f"w{i}" for i in range(600)], 1)
    assert [found.tolist() for found in indices] == [[i] for i in range(600)]


def test_korean_documents_are_found_whatever_their_endings():
    searcher = Bm25Searcher(["당뇨병을 치료하는 방법", "고혈압의 예방", "GPU로 학습한다"], KOREAN)
    assert ranked(searcher, "당뇨병 치료")[0] == [0]
    assert ranked(searcher, "learning on a gpu")[0] == [2]


def test_best_first_drops_zeros():
    indices, scores = best_first(np.array([4, 2, 7]), np.array([0.0, 1.0, 1.0]), 5)
    assert (indices.tolist(), scores.tolist()) == ([2, 7], [1.0, 1.0])


def test_unusable_input_is_refused():
    with pytest.raises(UserError, match="no document to index"):
        Bm25Searcher([], SplitAnalyzer())
    searcher = Bm25Searcher(["a"], SplitAnalyzer())
    with pytest.raises(UserError, match="k: got 0"):
        searcher.search(["a"], 0)
    for weight in (-1.0, float("nan"), float("inf")):
        with pytest.raises(UserError, match="finite and >= 0"):
            searcher.search_weighted([{"a": weight}], 1)

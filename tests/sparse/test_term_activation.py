import numpy as np
import pytest
from scipy import sparse

from soju.core.errors import UserError
from soju.core.results import Setting
from soju.sparse.term_activation import (
    KOREAN_FUNCTION_WORDS,
    evaluate_terms,
    found_share,
    is_noise,
    noise_share,
    top_terms,
)

VOCABULARY = ["▁검색", "▁엔진", "▁search", "▁engine", "▁s", "▁the", "検索"]
#                                      검색  엔진 search engine  s   the  検索
WEIGHTS = sparse.csr_matrix(np.array([[3.0, 0.0, 2.0, 0.0, 1.0, 0.0, 0.5], [0.0, 2.0, 0.0, 1.0, 0.0, 1.0, 0.0]]))
ENGLISH = [{2, 3}, {3}]
KOREAN = [{0, 1}, {1}]
FUNCTION_WORDS = KOREAN_FUNCTION_WORDS | {"the"}
SETTING = Setting("splade", "terms.held-out", "abc")


def test_top_terms_are_heaviest_first_and_ties_go_by_id():
    assert [ids.tolist() for ids in top_terms(WEIGHTS, 2)] == [[0, 2], [1, 3]]
    assert [ids.tolist() for ids in top_terms(WEIGHTS, 50)] == [[0, 2, 4, 6], [1, 3, 5]]


def test_shares_are_counted_over_tokens_of_all_words():
    top = top_terms(WEIGHTS, 50)
    assert found_share(top, ENGLISH) == pytest.approx(2 / 3)  # search and engine, not the first engine
    assert found_share(top, [set(), {3}]) == 1.0


def test_scores_by_hand():
    scores = evaluate_terms(
        WEIGHTS,
        english=ENGLISH,
        korean=KOREAN,
        vocabulary=VOCABULARY,
        function_words=FUNCTION_WORDS,
        setting=SETTING,
        cutoffs=(1, 50),
    )
    values = {score.name: score.value for score in scores}
    assert values == pytest.approx(
        {
            "activation.en@1": 0.0,
            "preservation.ko@1": 2 / 3,
            "activation.en@50": 2 / 3,
            "preservation.ko@50": 2 / 3,
            "noise@50": 3 / 7,  # s, 検索; the
        }
    )
    assert [score.higher_is_better for score in scores] == [True, True, True, True, False]


def test_the_signature_depends_on_expected_terms_vocabulary_and_function_words():
    def signatures(**changes):
        settings = {
            "english": ENGLISH,
            "korean": KOREAN,
            "vocabulary": VOCABULARY,
            "function_words": FUNCTION_WORDS,
            "setting": SETTING,
        }
        return {score.signature for score in evaluate_terms(WEIGHTS, **{**settings, **changes})}

    assert signatures() == signatures(english=[{3, 2}, {np.int64(3)}])
    assert len(signatures() - signatures(english=[{2}, {3}])) == 2
    assert len(signatures() - signatures(function_words={"a"})) == 1
    assert not signatures() & signatures(vocabulary=[*VOCABULARY[:6], "검"])


@pytest.mark.parametrize("piece", ["a", "▁s", "##t", "Ġx", "ㅋ", "は", "検索", "поиск", "ค้น", "abcж", "▁The", "에서"])
def test_noise(piece):
    assert is_noise(piece, FUNCTION_WORDS)


@pytest.mark.parametrize("piece", ["▁검색", "물", "search", "##ing", "café", "7", "▁", ",", "2024", "[CLS]"])
def test_what_is_not_noise(piece):
    assert not is_noise(piece, FUNCTION_WORDS)


def test_noise_of_nothing_is_none():
    assert noise_share([np.array([], dtype=np.int64)], VOCABULARY, FUNCTION_WORDS) == 0.0


def test_unusable_input_is_refused():
    with pytest.raises(UserError, match="k: got 0"):
        top_terms(WEIGHTS, 0)
    with pytest.raises(UserError, match="no token is expected"):
        found_share(top_terms(WEIGHTS, 1), [set(), set()])
    with pytest.raises(UserError, match="2 texts but expected terms for 1"):
        found_share(top_terms(WEIGHTS, 1), [{1}])
    with pytest.raises(UserError, match="use the encoder's own"):
        evaluate_terms(WEIGHTS, english=ENGLISH, korean=KOREAN, vocabulary=["a"], function_words=set(), setting=SETTING)

import numpy as np
import pytest

from soju.core.errors import UserError
from soju.data.rows import PairRow
from soju.evaluation.significance import compare
from soju.evaluation.similarity import evaluate_bitext, mine

PAIRS = [PairRow("물", "water"), PairRow("불", "fire"), PairRow("흙", "earth")]
KO = np.array([[1.0, 0.0], [0.0, 1.0], [1.0, 0.1]])
EN = np.array([[2.0, 0.0], [0.0, 3.0], [0.0, 1.0]])


def test_the_nearest_by_cosine_is_found_whatever_its_length():
    np.testing.assert_array_equal(mine([[1.0, 0.1]], [[0.1, 0.0], [50.0, 50.0]]), [0])


def test_of_equally_near_sentences_the_first_is_found():
    np.testing.assert_array_equal(mine(KO, EN), [0, 1, 0])


def test_both_directions_are_counted_sentence_by_sentence():
    ko_en, en_ko = evaluate_bitext(KO, EN, PAIRS, subject="S1", test_set="tatoeba")
    assert (ko_en.score.test_set, en_ko.score.test_set) == ("tatoeba/ko-en", "tatoeba/en-ko")
    np.testing.assert_array_equal(ko_en.values, [1, 1, 0])  # 흙 finds water
    np.testing.assert_array_equal(en_ko.values, [1, 1, 0])  # earth finds 불
    assert ko_en.score.value == pytest.approx(2 / 3)
    assert ko_en.score.signature != en_ko.score.signature


def test_any_copy_of_the_translation_is_right():
    pairs = [PairRow("물", "water"), PairRow("생수", "water")]
    ko_en, en_ko = evaluate_bitext([[1, 0], [1, 0.1]], [[1, 0], [1, 0]], pairs, subject="S1", test_set="t")
    np.testing.assert_array_equal(ko_en.values, [1, 1])
    np.testing.assert_array_equal(en_ko.values, [1, 0])  # there one question has one right answer


def test_it_is_the_accuracy_of_a_full_table_of_cosines():
    generator = np.random.default_rng(0)
    ko, noise = generator.normal(size=(50, 6)), generator.normal(size=(50, 6))
    en = ko + noise
    table = (ko / np.linalg.norm(ko, axis=1)[:, None]) @ (en / np.linalg.norm(en, axis=1)[:, None]).T
    pairs = [PairRow(f"가{n}", f"a{n}") for n in range(50)]
    ko_en, en_ko = evaluate_bitext(ko, en, pairs, subject="x", test_set="t", samples=0)
    assert ko_en.score.value == np.mean(table.argmax(axis=1) == np.arange(50))
    assert en_ko.score.value == np.mean(table.argmax(axis=0) == np.arange(50))
    assert 0 < ko_en.score.value < 1
    assert ko_en.score.interval is None


def test_two_systems_can_be_compared_pair_by_pair():
    ours = evaluate_bitext(KO, KO, PAIRS, subject="S1", test_set="t")[0]  # each finds itself
    theirs = evaluate_bitext(KO, EN, PAIRS, subject="BASE", test_set="t")[0]
    assert compare(ours, theirs, samples=50).difference == pytest.approx(1 / 3)


def test_a_zero_vector_is_near_nothing_and_breaks_nothing():
    np.testing.assert_array_equal(mine([[1.0, 0.0]], [[0.0, 0.0], [0.1, 0.0]]), [1])


def test_one_pair_is_refused_because_it_always_finds_itself():
    with pytest.raises(UserError, match="tatoeba: fewer than two sentence pairs"):
        evaluate_bitext(KO[:1], EN[:1], PAIRS[:1], subject="S1", test_set="tatoeba")


def test_vectors_of_different_widths_are_refused():
    with pytest.raises(ValueError, match=r"\(N, D\) and \(M, D\)"):
        mine(np.ones((2, 3)), np.ones((2, 4)))

"""Triplets become rows: texts once, terms, masks; and what teachers say of them."""

import numpy as np
import pytest
import torch

from fixtures.pico_terms import save_start
from fixtures.pico_triplets import TRIPLETS
from soju.core.errors import UserError
from soju.data.rows import TripletRow
from soju.sparse.initial import plain_vocabulary
from soju.sparse.splade import SpladeEncoder
from soju.sparse.triplets.config import TripletsTeacherSettings
from soju.sparse.triplets.rows import (
    UNKNOWN,
    PairScores,
    TripletsCollator,
    VectorScores,
    calibration,
    heard_texts,
    teacher_scores,
    triplet_rows,
)
from soju.teachers.dense import Embeddings

ROWS = [
    TripletRow("백신", "vaccine", "book", "single_term", "hard", 0.9, 0.2),
    TripletRow("학교", "school", "vaccine", "single_term", "easy", 0.8, 0.3),
    TripletRow("백신", "inoculation", "school", "single_term", "easy"),
]


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory):
    return plain_vocabulary(SpladeEncoder(save_start(tmp_path_factory.mktemp("start")), device="cpu").tokenizer)


@pytest.fixture
def rows(vocabulary):
    return triplet_rows(ROWS, vocabulary, max_length=16)


def test_every_text_is_kept_once(rows):
    assert rows.texts == ["백신", "vaccine", "book", "학교", "school", "inoculation"]
    assert rows.numbers_R3.tolist() == [[0, 1, 2], [3, 4, 1], [0, 5, 4]]
    assert rows.counts.kept == 3
    assert rows.counts.texts == 6


def test_all_positives_of_a_query_are_known(rows):
    assert rows.positives == {0: {1, 5}, 3: {4}}


def test_probe_words_and_rows_without_terms_are_rejected_and_counted(vocabulary):
    rows = triplet_rows(
        [*ROWS, TripletRow("...", "vaccine", "book", "single_term", "easy")],
        vocabulary,
        max_length=16,
        banned=["백 신"],
    )
    assert rows.counts.banned == 2
    assert rows.counts.kept + rows.counts.without_terms == 2
    assert "학교" in [row.query for row in rows.triplets]


def test_a_batch_holds_queries_positives_and_negatives_padded_together(rows):
    batch = TripletsCollator(rows, None, pad_id=0)([{"row": 0}, {"row": 1}])
    assert batch["text_input_ids"].shape[0] == 6
    for place, number in enumerate([0, 3, 1, 4, 2, 1]):
        length = int(batch["text_attention_mask"][place].sum())
        assert batch["text_input_ids"][place, :length].tolist() == rows.input_ids[number]


def test_the_targets_are_the_terms_of_the_query_and_of_its_positive(rows):
    terms = TripletsCollator(rows, None, pad_id=0)([{"row": 1}, {"row": 0}])["label"]["terms"]
    assert terms.source.ids_T[terms.source.rows_T == 1].tolist() == rows.terms[0]
    assert terms.english.ids_T[terms.english.rows_T == 0].tolist() == rows.terms[4]


def test_no_answer_of_a_query_and_not_the_query_itself_is_its_negative(rows):
    same = TripletsCollator(rows, None, pad_id=0)([{"row": 0}, {"row": 1}, {"row": 2}])["label"]["same"]
    # candidates: vaccine, school, inoculation | book, vaccine, school
    assert same.int().tolist() == [[1, 0, 1, 0, 1, 0], [0, 1, 0, 0, 0, 1], [1, 0, 1, 0, 1, 0]]


def test_groups_are_pair_types_and_difficulties(rows):
    types, difficulties = rows.groupings()
    assert types.names == ("single_term",)
    assert difficulties.names == ("easy", "hard")
    assert difficulties.groups_R.tolist() == [1, 0, 0]


def test_calibration_maps_wrong_pairs_to_0_and_right_ones_to_1():
    offset, scale = calibration(np.array([0.7, 0.9, 0.8]), np.array([0.4, 0.6, 0.5]))
    assert offset == 0.5
    assert scale == pytest.approx(0.3)


def test_a_teacher_that_cannot_tell_right_from_wrong_is_refused():
    with pytest.raises(UserError, match="cannot tell them apart"):
        calibration(np.array([0.5, 0.5]), np.array([0.6, 0.6]))


def unit(*angles):
    vectors = np.array([[np.cos(angle), np.sin(angle)] for angle in angles], np.float32)
    return Embeddings([vectors], np.zeros(len(angles), np.int64), np.arange(len(angles)))


def test_a_bi_encoder_scores_every_pair_of_the_batch_that_it_has_heard():
    scores = VectorScores(
        unit(0.0, 0.1, 1.5), np.array([0, UNKNOWN]), np.array([[1, 2], [2, 1]]), calibrate=False
    ).of_batch(np.array([0, 1]))
    expected = [[np.cos(0.1), np.cos(1.5), np.cos(1.5), np.cos(0.1)], [0.0] * 4]
    torch.testing.assert_close(scores["teacher"], torch.tensor(expected, dtype=torch.float32))
    assert scores["known"].tolist() == [[True] * 4, [False] * 4]


def test_an_english_teacher_hears_the_positive_for_a_korean_query_and_no_korean_text():
    rows = [
        TripletRow("백신", "vaccine", "책", "cross_lingual", "easy"),
        TripletRow("백신", "예방 주사", "book", "monolingual", "easy"),
        TripletRow("vaccine", "shot", "book", "monolingual", "easy"),
    ]
    numbers = np.arange(9).reshape(3, 3)
    query, candidates = heard_texts(rows, numbers, translation=True)
    assert query.tolist() == [1, UNKNOWN, 6]
    assert candidates.tolist() == [[1, UNKNOWN], [UNKNOWN, 5], [7, 8]]
    query, candidates = heard_texts(rows, numbers, translation=False)
    assert query.tolist() == [0, 3, 6]


def test_scores_of_the_rows_stand_on_both_diagonals(rows):
    settings = TripletsTeacherSettings(kind="scores", calibrate=False)
    found = teacher_scores(settings, rows, seed=0).of_batch(np.array([1, 2, 0]))
    assert found["known"].int().tolist() == [[1, 0, 0, 1, 0, 0], [0] * 6, [0, 0, 1, 0, 0, 1]]
    assert found["teacher"][0, 0] == pytest.approx(0.8)
    assert found["teacher"][2, 5] == pytest.approx(0.2)
    assert found["teacher"][1].tolist() == [0.0] * 6


def test_scores_are_calibrated_over_the_rows_that_have_them():
    scores = PairScores(np.array([[9.0, 1.0], [11.0, 3.0], [np.nan, 5.0]]), calibrate=True)
    assert (scores.offset, scores.scale) == (2.0, 8.0)


def test_rows_without_scores_are_refused_as_a_teacher(vocabulary):
    rows = triplet_rows(TRIPLETS, vocabulary, max_length=16)
    with pytest.raises(UserError, match="positive_score"):
        teacher_scores(TripletsTeacherSettings(kind="scores"), rows, seed=0)

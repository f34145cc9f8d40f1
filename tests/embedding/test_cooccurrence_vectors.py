import math

import numpy as np
import pytest
from scipy.sparse import csr_array

from soju.core.errors import UserError
from soju.embedding.expansion.initialise import cooccurrence_vectors, count_neighbours, positive_pmi


def counted(texts, size, *, window=2, max_pairs=10**6):
    return count_neighbours(texts, size, window=window, max_pairs=max_pairs).toarray()


def by_hand(texts, size, window):
    table = np.zeros((size, size))
    for text in texts:
        for place, token in enumerate(text):
            for other in range(max(0, place - window), min(len(text), place + window + 1)):
                table[token, text[other]] += other != place
    return table


def corpus(seed=0):
    """Words 1-4 stand by 0, words 6-9 by 5; nothing of one kind stands by the other."""
    rng = np.random.default_rng(seed)
    return [np.stack([np.full(20, 5 * kind), 5 * kind + rng.integers(1, 5, 20)], 1).ravel() for kind in [0, 1] * 20]


def test_neighbours_are_counted_within_the_window_and_the_text():
    texts = [[0, 1, 2, 1], [], [3], [3, 0, 0]]
    assert np.array_equal(counted(texts, 5), by_hand(texts, 5, 2))


def test_blocks_change_nothing(monkeypatch):
    expected = counted(corpus(), 10)
    monkeypatch.setattr("soju.embedding.expansion.initialise.BLOCK", 7)
    assert np.array_equal(counted(iter(corpus()), 10), expected)


def test_rare_pairs_are_forgotten_when_there_are_too_many():
    found = counted([[0, 1, 0, 1], [2, 3]], 4, window=1, max_pairs=1)
    assert found[0, 1] == found[1, 0] == 3
    assert found[2, 3] == 0


def test_pairs_met_more_than_once_are_forgotten_too_when_there_are_too_many(monkeypatch):
    monkeypatch.setattr("soju.embedding.expansion.initialise.BLOCK", 1)
    found = counted([[0, 1] * 4, [2, 3] * 2, [4, 5] * 3], 6, window=1, max_pairs=1)
    assert found.nonzero()[0].tolist() == [0, 1]
    assert found[0, 1] == 7


def test_pointwise_mutual_information_by_hand():
    counts = csr_array(np.array([[0.0, 3.0, 1.0], [3.0, 0.0, 0.0], [1.0, 0.0, 0.0]]))
    sums, smoothed = np.array([4, 3, 1.0]), np.array([4, 3, 1.0]) ** 0.75
    expected = math.log(3 / sums[1] / (smoothed[0] / smoothed.sum()))
    assert positive_pmi(counts).toarray()[1, 0] == pytest.approx(expected)
    assert (positive_pmi(counts).toarray() >= 0).all()


def test_tokens_with_the_same_neighbours_get_vectors_alike():
    vectors = cooccurrence_vectors(corpus(), 12, width=4, window=1)
    unit = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-9)
    cosine = unit @ unit.T
    assert cosine[1:5, 1:5].min() > 0.8 > 0.3 > cosine[1:5, 6:10].max()
    assert not vectors[10:].any()


def test_same_texts_same_vectors_and_the_seed_changes_nothing_that_is_alike():
    first, again = (cooccurrence_vectors(corpus(), 10, width=2, window=1) for _ in range(2))
    assert np.array_equal(first, again)
    other = cooccurrence_vectors(corpus(), 10, width=2, window=1, seed=5)
    np.testing.assert_allclose(other @ other.T, first @ first.T, atol=1e-4)


def test_what_cannot_be_counted_is_refused():
    with pytest.raises(UserError, match="fewer than three"):
        cooccurrence_vectors([[0, 1]], 3)
    with pytest.raises(ValueError, match=r"ids must be in \[0, 3\)"):
        cooccurrence_vectors([[0, 3]], 3)

from __future__ import annotations

import numpy as np
import pytest
from scipy.sparse import csr_array

from soju.core.errors import UserError
from soju.search.exact import ExactEngine
from soju.search.folder import bm25_impact, idf
from soju.search.postings import Postings, PostingsWriter, check_vectors


def write(folder, vectors, *, batch=7, block_postings=50):
    writer = PostingsWriter(folder, vectors.shape[1], block_postings=block_postings)
    for start in range(0, vectors.shape[0], batch):
        rows = vectors[start : start + batch]
        writer.add(check_vectors(rows, rows=rows.shape[0], terms=vectors.shape[1], place="test"))
    assert writer.finish() == np.count_nonzero(vectors)
    return Postings.open(folder, chunks=vectors.shape[0])


def random_vectors(rng, rows, terms):
    # Small integers make ties common and float32 sums exact.
    return (rng.integers(0, 4, (rows, terms)) * (rng.random((rows, terms)) < 0.3)).astype(np.float32)


def test_a_bm25_impact_by_hand():
    # tf 2, length 10 at average 10: 2 * 2.2 / (2 + 1.2) = 1.375; length 20: 2 * 2.2 / (2 + 1.2 * 1.75) = 4.4 / 4.1
    impacts = bm25_impact(np.float32([2, 2]), np.float32([10, 20]), k1=1.2, b=0.75, average_length=10)
    np.testing.assert_allclose(impacts, [1.375, 4.4 / 4.1], rtol=1e-6)


def test_idf_by_hand_with_and_without_a_prior():
    plain = idf(np.array([1, 3]), 3)
    np.testing.assert_allclose(plain, np.log([1 + 2.5 / 1.5, 1 + 0.5 / 3.5]), rtol=1e-6)
    # 100 prior documents, half of which hold term 0: df' = 51 and 3, N' = 103.
    blended = idf(np.array([1, 3]), 3, prior_documents=100, prior_share_V=np.float32([0.5, 0]))
    np.testing.assert_allclose(blended, np.log([1 + 52.5 / 51.5, 1 + 100.5 / 3.5]), rtol=1e-6)


def test_a_prior_without_shares_is_refused():
    with pytest.raises(UserError, match="prior_share_V"):
        idf(np.array([1]), 1, prior_documents=10)


def test_blocks_on_disk_merge_to_the_rows_that_were_given(tmp_path):
    vectors = random_vectors(np.random.default_rng(1), 61, 23)
    postings = write(tmp_path, vectors)
    np.testing.assert_array_equal(postings.rows(0, 61).toarray(), vectors)
    np.testing.assert_array_equal(postings.rows(17, 30).toarray(), vectors[17:30])
    np.testing.assert_array_equal(postings.document_frequency, (vectors > 0).sum(axis=0))
    chunks, terms = np.int32([3, 60, 0]), np.int32([22, 5])
    np.testing.assert_array_equal(postings.weights(chunks, terms), vectors[chunks][:, terms])


@pytest.mark.parametrize("seed", range(20))
def test_search_equals_a_dense_product_with_ties_in_document_order(tmp_path, seed):
    rng = np.random.default_rng(seed)
    vectors = random_vectors(rng, int(rng.integers(1, 700)), 12)
    documents = np.sort(rng.integers(0, max(1, len(vectors) // 2), len(vectors))).astype(np.int32)
    engine = ExactEngine(write(tmp_path, vectors), documents)
    for _ in range(5):  # the score buffer is used again
        terms = np.sort(rng.choice(12, 4, replace=False)).astype(np.int32)
        weights = rng.integers(1, 4, 4).astype(np.float32)
        scores = vectors[:, terms] @ weights
        best = {}
        for chunk in np.lexsort((np.arange(len(scores)), -scores)):
            if scores[chunk] > 0:
                best.setdefault(int(documents[chunk]), int(chunk))
        for k in (1, 3, 10_000):
            chunks, found = engine.search(terms, weights, k)
            assert chunks.tolist() == list(best.values())[:k]
            np.testing.assert_array_equal(found, scores[chunks])


def test_an_empty_query_finds_nothing(tmp_path):
    engine = ExactEngine(write(tmp_path, np.eye(3, dtype=np.float32)), np.arange(3, dtype=np.int32))
    assert len(engine.search(np.int32([]), np.float32([]), 5)[0]) == 0


@pytest.mark.parametrize("bad", [-1.0, float("nan"), float("inf")])
def test_unusable_weights_are_refused(bad):
    with pytest.raises(UserError, match="chunks 1 to 1: a term weight is negative or not finite"):
        check_vectors(csr_array([[1.0, bad]]), rows=1, terms=2, place="chunks 1 to 1")


def test_vectors_of_another_vocabulary_are_refused():
    with pytest.raises(UserError, match=r"\(1, 2\) instead of \(1, 3\)"):
        check_vectors(csr_array([[1.0, 2.0]]), rows=1, terms=3, place="query")


def test_duplicate_and_zero_entries_are_summed_and_dropped():
    raw = csr_array((np.float32([1, 2, 0]), np.array([1, 1, 0]), np.array([0, 3])), shape=(1, 2))
    checked = check_vectors(raw, rows=1, terms=2, place="query")
    assert checked.indices.tolist() == [1]
    assert checked.data.tolist() == [3]

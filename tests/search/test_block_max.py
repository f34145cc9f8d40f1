from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from scipy.sparse import csr_array

from search.segments import write
from soju.core.errors import IntegrityError
from soju.search import block_max as loops
from soju.search.block_layout import similar_order
from soju.search.block_max import FOLDER, BlockMaxEngine
from soju.search.exact import ExactEngine


def zipf_corpus(rng, rows, terms):
    """Zipf-distributed terms, about twelve a row, with weights over three orders of magnitude."""
    share = 1 / np.arange(1, terms + 1)
    columns = rng.choice(terms, rows * 12, p=share / share.sum())
    weights = (10 ** rng.uniform(-2, 1, rows * 12)).astype(np.float32)
    return csr_array((weights, (np.repeat(np.arange(rows), 12), columns)), (rows, terms))


def both(folder, vectors, documents=None):
    """Return the exact engine and the block-max engine of the same vectors."""
    postings = write(folder, csr_array(vectors))
    documents = np.arange(vectors.shape[0], dtype=np.int32) if documents is None else documents
    return ExactEngine(postings, documents), BlockMaxEngine.build(folder, postings, documents)


def queries(rng, terms, count):
    for _ in range(count):
        size = int(rng.integers(1, 12))
        yield np.sort(rng.choice(terms, size, replace=False)).astype(np.int32), rng.random(size, dtype=np.float32)


def same(exact, block_max, terms, weights, k):
    """Assert that both find the same chunks, and the same order up to the rounding of impacts."""
    chunks, scores = exact.search(terms, weights, k)
    found, found_scores = block_max.search(terms, weights, k)
    assert sorted(found.tolist()) == sorted(chunks.tolist())
    step = float(weights @ block_max._largest_V[terms]) / 65_535
    np.testing.assert_allclose(found_scores, scores, rtol=1e-5, atol=step)


@pytest.mark.parametrize("rows", [1, 7, 8, 9, 600, 3001])
@pytest.mark.parametrize("chunks_a_document", [1, 3])
def test_the_documents_of_exact_search(tmp_path, rows, chunks_a_document):
    rng = np.random.default_rng(rows)
    documents = (np.arange(rows) // chunks_a_document).astype(np.int32)
    exact, block_max = both(tmp_path / "index", zipf_corpus(rng, rows, 300), documents)
    for terms, weights in queries(rng, 300, 40):
        for k in (1, 10, 10_000):
            same(exact, block_max, terms, weights, k)


@pytest.mark.parametrize("chunks_a_document", [1, 3])
def test_equal_scores_rank_in_chunk_order_also_when_they_are_sums_of_different_terms(tmp_path, chunks_a_document):
    rng = np.random.default_rng(0)
    vectors = zipf_corpus(rng, 2000, 60)
    vectors.data = np.ceil(vectors.data)
    documents = (np.arange(2000) // chunks_a_document).astype(np.int32)
    exact, block_max = both(tmp_path / "index", vectors, documents)
    for terms, _ in queries(rng, 60, 60):
        weights = np.ones(len(terms), dtype=np.float32)
        for k in (3, 10, 50):
            same(exact, block_max, terms, weights, k)


def test_an_impact_that_dwarfs_the_others_of_its_term_hides_none_of_them(tmp_path):
    impacts = np.float32([*range(1, 40), 1e7])
    exact, block_max = both(tmp_path / "index", impacts[:, None])
    assert block_max.search(np.int32([0]), np.float32([1]), 5)[0].tolist() == [39, 38, 37, 36, 35]
    same(exact, block_max, np.int32([0]), np.float32([1]), 5)


@pytest.mark.parametrize(("impacts", "weights"), [((1e30, 1e-30), (1e30, 1.0)), ((1e-20, 1e-20), (1e-22, 1.0))])
def test_weights_at_the_ends_of_float32_go_the_exact_way(tmp_path, impacts, weights):
    vectors = np.float32([[impacts[0], 0], [0, impacts[1]], [0, impacts[1] * 2]])
    exact, block_max = both(tmp_path / "index", vectors)
    query = np.int32([0, 1]), np.float32(weights)
    with np.errstate(over="ignore"):
        assert block_max.search(*query, 3)[0].tolist() == exact.search(*query, 3)[0].tolist()


def test_very_many_equal_scores_go_the_exact_way(tmp_path):
    exact, block_max = both(tmp_path / "index", np.ones((2000, 3), dtype=np.float32))
    assert block_max.search(np.int32([1]), np.float32([1]), 3)[0].tolist() == [0, 1, 2]
    exact, block_max = both(tmp_path / "none", np.zeros((300, 3), dtype=np.float32))
    assert block_max.search(np.int32([1]), np.float32([1]), 3)[0].tolist() == []
    same(exact, block_max, np.int32([1]), np.float32([1]), 3)


def test_what_is_left_after_many_blocks_is_scored_or_searched_exactly(tmp_path, monkeypatch):
    rng = np.random.default_rng(4)
    exact, block_max = both(tmp_path / "index", zipf_corpus(rng, 3001, 300))
    ways, score_rest = [], loops._score_rest

    def watched(*given):
        size, near, floor = score_rest(*given)
        ways.append("exact" if near < 0 else "scored")
        return size, near, floor

    monkeypatch.setattr(loops, "_score_rest", watched)
    monkeypatch.setattr(loops, "best_documents", loops.best_documents.py_func)
    for k, (terms, weights) in enumerate(queries(rng, 300, 60), start=20):
        same(exact, block_max, terms, weights, 5 * k)
    assert set(ways) == {"exact", "scored"}


def test_hand_worked_scores(tmp_path):
    vectors = np.float32([[2, 0, 0], [0, 1, 0], [1, 1, 0], [0, 0, 0]])
    _, engine = both(tmp_path / "index", vectors)
    chunks, scores = engine.search(np.int32([0, 1]), np.float32([1, 3]), 5)
    assert chunks.tolist() == [2, 1, 0]  # 1 + 3, 3, 2; the empty chunk is never found
    np.testing.assert_allclose(scores, [4, 3, 2], rtol=1e-4)
    assert engine.search(np.int32([2]), np.float32([1]), 5)[0].tolist() == []
    assert engine.search(np.int32([]), np.float32([]), 5)[0].tolist() == []


def test_no_bound_is_below_a_score_of_its_block(tmp_path):
    rng = np.random.default_rng(5)
    _, engine = both(tmp_path / "index", zipf_corpus(rng, 2000, 200))
    blocks = engine._blocks
    assert 0 < len(engine._maxima.rows) < 200  # both frequent and rare terms
    query_V, bounds_N, _ = engine._scratch()
    for terms, weights in queries(rng, 200, 30):
        query_V[terms] = weights * engine._largest_V[terms] / loops.IMPACT_STEPS
        loops._add_bounds(terms, query_V, 1 + 1e-6, engine._maxima, bounds_N)
        for place in range(2000):
            score = loops._score(query_V, blocks.postings, blocks.offsets[place], blocks.offsets[place + 1])
            assert score <= bounds_N[place // loops.BLOCK]
        query_V[:] = 0


def test_similar_chunks_are_put_side_by_side(tmp_path):
    rng = np.random.default_rng(1)
    topics = rng.integers(0, 20, 4000)
    columns = topics[:, None] * 30 + rng.integers(0, 8, (4000, 8))
    vectors = csr_array((rng.random(32_000, dtype=np.float32), (np.repeat(np.arange(4000), 8), columns.ravel())))
    postings = write(tmp_path / "index", vectors)
    order = similar_order(postings)
    assert sorted(order.tolist()) == list(range(4000))
    assert np.count_nonzero(np.diff(topics[order])) < 0.5 * np.count_nonzero(np.diff(topics))
    np.testing.assert_array_equal(order, similar_order(postings))


@pytest.mark.parametrize(("terms", "kind"), [(65_536, np.uint16), (65_537, np.int32)])
def test_a_vocabulary_beyond_sixteen_bits_is_searched(tmp_path, terms, kind):
    vectors = csr_array(
        (np.float32([1, 2]), (np.array([0, 1]), np.array([terms - 1, max(0, terms - 65_537)]))), (2, terms)
    )
    _, engine = both(tmp_path / "index", vectors)
    assert engine._blocks.postings.dtype == kind
    assert engine.search(np.int32([terms - 1]), np.float32([1]), 5)[0].tolist() == [0]


def test_each_thread_works_in_room_of_its_own(tmp_path):
    rng = np.random.default_rng(2)
    _, engine = both(tmp_path / "index", zipf_corpus(rng, 2000, 200))
    asked = list(queries(rng, 200, 60))
    alone = [engine.search(*query, 10)[0].tolist() for query in asked]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda query: engine.search(*query, 10)[0].tolist(), asked))
        assert pool.submit(engine._scratch).result()[0] is not engine._scratch()[0]
    assert together == alone


def test_a_missing_file_and_one_of_other_chunks_are_refused(tmp_path):
    exact, _ = both(tmp_path / "index", np.eye(3, dtype=np.float32))
    with pytest.raises(IntegrityError, match="holds 3 chunks and 3 terms, not 4 and 3"):
        BlockMaxEngine.open(tmp_path / "index", exact._postings, np.arange(4, dtype=np.int32))
    (tmp_path / "index" / FOLDER / "rows.npy").unlink()
    with pytest.raises(IntegrityError, match="build the index again"):
        BlockMaxEngine.open(tmp_path / "index", exact._postings, np.arange(3, dtype=np.int32))

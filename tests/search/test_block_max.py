from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from scipy.sparse import csr_array

from soju.core.errors import IntegrityError
from soju.search import block_max_loops as loops
from soju.search.block_max import FOLDER, BlockMaxEngine
from soju.search.exact import ExactEngine
from soju.search.postings import Postings, PostingsWriter, check_vectors
from soju.search.similar_order import similar_order


def zipf_corpus(rng, rows, terms):
    """Zipf-distributed terms, about twelve a row, with weights over three orders of magnitude."""
    share = 1 / np.arange(1, terms + 1)
    columns = rng.choice(terms, rows * 12, p=share / share.sum())
    weights = (10 ** rng.uniform(-2, 1, rows * 12)).astype(np.float32)
    return csr_array((weights, (np.repeat(np.arange(rows), 12), columns)), (rows, terms))


def write(folder, vectors):
    rows, terms = vectors.shape
    folder.mkdir(exist_ok=True)
    writer = PostingsWriter(folder, terms)
    writer.add(check_vectors(vectors, rows=rows, terms=terms, place="test"))
    writer.finish()
    return Postings.open(folder, chunks=rows)


def both(folder, vectors, documents=None):
    """Return the exact engine and the block-max engine of the same vectors."""
    postings = write(folder, csr_array(vectors))
    documents = np.arange(vectors.shape[0], dtype=np.int32) if documents is None else documents
    return ExactEngine(postings, documents), BlockMaxEngine.build(folder, postings, documents)


def queries(rng, terms, count):
    for _ in range(count):
        size = int(rng.integers(1, 12))
        yield np.sort(rng.choice(terms, size, replace=False)).astype(np.int32), rng.random(size, dtype=np.float32)


@pytest.mark.parametrize("rows", [1, 7, 8, 9, 600, 3001])
@pytest.mark.parametrize("chunks_a_document", [1, 3])
def test_the_same_ranking_as_exact_search_up_to_the_rounding_of_impacts(tmp_path, rows, chunks_a_document):
    rng = np.random.default_rng(rows)
    documents = (np.arange(rows) // chunks_a_document).astype(np.int32)
    exact, block_max = both(tmp_path / "index", zipf_corpus(rng, rows, 300), documents)
    for terms, weights in queries(rng, 300, 40):
        step = float(weights @ block_max._arrays.largest[terms]) / 65_535  # impacts are rounded to 16 bits
        for k in (1, 10, 10_000):
            chunks, scores = exact.search(terms, weights, k)
            found, found_scores = block_max.search(terms, weights, k)
            assert len(set(documents[found].tolist())) == len(found) == len(chunks)
            np.testing.assert_allclose(found_scores, scores, rtol=1e-5, atol=step)
            found_exactly = exact._postings.weights(found, terms) @ weights
            np.testing.assert_allclose(found_exactly, scores, rtol=1e-5, atol=2 * step)


def test_equal_scores_rank_in_chunk_order_however_the_blocks_lie(tmp_path):
    rng = np.random.default_rng(0)
    kinds = rng.random((5, 40)) * (rng.random((5, 40)) < 0.2)
    exact, block_max = both(tmp_path / "index", kinds[rng.integers(0, 5, 500)].astype(np.float32))
    for terms, weights in queries(rng, 40, 30):
        assert block_max.search(terms, weights, 20)[0].tolist() == exact.search(terms, weights, 20)[0].tolist()


def test_hand_worked_scores(tmp_path):
    vectors = np.float32([[2, 0, 0], [0, 1, 0], [1, 1, 0], [0, 0, 0]])
    _, engine = both(tmp_path / "index", vectors)
    chunks, scores = engine.search(np.int32([0, 1]), np.float32([1, 3]), 5)
    assert chunks.tolist() == [2, 1, 0]  # 1 + 3, 3, 2; the empty chunk is never found
    np.testing.assert_allclose(scores, [4, 3, 2], rtol=1e-4)
    assert engine.search(np.int32([2]), np.float32([1]), 5)[0].tolist() == []
    assert engine.search(np.int32([]), np.float32([]), 5)[0].tolist() == []


def test_an_impact_far_below_the_largest_of_its_term_is_found(tmp_path):
    _, engine = both(tmp_path / "index", np.float32([[1e6, 0], [1e-3, 1]]))
    assert engine.search(np.int32([0]), np.float32([1]), 5)[0].tolist() == [0, 1]


def test_no_bound_is_below_a_score_of_its_block(tmp_path):
    rng = np.random.default_rng(5)
    _, engine = both(tmp_path / "index", zipf_corpus(rng, 2000, 200))
    held = engine._arrays
    assert 0 < len(held.rows) < 200  # both frequent and rare terms
    query_V, bounds_N, _ = engine._scratch()
    for terms, weights in queries(rng, 200, 30):
        query_V[terms] = weights * held.largest[terms] / loops.IMPACT_STEPS
        loops._add_bounds(
            terms, query_V, held.row_of, held.rows, held.list_offsets, held.list_blocks, held.list_maxima, bounds_N
        )
        for place in range(2000):
            score = loops._score(query_V, held.postings, held.offsets[place], held.offsets[place + 1])
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


def test_chunks_without_terms_and_equal_chunks_need_no_clusters(tmp_path):
    _, engine = both(tmp_path / "index", np.zeros((300, 3), dtype=np.float32))
    assert engine.search(np.int32([1]), np.float32([1]), 3)[0].tolist() == []
    _, engine = both(tmp_path / "same", np.ones((300, 3), dtype=np.float32))
    assert engine.search(np.int32([1]), np.float32([1]), 3)[0].tolist() == [0, 1, 2]


def test_a_vocabulary_beyond_sixteen_bits_is_searched(tmp_path):
    vectors = csr_array((np.float32([1, 2]), (np.array([0, 1]), np.array([69_999, 69_999 - 65_536]))), (2, 70_000))
    _, engine = both(tmp_path / "index", vectors)
    assert engine.search(np.int32([69_999]), np.float32([1]), 5)[0].tolist() == [0]


def test_threads_do_not_disturb_one_another(tmp_path):
    rng = np.random.default_rng(2)
    _, engine = both(tmp_path / "index", zipf_corpus(rng, 2000, 200))
    asked = list(queries(rng, 200, 60))
    alone = [engine.search(*query, 10)[0].tolist() for query in asked]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda query: engine.search(*query, 10)[0].tolist(), asked))
    assert together == alone


def test_a_missing_file_and_one_of_other_chunks_are_refused(tmp_path):
    both(tmp_path / "index", np.eye(3, dtype=np.float32))
    with pytest.raises(IntegrityError, match="holds 3 chunks and 3 terms, not 4 and 3"):
        BlockMaxEngine.open(tmp_path / "index", np.arange(4, dtype=np.int32), terms=3)
    (tmp_path / "index" / FOLDER / "rows.npy").unlink()
    with pytest.raises(IntegrityError, match="build the index again"):
        BlockMaxEngine.open(tmp_path / "index", np.arange(3, dtype=np.int32), terms=3)

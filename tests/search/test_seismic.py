from __future__ import annotations

import numpy as np
import pytest
from scipy.sparse import csr_array

from search.segments import write
from soju.core.errors import IntegrityError
from soju.search.exact import ExactEngine
from soju.search.seismic_engine import SEISMIC_FILE, SeismicEngine, SeismicSettings

SETTINGS = SeismicSettings(threads=1)


def corpus(rng, rows, terms):
    """Zipf-distributed terms, about twelve a row."""
    share = 1 / np.arange(1, terms + 1)
    columns = rng.choice(terms, rows * 12, p=share / share.sum())
    return csr_array(
        (rng.random(rows * 12, dtype=np.float32), (np.repeat(np.arange(rows), 12), columns)), (rows, terms)
    )


def test_seismic_finds_what_exact_search_finds(tmp_path):
    rng = np.random.default_rng(3)
    postings = write(tmp_path, corpus(rng, 3000, 500))
    documents = np.sort(rng.integers(0, 1500, 3000)).astype(np.int32)
    exact = ExactEngine(postings, documents)
    SeismicEngine.build(tmp_path, postings, documents, SETTINGS)
    seismic = SeismicEngine.open(tmp_path, documents, SETTINGS, terms=500)
    hits = 0
    for _ in range(50):
        terms = np.sort(rng.choice(500, 8, replace=False)).astype(np.int32)
        weights = rng.random(8, dtype=np.float32)
        chunks, scores = seismic.search(terms, weights, 10)
        assert len(set(documents[chunks].tolist())) == len(chunks) == 10
        assert (np.diff(scores) <= 0).all()
        hits += len(set(chunks.tolist()) & set(exact.search(terms, weights, 10)[0].tolist()))
    assert hits / 500 >= 0.95


def test_chunk_numbers_survive_rows_without_terms(tmp_path):
    vectors = np.zeros((9, 4), dtype=np.float32)
    vectors[5, 3], vectors[8, 3] = 1.0, 2.0
    engine = SeismicEngine.build(tmp_path, write(tmp_path, csr_array(vectors)), np.arange(9, dtype=np.int32), SETTINGS)
    assert engine.search(np.int32([3]), np.float32([1]), 5)[0].tolist() == [8, 5]
    assert engine.search(np.int32([]), np.float32([]), 5)[0].tolist() == []
    assert engine.search(np.int32([0]), np.float32([1]), 5)[0].tolist() == []


def test_k_beyond_the_documents_is_fine_when_chunks_share_documents(tmp_path):
    vectors = csr_array(np.ones((6, 2), dtype=np.float32) * np.arange(1, 7, dtype=np.float32)[:, None])
    documents = np.int32([0, 0, 0, 0, 1, 1])
    engine = SeismicEngine.build(tmp_path, write(tmp_path, vectors), documents, SETTINGS)
    assert engine.search(np.int32([0]), np.float32([1]), 1)[0].tolist() == [5]
    assert engine.search(np.int32([0]), np.float32([1]), 50)[0].tolist() == [5, 3]


@pytest.mark.slow
def test_a_vocabulary_beyond_sixteen_bits_is_searched(tmp_path):
    vectors = csr_array((np.float32([1, 2]), (np.array([0, 1]), np.array([69_999, 69_999 - 65_536]))), (2, 70_000))
    SeismicEngine.build(tmp_path, write(tmp_path, vectors), np.int32([0, 1]), SETTINGS)
    engine = SeismicEngine.open(tmp_path, np.int32([0, 1]), SETTINGS, terms=70_000)
    assert engine.search(np.int32([69_999]), np.float32([1]), 5)[0].tolist() == [0]


def test_a_broken_engine_file_is_refused(tmp_path):
    (tmp_path / SEISMIC_FILE).write_bytes(b"not an index")
    with pytest.raises(IntegrityError, match="Seismic cannot read it"):
        SeismicEngine.open(tmp_path, np.int32([0]), SETTINGS, terms=2)


def test_a_file_of_other_chunks_is_refused(tmp_path):
    SeismicEngine.build(tmp_path, write(tmp_path, csr_array(np.eye(3))), np.arange(3, dtype=np.int32), SETTINGS)
    with pytest.raises(IntegrityError, match="holds 3 chunks, not 4"):
        SeismicEngine.open(tmp_path, np.arange(4, dtype=np.int32), SETTINGS, terms=3)


def test_parameters_left_open_are_chosen_by_size_and_given_ones_kept():
    small, large = SETTINGS.for_chunks(1000), SETTINGS.for_chunks(1_000_000)
    assert small.centroid_fraction > large.centroid_fraction
    assert small.query_cut < large.query_cut
    assert small.rarity > large.rarity == 0
    given = SeismicSettings(centroid_fraction=0.2, summary_energy=0.6, rarity=0, query_cut=5)
    assert given.for_chunks(1000) == given.for_chunks(1_000_000) == given


def test_building_prints_nothing(tmp_path, capfd):
    SeismicEngine.build(tmp_path, write(tmp_path, csr_array(np.eye(3))), np.arange(3, dtype=np.int32), SETTINGS)
    assert capfd.readouterr() == ("", "")

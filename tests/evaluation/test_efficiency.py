import itertools

import numpy as np
import pytest
from scipy import sparse

from soju.core.errors import UserError
from soju.core.results import Setting
from soju.sparse.term_activation import active_terms, bytes_on_disk, flops, latency, posting_skew, throughput

SETTING = Setting("splade", "tiny", "abc")
QUERIES = sparse.csr_matrix([[1.0, 0.0, 2.0], [0.0, 0.0, 0.5]])  # activation shares 1/2, 0, 1
DOCUMENTS = sparse.csr_matrix([[1.0, 1.0, 0.0], [3.0, 0.0, 0.0], [0.0, 1.0, 1.0], [2.0, 0.0, 0.0]])  # 3/4, 1/2, 1/4


def by_name(scores):
    return {score.name: score.value for score in scores}


def test_active_terms_are_counted_per_text():
    values = by_name(active_terms(DOCUMENTS, SETTING, side="document"))  # 2, 1, 2, 1
    assert values == {
        "active_terms.document.mean": 1.5,
        "active_terms.document.p50": 1.5,
        "active_terms.document.p95": 2.0,
    }


def test_stored_zeros_and_empty_texts_count_as_inactive():
    weights = sparse.csr_matrix((np.array([0.0, 1.0]), np.array([0, 1]), np.array([0, 2, 2])), shape=(2, 3))
    assert by_name(active_terms(weights, SETTING, side="query"))["active_terms.query.mean"] == 0.5


def test_flops_by_hand():
    assert flops(QUERIES, DOCUMENTS, SETTING).value == pytest.approx(1 / 2 * 3 / 4 + 0 * 1 / 2 + 1 * 1 / 4)


def test_flops_is_the_mean_number_of_products_over_all_pairs():
    generator = np.random.default_rng(0)
    queries, documents = generator.random((7, 20)) < 0.3, generator.random((9, 20)) < 0.2
    counted = np.mean([np.sum(q & d) for q, d in itertools.product(queries, documents)])
    score = flops(sparse.csr_array(queries * 1.0), sparse.csr_array(documents * 1.0), SETTING)
    assert score.value == pytest.approx(counted)
    assert (score.unit, score.higher_is_better) == ("products", False)


def test_posting_skew_by_hand():
    values = by_name(posting_skew(DOCUMENTS, SETTING))  # list lengths 1, 2, 3
    assert values["postings.longest_1_percent"] == pytest.approx(3 / 6)
    # Mean absolute difference over all 9 ordered pairs is 8/9; Gini is half of it over the mean 2.
    assert values["postings.gini"] == pytest.approx(8 / 9 / 2 / 2)


def test_equal_lists_have_no_skew():
    values = by_name(posting_skew(sparse.csr_array(np.ones((3, 200))), SETTING))
    assert values["postings.gini"] == pytest.approx(0.0)
    assert values["postings.longest_1_percent"] == pytest.approx(0.01)


def test_bytes_are_added_up_over_folders(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "postings.bin").write_bytes(b"x" * 10)
    (tmp_path / "ids.bin").write_bytes(b"x" * 5)
    (tmp_path / "link.bin").symlink_to(tmp_path / "ids.bin")
    assert bytes_on_disk(tmp_path, SETTING).value == 15
    assert bytes_on_disk(tmp_path / "ids.bin", SETTING).value == 5


def test_latency_times_each_query_after_the_warm_up():
    asked = []
    ticks = iter(t for i in range(100) for t in (0, (i + 1) * 1_000_000))  # 1 ms, 2 ms, ... 100 ms
    scores = latency(asked.append, [str(i) for i in range(100)], SETTING, warm_up=3, clock=lambda: next(ticks))
    assert asked[:4] == ["0", "1", "2", "0"]
    assert len(asked) == 103
    assert [score.value for score in scores] == pytest.approx([50.5, 95.05, 99.01])
    assert {score.unit for score in scores} == {"milliseconds"}


def test_throughput_counts_texts_by_the_second():
    batches = []
    ticks = iter([0, 2_000_000_000])
    score = throughput(batches.append, ["a"] * 5, SETTING, batch_size=2, clock=lambda: next(ticks))
    assert score.value == 2.5
    assert [len(batch) for batch in batches] == [2, 2, 2, 1]  # the first is the warm-up
    assert score.higher_is_better


def test_scores_carry_data_and_size_in_their_signature():
    first = active_terms(DOCUMENTS, SETTING, side="document")[0]
    assert first.subject == "splade"
    assert "data:abc" in first.signature
    assert "texts:4" in first.signature


def test_unusable_input_is_refused(tmp_path):
    empty = sparse.csr_matrix((0, 3))
    with pytest.raises(UserError, match="no text was encoded"):
        active_terms(empty, SETTING, side="query")
    with pytest.raises(UserError, match="same vocabulary"):
        flops(sparse.csr_matrix((1, 2)), DOCUMENTS, SETTING)
    with pytest.raises(UserError, match="no posting list"):
        posting_skew(sparse.csr_matrix((2, 3)), SETTING)
    with pytest.raises(UserError, match="does not exist"):
        bytes_on_disk(tmp_path / "missing", SETTING)
    with pytest.raises(UserError, match="no query to time"):
        latency(print, [], SETTING)
    with pytest.raises(UserError, match="warm_up: got -1"):
        latency(print, ["q"], SETTING, warm_up=-1)
    with pytest.raises(UserError, match="no text to encode"):
        throughput(print, [], SETTING)
    with pytest.raises(UserError, match="batch_size: got 0"):
        throughput(print, ["t"], SETTING, batch_size=0)

import numpy as np
import pytest
from scipy.spatial.distance import cdist

from soju.core.errors import UserError
from soju.embedding.finish import drift, nearest_neighbours, norm_statistics

TABLE = np.array([[1.0, 0.0], [2.0, 0.2], [0.0, 3.0], [-1.0, 0.0]])
TOKENS = ["물", "생수", "불", "흙"]


def test_neighbours_are_ordered_by_cosine_and_never_the_row_itself():
    (found,) = nearest_neighbours(TABLE, TOKENS, [0], count=2)
    assert found.token == "물"
    assert [token for token, _ in found.nearest] == ["생수", "불"]
    assert found.nearest[0][1] == pytest.approx(2 / np.hypot(2, 0.2))


def test_there_are_never_more_neighbours_than_other_rows():
    (found,) = nearest_neighbours(TABLE, TOKENS, [3], count=99)
    assert len(found.nearest) == 3


def test_neighbours_are_those_of_scipy():
    table = np.random.default_rng(0).normal(size=(40, 5))
    distances = cdist(table, table, "cosine")
    np.fill_diagonal(distances, np.inf)
    found = nearest_neighbours(table, [str(n) for n in range(40)], range(40), count=3)
    for row, one in enumerate(found):
        assert [token for token, _ in one.nearest] == [str(n) for n in np.argsort(distances[row])[:3]]


def test_norms_are_described_in_the_unit_of_the_table():
    found = norm_statistics([[3.0, 4.0], [0.0, 1.0], [0.0, 0.0]])
    assert (found.rows, found.minimum, found.median, found.maximum, found.mean) == (3, 0.0, 1.0, 5.0, 2.0)
    assert found.deviation == pytest.approx(np.std([5, 1, 0]))


def test_drift_counts_every_row_once_between_the_lowest_cosine_and_one():
    before = np.array([[1.0, 0.0], [1.0, 0.0], [0.0, 0.0], [1.0, 1.0]])
    after = np.array([[2.0, 0.0], [0.6, 0.8], [0.0, 0.0], [1.0, 1.0]])
    found = drift(before, after, bins=4)
    assert found.edges == pytest.approx((0.6, 0.7, 0.8, 0.9, 1.0))
    assert found.counts == (1, 0, 0, 3)
    assert (found.lowest, found.mean, found.unchanged) == (pytest.approx(0.6), pytest.approx(0.9), 2)


def test_blocks_of_rows_change_nothing(monkeypatch):
    before, after = np.random.default_rng(0).normal(size=(2, 7, 3)).astype(np.float32)
    whole = drift(before, after), norm_statistics(after)
    monkeypatch.setattr("soju.embedding.finish.ROWS", 2)
    assert (drift(before, after), norm_statistics(after)) == whole


def test_rows_that_did_not_move_all_stand_in_the_last_bin():
    table = np.random.default_rng(1).normal(size=(100, 7)).astype(np.float32)
    found = drift(table, table.copy())
    assert (found.counts[-1], found.unchanged, found.lowest) == (100, 100, 1.0)
    assert found.edges[0] == 0.0


def test_a_longer_row_of_the_same_direction_has_not_drifted_but_is_not_unchanged():
    found = drift([[1.0, 2.0]], [[2.0, 4.0]])
    assert found.unchanged == 0
    assert found.lowest == pytest.approx(1.0)


@pytest.mark.parametrize("act", [lambda: drift(TABLE, TABLE[:2]), lambda: norm_statistics(np.zeros((0, 3)))])
def test_rows_that_are_not_there_are_refused(act):
    with pytest.raises(UserError, match="rows of shape"):
        act()


def test_an_id_outside_the_table_is_refused():
    with pytest.raises(UserError, match="token 4: the table has 4 rows"):
        nearest_neighbours(TABLE, TOKENS, [4])
    with pytest.raises(UserError, match="3 tokens for 4 rows"):
        nearest_neighbours(TABLE, TOKENS[:3], [0])

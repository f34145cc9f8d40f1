import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.sparse import csr_array

from soju.alignment.bitext import dictionary_table, expansion_weights, mix, prune_by_mass


def ids(*values):
    return np.array(values, np.int32)


def table(*rows):
    return csr_array(np.array(rows, np.float32))


def test_an_entry_of_one_term_each_weighs_its_squared_similarity():
    weights = dictionary_table([(ids(1), ids(2), 0.5), (ids(1), ids(0), 1.0)], size=3)
    assert weights.toarray().tolist() == [[0, 0, 0], [1, 0, 0.25], [0, 0, 0]]
    assert weights.dtype == np.float32


def test_an_entry_of_several_terms_shares_its_weight_among_the_pairs():
    weights = dictionary_table([(ids(0, 1), ids(2, 3), 1.0)], size=4)
    assert weights.toarray().tolist() == [[0, 0, 0.25, 0.25], [0, 0, 0.25, 0.25], [0] * 4, [0] * 4]


def test_entries_of_the_same_pair_add_up():
    weights = dictionary_table([(ids(0), ids(1), 1.0), (ids(0), ids(1), 0.5), (ids(0), ids(1, 1), 1.0)], size=2)
    assert weights.toarray().tolist() == [[0, 2.25], [0, 0]]
    assert weights.nnz == 1


def test_no_entries_and_entries_without_terms_give_an_empty_table():
    for entries in ([], [(ids(), ids(1), 1.0)], [(ids(1), ids(), 1.0)]):
        weights = dictionary_table(entries, size=2)
        assert (weights.shape, weights.nnz) == ((2, 2), 0)


def test_terms_beyond_the_size_are_refused():
    with pytest.raises(ValueError, match="exceeds"):
        dictionary_table([(ids(0), ids(2), 1.0)], size=2)


def test_a_mix_normalises_the_rows_of_both_tables():
    first = table([3, 1, 0, 0], [0] * 4, [2, 2, 0, 0], [0] * 4)
    second = table([0, 0, 5, 0], [0, 8, 0, 0], [0] * 4, [0] * 4)
    mixed = mix(first, second, share=0.25)
    assert mixed.toarray().tolist() == [[0.5625, 0.1875, 0.25, 0], [0, 0.25, 0, 0], [0.375, 0.375, 0, 0], [0] * 4]


def test_a_mix_of_share_nothing_is_the_first_table_normalised():
    first, second = table([3, 1], [0, 0]), table([0, 1], [1, 0])
    assert mix(first, second, share=0).toarray().tolist() == [[0.75, 0.25], [0, 0]]
    assert mix(first, second, share=1).toarray().tolist() == [[0, 1], [1, 0]]


def test_the_weights_of_a_row_of_a_half_and_a_quarter():
    weights = expansion_weights(table([0.5, 0.25, 0, 0]), power=0.7, confidence=0.2)
    expected = [0.5**0.2, 0.5**0.7 * 0.5**0.2, 0, 0]  # 0.871, 0.536
    np.testing.assert_allclose(weights.toarray(), [expected], rtol=1e-6)
    assert weights.dtype == np.float32


@pytest.mark.parametrize(
    ("power", "confidence", "expected"),
    [
        (1, 0, [[1, 0.5], [1, 0]]),
        (1, 1, [[0.5, 0.25], [0.25, 0]]),
        (0.5, 0.5, [[0.5**0.5, 0.5], [0.5, 0]]),
    ],
)
def test_power_and_confidence_of_weights(power, confidence, expected):
    weights = expansion_weights(table([0.5, 0.25], [0.25, 0]), power=power, confidence=confidence)
    np.testing.assert_allclose(weights.toarray(), expected, rtol=1e-6)


def test_a_row_without_translations_has_no_weights():
    assert expansion_weights(table([0, 0], [1, 0])).toarray().tolist() == [[0, 0], [1, 0]]
    assert expansion_weights(csr_array((3, 3), dtype=np.float32)).nnz == 0


ROW = [0.25, 0.5, 0, 0.125, 0.125]  # the largest first: 0.5, 0.75, 0.875, 1


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({"mass": 0.01}, [0, 0.5, 0, 0, 0]),
        ({"mass": 0.5}, [0, 0.5, 0, 0, 0]),
        ({"mass": 0.51}, [0.25, 0.5, 0, 0, 0]),
        ({"mass": 0.75}, [0.25, 0.5, 0, 0, 0]),
        ({"mass": 0.8}, [0.25, 0.5, 0, 0.125, 0]),  # of equal weights the first column
        ({"mass": 0.875}, [0.25, 0.5, 0, 0.125, 0]),
        ({"mass": 1.0}, ROW),
        ({"mass": 1.0, "max_terms": 3}, [0.25, 0.5, 0, 0.125, 0]),
        ({"mass": 1.0, "max_terms": 1}, [0, 0.5, 0, 0, 0]),
        ({"mass": 1.0, "min_weight": 0.125}, ROW),
        ({"mass": 1.0, "min_weight": 0.2}, [0.25, 0.5, 0, 0, 0]),
        ({"mass": 0.8, "min_weight": 0.3, "max_terms": 2}, [0, 0.5, 0, 0, 0]),
        ({"mass": 1.0, "min_weight": 0.6}, [0, 0, 0, 0, 0]),
    ],
)
def test_a_pruned_row_worked_by_hand(options, kept):
    assert prune_by_mass(table(ROW), **options).toarray().tolist() == [kept]


def test_each_row_is_pruned_by_its_own_sum():
    pruned = prune_by_mass(table([8, 4, 2], [0, 0, 0], [0.125, 0.5, 0.25]), mass=0.7)
    assert pruned.toarray().tolist() == [[8, 4, 0], [0, 0, 0], [0, 0.5, 0.25]]


def test_the_whole_mass_keeps_even_the_smallest_weight():
    weights = table([1, 1e-12, 0], [1e-30, 1, 1])
    assert (prune_by_mass(weights, mass=1) != weights).nnz == 0


def test_an_empty_table_stays_empty():
    assert prune_by_mass(csr_array((2, 3), dtype=np.float32), mass=0.5).shape == (2, 3)


@pytest.mark.parametrize("mass", [0, -0.1, 1.1, float("nan")])
def test_a_mass_that_is_no_share_is_refused(mass):
    with pytest.raises(ValueError, match=r"mass must be in \(0, 1\]"):
        prune_by_mass(table(ROW), mass=mass)


def slowly_pruned(row, mass, min_weight, max_terms):
    kept, held, total = [0.0] * len(row), 0.0, sum(row)
    ranked = sorted((column for column, weight in enumerate(row) if weight > 0), key=lambda column: -row[column])
    for column in ranked[:max_terms]:
        if held < mass * total and row[column] >= min_weight:
            kept[column] = row[column]
        held += row[column]
    return kept


# Multiples of 1/64 add up exactly, so that both implementations meet the same ties.
WEIGHTS = st.integers(0, 64).map(lambda number: number / 64)
TABLES = st.integers(1, 7).flatmap(
    lambda width: st.lists(st.lists(WEIGHTS, min_size=width, max_size=width), min_size=1, max_size=6)
)


@given(
    rows=TABLES,
    mass=st.sampled_from([0.125, 0.25, 0.5, 0.75, 1.0]),
    min_weight=WEIGHTS,
    max_terms=st.none() | st.integers(1, 4),
)
def test_pruning_agrees_with_one_row_at_a_time(rows, mass, min_weight, max_terms):
    pruned = prune_by_mass(table(*rows), mass=mass, min_weight=min_weight, max_terms=max_terms)
    assert pruned.toarray().tolist() == [slowly_pruned(row, mass, min_weight, max_terms) for row in rows]
    assert pruned.has_sorted_indices
    assert (pruned.data > 0).all()


@given(rows=TABLES, power=st.floats(0.1, 2), confidence=st.floats(0, 2))
def test_weights_agree_with_one_row_at_a_time(rows, power, confidence):
    weights = expansion_weights(table(*rows), power=power, confidence=confidence).toarray()
    for row, found in zip(rows, weights, strict=True):
        best = max(row) or 1
        np.testing.assert_allclose(found, [(p / best) ** power * best**confidence if p else 0 for p in row], rtol=1e-5)
    assert weights.min() >= 0
    assert weights.max() <= 1


@given(rows=TABLES, share=st.floats(0, 1))
def test_rows_that_both_tables_have_sum_to_one_after_mixing(rows, share):
    first, second = table(*rows), table(*reversed(rows))
    sums = mix(first, second, share=share).toarray().sum(axis=1)
    both = (first.toarray().sum(axis=1) > 0) & (second.toarray().sum(axis=1) > 0)
    np.testing.assert_allclose(sums[both], 1, rtol=1e-5)


def test_the_given_tables_are_not_changed():
    given_tables = [table(ROW, [0, 1, 0, 0, 0]), table(ROW, ROW)]
    before = [one.copy() for one in given_tables]
    mix(*given_tables, share=0.5)
    expansion_weights(given_tables[0])
    prune_by_mass(given_tables[0], mass=0.5)
    for one, copy in zip(given_tables, before, strict=True):
        for part in ("data", "indices", "indptr"):
            np.testing.assert_array_equal(getattr(one, part), getattr(copy, part))

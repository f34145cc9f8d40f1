import numpy as np
import pytest

from soju.alignment.bitext import NULL, make_bitext


def ids(*values):
    return np.array(values, np.int32)


def three_pairs():
    pairs = [(ids(1, 2), ids(1, 2), 1.0), (ids(3, 2), ids(3, 2), 2.0), (ids(4), ids(1, 4, 4), 0.5)]
    return make_bitext(pairs, source_size=5, target_size=6)


def test_null_stands_in_front_of_every_source_sentence():
    bitext = three_pairs()
    assert bitext.source_N.tolist() == [NULL, 1, 2, NULL, 3, 2, NULL, 4]
    assert bitext.source_offsets.tolist() == [0, 3, 6, 8]
    assert bitext.target_M.tolist() == [1, 2, 3, 2, 1, 4, 4]
    assert bitext.target_offsets.tolist() == [0, 2, 4, 7]
    assert bitext.weights_S.tolist() == [1.0, 2.0, 0.5]
    assert len(bitext) == 3


def test_token_pairs_count_null():
    assert three_pairs().token_pairs == 3 * 2 + 3 * 2 + 2 * 3


def test_reversed_exchanges_the_sides():
    bitext = three_pairs().reversed()
    assert bitext.source_N.tolist() == [NULL, 1, 2, NULL, 3, 2, NULL, 1, 4, 4]
    assert bitext.target_M.tolist() == [1, 2, 3, 2, 4]
    assert (bitext.source_size, bitext.target_size) == (6, 5)


def test_reversed_twice_is_the_same_bitext():
    bitext = three_pairs()
    twice = bitext.reversed().reversed()
    for name in ("source_N", "source_offsets", "target_M", "target_offsets", "weights_S"):
        np.testing.assert_array_equal(getattr(twice, name), getattr(bitext, name))
        assert getattr(twice, name).dtype == getattr(bitext, name).dtype
    assert (twice.source_size, twice.target_size) == (bitext.source_size, bitext.target_size)


def test_a_pair_with_an_empty_side_is_left_out():
    bitext = make_bitext(
        [(ids(), ids(1), 1.0), (ids(1), ids(), 1.0), (ids(1), ids(1), 3.0)], source_size=2, target_size=2
    )
    assert bitext.weights_S.tolist() == [3.0]


def test_long_sides_are_cut():
    bitext = make_bitext(
        [(np.ones(9, np.int32), np.ones(9, np.int32), 1.0)], source_size=2, target_size=2, max_tokens=4
    )
    assert bitext.token_pairs == (1 + 4) * 4


def test_nothing_to_align_is_refused():
    with pytest.raises(ValueError, match="nothing to align"):
        make_bitext([(ids(), ids(1), 1.0)], source_size=2, target_size=2)


@pytest.mark.parametrize(
    ("source", "target", "message"),
    [(ids(0), ids(1), "source ids"), (ids(1), ids(2), "target ids"), (ids(1), ids(-1), "target ids")],
)
def test_ids_out_of_range_are_refused(source, target, message):
    with pytest.raises(ValueError, match=message):
        make_bitext([(source, target, 1.0)], source_size=2, target_size=2)

import numpy as np
import pytest
from scipy.sparse import csr_array

from soju.alignment.bitext import average, geometric_mean

# Rows: NULL and two source words; columns: NULL and three target words.
FORWARD = csr_array(np.array([[0, 0.5, 0.25, 0.25], [0, 0.9, 0.1, 0.0], [0, 0.0, 0.5, 0.5]], np.float32))
BACKWARD = csr_array(np.array([[0, 0.5, 0.5], [0.2, 0.4, 0.4], [0, 0.9, 0.1], [0, 0.0, 0.5]], np.float32))


def test_average_by_hand():
    expected = [[0, 0, 0, 0], [0, 0.65, 0.5, 0], [0, 0.2, 0.3, 0.5]]
    np.testing.assert_allclose(average(FORWARD, BACKWARD).toarray(), expected, rtol=1e-6)


def test_geometric_mean_by_hand():
    expected = [[0, 0, 0, 0], [0, 0.6, 0.3, 0], [0, 0, 0.05**0.5, 0.5]]
    np.testing.assert_allclose(geometric_mean(FORWARD, BACKWARD).toarray(), expected, rtol=1e-6)


@pytest.mark.parametrize("join", [average, geometric_mean])
def test_joint_tables_have_no_null_and_do_not_care_which_side_is_first(join):
    joint = join(FORWARD, BACKWARD)
    assert joint.dtype == np.float32
    assert joint[[0]].nnz == joint[:, [0]].nnz == 0
    np.testing.assert_allclose(join(BACKWARD, FORWARD).toarray(), joint.toarray().T, rtol=1e-6)


@pytest.mark.parametrize("join", [average, geometric_mean])
def test_inputs_stay_as_they_are(join):
    before = FORWARD.toarray(), BACKWARD.toarray()
    join(FORWARD, BACKWARD)
    np.testing.assert_array_equal(FORWARD.toarray(), before[0])
    np.testing.assert_array_equal(BACKWARD.toarray(), before[1])


@pytest.mark.parametrize("join", [average, geometric_mean])
def test_tables_of_different_bitexts_are_refused(join):
    with pytest.raises(ValueError, match="backward must be"):
        join(FORWARD, FORWARD)

import numpy as np
import pytest
from scipy.sparse import csr_array

from soju.core.errors import UserError
from soju.sparse.export.onnx import fidelity

EXACT = csr_array(np.float32([[3, 4, 0, 0], [0, 0, 0, 0], [1, 0, 0, 0]]))


def test_equal_vectors_agree_in_everything():
    report = fidelity(EXACT, EXACT)
    assert report["texts"] == 2
    assert report["empty_texts"] == 1
    assert report["cosine_mean"] == pytest.approx(1)
    assert report["top_10_overlap"] == 1
    assert report["exact_active_terms"] == report["stock_active_terms"] == 1.5
    assert report["spurious_mass"] == pytest.approx(0)


def test_values_worked_by_hand(tmp_path):
    (tmp_path / "weights").write_bytes(b"12345")
    stock = csr_array(np.float32([[4, 0, 3, 0], [0, 0, 0, 0], [0, 0, 0, 0]]))  # cosines 12/25 and 0
    report = fidelity(EXACT, stock, folder=tmp_path, top=(1, 2))
    assert report["cosine_mean"] == pytest.approx(0.24)
    assert report["top_1_overlap"] == 0  # 1 against 0; no term at all in the last text
    assert report["top_2_overlap"] == 0.25  # {0, 1} against {0, 2}, and none
    assert report["stock_active_terms"] == 1
    assert report["spurious_mass"] == pytest.approx(3 / 7)
    assert report["bytes"] == 5


def test_vectors_of_other_texts_are_refused():
    with pytest.raises(UserError, match="encode the same texts"):
        fidelity(EXACT, EXACT[[0]])


def test_texts_without_terms_are_refused():
    with pytest.raises(UserError, match="pass other texts"):
        fidelity(EXACT[[1]], EXACT[[1]])

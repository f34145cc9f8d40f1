import numpy as np
import pytest
from scipy.sparse import csr_array

from fixtures.tiny_models import tiny_tokenizer, tiny_weights
from fixtures.without_soju import encode_stock, encode_without_soju
from soju.core.errors import UserError
from soju.sparse.export.stock import own_term_weights, save_stock_static

IDF = np.array([0, 1, 2, 3, 4, 5], np.float32)
TEXTS = ["쌀 서버", "rice 소주 소주", "없는", ""]
EXPECTED = np.float32([[0, 1, 0, 3, 0, 0], [0, 0, 0, 0, 4, 5], [0] * 6, [0] * 6])  # each piece once


def test_a_text_has_the_weight_of_each_of_its_pieces_once(tmp_path):
    save_stock_static(tmp_path, tiny_tokenizer(), IDF)
    np.testing.assert_array_equal(encode_stock(tmp_path, TEXTS).toarray(), EXPECTED)
    np.testing.assert_array_equal(encode_stock(tmp_path, [""]).toarray(), EXPECTED[3:])


def test_the_folder_loads_and_encodes_without_soju(tmp_path):
    save_stock_static(tmp_path, tiny_tokenizer(), IDF)
    np.testing.assert_allclose(encode_without_soju(tmp_path, TEXTS), EXPECTED, atol=1e-4)


def test_own_term_weights_are_the_diagonal_times_idf():
    canonical = tiny_weights()
    canonical[2, 2] = 0.5
    np.testing.assert_allclose(own_term_weights(canonical, IDF), [0, 1, 1, 3, 4, 5])
    with pytest.raises(UserError, match="one a term"):
        own_term_weights(csr_array(np.eye(2)), IDF)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (IDF[:3], "one a piece"),
        (np.float32([0, 1, 1, 1, 1, np.nan]), "negative or not finite"),
        (np.float32([0, 1, 1, 1, 1, -1]), "negative or not finite"),
        (np.float32([1, 1, 1, 1, 1, 1]), "unknown piece"),
    ],
)
def test_unusable_weights_are_refused(tmp_path, weights, message):
    with pytest.raises(UserError, match=message):
        save_stock_static(tmp_path, tiny_tokenizer(), weights)

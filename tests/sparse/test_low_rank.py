import json

import numpy as np
import pytest
from safetensors import safe_open
from scipy.sparse import csr_array

from fixtures.tiny_models import tiny_tokenizer, tiny_weights
from fixtures.without_soju import encode_stock, encode_without_soju
from soju.core.errors import UserError
from soju.sparse.export.onnx import fidelity
from soju.sparse.export.stock import CodeSettings, LowRankFactors, factorise_codes, normalised_pieces, save_low_rank

TEXTS = ["서버 쌀", "rice 소주 소주", "없는", "", "쌀 rice"]
EXPECTED = np.float32(
    [[0, 1, 0.7, 1, 0.5, 0], [0, 0, 0, 0, 1, 2], [0] * 6, [0] * 6, [0, 0, 0, 1, 1.5, 0]]
)  # the sum over the pieces: the last text has rice once itself and half through 쌀


def identity_factors(dimensions: int = 6) -> LowRankFactors:
    """One dimension a term: `expm1` of the weights plus the bias 1, exactly."""
    dense = tiny_weights().toarray()
    pieces = np.where(dense > 0, np.expm1(dense) + 1, 0).astype(np.float32)
    return LowRankFactors(pieces, np.eye(6, dtype=np.float32), np.ones(6, np.float32), 1.0, {"factorisation": "hand"})


def sparse_weights(size: int = 300, extra: int = 2) -> csr_array:
    generator = np.random.default_rng(3)
    dense = np.eye(size, dtype=np.float32)
    for row in range(size):
        dense[row, generator.choice(size, extra, replace=False)] = generator.uniform(0.2, 0.9, extra)
    return csr_array(dense)


def largest_of_pieces(texts: list[str]) -> csr_array:
    """The largest weight that any piece of a text gives each term."""
    pieces = [tiny_tokenizer().encode(text).ids for text in texts]
    return csr_array(np.array([tiny_weights().toarray()[ids].max(axis=0, initial=0) for ids in pieces], np.float32))


def mean_row_cosine(factors: LowRankFactors, weights: csr_array) -> float:
    return float(fidelity(weights, csr_array(factors.weights(np.arange(weights.shape[0]))))["cosine_mean"])


def test_exact_factors_give_the_weights_back():
    np.testing.assert_allclose(identity_factors().weights(np.arange(6)), tiny_weights().toarray(), atol=1e-6)


def test_normalised_pieces_have_mean_zero_and_variance_one():
    codes = np.random.default_rng(0).normal(size=(50, 14)).astype(np.float32)
    rows, factor = normalised_pieces(codes)
    np.testing.assert_allclose(rows.mean(axis=1), 0, atol=1e-6)
    np.testing.assert_allclose(rows.var(axis=1), 1, atol=1e-5)
    np.testing.assert_allclose(rows[:, :-2], codes * factor, rtol=1e-5)


def test_normalising_no_codes_at_all_is_finite():
    rows, _ = normalised_pieces(np.zeros((2, 4), np.float32))
    np.testing.assert_allclose(rows.var(axis=1), 1, atol=1e-5)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("float16", 2e-3), ("bfloat16", 2e-2)])
def test_the_saved_model_gives_what_the_factors_give(tmp_path, dtype, tolerance):
    save_low_rank(tmp_path, identity_factors(), tiny_tokenizer(), dtype=dtype)
    np.testing.assert_allclose(encode_stock(tmp_path, TEXTS).toarray(), EXPECTED, atol=tolerance)
    np.testing.assert_allclose(encode_stock(tmp_path, [""]).toarray(), EXPECTED[3:4], atol=tolerance)
    with safe_open(tmp_path / "model.safetensors", "np" if dtype != "bfloat16" else "pt") as file:
        types = {str(file.get_slice(name).get_dtype()) for name in file.keys()}  # noqa: SIM118
    assert types == {{"float32": "F32", "float16": "F16", "bfloat16": "BF16"}[dtype]}


def test_the_folder_loads_and_encodes_without_soju(tmp_path):
    save_low_rank(tmp_path, identity_factors(), tiny_tokenizer(), dtype="float32")
    vectors = encode_without_soju(tmp_path, TEXTS)
    np.testing.assert_allclose(vectors, EXPECTED, atol=1e-4)
    np.testing.assert_allclose(vectors, encode_stock(tmp_path, TEXTS).toarray(), atol=1e-4)


def test_maximum_pooling_counts_a_term_once(tmp_path):
    save_low_rank(tmp_path, identity_factors(), tiny_tokenizer(), pooling="max", dtype="float32")
    expected = largest_of_pieces(TEXTS).toarray()
    assert expected[4].tolist() == [0, 0, 0, 1, 1, 0]
    np.testing.assert_allclose(encode_stock(tmp_path, TEXTS).toarray(), expected, atol=1e-5)


def test_texts_are_cut_at_the_maximum_length(tmp_path):
    save_low_rank(tmp_path, identity_factors(), tiny_tokenizer(), max_length=3)
    assert encode_stock(tmp_path, ["rice 소주 서버 쌀"]).toarray()[0].nonzero()[0].tolist() == [4, 5]


def test_codes_keep_every_weight_when_there_is_room():
    factors = factorise_codes(tiny_weights(), hidden_size=64, settings=CodeSettings(1.0, 1e-4))
    np.testing.assert_allclose(factors.weights(np.arange(6)), tiny_weights().toarray(), atol=2e-3)


def test_codes_reach_what_svd_of_the_same_size_does_not():
    weights = sparse_weights()
    codes = mean_row_cosine(factorise_codes(weights, hidden_size=128), weights)
    left, values, right = np.linalg.svd(np.expm1(weights.toarray()))
    product = (left[:, :126] * values[:126]) @ right[:126]  # the best matrix of this rank in squares
    found = [csr_array(np.log1p(np.maximum(product - bias, 0))) for bias in (0, 0.05, 0.1, 0.2, 0.4)]
    svd = max(float(fidelity(weights, vectors)["cosine_mean"]) for vectors in found)
    assert codes > 0.99 > 0.95 > svd


def test_more_dimensions_are_closer():
    weights = sparse_weights()
    small, large = (mean_row_cosine(factorise_codes(weights, hidden_size=size), weights) for size in (48, 192))
    assert 1 - large < (1 - small) / 10


def test_large_weights_are_divided_by_the_scale_and_keep_their_cosines():
    weights = sparse_weights()
    heavy = csr_array(weights * np.float32(10))
    factors = factorise_codes(heavy, hidden_size=128, settings=CodeSettings(1.0, 0.1))
    assert factors.scale == pytest.approx(10)
    reference = factorise_codes(weights, hidden_size=128, settings=CodeSettings(1.0, 0.1))
    pieces = np.arange(300)
    np.testing.assert_allclose(factors.weights(pieces), reference.weights(pieces) * 10, rtol=1e-3, atol=1e-3)


def test_only_the_heaviest_terms_of_a_piece_are_kept():
    weights = csr_array(np.float32([[0.2, 1.0, 0.5], [0, 0.3, 0], [0, 0, 0]]))
    factors = factorise_codes(weights, hidden_size=64, settings=CodeSettings(1.0, 1e-4, max_terms=2))
    expected = np.float32([[0, 1.0, 0.5], [0, 0.3, 0], [0, 0, 0]])
    np.testing.assert_allclose(factors.weights(np.arange(3)), expected, atol=2e-3)


def test_the_same_seed_gives_the_same_factors():
    first, second = (factorise_codes(sparse_weights(), hidden_size=32, seed=5) for _ in range(2))
    np.testing.assert_array_equal(first.pieces_VC, second.pieces_VC)
    assert first.settings == second.settings


def test_the_sample_follows_the_piece_counts():
    counts = np.zeros(300)
    counts[7] = 1
    assert factorise_codes(sparse_weights(), hidden_size=32, piece_counts_V=counts).settings["bias"] > 0
    with pytest.raises(UserError, match="counts"):
        factorise_codes(sparse_weights(), hidden_size=32, piece_counts_V=np.zeros(300))


def test_a_saved_model_says_how_it_was_made(tmp_path):
    weights = tiny_weights()
    factors = factorise_codes(weights, hidden_size=64, settings=CodeSettings(1.0, 1e-4))
    save_low_rank(tmp_path, factors, tiny_tokenizer(), pooling="max")
    assert json.loads((tmp_path / "export.json").read_text()) == {
        "scale": 1.0, "pooling": "max", "factorisation": "codes", "hidden_size": 64, "seed": 0,
        "bias": 1.0, "ridge": 1e-4, "max_terms": None,
    }  # fmt: skip
    report = fidelity(largest_of_pieces(TEXTS), encode_stock(tmp_path, TEXTS), folder=tmp_path)
    assert report["cosine_mean"] > 0.9999
    assert report["bytes"] > 1000


@pytest.mark.parametrize("bad", [-1.0, float("nan"), float("inf")])
def test_weights_a_relu_cannot_give_are_refused(bad):
    with pytest.raises(UserError, match="ReLU"):
        factorise_codes(csr_array(np.array([[1.0, bad], [0.0, 1.0]])), hidden_size=8)


def test_other_refusals(tmp_path):
    with pytest.raises(UserError, match="square"):
        factorise_codes(csr_array(np.ones((2, 3))))
    with pytest.raises(UserError, match="above 2"):
        factorise_codes(tiny_weights(), hidden_size=2)
    for settings in (CodeSettings(0.0, 1.0), CodeSettings(1.0, 0.0), CodeSettings(1.0, 1.0, 0)):
        with pytest.raises(UserError, match="must be above 0"):
            factorise_codes(tiny_weights(), settings=settings)
    with pytest.raises(UserError, match="no weight"):
        factorise_codes(csr_array((3, 3)))
    factors = factorise_codes(sparse_weights(), hidden_size=8, settings=CodeSettings(1.0, 0.1))
    with pytest.raises(UserError, match="use the model's own"):
        save_low_rank(tmp_path, factors, tiny_tokenizer())

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.sparse import csr_array, eye_array
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit

from soju.core.errors import IntegrityError, UserError
from soju.core.files import write_manifest
from soju.sparse.static.encoder import StaticEncoder, read_model_config

PIECES = ["<unk>", "검색", "을", "엔진", "▁search▁", "▁searches▁"]
CANONICAL = np.zeros((6, 6), np.float32)
CANONICAL[1, 1] = 1  # 검색
CANONICAL[3, [1, 3]] = 0.25, 0.75  # 엔진, read as 검색 once in four
CANONICAL[4, 4] = CANONICAL[5, 4] = 1  # both forms of search
TRANSLATIONS = np.zeros((6, 6), np.float32)
TRANSLATIONS[1, 4] = 0.5
TRANSLATIONS[4, [1, 3]] = 0.5, 0.25
TRANSLATIONS[3, 4] = 0.125
SHARES = np.array([0, 0.5, 0, 0.25, 0.75, 0], np.float32)


def word_tokenizer(pieces):
    tokenizer = Tokenizer(WordLevel({piece: index for index, piece in enumerate(pieces)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    return tokenizer


def encoder_of(canonical=CANONICAL, translations=TRANSLATIONS, shares=SHARES):
    return StaticEncoder(word_tokenizer(PIECES), csr_array(canonical), csr_array(translations), shares)


@pytest.fixture(scope="module")
def encoder():
    return encoder_of()


TEXTS = ["검색 을 ▁searches▁", "엔진 엔진 new", "", "을 new", "▁search▁ ▁searches▁ 검색 검색"]
COUNTS = np.array([[0, 1, 1, 0, 0, 1], [1, 0, 0, 2, 0, 0], [0] * 6, [1, 0, 1, 0, 0, 0], [0, 2, 0, 0, 1, 1]], np.float32)


def test_queries_are_their_terms_and_the_translations_of_their_terms(encoder):
    vectors = encoder.encode_queries(TEXTS)
    assert vectors.dtype == np.float32
    np.testing.assert_array_equal(vectors.toarray(), COUNTS @ CANONICAL @ (np.eye(6) + TRANSLATIONS))


def test_a_query_worked_by_hand(encoder):
    """검색 gives itself 1 and search 0.5; searches gives search 1, 검색 0.5 and 엔진 0.25; 을 gives nothing."""
    assert encoder.encode_queries(["검색 을 ▁searches▁"]).toarray().tolist() == [[0, 1.5, 0, 0.25, 1.5, 0]]


def test_documents_hold_their_terms_and_no_translation(encoder):
    vectors = encoder.encode_documents(TEXTS)
    np.testing.assert_array_equal(vectors.toarray(), COUNTS @ CANONICAL)
    assert encoder.encode_documents(["검색 을"]).toarray().tolist() == [[0, 1, 0, 0, 0, 0]]


@pytest.mark.parametrize("encode", ["encode_queries", "encode_documents"])
def test_no_texts_give_no_rows_and_an_empty_text_an_empty_row(encoder, encode):
    assert getattr(encoder, encode)([]).shape == (0, 6)
    vectors = getattr(encoder, encode)(["", " ", "new 을"])
    assert vectors.shape == (3, 6)
    assert vectors.nnz == 0


def test_columns_of_every_row_ascend(encoder):
    vectors = encoder.encode_queries(TEXTS)
    for start, stop in zip(vectors.indptr[:-1], vectors.indptr[1:], strict=True):
        assert (np.diff(vectors.indices[start:stop]) > 0).all()


@given(
    texts=st.lists(st.lists(st.sampled_from([*PIECES, "new"]), max_size=6).map(" ".join), max_size=6), data=st.data()
)
def test_the_other_texts_of_a_batch_do_not_change_a_vector(encoder, texts, data):
    order = data.draw(st.permutations(range(len(texts))))
    together = encoder.encode_queries([texts[index] for index in order])
    for row, index in enumerate(order):
        alone = encoder.encode_queries([texts[index]])
        np.testing.assert_array_equal(together[[row]].toarray(), alone.toarray())


def test_terms_are_readable():
    pieces = ["<unk>", "검색", "▁search▁", "▁sea", "rch▁", "ar", "▁"]
    encoder = StaticEncoder(
        word_tokenizer(pieces), csr_array((7, 7), dtype=np.float32), csr_array((7, 7), dtype=np.float32), np.zeros(7)
    )
    assert encoder.terms == ("<unk>", "검색", "search", "sea…", "…rch", "…ar…", "▁")


@pytest.mark.parametrize(
    "parts",
    [
        {"canonical": np.eye(5, dtype=np.float32)},
        {"translations": np.eye(7, dtype=np.float32)},
        {"shares": np.zeros(5, np.float32)},
    ],
)
def test_parts_of_different_sizes_are_refused(parts):
    with pytest.raises(ValueError, match="the tokenizer has 6 pieces"):
        encoder_of(**parts)


def random_encoder(seed=0):
    random = np.random.default_rng(seed)
    canonical = random.random((6, 6), np.float32) * (random.random((6, 6)) < 0.5)
    translations = random.random((6, 6), np.float32) * (random.random((6, 6)) < 0.5)
    return encoder_of(canonical, translations, random.random(6, np.float32))


def test_a_saved_model_gives_the_same_vectors_up_to_half_precision(tmp_path):
    encoder = random_encoder()
    encoder.save(tmp_path)
    loaded = StaticEncoder.load(tmp_path)
    for encode in ("encode_queries", "encode_documents"):
        np.testing.assert_allclose(
            getattr(loaded, encode)(TEXTS).toarray(), getattr(encoder, encode)(TEXTS).toarray(), rtol=2e-3
        )
    np.testing.assert_allclose(loaded.document_share_V, encoder.document_share_V, rtol=1e-3)
    assert loaded.terms == encoder.terms


def test_a_loaded_model_saves_and_loads_without_any_change(tmp_path):
    random_encoder().save(tmp_path / "first", about={"data": "시험"})
    first = StaticEncoder.load(tmp_path / "first")
    first.save(tmp_path / "second", about={"data": "시험"})
    second = StaticEncoder.load(tmp_path / "second")
    for encode in ("encode_queries", "encode_documents"):
        a, b = getattr(first, encode)(TEXTS), getattr(second, encode)(TEXTS)
        for part in ("data", "indices", "indptr"):
            assert getattr(a, part).tobytes() == getattr(b, part).tobytes()
    for path in (tmp_path / "first").iterdir():
        assert path.read_bytes() == (tmp_path / "second" / path.name).read_bytes()


def test_a_model_folder_says_what_it_is(encoder, tmp_path):
    encoder.save(tmp_path, about={"name": "demo"})
    assert read_model_config(tmp_path) == {
        "model_type": "soju-static-sparse",
        "format_version": 1,
        "vocab_size": 6,
        "about": {"name": "demo"},
    }
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "config.json",
        "manifest.json",
        "model.safetensors",
        "tokenizer.json",
    ]


def test_saving_over_a_model_replaces_it(tmp_path):
    random_encoder(1).save(tmp_path)
    encoder_of().save(tmp_path)
    np.testing.assert_array_equal(StaticEncoder.load(tmp_path).canonical_VV.toarray(), CANONICAL)


@pytest.mark.parametrize("size", [65_535, 65_536, 65_537])
def test_rows_as_long_as_the_largest_vocabularies_survive(tmp_path, size):
    pieces = ["<unk>", *(str(number) for number in range(1, size))]
    full_row = csr_array((np.ones(size, np.float32), np.arange(size), np.r_[0, 0, [size] * (size - 1)]), (size, size))
    encoder = StaticEncoder(word_tokenizer(pieces), full_row, eye_array(size, format="csr"), np.zeros(size, np.float32))
    encoder.save(tmp_path)
    loaded = StaticEncoder.load(tmp_path)
    assert (loaded.canonical_VV != full_row).nnz == 0
    assert loaded.encode_documents(["1"]).nnz == size


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json"])
def test_an_altered_file_is_refused(encoder, tmp_path, name):
    encoder.save(tmp_path)
    content = bytearray((tmp_path / name).read_bytes())
    content[len(content) // 2] ^= 1
    (tmp_path / name).write_bytes(content)
    with pytest.raises(IntegrityError, match=f"{name}: its content changed"):
        StaticEncoder.load(tmp_path)


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "manifest.json"])
def test_a_missing_file_is_refused(encoder, tmp_path, name):
    encoder.save(tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(IntegrityError, match=f"{name}: missing"):
        StaticEncoder.load(tmp_path)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ('{"model_type": "bert"}', "model type 'bert', expected 'soju-static-sparse'"),
        ("{}", "model type None, expected 'soju-static-sparse'"),
        (
            '{"model_type": "soju-static-sparse", "format_version": 2}',
            "format version 2 is not 1; train the model again",
        ),
        ("[]", "not a JSON object"),
        ("{", "not JSON"),
        ("\xff", "not JSON"),
    ],
)
def test_another_kind_of_model_is_refused_in_one_sentence(tmp_path, config, message):
    (tmp_path / "config.json").write_text(config, encoding="latin-1")
    write_manifest(tmp_path)
    with pytest.raises(UserError, match=message) as caught:
        StaticEncoder.load(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_folder_without_a_model_is_refused(tmp_path):
    with pytest.raises(UserError, match="not a model folder; give the folder of a model"):
        StaticEncoder.load(tmp_path / "absent")


def test_a_written_config_is_plain_json(encoder, tmp_path):
    encoder.save(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))["about"] == {}

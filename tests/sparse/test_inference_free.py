import json

import numpy as np
import pytest
from sentence_transformers import SparseEncoder

from engines.engine_models import save_static_model
from fixtures.pico_masked_lms import NEEDED, OTHERS, word_piece
from fixtures.without_soju import encode_without_soju
from soju.core.errors import UserError
from soju.core.files import verify_manifest
from soju.sparse.config import SearchSettings
from soju.sparse.export.stock import make_inference_free, piece_frequency, save_inference_free
from soju.sparse.indexing import Index, index_settings, read_documents
from soju.sparse.model import load_encoder
from soju.sparse.splade import SpladeEncoder

TEXTS = ["machine learning 검색", "검색 검색", "the", ""]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A neural model, a corpus, and the inference-free model of both."""
    root = tmp_path_factory.mktemp("inference-free")
    lm, tokenizer = word_piece()
    lm.save_pretrained(root / "lm")
    tokenizer.save_pretrained(root / "lm")
    SpladeEncoder(root / "lm", max_seq_length=16, device="cpu").save(str(root / "model"))
    rows = [{"id": str(number), "text": text} for number, text in enumerate(NEEDED + OTHERS)]
    (root / "corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    make_inference_free(str(root / "model"), [str(root / "corpus.jsonl")], root / "free")
    return root


def idf_by_hand(tokenizer, text):
    """``ln(1 + (10 - df + 0.5) / (df + 0.5))`` of each piece of a text, once, special ones none."""
    expected = np.zeros(len(tokenizer))
    for piece in set(tokenizer(text, add_special_tokens=False)["input_ids"]) - set(tokenizer.all_special_ids):
        holds = [piece in tokenizer(document, add_special_tokens=False)["input_ids"] for document in NEEDED + OTHERS]
        expected[piece] = np.log(1 + (10 - sum(holds) + 0.5) / (sum(holds) + 0.5))
    return expected


def test_stock_encoder_looks_queries_up_and_encodes_documents_with_the_model(folders):
    stock = SparseEncoder(str(folders / "free"), device="cpu")
    plain = SparseEncoder(str(folders / "model"), device="cpu")
    queries = stock.encode_query(TEXTS[:3], convert_to_sparse_tensor=False).numpy()
    np.testing.assert_allclose(queries, [idf_by_hand(plain.tokenizer, text) for text in TEXTS[:3]], rtol=1e-5)
    assert (queries.sum(axis=1) > 0).all()
    documents = stock.encode_document(NEEDED, convert_to_sparse_tensor=False).numpy()
    np.testing.assert_allclose(
        documents, plain.encode_document(NEEDED, convert_to_sparse_tensor=False).numpy(), atol=1e-5
    )


def test_the_folder_needs_no_soju(folders):
    expected = (
        SparseEncoder(str(folders / "model"), device="cpu").encode(NEEDED, convert_to_sparse_tensor=False).numpy()
    )
    np.testing.assert_allclose(encode_without_soju(folders / "free", NEEDED), expected, atol=1e-4)


def test_soju_opens_the_folder_and_encodes_as_stock_does(folders):
    encoder, stock = load_encoder(folders / "free"), SparseEncoder(str(folders / "free"), device="cpu")
    ours = encoder.encode_queries(TEXTS).toarray()
    np.testing.assert_allclose(ours[:3], stock.encode_query(TEXTS[:3], convert_to_sparse_tensor=False).numpy())
    assert ours[3].sum() == 0
    np.testing.assert_allclose(
        encoder.encode_documents(NEEDED).toarray(), load_encoder(folders / "model").encode_documents(NEEDED).toarray()
    )
    assert encoder.encode_queries([]).shape == (0, len(encoder.terms))
    assert index_settings(encoder, SearchSettings()).weighting.kind == "as_is"


def test_it_is_indexed_and_searched_like_any_model(folders, tmp_path):
    Index.build(read_documents([str(folders / "corpus.jsonl")]), folders / "free", tmp_path / "index")
    index = Index.open(tmp_path / "index")
    encoder = index.model
    weights = encoder.encode_documents(NEEDED + OTHERS).toarray() @ encoder.encode_queries(["machine"]).toarray()[0]
    assert [int(hit.document_id) for hit in index.search("machine", k=10)] == [
        at for at in np.argsort(-weights, kind="stable") if weights[at]
    ]


def test_the_table_lies_beside_as_opensearch_tokenizers_carry_it(folders):
    verify_manifest(folders / "free")
    table = json.loads((folders / "free" / "idf.json").read_text(encoding="utf-8"))
    tokenizer = SparseEncoder(str(folders / "model"), device="cpu").tokenizer
    expected = idf_by_hand(tokenizer, "machine")
    for piece in tokenizer.tokenize("machine"):
        assert table[piece] == pytest.approx(expected[tokenizer.convert_tokens_to_ids(piece)], abs=1e-6)
    assert not set(table) & set(tokenizer.all_special_tokens)


def test_pieces_are_counted_once_a_text(folders):
    tokenizer = SparseEncoder(str(folders / "model"), device="cpu").tokenizer
    frequency, total = piece_frequency(tokenizer, ["machine machine", "machine", "the"])
    assert total == 3
    assert {int(frequency[piece]) for piece in tokenizer("machine", add_special_tokens=False)["input_ids"]} == {2}


def test_what_does_not_fit_is_refused(folders, tmp_path):
    model, corpus = str(folders / "model"), [str(folders / "corpus.jsonl")]
    with pytest.raises(UserError, match="exists already"):
        make_inference_free(model, corpus, folders / "free")
    with pytest.raises(UserError, match="needs --corpus"):
        make_inference_free(model, [], tmp_path / "x")
    for ready in (str(folders / "free"), save_static_model(tmp_path / "static")):
        with pytest.raises(UserError, match="needs no network"):
            make_inference_free(ready, corpus, tmp_path / "x")
    stock = SparseEncoder(model, device="cpu")
    with pytest.raises(UserError, match="one value a piece"):
        save_inference_free(tmp_path / "x", stock, np.ones(3))
    with pytest.raises(UserError, match="negative or not finite"):
        save_inference_free(tmp_path / "x", stock, np.full(len(stock.tokenizer), np.nan))

"""How a student starts: as the static encoder below it, or from noise with a masked-LM warm-up."""

import numpy as np
import pytest
import torch
from scipy.sparse import diags_array, eye_array
from sentence_transformers import SparseEncoder
from torch.nn.functional import cross_entropy

from fixtures.pico_terms import scratch_config
from fixtures.small_bilingual import PAIRS, train_small
from fixtures.without_soju import encode_without_soju
from soju.search.folder import idf
from soju.sparse.initial import lexicon_vocabulary, scratch_student
from soju.sparse.model import PACKAGED_MODEL, model_folder
from soju.sparse.neural_encoders import NeuralEncoder
from soju.sparse.static.encoder import StaticEncoder

TEXTS = [text for pair in PAIRS for text in (pair.ko, pair.en)]
WORDS = [
    ("백신", "vaccine"),
    ("의사", "doctor"),
    ("책", "book"),
    ("학생", "student"),
    ("학교", "school"),
    ("바다", "sea"),
]


@pytest.fixture(scope="module")
def static():
    return train_small()


def start(static, *overrides, texts=TEXTS, seed=1):
    settings = scratch_config("student.hidden_size=128", "student.heads=2", *overrides).student
    return scratch_student(static, settings, texts, similarity="cosine", seed=seed)


@pytest.fixture(scope="module")
def lexical(static):
    return start(static)


def table(static, *, translation_share=0.7):
    """Weights of every piece by the definition: own and translated terms, times the root of their idf."""
    size = len(static.pieces)
    idf_V = idf(np.zeros(size, np.int64), 0, prior_documents=10_000, prior_share_V=static.document_share_V)
    expansion_VV = eye_array(size, format="csr") + translation_share * static.translations_VV
    return (static.canonical_VV @ expansion_VV @ diags_array(np.sqrt(idf_V))).toarray()


def strongest_of_each_term(static, weights_VV, texts):
    """What a SPLADE model with that table gives: for each term the largest weight over the pieces of the text."""
    rows = [static.tokenizer.encode(text, add_special_tokens=False).ids for text in texts]
    return np.stack([weights_VV[row].max(axis=0) for row in rows])


def cosines(one_BV, other_BV):
    lengths = np.linalg.norm(one_BV, axis=1) * np.linalg.norm(other_BV, axis=1)
    return (one_BV * other_BV).sum(axis=1) / np.maximum(lengths, 1e-9)


def test_a_lexical_start_says_what_the_static_table_says(static, lexical):
    found = lexical.encode_sparse(TEXTS).toarray()
    expected = strongest_of_each_term(static, table(static), TEXTS)
    assert cosines(found, expected).min() > 0.9


def test_before_its_first_step_a_word_lights_itself_and_its_translation(static, lexical):
    terms = NeuralEncoder(lexical).terms
    for row, pair in zip(lexical.encode_sparse([ko for ko, _ in WORDS]), WORDS, strict=True):
        heaviest = [terms[index] for index in row.indices[np.argsort(-row.data)]][:3]
        assert set(pair) <= set(heaviest), (pair, heaviest)


def test_layers_of_a_lexical_start_add_nothing(static, lexical):
    deeper = start(static, "student.layers=3", "student.intermediate_size=64")
    np.testing.assert_array_equal(deeper.encode_sparse(TEXTS).toarray(), lexical.encode_sparse(TEXTS).toarray())
    assert torch.equal(deeper[0].model.get_output_embeddings().weight, lexical[0].model.get_output_embeddings().weight)


def test_but_they_learn_from_the_first_step(static):
    student = start(static).train()
    student(dict(student.preprocess(TEXTS[:4])))["signed_maxima"].sum().backward()
    moved = {
        name for name, value in student.named_parameters() if value.grad is not None and value.grad.abs().sum() > 0
    }
    assert {name.rsplit(".", 2)[1] for name in moved if ".layers." in name} >= {"Wo"}


def test_the_same_seed_gives_the_same_student_and_another_seed_another(static, lexical):
    again, other = start(static), start(static, seed=2)
    for name, value in lexical.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name
    assert not np.array_equal(other.encode_sparse(TEXTS).toarray(), lexical.encode_sparse(TEXTS).toarray())


def masked_loss(student, texts):
    """Cross-entropy of guessing every third piece, which the unknown piece stands for."""
    tokenizer, model = student.tokenizer, student[0].model.eval()
    batch = tokenizer(texts, padding=True, return_tensors="pt")
    ids_BS, hidden_BS = batch["input_ids"], torch.zeros_like(batch["input_ids"], dtype=torch.bool)
    hidden_BS[:, 1::3] = batch["attention_mask"][:, 1::3].bool()
    with torch.no_grad():
        logits = model(input_ids=ids_BS.masked_fill(hidden_BS, 0), attention_mask=batch["attention_mask"]).logits
    return float(cross_entropy(logits[hidden_BS], ids_BS[hidden_BS]))


def test_the_warm_up_teaches_a_random_start_to_guess_masked_pieces(static, capfd):
    cold = start(static, "student.init=random", "student.hidden_size=32")
    warm = start(
        static,
        "student.init=random",
        "student.hidden_size=32",
        "student.warm_up={steps: 60, learning_rate: 0.01}",
    )
    assert masked_loss(warm, TEXTS) < masked_loss(cold, TEXTS) - 1
    assert warm.tokenizer.mask_token is None
    assert not warm[0].model.config.sparse_prediction
    assert capfd.readouterr().out == ""


def test_a_random_start_ties_embeddings_and_head(static):
    model = start(static, "student.init=random")[0].model
    assert model.get_output_embeddings().weight.data_ptr() == model.get_input_embeddings().weight.data_ptr()


def test_it_is_saved_as_stock_modules_that_give_the_same_vectors(lexical, tmp_path):
    lexical.save(str(tmp_path), create_model_card=False)
    stock = SparseEncoder(str(tmp_path), device="cpu")
    found = stock.encode(TEXTS, convert_to_sparse_tensor=False, show_progress_bar=False).float().numpy()
    np.testing.assert_allclose(found, lexical.encode_sparse(TEXTS).toarray(), atol=1e-5)
    assert stock.similarity_fn_name == "cosine"
    assert stock.max_seq_length == 16


@pytest.mark.slow
def test_it_gives_the_same_vectors_where_soju_cannot_be_imported(lexical, tmp_path):
    lexical.save(str(tmp_path), create_model_card=False)
    expected = lexical.encode_sparse(TEXTS).toarray()
    np.testing.assert_allclose(encode_without_soju(tmp_path, TEXTS), expected, atol=1e-4)


def test_text_beyond_the_limit_and_text_without_a_known_piece_are_no_accidents(lexical):
    vectors = lexical.encode_sparse(["백신 " * 100, "", "?!"])
    assert vectors.shape[0] == 3
    assert vectors[[0]].nnz > 0
    assert np.isfinite(vectors.data).all()


def test_terms_of_a_text_are_those_the_static_encoder_counts(static, lexical):
    vocabulary = lexicon_vocabulary(lexical.tokenizer, static)
    for text, found in zip(TEXTS, vocabulary.terms(TEXTS), strict=True):
        assert set(found) <= set(static.encode_documents([text]).indices.tolist()), text


@pytest.mark.slow
def test_a_lexical_start_of_the_packaged_model_keeps_its_table():
    static = StaticEncoder.load(model_folder(PACKAGED_MODEL))
    student = start(static, "student.hidden_size=384", "student.heads=6")
    texts = ["인공지능이 병을 진단할 수 있나요?", "심장 혈관", "how do vaccines protect people", "green tea"]
    found = student.encode_sparse(texts).toarray()
    size = len(static.pieces)
    idf_V = idf(np.zeros(size, np.int64), 0, prior_documents=10_000, prior_share_V=static.document_share_V)
    expansion_VV = eye_array(size, format="csr") + 0.7 * static.translations_VV
    weights_VV = (static.canonical_VV @ expansion_VV @ diags_array(np.sqrt(idf_V))).tocsr()
    rows = [static.tokenizer.encode(text, add_special_tokens=False).ids for text in texts]
    expected = np.stack([weights_VV[row].toarray().max(axis=0) for row in rows])
    assert cosines(found, expected).min() > 0.8

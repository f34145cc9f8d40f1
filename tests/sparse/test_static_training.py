import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from fixtures.small_bilingual import PAIRS, TERMS, train_small
from soju.core.language import language_of
from soju.sparse.static.training import TrainingLog


@pytest.fixture(scope="module")
def log():
    return TrainingLog()


@pytest.fixture(scope="module")
def encoder(log):
    return train_small(log=log)


def weights(encoder, text, *, documents=False):
    encode = encoder.encode_documents if documents else encoder.encode_queries
    vector = encode([text]).tocoo()
    return {encoder.terms[term]: float(weight) for term, weight in zip(vector.coords[1], vector.data, strict=True)}


def translations(encoder, text):
    """Terms of the other language a query is expanded with, heaviest first."""
    language = language_of(text)
    found = {term: weight for term, weight in weights(encoder, text).items() if language_of(term) != language}
    return sorted(found, key=lambda term: -found[term])


WORDS = [
    ("백신", "vaccine"),
    ("의사", "doctor"),
    ("책", "book"),
    ("학생", "student"),
    ("학교", "school"),
    ("바다", "sea"),
]


@pytest.mark.parametrize(("korean", "english"), WORDS)
def test_a_word_is_expanded_first_with_its_translation_in_both_directions(encoder, korean, english):
    assert translations(encoder, korean)[0] == english
    assert translations(encoder, english)[0] == korean


def test_inflected_forms_ask_for_the_same_terms(encoder):
    assert weights(encoder, "백신을") == weights(encoder, "백신")
    assert weights(encoder, "VACCINES") == weights(encoder, "vaccine")


@pytest.mark.parametrize(("korean", "english"), [("양자", "quantum"), ("추천 시스템", "recommender system")])
def test_words_that_only_the_term_list_has_are_translated(encoder, korean, english):
    assert set(english.split()) <= set(translations(encoder, korean))
    assert set(korean.split()) <= set(translations(encoder, english))


def test_without_the_term_list_its_words_are_unknown():
    encoder = train_small(terms=[])
    assert "quantum" not in encoder.terms
    assert translations(encoder, "학교")[0] == "school"


def test_the_own_terms_of_a_query_weigh_at_least_as_much_as_any_translation(encoder):
    for korean, english in WORDS:
        found = weights(encoder, korean)
        assert found[korean] >= found[english] > 0


def test_a_synonym_of_the_term_list_joins_the_query(encoder):
    assert 0 < weights(encoder, "책")["도서"] < weights(encoder, "책")["책"]


def test_translation_weights_are_between_nothing_and_one_and_no_term_translates_itself(encoder):
    table = encoder.translations_VV
    assert table.data.min() > 0
    assert table.data.max() <= 1
    assert not table.diagonal().any()


def test_documents_hold_only_their_own_terms(encoder):
    assert set(weights(encoder, "백신이 부족하다", documents=True)) == {"백신", "부족"}
    assert translations(encoder, "") == []


def test_document_shares_are_those_of_the_pairs(encoder):
    share = dict(zip(encoder.terms, encoder.document_share_V.tolist(), strict=True))
    assert share["백신"] == pytest.approx(3 / 12)
    assert share["vaccine"] == pytest.approx(3 / 12)
    assert share["양자"] == 0
    assert max(share.values()) <= 1


def test_the_log_counts_what_was_read_and_times_each_step(encoder, log):
    assert (log.counts["pairs"], log.counts["terms"]) == (len(PAIRS), len(TERMS))
    assert log.counts["pieces"] == len(encoder.terms)
    assert log.counts["translation_weights"] == encoder.translations_VV.nnz
    assert {"analyse", "tokenizer", "alignment", "expansion"} <= set(log.seconds)


def test_the_likelihood_of_maximum_likelihood_training_never_falls():
    log = TrainingLog()
    train_small(log=log, iterations=12, prior=0)
    for values in log.log_likelihood.values():
        assert len(values) == 12
        assert (np.diff(values) >= -1e-6).all()


def test_the_likelihood_does_not_fall_with_the_default_prior(encoder, log):
    for values in log.log_likelihood.values():
        assert (np.diff(values) >= -1e-6).all()


def saved(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_the_same_rows_give_byte_identical_files(encoder, tmp_path):
    encoder.save(tmp_path / "first")
    train_small().save(tmp_path / "second")
    assert saved(tmp_path / "first") == saved(tmp_path / "second")


@pytest.mark.parametrize("threads", [1, 2])
def test_other_processes_with_any_number_of_threads_give_the_same_files(encoder, tmp_path, threads):
    train = f"train_small(workers={threads}).save(Path('there'))"
    code = f"from pathlib import Path; from fixtures.small_bilingual import train_small; {train}"
    names = ("OMP_NUM_THREADS", "NUMBA_NUM_THREADS", "OPENBLAS_NUM_THREADS", "RAYON_NUM_THREADS")
    environment = {
        **os.environ,
        **dict.fromkeys(names, str(threads)),
        "PYTHONHASHSEED": str(threads),
        "PYTHONPATH": str(Path(__file__).parents[1]),
    }
    subprocess.run([sys.executable, "-c", code], env=environment, cwd=tmp_path, check=True)
    encoder.save(tmp_path / "here")
    assert saved(tmp_path / "here") == saved(tmp_path / "there")

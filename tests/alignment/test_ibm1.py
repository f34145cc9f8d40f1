from collections import defaultdict

import numpy as np
import pytest
from bitexts import bitext_of, random_bitext
from scipy.special import digamma

from soju.alignment.ibm1 import normalise_row, train_ibm1

HOUSE = [("das Haus", "the house"), ("das Buch", "the book"), ("ein Buch", "a book")]


def loop_ibm1(bitext, iterations):
    """Model 1 as the textbook writes it: t[f, e] in dictionaries."""
    table = defaultdict(lambda: 1.0 / bitext.target_size)
    for _ in range(iterations):
        counts, totals = defaultdict(float), defaultdict(float)
        for s in range(len(bitext)):
            sources = bitext.source_N[bitext.source_offsets[s] : bitext.source_offsets[s + 1]].tolist()
            for e in bitext.target_M[bitext.target_offsets[s] : bitext.target_offsets[s + 1]].tolist():
                norm = sum(table[f, e] for f in sources)
                for f in sources:
                    counts[f, e] += bitext.weights_S[s] * table[f, e] / norm
                    totals[f] += bitext.weights_S[s] * table[f, e] / norm
        table = {(f, e): count / totals[f] for (f, e), count in counts.items()}
    return table


def as_dictionary(table):
    matrix = table.to_csr().tocoo()
    return dict(zip(zip(matrix.row.tolist(), matrix.col.tolist(), strict=True), matrix.data.tolist(), strict=True))


def assert_same_table(actual, expected):
    assert actual.keys() == expected.keys()
    np.testing.assert_allclose([actual[pair] for pair in expected], list(expected.values()), rtol=1e-5, atol=1e-7)


def test_one_iteration_counts_each_target_once_per_source():
    bitext, source, target = bitext_of(HOUSE)
    dense = train_ibm1(bitext, iterations=1).to_csr().toarray()
    # Uniform start: every token pair counts 1/3 (two words and NULL).
    # das: the 2/3, house 1/3, book 1/3. Haus: the 1/3, house 1/3. NULL: the 2/3, book 2/3, house 1/3, a 1/3.
    np.testing.assert_allclose(
        dense[source["das"], [target[e] for e in ("the", "house", "book")]], [1 / 2, 1 / 4, 1 / 4]
    )
    np.testing.assert_allclose(dense[source["Haus"], [target["the"], target["house"]]], [1 / 2, 1 / 2])
    np.testing.assert_allclose(
        dense[0, [target[e] for e in ("the", "house", "book", "a")]], [1 / 3, 1 / 6, 1 / 3, 1 / 6], rtol=1e-6
    )


def test_two_iterations_of_the_house_by_hand():
    bitext, source, target = bitext_of(HOUSE)
    dense = train_ibm1(bitext, iterations=2).to_csr().toarray()
    # Pair 1, "the": das 1/2, Haus 1/2, NULL 1/3 -> 3/8, 3/8, 1/4. "house": 1/4, 1/2, 1/6 -> 3/11, 6/11, 2/11.
    haus = np.array([3 / 8, 6 / 11])
    np.testing.assert_allclose(dense[source["Haus"], [target["the"], target["house"]]], haus / haus.sum(), rtol=1e-6)
    # Pair 2, "the": das 1/2, Buch 1/4, NULL 1/3 -> das 6/13. "book": das 1/4, Buch 1/2, NULL 1/3 -> das 3/13.
    das = np.array([3 / 8 + 6 / 13, 3 / 11, 3 / 13])
    np.testing.assert_allclose(
        dense[source["das"], [target[e] for e in ("the", "house", "book")]], das / das.sum(), rtol=1e-6
    )


def test_the_house_is_learnt():
    bitext, source, target = bitext_of(HOUSE)
    dense = train_ibm1(bitext, iterations=20).to_csr().toarray()
    for german, english in (("das", "the"), ("Haus", "house"), ("Buch", "book"), ("ein", "a")):
        assert dense[source[german]].argmax() == target[english]


@pytest.mark.parametrize("seed", range(5))
def test_equals_the_textbook_loop(seed):
    bitext = random_bitext(pairs=40, source_words=12, target_words=9, longest=7, seed=seed)
    assert_same_table(as_dictionary(train_ibm1(bitext, iterations=4)), loop_ibm1(bitext, 4))


def test_equals_nltk():
    nltk = pytest.importorskip("nltk.translate", reason="pip install nltk")
    bitext, source, target = bitext_of(HOUSE)
    # nltk names the sides the other way: `words` are generated from `mots`.
    pairs = [nltk.AlignedSent(english.split(), german.split()) for german, english in HOUSE]
    theirs = nltk.IBMModel1(pairs, 5).translation_table
    dense = train_ibm1(bitext, iterations=5).to_csr().toarray()
    for english, e in target.items():
        np.testing.assert_allclose(dense[0, e], theirs[english][None], rtol=1e-5)
        for german, f in source.items():
            if dense[f, e] > 0:
                np.testing.assert_allclose(dense[f, e], theirs[english][german], rtol=1e-5)


def test_a_pair_of_weight_two_counts_as_the_pair_twice():
    weighted, *_ = bitext_of(HOUSE, [1.0, 2.0, 1.0])
    twice, *_ = bitext_of([*HOUSE[:2], *HOUSE[1:]])
    np.testing.assert_allclose(
        train_ibm1(weighted, iterations=3).to_csr().toarray(),
        train_ibm1(twice, iterations=3).to_csr().toarray(),
        rtol=1e-6,
    )


def test_log_likelihood_never_falls():
    seen = []
    bitext = random_bitext(pairs=60, source_words=15, target_words=15, longest=8, seed=1)
    train_ibm1(bitext, iterations=15, on_iteration=lambda iteration, value: seen.append((iteration, value)))
    assert [iteration for iteration, _ in seen] == list(range(1, 16))
    assert np.diff([value for _, value in seen]).min() > -1e-6


def test_log_likelihood_starts_at_the_uniform_table():
    seen = []
    bitext, *_ = bitext_of(HOUSE)
    train_ibm1(bitext, iterations=1, on_iteration=lambda _, value: seen.append(value))
    assert seen == [pytest.approx(-np.log(bitext.target_size))]


def test_rows_sum_to_one_and_targets_ascend():
    bitext = random_bitext(pairs=60, source_words=15, target_words=15, longest=8, seed=2)
    table = train_ibm1(bitext, iterations=3).to_csr()
    np.testing.assert_allclose(table.sum(axis=1), 1.0, rtol=1e-5)
    assert table.has_canonical_format


@pytest.mark.parametrize("prior", [0.0, 0.01])
def test_an_unused_source_word_has_an_empty_row(prior):
    bitext, *_ = bitext_of(HOUSE)
    bitext = type(bitext)(**{name: getattr(bitext, name) for name in bitext.__slots__} | {"source_size": 9})
    table = train_ibm1(bitext, iterations=2, prior=prior).to_csr()
    assert table.shape == (9, bitext.target_size)
    assert table[[5, 6, 7, 8]].nnz == 0


def test_the_prior_is_the_variational_estimate():
    counts = np.array([3.0, 0.25, 0.0], np.float32)
    expected = np.exp(digamma(counts + 0.1) - digamma(3.25 + 0.3))
    normalise_row(counts, 0.1)
    np.testing.assert_allclose(counts, expected, rtol=1e-5)


def test_a_prior_takes_from_rare_companions():
    bitext, source, target = bitext_of([*HOUSE, ("das Haus", "the house")])
    plain, with_prior = (train_ibm1(bitext, iterations=5, prior=prior).to_csr().toarray() for prior in (0.0, 0.01))
    assert with_prior[source["Haus"], target["the"]] < plain[source["Haus"], target["the"]]
    assert with_prior.sum(axis=1).max() <= 1.0


def test_a_tiny_prior_on_long_sentences_stays_finite():
    bitext = random_bitext(pairs=30, source_words=400, target_words=400, longest=200, seed=3)
    seen = []
    table = train_ibm1(bitext, iterations=4, prior=1e-4, on_iteration=lambda _, value: seen.append(value))
    assert np.isfinite(table.probabilities_K).all()
    assert np.isfinite(seen).all()


def test_equal_input_gives_equal_bits():
    bitext = random_bitext(pairs=200, source_words=30, target_words=30, longest=9, seed=4)
    first, second = (train_ibm1(bitext, iterations=4, prior=0.01) for _ in range(2))
    assert first.probabilities_K.tobytes() == second.probabilities_K.tobytes()


@pytest.mark.parametrize("settings", [{"iterations": 0}, {"prior": -0.1}, {"prior": float("nan")}])
def test_unusable_settings_are_refused(settings):
    bitext, *_ = bitext_of(HOUSE)
    with pytest.raises(ValueError, match="must be >="):
        train_ibm1(bitext, **settings)

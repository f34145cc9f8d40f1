"""Small bitexts for the tests."""

import numpy as np

from soju.alignment.bitext import make_bitext


def bitext_of(pairs, weights=None):
    """Number the words of ``(source, target)`` sentences; returns the bitext and the ids of both sides."""
    source_ids, target_ids = {}, {}
    rows = [
        (
            np.array([source_ids.setdefault(word, len(source_ids) + 1) for word in source.split()], np.int32),
            np.array([target_ids.setdefault(word, len(target_ids) + 1) for word in target.split()], np.int32),
        )
        for source, target in pairs
    ]
    weights = [1.0] * len(rows) if weights is None else weights
    triples = [(source, target, weight) for (source, target), weight in zip(rows, weights, strict=True)]
    bitext = make_bitext(triples, source_size=len(source_ids) + 1, target_size=len(target_ids) + 1)
    return bitext, source_ids, target_ids


def random_bitext(*, pairs, source_words, target_words, longest, seed):
    """Random sentences with random weights; repeated words and repeated sentences occur."""
    random = np.random.default_rng(seed)
    triples = [
        (
            random.integers(1, source_words + 1, random.integers(1, longest + 1)).astype(np.int32),
            random.integers(1, target_words + 1, random.integers(1, longest + 1)).astype(np.int32),
            float(random.integers(1, 4)),
        )
        for _ in range(pairs)
    ]
    return make_bitext(triples, source_size=source_words + 1, target_size=target_words + 1)

"""Which English tokens does a new Korean token stand for? Learned from sentence pairs by word alignment.

Shape letters: N = new tokens, V = old tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.sparse import csr_array

from soju.alignment.bitext import make_bitext
from soju.alignment.expansion import prune_by_mass
from soju.alignment.hmm import train_hmm
from soju.alignment.ibm1 import train_ibm1
from soju.alignment.symmetrise import geometric_mean
from soju.data.records import PairRow
from soju.embedding.expansion.byte_bpe import ByteBpe
from soju.embedding.expansion.vocabulary_expansion import Expansion

IBM1_ITERATIONS, HMM_ITERATIONS, PRIOR = 5, 3, 0.01
MASS, MOST = 0.9, 16
"""Of a token's translations, the most likely ones are kept until they hold this share; and how many at most."""


def token_translations(pairs: Sequence[PairRow], base: ByteBpe, expanded: ByteBpe, expansion: Expansion) -> csr_array:
    """Align the new tokens of Korean sentences with the old tokens of their English sides.

    Args:
        pairs: Sentence pairs.
        base: The base's tokenizer, for the English.
        expanded: The expanded one, for the Korean.
        expansion: What is new in it.

    Returns:
        ``(N, V)`` float32: how likely both directions of the aligner hold an old token for the translation of a new
        one. Rows sum to 1, or to 0 for a token without a translation.

    Raises:
        UserError: If no pair holds tokens on both sides.
    """
    korean, english = (expanded.encode([pair.ko for pair in pairs]), base.encode([pair.en for pair in pairs]))
    rows = ((np.asarray(ko) + 1, np.asarray(en) + 1, 1.0) for ko, en in zip(korean, english, strict=True))
    bitext = make_bitext(rows, source_size=expanded.size + 1, target_size=base.size + 1)
    forward = train_ibm1(bitext, iterations=IBM1_ITERATIONS, prior=PRIOR)
    backward = train_ibm1(bitext.reversed(), iterations=IBM1_ITERATIONS, prior=PRIOR)
    forward, backward = train_hmm(bitext, forward, backward, iterations=HMM_ITERATIONS)
    both = geometric_mean(forward.to_csr(), backward.to_csr())
    new = csr_array(both[expansion.first_id + 1 : expansion.size + 1, 1:])
    kept = prune_by_mass(new, mass=MASS, max_terms=MOST)
    total_N = kept.sum(axis=1)
    return csr_array(kept / np.where(total_N > 0, total_N, 1)[:, None])

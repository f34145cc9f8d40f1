"""Which English tokens does a new Korean token stand for? Learned from sentence pairs by word alignment.

Shape letters: N = new tokens, V = old tokens.

Where do an expansion's new rows start, and where does their donor come from? Shape letters as in embedding_init.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from scipy.sparse import csr_array
from torch import Tensor

from soju.alignment.bitext import make_bitext
from soju.alignment.hmm import train_hmm
from soju.alignment.ibm1 import train_ibm1
from soju.alignment.tables import geometric_mean, prune_by_mass
from soju.core.errors import UserError
from soju.data.rows import PairRow
from soju.embedding.expansion.byte_bpe import ByteBpe, is_spelling, token_bytes
from soju.embedding.expansion.initialise import (
    INITIALISERS,
    NEED_DONOR,
    NEED_PAIRS,
    DonorVectors,
    cooccurrence_vectors,
    initialise,
)
from soju.embedding.expansion.merges import Expansion

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


EMBEDDING_NAMES = ("model.embed_tokens.weight", "embed_tokens.weight", "transformer.wte.weight", "wte.weight")


def refuse_initialiser(name: str, donor: ByteBpe, *, with_corpus: bool, with_pairs: bool) -> None:
    """Check, before anything is computed, that an initialiser exists and has what it needs (`UserError`)."""
    if name not in INITIALISERS:
        raise UserError(f"{name}: no initialiser; choose one of {', '.join(INITIALISERS)}")
    if name in NEED_DONOR and _embedding_file(donor) is None and not with_corpus:
        raise UserError(
            f"{name} needs vectors of the donor's tokens, and {donor.name} is a tokenizer without a model; give "
            f"--corpus, from which they are made, or --init mean"
        )
    if name in NEED_PAIRS and not with_pairs:
        raise UserError(f"{name} learns from sentence pairs which tokens translate which; give --pairs, or --init mean")


def new_rows(
    old_VD: Tensor,
    expansion: Expansion,
    method: str,
    *,
    base: ByteBpe,
    expanded: ByteBpe,
    donor: ByteBpe,
    corpus: Sequence[str] = (),
    pairs: Sequence[PairRow] = (),
    seed: int = 0,
) -> Tensor:
    """Make the rows of the new tokens.

    Args:
        old_VD: The base's embedding.
        expansion: The new tokens.
        method: One of `INITIALISERS`. ``omp`` and ``focus`` take the vectors of the donor's model, or without one
            co-occurrence vectors of the corpus in the expanded vocabulary.
        base: Its tokenizer.
        expanded: The expanded tokenizer.
        donor: The donor's tokenizer, in the folder of its model if there is one.
        corpus: Texts.
        pairs: Sentence pairs, for ``aligned``.
        seed: Of ``noise`` and of the co-occurrence vectors.

    Returns:
        ``(N, D)`` float32.
    """
    vectors = None
    if method in NEED_DONOR:
        vectors = donor_vectors(expansion, base, expanded, donor=donor, corpus=corpus, seed=seed)
    translations = token_translations(pairs, base, expanded, expansion) if method in NEED_PAIRS else None
    return initialise(
        old_VD,
        expansion.decompositions,
        method,  # type: ignore[arg-type]
        donor=vectors,
        translations=translations,
        seed=seed,
    )


def donor_vectors(
    expansion: Expansion,
    base: ByteBpe,
    expanded: ByteBpe,
    *,
    donor: ByteBpe | None = None,
    corpus: Sequence[str] = (),
    seed: int = 0,
) -> DonorVectors:
    """Match the new tokens, and the old ones as anchors, with vectors of the donor's model, or of a corpus.

    Args:
        expansion: The new tokens.
        base: The base's tokenizer.
        expanded: The expanded tokenizer.
        donor: The donor's tokenizer, in the folder of its model if there is one.
        corpus: Texts, whose co-occurrence vectors take the place of a model.
        seed: Of these.

    Returns:
        Vectors of new tokens and of anchors.
    """
    read = None if donor is None else _donor_embedding(donor)
    vectors_TF = _corpus_vectors(expanded, corpus, seed) if read is None else read
    return DonorVectors.match(
        vectors_TF,
        _bytes_by_id(expanded if donor is None or read is None else donor),
        base_tokens=_bytes_by_id(base),
        new_tokens=[token_bytes(token) for token in expansion.tokens],
    )


def _corpus_vectors(expanded: ByteBpe, corpus: Sequence[str], seed: int) -> Tensor:
    return torch.from_numpy(cooccurrence_vectors(expanded.encode(corpus), expanded.size, seed=seed))


def _bytes_by_id(tokenizer: ByteBpe) -> list[bytes | None]:
    found: list[bytes | None] = [None] * tokenizer.size
    for token, number in tokenizer.vocabulary.items():
        if token not in tokenizer.added_tokens and is_spelling(token):
            found[number] = token_bytes(token)
    return found


def _embedding_file(donor: ByteBpe) -> tuple[Path, str] | None:
    """Return the safetensors file that holds the embedding of the donor's model and the tensor's name."""
    from safetensors import safe_open

    if donor.folder is None:
        return None
    index, file = donor.folder / "model.safetensors.index.json", donor.folder / "model.safetensors"
    with _told_as_user_error(donor):
        if index.is_file():
            places = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            return next(((donor.folder / places[name], name) for name in EMBEDDING_NAMES if name in places), None)
        if not file.is_file():
            return None
        with safe_open(file, "pt") as tensors:
            names = set(tensors.keys())
    return next(((file, name) for name in EMBEDDING_NAMES if name in names), None)


def _donor_embedding(donor: ByteBpe) -> Tensor | None:
    from safetensors import safe_open

    place = _embedding_file(donor)
    if place is None:
        return None
    with _told_as_user_error(donor), safe_open(place[0], "pt") as tensors:
        return tensors.get_tensor(place[1])


@contextmanager
def _told_as_user_error(donor: ByteBpe) -> Iterator[None]:
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise UserError(
            f"{donor.name}: the weights beside its tokenizer cannot be read ({error}); fetch them again, or take them "
            f"away to use the tokenizer alone"
        ) from None

"""What would OpenSearch refuse, fold or cut off? Names, ids and weights looked at before anything is sent."""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Sequence

import numpy as np

from soju.core.errors import UserError
from soju.search.opensearch import MAX_ID_BYTES, MAX_SEISMIC_TERMS, OpenSearchSettings
from soju.search.passages import CorpusFacts, Passage

MAX_TERM_BYTES = 32_766
"""Longest term of a Lucene index (``IndexWriter.MAX_TERM_LENGTH``)."""
SMALLEST_WEIGHT = float(np.finfo(np.float32).tiny)
"""Smallest weight a Lucene ``FeatureField`` takes (``Float.MIN_NORMAL``)."""


def lint_name(name: str) -> str | None:
    """Return what is wrong with the name of a token, or none."""
    if not name:
        return "is empty"
    if "." in name:
        return "holds a dot, which rank_features refuses"
    if any(unicodedata.category(character) in ("Cc", "Cs") for character in name):
        return "holds a control character"
    if len(name.encode("utf-8", "surrogatepass")) > MAX_TERM_BYTES:
        return f"is longer than {MAX_TERM_BYTES:,} bytes"
    return None


def lint_names(names: Sequence[str]) -> list[str]:
    """Return one sentence for every bad name and every name that is given twice."""
    faults = [f"token {at}: {name[:40]!r} {fault}" for at, name in enumerate(names) if (fault := lint_name(name))]
    counts = Counter(names)
    return faults + [f"token {name[:40]!r} is given {count} times" for name, count in counts.items() if count > 1]


def lint_settings(settings: OpenSearchSettings, facts: CorpusFacts) -> list[str]:
    """Return what of the vectors the field would fold or cut off."""
    if settings.kind != "sparse_vector":
        return []
    faults = []
    if facts.terms > MAX_SEISMIC_TERMS:
        faults.append(
            f"the vocabulary has {facts.terms:,} terms and sparse_vector folds ids above {MAX_SEISMIC_TERMS - 1:,} "
            "onto lower ones; trim the model before training (soju trim), or use rank_features"
        )
    ceiling = settings.seismic.ceiling_ingest
    if ceiling is not None and ceiling < facts.ceiling:
        faults.append(
            f"seismic.ceiling_ingest is {ceiling:g} but weights reach {facts.ceiling:.6g}, which would be cut off; "
            "leave it out to take the largest weight of the corpus"
        )
    return faults


def lint_passage(passage: Passage) -> str | None:
    """Return why the engine would refuse a passage, or none."""
    if (length := len(passage.id.encode("utf-8", "surrogatepass"))) > MAX_ID_BYTES:
        return f"the id has {length:,} bytes, more than {MAX_ID_BYTES}"
    weights = passage.weights_T
    if len(weights) and not (np.isfinite(weights) & (weights >= SMALLEST_WEIGHT)).all():
        return "a weight is not a positive normal number"
    return None


def refuse(faults: Sequence[str], *, shown: int = 10) -> None:
    """Raise one error that lists the first faults.

    Args:
        faults: Sentences; none is fine.
        shown: How many to list.

    Raises:
        UserError: If there is any.
    """
    if faults:
        more = f"\n... and {len(faults) - shown:,} more" if len(faults) > shown else ""
        raise UserError("\n".join(faults[:shown]) + more)

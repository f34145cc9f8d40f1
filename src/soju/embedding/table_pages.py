"""Pages of the report about rows and vectors: nearest neighbours of new tokens, lengths, how far things have turned.

Shape letters: V = rows of the embedding, D = dimensions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import safe_open

from soju.core.errors import UserError
from soju.embedding.adapters import load_adapted
from soju.embedding.expansion.byte_bpe import ByteBpe
from soju.embedding.expansion.byte_level import token_text
from soju.embedding.expansion.vocabulary_expansion import EXPANSION_FILE, Expansion
from soju.embedding.neighbours import Drift, drift, nearest_neighbours, norm_statistics
from soju.embedding.reading import EmbeddingData
from soju.embedding.stages import Accepted

LOOKED_AT = 8
"""New tokens whose neighbours are shown."""
SENTENCES = 200
"""Texts of each language whose vectors are compared."""
EMBEDDING = "embed_tokens.weight"
"""How the row table's name ends in a model's file."""


def table_pages(
    accepted: Sequence[Accepted], data: EmbeddingData, names: Mapping[str, str]
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Describe what rows and vectors became.

    Args:
        accepted: The base and every model that was accepted.
        data: Texts whose vectors are compared.
        names: What tables call the models.

    Returns:
        Figures, and neighbours in the form of searches.
    """
    base, last = accepted[0], accepted[-1]
    if base is last:
        return [], []
    figures = [_vector_drift(base, last, data, names)]
    expanded = [model for model in accepted if (model.folder / EXPANSION_FILE).is_file()]
    if not expanded:
        return figures, []
    first = expanded[0]
    expansion = Expansion.load(first.folder)
    before_VD, after_VD = row_table(first.folder), row_table(last.folder)
    title = f"{names[first.name]} to {names[last.name]}"
    turned = drift(before_VD[expansion.first_id :], after_VD[expansion.first_id :])
    figures.append(_histogram("row-drift", f"New rows, {title}: how far they turned", {"new rows": turned}))
    figures.append(_norms(expanded, expansion.first_id, names))
    searches: list[dict[str, Any]] = []
    tokens = _readable(first.folder, len(before_VD))
    ids = looked_at(expansion)
    for model, table_VD in ((first, before_VD), (last, after_VD)) if first is not last else ((first, before_VD),):
        for found in nearest_neighbours(table_VD, tokens, ids, count=5):
            searches.append(
                {
                    "query": found.token,
                    "engine": f"rows nearest in {names[model.name]}",
                    "hits": [
                        {"rank": rank, "document_id": str(rank), "score": score, "passage": token}
                        for rank, (token, score) in enumerate(found.nearest, start=1)
                    ],
                }
            )
    return figures, sorted(searches, key=lambda search: tokens.index(search["query"]))


def row_table(folder: Path) -> NDArray[np.float32]:
    """Read the embedding of a model folder, ``(V, D)`` float32.

    Args:
        folder: Of a stage.

    Returns:
        The rows.

    Raises:
        UserError: If its files hold none.
    """
    for path in sorted(folder.glob("model*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - no mapping
                if name.endswith(EMBEDDING):
                    rows: NDArray[np.float32] = file.get_tensor(name).float().numpy()
                    return rows
    raise UserError(f"{folder}: no {EMBEDDING} in its weights; verify the folder")


def looked_at(expansion: Expansion) -> list[int]:
    """Return ids of new tokens to show: whole words of two or more syllables, spread over all."""
    words = [
        expansion.first_id + place
        for place, text in enumerate(expansion.texts)
        if text is not None and sum("가" <= letter <= "힣" for letter in text) >= 2
    ]
    if len(words) <= LOOKED_AT:
        return words
    return [words[place] for place in np.linspace(0, len(words) - 1, LOOKED_AT).round().astype(int)]


def _readable(folder: Path, rows: int) -> list[str]:
    bpe = ByteBpe.load(str(folder))
    names = {number: token for token, number in bpe.vocabulary.items()}
    names |= {number: token for token, number in bpe.added_tokens.items()}
    return [_text(names.get(number, ""), number) for number in range(rows)]


def _text(token: str, number: int) -> str:
    """Return how a token reads, with its id, as two parts of characters may read alike."""
    text = token_text(token)
    return f"{token if text is None else text} ({number})"


def _vector_drift(base: Accepted, last: Accepted, data: EmbeddingData, names: Mapping[str, str]) -> dict[str, Any]:
    sides = {
        "Korean": [pair.first for pair in data.watched_korean] or data.korean,
        "English": [pair.first for pair in data.watched_english] or data.english,
    }
    before, after = (
        load_adapted(model.folder, model_kwargs={"dtype": "float32"}, local_files_only=True).eval()
        for model in (base, last)
    )
    found = {
        side: drift(*(model.encode(texts[:SENTENCES], show_progress_bar=False) for model in (before, after)), bins=20)
        for side, texts in sides.items()
        if texts
    }
    title = f"Vectors of texts, {names[base.name]} to {names[last.name]}: how far they turned"
    return _histogram("vector-drift", title, found)


def _histogram(name: str, title: str, found: Mapping[str, Drift]) -> dict[str, Any]:
    return {
        "id": name,
        "title": title,
        "caption": "; ".join(
            f"{side}: mean cosine {one.mean:.4f}, lowest {one.lowest:.4f}, {one.unchanged:,} of {sum(one.counts):,} "
            "unchanged to the bit"
            for side, one in found.items()
        ),
        "kind": "line",
        "x_label": "cosine before and after",
        "y_label": "share",
        "series": [
            {
                "name": side,
                "x": [(low + high) / 2 for low, high in zip(one.edges, one.edges[1:], strict=False)],
                "y": [count / sum(one.counts) for count in one.counts],
            }
            for side, one in found.items()
        ],
    }


def _norms(models: Sequence[Accepted], first_id: int, names: Mapping[str, str]) -> dict[str, Any]:
    labels = [names[model.name] for model in models]
    sides = {"old rows": slice(0, first_id), "new rows": slice(first_id, None)}
    tables = [row_table(model.folder) for model in models]
    return {
        "id": "row-norms",
        "title": "Length of rows",
        "caption": "Mean over rows; the bars' ends are one standard deviation away.",
        "kind": "bar",
        "x_label": "model",
        "y_label": "mean norm",
        "series": [
            _norm_series(side, labels, [norm_statistics(table[rows]) for table in tables])
            for side, rows in sides.items()
        ],
    }


def _norm_series(side: str, labels: Sequence[str], found: Sequence[Any]) -> dict[str, Any]:
    return {
        "name": side,
        "x": list(labels),
        "y": [one.mean for one in found],
        "low": [one.mean - one.deviation for one in found],
        "high": [one.mean + one.deviation for one in found],
    }

"""What does a report or a model card of any mode show? Example searches, and what was trained on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from soju.core.run_directory import RunDirectory
from soju.data.records import Document
from soju.report.model_card import DataSource
from soju.sparse.config import CardSettings, Credit, EvaluationSettings
from soju.sparse.encoders import TermEncoder
from soju.sparse.indexing import index_documents, search_index
from soju.sparse.reading import EvaluationTexts, RunData


def example_searches(
    encoder: TermEncoder,
    test_sets: list[EvaluationTexts],
    settings: EvaluationSettings,
    run_dir: RunDirectory,
    model: Path,
) -> list[dict[str, Any]]:
    """Index the documents of the first direction of the first test set and answer the example queries."""
    if not test_sets:
        return []
    first = next(iter(test_sets[0].directions.values()))
    documents = (Document(f"{test_sets[0].name}-{key}", text) for key, text in first.documents.items())
    index = index_documents(run_dir.path / "index", documents, model, overwrite=True)
    return [search.model_dump(mode="json") for search in search_index(index, encoder, settings.examples, k=3)]


def data_sources(card: CardSettings, data: RunData) -> tuple[DataSource, ...]:
    """Return what was trained on with the credits of the configuration."""
    credits = {credit.source: credit for credit in card.credits}
    unknown = Credit(source="", licence="see its owner")
    return tuple(
        DataSource(name=name, rows=rows, licence=credit.licence, attribution=credit.attribution)
        for name, rows in data.training.source_rows.items()
        for credit in [credits.get(name, unknown)]
    )

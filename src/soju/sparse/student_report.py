"""What the report and the model card say of any neural student."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from soju.core.score import Score
from soju.report.model_card import Example, ModelCard, render_model_card
from soju.sparse.reading import RunData
from soju.sparse.scoring import metrics_of
from soju.sparse.showing import data_sources
from soju.sparse.student_config import NeuralConfig

_STOCK_USAGE = """from sentence_transformers import SparseEncoder

model = SparseEncoder("MODEL")
queries = model.encode_query(["심장 혈관이 막혔을 때 가슴 통증"])
documents = model.encode_document(["Blocked coronary arteries cause chest pain."])
print(model.similarity(queries, documents))"""


def student_card(config: NeuralConfig, data: RunData, scores: Sequence[Score], *, taught: bool) -> str:
    """Write the model's README; `taught` says whether the teacher took part."""
    teacher = config.teacher
    lesson = f" It was taught by {teacher.model or 'precomputed vectors'}." if teacher and taught else ""
    card = ModelCard(
        name=config.name,
        summary=(
            "A cross-lingual learned sparse encoder (SPLADE) for Korean and English: a text lights up its own terms "
            f"and their translations, so one inverted index answers in both languages.{lesson}"
        ),
        licence=config.card.licence,
        licence_name=config.card.licence_name,
        tags=("sparse-encoder", "splade", "cross-lingual", "korean"),
        pipeline_tag="feature-extraction",
        library_name="sentence-transformers",
        base_model=config.student.model if config.student.init == "pretrained" else None,
        examples=(
            Example(title="Encode with sentence-transformers", code=_STOCK_USAGE),
            Example(
                title="Search your own text",
                language="bash",
                code='soju index MODEL corpus.jsonl INDEX\nsoju search INDEX "질의"',
            ),
        ),
        scores=tuple(score for score in scores if score.name in metrics_of(config.evaluation)),
        data=data_sources(config.card, data),
        command=f"soju train {config.card.command or config.name}",
        seed=config.seed,
        limits=(
            f"Texts are cut after {config.student.max_length} tokens.",
            "It was measured on short texts; other domains may differ.",
        ),
    )
    return render_model_card(card)


def curves(rows: Sequence[Mapping[str, Any]], names: Mapping[str, str]) -> list[dict[str, Any]]:
    """Return a series for each key that rows hold numbers of, under the name given, over their steps."""
    found: list[dict[str, Any]] = []
    for key, name in names.items():
        points = {row["step"]: float(row[key]) for row in rows if isinstance(row.get(key), int | float)}
        if points:
            found.append({"name": name, "x": list(points), "y": list(points.values())})
    return found

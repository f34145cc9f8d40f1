"""What the report and the model card say of a training from term mappings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from soju.core.files import read_json_lines
from soju.core.score import Score
from soju.recipes.splade.reading import RunData
from soju.recipes.splade.recipe import data_sources
from soju.recipes.splade.scoring import METRICS
from soju.recipes.splade.terms_config import TermsConfig
from soju.report.model_card import Example, ModelCard, render_model_card

_PANELS = {
    "loss": "total loss",
    "loss_self": "self",
    "loss_korean": "Korean targets",
    "loss_english": "English targets",
    "loss_margin": "margin",
    "loss_distillation": "distillation",
    "loss_translation": "translation",
    "loss_flops": "FLOPS",
    "loss_active_terms": "active terms a text",
}
_VALIDATED = {
    "eval_activation.en@50": "activation, English",
    "eval_preservation.ko@50": "preservation, Korean",
    "eval_noise@50": "noise",
}
_STOCK_USAGE = """from sentence_transformers import SparseEncoder

model = SparseEncoder("MODEL")
queries = model.encode_query(["심장 혈관이 막혔을 때 가슴 통증"])
documents = model.encode_document(["Blocked coronary arteries cause chest pain."])
print(model.similarity(queries, documents))"""


def training_figures(run_folder: Path) -> list[dict[str, Any]]:
    """Describe the curves of ``history.jsonl`` and ``probes.jsonl``."""
    history = read_json_lines(run_folder / "history.jsonl")
    probes = read_json_lines(run_folder / "probes.jsonl")
    figures = [
        {
            "id": "training_curves",
            "title": "Training curves",
            "caption": "Raw, unweighted losses, each the mean since the row before; the total is weighted.",
            "kind": "grid",
            "x_label": "step",
            "series": [_series(history, key, name) for key, name in _PANELS.items() if _has(history, key)],
        },
        {
            "id": "validation",
            "title": "Development words, none of them trained on",
            "caption": "Shares of expected terms among the 50 heaviest, and of noise among all of them.",
            "kind": "line",
            "x_label": "step",
            "y_label": "share",
            "series": [_series(history, key, name) for key, name in _VALIDATED.items() if _has(history, key)],
        },
        {
            "id": "probes",
            "title": "The published probes",
            "caption": "For display: about 25 tokens in all. Nothing is chosen by them.",
            "kind": "line",
            "x_label": "step",
            "y_label": "share",
            "series": [
                _series(probes, key, key) for key in ("activation", "preservation", "noise") if _has(probes, key)
            ],
        },
    ]
    return [figure for figure in figures if figure["series"]]


def student_card(config: TermsConfig, data: RunData, scores: Sequence[Score]) -> str:
    """Write the model's README."""
    teacher = config.teacher
    taught = (
        f" It was taught by {teacher.model or 'precomputed vectors'}." if teacher and config.losses.distillation else ""
    )
    card = ModelCard(
        name=config.name,
        summary=(
            "A cross-lingual learned sparse encoder (SPLADE) for Korean and English: a text lights up its own terms "
            f"and their translations, so one inverted index answers in both languages.{taught}"
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
        scores=tuple(score for score in scores if score.name in METRICS),
        data=data_sources(config.card, data),
        command=f"soju train {config.card.command or config.name}",
        seed=config.seed,
        limits=(
            f"Texts are cut after {config.student.max_length} tokens.",
            "It was measured on short texts; other domains may differ.",
        ),
    )
    return render_model_card(card)


def _has(rows: Sequence[Mapping[str, Any]], key: str) -> bool:
    return any(isinstance(row.get(key), int | float) for row in rows)


def _series(rows: Sequence[Mapping[str, Any]], key: str, name: str) -> dict[str, Any]:
    points = {row["step"]: float(row[key]) for row in rows if isinstance(row.get(key), int | float)}
    return {"name": name, "x": list(points), "y": list(points.values())}

"""What the report shows of a training from triplets."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from soju.core.files import read_json_lines
from soju.sparse.student_report import curves
from soju.sparse.triplets.config import TripletsConfig
from soju.sparse.triplets.rows import TripletRows
from soju.training.judged_training import Trained

_LOSSES = {
    "loss": "total loss",
    "loss_infonce": "InfoNCE",
    "loss_self": "own terms",
    "loss_positive": "terms of the positive",
    "loss_margin": "triplet margin",
    "loss_distillation": "distillation",
    "loss_flops": "FLOPS",
    "loss_minimum": "minimum activation",
    "loss_effective_negatives": "effective negatives",
}
_SHARES = {
    "loss_share_infonce": "InfoNCE",
    "loss_share_self": "own terms",
    "loss_share_positive": "terms of the positive",
    "loss_share_margin": "triplet margin",
    "loss_share_distillation": "distillation",
    "loss_share_flops": "FLOPS",
    "loss_share_minimum": "minimum activation",
}
_SPARSITY = {
    "loss_active_query": "active terms of queries",
    "loss_active_document": "active terms of documents",
    "loss_flops_weight_query": "penalty weight, queries",
    "loss_flops_weight_document": "penalty weight, documents",
}
_VALIDATED = {"eval_mrr@10": "MRR@10", "eval_recall@1": "recall@1", "eval_recall@10": "recall@10"}


def training_figures(run_folder: Path, config: TripletsConfig) -> list[dict[str, Any]]:
    """Describe the curves of ``history.jsonl``."""
    history = read_json_lines(run_folder / "history.jsonl")
    ends = ", ".join(f"{stage.share:.0%} at τ {stage.temperature:g}" for stage in config.curriculum)
    figures: list[dict[str, Any]] = [
        {
            "id": "training_curves",
            "title": "Training curves",
            "caption": f"Raw, unweighted losses; the total is weighted. Stages of the curriculum: {ends}.",
            "kind": "grid",
            "x_label": "step",
            "series": curves(history, _LOSSES),
        },
        {
            "id": "loss_shares",
            "title": "What the total is made of",
            "caption": "Share of each weighted loss in the sum of their sizes.",
            "kind": "line",
            "x_label": "step",
            "y_label": "share",
            "series": curves(history, _SHARES),
        },
        {
            "id": "sparsity",
            "title": "Active terms and what holds them",
            "caption": _wanted(config),
            "kind": "grid",
            "x_label": "step",
            "series": curves(history, _SPARSITY),
        },
        {
            "id": "validation",
            "title": "Development queries, none of them trained on",
            "caption": "Each is searched among the texts of all development triplets.",
            "kind": "line",
            "x_label": "step",
            "y_label": "score",
            "series": curves(history, _VALIDATED),
        },
    ]
    return [figure for figure in figures if figure["series"]]


def in_words(rows: TripletRows, trained: Trained, config: TripletsConfig) -> list[str]:
    """Tell the training in plain words."""
    counts = rows.counts
    sentences = [
        f"{counts.kept:,} triplets of {counts.texts:,} different texts; {counts.without_terms + counts.banned:,} rows "
        f"were rejected. {len(config.curriculum)} stages."
    ]
    if trained.attempts > 1:
        sentences.append(f"Training was rolled back {trained.attempts - 1} times; rollbacks.jsonl says why.")
    return sentences


def _wanted(config: TripletsConfig) -> str:
    wanted = [
        f"{number:g} of a {side}"
        for side, number in (("query", config.sparsity.query_terms), ("document", config.sparsity.document_terms))
        if number is not None
    ]
    if not wanted:
        return "Nothing was asked for: the penalty's weight follows its schedule alone."
    return f"Asked for: {' and '.join(wanted)}; the weights of the penalty are steered towards it."

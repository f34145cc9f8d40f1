"""What the report shows of a training from term mappings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from soju.core.files import read_json_lines
from soju.sparse.student_report import curves

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
            "series": curves(history, _PANELS),
        },
        {
            "id": "validation",
            "title": "Development words, none of them trained on",
            "caption": "Shares of expected terms among the 50 heaviest, and of noise among all of them.",
            "kind": "line",
            "x_label": "step",
            "y_label": "share",
            "series": curves(history, _VALIDATED),
        },
        {
            "id": "probes",
            "title": "The published probes",
            "caption": "For display: about 25 tokens in all. Nothing is chosen by them.",
            "kind": "line",
            "x_label": "step",
            "y_label": "share",
            "series": curves(probes, {name: name for name in ("activation", "preservation", "noise")}),
        },
    ]
    return [figure for figure in figures if figure["series"]]

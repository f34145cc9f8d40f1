"""After training: measure base and stages side by side, write cards, tables, curves and the report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from soju.core.files import read_json_lines, write_json, write_manifest, write_text
from soju.core.run_directory import RunDirectory
from soju.core.score import Score
from soju.embedding.adapter_modules import SHIPPED
from soju.embedding.adapters import load_adapted
from soju.embedding.config import EmbeddingConfig, PretrainedBase
from soju.embedding.embedder import Subject
from soju.embedding.evaluation_data import EvaluationData
from soju.embedding.measuring import Measured, measure_models
from soju.embedding.reading import EmbeddingData
from soju.embedding.retention import COSINE, ENGLISH, KOREAN
from soju.embedding.stages import Accepted
from soju.embedding.table_pages import table_pages
from soju.report.model_card import DataSource, Example, ModelCard, render_model_card
from soju.report.run_report import write_report

SHORT = {"base": "BASE", "stage0": "S0", "stage1": "S1", "stage2": "S2", "stage3": "S3", "supervised": "SUP"}
"""What tables call the models of a run."""
_LOSSES = {
    "loss": "total loss",
    "loss_simcse": "SimCSE",
    "loss_hidden": "hidden states",
    "loss_pooled": "text vector",
    "loss_anchor": "anchoring",
    "loss_start": "distance to start",
    "loss_cosent": "CoSENT",
    "loss_cosine": "cosine",
    "loss_inference": "entailment",
    "loss_target": "teacher's vectors",
}
_WATCHED = {
    f"eval_{KOREAN}": "Korean pairs",
    f"eval_{ENGLISH}": "English pairs",
    f"eval_{COSINE}": "old and new English vectors",
}
_USAGE = """from sentence_transformers import SentenceTransformer

model = SentenceTransformer("MODEL"{code})
vectors = model.encode(["심장 혈관이 막혔을 때 가슴 통증", "Blocked coronary arteries cause chest pain."])
print(model.similarity(vectors, vectors))"""


def measure(
    accepted: Sequence[Accepted], config: EmbeddingConfig, evaluation: EvaluationData, run_dir: RunDirectory
) -> Measured:
    """Measure base and stages on all test sets, each against the base, and write down what was measured."""

    def load(folder: str) -> Any:
        return load_adapted(folder, model_kwargs={"dtype": config.evaluation.dtype}, local_files_only=True).eval()

    subjects = [Subject(SHORT[model.name], model.folder) for model in accepted]
    measured = measure_models(subjects, config.evaluation, data=evaluation, load=load)
    run_dir.write_scores(measured.scores)
    write_json(run_dir.path / "comparisons.json", [comparison.to_json() for comparison in measured.comparisons])
    return measured


def report(
    accepted: Sequence[Accepted],
    measured: Measured,
    config: EmbeddingConfig,
    data: EmbeddingData,
    run_dir: RunDirectory,
    *,
    failed: Exception | None = None,
) -> Path:
    """Write model cards, curves, what words and vectors became, and the report.

    Args:
        accepted: The base and every model that was accepted.
        measured: What `measure` returned.
        config: Settings of the run.
        data: What the run read.
        run_dir: The run folder.
        failed: Why the stage after the last accepted one was not; none when all were.

    Returns:
        The HTML report.
    """
    for folder in (run_dir.best, run_dir.final):
        write_text(folder / "README.md", card(config, data, measured.scores, folder))
        write_manifest(folder)
    figures, searches = table_pages(accepted, data, SHORT)
    write_json(run_dir.path / "figures.json", [*training_figures(run_dir.path), *figures])
    write_json(run_dir.path / "searches.json", searches)
    steps = [{"title": model.name, "text": _in_words(model)} for model in accepted]
    summary = [*_differences(accepted, measured)]
    if failed is not None:
        summary.append(f"The stage after {accepted[-1].name} was not accepted: {failed}.")
    write_json(run_dir.path / "story.json", {"title": config.name, "summary": summary, "steps": steps})
    return write_report(run_dir.path)


def training_figures(folder: Path) -> list[dict[str, Any]]:
    """Describe losses, and what the guard saw, of every training of the run."""
    figures: list[dict[str, Any]] = []
    for history in sorted((folder / "training").glob("*/history.jsonl")):
        name, rows = history.parent.name, read_json_lines(history)
        for kind, names, label in (("losses", _LOSSES, "loss"), ("watched", _WATCHED, "correlation or cosine")):
            if series := _series(rows, names):
                title = "losses" if kind == "losses" else "what the guard saw"
                figures.append(
                    {
                        "id": f"{name}-{kind}",
                        "title": f"{name}: {title}",
                        "caption": "Unweighted; means since the point before." if kind == "losses" else "",
                        "kind": "line",
                        "x_label": "optimiser step",
                        "y_label": label,
                        "series": series,
                    }
                )
    return figures


def _series(rows: Sequence[Mapping[str, Any]], names: Mapping[str, str]) -> list[dict[str, Any]]:
    found = []
    for key, name in names.items():
        points = {row["step"]: float(row[key]) for row in rows if isinstance(row.get(key), int | float)}
        if points:
            found.append({"name": name, "x": list(points), "y": list(points.values())})
    return found


def card(config: EmbeddingConfig, data: EmbeddingData, scores: Sequence[Score], folder: Path) -> str:
    """Write the model's README."""
    ships_code = (folder / SHIPPED).is_file()
    limits = ["English vectors were watched, other languages and code were not trained on and not measured."]
    if ships_code:
        limits.insert(
            0,
            f"Its adapters cannot be folded into plain weights: {SHIPPED} in this folder puts them in place, and "
            "sentence-transformers runs it only with trust_remote_code=True. Plain transformers leaves them out.",
        )
    return render_model_card(
        ModelCard(
            name=config.name,
            summary=(
                "A text embedding model with a Korean vocabulary: Korean texts take fewer tokens, English tokens "
                + ("are" if config.stage1.train_rows == "all" and 1 in config.stages else "and their rows are")
                + " those of the base."
            ),
            licence=config.card.licence,
            licence_name=config.card.licence_name,
            tags=("sentence-similarity", "feature-extraction", "korean"),
            pipeline_tag="sentence-similarity",
            library_name="sentence-transformers",
            base_model=config.base.model if isinstance(config.base, PretrainedBase) else None,
            examples=(
                Example(
                    title="Embed texts",
                    code=_USAGE.format(code=", trust_remote_code=True" if ships_code else ""),
                ),
            ),
            scores=tuple(score for score in scores if score.name not in ("speed", "pearson")),
            data=tuple(
                DataSource(name=name, rows=rows, licence="see its owner") for name, rows in data.source_rows.items()
            ),
            command=f"soju train {config.card.command or config.name}",
            seed=config.seed,
            limits=tuple(limits),
        )
    )


def _in_words(model: Accepted) -> str:
    looks = model.looks
    if "accepted" not in looks:
        return {"base": "The model as it was found or made.", "stage0": "The base with new Korean tokens."}[model.name]
    end, start, base = looks["accepted"], looks["start"], looks["base"]
    return (
        f"Accepted with {looks['checkpoint']}: watched Korean pairs {start[KOREAN]:.3f} to {end[KOREAN]:.3f}, English "
        f"pairs {end[ENGLISH]:.3f} ({base[ENGLISH]:.3f} untouched), cosine of old and new English vectors "
        f"{end[COSINE]:.4f}." + (f" {looks['adapters'].capitalize()}." if looks.get("adapters") else "")
    )


def _differences(accepted: Sequence[Accepted], measured: Measured) -> list[str]:
    last = SHORT[accepted[-1].name]
    sentences = []
    for score in measured.scores:
        if score.subject != last or score.name not in ("spearman", "tokens", "ndcg@10"):
            continue
        base = measured.score("BASE", score.test_set, score.name).value
        change = f"{score.value / base - 1:+.1%}" if score.name == "tokens" else f"{score.value - base:+.3f}"
        what = "tokens a text" if score.name == "tokens" else score.name
        digits = 2 if score.name == "tokens" else 3
        sentences.append(f"{score.test_set}: {score.value:.{digits}f} {what}, {base:.{digits}f} before ({change}).")
    return sentences

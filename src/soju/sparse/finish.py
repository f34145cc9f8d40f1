"""What a run leaves after training: scores, examples, figures of how it learned, the model card, the report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from soju.core.files import write_json, write_manifest, write_text
from soju.core.results import Score
from soju.core.run import Run
from soju.data.rows import Document
from soju.report import write_report
from soju.report.markdown import DataSource, Example, ModelCard, render_model_card
from soju.sparse.config import CardSettings, Credit, EvaluationSettings, NeuralConfig, StaticConfig, TeacherSettings
from soju.sparse.data import EvaluationTexts, RunData
from soju.sparse.evaluate import STUDENT, SUBJECT, Measured, metrics_of, write_query_scores
from soju.sparse.indexing import Index, expand, search_index
from soju.sparse.model import TermEncoder

if TYPE_CHECKING:
    from soju.sparse.losses import NamedLosses


UNTRAINED = "untrained student"
BEFORE = "student before"
"""Of a student that goes on from a model that was trained already."""

Figure = dict[str, Any]
"""A figure of the report, as `figures.json` keeps it."""


def write_measured(measured: Measured, run_dir: Run, *, figures: Sequence[Figure]) -> None:
    """Write scores, per-query scores, comparisons and figures; `figures` come before those that were measured."""
    run_dir.write_scores(measured.scores)
    write_query_scores(run_dir.folder, measured.per_query)
    write_json(run_dir.folder / "comparisons.json", [comparison.to_json() for comparison in measured.comparisons])
    write_json(run_dir.folder / "figures.json", [*figures, *measured.figures])


def write_examples(
    encoder: TermEncoder, data: RunData, config: StaticConfig | NeuralConfig, run_dir: Run, model: Path
) -> None:
    """Write what the probes expand to and what the example queries find; `model` is the encoder's folder."""
    expansions = expand(encoder, config.evaluation.probes)
    write_json(run_dir.folder / "expansions.json", [expansion.model_dump(mode="json") for expansion in expansions])
    searches = example_searches(encoder, data.evaluation, config.evaluation, run_dir, model)
    write_json(run_dir.folder / "searches.json", searches)


def example_searches(
    encoder: TermEncoder,
    test_sets: list[EvaluationTexts],
    settings: EvaluationSettings,
    run_dir: Run,
    model: Path,
) -> list[dict[str, Any]]:
    """Index the documents of the first direction of the first test set and answer the example queries."""
    if not test_sets:
        return []
    first = next(iter(test_sets[0].directions.values()))
    documents = (Document(f"{test_sets[0].name}-{key}", text) for key, text in first.documents.items())
    index = Index.build(documents, model, run_dir.folder / "index", overwrite=True).vectors
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


def loss_figures(history: Sequence[Mapping[str, Any]], losses: type[NamedLosses], *, caption: str) -> list[Figure]:
    """Return the curves of every loss and, where they were logged, their shares, with the labels of the rows."""
    labels = {row.name: row.label for row in losses.rows}
    panels = {
        "loss": "total loss",
        **{f"loss_{name}": label for name, label in (labels | dict(losses.watched)).items()},
    }
    shares = {f"loss_share_{name}": label for name, label in labels.items()}
    return [
        *figure("training_curves", "Training curves", caption, curves(history, panels)),
        *figure(
            "loss_shares",
            "What the total is made of",
            "Share of each weighted loss in the sum of their sizes.",
            curves(history, shares),
            y_label="share",
        ),
    ]


def figure(name: str, title: str, caption: str, series: list[dict[str, Any]], *, y_label: str = "") -> list[Figure]:
    """Describe one figure over the steps, or none without series: lines in one plot when `y_label` is given."""
    if not series:
        return []
    kind = {"kind": "line", "x_label": "step", "y_label": y_label} if y_label else {"kind": "grid", "x_label": "step"}
    return [{"id": name, "title": title, "caption": caption, **kind, "series": series}]


def curves(rows: Sequence[Mapping[str, Any]], names: Mapping[str, str]) -> list[dict[str, Any]]:
    """Return a series for each key that rows hold numbers of, under the name given, over their steps."""
    found: list[dict[str, Any]] = []
    for key, name in names.items():
        points = {row["step"]: float(row[key]) for row in rows if isinstance(row.get(key), int | float)}
        if points:
            found.append({"name": name, "x": list(points), "y": list(points.values())})
    return found


def report_student(
    student: TermEncoder,
    measured: Measured,
    data: RunData,
    config: NeuralConfig,
    run_dir: Run,
    *,
    teacher: TeacherSettings | None,
    summary: Sequence[str],
) -> None:
    """Write model cards, examples and the report of a neural student.

    `teacher` is the dense teacher that took part; `summary` tells the training in plain words, and recall is added.
    """
    for folder in (run_dir.best, run_dir.final):
        write_text(folder / "README.md", student_card(config, data, measured.scores, teacher=teacher))
        write_manifest(folder)
    write_examples(student, data, config, run_dir, run_dir.best)
    sentences = [*summary, *_recalls(measured)]
    write_json(run_dir.folder / "story.json", {"title": config.name, "summary": sentences, "steps": []})
    write_report(run_dir.folder)


_STOCK_USAGE = """from sentence_transformers import SparseEncoder

model = SparseEncoder("MODEL")
queries = model.encode_query(["심장 혈관이 막혔을 때 가슴 통증"])
documents = model.encode_document(["Blocked coronary arteries cause chest pain."])
print(model.similarity(queries, documents))"""


def student_card(
    config: NeuralConfig, data: RunData, scores: Sequence[Score], *, teacher: TeacherSettings | None
) -> str:
    """Write the model's README; `teacher` is the dense teacher that took part."""
    lesson = f" It was taught by {teacher.model or 'precomputed vectors'}." if teacher else ""
    card = ModelCard(
        name=config.name,
        summary=(
            "A cross-lingual learned sparse encoder (SPLADE) for Korean and English: a text activates its own terms "
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


def _recalls(measured: Measured) -> list[str]:
    recalls = [item for item in measured.scores if item.name == "recall@10"]
    sentences: list[str] = []
    for name in dict.fromkeys(item.test_set for item in recalls):
        found = {item.subject: item.value for item in recalls if item.test_set == name}
        others = ", ".join(
            f"{subject} {found[subject]:.3f}" for subject in (UNTRAINED, BEFORE, SUBJECT) if subject in found
        )
        sentences.append(f"Recall@10 on {name}: student {found[STUDENT]:.3f} ({others}).")
    return sentences

"""After training: measure base and stages on the same sets; write cards, curves, pages about rows, and the report.

Pages about rows show nearest neighbours of new tokens, lengths of rows, and how far rows and vectors have turned.

Shape letters: V = rows of the embedding, N = rows looked at, D = dimensions.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from safetensors import safe_open

from soju.core.errors import UserError
from soju.core.files import read_json_lines, write_json, write_manifest, write_text
from soju.core.results import Score
from soju.core.run import Run
from soju.embedding.adapter_modules import SHIPPED
from soju.embedding.adapters import load_adapted
from soju.embedding.config import EmbeddingConfig, PretrainedBase
from soju.embedding.data import EmbeddingData
from soju.embedding.embedder import Subject
from soju.embedding.evaluate import EvaluationData, Measured, measure_models
from soju.embedding.expansion.byte_bpe import ByteBpe, token_text
from soju.embedding.expansion.merges import EXPANSION_FILE, Expansion
from soju.embedding.losses import LABELS
from soju.embedding.retention import COSINE, ENGLISH, KOREAN
from soju.embedding.stages import Accepted
from soju.evaluation.similarity import cosines_of
from soju.report import write_report
from soju.report.markdown import DataSource, Example, ModelCard, render_model_card

ROWS = 8192
"""Of a table that are looked at in float64 at once."""


@dataclass(frozen=True, slots=True)
class Neighbours:
    """The rows nearest to one row, the nearest first."""

    token: str
    nearest: tuple[tuple[str, float], ...]
    """Token and cosine."""


@dataclass(frozen=True, slots=True)
class NormStatistics:
    """How long rows are, in the unit of the table."""

    rows: int
    mean: float
    deviation: float
    minimum: float
    median: float
    maximum: float


@dataclass(frozen=True, slots=True)
class Drift:
    """Cosines between rows before and after training, counted in equal bins."""

    edges: tuple[float, ...]
    """Ends of the bins, ascending, one more than there are bins."""
    counts: tuple[int, ...]
    mean: float
    lowest: float
    unchanged: int
    """Rows whose every number is the same as before."""


def nearest_neighbours(
    table_VD: ArrayLike, tokens: Sequence[str], ids: Sequence[int], *, count: int = 5
) -> list[Neighbours]:
    """Find the rows of the highest cosine with each of some rows.

    Args:
        table_VD: The embedding table, ``(V, D)``.
        tokens: How each row reads, V texts.
        ids: Rows to look at.
        count: Neighbours of each, without the row itself; rows of equal cosine by their id.

    Returns:
        One entry for each id, in their order.

    Raises:
        UserError: If an id is outside the table, or there are not V tokens.
    """
    table = np.asarray(table_VD, np.float32)
    if len(tokens) != len(table):
        raise UserError(f"{len(tokens):,} tokens for {len(table):,} rows; give one for each row")
    if outside := [number for number in ids if not 0 <= number < len(table)]:
        raise UserError(f"token {outside[0]}: the table has {len(table):,} rows; give ids below that")
    lengths_V = np.linalg.norm(table, axis=1)
    found = []
    for number in ids:
        products_V = table @ table[number]
        scale_V = lengths_V * lengths_V[number]
        cosines_V = np.divide(products_V, scale_V, out=np.zeros_like(products_V), where=scale_V > 0)
        cosines_V[number] = -np.inf
        wanted = min(count, len(table) - 1)
        best = np.lexsort((np.arange(len(table)), -cosines_V))[:wanted]
        found.append(Neighbours(tokens[number], tuple((tokens[row], float(cosines_V[row])) for row in best)))
    return found


def norm_statistics(table_ND: ArrayLike) -> NormStatistics:
    """Describe the lengths of rows, ``(N, D)`` with N >= 1; `UserError` when there is none."""
    table = np.asarray(table_ND)
    if table.ndim != 2 or not len(table):
        raise UserError(f"rows of shape {table.shape}; give an embedding table with at least one row")
    norms_N = np.concatenate([np.linalg.norm(table[rows].astype(np.float64), axis=1) for rows in _blocks(len(table))])
    return NormStatistics(
        rows=len(norms_N),
        mean=float(norms_N.mean()),
        deviation=float(norms_N.std()),
        minimum=float(norms_N.min()),
        median=float(np.median(norms_N)),
        maximum=float(norms_N.max()),
    )


def drift(before_ND: ArrayLike, after_ND: ArrayLike, *, bins: int = 20) -> Drift:
    """Count how far rows, or the vectors of texts, have turned.

    Args:
        before_ND: Rows before, ``(N, D)``, N >= 1.
        after_ND: The same rows after.
        bins: Number of equal bins between the lowest cosine and 1. When no row has turned, all are in the last bin
            of [0, 1].

    Returns:
        The histogram of cosines with their mean and lowest.

    Raises:
        UserError: If the shapes differ or there is no row.
    """
    before, after = np.asarray(before_ND), np.asarray(after_ND)
    if before.shape != after.shape or before.ndim != 2 or not len(before):
        raise UserError(f"rows of shape {before.shape} before and {after.shape} after; give the same rows of both")
    cosines_N = _row_cosines(before, after)
    lowest = float(cosines_N.min())
    # Beyond rounding nothing turned: bins of a width of 1e-16 would show noise.
    low = lowest if lowest < 1 - 1e-9 else 0.0
    counts, edges = np.histogram(np.clip(cosines_N, low, 1.0), bins=bins, range=(low, 1.0))
    return Drift(
        edges=tuple(float(edge) for edge in edges),
        counts=tuple(int(number) for number in counts),
        mean=float(cosines_N.mean()),
        lowest=lowest,
        unchanged=int(np.all(before == after, axis=1).sum()),
    )


def _row_cosines(before: NDArray[Any], after: NDArray[Any]) -> NDArray[np.float64]:
    cosines_N = np.concatenate([cosines_of(before[rows], after[rows]) for rows in _blocks(len(before))])
    cosines_N[np.all(before == after, axis=1)] = 1.0  # a zero row has no direction, yet it has not turned
    return np.minimum(cosines_N, 1.0)


def _blocks(count: int) -> Iterator[slice]:
    """Yield slices of few enough rows that a copy of them in float64 costs little memory compared with the table."""
    for start in range(0, count, ROWS):
        yield slice(start, start + ROWS)


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

    Returns figures, and neighbours in the form of searches.
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

    Raises `UserError` if its files hold none.
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


SHORT = {"base": "BASE", "stage0": "S0", "stage1": "S1", "stage2": "S2", "stage3": "S3", "supervised": "SUP"}
"""What tables call the models of a run."""
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
    accepted: Sequence[Accepted], config: EmbeddingConfig, evaluation: EvaluationData, run_dir: Run
) -> Measured:
    """Measure base and stages on all test sets, each against the base, and write down what was measured."""

    def load(folder: str) -> Any:
        return load_adapted(folder, model_kwargs={"dtype": config.evaluation.dtype}, local_files_only=True).eval()

    subjects = [Subject(SHORT[model.name], model.folder) for model in accepted]
    measured = measure_models(subjects, config.evaluation, data=evaluation, load=load)
    run_dir.write_scores(measured.scores)
    write_json(run_dir.folder / "comparisons.json", [comparison.to_json() for comparison in measured.comparisons])
    return measured


def report(
    accepted: Sequence[Accepted],
    measured: Measured,
    config: EmbeddingConfig,
    data: EmbeddingData,
    run_dir: Run,
    *,
    failed: Exception | None = None,
) -> Path:
    """Write model cards, curves, what words and vectors became, and the report."""
    for folder in (run_dir.best, run_dir.final):
        write_text(folder / "README.md", card(config, data, measured.scores, folder))
        write_manifest(folder)
    figures, searches = table_pages(accepted, data, SHORT)
    write_json(run_dir.folder / "figures.json", [*training_figures(run_dir.folder), *figures])
    write_json(run_dir.folder / "searches.json", searches)
    steps = [{"title": model.name, "text": _in_words(model)} for model in accepted]
    summary = [*_differences(accepted, measured)]
    if failed is not None:
        summary.append(f"The stage after {accepted[-1].name} was not accepted: {failed}.")
    write_json(run_dir.folder / "story.json", {"title": config.name, "summary": summary, "steps": steps})
    return write_report(run_dir.folder)


def training_figures(folder: Path) -> list[dict[str, Any]]:
    """Describe losses, and what the retention check saw, of every training of the run."""
    figures: list[dict[str, Any]] = []
    for history in sorted((folder / "training").glob("*/history.jsonl")):
        name, rows = history.parent.name, read_json_lines(history)
        for kind, names, label in (("losses", LABELS, "loss"), ("watched", _WATCHED, "correlation or cosine")):
            if series := _series(rows, names):
                title = "losses" if kind == "losses" else "what the retention check saw"
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

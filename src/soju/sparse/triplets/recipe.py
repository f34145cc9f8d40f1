"""Mode ``triplets``: distil queries with good and bad answers into a neural sparse encoder (the published v22 and v23).

What it reads, and what its report shows; the steps of the recipe are in `soju.sparse.neural`.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from soju.core.files import read_json_lines
from soju.core.run import Run
from soju.data.rows import TRIPLETS
from soju.data.statistics import RowStatistics, counted, held_out, normalise_for_overlap
from soju.sparse.data import RunData, RunReader, refuse_too_few
from soju.sparse.triplets.config import TripletsConfig

if TYPE_CHECKING:
    from soju.sparse.finish import Figure
    from soju.sparse.triplets.training import TripletsLesson


_SPARSITY = {
    "loss_active_query": "active terms of queries",
    "loss_active_document": "active terms of documents",
    "loss_flops_weight_query": "penalty weight, queries",
    "loss_flops_weight_document": "penalty weight, documents",
}
_VALIDATED = {"eval_mrr@10": "MRR@10", "eval_recall@1": "recall@1", "eval_recall@10": "recall@10"}


def read(config: TripletsConfig) -> RunData:
    """Read triplets, pairs, terms and test sets; see `RunReader.checked` for what is refused."""
    reader = RunReader(config)
    _read_triplets(config, reader)
    data = reader.checked()
    for rows, setting in ((data.training.triplets, "data.triplets"), (data.training.dev_triplets, "data.dev_share")):
        refuse_too_few(rows, f"{setting}: fewer than two triplets are left; give more, or another share", least=2)
    return data


def _read_triplets(config: TripletsConfig, reader: RunReader) -> None:
    """Add the triplets; words that are kept out of the terms to measure on are kept out of the triplets too."""
    data, training = config.data, reader.training
    counts = RowStatistics()
    unseen = {normalise_for_overlap(row.ko) for row in training.unseen_terms}
    for source in data.triplets:
        for row in counted(reader.rows([source], TRIPLETS), counts):
            query = normalise_for_overlap(row.query)
            if row.pair_type == "single_term" and query in unseen:
                continue
            if not data.dev_triplets and held_out(query, seed=config.seed + 1, share=data.dev_share):
                training.dev_triplets.append(row)
            else:
                training.triplets.append(row)
                training.source_rows[source] = training.source_rows.get(source, 0) + 1
    training.dev_triplets.extend(reader.rows(data.dev_triplets, TRIPLETS))
    training.statistics["triplets"] = counts.to_json()


def run(config: TripletsConfig, run_dir: Run, *, data: RunData, resume: Path | None = None, workers: int = 2) -> Run:
    """Train, score and report; see `soju.sparse.neural.run`."""
    from soju.sparse import neural  # seconds, which a check of the data need not wait
    from soju.sparse.triplets.training import TripletsLesson

    return neural.run(
        TripletsLesson, config, run_dir, data=data, figures=figures, summary=summary, resume=resume, workers=workers
    )


def figures(lesson: TripletsLesson) -> list[Figure]:
    """Show the curves of ``history.jsonl``."""
    from soju.sparse.finish import curves, figure, loss_figures

    config, history = lesson.config, read_json_lines(lesson.folder / "history.jsonl")
    ends = ", ".join(f"{stage.share:.0%} at τ {stage.temperature:g}" for stage in config.curriculum)
    return [
        *loss_figures(
            history,
            lesson.losses,
            caption=f"Raw, unweighted losses; the total is weighted. Stages of the curriculum: {ends}.",
        ),
        *figure("sparsity", "Active terms and what holds them", _sparsity_targets(config), curves(history, _SPARSITY)),
        *figure(
            "validation",
            "Development queries, none of them trained on",
            "Each is searched among the texts of all development triplets.",
            curves(history, _VALIDATED),
            y_label="score",
        ),
    ]


def summary(lesson: TripletsLesson) -> str:
    """Say in plain words what was trained on."""
    counts = lesson.rows.counts
    return (
        f"{counts.kept:,} triplets of {counts.texts:,} different texts; {counts.without_terms + counts.banned:,} rows "
        f"were rejected. {len(lesson.config.curriculum)} stages."
    )


def _sparsity_targets(config: TripletsConfig) -> str:
    targets = [
        f"{number:g} of a {side}"
        for side, number in (("query", config.sparsity.query_terms), ("document", config.sparsity.document_terms))
        if number is not None
    ]
    if not targets:
        return "Nothing was asked for: the penalty's weight follows its schedule alone."
    return f"Asked for: {' and '.join(targets)}; the weights of the penalty are steered towards it."

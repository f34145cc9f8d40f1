"""Mode ``terms``: distil a dense teacher and a term mapping into a neural sparse encoder (the published v19).

What it reads, and what its report shows; the steps of the recipe are in `soju.sparse.neural`.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from soju.core.files import read_json_lines
from soju.core.run import Run
from soju.sparse.config import TermsConfig
from soju.sparse.data import RunData, RunReader, refuse_too_few

if TYPE_CHECKING:
    from soju.sparse.finish import Figure
    from soju.sparse.terms.training import TermsLesson


_VALIDATED = {
    "eval_activation.en@50": "activation, English",
    "eval_preservation.ko@50": "preservation, Korean",
    "eval_noise@50": "noise",
}


def read(config: TermsConfig) -> RunData:
    """Read term mappings, pairs and test sets; see `RunReader.checked` for what is refused."""
    data = RunReader(config, dev_terms=config.data.dev_terms).checked()
    for rows, setting in ((data.training.terms, "data.terms"), (data.training.dev_terms, "data.dev_terms")):
        refuse_too_few(rows, f"{setting}: no head word is left; give more terms, or another share")
    return data


def run(config: TermsConfig, run_dir: Run, *, data: RunData, resume: Path | None = None, workers: int = 2) -> Run:
    """Train, score and report; see `soju.sparse.neural.run`."""
    from soju.sparse import neural  # seconds, which a check of the data need not wait
    from soju.sparse.terms.training import TermsLesson

    return neural.run(
        TermsLesson, config, run_dir, data=data, figures=figures, summary=summary, resume=resume, workers=workers
    )


def figures(lesson: TermsLesson) -> list[Figure]:
    """Show the curves of ``history.jsonl`` and ``probes.jsonl``."""
    from soju.sparse.finish import curves, figure, loss_figures

    history = read_json_lines(lesson.folder / "history.jsonl")
    probes = read_json_lines(lesson.folder / "probes.jsonl")
    return [
        *loss_figures(
            history,
            lesson.losses,
            caption="Raw, unweighted losses, each the mean since the row before; the total is weighted.",
        ),
        *figure(
            "validation",
            "Development words, none of them trained on",
            "Shares of expected terms among the 50 heaviest, and of noise among all of them.",
            curves(history, _VALIDATED),
            y_label="share",
        ),
        *figure(
            "probes",
            "The published probes",
            "For display: about 25 tokens in all. Nothing is chosen by them.",
            curves(probes, {name: name for name in ("activation", "preservation", "noise")}),
            y_label="share",
        ),
    ]


def summary(lesson: TermsLesson) -> str:
    """Say in plain words what was trained on."""
    counts = lesson.rows.counts
    return (
        f"{counts.kept:,} rows ({counts.texts:,} texts) taught {counts.korean_targets:,} Korean and "
        f"{counts.english_targets:,} English target tokens; {counts.with_english / max(1, counts.texts):.0%} of the "
        f"texts have English targets. {counts.without_source + counts.without_target:,} rows were rejected."
    )

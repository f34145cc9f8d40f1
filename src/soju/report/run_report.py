"""The report of a finished run, as files and on the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Group

from soju.core.files import write_text
from soju.core.score import Comparison, Score
from soju.report.contents import read_run
from soju.report.markdown import render_markdown
from soju.report.page import render_html
from soju.report.plots import draw_figures
from soju.report.terminal import figures_table, scores_table


def write_report(run_folder: Path) -> Path:
    """Write ``report.html``, ``report.md`` and ``plots/`` into a run folder; again gives the same bytes.

    Returns the path of ``report.html``. Raises `UserError` if the folder has no scores, or a file is malformed.
    """
    contents = read_run(run_folder)
    figures = draw_figures(contents.figures, run_folder / "plots")
    write_text(run_folder / "report.md", render_markdown(contents, figures))
    path = run_folder / "report.html"
    write_text(path, render_html(contents, figures))
    return path


def run_tables(run_folder: Path) -> Group:
    """Return the scores of a run folder for the terminal."""
    contents = read_run(run_folder)
    return measured_tables(contents.scores, contents.comparisons)


def measured_tables(scores: Sequence[Score], comparisons: Sequence[Comparison] = ()) -> Group:
    """Return a table of the test sets with several systems, and a list of figures for the others."""
    systems: dict[str, set[str]] = {}
    for score in scores:
        systems.setdefault(score.test_set, set()).add(score.subject)
    compared = [score for score in scores if len(systems[score.test_set]) > 1]
    alone = [score for score in scores if len(systems[score.test_set]) == 1]
    tables = [scores_table(compared, comparisons)] if compared else []
    return Group(*tables, *([figures_table(alone)] if alone else []))

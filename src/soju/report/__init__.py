"""Pages, plots, tables and model cards from a run folder. Nothing here computes a score."""

from __future__ import annotations

from pathlib import Path


def write_report(run_folder: Path) -> Path:
    """Write ``report.html``, ``report.md`` and ``plots/`` into a run folder; again gives the same bytes.

    Args:
        run_folder: A run folder with at least ``scores.json``.

    Returns:
        The path of ``report.html``.

    Raises:
        UserError: If the folder has no scores, or one of its files is malformed.
    """
    # Here, not on top: tables of this package are used where no page is drawn, and matplotlib takes a second to load.
    from soju.core.files import write_text
    from soju.report.contents import read_run
    from soju.report.markdown import render_markdown
    from soju.report.page import render_html
    from soju.report.plots import draw_figures

    contents = read_run(run_folder)
    figures = draw_figures(contents.figures, run_folder / "plots")
    write_text(run_folder / "report.md", render_markdown(contents, figures))
    path = run_folder / "report.html"
    write_text(path, render_html(contents, figures))
    return path

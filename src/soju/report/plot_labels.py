"""Where do names go that stand beside their points and lines?"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from matplotlib.axes import Axes
from matplotlib.text import Annotation
from matplotlib.transforms import Bbox

from soju.report.run_contents import Series

_SIDES = (
    (8, 0, "left", "center"),
    (-8, 0, "right", "center"),
    (0, 8, "center", "bottom"),
    (0, -8, "center", "top"),
    (7, 7, "left", "bottom"),
    (-7, -7, "right", "top"),
)


def label_points(axes: Axes, points: Sequence[Series], names: Sequence[str], palette: Sequence[str]) -> None:
    """Write each name beside its point, at the first side where it meets no other point, name or edge."""
    figure: Any = axes.get_figure(root=True)
    figure.draw_without_rendering()
    centres = [axes.transData.transform((float(series.x[0]), series.y[0])) for series in points]
    taken = [Bbox.from_extents(x - 14, y - 14, x + 14, y + 14) for x, y in centres]
    for index, series in enumerate(points):
        others = [box for place, box in enumerate(taken) if place != index]
        best: tuple[float, Annotation, Bbox] | None = None
        for x, y, across, along in _SIDES:
            label = axes.annotate(
                names[index], (float(series.x[0]), series.y[0]), xytext=(x, y), fontsize=10.5,
                textcoords="offset points", ha=across, va=along, color=palette[index % len(palette)],
            )  # fmt: skip
            box = label.get_window_extent()
            faults = Bbox.count_overlaps(box, others) + (0 if _inside(box, axes.bbox) else 1.5)
            if best is not None and faults >= best[0]:
                label.remove()
                continue
            if best is not None:
                best[1].remove()
            best = (faults, label, box)
            if faults == 0:
                break
        assert best is not None
        taken.append(best[2])


def _inside(box: Bbox, frame: Bbox) -> bool:
    return box.x0 >= frame.x0 and box.x1 <= frame.x1 and box.y0 >= frame.y0


def label_lines(axes: Axes, lines: Sequence[Series], names: Sequence[str], palette: Sequence[str]) -> None:
    """Write each name at the right end of its line, pushed apart until none overlap."""
    figure: Any = axes.get_figure(root=True)
    figure.draw_without_rendering()
    to_axes = axes.transData + axes.transAxes.inverted()
    ends = [float(to_axes.transform((float(series.x[-1]), series.y[-1]))[1]) for series in lines]
    for index, height in enumerate(spread(ends, gap=0.08)):
        axes.text(
            1.015, height, names[index], transform=axes.transAxes, va="center",
            color=palette[index % len(palette)], fontsize=10.5,
        )  # fmt: skip


def spread(places: Sequence[float], *, gap: float) -> list[float]:
    """Move places apart, each as little as it must, until neighbours are at least about `gap` apart."""
    moved = list(places)
    order = sorted(range(len(moved)), key=lambda index: places[index])
    for _ in range(200):
        for below, above in pairwise(order):
            missing = gap - (moved[above] - moved[below])
            if missing > 0:
                moved[below] -= missing / 2
                moved[above] += missing / 2
    return moved

"""The figures of a run, each drawn for a light and a dark page.

Names stand next to their points and lines where there is room, in a legend otherwise. A label whose glyphs no installed
font has is romanised, and the caption says so.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib import font_manager
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Annotation
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator
from matplotlib.transforms import Bbox

from soju.core.files import atomic_writer
from soju.core.language import is_hangul
from soju.report.contents import FigureSpec, Series
from soju.report.page import DrawnFigure
from soju.report.tables import format_value


@dataclass(frozen=True, slots=True)
class Theme:
    """Colours of a page. The palettes follow Okabe and Ito, so that colour-blind readers can tell them apart."""

    background: str
    ink: str
    muted: str
    grid: str
    palette: tuple[str, ...]


LIGHT = Theme(
    "#ffffff", "#1b1d21", "#5d636e", "#e6e8ec", ("#0072b2", "#d55e00", "#009e73", "#b1548a", "#a67a00", "#444a54")
)
DARK = Theme(
    "#15171a", "#e8eaed", "#a0a7b2", "#2b2f36", ("#56b4e9", "#f08a4b", "#2fc79a", "#e29cc4", "#f0cf4a", "#c3c9d2")
)

_MARKERS = ("o", "s", "^", "D", "v", "P", "X")
_DASHES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (8, 2)))
_INCHES = (6.2, 3.7)
_PANEL_INCHES = (2.9, 2.3)
_PANELS_IN_A_ROW = 4
_MOST_DIRECT_LABELS = 6
_MOST_VALUE_LABELS = 16
_REPLACED = "Some letters are romanised or shown as “?” in the picture: no font with their glyphs was installed."


def draw_figures(figures: Sequence[FigureSpec], folder: Path) -> list[DrawnFigure]:
    """Draw each figure to ``<id>.png`` and ``<id>.dark.png`` in a folder."""
    fonts = find_fonts()
    drawn = []
    for spec in figures:
        light, dark = folder / f"{spec.id}.png", folder / f"{spec.id}.dark.png"
        for path, theme in ((light, LIGHT), (dark, DARK)):
            with atomic_writer(path, encoding=None) as file:
                file.write(_png(spec, theme, fonts))
        replaced = _REPLACED if fonts.replaces(_texts(spec)) else ""
        caption = " ".join(part for part in (spec.caption, replaced) if part)
        drawn.append(DrawnFigure(spec=spec, light=light, dark=dark, alt=describe(spec), caption=caption))
    return drawn


def describe(spec: FigureSpec) -> str:
    """Say in words what a figure shows, for readers who cannot see it."""
    kind = {"line": "Line chart", "bar": "Bar chart", "scatter": "Scatter plot", "grid": "Line charts"}[spec.kind]
    axes = " by ".join(label for label in (spec.y_label, spec.x_label) if label)
    parts = []
    for series in spec.series[:8]:
        if len(series.x) == 1 or (spec.kind == "bar" and len(series.x) <= 6):
            pairs = ", ".join(f"{y:g} at {_plain(x)}" for x, y in zip(series.x, series.y, strict=True))
            parts.append(f"{series.name}: {pairs}")
        else:
            parts.append(f"{series.name}: from {series.y[0]:g} to {series.y[-1]:g} over {len(series.y)} points")
    return f"{kind}: {spec.title}. {f'{axes}. ' if axes else ''}{'; '.join(parts)}."


def _plain(x: float | str) -> str:
    return x if isinstance(x, str) else f"{x:g}"


def _texts(spec: FigureSpec) -> list[str]:
    names = [series.name for series in spec.series]
    categories = [x for series in spec.series for x in series.x if isinstance(x, str)]
    return [spec.x_label, spec.y_label, *names, *categories]


def _png(spec: FigureSpec, theme: Theme, fonts: Fonts) -> bytes:
    style: Any = {
        "font.family": list(fonts.families),
        "font.size": 11,
        "text.parse_math": False,
        "text.color": theme.ink,
        "axes.edgecolor": theme.muted,
        "axes.facecolor": theme.background,
        "axes.labelcolor": theme.muted,
        "axes.unicode_minus": True,
        "xtick.color": theme.muted,
        "ytick.color": theme.muted,
        "xtick.labelsize": 10.5,
        "ytick.labelsize": 10.5,
    }
    with mpl.rc_context(style):
        figure = Figure(figsize=_size(spec), dpi=200, layout="constrained", facecolor=theme.background)
        FigureCanvasAgg(figure)
        engine: Any = figure.get_layout_engine()
        engine.set(w_pad=0.06, h_pad=0.09)
        if spec.kind == "grid":
            _panels(figure, spec, theme, fonts)
        elif spec.kind == "bar":
            _bars(figure.add_subplot(), spec, theme, fonts)
        else:
            _points(figure.add_subplot(), spec, theme, fonts)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", facecolor=theme.background, metadata={"Software": None})
    return buffer.getvalue()


def _size(spec: FigureSpec) -> tuple[float, float]:
    if spec.kind != "grid":
        return _INCHES
    columns = min(_PANELS_IN_A_ROW, len(spec.series))
    rows = -(-len(spec.series) // columns)
    return columns * _PANEL_INCHES[0], rows * _PANEL_INCHES[1]


def _panels(figure: Figure, spec: FigureSpec, theme: Theme, fonts: Fonts) -> None:
    columns = min(_PANELS_IN_A_ROW, len(spec.series))
    rows = -(-len(spec.series) // columns)
    for place, series in enumerate(spec.series, start=1):
        axes = figure.add_subplot(rows, columns, place)
        panel = spec.model_copy(update={"kind": "line", "series": (series,), "y_label": series.name})
        _points(axes, panel, theme, fonts)
        if place <= len(spec.series) - columns:
            axes.set_xlabel("")
        axes.xaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 2.5, 5, 10]))


def _points(axes: Axes, spec: FigureSpec, theme: Theme, fonts: Fonts) -> None:
    for index, series in enumerate(spec.series):
        colour = theme.palette[index % len(theme.palette)]
        marker = _MARKERS[index % len(_MARKERS)]
        if spec.kind == "line":
            dashes: Any = _DASHES[index % len(_DASHES)]
            every = max(1, len(series.x) // 12)
            style: dict[str, Any] = {"marker": marker, "markersize": 4.5, "markevery": every, "linewidth": 1.8}
            axes.plot(series.x, series.y, color=colour, linestyle=dashes, label=fonts.readable(series.name), **style)
            if series.low is not None and series.high is not None:
                axes.fill_between(series.x, series.low, series.high, color=colour, alpha=0.14, linewidth=0)
        else:
            errors = _errors(series)
            axes.errorbar(
                series.x, series.y, yerr=errors, color=colour, linestyle="none", marker=marker, markersize=7,
                elinewidth=1.2, capsize=2.5, label=fonts.readable(series.name),
            )  # fmt: skip
    if spec.log_x:
        axes.set_xscale("log")
    if spec.log_y:
        axes.set_yscale("log")
    axes.margins(x=0.04 if spec.kind == "line" else 0.12, y=0.12)
    _finish(axes, spec, theme, fonts)
    _number_axis(axes.xaxis, log=spec.log_x)
    _number_axis(axes.yaxis, log=spec.log_y)
    names = [fonts.readable(series.name) for series in spec.series]
    single = all(len(series.x) == 1 for series in spec.series)
    if len(spec.series) == 1 and not single:
        return
    if spec.kind == "scatter" and single:
        label_points(axes, spec.series, names, theme.palette)
    elif spec.kind == "line" and len(spec.series) <= _MOST_DIRECT_LABELS:
        label_lines(axes, spec.series, names, theme.palette)
    else:
        _legend(axes)


def _bars(axes: Axes, spec: FigureSpec, theme: Theme, fonts: Fonts) -> None:
    categories = list(dict.fromkeys(_plain(x) for series in spec.series for x in series.x))
    across = max(len(name) for name in categories) * len(categories) > 60 or len(categories) > 10
    thickness = (0.78 if len(spec.series) > 1 else 0.6) / len(spec.series)
    few = sum(len(series.x) for series in spec.series) <= _MOST_VALUE_LABELS
    for index, series in enumerate(spec.series):
        shift = (index - (len(spec.series) - 1) / 2) * thickness
        places = [categories.index(_plain(x)) + shift for x in series.x]
        colour = theme.palette[index % len(theme.palette)]
        style: dict[str, Any] = {"color": colour, "edgecolor": theme.background, "linewidth": 0.8, "ecolor": theme.ink}
        style |= {"label": fonts.readable(series.name), "xerr" if across else "yerr": _errors(series)}
        bars = (axes.barh if across else axes.bar)(places, series.y, thickness, **style)
        if few:
            texts = [_short(y) for y in series.y]
            axes.bar_label(bars, texts, padding=3, fontsize=8, color=theme.ink)
    ticks, names = range(len(categories)), [fonts.readable(name) for name in categories]
    if across:
        axes.set_yticks(ticks, names)
        axes.invert_yaxis()
    else:
        axes.set_xticks(ticks, names)
    if spec.log_y:
        (axes.set_xscale if across else axes.set_yscale)("log")
    if across:
        axes.margins(x=0.12)
    else:
        axes.margins(y=0.12)
    _finish(axes, spec, theme, fonts, across=across)
    _number_axis(axes.xaxis if across else axes.yaxis, log=spec.log_y)
    (axes.yaxis if across else axes.xaxis).set_tick_params(length=0)
    if len(spec.series) > 1:
        _legend(axes)


def _errors(series: Series) -> list[list[float]] | None:
    if series.low is None or series.high is None:
        return None
    below = [max(0.0, y - low) for y, low in zip(series.y, series.low, strict=True)]
    above = [max(0.0, high - y) for y, high in zip(series.y, series.high, strict=True)]
    return [below, above]


def _short(value: float) -> str:
    return f"{value:.3f}" if abs(value) < 1 else format_value(value, "")


def _finish(axes: Axes, spec: FigureSpec, theme: Theme, fonts: Fonts, *, across: bool = False) -> None:
    for side in ("top", "right", "left") if not across else ("top", "right", "bottom"):
        axes.spines[side].set_visible(False)
    axes.grid(axis="x" if across else "y", color=theme.grid, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(length=0, pad=5)
    below, above = (spec.y_label, spec.x_label) if across else (spec.x_label, spec.y_label)
    axes.set_xlabel(fonts.readable(below, longest=60), labelpad=7)
    axes.set_title(fonts.readable(above, longest=60), loc="left", fontsize=11, color=theme.muted, pad=12)


def _number_axis(axis: Any, *, log: bool) -> None:
    axis.set_major_formatter(FuncFormatter(_tick))
    if not log:
        axis.set_major_locator(MaxNLocator(6, steps=[1, 2, 2.5, 5, 10]))
        return
    low, high = sorted(axis.get_view_interval())
    axis.set_major_locator(LogLocator(subs=(1.0,) if high / low > 300 else (1.0, 2.0, 5.0)))
    axis.set_minor_locator(NullLocator())


def _tick(value: float, _: int | None) -> str:
    text = f"{value:,.10g}"
    return text.replace("-", "−")


def _legend(axes: Axes) -> None:
    columns = min(4, len(axes.get_legend_handles_labels()[0]))
    figure: Any = axes.get_figure(root=True)
    figure.legend(
        *axes.get_legend_handles_labels(), frameon=False, ncols=columns, loc="outside lower left", fontsize=10.5
    )


# Names next to what they name.

_SIDES = (
    (8, 0, "left", "center"),
    (-8, 0, "right", "center"),
    (0, 8, "center", "bottom"),
    (0, -8, "center", "top"),
    (7, 7, "left", "bottom"),
    (-7, -7, "right", "top"),
)


def label_points(axes: Axes, points: Sequence[Series], names: Sequence[str], palette: Sequence[str]) -> None:
    """Write each name next to its point, at the first side where it meets no other point, name or edge."""
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


# Fonts.

_LATIN = "DejaVu Sans"  # ships inside matplotlib
_KOREAN = (
    "Pretendard",
    "Noto Sans KR",
    "Noto Sans CJK KR",
    "Noto Sans CJK JP",  # a .ttc is known by its first face; that face holds Hangul too
    "Source Han Sans KR",
    "Source Han Sans K",
    "Apple SD Gothic Neo",
    "AppleGothic",
    "Malgun Gothic",
    "NanumGothic",
    "NanumBarunGothic",
    "Spoqa Han Sans Neo",
    "UnDotum",
    "Baekmuk Dotum",
)
# The place in the list is the place in the syllable block; "-" is silent.
_INITIALS = "g kk n d tt r m b pp s ss - j jj ch k t p h"
_VOWELS = "a ae ya yae eo e yeo ye o wa wae oe yo u wo we wi yu eu ui i"
_FINALS = "- k k k n n n t l k m l l l p l m p p t t ng t t k t p t"


@dataclass(frozen=True, slots=True)
class Fonts:
    """Font families to draw with, in order, and their files."""

    families: tuple[str, ...]
    files: tuple[str, ...]

    def has(self, character: str) -> bool:
        """Tell whether one of the fonts can draw a character."""
        return any(font_manager.get_font(file).get_char_index(ord(character)) for file in self.files)

    def readable(self, text: str, *, longest: int = 34) -> str:
        """Return one line that these fonts draw without a warning, cut after ``longest`` characters.

        Where glyphs are missing, Hangul is romanised and other characters are ``?``.
        """
        text = " ".join(text.split())
        drawn = "".join(c if self.has(c) else romanise(c) if is_hangul(c) else "?" for c in text)
        if len(drawn) > longest:
            drawn = drawn[: longest - 1].rstrip() + "…"
        return f" {drawn}" if drawn.startswith("_") else drawn  # matplotlib hides labels that start with "_"

    def replaces(self, texts: Iterable[str]) -> bool:
        """Tell whether any of the texts is drawn otherwise than written."""
        return any(not self.has(c) for text in texts for c in text if not c.isspace())


@lru_cache(maxsize=1)
def find_fonts() -> Fonts:
    """Find a Korean font among the installed ones; matplotlib's own font always comes first."""
    installed = {entry.name: entry.fname for entry in font_manager.fontManager.ttflist}
    latin = font_manager.findfont(_LATIN)
    for family in _KOREAN:
        file = installed.get(family)
        if file and Path(file).is_file() and font_manager.get_font(file).get_char_index(ord("가")):
            return Fonts((_LATIN, family), (latin, file))
    return Fonts((_LATIN,), (latin,))


def romanise(syllable: str) -> str:
    """Write one Hangul syllable in Latin letters, without sound changes between syllables; a lone jamo is ``?``.

    >>> "".join(romanise(c) for c in "한국")
    'hanguk'

    References:
        Revised Romanization of Korean, Ministry of Culture and Tourism 2000-8.
    """
    index = ord(syllable) - 0xAC00
    if not 0 <= index < 11172:
        return "?"
    letters = _INITIALS.split()[index // 588] + _VOWELS.split()[index % 588 // 28] + _FINALS.split()[index % 28]
    return letters.replace("-", "")

import json
import struct

import pytest
from matplotlib import font_manager
from report_runs import figure

from soju.report import plots
from soju.report.contents import FigureSpec
from soju.report.plots import Fonts, describe, draw_figures, find_fonts, romanise, spread


def spec(**changes):
    return FigureSpec.model_validate_json(json.dumps(figure(**changes)))


def series(name, size=3, **changes):
    return {"name": name, "x": list(range(1, size + 1)), "y": [0.1 * i for i in range(1, size + 1)]} | changes


@pytest.fixture
def latin_only(monkeypatch):
    fonts = Fonts(("DejaVu Sans",), (font_manager.findfont("DejaVu Sans"),))
    monkeypatch.setattr(plots, "find_fonts", lambda: fonts)
    return fonts


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"series": [series("a", low=[0, 0.1, 0.2], high=[0.2, 0.3, 0.4]), series("b")]},
        {"series": [series(f"line {index}", 60) for index in range(9)]},
        {"kind": "bar", "series": [series("a", x=["x", "y", "z"]), series("b", x=["z", "w", "x"])]},
        {"kind": "bar", "series": [series("a", 30, low=[0.0] * 30, high=[9.0] * 30)], "log_y": True},
        {"kind": "scatter", "series": [series(f"s{n}", 1) for n in range(8)], "log_x": True, "log_y": True},
        {"kind": "scatter", "series": [series("a"), series("b")]},
        {"series": [series("one point", 1)], "log_x": True},
        {"title": "$x^", "y_label": "$\\frac{", "series": [series("_hidden"), series("$")]},
        {"y_label": "long " * 90, "series": [series("가나다" * 90), series("x" * 300)]},
        {"kind": "bar", "series": [series("x" * 300, x=["a" * 300, "b" * 300, "뉴스" * 99]), series("y" * 300)]},
        {"kind": "scatter", "series": [series("x" * 300, 1), series("가" * 300, 1)]},
        {"x_label": "😀\n\t\x07", "series": [series("한국어 😀"), series("العربية")]},
    ],
)
def test_any_figure_is_drawn_without_a_warning(tmp_path, changes):
    (drawn,) = draw_figures([spec(**changes)], tmp_path)
    for path in (drawn.light, drawn.dark):
        assert struct.unpack(">II", path.read_bytes()[16:24]) == (1240, 740)
    assert drawn.light.name == "quality.png"
    assert drawn.dark.name == "quality.dark.png"


def test_korean_without_a_korean_font_is_romanised_and_the_caption_says_so(tmp_path, latin_only):
    (drawn,) = draw_figures([spec(series=[series("한국어"), series("법")])], tmp_path)
    assert latin_only.readable("한국어 漢") == "hangukeo ?"
    assert drawn.caption.startswith("Judged every step. Some letters are romanised")


def test_the_caption_is_left_alone_when_all_glyphs_are_there(tmp_path, latin_only):
    (drawn,) = draw_figures([spec()], tmp_path)
    assert drawn.caption == "Judged every step."


def test_the_fonts_found_can_draw_latin():
    assert find_fonts().readable("nDCG@10 → 0.5") == "nDCG@10 → 0.5"


@pytest.mark.parametrize(
    ("syllable", "latin"), [("한", "han"), ("국", "guk"), ("값", "gap"), ("의", "ui"), ("ㅋ", "?")]
)
def test_hangul_is_romanised_by_syllable(syllable, latin):
    assert romanise(syllable) == latin


def test_the_description_names_each_series_with_its_ends():
    text = describe(spec())
    assert text == "Line chart: Quality while training. nDCG@10 by step. ko-en: from 0.1 to 0.3 over 3 points."


def test_labels_are_pushed_apart_and_distant_ones_stay():
    low, high, far = spread([0.5, 0.5, 0.9], gap=0.1)
    assert high - low == pytest.approx(0.1)
    assert low + high == pytest.approx(1.0)
    assert far == 0.9

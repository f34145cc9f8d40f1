import base64
import json
import re
from html.parser import HTMLParser

import pytest
from report_runs import HOSTILE, comparison, expansion, figure, score, search, write_run

from soju.report import write_report

VOID = {"meta", "img", "source", "br", "link", "input", "hr"}


class Page(HTMLParser):
    """Every tag with its attributes, and whether all tags close in order."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.open, self.ids, self.text = [], [], [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)

    def named(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]


def read(run):
    text = write_report(run).read_text(encoding="utf-8")
    page = Page(text)
    assert page.open == []
    return text, page


def hostile_run(folder, text):
    nested = {text: text, "inner": {text: {"a": text}, "b": {"a": text}}, "list": [{text: text}]}
    write_run(
        folder,
        scores=[
            score(text, test_set=f"{text}/{text}", name=text, unit=text, signature=text),
            score("bm25", test_set=f"{text}/{text}", name=text, unit=text, signature=text + "2"),
            score(text, test_set=text, name=text, unit="bytes"),
        ],
        comparisons=[comparison(subject=text, baseline=text, test_set=f"{text}/{text}", metric=text)],
        figures=[figure(title=text, caption=text, x_label=text, y_label=text,
                        series=[{"name": text, "x": [1, 2], "y": [1, 2]}, {"name": "b", "x": [1], "y": [1]}])],
        expansions=[expansion(text, text)],
        searches=[search(text, text, text) | {"engine": text}],
        data=nested,
        environment=nested | {"seed": text, "commit": text, "started": text, "soju": text},
        story={"title": text, "summary": [text], "steps": [{"title": text, "text": text, "seconds": 1}]},
    )  # fmt: skip
    (folder / "resolved.yaml").write_text(text, encoding="utf-8")
    (folder / "config.yaml").write_text(text, encoding="utf-8")
    return folder


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_text_stays_text(tmp_path, text):
    html, page = read(hostile_run(tmp_path / "r", text))
    assert {"script", "svg", "iframe", "b-out"}.isdisjoint({tag for tag, _ in page.tags})
    for tag, attributes in page.tags:
        assert not [name for name in attributes if name.startswith("on")], tag
        assert not str(attributes.get("href", "#")).startswith("javascript:")
        assert str(attributes.get("src", "data:")).startswith("data:")
    assert len(page.named("style")) == html.count("</style>") == 1
    assert text in "".join(page.text)


def test_the_page_asks_for_nothing_from_outside(run):
    html, page = read(run)
    assert "default-src 'none'; style-src 'unsafe-inline'; img-src data:" in html
    assert page.named("link") == page.named("script") == []
    assert all(attributes["href"].startswith("#") for attributes in page.named("a"))
    assert not re.search(r"url\(|@import", html)
    assert "http://" not in html
    assert "https://" not in html


def test_every_plot_is_embedded_in_light_and_dark_with_a_description(run):
    _, page = read(run)
    images, sources = page.named("img"), page.named("source")
    assert len(images) == len(sources) == 2
    for uri in [image["src"] for image in images] + [source["srcset"] for source in sources]:
        assert base64.b64decode(uri.removeprefix("data:image/png;base64,")).startswith(b"\x89PNG")
    assert all(image["alt"] for image in images)
    assert all(source["media"] == "screen and (prefers-color-scheme: dark)" for source in sources)


def test_the_contents_name_each_section_that_is_there(run):
    _, page = read(run)
    ids = [attributes["id"] for attributes in page.named("section") if "id" in attributes]
    assert [attributes["href"] for attributes in page.named("a")] == ["#main", *(f"#{name}" for name in ids)]
    assert ids == [
        *("scores", "cost", "tests", "plots", "expansions", "searches", "steps", "data", "configuration"),
        "environment",
    ]


def test_sections_without_content_are_left_out(tmp_path):
    _, page = read(write_run(tmp_path, scores=[score()]))
    assert [attributes["id"] for attributes in page.named("section") if "id" in attributes] == ["scores"]


def test_the_best_system_and_its_number_come_first(run):
    html, _ = read(run)
    top = html[: html.index('id="scores"')]
    assert "A small encoder" in top
    assert "It works." in top
    assert "0.800" in top
    assert "0.700–0.900" in top
    assert "student" in top


def test_the_lower_value_is_bold_when_lower_is_better(tmp_path):
    rows = [score(s, v, name="size", unit="bytes", higher_is_better=False) for s, v in (("a", 2e6), ("b", 1e6))]
    html, _ = read(write_run(tmp_path, scores=rows))
    assert "<strong>1.0 MB</strong>" in html
    assert "<strong>2.0 MB</strong>" not in html


def test_unequal_signatures_are_flagged_and_listed(tmp_path):
    rows = [score("a", 0.4, signature="k:10"), score("b", 0.6, signature="k:20")]
    html, _ = read(write_run(tmp_path, scores=rows))
    assert "Different settings." in html
    assert "<strong>0.600</strong>" not in html
    assert "<code>k:10</code>" in html
    assert "<code>k:20</code>" in html


def test_terms_carry_their_language(run):
    html, _ = read(run)
    assert '<th scope="row" lang="ko">소주</th>' in html
    assert '<th scope="row" lang="en">distill</th>' in html
    assert '<th scope="row">40</th>' in html


def test_colours_follow_the_reader_and_tables_scroll_in_their_own_box(run):
    html, page = read(run)
    assert {"name": "color-scheme", "content": "light dark"} in page.named("meta")
    assert "prefers-color-scheme: dark" in html
    assert "@media print" in html
    assert html.count("<table") - html.count('<table class="bars') <= html.count('class="scroll"')


def test_writing_again_changes_nothing(run):
    def contents():
        return {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}

    write_report(run)
    first = contents()
    write_report(run)
    assert contents() == first


def test_the_report_of_a_run_with_scores_only_is_written(tmp_path):
    write_run(tmp_path, scores=[])
    assert write_report(tmp_path).is_file()
    assert json.loads((tmp_path / "scores.json").read_text(encoding="utf-8")) == []

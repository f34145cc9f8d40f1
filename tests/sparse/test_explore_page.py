"""The page in a browser: Korean typing, hostile text, addresses, colours."""

import threading
from urllib.parse import quote

import pytest

from fixtures.chromium import chromium
from fixtures.needs import needs_chromium
from soju.data.rows import Document
from soju.sparse.explore import Explorer, create_app, listen, make_server, open_models, url_of
from soju.sparse.indexing import Index

pytestmark = needs_chromium

HOSTILE = "<img src=x onerror=alert(1)> <script>alert(2)</script> script &amp;"
DOCUMENTS = [
    Document("heart", "The heart pumps blood through the vessels."),
    Document("<script>alert(3)</script>", f"{HOSTILE} heart"),
    Document("심장", "심장은 혈관으로 피를 보낸다."),
]
DONE = "document.getElementById('results').dataset.state === '{}' && !document.querySelector('[aria-busy]')"
SHOWN = DONE.format("shown")
FIRST = "document.querySelector('.bars th').textContent"
BARS = "[...document.querySelectorAll('.bars tr')].map(row => [row.className, row.querySelector('th').textContent, {}])"


@pytest.fixture(scope="module")
def asked():
    """Texts the server was asked to expand."""
    return []


@pytest.fixture(scope="module")
def url(tmp_path_factory, asked):
    folder = tmp_path_factory.mktemp("explore") / "index"
    Index.build(DOCUMENTS, "ko-en-static", folder)
    models = open_models("ko-en-static", indexes=[folder])
    explorer = Explorer(models)

    def expand(text):
        asked.append(text)
        return explorer.expand(text)

    listening = listen(0)
    server = make_server(create_app([model.label for model in models], expand, explorer.search))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
    thread.start()
    yield url_of(listening)
    server.should_exit = True
    thread.join(timeout=30)
    listening.close()
    assert not thread.is_alive()


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with chromium(tmp_path_factory.mktemp("profile")) as opened:
        yield opened


@pytest.fixture
def page(browser, url, asked):
    """The page at its beginning; at the end nothing was complained of and nothing asked of others."""
    browser.screen(1280, 900)
    browser.requests.clear()
    browser.open("about:blank")
    browser.open(url)
    browser.run("document.getElementById('q').focus()")
    asked.clear()
    yield browser
    assert browser.complaints == []
    assert [asked_for for asked_for in browser.requests if not asked_for.startswith((url, "data:", "about:"))] == []


def test_a_shared_address_shows_bars_hits_and_reasons(page, url):
    page.open(f"{url}?q={quote('심장 혈관')}")
    page.wait(SHOWN)
    bars = page.run(BARS.format("row.querySelector('.bar span').getBoundingClientRect().width"))
    assert [(language, term) for language, term, _ in bars[:2]] == [("ko", "심장"), ("ko", "혈관")]
    assert any((language, term) == ("en", "heart") for language, term, _ in bars)
    widths = [width for *_, width in bars]
    assert widths == sorted(widths, reverse=True)
    assert widths[0] > 100 > 0 < widths[-1]
    assert page.run("[...document.querySelectorAll('.hits .id')].map(item => item.textContent)")[0] == "심장"
    assert page.run("document.querySelector('.hits mark').textContent") == "심장"
    assert "×" in page.run("document.querySelector('.chips .ko').textContent")
    assert page.run("document.title") == "심장 혈관 · soju explore"
    colours = page.run(
        "['ko', 'en'].map(code => getComputedStyle(document.querySelector(`.bars .${code} .bar span`)).backgroundColor)"
    )
    assert len(set(colours)) == 2


def test_hostile_text_is_shown_as_text(page, url):
    page.open(f"{url}?q={quote(HOSTILE)}")
    page.wait(SHOWN)
    assert page.run("document.getElementById('q').value") == HOSTILE
    assert page.run("document.querySelectorAll('main script, main img').length") == 0
    hits = page.run(
        "[...document.querySelectorAll('.hits > li')].map(hit => ['id', 'passage'].map(part =>"
        " hit.querySelector('.' + part).textContent))"
    )
    assert ["<script>alert(3)</script>", f"{HOSTILE} heart"] in hits


def test_a_half_composed_syllable_is_not_looked_up_and_enter_finishes_it(page, asked):
    for syllable in ("ㅅ", "시", "심"):
        page.compose(syllable)
    page.insert("심")
    for syllable in ("ㅈ", "자", "장"):
        page.compose(syllable)
    page.run("new Promise(done => setTimeout(done, 700))")  # twice the pause after which typed text is looked up
    assert asked == []
    page.run(
        "document.getElementById('q').dispatchEvent(new KeyboardEvent('keydown',"
        " {key: 'Enter', keyCode: 229, isComposing: true, bubbles: true, cancelable: true}))"
    )  # what an input method lets the page see of the Enter that ends a syllable
    page.insert("장")
    page.wait(SHOWN)
    assert asked == ["심장"]
    assert page.run(FIRST) == "심장"
    assert page.run("new URLSearchParams(location.search).get('q')") == "심장"


def test_finished_syllables_are_looked_up_after_a_pause(page, asked):
    page.compose("ㅍ")
    page.compose("피")
    page.insert("피")
    page.wait(SHOWN)
    assert asked == ["피"]


def test_typing_and_enter_write_the_address_and_back_returns(page, asked):
    page.insert("heart")
    page.press("Enter", 13, "\r")
    page.wait(f"{SHOWN} && location.search === '?q=heart'")
    page.run("document.getElementById('q').value = ''")
    page.insert("blood")
    page.wait(
        f"{SHOWN} && location.search === '?q=blood' && document.querySelector('.bars th').textContent === 'blood'"
    )
    page.run("history.back()")
    page.wait(f"{SHOWN} && {FIRST} === 'heart'")
    assert page.run("document.getElementById('q').value") == "heart"
    assert asked == ["heart", "blood", "heart"]


def test_keys_clear_and_come_back(page):
    page.insert("heart")
    page.press("Enter", 13, "\r")
    page.wait(SHOWN)
    page.press("Escape", 27)
    page.wait(DONE.format("empty"))
    assert page.run("location.search") == ""
    page.run("document.activeElement.blur()")
    page.press("/", 191, "/")
    assert page.run("[document.activeElement.id, document.getElementById('q').value]") == ["q", ""]


def test_a_long_text_names_the_limit_and_is_not_sent(page, asked):
    page.insert("가" * 1001)
    page.wait(DONE.format("failed"))
    assert "1,001 characters; at most 1,000" in page.run("document.querySelector('[role=alert]').textContent")
    assert asked == []


def test_an_unknown_text_says_that_nothing_was_found(page):
    page.insert("ꙮ")
    page.wait(SHOWN)
    said = page.run("[...document.querySelectorAll('.nothing')].map(item => item.textContent)")
    assert said == ["The model knows no term of this text.", "Nothing shares a term with this text."]


def test_colours_follow_the_reader(page):
    backgrounds = []
    for dark in (False, True):
        page.screen(1280, 900, dark=dark)
        backgrounds.append(page.run("getComputedStyle(document.body).backgroundColor"))
    assert backgrounds == ["rgb(255, 255, 255)", "rgb(21, 23, 26)"]


@pytest.mark.parametrize("width", [320, 390, 768, 1280])
def test_no_width_scrolls_sideways(page, url, width):
    page.screen(width, 800, phone=width < 700)
    page.open(f"{url}?q={quote('심장 혈관 heart ' + 'x' * 200)}")
    page.wait(SHOWN)
    assert page.run("document.documentElement.scrollWidth") <= width

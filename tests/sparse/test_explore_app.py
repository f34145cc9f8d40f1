"""The page's server: questions, refusals, headers. The functions it asks are made up."""

import pytest
from starlette.testclient import TestClient

from soju.core.errors import UserError
from soju.sparse.explore import (
    HEADERS,
    MAX_CHARACTERS,
    Expansions,
    ModelExpansion,
    ModelLabel,
    ModelSearch,
    Searches,
    ShownTerm,
    create_app,
    listen,
    url_of,
)

HOSTILE = "<script>alert('소주')</script>"
PATHS = ("/", "/report.css", "/explore.css", "/explore.js", "/api/expand?q=물", "/api/search?q=물")


def expand(text):
    if text == "broken":
        raise RuntimeError("secret detail")
    if text == "mistake":
        raise UserError("the model is gone; restore it")
    term = ShownTerm(term=text, language="ko", weight=1.5, in_text=True, only_here=False)
    return Expansions(text=text, models=(ModelExpansion(model="m", active_terms=1, languages=(), terms=(term,)),))


def search(text):
    return Searches(text=text, models=(ModelSearch(model="m", hits=()),))


def client(name="m", search=search, host="127.0.0.1:8765"):
    app = create_app([ModelLabel(name, "3 documents")], expand, search)
    return TestClient(app, base_url=f"http://{host}", raise_server_exceptions=False)


@pytest.mark.parametrize("text", ["소주", HOSTILE, "a & b + c % d", "가" * MAX_CHARACTERS, "😀\u202e", "a\0b"])
def test_a_text_comes_back_as_it_was_asked(text):
    for path in ("/api/expand", "/api/search"):
        answer = client().get(path, params={"q": text})
        assert answer.status_code == 200
        assert answer.headers["content-type"] == "application/json"
        assert answer.json()["text"] == text
    assert client().get("/api/expand", params={"q": text}).json()["models"][0]["terms"][0]["term"] == text


@pytest.mark.parametrize("path", ["/api/expand", "/api/search"])
@pytest.mark.parametrize(
    ("query", "said"),
    [("", "empty"), ("?q=", "empty"), ("?q=%20%0A", "empty"), (f"?q={'가' * 1001}", "1,001 characters, at most 1,000")],
)
def test_empty_and_long_texts_are_refused_with_the_limit(path, query, said):
    answer = client().get(path + query)
    assert answer.status_code == 400
    assert said in answer.json()["error"]


def test_without_an_index_a_search_says_how_to_give_one():
    answer = client(search=None).get("/api/search?q=물")
    assert (answer.status_code, "--index INDEX" in answer.json()["error"]) == (404, True)
    assert 'data-searches="no"' in client(search=None).get("/").text


def test_a_failing_model_is_told_without_its_details():
    answer = client().get("/api/expand?q=broken")
    assert answer.status_code == 500
    assert "RuntimeError" in answer.json()["error"]
    assert "secret" not in answer.text
    assert client().get("/api/expand?q=mistake").json() == {"error": "the model is gone; restore it"}


@pytest.mark.parametrize("path", [*PATHS, "/nowhere", "/api/expand", "/api/expand?q=broken"])
def test_every_answer_carries_the_guarding_headers(path):
    answer = client().get(path)
    assert {name: answer.headers[name] for name in HEADERS} == HEADERS
    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert "http" not in policy


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.1:9999", "localhost:1", "[::1]:8765", "LOCALHOST"])
def test_names_of_this_machine_are_answered(host):
    assert client(host=host).get("/").status_code == 200


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:8765", "127.0.0.1.evil.example", "localhost.evil.example"]
)
@pytest.mark.parametrize("path", PATHS)
def test_other_names_are_refused_because_of_dns_rebinding(host, path):
    answer = client(host=host).get(path)
    assert answer.status_code == 400
    assert answer.text == "Invalid host header"


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH"])
def test_nothing_can_be_changed(method):
    assert {client().request(method, path).status_code for path in PATHS} == {405}


def test_the_page_escapes_names_and_loads_from_nowhere_else():
    page = client(name=HOSTILE).get("/").text
    assert HOSTILE not in page
    assert "&lt;script&gt;" in page
    assert "style=" not in page
    assert "onclick" not in page
    served = page + "".join(client().get(path).text for path in ("/report.css", "/explore.css", "/explore.js"))
    assert [word for word in served.split() if "://" in word and "www.w3.org/2000/svg" not in word] == []


def test_the_script_never_writes_markup():
    script = client().get("/explore.js").text
    for way in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "DOMParser", "setHTML"):
        assert way not in script


def test_a_taken_port_is_one_sentence_and_port_0_finds_another():
    taken = listen(0)
    try:
        port = taken.getsockname()[1]
        assert url_of(taken) == f"http://127.0.0.1:{port}/"
        with pytest.raises(UserError, match=rf"^port {port}: .*in use; give another with --port") as caught:
            listen(port)
        assert caught.value.exit_code == 2
    finally:
        taken.close()

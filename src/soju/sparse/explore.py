"""A page on this machine that shows what one or two models make of a text: terms, hits, and why. ``soju explore``.

`create_app` is the page and its two questions, ``/api/expand`` and ``/api/search``, as an ASGI application that speaks
to this machine only; it computes nothing, functions are passed in. `serve` answers until Ctrl-C. `Explorer` answers the
questions.
"""

from __future__ import annotations

import os
import re
import socket
import sys
import threading
import webbrowser
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.resources import files
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from pydantic import BaseModel
from starlette.applications import Starlette
from starlette.datastructures import MutableHeaders
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn import Config, Server

from soju.core.errors import UserError
from soju.core.language import Language
from soju.core.results import Hit, MatchedTerm, TermWeight
from soju.report.contents import Expansion, Row, Search
from soju.search.index import SparseIndex
from soju.sparse.indexing import expand, search_index
from soju.sparse.model import TermEncoder, load
from soju.sparse.static.encoder import StaticEncoder
from soju.sparse.term_activation import TermsOf, terms_of


@dataclass(frozen=True, slots=True, kw_only=True)
class ShownTerm(TermWeight):
    """One active term."""

    in_text: bool
    """Whether the text itself holds it; the others were added by the model."""
    only_here: bool
    """Whether no other model on the page activates it at all; false when there is one model."""


class LanguageShare(Row):
    """How much of a vector is in one language."""

    language: Language
    terms: int
    share: float
    """Of the sum of weights, 0–1."""


class ModelExpansion(Row):
    """What one model makes of a text."""

    model: str
    active_terms: int
    languages: tuple[LanguageShare, ...]
    terms: tuple[ShownTerm, ...]
    """The heaviest, heaviest first."""


class Expansions(Row):
    """The answer of ``/api/expand``."""

    text: str
    models: tuple[ModelExpansion, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ShownMatch(MatchedTerm):
    """A term that query and document share."""

    in_query: bool
    """Whether the query itself holds it; the others were added by the model."""


class PassagePart(Row):
    """A stretch of a passage; the parts of a passage joined are the passage."""

    text: str
    term: str | None = None
    """The matched term that stands here."""
    language: Language | None = None
    share: float = 0.0
    """Of the score, 0–1."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ShownHit(Hit):
    """One found document."""

    matched: tuple[ShownMatch, ...] = ()
    parts: tuple[PassagePart, ...]
    only_here: bool
    """Whether no other model on the page found it among its hits; false when only one searches."""


class ModelSearch(Row):
    """What one model found."""

    model: str
    hits: tuple[ShownHit, ...]


class Searches(Row):
    """The answer of ``/api/search``; models without an index are left out."""

    text: str
    models: tuple[ModelSearch, ...]


MAX_CHARACTERS = 1_000
"""Of a text. Queries are far shorter, and this much Korean still fits into a URL."""
HOSTS = ("127.0.0.1", "localhost", "[::1]")
"""Names in the Host header that mean this machine. Others are refused: a web site could point its own name here and
read the answers (DNS rebinding)."""
HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; "
        "base-uri 'none'; form-action 'self'; frame-ancestors 'none'"
    ),
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}
EXAMPLES = ("심장 혈관이 막혔을 때 가슴 통증", "데이터베이스", "how is green tea made", "a house of wood and paper")


@dataclass(frozen=True, slots=True)
class ModelLabel:
    """What the page says about a model."""

    name: str
    index: str = ""
    """Its index in words; empty when there is none."""
    note: str = ""
    """How its weights are to be read."""


def create_app(
    models: Sequence[ModelLabel],
    expand: Callable[[str], Expansions],
    search: Callable[[str], Searches] | None = None,
    *,
    examples: Sequence[str] = EXAMPLES,
) -> ASGIApp:
    """Build the application.

    Args:
        models: One or two, as they stand on the page.
        expand: Answers ``/api/expand``; called in a thread, one text at a time is its own business.
        search: Answers ``/api/search``; none without an index.
        examples: Texts to begin with.

    Returns:
        An ASGI application. Wrong questions are answered with status 400 and ``{"error": sentence}``.
    """
    page = _page(models, searches=search is not None, examples=examples)

    def show(_: Request) -> Response:
        return HTMLResponse(page)

    def answer_expand(request: Request) -> Response:
        return _answer(request, expand)

    def answer_search(request: Request) -> Response:
        if search is None:
            return _refuse("there is no index to search; start soju explore with --index INDEX", status=404)
        return _answer(request, search)

    application = Starlette(
        routes=[
            Route("/", show),
            Route("/api/expand", answer_expand),
            Route("/api/search", answer_search),
            _asset("/report.css", "text/css", "soju.report", "templates/report.css"),
            _asset("/explore.css", "text/css", "soju.sparse", "explore_page/explore.css"),
            _asset("/explore.js", "text/javascript", "soju.sparse", "explore_page/explore.js"),
        ],
        middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=list(HOSTS), www_redirect=False)],
        exception_handlers={Exception: _fail},
    )
    return _WithHeaders(application)


class _WithHeaders:
    """Puts `HEADERS` on every response, those about errors included."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(HEADERS)
            await send(message)

        await self._app(scope, receive, send_with_headers)


def _answer(request: Request, function: Callable[[str], BaseModel]) -> Response:
    text = request.query_params.get("q", "").strip()
    if not text:
        return _refuse("the text is empty; ask with ?q=TEXT")
    if len(text) > MAX_CHARACTERS:
        return _refuse(f"the text has {len(text):,} characters, at most {MAX_CHARACTERS:,} are shown; shorten it")
    try:
        return Response(function(text).model_dump_json(), media_type="application/json")
    except UserError as error:
        return _refuse(str(error))


def _refuse(reason: str, *, status: int = 400) -> Response:
    return JSONResponse({"error": reason}, status_code=status)


def _fail(_: Request, error: Exception) -> Response:
    return _refuse(f"soju failed with {type(error).__name__}; the terminal it runs in says where", status=500)


def _page(models: Sequence[ModelLabel], *, searches: bool, examples: Sequence[str]) -> str:
    environment = Environment(
        loader=PackageLoader("soju.sparse", "explore_page"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    template = environment.get_template("explore.html")
    return template.render(models=models, searches=searches, examples=examples, limit=MAX_CHARACTERS)


def _asset(path: str, media_type: str, package: str, name: str) -> Route:
    content = files(package).joinpath(name).read_bytes()

    def send_asset(_: Request) -> Response:
        return Response(content, media_type=media_type)

    return Route(path, send_asset)


ADDRESS = "127.0.0.1"
"""Nothing outside this machine can connect. From elsewhere: ``ssh -L PORT:127.0.0.1:PORT machine``."""
_LONGEST_REQUEST = 65_536
"""Bytes of a request's head; a Korean character takes nine in a URL."""


def listen(port: int) -> socket.socket:
    """Take a port of this machine."""
    listening = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    if os.name == "posix":  # a port that was just in use may be taken again; on Windows this would let two share one
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((ADDRESS, port))
        listening.listen()  # elsewhere bind succeeds beside a listener of the same address
    except OSError as error:
        listening.close()
        reason = (error.strerror or str(error)).lower()
        raise UserError(f"port {port}: {reason}; give another with --port, or --port 0 for any that is free") from None
    return listening


def url_of(listening: socket.socket) -> str:
    """Return the address of the page."""
    return f"http://{ADDRESS}:{listening.getsockname()[1]}/"


def make_server(app: ASGIApp) -> Server:
    """Set up what answers requests: one process, no log of what is asked, errors on standard error."""
    return Server(
        Config(
            app,
            http="h11",
            ws="none",
            lifespan="off",
            log_level="warning",
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=3,
            h11_max_incomplete_event_size=_LONGEST_REQUEST,
        )
    )


def serve(app: ASGIApp, listening: socket.socket, *, browser: bool) -> None:
    """Answer requests until Ctrl-C; then finish what is under way and return."""
    if browser and _has_screen():
        threading.Thread(target=webbrowser.open, args=(url_of(listening),), daemon=True).start()
    try:
        make_server(app).run(sockets=[listening])
    except KeyboardInterrupt:  # uvicorn has shut down and passes the signal on
        pass
    finally:
        listening.close()


def _has_screen() -> bool:
    """Tell whether a browser would open a window; a text browser would take the terminal."""
    return sys.platform in ("darwin", "win32") or any(os.environ.get(name) for name in ("DISPLAY", "WAYLAND_DISPLAY"))


MAX_TERMS = 200
"""Heaviest terms of a text that are sent to the page."""
HITS = 10
_STATIC_NOTE = "Weights count occurrences and translations; an index multiplies them with its idf."
_HANGUL = "\u1100-\u11ff\u3130-\u318f가-힣"
_WORD = re.compile(rf"[{_HANGUL}]+|[^\W{_HANGUL}]+")
"""A run of Hangul, or of other letters and digits: ``AI를`` is two, so that each can be marked alone."""


@dataclass(frozen=True)
class ExploredModel:
    """A model, and the index that was made with it."""

    name: str
    encoder: TermEncoder
    terms_of: TermsOf
    """From texts to the ids of the terms that stand in them."""
    index: SparseIndex | None = None

    def names_in(self, texts: Sequence[str]) -> list[set[str]]:
        """Name the terms that stand in each text, unexpanded."""
        names = self.encoder.terms
        # A space before, because byte-level vocabularies spell the start of a word with it.
        return [{names[term] for term in terms} for terms in self.terms_of([f" {text}" for text in texts])]

    @property
    def label(self) -> ModelLabel:
        """Say on the page what this is."""
        index = self.index
        size = "" if index is None else f"{index.documents:,} documents, {index.chunks:,} passages"
        return ModelLabel(self.name, size, _STATIC_NOTE if isinstance(self.encoder, StaticEncoder) else "")


def open_models(model: str, *, against: str | None = None, indexes: Sequence[Path] = ()) -> list[ExploredModel]:
    """Load one or two models and give each its index."""
    names = [model] if against is None else [model, against]
    loaded = [load(name) for name in names]
    opened: dict[str, SparseIndex] = {}
    for folder in indexes:
        index = SparseIndex.open(folder)
        made_with = index.description.fingerprint
        if made_with not in {found.fingerprint for found in loaded}:
            raise UserError(
                f"{folder}: was made with another model than {' or '.join(names)}; "
                f"index the corpus again with one of them, or explore {folder / 'model'}"
            )
        if made_with in opened:
            raise UserError(f"{folder}: a second index of the same model; give one index a model")
        opened[made_with] = index
    return [
        ExploredModel(name, found.encoder, terms_of(found.encoder), opened.get(found.fingerprint))
        for name, found in zip(names, loaded, strict=True)
    ]


class Explorer:
    """Answers the page's questions, one text at a time: tokenizers may not be called from two threads at once."""

    def __init__(self, models: Sequence[ExploredModel]) -> None:
        self._models = tuple(models)
        self._lock = threading.Lock()

    @property
    def searches(self) -> bool:
        """Tell whether any model has an index."""
        return any(model.index is not None for model in self._models)

    def expand(self, text: str) -> Expansions:
        """Say what each model activates for a text, and which terms only it does."""
        with self._lock:
            found = [expand(model.encoder, [text], k=len(model.encoder.terms))[0] for model in self._models]
            own = [model.names_in([text])[0] for model in self._models]
        names = [{term.term for term in expansion.terms} for expansion in found]
        return Expansions(
            text=text,
            models=tuple(
                _shown_expansion(model.name, expansion, own[place], _others(names, place))
                for place, (model, expansion) in enumerate(zip(self._models, found, strict=True))
            ),
        )

    def search(self, text: str) -> Searches:
        """Say what each model with an index finds for a text, and why."""
        with self._lock:
            searching = [(model, model.index) for model in self._models if model.index is not None]
            found = [search_index(index, model.encoder, [text], k=HITS)[0] for model, index in searching]
            ids = [{hit.document_id for hit in search.hits} for search in found]
            return Searches(
                text=text,
                models=tuple(
                    ModelSearch(model=model.name, hits=_shown_hits(model, found[place], _others(ids, place)))
                    for place, (model, _) in enumerate(searching)
                ),
            )


def passage_parts(passage: str, matched: Sequence[MatchedTerm], terms_in: Mapping[str, set[str]]) -> list[PassagePart]:
    """Cut a passage where its matched terms stand.

    Args:
        passage: The text that was found.
        matched: Terms it shares with the query.
        terms_in: Names of the terms in each word of the passage; see `words_of`.

    Returns:
        Parts that joined are the passage. In a run of Hangul only the term itself is marked where it can be seen
        (혈관 of 혈관이), elsewhere the whole word (vessels for vessel).
    """
    by_name = {term.term: term for term in matched}
    total = sum(term.contribution for term in matched) or 1.0
    parts: list[PassagePart] = []
    end = 0
    for start, stop, term in _spans(passage, by_name, terms_in):
        if start > end:
            parts.append(PassagePart(text=passage[end:start]))
        share = term.contribution / total
        parts.append(PassagePart(text=passage[start:stop], term=term.term, language=term.language, share=share))
        end = stop
    if end < len(passage):
        parts.append(PassagePart(text=passage[end:]))
    return parts


def words_of(passage: str) -> list[str]:
    """Return the runs of letters and digits of a passage."""
    return _WORD.findall(passage)


def _spans(
    passage: str, by_name: Mapping[str, MatchedTerm], terms_in: Mapping[str, set[str]]
) -> Iterator[tuple[int, int, MatchedTerm]]:
    for word in _WORD.finditer(passage):
        terms = [by_name[name] for name in terms_in.get(word.group(), ()) if name in by_name]
        if not terms:
            continue
        # The heaviest term of a word names it; equal ones by name, so that a page looks the same twice.
        term = min(terms, key=lambda item: (-item.contribution, item.term))
        place = word.group().find(term.term.strip("…")) if term.language == "ko" else -1
        if place < 0:
            yield *word.span(), term
        else:
            yield word.start() + place, word.start() + place + len(term.term.strip("…")), term


def _shown_expansion(name: str, expansion: Expansion, own: set[str], others: set[str] | None) -> ModelExpansion:
    total = sum(term.weight for term in expansion.terms)
    weights: dict[str, list[float]] = {}
    for term in expansion.terms:
        weights.setdefault(term.language, []).append(term.weight)
    return ModelExpansion(
        model=name,
        active_terms=len(expansion.terms),
        languages=tuple(
            LanguageShare(language=language, terms=len(weights[language]), share=sum(weights[language]) / total)
            for language in ("ko", "en", "other")
            if language in weights
        ),
        terms=tuple(
            ShownTerm(
                term=term.term,
                language=term.language,
                weight=term.weight,
                in_text=term.term in own,
                only_here=others is not None and term.term not in others,
            )
            for term in expansion.terms[:MAX_TERMS]
        ),
    )


def _shown_hits(model: ExploredModel, found: Search, others: set[str] | None) -> tuple[ShownHit, ...]:
    (own,) = model.names_in([found.query])
    words = sorted({word for hit in found.hits for word in words_of(hit.passage)})
    terms_in = dict(zip(words, model.names_in(words), strict=True)) if words else {}
    return tuple(_shown_hit(hit, own, terms_in, others) for hit in found.hits)


def _shown_hit(hit: Hit, own: set[str], terms_in: Mapping[str, set[str]], others: set[str] | None) -> ShownHit:
    return ShownHit(
        rank=hit.rank,
        document_id=hit.document_id,
        score=hit.score,
        passage=hit.passage,
        matched=tuple(ShownMatch(**asdict(term), in_query=term.term in own) for term in hit.matched),
        parts=tuple(passage_parts(hit.passage, hit.matched, terms_in)),
        only_here=others is not None and hit.document_id not in others,
    )


def _others(sets: Sequence[set[str]], place: int) -> set[str] | None:
    """Join all sets but one; none when there is no other."""
    others = [items for other, items in enumerate(sets) if other != place]
    return set().union(*others) if others else None

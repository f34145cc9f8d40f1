"""The page and its two questions, as an ASGI application that speaks to this machine only."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.resources import files

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

from soju.core.errors import UserError
from soju.sparse.explore.answers import Expansions, Searches

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
            _asset("/explore.css", "text/css", "soju.sparse.explore", "assets/explore.css"),
            _asset("/explore.js", "text/javascript", "soju.sparse.explore", "assets/explore.js"),
        ],
        middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=list(HOSTS), www_redirect=False)],
        exception_handlers={Exception: _fail},
    )
    return _Guarded(application)


class _Guarded:
    """Puts `HEADERS` on every response, those about errors included."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(HEADERS)
            await send(message)

        await self._app(scope, receive, send_guarded)


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
        loader=PackageLoader("soju.sparse.explore", "assets"),
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

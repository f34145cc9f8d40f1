"""Serve the page on this machine until Ctrl-C."""

from __future__ import annotations

import os
import socket
import sys
import threading
import webbrowser

from starlette.types import ASGIApp
from uvicorn import Config, Server

from soju.core.errors import UserError

ADDRESS = "127.0.0.1"
"""Nothing outside this machine can connect. From elsewhere: ``ssh -L PORT:127.0.0.1:PORT machine``."""
_LONGEST_REQUEST = 65_536
"""Bytes of a request's head; a Korean character takes nine in a URL."""


def listen(port: int) -> socket.socket:
    """Take a port of this machine.

    Args:
        port: Its number; 0 takes any that is free.

    Returns:
        A bound socket.

    Raises:
        UserError: If the port is taken or not ours to take.
    """
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
    """Answer requests until Ctrl-C; then finish what is under way and return.

    Args:
        app: What to serve.
        listening: From `listen`; closed at the end.
        browser: Whether to open the page in the user's browser, where there is a screen.
    """
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

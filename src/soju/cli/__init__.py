"""The command line: parses, calls, exits. Imports lazily so that ``soju --help`` loads no torch."""

from soju.cli import models, runs, search
from soju.cli.console import app, main

__all__ = ["app", "main", "models", "runs", "search"]

"""The command line: parses, calls, exits. Imports lazily so that ``soju --help`` loads no torch."""

from soju.cli import benchmarking, converting, expanding, exploring, mining, searching, training, vectors
from soju.cli.console import app, main

__all__ = [
    "app",
    "benchmarking",
    "converting",
    "expanding",
    "exploring",
    "main",
    "mining",
    "searching",
    "training",
    "vectors",
]

"""The command line: parses, calls, exits. Imports lazily so that ``soju --help`` loads no torch."""


def main() -> None:
    """Run one verb."""

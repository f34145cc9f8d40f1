"""Run the command line with ``python -m soju``."""

from soju.cli import main

main()

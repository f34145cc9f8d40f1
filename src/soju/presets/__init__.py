"""The YAML files that ship with soju: ``soju presets``."""

from __future__ import annotations

from pathlib import Path

from soju.core.errors import UserError

_FOLDER = Path(__file__).parent


def preset_names() -> list[str]:
    """Return the names of all presets, sorted."""
    return sorted(path.stem for path in _FOLDER.rglob("*.yaml"))


def preset_text(name: str) -> str:
    """Return a preset as it is written.

    Args:
        name: One of `preset_names`.

    Returns:
        YAML with its comments.

    Raises:
        UserError: If there is none of that name.
    """
    for path in _FOLDER.rglob("*.yaml"):
        if path.stem == name:
            return path.read_text(encoding="utf-8")
    raise UserError(f'no preset is called "{name}"; there are {", ".join(preset_names())}')

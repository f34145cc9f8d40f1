"""State beside model and optimiser: controllers, gates, curriculum, as JSON and safetensors in the checkpoint."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import load_file, save_file

from soju.core.errors import UserError
from soju.core.files import write_json

_PLAIN = "extra_state.json"
_TENSORS = "extra_state.safetensors"


class Stateful(Protocol):
    """Anything that can be put aside and picked up again, equal on every rank."""

    def state_dict(self) -> Mapping[str, Any]:
        """Return tensors and JSON values by name. JSON turns tuples into lists."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> Any:
        """Take back what `state_dict` returned."""
        ...


def write_extra_state(folder: Path, parts: Mapping[str, Stateful]) -> None:
    """Write the state of all parts.

    Args:
        folder: The checkpoint being written.
        parts: By name; a name holds no ``/``.
    """
    plain: dict[str, dict[str, Any]] = {}
    tensors: dict[str, torch.Tensor] = {}
    for name, part in parts.items():
        plain[name] = {}
        for key, value in part.state_dict().items():
            if isinstance(value, torch.Tensor):
                tensors[f"{name}/{key}"] = value.detach().cpu().clone().contiguous()
            else:
                plain[name][key] = value
    write_json(folder / _PLAIN, plain)
    save_file(tensors, folder / _TENSORS)


def read_extra_state(folder: Path, parts: Mapping[str, Stateful]) -> None:
    """Give every part its state back.

    Args:
        folder: A verified checkpoint.
        parts: The same names that were written.

    Raises:
        UserError: If the names differ: the run was started with other settings.
    """
    plain = json.loads((folder / _PLAIN).read_text(encoding="utf-8"))
    if plain.keys() != parts.keys():
        raise UserError(
            f"{folder}: holds the state of {_names(plain)}, this run has {_names(parts)}; resume with the settings it "
            "was started with"
        )
    tensors = load_file(folder / _TENSORS)
    for name, part in parts.items():
        own = {key.partition("/")[2]: value for key, value in tensors.items() if key.partition("/")[0] == name}
        part.load_state_dict({**plain[name], **own})


def _names(parts: Mapping[str, Any]) -> str:
    return ", ".join(sorted(parts)) or "nothing"

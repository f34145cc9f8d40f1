"""What a checkpoint holds besides model and optimiser: random state, the open logging window, controllers and gates.

Stateful parts are written as JSON and safetensors, never as a pickle. The shape of the run is among them, so that a
resume goes on with the same run or is refused.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from soju.core.errors import UserError
from soju.core.files import write_json


@dataclass(frozen=True, slots=True)
class RandomState:
    """State of all generators of this process."""

    python: Any
    numpy: Any
    cpu: torch.Tensor
    cuda: torch.Tensor | None

    @classmethod
    def take(cls) -> RandomState:
        """Return the state as it is now."""
        cuda = torch.cuda.get_rng_state() if torch.cuda.is_available() else None
        return cls(random.getstate(), np.random.get_state(), torch.get_rng_state(), cuda)  # noqa: NPY002

    def restore(self) -> None:
        """Set all generators to this state."""
        random.setstate(self.python)
        np.random.set_state(self.numpy)  # noqa: NPY002
        torch.set_rng_state(self.cpu)
        if self.cuda is not None:
            torch.cuda.set_rng_state(self.cuda)


@contextmanager
def kept_random_state() -> Iterator[RandomState]:
    """Undo whatever the block does to the generators."""
    state = RandomState.take()
    try:
        yield state
    finally:
        state.restore()


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Run the block from a seed and leave the CPU generators as they were."""
    state = RandomState(random.getstate(), np.random.get_state(), torch.get_rng_state(), None)  # noqa: NPY002
    try:
        random.seed(seed)
        np.random.seed(seed % 2**32)  # noqa: NPY002
        torch.default_generator.manual_seed(seed)
        yield
    finally:
        state.restore()


_PLAIN = "extra_state.json"
_TENSORS = "extra_state.safetensors"


class Stateful(Protocol):
    """Anything with a state to save and load, equal on every rank."""

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


class RunState:
    """Shape of the run, learning rate scale and the open logging window of a `ReliableTrainer`."""

    def __init__(self, trainer: Any, totals: Sequence[Mapping[str, tuple[float, int]]] = ()) -> None:
        self._trainer = trainer
        self._totals = totals
        """Of each rank: added up in another order they would differ in the last digit."""
        self.learning_rate_scale: float = trainer._learning_rate_scale
        """After `load_state_dict`: the scale the checkpoint was trained with."""

    def state_dict(self) -> dict[str, Any]:
        """Return JSON values."""
        window = self._trainer._window
        return {
            **self._shape(),
            "learning_rate_scale": self.learning_rate_scale,
            "totals": list(self._totals),
            "steps": window.steps,
            "refused": window.refused,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what `state_dict` returned.

        Args:
            state: From a checkpoint.

        Raises:
            UserError: If rows, batch, accumulation or number of processes differ: no step would be the same.
        """
        differences = [
            f"{name} {value} (now {self._shape()[name]})"
            for name, value in state.items()
            if name in self._shape() and value != self._shape()[name]
        ]
        if differences:
            raise UserError(
                f"the checkpoint was trained with {', '.join(differences)}; resume with the same, or start a new run "
                "from its weights"
            )
        self.learning_rate_scale = float(state["learning_rate_scale"])
        arguments = self._trainer.args
        self._trainer._window.load(
            state["totals"][arguments.process_index],
            steps=state["steps"],
            refused=state["refused"],
            device=arguments.device,
        )

    def _shape(self) -> dict[str, int | None]:
        arguments, rows = self._trainer.args, self._trainer.train_dataset
        return {
            "processes": arguments.world_size,
            "per_device_train_batch_size": arguments.per_device_train_batch_size,
            "gradient_accumulation_steps": arguments.gradient_accumulation_steps,
            "rows": len(rows) if hasattr(rows, "__len__") else None,
        }


class LossParameters(dict[str, nn.Parameter]):
    """Trainable parameters that belong to the losses and not to the model; sentence-transformers saves none of them."""

    def __init__(self, losses: Iterable[Any], model: nn.Module) -> None:
        of_model = {id(parameter) for parameter in model.parameters()}
        super().__init__(
            {
                f"{number}.{name}": parameter
                for number, loss in enumerate(losses)
                if isinstance(loss, nn.Module)
                for name, parameter in loss.named_parameters()
                if parameter.requires_grad and id(parameter) not in of_model
            }
        )

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Return the parameters by name."""
        return dict(self)

    def load_state_dict(self, state: Mapping[str, torch.Tensor]) -> None:
        """Copy the values into the parameters."""
        with torch.no_grad():
            for name, parameter in self.items():
                parameter.copy_(state[name])

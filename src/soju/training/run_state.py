"""What a checkpoint must say about the run, so that a resume goes on with the same one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from soju.core.errors import UserError


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

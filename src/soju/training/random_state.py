"""Random state of Python, NumPy and PyTorch: kept over work that must not move it."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch


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

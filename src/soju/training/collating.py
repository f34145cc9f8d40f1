"""Collating a batch as a pure function of seed, epoch and rows."""

from __future__ import annotations

import hashlib
import json
import signal
from collections.abc import Callable, Mapping
from typing import Any

import torch

from soju.training.random_state import seeded


class SeededCollator:
    """A collator whose randomness (masked tokens, dropped words) does not depend on what was collated before.

    The data loader collates ahead of training, so a collator that draws from the global generators cannot be resumed:
    at a checkpoint they have moved past batches that the resumed run collates again.
    """

    def __init__(self, collate: Callable[[Any], Any], *, seed: int) -> None:
        self.collate = collate
        self.seed = seed
        self._epoch = torch.zeros((), dtype=torch.int64)
        self._epoch.share_memory_()  # type: ignore[no-untyped-call]  # seen by workers that live over epochs

    def set_epoch(self, epoch: int) -> None:
        """Tell which pass over the data begins."""
        self._epoch.fill_(epoch)

    def __call__(self, rows: Any) -> Any:
        """Collate rows; the global generators stay where they are."""
        content = json.dumps([self.seed, int(self._epoch), rows], default=_content).encode("utf-8", "surrogatepass")
        with seeded(int.from_bytes(hashlib.blake2b(content, digest_size=7).digest(), "little")):
            return self.collate(rows)


def start_worker(start: Callable[[int], None] | None, worker: int) -> None:
    """Leave Ctrl-C to the main process, which needs its workers until it has saved, then start as before."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if start is not None:
        start(worker)


def _content(value: Any) -> Any:
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, bytes):
        return value.hex()
    return value.tolist() if hasattr(value, "tolist") else type(value).__qualname__

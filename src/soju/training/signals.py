"""A signal asks a training run to save and stop; a second one stops it at once."""

from __future__ import annotations

import logging
import signal
import threading
from types import FrameType, TracebackType
from typing import Any, Self

logger = logging.getLogger(__name__)


class StopSignals:
    """Context in which SIGTERM and SIGINT are noted instead of obeyed.

    The stock ``enable_jit_checkpoint`` does not serve: it knows no SIGINT, leaves exit code 0, waits three seconds in
    a thread, and may save between the micro-batches of a step, from where a resume cannot be exact.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        """Number of the first signal that came, or ``None``."""
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Self:
        self.received = None
        if threading.current_thread() is threading.main_thread():  # Python lets only the main thread do this
            for number in (signal.SIGTERM, signal.SIGINT):
                self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._restore()

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None:
            self._restore()
            raise KeyboardInterrupt
        self.received = number
        name = signal.Signals(number).name
        logger.warning("%s: saving a checkpoint at the end of this step; again to stop at once", name)

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()

"""The Korean morphological analyser, one instance for the whole process."""

from __future__ import annotations

import threading

from kiwipiepy import Kiwi

_kiwis: dict[int, Kiwi] = {}
_lock = threading.Lock()


def shared_kiwi(workers: int = 1) -> Kiwi:
    """Return the process's Kiwi with this many threads, made at first use (about 2 seconds, 0.5 GB).

    It may be called from several threads.
    """
    with _lock:
        if workers not in _kiwis:
            _kiwis[workers] = Kiwi(num_workers=workers)
        return _kiwis[workers]

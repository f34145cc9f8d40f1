"""``verdicts.jsonl``: what the gate decided at which step."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from soju.core.files import append_json_line, read_json_lines
from soju.core.score import Score
from soju.training.gate import Verdict


def record_verdict(
    path: Path, verdict: Verdict, *, where: str, step: int | None = None, attempt: int = 0, scores: Sequence[Score] = ()
) -> None:
    """Append a verdict; it is on the disk when this returns.

    Args:
        path: ``verdicts.jsonl`` of the run.
        verdict: What was decided.
        where: ``training``, ``quantization``, ``export`` ...
        step: Optimiser step, during training.
        attempt: Number of the attempt, from 0. See `train_with_rollback`.
        scores: What was judged. A value that is not finite becomes ``null``.
    """
    row = {"where": where, "step": step, "attempt": attempt, **verdict.to_json()}
    append_json_line(path, {**row, "scores": [_plain(score) for score in scores]})


def read_verdicts(path: Path) -> list[dict[str, Any]]:
    """Read ``verdicts.jsonl``; no file is no verdicts."""
    return read_json_lines(path)


def passed_steps(rows: Iterable[Mapping[str, Any]]) -> set[int]:
    """Return the training steps whose last verdict let them pass.

    >>> passed_steps([{"where": "training", "step": 10, "passed": True}])
    {10}
    """
    last = {row["step"]: row["passed"] for row in rows if row["where"] == "training" and row["step"] is not None}
    return {step for step, passed in last.items() if passed}


def _plain(score: Score) -> dict[str, Any]:
    value = score.to_json()
    return {**value, "value": value["value"] if math.isfinite(value["value"]) else None}

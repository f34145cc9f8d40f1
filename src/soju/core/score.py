"""A number that travels with its meaning: name, value, unit, direction, interval, signature."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Self

from soju import __version__


def signature(**settings: object) -> str:
    """Join everything that decides a score into one comparable string, sorted by key.

    Two scores may be compared only when their signatures are equal.

    >>> signature(metric="ndcg", k=10).split("|version")[0]
    'k:10|metric:ndcg'
    """
    pairs = [f"{key}:{value}" for key, value in sorted(settings.items())]
    return "|".join([*pairs, f"version:soju-{__version__}"])


@dataclass(frozen=True, slots=True)
class Interval:
    """A confidence interval, both ends in the unit of its score."""

    low: float
    high: float
    level: float = 0.95


@dataclass(frozen=True, slots=True)
class Score:
    """One measured value."""

    name: str
    """The metric, for example ``recall@10``."""
    subject: str
    """The system that was measured, for example ``bm25``."""
    test_set: str
    """What it was measured on, with the direction where there is one: ``parallel.dev/ko-en``."""
    value: float
    unit: str
    """``fraction``, ``terms``, ``bytes``, ``milliseconds`` ..."""
    higher_is_better: bool
    signature: str
    """Everything that decides the value except the subject. See `signature`."""
    interval: Interval | None = None

    def to_json(self) -> dict[str, Any]:
        """Return a plain dictionary for ``scores.json``."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Self:
        """Read what `to_json` wrote."""
        interval = value.get("interval")
        return cls(**{**value, "interval": Interval(**interval) if interval else None})

"""Results that travel with their meaning: scores with unit, direction and signature; comparisons; hits, their terms."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Annotated, Any, Self

from pydantic import Field

from soju.core import __version__
from soju.core.language import Language


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
    """One measured value.

    >>> import soju
    >>> score = soju.Score("recall@10", "bm25", "dev/ko-en", 0.25, "fraction", True, "k:10|metric:recall")
    >>> soju.Score.from_json(score.to_json()) == score
    True
    """

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


@dataclass(frozen=True, slots=True)
class Comparison:
    """How far one system is from another on the same queries.

    >>> import soju
    >>> interval = {"low": 0.1, "high": 0.3, "level": 0.95}
    >>> soju.Comparison.from_json({
    ...     "subject": "student", "baseline": "bm25", "test_set": "dev/ko-en", "metric": "recall@10",
    ...     "difference": 0.2, "interval": interval, "p_value": 0.01, "samples": 2000, "seed": 0,
    ... }).interval.low
    0.1
    """

    subject: str
    baseline: str
    test_set: str
    metric: str
    difference: float
    """Mean of subject minus baseline, in the unit of the metric."""
    interval: Interval
    p_value: Annotated[float, Field(ge=0, le=1)]
    """Two-sided, for no difference in the mean; at least ``1 / (samples + 1)``."""
    samples: int
    seed: int

    def to_json(self) -> dict[str, Any]:
        """Return a plain dictionary."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Self:
        """Read what `to_json` wrote."""
        return cls(**{**value, "interval": Interval(**value["interval"])})


@dataclass(frozen=True, slots=True)
class Setting:
    """A system and the data it is measured on."""

    subject: str
    """The system, for example ``bm25``."""
    test_set: str
    """Name of the data, with the direction where there is one: ``parallel.dev/ko-en``."""
    data_hash: str
    """Hash of the texts that are measured, so that scores on other data are never compared."""

    @classmethod
    def of_texts(cls, texts: Sequence[str], *, subject: str, test_set: str) -> Self:
        """Hash the texts that are measured; order matters."""
        digest = hashlib.sha256(json.dumps(list(texts)).encode()).hexdigest()[:16]
        return cls(subject, test_set, digest)

    def score(
        self,
        name: str,
        value: float,
        *,
        unit: str,
        higher_is_better: bool,
        interval: Interval | None = None,
        **decisive: object,
    ) -> Score:
        """Return a score whose signature is `name`, the data and everything in `decisive`.

        `name` has the cut-off in it (``recall@10``), `unit` is that of value and interval, and `decisive` is what else
        decides the value apart from the system.
        """
        return Score(
            name=name,
            subject=self.subject,
            test_set=self.test_set,
            value=float(value),
            unit=unit,
            higher_is_better=higher_is_better,
            signature=signature(metric=name, data=self.data_hash, **decisive),
            interval=interval,
        )


@dataclass(frozen=True, slots=True)
class TermWeight:
    """One active term of a text.

    >>> import soju
    >>> (heaviest,) = soju.load("ko-en-static").expand("물", k=1)
    >>> heaviest == soju.TermWeight("물", "ko", heaviest.weight)
    True
    """

    term: str
    language: Language
    weight: float
    """Unitless, above 0; of a static model's queries without the idf, which the index adds."""


@dataclass(frozen=True, slots=True)
class MatchedTerm:
    """One term that the query and the passage share.

    >>> import soju
    >>> match = soju.MatchedTerm("heart", "en", query_weight=2.0, document_weight=0.5, contribution=1.0)
    >>> match.query_weight * match.document_weight == match.contribution
    True
    """

    term: str
    language: Language
    query_weight: float
    """Weight in the query, idf included."""
    document_weight: float
    """Impact in the passage."""
    contribution: float
    """``query_weight * document_weight``: its part of the score."""


@dataclass(frozen=True, slots=True)
class Hit:
    """One document that was found, through its best passage.

    >>> import soju
    >>> soju.Hit(rank=1, document_id="tea", score=1.5, passage="Green tea.").matched
    ()
    """

    rank: int
    """From 1."""
    document_id: str
    score: float
    """Sum of the contributions, unitless; comparable within one query only."""
    passage: str
    """The part of the document that matched."""
    matched: tuple[MatchedTerm, ...] = ()
    """Largest contribution first; empty when no explanation was asked for."""
    start: Annotated[int, Field(exclude=True)] = 0
    """Where the passage starts in the document, in characters. JSON leaves out both ends."""
    end: Annotated[int | None, Field(exclude=True)] = None
    """Where it ends; ``None`` when the passage is the whole of what was searched."""

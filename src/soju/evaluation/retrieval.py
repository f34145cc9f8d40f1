"""Retrieval metrics: nDCG, MRR and recall of rankings against judged documents.

Shape letter: Q = queries.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from soju.core.errors import UserError
from soju.core.results import Score, Setting
from soju.evaluation.significance import Measurement, mean_interval

METRICS = ("ndcg@10", "mrr@10", "recall@1", "recall@10", "recall@100", "recall@1000")
"""What `evaluate` measures unless told otherwise."""


@dataclass(frozen=True)
class RetrievalSet:
    """Queries, documents and which document answers which query. Made by `create` or `from_pairs`."""

    name: str
    queries: Mapping[str, str]
    """Query id -> text."""
    documents: Mapping[str, str]
    """Document id -> text."""
    judgements: Mapping[str, Mapping[str, float]]
    """Query id -> relevant document id -> gain >= 1, unitless. Unjudged documents have gain 0."""

    @classmethod
    def create(
        cls,
        name: str,
        queries: Mapping[str, str],
        documents: Mapping[str, str],
        judgements: Mapping[str, Mapping[str, float] | Iterable[str]],
    ) -> RetrievalSet:
        """Check and make a test set; a plain set of relevant documents means gain 1 for each.

        ``name`` is what scores call the set, with the direction where there is one. Refused (`UserError`) are a set
        without queries, a query without relevant documents, a judgement of an unknown query or document, and a gain
        below 1.
        """
        if not queries:
            raise UserError(f"{name}: no query; give at least one")
        if unknown := [query for query in judgements if query not in queries]:
            raise UserError(f'{name}: query "{unknown[0]}" is judged but not among the queries; remove its judgements')
        checked: dict[str, Mapping[str, float]] = {}
        for query in queries:
            found = judgements.get(query, {})
            gains = dict(found) if isinstance(found, Mapping) else dict.fromkeys(found, 1.0)
            if not gains:
                raise UserError(f'{name}: query "{query}" has no relevant document; judge one or drop the query')
            for document, gain in gains.items():
                place = f'{name}: query "{query}": document "{document}"'
                if document not in documents:
                    raise UserError(f"{place} is judged but not among the documents; add it")
                if not 1 <= gain < float("inf"):
                    raise UserError(f"{place} has gain {gain}; give 1 or more, or leave it out when irrelevant")
            checked[query] = gains
        return cls(name, queries, documents, checked)

    @classmethod
    def from_pairs(cls, name: str, queries: Sequence[str], documents: Sequence[str]) -> RetrievalSet:
        """Make a test set in which document i is the only answer to query i; ids are "0", "1", ..."""
        if len(queries) != len(documents):
            raise UserError(f"{name}: {len(queries):,} queries and {len(documents):,} documents; give pairs")
        ids = [str(index) for index in range(len(queries))]
        judgements = {index: {index: 1.0} for index in ids}
        return cls.create(
            name, dict(zip(ids, queries, strict=True)), dict(zip(ids, documents, strict=True)), judgements
        )

    @cached_property
    def hash(self) -> str:
        """First 16 hexadecimal digits of the SHA-256 over queries, documents and judgements, in their order."""
        judgements = {query: sorted(gains.items()) for query, gains in self.judgements.items()}
        parts = [list(self.queries.items()), list(self.documents.items()), judgements]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]

    def run_of(self, rankings: Sequence[Iterable[int]]) -> dict[str, list[str]]:
        """Turn positions in `documents`, best first, one ranking a query in the order of `queries`, into a run of ids.

        The run is what `evaluate` takes: query id -> document ids.
        """
        if len(rankings) != len(self.queries):
            raise UserError(f"{self.name}: {len(rankings):,} rankings for {len(self.queries):,} queries; give one each")
        ids = list(self.documents)
        run: dict[str, list[str]] = {}
        for query, ranking in zip(self.queries, rankings, strict=True):
            positions = [int(position) for position in ranking]
            if outside := [position for position in positions if not 0 <= position < len(ids)]:
                place = f'{self.name}: query "{query}"'
                raise UserError(f"{place}: no document at position {outside[0]}; index the documents of this set")
            run[query] = [ids[position] for position in positions]
        return run


@dataclass(frozen=True, slots=True, eq=False)
class RetrievalResult:
    """What `evaluate` measured."""

    measurements: list[Measurement]
    """One a metric, with the value of each query for `soju.evaluation.significance.compare`."""
    missing: int
    """Queries without a ranking in the run; they scored 0."""

    @property
    def scores(self) -> list[Score]:
        """The scores alone."""
        return [measurement.score for measurement in self.measurements]

    def measurement(self, metric: str) -> Measurement:
        """Return one metric, for example ``recall@10``, with its per-query values."""
        for measurement in self.measurements:
            if measurement.score.name == metric:
                return measurement
        raise UserError(f'"{metric}" was not measured; there are {", ".join(score.name for score in self.scores)}')


def evaluate(
    run: Mapping[str, Sequence[str]],
    test_set: RetrievalSet,
    *,
    subject: str,
    metrics: Sequence[str] = METRICS,
    samples: int = 2_000,
    seed: int = 0,
    decisive: Mapping[str, object] | None = None,
) -> RetrievalResult:
    """Score a run. All metrics are fractions in [0, 1], higher is better, means over **all** queries of the test set.

    - ``ndcg@k``: Σ gain / log2(rank + 1) over the first k, divided by that of the best possible ranking cut at k. The
      gain is linear, like ``ndcg_cut`` of trec_eval, not 2^gain − 1.
    - ``mrr@k``: 1 / rank of the first relevant document among the first k, else 0.
    - ``recall@k``: share of the relevant documents among the first k.

    A query that the run lacks scores 0 and is counted in `RetrievalResult.missing`. Rankings are taken as they come:
    whoever made them has decided ties.

    Args:
        run: Query id -> document ids, best first.
        test_set: Queries, documents and judgements.
        subject: Name of the system.
        metrics: Metrics with cut-off.
        samples: Resamples for the 95 % interval of each mean; none is given for a single query, or when this is 0.
        seed: Seed of the resampling.
        decisive: What else decides the values, apart from the system, for the signatures.

    Returns:
        Scores with per-query values in the order of ``test_set.queries``.

    Raises:
        UserError: If the run has an unknown query or document or ranks a document twice, or a metric is unknown.

    References:
        Järvelin and Kekäläinen 2002 (nDCG). Craswell 2009 (MRR).
    """
    _check_run(run, test_set)
    setting = Setting(subject, test_set.name, test_set.hash)
    measurements = []
    for metric in metrics:
        name, k = _parse(metric)
        values_Q = np.array([_METRICS[name](run.get(q, ()), gains, k) for q, gains in test_set.judgements.items()])
        score = setting.score(
            metric,
            values_Q.mean(),
            unit="fraction",
            higher_is_better=True,
            interval=mean_interval(values_Q, samples=samples, seed=seed) if samples and len(values_Q) > 1 else None,
            k=k,
            queries=len(test_set.queries),
            documents=len(test_set.documents),
            ties="as-ranked",
            **({"gain": "linear"} if name == "ndcg" else {}),
            **(decisive or {}),
        )
        measurements.append(Measurement(score, values_Q))
    return RetrievalResult(measurements, missing=sum(query not in run for query in test_set.queries))


def _check_run(run: Mapping[str, Sequence[str]], test_set: RetrievalSet) -> None:
    for query, ranking in run.items():
        place = f'{test_set.name}: query "{query}"'
        if query not in test_set.queries:
            raise UserError(f"{place}: in the run but not in the test set; give the run of this set")
        seen: set[str] = set()
        for document in ranking:
            if document not in test_set.documents:
                raise UserError(f'{place}: ranks "{document}", which is no document of the test set; index its corpus')
            if document in seen:
                raise UserError(f'{place}: ranks "{document}" twice; keep only the first')
            seen.add(document)


def cut_off(metric: str) -> int:
    """Return how many documents a metric reads, 1,000 for ``recall@1000``; `UserError` when there is no such one."""
    return _parse(metric)[1]


def _parse(metric: str) -> tuple[str, int]:
    name, _, k = metric.partition("@")
    if name not in _METRICS or not k.isdecimal() or int(k) < 1:
        raise UserError(f'metric "{metric}": expected {", ".join(f"{known}@k" for known in _METRICS)} with k >= 1')
    return name, int(k)


def _dcg(gains: Sequence[float]) -> float:
    return float(np.sum(np.array(gains, dtype=np.float64) / np.log2(np.arange(2, len(gains) + 2))))


def _ndcg(ranking: Sequence[str], gains: Mapping[str, float], k: int) -> float:
    ideal = sorted(gains.values(), reverse=True)[:k]
    return _dcg([gains.get(document, 0.0) for document in ranking[:k]]) / _dcg(ideal)


def _reciprocal_rank(ranking: Sequence[str], gains: Mapping[str, float], k: int) -> float:
    return next((1.0 / rank for rank, document in enumerate(ranking[:k], start=1) if document in gains), 0.0)


def _recall(ranking: Sequence[str], gains: Mapping[str, float], k: int) -> float:
    return sum(document in gains for document in ranking[:k]) / len(gains)


_METRICS = {"ndcg": _ndcg, "mrr": _reciprocal_rank, "recall": _recall}

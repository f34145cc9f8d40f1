"""The retention check: English, Korean, and old against new English vectors, measured and judged against a budget.

Shape letters: N = pairs or sentences, D = width of a vector.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sentence_transformers.base.evaluation import BaseEvaluator

from soju.core.errors import RegressionError
from soju.core.results import Score, Setting
from soju.data.rows import SimilarityPair
from soju.data.statistics import spread
from soju.embedding.config import RetentionSettings
from soju.evaluation.similarity import correlation, cosines_of
from soju.training.gate import QualityGate, Threshold, Verdict, read_verdicts, record_verdict
from soju.training.ranks import on_main_process

KOREAN, ENGLISH, COSINE = "korean_spearman", "english_spearman", "english_cosine"
CHOSEN_BY = KOREAN
"""The best checkpoint has the highest correlation on the watched Korean pairs."""
LOWEST = -1.0
"""What a collapsed model scores: it fails every gate, and other programs can read it, unlike NaN."""
_UNITS = {KOREAN: "correlation", ENGLISH: "correlation", COSINE: "cosine"}


class RetentionCheck(BaseEvaluator):
    """Measures a model: Korean and English pairs, and how far English vectors have gone from the untouched model's.

    Args:
        korean: Scored Korean pairs.
        english: Scored English pairs; their sentences are the ones whose vectors are compared.
        base: The untouched model.
        settings: How many pairs and sentences to measure.
        batch_size: Texts encoded at a time.
    """

    def __init__(
        self,
        korean: Sequence[SimilarityPair],
        english: Sequence[SimilarityPair],
        base: Any,
        settings: RetentionSettings,
        *,
        batch_size: int = 64,
    ) -> None:
        super().__init__()
        self.primary_metric = CHOSEN_BY
        self._pairs = {KOREAN: list(korean), ENGLISH: list(english)}
        self._batch_size = batch_size
        sentences = list(dict.fromkeys(text for pair in english for text in (pair.first, pair.second)))
        self.sentences = spread(sentences, settings.max_sentences)
        self._old_ND = self._vectors(base, self.sentences)
        self.of_base = self(base)
        """What the untouched model scores."""

    def __call__(
        self, model: Any, output_path: str | None = None, epoch: float = -1, steps: int = -1, **_: Any
    ) -> dict[str, float]:
        """Return the three scores by name."""
        found = {name: self._correlation(model, pairs) for name, pairs in self._pairs.items()}
        cosines_N = cosines_of(self._old_ND, self._vectors(model, self.sentences))
        found[COSINE] = float(np.nan_to_num(cosines_N.mean(), nan=LOWEST))
        return found

    def _correlation(self, model: Any, pairs: Sequence[SimilarityPair]) -> float:
        """Return Spearman's correlation, or the lowest there is when a model in training has collapsed."""
        cosines_N = cosines_of(*(self._vectors(model, side) for side in _sides(pairs)))
        collapsed = not np.isfinite(cosines_N).all() or np.ptp(cosines_N) == 0
        if collapsed and hasattr(self, "of_base"):
            return LOWEST
        return correlation(cosines_N, [pair.score for pair in pairs])

    def scores(self, values: Mapping[str, float], subject: str) -> list[Score]:
        """Return values with their signatures."""
        texts = {
            name: [text for pair in pairs for text in (pair.first, pair.second)] for name, pairs in self._pairs.items()
        }
        texts[COSINE] = list(self.sentences)
        return [
            Setting.of_texts(texts[name], subject=subject, test_set=f"watched {name.partition('_')[0]}").score(
                name, values[name], unit=unit, higher_is_better=True
            )
            for name, unit in _UNITS.items()
        ]

    def _vectors(self, model: Any, texts: Sequence[str]) -> NDArray[np.float32]:
        vectors_ND: NDArray[np.float32] = model.encode(
            list(texts), batch_size=self._batch_size, convert_to_numpy=True, show_progress_bar=False
        )
        return vectors_ND


def _sides(pairs: Sequence[SimilarityPair]) -> tuple[list[str], list[str]]:
    return [pair.first for pair in pairs], [pair.second for pair in pairs]


@dataclass(frozen=True, slots=True)
class RetentionGate:
    """Judges each retention check: English against the untouched model, Korean against the best of the stage so far."""

    check: RetentionCheck
    settings: RetentionSettings
    start: Mapping[str, float]
    """What the model scored that the stage started from."""
    record: Path
    """``verdicts.jsonl`` of the stage."""

    def judge(self, step: int, metrics: Mapping[str, float], *, attempt: int) -> None:
        """Record the verdict on a check; raise `RegressionError` on every rank when the budget is spent."""
        values = {name: metrics[f"eval_{name}"] for name in _UNITS}
        on_main_process(lambda: self._judge(values, step=step, attempt=attempt))

    def verdict(self, values: Mapping[str, float], *, before_step: int | None = None) -> Verdict:
        """Judge the values of a check."""
        gate = QualityGate(
            [
                Threshold(metric=ENGLISH, max_drop=self.settings.english_drop),
                Threshold(metric=COSINE, worst=self.settings.min_cosine),
                Threshold(metric=KOREAN, max_drop=self.settings.korean_drop),
            ]
        )
        best_korean = max([self.start[KOREAN], *self._earlier(before_step)])
        baseline = {ENGLISH: self.check.of_base[ENGLISH], COSINE: 1.0, KOREAN: best_korean}
        return gate.judge(self.check.scores(values, "model"), self.check.scores(baseline, "baseline"))

    def _earlier(self, before_step: int | None) -> list[float]:
        rows = read_verdicts(self.record)
        passed = (row for row in rows if row["passed"] and row["step"] is not None)
        return [
            score["value"]
            for row in passed
            if before_step is None or row["step"] < before_step
            for score in row["scores"]
            if score["name"] == KOREAN
        ]

    def _judge(self, values: Mapping[str, float], *, step: int, attempt: int) -> None:
        verdict = self.verdict(values, before_step=step)
        scores = self.check.scores(values, "model")
        record_verdict(self.record, verdict, where="training", step=step, attempt=attempt, scores=scores)
        if not verdict.passed:
            raise RegressionError(f"step {step:,}: {'; '.join(verdict.reasons)}")

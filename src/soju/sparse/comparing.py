"""Compare two runs query by query. What ``soju compare`` does."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from soju.core.errors import UserError
from soju.core.files import write_json
from soju.core.score import Score
from soju.evaluation.significance import Comparison, Measurement, compare
from soju.sparse.expected_terms import FUNCTION_WORDS, terms_of
from soju.sparse.indexing import open_model
from soju.sparse.probes import PROBES, probe_report

FILE = "query_scores.json"
"""Per-query values of a run's own system."""


def write_query_scores(folder: Path, measurements: Sequence[Measurement]) -> None:
    """Keep what every query scored, so that runs can be compared later."""
    rows = [{"score": item.score.to_json(), "values": [float(value) for value in item.values]} for item in measurements]
    write_json(folder / FILE, rows)


def compare_runs(subject: Path, baseline: Path, *, samples: int = 2000, seed: int = 0) -> list[Comparison]:
    """Compare every metric that both runs measured on the same queries.

    Args:
        subject: Run folder in question.
        baseline: Run folder it is compared with.
        samples: Resamples of the paired bootstrap.
        seed: Their seed.

    Returns:
        Differences, subject minus baseline; the subjects are named by their folders.

    Raises:
        UserError: If a run has no per-query scores, or nothing was measured alike in both.
    """
    ours, theirs = _read(subject), _read(baseline)
    alike = [key for key in ours if key in theirs]
    if not alike:
        raise UserError(
            f"{subject} and {baseline} measured nothing on the same queries; evaluate both on the same sets"
        )
    return [compare(ours[key], theirs[key], samples=samples, seed=seed) for key in alike]


def probe_models(models: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Describe what models light up for the published probes, see `soju.sparse.probes`.

    Args:
        models: Model or run folders, checkpoints, or the packaged model's name.

    Returns:
        The report of each.

    Raises:
        UserError: If one is no model.
    """
    reports = {}
    for model in models:
        encoder, _ = open_model(model)
        vectors = encoder.encode_queries([probe.source for probe in PROBES])
        vocabulary = terms_of(encoder)
        reports[model] = probe_report(vectors, vocabulary, encoder.terms, function_words=FUNCTION_WORDS)
    return reports


def _read(folder: Path) -> dict[tuple[str, str], Measurement]:
    path = folder / FILE
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{folder}: no {FILE}; give the folder of a finished run") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{path}: not JSON ({error}); run the training again") from None
    found = {}
    for row in rows:
        score = Score.from_json({**row["score"], "subject": folder.resolve().name})
        found[score.test_set, score.signature] = Measurement(score, np.array(row["values"], np.float64))
    return found

"""What ``evaluate`` and ``compare`` do with embedding models: one table, a column for each model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from soju.cli.console import as_reported, console, read_values, recipe_of, say
from soju.core.errors import UserError


def compare_embedding_models(
    models: Sequence[str], config: str, *, samples: int | None, seed: int | None, out: Path | None = None
) -> None:
    """Print models against the first on a configuration's sets; its resamples and seed hold where none is given."""
    values, _ = read_values(config, None)
    if recipe_of(values) != "embedding":
        raise UserError(f"{config}: --config measures embedding models; give a configuration with recipe: embedding")
    evaluation = values.get("evaluation")
    if isinstance(evaluation, Mapping):
        given = {name: value for name, value in (("resamples", samples), ("seed", seed)) if value is not None}
        values = {**values, "evaluation": {**evaluation, **given}}
    measure_embedding_models(models, values, place=config, out=out)


def measure_embedding_models(
    models: Sequence[str], values: Mapping[str, Any], *, place: str, out: Path | None = None
) -> None:
    """Measure models on the sets of a configuration, print one table, and write everything to `out`."""
    from soju.core.files import write_json
    from soju.embedding.comparing import compare_models
    from soju.report.model_columns import model_rows, models_table

    measured = compare_models(models, values, place=place)
    rows = model_rows(measured.subjects, measured.scores, as_reported(measured.comparisons))
    console.print(models_table(measured.subjects, rows))
    for why in measured.not_compared:
        say(why, style="yellow")
    if out is not None:
        write_json(out, {**measured.to_json(), "rows": [row.to_json() for row in rows]})

"""What ``check``, ``train`` and ``demo`` do with recipe ``embedding``."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from soju.cli.console import console, print_scores, say, tell_skipped
from soju.core.errors import DataError

if TYPE_CHECKING:
    from soju.embedding.config import EmbeddingConfig


DEMO = "embedding-pico"
QUERY = "김치를 담그는 방법"


def check_embedding(values: Mapping[str, Any], *, place: str) -> None:
    """Check configuration and data; train nothing, ask no hub for a model."""
    from soju.data.statistics import format_statistics
    from soju.embedding.recipe import read_run

    try:
        data, evaluation = read_run(_settings(values, place))
    except DataError as error:  # a check lists everything, a run that stops only the beginning
        raise DataError(error.problems, count=error.count, shown=len(error.problems)) from None
    for part in ("korean", "english", "pairs", "passages"):
        if part in data.statistics:
            console.print(format_statistics(data.statistics[part], title=part))
    for name, count in data.statistics["stage_texts"].items():
        say(f"{name}: {count:,} Korean texts")
    watched = data.statistics["watched_pairs"]
    say(f"watched: {watched['korean']:,} Korean pairs, {watched['english']:,} English pairs")
    for name, pairs in evaluation.sts.items():
        say(f"{name}: {len(pairs):,} scored pairs")
    if not tell_skipped(data.log):
        say("No problem found.", style="green")


def train_embedding(
    values: Mapping[str, Any], text: str, *, place: str, out: Path | None, resume: bool, resume_from: Path | None
) -> None:
    """Expand, train, measure and report."""
    from soju.core.errors import BadNumbersError, RegressionError
    from soju.core.run_folder import open_run_folder
    from soju.embedding.recipe import read_run, run

    settings = _settings(values, place)
    data, evaluation = read_run(settings)
    speaks = int(os.environ.get("RANK", "0")) == 0
    if speaks:
        tell_skipped(data.log)
    folder = out or Path("runs") / settings.name
    run_dir = open_run_folder(folder, settings, text, resumes=resume or resume_from is not None)
    try:
        run(settings, run_dir, data=data, evaluation=evaluation, resume=resume_from)
    except (RegressionError, BadNumbersError):
        if speaks and (folder / "report.html").is_file():
            _tell(folder)
        raise
    if speaks:
        _tell(folder)


def demo_embedding(folder: Path) -> None:
    """Train a pico model on our own samples and show what changed."""
    from sentence_transformers import SentenceTransformer

    from soju.core.config import parse_yaml
    from soju.presets import preset_text

    text = preset_text(DEMO)
    console.print("Making a small English embedding model, giving it Korean, stage by stage ...")
    train_embedding(parse_yaml(text, place=DEMO), text, place=DEMO, out=folder, resume=False, resume_from=None)
    for name in ("base", "stage0"):
        tokens = SentenceTransformer(str(folder / name), device="cpu").tokenizer.tokenize(QUERY)
        say(f"{name}: {QUERY!r} has {len(tokens)} tokens")


def _tell(folder: Path) -> None:
    print_scores(folder)
    say(f"Model   {folder / 'best'}\nReport  {folder / 'report.html'}")


def _settings(values: Mapping[str, Any], place: str) -> EmbeddingConfig:
    from soju.core.config import validate
    from soju.embedding.config import EmbeddingConfig

    settings: EmbeddingConfig = validate(values, EmbeddingConfig, place=place)
    return settings

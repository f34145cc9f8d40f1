"""Stage 0 inside a run: the base with the donor's Korean tokens, certified."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from soju.core.files import write_text
from soju.embedding.config import EmbeddingConfig
from soju.embedding.expansion.expanding import expand_model
from soju.embedding.probing import choose_initialiser
from soju.embedding.reading import EmbeddingData
from soju.embedding.retention import RetentionGuard
from soju.embedding.scratch_base import is_whole
from soju.embedding.stages import Accepted

NAME = "stage0"


def expand_stage(
    config: EmbeddingConfig,
    data: EmbeddingData,
    base: Path,
    donor: str,
    run_folder: Path,
    *,
    guard: RetentionGuard | None,
) -> Accepted:
    """Expand the base, or read what an earlier start of the run has finished.

    Args:
        config: Settings of the run.
        data: Its Korean texts decide the order of tokens, when asked to.
        base: The base's folder.
        donor: Folder or hub id of the donor.
        run_folder: Gets ``stage0``.
        guard: Chooses the initialiser, when several are to be tried.

    Returns:
        The expanded model.

    Raises:
        UserError: If a tokenizer is of a kind that cannot be expanded, or the certificate fails.
    """
    folder, settings = run_folder / NAME, config.expansion
    if not is_whole(folder):
        shutil.rmtree(folder, ignore_errors=True)  # what an earlier start wrote and could not certify
        corpus: Path | None = None
        if settings.order == "corpus":
            corpus = run_folder / "training" / "expansion" / "korean.txt"
            write_text(corpus, "".join(" ".join(text.split()) + "\n" for text in data.korean))
        initialiser: str = settings.initialiser
        if settings.init_probe and guard is not None:
            initialiser = choose_initialiser(config, data, base, donor, guard, run_folder, corpus=corpus)
        expand_model(
            str(base),
            donor,
            folder,
            corpus=corpus,
            pairs=data.pairs,
            method=settings.method,
            initialiser=initialiser,
            limit=settings.limit,
            speed=settings.speed,
            seed=config.seed,
        )
        if corpus is not None:
            shutil.rmtree(corpus.parent)  # a copy of texts has no place in a run
    certificate = folder / "certificate.json"
    looks = json.loads(certificate.read_text(encoding="utf-8"))
    return Accepted(NAME, folder, looks)

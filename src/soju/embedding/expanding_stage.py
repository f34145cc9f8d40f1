"""Which initialiser? Each gets a short stage 1, and the one whose model knows most Korean afterwards is taken.

Stage 0 inside a run: the base with the donor's Korean tokens, certified.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from soju.core.errors import UserError
from soju.core.files import write_json, write_manifest, write_text
from soju.embedding.adapters import load_float32
from soju.embedding.config import EmbeddingConfig
from soju.embedding.data import EmbeddingData
from soju.embedding.expansion.expand import expand_model
from soju.embedding.retention import KOREAN, RetentionGuard
from soju.embedding.stages import STAGES, Accepted
from soju.embedding.trainer import is_whole
from soju.training.ranks import from_all
from soju.training.rollback import Attempt

PROBE = "probe"
"""Folder below ``training`` that the probe works in."""


def choose_initialiser(
    config: EmbeddingConfig,
    data: EmbeddingData,
    base: Path,
    donor: str,
    guard: RetentionGuard,
    run_folder: Path,
    *,
    corpus: Path | None,
) -> str:
    """Try the initialisers that the settings name, or read what an earlier start of the run found.

    Args:
        config: Settings of the run.
        data: Texts to learn from.
        base: The base's folder.
        donor: Folder or hub id of the donor.
        guard: Scores the watched Korean pairs.
        run_folder: Gets ``training/probe/probe.json``, scores before and after the steps.
        corpus: Korean texts that decide the order of merges; none takes the donor's.

    Returns:
        The initialiser with the highest score after the steps; of equal ones the first that is named.

    Raises:
        UserError: If an initialiser cannot be used, or several processes run.
    """
    folder, settings = run_folder / "training" / PROBE, config.expansion
    record = folder / "probe.json"
    if len(from_all(0)) > 1:
        raise UserError("expansion.init_probe: works on one process; run stage 0 alone first, or name one initialiser")
    if not record.is_file():
        found = {}
        for method in settings.init_probe:
            own = folder / method
            shutil.rmtree(own, ignore_errors=True)
            start = expand_model(
                str(base), donor, own / "stage0", corpus=corpus, pairs=data.pairs, method=settings.method,
                initialiser=method, limit=settings.limit, speed=False, seed=config.seed,
            )  # fmt: skip
            write_manifest(start)
            found[method] = _probe(method, config, data, start, base, guard, own)
            shutil.rmtree(own)
        write_json(record, found)
    scores = json.loads(record.read_text(encoding="utf-8"))
    chosen: str = max(settings.init_probe, key=lambda method: scores[method]["after"][KOREAN])
    return chosen


def _probe(
    method: str,
    config: EmbeddingConfig,
    data: EmbeddingData,
    start: Path,
    base: Path,
    guard: RetentionGuard,
    folder: Path,
) -> dict[str, dict[str, float]]:
    steps = config.expansion.probe_steps
    settings = config.stage1.model_copy(update={"max_steps": steps, "eval_steps": steps, "logging_steps": steps})
    trainer = STAGES["stage1"]("stage1", settings, config, data, start, base, folder).trainer(Attempt(), None)
    trainer.train()
    return {"before": guard(load_float32(start).eval()), "after": guard(trainer.model.eval())}


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

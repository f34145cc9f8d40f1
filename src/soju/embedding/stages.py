"""Train one stage: from the accepted model of the stage before to an accepted model, a folder that loads by itself."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from soju.core.errors import BadNumbersError, RegressionError, UserError
from soju.core.files import verify_manifest, write_json
from soju.embedding.adapters import FOLDABLE, describe_adapters, fold_adapters
from soju.embedding.config import EmbeddingConfig, OptimiserSettings
from soju.embedding.expansion.vocabulary_expansion import EXPANSION_FILE
from soju.embedding.lora import describe_lora, merge_lora
from soju.embedding.partitioned_embedding import PartitionedEmbedding, fold_embedding
from soju.embedding.reading import EmbeddingData
from soju.embedding.retention import CHOSEN_BY, RetentionGate, RetentionGuard
from soju.embedding.scratch_base import is_whole
from soju.embedding.stage_run import StageRun, adapter_kind, has_adapters, load_stage, save_stage
from soju.embedding.trainable import load_trainable, transformer_of
from soju.training.checkpoints import newest_verified, publish
from soju.training.judged_training import train_judged
from soju.training.ranks import on_main_process
from soju.training.rollback import RollbackSettings
from soju.training.verdicts import passed_steps, read_verdicts

SUPERVISED = "supervised"
FROM_STAGE_0 = (EXPANSION_FILE, "certificate.json")
"""Files that go from one stage's folder to the next."""
PARITY = 1e-5
"""Largest difference of a saved and reloaded model's vectors, whose length is 1."""


@dataclass(frozen=True, slots=True)
class Accepted:
    """A model that passed, and what the guard saw of it."""

    name: str
    """``stage0`` … ``stage3``, ``supervised``."""
    folder: Path
    looks: Mapping[str, Any] = field(default_factory=dict)


def run_stages(
    names: Sequence[str],
    config: EmbeddingConfig,
    data: EmbeddingData,
    accepted: list[Accepted],
    guard: RetentionGuard,
    run_folder: Path,
    *,
    resume: Path | None = None,
) -> RegressionError | BadNumbersError | None:
    """Run stages one after the other, each from the last accepted model, until one is not accepted.

    Args:
        names: The stages, in order.
        config: Settings of the run.
        data: What they learn from.
        accepted: The base first; every model that is accepted is put behind it.
        guard: Looks at every validation.
        run_folder: The run folder.
        resume: A checkpoint of one of the stages to go on from.

    Returns:
        Why a stage was not accepted; none when all were.

    Raises:
        UserError: If settings and model do not go together, or the checkpoint is of no stage of the run.
        StoppedError: After a signal, when the checkpoint is written.
    """
    wanted = begin_stage(resume, names, run_folder)
    base = accepted[0].folder
    for name in names:
        settings: OptimiserSettings = getattr(config, name)
        stage = StageRun(name, settings, config, data, accepted[-1].folder, base, run_folder)
        try:
            accepted.append(run_stage(stage, guard, resume=resume if name == wanted else None))
        except (RegressionError, BadNumbersError) as error:
            return error
    return None


def run_stage(stage: StageRun, guard: RetentionGuard, *, resume: Path | None = None) -> Accepted:
    """Train a stage under the guard and publish what was accepted; a stage that is finished is only read.

    Args:
        stage: The stage.
        guard: Looks at every validation.
        resume: A checkpoint of this stage to go on from.

    Returns:
        The accepted model.

    Raises:
        RegressionError: If no checkpoint kept within the budget.
        UserError: If settings and model do not go together.
        BadNumbersError: If numbers were not finite too often.
        StoppedError: After a signal, when the checkpoint is written.
    """
    if not on_main_process(lambda: is_whole(stage.result)):
        start = look_at_start(stage, guard)
        retention = stage.config.retention
        gate = RetentionGate(guard, retention, start, stage.folder / "verdicts.jsonl")
        try:
            trained = train_judged(
                lambda attempt: stage.trainer(attempt, guard),
                gate,
                stage.folder,
                rollbacks=RollbackSettings(max_rollbacks=retention.max_rollbacks, change_first="learning rate"),
                resume=resume,
            )
            best = trained.best
        except RegressionError:
            kept = best_passed(stage.folder)
            if kept is None:
                raise
            best = kept
        on_main_process(lambda: accept(stage, best, gate))
    looks = json.loads((stage.folder / "looks.json").read_text(encoding="utf-8"))
    return Accepted(stage.name, stage.result, looks)


def look_at_start(stage: StageRun, guard: RetentionGuard) -> dict[str, float]:
    """Return what the guard sees of the model that a stage starts from; measured once."""
    path = stage.folder / "start.json"

    def look() -> dict[str, float]:
        if not path.is_file():
            write_json(path, guard(load_stage(stage.start).eval()))
        found: dict[str, float] = json.loads(path.read_text(encoding="utf-8"))
        return found

    return on_main_process(look)


def best_passed(folder: Path) -> Path | None:
    """Return the checkpoint with the highest Korean score among those that passed and verify; none when none did."""
    rows = [row for row in read_verdicts(folder / "verdicts.jsonl") if row["passed"] and row["step"] is not None]
    passed = passed_steps(read_verdicts(folder / "verdicts.jsonl"))
    korean = {
        row["step"]: score["value"]
        for row in rows
        if row["step"] in passed
        for score in row["scores"]
        if score["name"] == CHOSEN_BY
    }
    for step in sorted(korean, key=lambda step: (korean[step], step), reverse=True):
        found = newest_verified(folder / "checkpoints", steps={step}).path
        if found is not None:
            return found
    return None


def accept(stage: StageRun, checkpoint: Path, gate: RetentionGate) -> None:
    """Make a model of start and checkpoint, fold what can be folded, prove that it reloads alike, and publish it.

    Args:
        stage: The stage.
        checkpoint: What it trained.
        gate: Looks at the result once more.

    Raises:
        RegressionError: If the folder that was written is not the model that was trained.
    """
    verify_manifest(checkpoint)
    model, groups = stage.prepared()
    load_trainable(groups, checkpoint)
    model.eval()
    sentences = gate.guard.sentences[:16]
    expected_ND = model.encode(sentences, show_progress_bar=False)
    if isinstance(transformer_of(model).get_input_embeddings(), PartitionedEmbedding):  # type: ignore[operator]
        fold_embedding(transformer_of(model))
    if has_adapters(model):
        adapters: str | None = describe_adapters(model)
        if adapter_kind(model) in FOLDABLE:
            fold_adapters(model)
    elif (adapters := describe_lora(transformer_of(model))) is not None:
        merge_lora(transformer_of(model))
    staged = stage.run_folder / f".{stage.name}.saving"
    shutil.rmtree(staged, ignore_errors=True)
    staged.mkdir(parents=True)
    save_stage(model, staged)
    for name in FROM_STAGE_0:
        if (stage.start / name).is_file():
            shutil.copy(stage.start / name, staged / name)
    reloaded = load_stage(staged).eval()
    difference = float(abs(reloaded.encode(sentences, show_progress_bar=False) - expected_ND).max())
    if not difference <= PARITY:
        raise RegressionError(
            f"{stage.name}: vectors of the saved folder differ from the trained model's by {difference:.2e}"
        )
    values = gate.guard(reloaded)
    looks = {
        "checkpoint": checkpoint.name,
        "base": gate.guard.of_base,
        "start": dict(gate.start),
        "accepted": values,
        "largest_difference_after_reload": difference,
        "adapters": adapters,
    }
    write_json(stage.folder / "looks.json", looks)
    publish(staged, stage.result)


def begin_stage(resume: Path | None, names: Sequence[str], run_folder: Path) -> str | None:
    """Find the stage that a checkpoint belongs to, and put the results of it and of later stages aside.

    Args:
        resume: The checkpoint; ``None`` goes on where the run was.
        names: Stages of the run, in order.
        run_folder: The run folder.

    Returns:
        The stage's name, or ``None``.

    Raises:
        UserError: If the checkpoint belongs to no stage of this run.
    """
    if resume is None:
        return None
    for place, name in enumerate(names):
        if resume.resolve().parent == (run_folder / "training" / name / "checkpoints").resolve():
            on_main_process(lambda later=names[place:]: _put_aside(run_folder, later))  # type: ignore[misc]
            return name
    raise UserError(f"{resume}: no checkpoint of this run; give one below {run_folder / 'training'}")


def _put_aside(run_folder: Path, names: Sequence[str]) -> None:
    for place, name in enumerate(names):
        folders = [run_folder / name] if place == 0 else [run_folder / name, run_folder / "training" / name]
        for folder in folders:
            if folder.is_dir():
                aside = folder.with_name(f"abandoned-{folder.name}")
                shutil.rmtree(aside, ignore_errors=True)
                folder.rename(aside)

"""Training stages: what each trains and learns from, and how its result becomes an accepted model."""

from __future__ import annotations

import json
import shutil
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from sentence_transformers import SentenceTransformer
from torch import Tensor

from soju.core.errors import BadNumbersError, RegressionError, UserError
from soju.core.files import verify_manifest, write_json
from soju.data.statistics import spread
from soju.embedding.adapter_modules import AdapterSettings, layers_of
from soju.embedding.adapters import (
    LORA_MARK,
    add_adapters,
    add_lora,
    has_adapters,
    load_float32,
    parameters_by_layer,
    save_model,
    settle_adapters,
)
from soju.embedding.config import (
    EmbeddingConfig,
    Stage1Settings,
    Stage2Settings,
    Stage3Settings,
    StageSettings,
    SupervisedSettings,
    UnsupervisedSettings,
)
from soju.embedding.data import CACHE, Collator, EmbeddingData, LabelledPairs, Rows, TextRows, anchored_rows
from soju.embedding.expansion.merges import EXPANSION_FILE, Expansion
from soju.embedding.losses import StageLoss, passes_are_equal
from soju.embedding.retention import CHOSEN_BY, RetentionCheck, RetentionGate
from soju.embedding.trainer import (
    Group,
    PartitionedEmbedding,
    StageTrainer,
    block_group,
    embedding_group,
    fold_embedding,
    gradual,
    is_whole,
    load_trainable,
    partition_embedding,
    places_of,
    refuse_few_rows,
    set_dropout,
    stage_arguments,
    tensors_of,
    transformer_of,
)
from soju.training.checkpoints import newest_verified, publish
from soju.training.gate import passed_steps, read_verdicts
from soju.training.ranks import from_all, on_main_process
from soju.training.rollback import Attempt, RollbackSettings, train_judged
from soju.training.state import seeded

SUPERVISED = "supervised"
FROM_STAGE_0 = (EXPANSION_FILE, "certificate.json")
"""Files that go from one stage's folder to the next."""
PARITY = 1e-5
"""Largest difference of a saved and reloaded model's vectors, whose length is 1."""


@dataclass(frozen=True)
class StageRun(ABC):
    """One stage with everything it needs. A subclass says what moves, what it learns from and what is minimised."""

    name: str
    settings: StageSettings
    config: EmbeddingConfig
    data: EmbeddingData
    start: Path
    """The accepted model that it starts from."""
    base: Path
    """The untouched model."""
    run_folder: Path

    @property
    def folder(self) -> Path:
        """Where checkpoints, history and verdicts of the stage lie."""
        return self.run_folder / "training" / self.name

    @property
    def result(self) -> Path:
        """Where the accepted model lies."""
        return self.run_folder / self.name

    @cached_property
    def expansion(self) -> Expansion | None:
        """What stage 0 added; none for a model that was not expanded."""
        return Expansion.load(self.start) if (self.start / EXPANSION_FILE).is_file() else None

    @abstractmethod
    def groups(self, model: SentenceTransformer) -> list[Group]:
        """Return what moves of a frozen model; `UserError` if it lacks what is to be trained."""

    @property
    @abstractmethod
    def rows(self) -> Rows:
        """What the stage learns from."""

    @property
    @abstractmethod
    def objective(self) -> str:
        """What is minimised, see `soju.embedding.losses.OBJECTIVES`."""

    @property
    def l2_sp_weight(self) -> float:
        """Weight of the distance to the weights that the stage started from."""
        return 0.0

    def collator(self, model: SentenceTransformer) -> Collator:
        """Return what makes batches."""
        return Collator(self.rows, model, max_length=self.settings.max_length)

    def complete(self, model: SentenceTransformer) -> Any:
        """Return what completes the labels of a batch, see `StageLoss`; none when nothing is to be added."""
        return None

    def prepare(self, model: SentenceTransformer, collator: Collator) -> None:  # noqa: B027 - most need none
        """Get a model ready to be trained; `UserError` if it could learn nothing."""

    def started(self) -> tuple[SentenceTransformer, list[Group]]:
        """Return a fresh copy of the start, frozen but for what moves, and what moves."""
        model = load_float32(self.start)
        model.requires_grad_(False)
        return model, self.groups(model)

    def trainer(self, attempt: Attempt, check: RetentionCheck | None) -> StageTrainer:
        """Put model, rows, loss and arguments into a trainer."""
        settings, name = self.settings, self.name
        model, groups = self.started()
        collator = self.collator(model)
        if settings.mini_batch_size is not None and len(from_all(0)) > 1:  # their gradients would be averaged each time
            raise UserError(
                f"{name}.mini_batch_size: works on one process; leave it out, or lower per_device_train_batch_size"
            )
        self.prepare(model, collator)
        refuse_few_rows(len(self.rows), settings, place=name, ranks=PartialState().num_processes)
        loss = StageLoss(
            model,
            self.objective,
            settings,
            complete=self.complete(model),
            mini_batch_size=settings.mini_batch_size,
            l2_sp_weight=self.l2_sp_weight,
            moving=tensors_of(groups),
        )
        arguments = stage_arguments(
            settings,
            self.folder,
            self.rows.lengths,
            seed=self.config.seed,
            data_order=attempt.data_order,
            chosen_by=CHOSEN_BY if check else None,
        )
        return StageTrainer(
            groups=groups,
            model=model,
            args=arguments,
            train_dataset=places_of(self.rows),
            loss=loss,
            evaluator=check,
            data_collator=collator,
            history=self.folder / "history.jsonl",
            learning_rate_scale=attempt.learning_rate_scale,
        )


class TextStage(StageRun):
    """Learns from Korean texts without labels, and from the Korean sides of sentence pairs that are anchored."""

    settings: UnsupervisedSettings

    @cached_property
    def rows(self) -> TextRows:
        """The texts of the stage."""
        return anchored_rows(
            self.data.stage_texts[int(self.name.removeprefix("stage"))],
            spread(self.data.pairs, self.settings.max_anchors or len(self.data.pairs)),
            self.base,
            weight=self.settings.anchor_weight,
            cache=self.run_folder / "training" / CACHE,
        )

    @property
    def objective(self) -> str:
        """As the settings say."""
        return self.settings.objective

    @property
    def distils(self) -> bool:
        """Whether the untouched model teaches."""
        return self.objective == "self_distillation"

    def collator(self, model: SentenceTransformer) -> Collator:
        """Return what makes batches, the old tokens below the new ones when they are taught."""
        old_ids = self._old_ids if self.distils else None
        return Collator(self.rows, model, max_length=self.settings.max_length, decompositions=old_ids)

    def _old_ids(self, token: int) -> list[int]:
        return [token] if self.expansion is None else self.expansion.collapse([token])

    def complete(self, model: SentenceTransformer) -> Any:
        """Return what adds the untouched model's states and vectors under the old tokens."""
        if not self.distils:
            return None
        teacher = load_float32(self.base).to(model.device).eval().requires_grad_(False)

        @torch.no_grad()
        def complete(labels: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
            output = teacher({name: labels[f"old_{name}"] for name in ("input_ids", "attention_mask")})
            return {
                **labels,
                "taught_states": output["token_embeddings"],
                "taught_vectors": output["sentence_embedding"],
            }

        return complete

    def prepare(self, model: SentenceTransformer, collator: Collator) -> None:
        """Set the dropout; refuse SimCSE on a model whose two passes come out equal all the same."""
        set_dropout(model, 0.0 if self.distils else self.settings.dropout)
        if not self.distils:
            batch = collator([{"row": row} for row in range(min(2, len(self.rows)))])
            features = {name: batch[f"text_{name}"] for name in ("input_ids", "attention_mask")}
            refuse_equal_passes(model, features, setting=f"{self.name}.dropout")


class RowStage(TextStage):
    """Stage 1 trains rows of the embedding."""

    settings: Stage1Settings

    def groups(self, model: SentenceTransformer) -> list[Group]:
        """Return the new rows, or all."""
        if self.settings.train_rows == "all":
            return [embedding_group(model)]
        if self.expansion is None:
            raise UserError(
                f"{self.start}: no {EXPANSION_FILE}, so there are no new rows to train; run stage 0 first, or set "
                "stage1.train_rows to all"
            )
        rows = partition_embedding(transformer_of(model), self.expansion.first_id)
        name = next(name for name, value in model.named_parameters() if value is rows.tail)
        return [Group("new rows", {name: rows.tail})]


class AdapterStage(TextStage):
    """Stage 2 trains adapters, its own or those that the model has, or LoRA."""

    settings: Stage2Settings

    def groups(self, model: SentenceTransformer) -> list[Group]:
        """Return the adapters, layer by layer from the top."""
        wanted, seed = self.settings.adapters, self.config.seed
        layers = self._layers(model, wanted.top_layers)
        if wanted.kind == "lora":
            add_lora(transformer_of(model), r=wanted.r, lora_dropout=wanted.lora_dropout, layers=layers, seed=seed)
            return gradual(parameters_by_layer(model, LORA_MARK), self.settings.unfreeze_over)
        if not has_adapters(model):
            add_adapters(model, AdapterSettings(wanted.kind, wanted.hidden, wanted.dropout, layers), seed=seed)
        return gradual(parameters_by_layer(model), self.settings.unfreeze_over)

    def _layers(self, model: SentenceTransformer, top: int | None) -> tuple[int, ...] | None:
        if top is None:
            return None
        count = len(layers_of(transformer_of(model)))
        if top > count:
            raise UserError(f"stage2.adapters.top_layers: {top} of {count} layers; give at most {count}")
        return tuple(range(count - top, count))


class BlockStage(TextStage):
    """Stage 3 trains the last layers, pulled back to where they started."""

    settings: Stage3Settings

    @property
    def l2_sp_weight(self) -> float:
        """As the settings say."""
        return self.settings.l2_sp_weight

    def groups(self, model: SentenceTransformer) -> list[Group]:
        """Return the last layers."""
        return [block_group(model, self.settings.blocks)]


class PairStage(StageRun):
    """The supervised phase learns from labelled pairs."""

    settings: SupervisedSettings

    @cached_property
    def rows(self) -> LabelledPairs:
        """The pairs."""
        firsts, seconds, labels = zip(*self.data.labelled, strict=True) if self.data.labelled else ((), (), ())
        return LabelledPairs(firsts, seconds, labels)

    @property
    def objective(self) -> str:
        """A loss of relations, or the one of scores that the settings name."""
        return "inference" if self.settings.inference else self.settings.loss

    @property
    def l2_sp_weight(self) -> float:
        """As the settings say."""
        return self.settings.l2_sp_weight

    def groups(self, model: SentenceTransformer) -> list[Group]:
        """Return the last layers, or the adapters that the model has."""
        if self.settings.trains == "blocks":
            return [block_group(model, self.settings.blocks)]
        if not has_adapters(model):
            raise UserError(
                f"supervised.trains adapters: {self.start} has none of its own; take a kind that is not folded "
                "(bottleneck, gated) in stage2.adapters, or train blocks"
            )
        return gradual(parameters_by_layer(model), 0)


STAGES: dict[str, type[StageRun]] = {
    "stage1": RowStage,
    "stage2": AdapterStage,
    "stage3": BlockStage,
    SUPERVISED: PairStage,
}
"""By the name of their settings, in the order they run in."""


def refuse_equal_passes(model: Any, features: Mapping[str, Tensor], *, setting: str) -> None:
    """Refuse SimCSE on a model whose two passes of a batch are equal: only the repulsion of other texts would be left.

    Raises `UserError` if the passes are equal.
    """
    training = model.training
    model.train()
    device = next(model.parameters()).device
    both = {name: torch.cat([value, value]).to(device) for name, value in features.items()}
    with torch.no_grad(), seeded(0):
        first_BD, second_BD = model(both)["sentence_embedding"].chunk(2)
    model.train(training)
    if passes_are_equal(first_BD, second_BD):
        raise UserError(
            f"{setting}: two passes of a batch come out equal, so SimCSE has nothing to learn from; raise the dropout, "
            "or take objective self_distillation"
        )


@dataclass(frozen=True, slots=True)
class Accepted:
    """A model that passed, and what the retention check saw of it."""

    name: str
    """``stage0`` … ``stage3``, ``supervised``."""
    folder: Path
    looks: Mapping[str, Any] = field(default_factory=dict)


def run_stages(
    names: Sequence[str],
    config: EmbeddingConfig,
    data: EmbeddingData,
    accepted: list[Accepted],
    check: RetentionCheck,
    run_folder: Path,
    *,
    resume: Path | None = None,
) -> RegressionError | BadNumbersError | None:
    """Run stages one after the other, each from the last accepted model, until one is not accepted.

    Args:
        names: Of `STAGES`, in order.
        config: Settings of the run.
        data: What they learn from.
        accepted: The base first; every model that is accepted is appended.
        check: Measures at every validation.
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
        stage = STAGES[name](name, getattr(config, name), config, data, accepted[-1].folder, base, run_folder)
        try:
            accepted.append(run_stage(stage, check, resume=resume if name == wanted else None))
        except (RegressionError, BadNumbersError) as error:
            return error
    return None


def run_stage(stage: StageRun, check: RetentionCheck, *, resume: Path | None = None) -> Accepted:
    """Train a stage under the retention check and publish what was accepted; a stage that is finished is only read.

    Raises `RegressionError` if no checkpoint kept within the budget. Raises `UserError` if settings and model do not go
    together. Raises `BadNumbersError` if numbers were not finite too often. Raises `StoppedError` after a signal, when
    the checkpoint is written.
    """
    if not on_main_process(lambda: is_whole(stage.result)):
        start = look_at_start(stage, check)
        retention = stage.config.retention
        gate = RetentionGate(check, retention, start, stage.folder / "verdicts.jsonl")
        try:
            best = train_judged(
                lambda attempt: stage.trainer(attempt, check),
                gate,
                stage.folder,
                rollbacks=RollbackSettings(max_rollbacks=retention.max_rollbacks, change_first="learning rate"),
                resume=resume,
            ).best
        except RegressionError:
            kept = best_passed(stage.folder)
            if kept is None:
                raise
            best = kept
        on_main_process(lambda: accept(stage, best, gate))
    looks = json.loads((stage.folder / "looks.json").read_text(encoding="utf-8"))
    return Accepted(stage.name, stage.result, looks)


def look_at_start(stage: StageRun, check: RetentionCheck) -> dict[str, float]:
    """Return what the retention check sees of the model that a stage starts from; measured once."""
    path = stage.folder / "start.json"

    def look() -> dict[str, float]:
        if not path.is_file():
            write_json(path, check(load_float32(stage.start).eval()))
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

    Raises `RegressionError` if the folder that was written is not the model that was trained.
    """
    verify_manifest(checkpoint)
    model, groups = stage.started()
    load_trainable(groups, checkpoint)
    model.eval()
    sentences = gate.check.sentences[:16]
    expected_ND = model.encode(sentences, show_progress_bar=False)
    if isinstance(transformer_of(model).get_input_embeddings(), PartitionedEmbedding):  # type: ignore[operator]
        fold_embedding(transformer_of(model))
    adapters = settle_adapters(model)
    staged = stage.run_folder / f".{stage.name}.saving"
    shutil.rmtree(staged, ignore_errors=True)
    staged.mkdir(parents=True)
    save_model(model, staged)
    for name in FROM_STAGE_0:
        if (stage.start / name).is_file():
            shutil.copy(stage.start / name, staged / name)
    reloaded = load_float32(staged).eval()
    difference = float(abs(reloaded.encode(sentences, show_progress_bar=False) - expected_ND).max())
    if not difference <= PARITY:
        raise RegressionError(
            f"{stage.name}: vectors of the saved folder differ from the trained model's by {difference:.2e}"
        )
    values = gate.check(reloaded)
    looks = {
        "checkpoint": checkpoint.name,
        "base": gate.check.of_base,
        "start": dict(gate.start),
        "accepted": values,
        "largest_difference_after_reload": difference,
        "adapters": adapters,
    }
    write_json(stage.folder / "looks.json", looks)
    publish(staged, stage.result)


def begin_stage(resume: Path | None, names: Sequence[str], run_folder: Path) -> str | None:
    """Return the stage that a checkpoint belongs to, and put the results of it and of later stages aside.

    ``None`` goes on where the run was. `UserError` if the checkpoint belongs to no stage of the run.
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

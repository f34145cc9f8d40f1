"""One training stage: what moves, what it learns from, what is minimised, how its model is loaded and saved.

Train one stage: from the accepted model of the stage before to an accepted model, a folder that loads by itself.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from sentence_transformers import SentenceTransformer

from soju.core.errors import BadNumbersError, RegressionError, UserError
from soju.core.files import verify_manifest, write_json
from soju.data.splits import spread
from soju.embedding.adapter_modules import MARK, AdaptedTransformer, AdapterSettings
from soju.embedding.adapters import (
    FOLDABLE,
    adapter_parameters_by_layer,
    add_adapters,
    add_lora,
    describe_adapters,
    describe_lora,
    fold_adapters,
    load_adapted,
    merge_lora,
    save_adapted,
)
from soju.embedding.config import (
    EmbeddingConfig,
    LoraSettings,
    ModuleAdapterSettings,
    Stage1Settings,
    Stage2Settings,
    Stage3Settings,
    StageSettings,
    SupervisedSettings,
    UnsupervisedSettings,
)
from soju.embedding.data import CACHE, EmbeddingData, anchored_rows
from soju.embedding.expansion.merges import EXPANSION_FILE, Expansion
from soju.embedding.retention import CHOSEN_BY, RetentionGate, RetentionGuard
from soju.embedding.rows import LabelledPairs, PairCollator, TextCollator, TextRows, encoder_of
from soju.embedding.scratch_base import is_whole, load_float32
from soju.embedding.stage_loss import (
    NamedTerms,
    PairLoss,
    SelfDistillationLoss,
    SimCseLoss,
    refuse_equal_passes,
    refuse_mini_batch_on_several,
)
from soju.embedding.trainable import (
    Group,
    PartitionedEmbedding,
    block_group,
    embedding_group,
    fold_embedding,
    freeze,
    gradual,
    layers_of,
    load_trainable,
    partition_embedding,
    set_dropout,
    tensors_of,
    transformer_of,
)
from soju.embedding.trainer import StageTrainer, refuse_few_rows, stage_arguments
from soju.training.checkpoints import newest_verified, publish
from soju.training.gate import passed_steps, read_verdicts
from soju.training.ranks import on_main_process
from soju.training.rollback import Attempt, RollbackSettings, train_judged


@dataclass(frozen=True)
class StageRun:
    """One stage with everything it needs."""

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

    # What moves.

    def prepared(self) -> tuple[SentenceTransformer, list[Group]]:
        """Return a fresh copy of the start, and what the stage trains of it.

        Returns:
            Model and groups of parameters.

        Raises:
            UserError: If the model lacks what is to be trained.
        """
        model = load_stage(self.start)
        freeze(model)
        groups = self._groups(model)
        return model, groups

    def _groups(self, model: SentenceTransformer) -> list[Group]:
        settings = self.settings
        if isinstance(settings, Stage1Settings):
            if settings.train_rows == "all":
                return [embedding_group(model)]
            if self.expansion is None:
                raise UserError(
                    f"{self.start}: no {EXPANSION_FILE}, so there are no new rows to train; run stage 0 first, or set "
                    "stage1.train_rows to all"
                )
            rows = partition_embedding(transformer_of(model), self.expansion.first_id)
            name = next(name for name, value in model.named_parameters() if value is rows.tail)
            return [Group("new rows", {name: rows.tail})]
        if isinstance(settings, Stage2Settings):
            if settings.adapters.kind == "lora":
                return gradual(self._lora(model, settings.adapters), settings.unfreeze_over)
            if not has_adapters(model):
                self._add_adapters(model, settings.adapters)
            return gradual(_adapters_of(model), settings.unfreeze_over)
        if isinstance(settings, SupervisedSettings) and settings.trains == "adapters":
            if not has_adapters(model):
                raise UserError(
                    f"supervised.trains adapters: {self.start} has none of its own; take a kind that is not folded "
                    "(bottleneck, gated) in stage2.adapters, or train blocks"
                )
            return gradual(_adapters_of(model), 0)
        assert isinstance(settings, Stage3Settings | SupervisedSettings)
        return [block_group(model, settings.blocks)]

    def _add_adapters(self, model: SentenceTransformer, ours: ModuleAdapterSettings) -> None:
        layers = _adapted_layers(model, ours.top_layers)
        wanted = AdapterSettings(kind=ours.kind, hidden=ours.hidden, dropout=ours.dropout, layers=layers)
        add_adapters(model, wanted, seed=self.config.seed)

    def _lora(self, model: SentenceTransformer, ours: LoraSettings) -> dict[int, dict[str, torch.nn.Parameter]]:
        layers, seed = _adapted_layers(model, ours.top_layers), self.config.seed
        updates = add_lora(transformer_of(model), r=ours.r, lora_dropout=ours.lora_dropout, layers=layers, seed=seed)
        moving = {id(update) for update in updates}
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        by_layer = {
            number: {names[id(value)]: value for value in layer.parameters() if id(value) in moving}
            for number, layer in enumerate(layers_of(model))
        }
        return {number: found for number, found in by_layer.items() if found}

    # What it learns from, and what is minimised.

    @cached_property
    def rows(self) -> TextRows | LabelledPairs:
        """What the stage learns from."""
        if isinstance(self.settings, SupervisedSettings):
            firsts, seconds, labels = zip(*self.data.labelled, strict=True) if self.data.labelled else ((), (), ())
            return LabelledPairs(firsts, seconds, labels)
        assert isinstance(self.settings, UnsupervisedSettings)
        texts = self.data.stage_texts[int(self.name.removeprefix("stage"))]
        return anchored_rows(
            texts,
            spread(self.data.pairs, self.settings.max_anchors or len(self.data.pairs)),
            self.base,
            weight=self.settings.anchor_weight,
            cache=self.run_folder / "training" / CACHE,
        )

    def loss(self, model: SentenceTransformer, groups: list[Group]) -> NamedTerms:
        """Return what is minimised."""
        settings = self.settings
        more: dict[str, Any] = {
            "l2_sp_weight": getattr(settings, "l2_sp_weight", 0.0),
            "moving": tensors_of(groups),
        }
        if isinstance(settings, SupervisedSettings):
            return PairLoss.of(model, settings, **more)
        assert isinstance(settings, UnsupervisedSettings)
        if settings.objective == "simcse":
            return SimCseLoss(model, settings, **more)
        teacher = load_float32(self.base).to(model.device).eval().requires_grad_(False)

        def teach(features: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
            output = teacher(features)
            return output["token_embeddings"], output["sentence_embedding"]

        return SelfDistillationLoss(model, teach, settings, **more)

    def collator(self, model: SentenceTransformer) -> Any:
        """Return what makes batches."""
        encode = encoder_of(model, max_length=self.settings.max_length)
        pad: dict[str, Any] = {
            "pad_id": model.tokenizer.pad_token_id,
            "left": model.tokenizer.padding_side == "left",
        }
        if isinstance(self.rows, LabelledPairs):
            return PairCollator(self.rows, encode, **pad)
        distils = isinstance(self.settings, UnsupervisedSettings) and self.settings.objective == "self_distillation"
        return TextCollator(self.rows, encode, **pad, decompositions=self._old_ids if distils else None)

    def _old_ids(self, token: int) -> list[int]:
        return [token] if self.expansion is None else self.expansion.collapse([token])

    def trainer(self, attempt: Attempt, guard: RetentionGuard | None) -> StageTrainer:
        """Put model, rows, loss and arguments into a trainer."""
        model, groups = self.prepared()
        collator = self.collator(model)
        if isinstance(self.settings, UnsupervisedSettings):
            set_dropout(model, self.settings.dropout if self.settings.objective == "simcse" else 0.0)
            refuse_mini_batch_on_several(self.settings, self.name)
            if self.settings.objective == "simcse":
                batch = collator([{"row": row} for row in range(min(2, len(self.rows)))])
                features = {name: batch[f"text_{name}"] for name in ("input_ids", "attention_mask")}
                refuse_equal_passes(model, features, setting=f"{self.name}.dropout")
        refuse_few_rows(len(self.rows), self.settings, place=self.name, ranks=PartialState().num_processes)
        return StageTrainer(
            groups=groups,
            model=model,
            args=stage_arguments(
                self.settings,
                self.folder,
                self.rows.lengths,
                seed=self.config.seed,
                data_order=attempt.data_order,
                chosen_by=CHOSEN_BY if guard else None,
            ),
            train_dataset=self.rows.dataset(),
            loss=self.loss(model, groups),
            evaluator=guard,
            data_collator=collator,
            history=self.folder / "history.jsonl",
            learning_rate_scale=attempt.learning_rate_scale,
        )


def load_stage(folder: Path) -> SentenceTransformer:
    """Load the model of a stage in float32, adapters included, running no code from its folder."""
    return load_adapted(folder, model_kwargs={"dtype": "float32"}, local_files_only=True)


def save_stage(model: SentenceTransformer, folder: Path) -> None:
    """Save a model so that stock sentence-transformers loads it; with adapters, as `save_adapted` explains in it."""
    if has_adapters(model):
        save_adapted(model, folder)
    else:
        model.save(str(folder), create_model_card=False)


def has_adapters(model: SentenceTransformer) -> bool:
    """Tell whether a model has adapters beside its own weights."""
    return isinstance(model[0], AdaptedTransformer)


def adapter_kind(model: SentenceTransformer) -> str:
    """Return the kind of a model's adapters."""
    kind: str = model[0].adapter_settings.kind
    return kind


def _adapted_layers(model: SentenceTransformer, top: int | None) -> tuple[int, ...] | None:
    """Return the numbers of the layers from the top that get adapters, ``None`` for all."""
    count = len(layers_of(model))
    if top is not None and top > count:
        raise UserError(f"stage2.adapters.top_layers: {top} of {count} layers; give at most {count}")
    return None if top is None else tuple(range(count - top, count))


def _adapters_of(model: SentenceTransformer) -> dict[int, dict[str, torch.nn.Parameter]]:
    names = {id(value): name for name, value in model.named_parameters() if MARK in name}
    return {
        layer: {names[id(parameter)]: parameter for parameter in parameters}
        for layer, parameters in adapter_parameters_by_layer(model).items()
    }


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
        settings: StageSettings = getattr(config, name)
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

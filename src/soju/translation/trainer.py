"""Training for exactly N optimiser steps, validated at equal distances and rolled back when quality falls.

The clock is the trainer's ``global_step``: it only rises. A rollback publishes the files of the best checkpoint again
under the present clock, so that a resume, a kill in between and the schedule need to know nothing of it. Teacher and
student train alike; they differ in their `Objective`.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, linear
from torch.utils.data import DataLoader
from transformers import M2M100ForConditionalGeneration, Seq2SeqTrainer, Seq2SeqTrainingArguments, TrainerCallback

from soju.core.errors import BadNumbersError, RegressionError, UserError
from soju.core.files import MANIFEST, append_json_line, read_json_lines, verify_manifest, write_json, write_text
from soju.training.checkpoints import checkpoint_path, publish, resume_path, set_aside_after, staging_path
from soju.training.reliable import OwnProgress, ReliableTrainer
from soju.training.sampling import LengthBucketSampler
from soju.training.settings import stock_arguments
from soju.translation.config import ClockedTraining
from soju.translation.degradation import (
    Adjustment,
    DegradationSettings,
    Judgement,
    QualityDegradationDetector,
    Validation,
    best_of,
)
from soju.translation.loss import IGNORED, DistillationLoss, LossSettings
from soju.translation.step_account import StepAccount
from soju.translation.validation import DistillationValidator
from soju.translation.vocabulary import EncodedPairs, collate

# 1. What is minimised.


class Objective(Protocol):
    """A loss of a batch."""

    loss_components: dict[str, Tensor]
    """Its parts, for the history."""

    def __call__(
        self, model: M2M100ForConditionalGeneration, inputs: Mapping[str, Tensor], positions: float | None
    ) -> Tensor:
        """Return the loss; `positions` are the real target positions of the whole optimiser step."""


def decoder_states(model: M2M100ForConditionalGeneration, inputs: Mapping[str, Tensor]) -> Tensor:
    """Return the last decoder states at the real target positions, ``(N, D)``: padding needs no product."""
    output = model.model(
        input_ids=inputs["input_ids"],
        attention_mask=inputs["attention_mask"],
        decoder_input_ids=inputs["decoder_input_ids"],
        use_cache=False,
    )
    states: Tensor = output.last_hidden_state[inputs["labels"] != IGNORED]
    return states


class SupervisedObjective:
    """Label-smoothed cross-entropy with the references: what a teacher is trained with."""

    def __init__(self, label_smoothing: float) -> None:
        self.label_smoothing = label_smoothing
        self.loss_components: dict[str, Tensor] = {}

    def __call__(
        self, model: M2M100ForConditionalGeneration, inputs: Mapping[str, Tensor], positions: float | None
    ) -> Tensor:
        """Return the loss, mean over the positions."""
        labels_N = inputs["labels"][inputs["labels"] != IGNORED]
        logits_NV = linear(decoder_states(model, inputs), model.lm_head.weight)
        total = cross_entropy(logits_NV.float(), labels_N, label_smoothing=self.label_smoothing, reduction="sum")
        loss = total / (len(labels_N) if positions is None else positions)
        self.loss_components = {"cross_entropy": loss.detach()}
        return loss


class DistillationObjective:
    """The loss of `soju.translation.loss`, with the teacher asked at each step.

    Args:
        teacher: With the student's vocabulary; put into evaluation mode.
        settings: Weights and temperature.
        student_width: Channels of the student.
    """

    def __init__(self, teacher: M2M100ForConditionalGeneration, settings: LossSettings, *, student_width: int) -> None:
        self.teacher = teacher.eval().requires_grad_(False)
        self.loss = DistillationLoss(settings, student_width=student_width, teacher_width=teacher.config.d_model)
        self.loss_components: dict[str, Tensor] = {}

    def __call__(
        self, model: M2M100ForConditionalGeneration, inputs: Mapping[str, Tensor], positions: float | None
    ) -> Tensor:
        """Return the loss, mean over the positions."""
        if self.teacher.device != model.device:
            self.teacher.to(model.device)
        with torch.no_grad():
            theirs_NE = decoder_states(self.teacher, inputs)
        terms = self.loss(
            decoder_states(model, inputs),
            model.lm_head.weight,
            theirs_NE,
            self.teacher.lm_head.weight,
            inputs["labels"][inputs["labels"] != IGNORED],
            positions=positions,
        )
        self.loss_components = {name: value for name, value in terms.named().items() if name != "loss"}
        return terms.loss


# 2. What one training is: settings, data, and the record of what was decided.


@dataclass(slots=True)
class Training:
    """Everything that one training of a teacher or a student needs."""

    folder: Path
    """Gets ``checkpoints``, ``account.json``, ``verdicts.jsonl``, ``rollbacks.jsonl`` and ``history.jsonl``."""
    make_model: Callable[[], M2M100ForConditionalGeneration]
    """Makes the model as it starts; called for each attempt, and must give the same weights each time."""
    objective: Objective
    rows: EncodedPairs
    validator: DistillationValidator
    settings: ClockedTraining
    degradation: DegradationSettings
    seed: int
    callbacks: Sequence[TrainerCallback] = ()
    detector: QualityDegradationDetector = field(init=False)

    def __post_init__(self) -> None:
        self.detector = QualityDegradationDetector(self.degradation)

    @property
    def checkpoints(self) -> Path:
        """Folder of the checkpoints."""
        return self.folder / "checkpoints"

    @property
    def verdicts(self) -> Path:
        """What was decided at each validation."""
        return self.folder / "verdicts.jsonl"

    def history(self) -> list[Validation]:
        """Return all validations so far."""
        return [
            Validation(row["clock"], {name: _number(value) for name, value in row["quality"].items()}, row["accepted"])
            for row in read_json_lines(self.verdicts)
        ]

    def best_clock(self) -> int | None:
        """Return the clock of the best accepted validation."""
        history = self.history()
        return best_of(history).clock if any(entry.accepted for entry in history) else None


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a training left."""

    best: Path
    """Checkpoint of the best accepted validation."""
    best_clock: int
    account: StepAccount
    stopped: str | None = None
    """Why it ended before its last step."""


class _GoBackError(RegressionError):
    """A validation regressed; carries what was decided."""

    def __init__(self, judgement: Judgement) -> None:
        super().__init__("; ".join(judgement.reasons))
        self.judgement = judgement


class _AccountState:
    """The step account as a part of a checkpoint."""

    def __init__(self, account: StepAccount) -> None:
        self.account = account

    def state_dict(self) -> dict[str, Any]:
        """Return the account's entries."""
        return {"entries": self.account.to_json()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take the entries back."""
        self.account = StepAccount.from_json(state["entries"])


# 3. The stock trainer with our batches, our loss and our validation, then what makes it reliable.


class _TranslationBase(Seq2SeqTrainer):
    """Below `ReliableTrainer`: what it guards must come from here."""

    loss: Objective
    training: Training
    account: _AccountState
    control: Any

    def get_train_dataloader(self) -> Any:
        """Return batches of pairs of similar length."""
        rows = self.train_dataset
        sampler = LengthBucketSampler(rows.lengths, self._train_batch_size, seed=self.args.seed)
        loader: DataLoader[Any] = DataLoader(rows, batch_sampler=sampler, collate_fn=self.data_collator)
        return self.accelerator.prepare(loader)

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Tensor:
        """Return the objective of a batch."""
        positions = None if num_items_in_batch is None else float(num_items_in_batch)
        with self.accelerator.autocast():  # the model's parts are called, not its wrapped forward
            return self.loss(model, inputs, positions)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Validate the model as it is and judge that; raises when it is to be rolled back."""
        clock = self.state.global_step
        result = self.training.validator.validate(self.model, clock)
        metrics = {f"eval_quality_{name}": value for name, value in result.quality.items()}
        self.log(metrics)
        self.judge(clock, result)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def judge(self, clock: int, result: Any) -> None:
        """Decide what follows from a validation, write it down, and raise when it is no good."""
        training, account = self.training, self.account.account
        history = training.history()
        upper_ends = training.validator.upper_ends(result, best_of(history).clock) if history else None
        history.append(Validation(clock, result.quality))
        judgement = training.detector.judge(history, upper_ends, rollbacks=len(account.rollbacks))
        accepted = judgement.action == "accept"
        append_json_line(
            training.verdicts,
            {
                "clock": clock,
                "quality": {name: value if value == value else None for name, value in result.quality.items()},
                "accepted": accepted,
                **judgement.to_json(),
            },
        )
        if not accepted:
            raise _GoBackError(judgement)


class TranslationTrainer(OwnProgress, ReliableTrainer, _TranslationBase):
    """Books every step, and keeps the checkpoint that a rollback would need."""

    def __init__(self, training: Training, adjustment: Adjustment, account: StepAccount) -> None:
        self.training, self.account, self.loss = training, _AccountState(account), training.objective
        self._refused_now = False
        arguments = stock_arguments(
            training.settings, training.folder, seed=training.seed + adjustment.seed_offset, chosen_by=None
        )
        arguments |= {
            "eval_strategy": "steps",
            "metric_for_best_model": None,
            "remove_unused_columns": False,
            "disable_tqdm": True,
            "max_grad_norm": training.settings.max_grad_norm,
        }
        model = training.make_model()
        # Names of the tied table that no checkpoint holds; transformers would warn of them at each resume.
        table = model.model.shared.weight.data_ptr()
        tied = {name for name, value in model.state_dict().items() if value.data_ptr() == table}
        model._keys_to_ignore_on_save = tied - {"model.shared.weight"}
        super().__init__(
            model=model,
            args=Seq2SeqTrainingArguments(**arguments),
            train_dataset=training.rows,
            eval_dataset=training.rows,
            data_collator=collate,
            history=training.folder / "history.jsonl",
            extra_state={"account": self.account},
            learning_rate_scale=adjustment.learning_rate_factor,
            callbacks=[*training.callbacks, _Clock(self)],
        )
        if self.args.world_size > 1:
            raise UserError("translation trains on one process for now; start it without torchrun")
        self.model_accepts_loss_kwargs = True  # so that the positions of the whole step are counted

    def _refuse_step(self) -> None:
        self._refused_now = True
        super()._refuse_step()

    def book(self) -> None:
        """Book the step that was just made."""
        self.account.account.step(self.state.global_step, refused=self._refused_now)
        self._refused_now = False

    def begin(self) -> None:
        """Validate and save the model as it starts, so that a rollback can always go somewhere."""
        self.evaluate()
        self._save_checkpoint(self.model, None)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        account = self.account.account
        account.checkpoint()
        super()._save_checkpoint(model, trial)
        for clock in list(account.checkpoints):
            if not checkpoint_path(self.training.checkpoints, clock).is_dir():
                account.forget(clock)
        account.save(self.training.folder / "account.json")

    def _name_best_checkpoint(self, about_to_be: Path | None = None) -> None:
        best = self.training.best_clock()
        path = None if best is None else checkpoint_path(self.training.checkpoints, best)
        known = path is not None and (path.is_dir() or path == about_to_be)
        self.state.best_model_checkpoint = str(path) if known else None


class _Clock(TrainerCallback):
    """Books steps as they end."""

    def __init__(self, trainer: TranslationTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Validate the start of a run."""
        if state.global_step == 0 and not self.trainer.training.history():
            self.trainer.begin()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Book the step."""
        self.trainer.book()


# 4. The loop: train, and at a regression go back to the best checkpoint while the clock goes on.


def train_exactly(training: Training) -> Outcome:
    """Train until the clock has run out, rolling back where quality fell; a run that was begun goes on.

    Args:
        training: What to train.

    Returns:
        The best checkpoint and the account, which is closed unless the run stopped early.

    Raises:
        StoppedError: After a signal, when the checkpoint is written.
        UserError: If no checkpoint verifies though there are some.
    """
    training.folder.mkdir(parents=True, exist_ok=True)
    while True:
        start, account = _position(training)
        if stopped := _last_word(training):
            return _outcome(training, account, stopped)
        if account.closed:
            return _outcome(training, account)
        trainer = TranslationTrainer(training, Adjustment.after(len(account.rollbacks), training.degradation), account)
        try:
            trainer.train(start)
        except _GoBackError as error:
            judgement = error.judgement
        except BadNumbersError as error:
            trainer.account.account.step(trainer.state.global_step + 1, refused=True)
            judgement = _bad_numbers(training, str(error), len(trainer.account.account.rollbacks))
            clock = trainer.account.account.executed
            row = {"clock": clock, "quality": _nothing(training), "accepted": False, **judgement.to_json()}
            append_json_line(training.verdicts, row)
        else:
            trainer.account.account.save(training.folder / "account.json")
            continue
        account = trainer.account.account
        if judgement.action == "roll back":
            # What Adam and the batches hold is of the best step; the schedule is of the clock.
            scheduled = linear_factor(account.executed, training.settings)
            publish_rollback(training.checkpoints, account, judgement.best, scheduled)
            record = {**asdict(account.rollbacks[-1]), **judgement.to_json()}
            append_json_line(training.folder / "rollbacks.jsonl", record)
        account.save(training.folder / "account.json")


def _position(training: Training) -> tuple[Path | None, StepAccount]:
    """Return the checkpoint to go on from and its account; what was written after it is forgotten."""
    found = resume_path(training.checkpoints)
    if found.path is None and found.skipped:
        raise UserError(f"{found}; see soju verify, or remove {training.checkpoints} to train from the beginning")
    account = StepAccount(training.settings.max_steps)
    if found.path is not None:
        state = json.loads((found.path / "extra_state.json").read_text(encoding="utf-8"))
        account = StepAccount.from_json(state["recipe.account"]["entries"])
        for clock in [*account.checkpoints]:  # those that were removed after it was written
            if not checkpoint_path(training.checkpoints, clock).is_dir():
                account.forget(clock)
    rows = read_json_lines(training.verdicts)
    # A run that gave up ends with a verdict after its last checkpoint, which stands.
    if not (rows and rows[-1]["action"] == "stop"):
        kept = [row for row in rows if found.path is not None and row["clock"] <= account.executed]
        write_text(training.verdicts, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in kept))
    else:
        account = StepAccount.load(training.folder / "account.json")
    clocks = {entry.clock for entry in account.rollbacks}
    record = training.folder / "rollbacks.jsonl"
    undone = [row for row in read_json_lines(record) if row["clock"] in clocks]
    write_text(record, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in undone))
    return found.path, account


def _last_word(training: Training) -> str | None:
    rows = read_json_lines(training.verdicts)
    if not rows or rows[-1]["action"] != "stop":
        return None
    last, total = rows[-1], training.settings.max_steps
    return f"stopped after {last['clock']:,} of {total:,} steps: {'; '.join(last['reasons'])}"


def _outcome(training: Training, account: StepAccount, stopped: str | None = None) -> Outcome:
    account.save(training.folder / "account.json")
    best = training.best_clock()
    if best is None:
        raise UserError(f"{training.folder}: no validation was accepted; {stopped or 'see verdicts.jsonl'}")
    path = checkpoint_path(training.checkpoints, best)
    verify_manifest(path)
    return Outcome(path, best, account, stopped)


def _bad_numbers(training: Training, reason: str, rollbacks: int) -> Judgement:
    settings = training.degradation
    stop = rollbacks >= settings.max_rollbacks
    after = Adjustment.after(rollbacks + (not stop), settings)
    return Judgement("stop" if stop else "roll back", best_of(training.history()).clock, (reason,), (), after)


def _nothing(training: Training) -> dict[str, None]:
    return dict.fromkeys(training.history()[0].quality)


def _number(value: float | None) -> float:
    return float("nan") if value is None else float(value)


def linear_factor(clock: int, settings: ClockedTraining) -> float:
    """Return the schedule's share of the learning rate after so many steps: a linear rise, a linear fall to 0."""
    warmup, total = settings.warmup_of(settings.max_steps), settings.max_steps
    if clock < warmup:
        return clock / max(1, warmup)
    return max(0.0, (total - clock) / max(1, total - warmup))


_REWRITTEN = ("trainer_state.json", "optimizer.pt", "scheduler.pt", "extra_state.json", MANIFEST)


def publish_rollback(checkpoints: Path, account: StepAccount, back_to: int, scheduled: float) -> Path:
    """Publish the checkpoint of an earlier step under the present clock.

    Weights and all that does not know the clock are hard links. Checkpoints in between become ``abandoned-*`` first: a
    kill before the last rename resumes from the earlier step and comes to the same decision again.

    Args:
        checkpoints: Folder of the checkpoints.
        account: Of the run; the rollback is booked in it.
        back_to: Clock of the checkpoint to go back to.
        scheduled: `linear_factor` of the present clock.

    Returns:
        The new checkpoint.
    """
    source, clock = checkpoint_path(checkpoints, back_to), account.executed
    verify_manifest(source)
    set_aside_after(checkpoints, back_to)
    account.roll_back(back_to)
    staged = staging_path(checkpoints, clock)
    shutil.rmtree(staged, ignore_errors=True)
    staged.mkdir(parents=True)
    for path in sorted(source.iterdir()):
        if path.is_file() and path.name not in _REWRITTEN:
            os.link(path, staged / path.name)
    _move_clock(source, staged, clock, scheduled, account)
    final = checkpoint_path(checkpoints, clock)
    publish(staged, final)
    return final


def _move_clock(source: Path, staged: Path, clock: int, scheduled: float, account: StepAccount) -> None:
    state = json.loads((source / "trainer_state.json").read_text(encoding="utf-8"))
    extra = json.loads((source / "extra_state.json").read_text(encoding="utf-8"))
    scheduler = torch.load(source / "scheduler.pt", weights_only=True)
    optimiser = torch.load(source / "optimizer.pt", weights_only=True)
    state["global_step"] = clock
    scheduler |= {
        "last_epoch": clock,
        "_step_count": clock + 1,
        "_last_lr": [rate * scheduled for rate in scheduler["base_lrs"]],
    }
    for group, rate in zip(optimiser["param_groups"], scheduler["_last_lr"], strict=True):
        group["lr"] = rate
    extra["recipe.account"] = _AccountState(account).state_dict()
    # The open window of the log is of steps that are undone.
    extra["run"] |= {"totals": [{}], "steps": 0, "refused": 0}
    write_json(staged / "trainer_state.json", state)
    write_json(staged / "extra_state.json", extra)
    torch.save(scheduler, staged / "scheduler.pt")
    torch.save(optimiser, staged / "optimizer.pt")


def resolved(settings: ClockedTraining) -> ClockedTraining:
    """Return settings in which `mixed_precision` says what is used: bf16 where it is fast, else off."""
    if settings.mixed_precision != "auto":
        return settings
    fast = torch.cuda.is_available() and torch.cuda.is_bf16_supported()
    capable: Mapping[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    fast = fast or (not torch.cuda.is_available() and bool(capable.get("avx512_bf16") or capable.get("amx_bf16")))
    return settings.model_copy(update={"mixed_precision": "bf16" if fast else "off"})

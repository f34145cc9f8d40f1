"""A mixin that makes any transformers trainer reliable: checkpoints, resume, signals, bad numbers, history.

``class TermsTrainer(ReliableTrainer, SparseEncoderTrainer): ...`` trains as the stock class does and adds: checkpoints
that are whole or absent, a resume that ends in the same bits, refusal of steps that are not finite, a clean stop at
SIGTERM and Ctrl-C, and a history of loss components before weighting.

This is the only file that overrides private methods of transformers' trainer. `_HOOKS` lists them, and a trainer class
that lacks one is refused, because a hook that is never called would fail silently.
"""

from __future__ import annotations

import functools
import json
import logging
import math
import shutil
import signal
import threading
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor, nn
from transformers import PrinterCallback, ProgressCallback, TrainerCallback

from soju.core.errors import StoppedError, UserError
from soju.core.files import verify_manifest, write_json
from soju.core.progress import is_shown
from soju.training.checkpoints import (
    checkpoint_path,
    checkpoint_step,
    explain_failure,
    folder_bytes,
    list_checkpoints,
    publish,
    require_space,
    resume_path,
    rotate,
    set_aside_after,
    staging_path,
    tidy,
)
from soju.training.history import LOSS, BadNumbers, HistoryFile, LossWindow, add_totals, describe
from soju.training.ranks import from_all, largest, on_main_process
from soju.training.sampling import SeededCollator, set_epoch_everywhere, start_worker
from soju.training.state import (
    LossParameters,
    RandomState,
    RunState,
    Stateful,
    kept_random_state,
    read_extra_state,
    write_extra_state,
)

if TYPE_CHECKING:
    from transformers import Trainer as _Trainer
else:
    _Trainer = object


logger = logging.getLogger(__name__)


class StopSignals:
    """Context in which SIGTERM and SIGINT are noted instead of obeyed.

    The stock ``enable_jit_checkpoint`` does not serve: it knows no SIGINT, leaves exit code 0, waits three seconds in
    a thread, and may save between the micro-batches of a step, from where a resume cannot be exact.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        """Number of the first signal that came, or ``None``."""
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Self:
        self.received = None
        if threading.current_thread() is threading.main_thread():  # Python lets only the main thread do this
            for number in (signal.SIGTERM, signal.SIGINT):
                self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._restore()

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None:
            self._restore()
            raise KeyboardInterrupt
        self.received = number
        name = signal.Signals(number).name
        logger.warning("%s: saving a checkpoint at the end of this step; again to stop at once", name)

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()


def scale_learning_rate(optimizer: Any, scheduler: Any, factor: float) -> None:
    """Multiply the learning rate of everything still to come.

    Setting it in the arguments of a resumed run does nothing, because optimiser and scheduler bring their own from the
    checkpoint; so their state is edited.

    Args:
        optimizer: With ``param_groups``.
        scheduler: A ``LRScheduler`` that computes from ``base_lrs``, as all stock ones of transformers do.
        factor: > 0.

    Raises:
        ValueError: If `factor` is not positive, or the scheduler has no ``base_lrs``.
    """
    if not factor > 0:
        raise ValueError(f"factor must be > 0, got {factor}")
    if factor == 1:
        return
    if not hasattr(scheduler, "base_lrs"):
        raise ValueError(f"{type(scheduler).__name__} has no base_lrs; use a schedule that is a function of the step")
    for group in optimizer.param_groups:
        for key in {"lr", "initial_lr"} & group.keys():
            group[key] *= factor
    scheduler.base_lrs = [rate * factor for rate in scheduler.base_lrs]
    scheduler._last_lr = [rate * factor for rate in scheduler._last_lr]


_PICKLED_ARGUMENTS = "training_args.bin"
_ARGUMENTS = "training_args.json"
_SPARE_BYTES = 1 << 20
"""Room for what a checkpoint holds besides tensors, until the first one shows its true size."""


class WholeCheckpoints(_Trainer):
    """Half of `ReliableTrainer`: how a checkpoint is written, kept and removed.

    The stock trainer writes straight into ``checkpoint-N`` and rotates before ``on_save``, so that a kill leaves a
    folder that looks like a checkpoint, and a manifest written there can come after the last good one was deleted. Here
    a checkpoint is written under a hidden name, gets its manifest last, and appears by one rename.
    """

    args: Any
    _staging: Path | None = None
    _saved_step: int | None = None
    _random_state_to_save: RandomState | None = None

    def _state_to_save(self) -> Mapping[str, Stateful]:
        """Return what a checkpoint holds besides the stock files; called on every rank."""
        return {}

    def _weights_to_save(self) -> Iterable[Tensor]:
        """Return the weights that a checkpoint will hold, to know its size."""
        weights: Iterable[Tensor] = self.model.state_dict().values()
        return weights

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._staging) if self._staging else super()._get_output_dir(trial)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        folder = Path(self.args.output_dir)
        final = checkpoint_path(folder, self.state.global_step)
        staging = staging_path(folder, self.state.global_step)
        needed = self._bytes_needed(folder)
        parts = self._state_to_save()
        on_main_process(lambda: require_space(folder, needed))
        try:
            with kept_random_state() as self._random_state_to_save:
                self._staging = staging
                super()._save_checkpoint(model, trial)
            self._name_best_checkpoint(about_to_be=final)
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                write_extra_state(staging / final.name, parts)
                self.state.save_to_json(str(staging / final.name / "trainer_state.json"))
                publish(staging / final.name, final)
        except Exception as error:
            full = explain_failure(error, folder, staging=staging, needed=needed)
            if full:
                raise full from error
            raise
        finally:
            self._staging = None
        if self.args.should_save:
            shutil.rmtree(staging, ignore_errors=True)
            best = self.state.best_model_checkpoint
            rotate(folder, keep_last=self.args.save_total_limit, protected=[Path(best)] if best else [])
        self._saved_step = self.state.global_step

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        if not self.args.should_save and not self.is_distributed_loading_by_transformers:
            return  # sentence-transformers writes on every rank into the same files
        arguments, self.args = self.args, _NotPickled(self.args)
        try:
            super()._save(output_dir, state_dict=state_dict)
        finally:
            self.args = arguments
        folder = Path(output_dir or self.args.output_dir)
        (folder / _PICKLED_ARGUMENTS).unlink(missing_ok=True)
        write_json(folder / _ARGUMENTS, json.loads(json.dumps(self.args.to_dict(), default=_type_name)))

    def _save_rng_state(self, output_dir: str) -> None:
        if self._random_state_to_save:  # as it was before the model was written
            self._random_state_to_save.restore()
        super()._save_rng_state(output_dir)

    def _name_best_checkpoint(self, about_to_be: Path | None = None) -> None:
        self.state.best_model_checkpoint = None
        if self.state.best_global_step:
            best = checkpoint_path(Path(self.args.output_dir), self.state.best_global_step)
            if best.is_dir() or best == about_to_be:
                self.state.best_model_checkpoint = str(best)

    def _load_best_model(self) -> None:
        verify_manifest(Path(self.state.best_model_checkpoint))
        super()._load_best_model()

    def _bytes_needed(self, folder: Path) -> int:
        tensors = [*self._weights_to_save(), *_tensors(self.optimizer.state_dict())]
        sizes = {tensor.data_ptr(): tensor.numel() * tensor.element_size() for tensor in tensors}
        earlier = [folder_bytes(path) for path in list_checkpoints(folder)[-1:]]
        return max([sum(sizes.values()) + _SPARE_BYTES, *earlier])

    def _finalize_training(self, *args: Any, **kwargs: Any) -> Any:
        limit, self.args.save_total_limit = self.args.save_total_limit, None  # at 1 it deletes all but the best
        try:
            return super()._finalize_training(*args, **kwargs)
        finally:
            self.args.save_total_limit = limit


class _NotPickled:
    """Training arguments as they are, except that the pickle of them holds nothing and cannot fail."""

    def __init__(self, arguments: Any) -> None:
        self._arguments = arguments

    def __getattr__(self, name: str) -> Any:
        return getattr(self._arguments, name)

    def __reduce__(self) -> tuple[Any, ...]:
        return dict, ()


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors(item)


def _type_name(value: Any) -> str:
    return type(value).__qualname__


_REFUSED = {
    "enable_jit_checkpoint": "leave it off: SIGTERM is served, and from between two micro-batches no resume is exact",
    "save_only_model": "leave it off: without optimiser and random state no resume is exact",
    "ignore_data_skip": "leave it off: rows would be seen twice after a resume",
    "auto_find_batch_size": "set per_device_train_batch_size: another batch size is another run",
}
"""Training arguments that cannot go together with an exact resume."""

_HOOKS = (
    "_finalize_training",
    "_get_grad_norm",
    "_get_output_dir",
    "_init_training_state",
    "_load_best_model",
    "_maybe_log_save_evaluate",
    "_prepare_for_training",
    "_run_epoch",
    "_save",
    "_save_checkpoint",
    "_save_rng_state",
    "evaluate",
    "get_train_dataloader",
    "log",
    "train",
    "training_step",
)
"""Methods of the stock trainer that are overridden. An override of a missing one would never be called, silently."""


class ReliableTrainer(WholeCheckpoints):
    """Put before a trainer class: ``class TermsTrainer(ReliableTrainer, SparseEncoderTrainer)``.

    ``save_total_limit`` of the arguments keeps that many last checkpoints *and* the best one. The evaluation and the
    writing of a checkpoint leave the random state alone, so a run that saves or evaluates more often ends in the same
    weights. ``restore_callback_states_from_checkpoint`` is always on, so that patience is resumed too.

    Args:
        *args: For the trainer class.
        history: ``history.jsonl`` to write, or ``None``.
        extra_state: What else a checkpoint must hold, by name, equal on every rank.
        bad_steps_limit: Refused steps in a row that end the run with `BadNumbersError`, >= 1.
        learning_rate_scale: Factor on the learning rate of the arguments, also of a run that resumes with another one.
        **kwargs: For the trainer class.
    """

    def __init__(
        self,
        *args: Any,
        history: Path | None = None,
        extra_state: Mapping[str, Stateful] | None = None,
        bad_steps_limit: int = 5,
        learning_rate_scale: float = 1.0,
        **kwargs: Any,
    ) -> None:
        self._refuse_other_trainers()
        self._history = HistoryFile(history) if history else None
        self._extra_state = dict(extra_state or {})
        self._learning_rate_scale = learning_rate_scale
        self._bad_numbers = BadNumbers(bad_steps_limit)
        self._window = LossWindow()
        self._signals = StopSignals()
        self._agreed_signal: int | None = None
        self._weighted_components: dict[str, Tensor] = {}
        self._epoch_ended = False
        self._save_postponed = False
        self._steps_in_epoch = 1
        self._collator: SeededCollator | None = None
        self.args: Any
        self.control: Any
        super().__init__(*args, **kwargs)
        losses = getattr(self, "loss", {})
        modules = losses.values() if isinstance(losses, dict) else [losses]
        self._loss_parameters = LossParameters(modules, self.model)
        self._refuse_arguments()
        self.args.restore_callback_states_from_checkpoint = True
        self.add_callback(_EpochEnd(self))

    def _refuse_other_trainers(self) -> None:
        classes = type(self).__mro__
        stock = classes[classes.index(WholeCheckpoints) + 1 :]
        missing = [name for name in _HOOKS if not any(name in vars(base) for base in stock)]
        if missing:
            raise TypeError(
                f"{type(self).__name__}: the trainer class after ReliableTrainer has no {', '.join(missing)}; put one "
                "of transformers >= 5.23 there"
            )

    def _refuse_arguments(self) -> None:
        for name, remedy in _REFUSED.items():
            if getattr(self.args, name, False):
                raise UserError(f"{name}: {remedy}")
        if self._loss_parameters and self.args.world_size > 1:
            raise UserError(
                f"the loss has trainable parameters of its own ({', '.join(self._loss_parameters)}), which the ranks "
                "would train apart; put them into the model, or train on one process"
            )

    # 1. Start: from the newest checkpoint that verifies, from the one named, or from nothing.

    def train(
        self,
        resume_from_checkpoint: str | Path | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> Any:
        """Train as `transformers.Trainer.train` does, from a checkpoint, or from the newest that verifies (``True``).

        Checkpoints later than it are renamed to ``abandoned-checkpoint-N``. Refused are a resume without a checkpoint
        and a new run among old ones (`UserError`), and a named checkpoint that does not verify (`IntegrityError`). The
        run ends with `BadNumbersError` after too many refused steps in a row, with `DiskFullError` if a checkpoint does
        not fit, and with `StoppedError` after a signal, when the checkpoint is written.
        """
        start = on_main_process(lambda: self._choose_start(resume_from_checkpoint))
        logger.info("resuming from %s", start) if start else logger.info("training from the beginning")
        self._window.clear()
        self._saved_step = checkpoint_step(Path(start)) if start else None
        with self._signals:
            result = super().train(start, trial, ignore_keys_for_eval)
        if self._signals.received is not None:  # it came after the last checkpoint
            raise self._stopped(self._signals.received)
        return result

    def _choose_start(self, wanted: str | Path | bool | None) -> str | None:
        folder = Path(self.args.output_dir)
        path: Path | None = None
        if wanted is True:
            found = resume_path(folder)
            if found.path is None:
                raise UserError(f"{folder}: {found}; train without --resume")
            path = found.path
        elif wanted:
            tidy(folder)
            path = Path(wanted)
            verify_manifest(path)
            set_aside_after(folder, checkpoint_step(path))
        elif list_checkpoints(folder):
            raise UserError(f"{folder}: holds checkpoints already; train with --resume, or choose another folder")
        if self._history:
            self._history.begin(checkpoint_step(path) if path else 0)
        return str(path) if path else None

    def _init_training_state(self, *args: Any, **kwargs: Any) -> Any:
        result = super()._init_training_state(*args, **kwargs)
        self._name_best_checkpoint()  # the path in the checkpoint is from where the run folder was then
        return result

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: str | None) -> Any:
        result = super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)
        scaled = 1.0
        if resume_from_checkpoint is not None:
            run = RunState(self)
            read_extra_state(Path(resume_from_checkpoint), self._state_parts(run))
            scaled = run.learning_rate_scale
        scale_learning_rate(self.optimizer, self.lr_scheduler, self._learning_rate_scale / scaled)
        return result

    def _state_to_save(self) -> Mapping[str, Stateful]:
        return self._state_parts(RunState(self, totals=from_all(self._window.totals())))

    def _state_parts(self, run: RunState) -> dict[str, Stateful]:
        parts: dict[str, Stateful] = {"run": run, "bad_numbers": self._bad_numbers}
        if self._loss_parameters:
            parts["loss"] = self._loss_parameters
        return {**parts, **{f"recipe.{name}": part for name, part in self._extra_state.items()}}

    # 2. Data: every batch is a pure function of seed, epoch and rows, so there is nothing to remember.

    def get_train_dataloader(self) -> Any:
        """Return the stock loader with a seeded collator, whose workers leave Ctrl-C to the main process."""
        loader = super().get_train_dataloader()
        base = getattr(loader, "base_dataloader", loader)
        self._collator = base.collate_fn = SeededCollator(base.collate_fn, seed=self.args.seed)
        if base.num_workers:
            base.worker_init_fn = functools.partial(start_worker, base.worker_init_fn)
        return loader

    def _run_epoch(self, **kwargs: Any) -> None:
        if self.state.global_step >= self.state.max_steps:  # a finished run was resumed: the stock loop would go on
            self.control.should_training_stop = True
            return
        self._epoch_ended = self._save_postponed = False
        self._steps_in_epoch = kwargs["num_update_steps_per_epoch"]
        set_epoch_everywhere(kwargs["train_dataloader"], kwargs["epoch"])
        assert self._collator is not None
        self._collator.set_epoch(kwargs["epoch"])
        super()._run_epoch(**kwargs)

    # 3. Every step: note the loss components; refuse the step when loss or gradient is not finite.

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """Run one micro-batch as the trainer does and note its loss components."""
        owners = self._loss_modules()
        for owner in owners:
            owner.loss_components = {}  # of several losses only the one that runs now has components afterwards
        self._weighted_components = {}
        loss: Tensor = super().training_step(*args, **kwargs)
        unweighted = {name: value for owner in owners for name, value in owner.loss_components.items()}
        self._window.add(loss, unweighted or self._weighted_components)
        return loss

    def _loss_modules(self) -> list[Any]:
        losses = getattr(self, "loss", {})
        candidates = [*(losses.values() if isinstance(losses, dict) else [losses]), self.compute_loss_func, self.model]
        return [owner for owner in candidates if hasattr(owner, "loss_components")]

    def track_loss_components(self, loss: dict[str, Tensor]) -> None:
        """Keep the components of a training batch unrounded; those of an evaluation are the stock trainer's."""
        if self.model.training:
            self._weighted_components = {name: value.detach() for name, value in loss.items()}
        else:
            super().track_loss_components(loss)

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm)
        losses = [components[LOSS] for components in self._window.pending]
        finite = torch.isfinite(torch.stack(losses)).all() if losses else torch.tensor(True)
        if norm is not None and not self._scaler_will_skip():
            finite = finite & torch.isfinite(torch.as_tensor(norm, device=finite.device))
            for parameter in self._loss_parameters.values():  # the norm is of the model's alone
                finite = finite & (parameter.grad is None or torch.isfinite(parameter.grad).all())
        refused, signal_number = largest([not finite.item(), self._signals.received or 0], self.args.device)
        self._agreed_signal = signal_number or None
        if refused:
            self._refuse_step()
        else:
            self._window.accept()
            self._bad_numbers.accept()
        return norm

    def _scaler_will_skip(self) -> bool:
        """Whether the loss scale may have made a gradient infinite, which the scaler then finds and handles itself."""
        scaler = getattr(self.accelerator, "scaler", None)
        return scaler is not None and scaler.is_enabled() and scaler.get_scale() > 1.0

    def _refuse_step(self) -> None:
        parameters = [*self.model.named_parameters(), *self._loss_parameters.items()]
        what = describe(self._window.pending, parameters, total=LOSS)
        if self.args.world_size > 1:
            what = "; ".join(f"rank {rank}: {text}" for rank, text in enumerate(from_all(what)))
        step = self.state.global_step + 1
        for group in self.optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = None  # no gradient, no update: neither weights nor moments move
        self._window.refuse()
        logger.warning("step %d refused: %s", step, what)
        if self._history and self.is_world_process_zero():
            self._history.append({"step": step, "refused": what})
        self._bad_numbers.refuse(step, what)

    # 4. After a step: log loss components, evaluate, save; stop when a signal came.

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log as the trainer does, unweighted components as ``loss_NAME``, and append the row to ``history.jsonl``."""
        if LOSS in logs:
            totals = add_totals(from_all(self._window.totals()))
            means = {name: total / count for name, (total, count) in totals.items() if count}
            logs[LOSS] = means.pop(LOSS, math.nan)
            logs |= {f"loss_{name}": value for name, value in means.items()}
            if self._window.refused:
                logs["refused_steps"] = self._window.refused
            self._window.clear()
        super().log(logs, start_time)
        row = {key: value for key, value in logs.items() if not key.endswith(("_runtime", "_per_second", "epoch"))}
        is_row = LOSS in logs or any(key.startswith("eval_") for key in logs)
        if self._history and is_row and self.is_world_process_zero():
            self._history.append({"step": self.state.global_step, "epoch": self.state.epoch, **row})

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        if self.args.world_size == 1:
            self._agreed_signal = self._signals.received
        stop = self._agreed_signal is not None
        step = self.state.global_step
        is_last = step % self._steps_in_epoch == 0 or step >= self.state.max_steps
        if not self._epoch_ended:
            self.control.should_training_stop |= stop
            self.control.should_save |= stop
            if is_last:  # what the end of the epoch still evaluates must be in the checkpoint
                self._save_postponed, self.control.should_save = self.control.should_save, False
        elif stop and not is_last:  # the uninterrupted run neither evaluates nor saves here
            self.control.should_log = self.control.should_evaluate = self.control.should_save = False
        else:
            self.control.should_save |= self._save_postponed
        super()._maybe_log_save_evaluate(*args, **kwargs)

    def evaluate(self, *args: Any, **kwargs: Any) -> Any:
        """Evaluate without moving the random state."""
        with kept_random_state():
            return super().evaluate(*args, **kwargs)

    def _finalize_training(self, trial: Any, *args: Any, **kwargs: Any) -> Any:
        if self.args.world_size == 1:
            self._agreed_signal = self._signals.received
        if self._agreed_signal is not None:
            if self._saved_step != self.state.global_step:
                self._save_checkpoint(self.model, trial)
            self.control = self.callback_handler.on_train_end(self.args, self.state, self.control)
            raise self._stopped(self._agreed_signal)
        return super()._finalize_training(trial, *args, **kwargs)

    def _stopped(self, number: int) -> StoppedError:
        place = checkpoint_path(Path(self.args.output_dir), self._saved_step) if self._saved_step else None
        return StoppedError(
            f"{signal.Signals(number).name}: stopped after step {self.state.global_step:,} of "
            f"{self.state.max_steps:,}; {place or 'no checkpoint'} is written; train again with --resume",
            signal_number=number,
        )


class _EpochEnd(TrainerCallback):
    """Tells the trainer that what it saves next is the end of an epoch."""

    def __init__(self, trainer: ReliableTrainer) -> None:
        self.trainer = trainer

    def on_epoch_end(self, *args: Any, **kwargs: Any) -> None:
        self.trainer._epoch_ended = True


class OwnProgress(_Trainer):
    """Put first: ``class TermsTrainer(OwnProgress, ReliableTrainer, SparseEncoderTrainer)``.

    It shows progress as everything else here does, and leaves the model card to the recipe.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.remove_callback(PrinterCallback)
        if not is_shown():
            self.remove_callback(ProgressCallback)

    def add_model_card_callback(self, default_args_dict: dict[str, Any]) -> None:
        """Add none: the recipe writes the card, and the stock one reads the rows to make up examples."""

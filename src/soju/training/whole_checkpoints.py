"""Checkpoints of a transformers trainer, written out of sight, manifest last, one rename.

The stock trainer writes straight into ``checkpoint-N`` and rotates before ``on_save``, so that a kill leaves a folder
that looks like a checkpoint, and a manifest written there can come after the last good one was deleted.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from soju.core.files import verify_manifest, write_json
from soju.training import checkpoints
from soju.training.extra_state import Stateful, write_extra_state
from soju.training.random_state import RandomState, kept_random_state
from soju.training.ranks import on_main_process

if TYPE_CHECKING:
    from transformers import Trainer as _Trainer
else:
    _Trainer = object


_PICKLED_ARGUMENTS = "training_args.bin"
_ARGUMENTS = "training_args.json"
_SPARE_BYTES = 1 << 20
"""Room for what a checkpoint holds beside tensors, until the first one shows its true size."""


class WholeCheckpoints(_Trainer):
    """Half of `ReliableTrainer`: how a checkpoint is written, kept and removed."""

    args: Any
    _staging: Path | None = None
    _saved_step: int | None = None
    _random_state_to_save: RandomState | None = None

    def _state_to_save(self) -> Mapping[str, Stateful]:
        """Return what belongs into a checkpoint beside the stock files; called on every rank."""
        return {}

    def _weights_to_save(self) -> Iterable[Tensor]:
        """Return the weights that a checkpoint will hold, to know its size."""
        weights: Iterable[Tensor] = self.model.state_dict().values()
        return weights

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._staging) if self._staging else super()._get_output_dir(trial)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        folder = Path(self.args.output_dir)
        final = checkpoints.checkpoint_path(folder, self.state.global_step)
        staging = checkpoints.staging_path(folder, self.state.global_step)
        needed = self._bytes_needed(folder)
        parts = self._state_to_save()
        on_main_process(lambda: checkpoints.require_space(folder, needed))
        try:
            with kept_random_state() as self._random_state_to_save:
                self._staging = staging
                super()._save_checkpoint(model, trial)
            self._name_best_checkpoint(about_to_be=final)
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                write_extra_state(staging / final.name, parts)
                self.state.save_to_json(str(staging / final.name / "trainer_state.json"))
                checkpoints.publish(staging / final.name, final)
        except Exception as error:
            full = checkpoints.explain_failure(error, folder, staging=staging, needed=needed)
            if full:
                raise full from error
            raise
        finally:
            self._staging = None
        if self.args.should_save:
            shutil.rmtree(staging, ignore_errors=True)
            best = self.state.best_model_checkpoint
            checkpoints.rotate(folder, keep_last=self.args.save_total_limit, protected=[Path(best)] if best else [])
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
            best = checkpoints.checkpoint_path(Path(self.args.output_dir), self.state.best_global_step)
            if best.is_dir() or best == about_to_be:
                self.state.best_model_checkpoint = str(best)

    def _load_best_model(self) -> None:
        verify_manifest(Path(self.state.best_model_checkpoint))
        super()._load_best_model()

    def _bytes_needed(self, folder: Path) -> int:
        tensors = [*self._weights_to_save(), *_tensors(self.optimizer.state_dict())]
        sizes = {tensor.data_ptr(): tensor.numel() * tensor.element_size() for tensor in tensors}
        earlier = [checkpoints.folder_bytes(path) for path in checkpoints.list_checkpoints(folder)[-1:]]
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
